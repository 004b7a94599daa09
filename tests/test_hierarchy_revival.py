"""Revival of dead clusters and codes of two levels: what stays, what gets tokens, and the callback in a real fit."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, Trainer
from torch.utils.data import DataLoader

from lit_logits import VQLogitsLM
from lit_logits.callbacks import CodebookReinit
from lit_logits.contracts import RevivableHead, Revival, StagedHead
from lit_logits.functional import capped_assignment
from lit_logits.functional.hierarchical_vq import HierarchicalCodes, cluster_layout, hierarchical_log_probs
from lit_logits.functional.hierarchy_revival import regroup_tokens, revive_hierarchy, token_slopes
from lit_logits.modules import DenseLogitsHead, HierarchicalVQLogitsHead, VQLogitsHead

V, D, K, SIZES = 40, 5, 8, (6, 4)
NONE = torch.empty(0, dtype=torch.int64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(seed=0, *, bias=True, cap=None, used=K - 2):
    """Clusters that own tokens are the first `used`; the last codes of both stages own none."""
    generator = rng(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    owner = torch.cat([torch.arange(used), torch.randint(used, (V - used,), generator=generator)])
    codes = torch.stack([torch.randint(size - 1, (V,), generator=generator) for size in SIZES], 1)
    layout, table = cluster_layout(owner, codes, K, SIZES), randn(sum(SIZES), D)
    return HierarchicalCodes(randn(K, D), table, layout, randn(K), randn(V) if bias else None, cap), codes


def revived(head, codes, *, clusters=NONE, stages=(NONE, NONE), counts=None, max_cluster_size=V):
    counts = torch.ones(V) if counts is None else counts
    found = revive_hierarchy(
        *(head, codes, SIZES),
        dead_clusters=clusters,
        dead_codes=stages,
        token_counts=counts,
        max_cluster_size=max_cluster_size,
        generator=rng(),
    )
    layout = cluster_layout(found.token_to_cluster, found.token_codes, K, SIZES)
    new = HierarchicalCodes(found.clusters, found.codes, layout, found.cluster_bias, found.token_bias, head.cap)
    return new, found


def gradients_at_zero(head):
    """d log p(v | h) / dh at h = 0 (V, d), by autograd."""
    return torch.autograd.functional.jacobian(lambda h: hierarchical_log_probs(h, head), torch.zeros(D).double())


# ---------------------------------------------------------------------- clusters


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("bias", [True, False])
def test_slopes_are_those_of_the_log_probs_at_zero(bias, cap):
    head, _ = problem(bias=bias, cap=cap)
    found, log_probs = token_slopes(head), hierarchical_log_probs(torch.zeros(D).double(), head)
    common = gradients_at_zero(head) - found.rows
    torch.testing.assert_close(common, common[:1].expand(V, D))
    torch.testing.assert_close(found.log_probs.log_softmax(0), log_probs)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_split_keeps_value_and_slope_at_zero_and_errs_in_second_order(seed, bias, cap):
    """A copied vector kept the sum of the halves, and lost what tells them apart: an error of first order."""
    head, codes = problem(seed, bias=bias, cap=cap)
    new, found = revived(head, codes, clusters=torch.tensor([6, 7]))
    assert (torch.bincount(found.token_to_cluster, minlength=K) > 0).all()
    torch.testing.assert_close(gradients_at_zero(new), gradients_at_zero(head))
    hidden = torch.randn(200, D, generator=rng(seed), dtype=torch.float64)

    def error(scale):
        return (hierarchical_log_probs(scale * hidden, new) - hierarchical_log_probs(scale * hidden, head)).abs().mean()

    assert error(0.0) < 1e-12
    assert 3.5 < error(0.002) / error(0.001) < 4.5  # twice as far is four times the error


@given(st.integers(0, 10_000), st.booleans(), st.lists(st.integers(0, K - 1), unique=True, max_size=K - 2), st.data())
@settings(max_examples=60, deadline=None)
def test_what_holds_for_every_revival(seed, bias, dead, data):
    """Tokens of dead clusters move, so slopes change; p(v | 0) does not, and no cluster is over-full."""
    head, codes = problem(seed, bias=bias)
    sizes = torch.bincount(head.layout.token_to_cluster, minlength=K)
    if sizes[dead].sum() == V:
        return
    max_size = data.draw(st.integers(int(sizes.max()), V))
    counts = torch.rand(V, generator=rng(seed))
    new, found = revived(head, codes, clusters=torch.tensor(dead).long(), counts=counts, max_cluster_size=max_size)
    now = torch.bincount(found.token_to_cluster, minlength=K)
    assert int(now.max()) <= max_size
    same = now.eq(sizes) & torch.tensor(
        [bool(((head.layout.token_to_cluster == k) == (found.token_to_cluster == k)).all()) for k in range(K)]
    )
    for tensor, old in ((found.clusters, head.clusters), (found.cluster_bias, head.cluster_bias)):
        assert torch.equal(tensor[same], old[same])  # to the bit
    zero = torch.zeros(D).double()
    before, after = hierarchical_log_probs(zero, head), hierarchical_log_probs(zero, new)
    if bias:  # without one, tokens of a cluster with equal codes are equally likely wherever they come from
        torch.testing.assert_close(after, before)
    hidden = torch.randn(3, D, generator=rng(seed), dtype=torch.float64)
    stay = same[found.token_to_cluster]
    odds = [hierarchical_log_probs(hidden, each)[:, stay] for each in (head, new)]
    if stay.any():  # whatever the context, these keep their odds
        torch.testing.assert_close(odds[0] - odds[0][:, :1], odds[1] - odds[1][:, :1])


def test_the_cluster_that_costs_most_is_split_into_its_groups():
    """Cluster 0 has two groups of codes, frequent tokens among them; cluster 1 has one group; cluster 2 is empty."""
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    codes = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]).unsqueeze(1)
    table = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    head = HierarchicalCodes(torch.zeros(3, 2), table, cluster_layout(owner, codes, 3, [2]), torch.zeros(3))
    found = revive_hierarchy(
        *(head, codes, [2]),
        dead_clusters=torch.tensor([2]),
        dead_codes=[NONE],
        token_counts=torch.tensor([5.0, 5, 2, 2, 9, 9, 9, 9]),
        max_cluster_size=4,
        generator=rng(),
    )
    assert found.token_to_cluster.tolist() == [0, 0, 2, 2, 1, 1, 1, 1]
    torch.testing.assert_close(found.clusters, torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]))
    torch.testing.assert_close(found.cluster_bias, torch.tensor([0.5, 1.0, 0.5]).log())


def test_tokens_of_a_dead_cluster_go_where_their_row_is_nearest_and_there_is_room():
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    codes = torch.zeros(7, 1, dtype=torch.long)
    vectors = torch.tensor([[0.0], [5.0], [4.0]])
    head = HierarchicalCodes(vectors, torch.zeros(1, 1), cluster_layout(owner, codes, 3, [1]), torch.zeros(3))

    def moved(max_cluster_size):
        found = revive_hierarchy(
            *(head, codes, [1]),
            dead_clusters=torch.tensor([2]),
            dead_codes=[NONE],
            token_counts=torch.tensor([1.0] * 5 + [0.0] * 2),
            max_cluster_size=max_cluster_size,
        )
        return found.token_to_cluster[5:].tolist(), found.token_to_cluster[:5].tolist()

    # No tokens of a cluster differ but those that never occur, so none is split, and the dead one ends empty.
    assert moved(5) == ([1, 1], [0, 0, 1, 1, 1])
    assert sorted(moved(4)[0]) == [0, 1]
    assert moved(3) == ([2, 2], [0, 0, 1, 1, 1])  # there is room for one of the two: the cluster stays as it is


def test_regrouped_tokens_of_one_cluster_are_a_unigram_model_of_it():
    head, _ = problem()
    tokens = token_slopes(head)
    vectors, cluster_bias, token_bias = regroup_tokens(tokens, torch.zeros(V, dtype=torch.long), 2)
    torch.testing.assert_close(token_bias, tokens.log_probs.log_softmax(0))
    torch.testing.assert_close(vectors[0], token_bias.exp() @ tokens.rows)
    assert cluster_bias[1] == -torch.inf


# ---------------------------------------------------------------------- codes of stages


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_empty_code_of_a_stage_takes_half_of_another_and_no_logit_changes(seed):
    head, codes = problem(seed)
    new, found = revived(head, codes, stages=(torch.tensor([5]), torch.tensor([3])))
    hidden = 3 * torch.randn(20, D, generator=rng(seed), dtype=torch.float64)
    torch.testing.assert_close(hierarchical_log_probs(hidden, new), hierarchical_log_probs(hidden, head))
    for stage, (size, offset) in enumerate(zip(SIZES, (0, SIZES[0]), strict=True)):
        given = found.token_codes[:, stage] == size - 1
        (source,) = codes[given, stage].unique()  # all from one code
        assert 0 < given.sum() < (codes[:, stage] == source).sum()
        assert torch.equal(found.codes[offset + size - 1], head.codes[offset + source])
        assert torch.equal(found.token_codes[~given, stage], codes[~given, stage])
    assert torch.equal(found.clusters, head.clusters)
    assert torch.equal(found.token_to_cluster, head.layout.token_to_cluster)


def test_tokens_of_a_rare_code_take_the_nearest_one():
    head, codes = problem(3)
    counts = torch.ones(V)
    counts[codes[:, 0] == 1] = 0.001
    _, found = revived(head, codes, stages=(torch.tensor([1]), NONE), counts=counts)
    table = head.codes[: SIZES[0]]
    distances = (table - table[1]).norm(dim=1)
    distances[[1, 5]] = torch.inf  # itself, and one without tokens
    rare = codes[:, 0] == 1
    # The nearest code may be the one that is split; then some of them return to code 1, which has its vector now.
    vectors = found.codes[found.token_codes[rare, 0]]
    torch.testing.assert_close(vectors, table[distances.argmin()].expand_as(vectors))
    assert (found.token_codes[:, 0] == 1).any()


# ---------------------------------------------------------------------- room of each cluster


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_each_cluster_may_have_a_size_of_its_own(seed):
    points, centroids = torch.randn(20, 3, generator=rng(seed)), torch.randn(5, 3, generator=rng(seed + 1))
    room = torch.tensor([0, 3, 20, 1, 2])
    found = capped_assignment(points, centroids, room)
    sizes = torch.bincount(found, minlength=5)
    assert (sizes <= room).all()
    distances = torch.cdist(points, centroids)
    for point in range(20):
        nearer = distances[point] < distances[point, found[point]] - 1e-6
        assert torch.equal(sizes[nearer], room[nearer])
    with pytest.raises(ValueError, match="`max_size` to sum to at least 20, the number of points, but got 10"):
        capped_assignment(points, centroids, torch.full((5,), 2))


# ---------------------------------------------------------------------- the head


def make_head(sizes=(8, 6, 4), seed=0):
    """A head of 40 tokens with an empty cluster, a rare one, and an empty code in each stage."""
    torch.manual_seed(seed)
    head = HierarchicalVQLogitsHead(D, V, sizes, max_cluster_size=20)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    owner = torch.arange(V) % 6
    owner[:2] = 6
    codes = torch.stack([torch.arange(V) % (size - 1) for size in sizes[1:]], 1)
    head.set_codes(owner, codes)
    head.token_counts.copy_(torch.rand(V) + 1)
    head.token_counts[:2] = 0.001
    return head


def test_which_heads_can_be_revived():
    assert isinstance(make_head(), RevivableHead | StagedHead)
    assert isinstance(VQLogitsHead(D, V, 4), RevivableHead)
    assert not isinstance(VQLogitsHead(D, V, 4), StagedHead)
    assert not isinstance(DenseLogitsHead(D, V), RevivableHead)


def test_a_head_revives_what_is_dead_and_tells_the_rows_that_changed():
    head, hidden = make_head(), torch.zeros(D)
    assert head.dead_codes(0.1).tolist() == [6, 7]
    assert [dead.tolist() for dead in head.dead_stage_codes(0.1)] == [[5], [3]]
    before, old = head(hidden), {name: tensor.clone() for name, tensor in head.state_dict().items()}
    found = head.revive_dead(0.1, generator=rng())
    assert found.num_revived == 4
    assert head.dead_codes(0.1).numel() == 0
    assert all(dead.numel() == 0 for dead in head.dead_stage_codes())
    torch.testing.assert_close(head(hidden), before)
    assert set(found.rows) == set(head.parameters())
    for name, parameter in head.named_parameters():
        changed = (parameter != old[name]).reshape(len(parameter), -1).any(1)
        assert found.rows[parameter].tolist() == changed.nonzero().flatten().tolist()
        assert 0 < len(found.rows[parameter]) < len(parameter), name
    assert {6, 7} <= set(found.rows[head.clusters].tolist())
    assert found.rows[head.codes].tolist() == [5, 9]
    assert torch.equal(head.token_counts, old["token_counts"])
    assert head.revive_dead(0.1, generator=rng()) == Revival(0, {})


def test_all_ranks_end_with_the_codes_of_rank_zero(monkeypatch):
    """Another rank counted other tokens and is seeded differently."""
    first, second = make_head(), make_head()
    second.token_counts.copy_(torch.rand(V))
    sent = []
    monkeypatch.setattr(
        "lit_logits.modules.vq_logits.moving_hierarchy.broadcast_",
        lambda *tensors: sent.extend(t.clone() for t in tensors),
    )
    found = first.revive_dead(0.1, generator=rng())

    def receive(*tensors):
        for tensor in tensors:
            tensor.copy_(sent.pop(0))

    monkeypatch.setattr("lit_logits.modules.vq_logits.moving_hierarchy.broadcast_", receive)
    got = second.revive_dead(0.1, generator=rng(5))
    assert not sent  # as many collectives
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert got.num_revived == found.num_revived == 4
    for one, other in zip(found.rows.values(), got.rows.values(), strict=True):
        assert torch.equal(one, other)


def test_a_head_in_half_precision_and_without_a_token_bias():
    head = HierarchicalVQLogitsHead(D, V, (8, 6), bias=False)
    head.set_codes(torch.arange(V) % 7, torch.arange(V).unsqueeze(1) % 5)
    head.bfloat16()
    found = head.revive_dead()
    assert found.num_revived == 2
    assert len(found.rows) == 3
    assert head(torch.randn(2, D, dtype=torch.bfloat16)).exp().sum(-1).allclose(torch.ones(2), atol=1e-4)


# ---------------------------------------------------------------------- in training

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2}


class Recorder(Callback):
    """What the head says and the optimizer keeps, after each batch; stands after the callback that it watches."""

    def __init__(self):
        self.dead, self.moments, self.owners = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        head = pl_module.head
        self.dead.append((head.dead_codes().tolist(), [dead.tolist() for dead in head.dead_stage_codes()]))
        state = trainer.optimizers[0].state
        self.moments.append({name: state[p]["exp_avg"].clone() for name, p in head.named_parameters()})
        self.owners.append(head.token_to_cluster.clone())


def test_the_callback_revives_both_levels_and_clears_their_moments(tmp_path):
    torch.manual_seed(0)
    head = partial(HierarchicalVQLogitsHead, codebook_sizes=(6, 5), init="random")
    model = VQLogitsLM(LLAMA, 30, head=head, optimizer=partial(torch.optim.Adam, lr=0.01))
    data = DataLoader([{"input_ids": row, "labels": row} for row in torch.randint(30, (24, 9))], batch_size=4)
    model.initialize_head(data)
    model.head.set_codes(torch.arange(30) % 5, torch.arange(30).unsqueeze(1) % 4)
    recorder = Recorder()
    callbacks = [CodebookReinit(every_n_steps=3, min_usage=0.0), recorder]
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1, callbacks=callbacks, enable_model_summary=False, default_root_dir=tmp_path, **options
    )
    trainer.fit(model, data)
    assert recorder.dead == [([5], [[4]])] * 2 + [([], [[]])] * 4
    moments, owners = recorder.moments[2], recorder.owners
    changed = (owners[1] != owners[2]).nonzero().flatten()
    source = int(owners[1][changed][0])
    for name, rows in {"clusters": [source, 5], "cluster_bias": [source, 5], "codes": [4]}.items():
        assert not moments[name][rows].any(), name
        assert moments[name].any(), name
    assert not moments["token_bias"][changed].any()
    assert moments["token_bias"].any()
    for name, rows in {"clusters": [source, 5], "cluster_bias": [source, 5], "codes": [4]}.items():
        assert recorder.moments[3][name][rows].any(), name  # and they train
    assert (trainer.callback_metrics["vq/reinit"]) == 0  # of the last look, at step 6
