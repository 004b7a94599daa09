"""Two levels of codes: every result against a loop over the definition, and the head in `VQLogitsLM`."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_logits import VQLogitsLM
from lit_logits.callbacks import CodebookMonitor
from lit_logits.contracts import CappedHead, DecodingHead, ImitatingHead, OutputHead, StartingHead
from lit_logits.functional import capped_assignment, unigram_bias
from lit_logits.functional.hierarchical_decoding import hierarchical_greedy, hierarchical_sample, hierarchical_top_k
from lit_logits.functional.hierarchical_vq import (
    HierarchicalCodes,
    cluster_layout,
    hierarchical_cross_entropy,
    hierarchical_log_probs,
    hierarchical_losses,
)
from lit_logits.functional.residual_vq import DenseTarget
from lit_logits.modules import HierarchicalVQLogitsHead

V, D, K, SIZES = 23, 5, 6, (4, 3)
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2}


def problem(seed, *, bias=True, num_tokens=7, scale=1.0, cap=None):
    """Clusters of any sizes, one of them maybe empty."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    owner = torch.randint(K - 1, (V,), generator=generator)
    codes = torch.stack([torch.randint(size, (V,), generator=generator) for size in SIZES], 1)
    layout = cluster_layout(owner, codes, K, SIZES)
    hidden, clusters, table = randn(num_tokens, D), randn(K, D), randn(sum(SIZES), D)
    head = HierarchicalCodes(clusters, table, layout, randn(K), randn(V) if bias else None, cap)
    return hidden, head, codes


def leaves_of(hidden, head):
    """The tensors that get a gradient."""
    tensors = (hidden, head.clusters, head.codes, head.cluster_bias, head.token_bias)
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def by_definition(hidden, head, codes):
    """log p(v | h), token by token."""
    hidden, head = hidden.detach(), head._replace(**{n: t.detach() for n, t in head._asdict().items() if is_float(t)})
    owner, clusters, table, rows = head.layout.token_to_cluster, head.clusters, head.codes, []

    def capped(logit):
        return logit if head.cap is None else head.cap * torch.tanh(logit / head.cap)

    for h in hidden:
        used = sorted(set(owner.tolist()))
        outer = {k: float(capped(h @ clusters[k]) + head.cluster_bias[k]) for k in used}
        total = math.log(sum(math.exp(value) for value in outer.values()))
        inner = []
        for v in range(V):
            z = float(capped(h @ table[codes[v, 0]] + h @ table[SIZES[0] + codes[v, 1]]))
            inner.append(z + (0.0 if head.token_bias is None else float(head.token_bias[v])))
        row = []
        for v in range(V):
            mates = [u for u in range(V) if owner[u] == owner[v]]
            within = inner[v] - math.log(sum(math.exp(inner[u]) for u in mates))
            row.append(outer[int(owner[v])] - total + within)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------- functional


CAPS = [None, 1.5]


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_probs_are_the_definition_and_sum_to_one(seed, bias, cap):
    hidden, head, codes = problem(seed, bias=bias, cap=cap)
    found = hierarchical_log_probs(hidden, head)
    torch.testing.assert_close(found, by_definition(hidden, head, codes))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("bias", [True, False])
def test_loss_is_that_of_the_log_probs_in_value_and_gradient(bias, cap, monkeypatch):
    for values_a_chunk in (2**26, 200):
        monkeypatch.setattr("lit_logits.functional.chunks.VALUES_A_CHUNK", values_a_chunk)
        hidden, head, _ = problem(3, bias=bias, cap=cap)
        labels, leaves = torch.tensor([0, 5, -100, 22, 7, 7, 1]), leaves_of(hidden, head)
        loss = hierarchical_cross_entropy(hidden, head, labels)
        expected = torch.nn.functional.nll_loss(hierarchical_log_probs(hidden, head), labels)
        torch.testing.assert_close(loss, expected)
        for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(one, other)
            assert one.isfinite().all()
        each = hierarchical_cross_entropy(hidden, head, labels, reduction="none")
        assert each[2] == 0
        torch.testing.assert_close(each.sum(), hierarchical_cross_entropy(hidden, head, labels, reduction="sum"))


@pytest.mark.parametrize("cap", CAPS)
def test_gradcheck(cap):
    hidden, head, _ = problem(4, num_tokens=3, cap=cap)
    labels = torch.tensor([3, -100, 20])

    def loss(hidden, clusters, codes, cluster_bias, token_bias):
        return hierarchical_cross_entropy(
            hidden, HierarchicalCodes(clusters, codes, head.layout, cluster_bias, token_bias, cap), labels
        )

    assert torch.autograd.gradcheck(loss, leaves_of(hidden, head))


def test_no_label_that_counts_is_a_zero_with_a_graph():
    hidden, head, _ = problem(0)
    head.clusters.requires_grad_()
    loss = hierarchical_cross_entropy(hidden, head, torch.full((7,), -100))
    loss.backward()
    assert loss == 0
    assert not head.clusters.grad.any()


def test_a_wrong_label_is_named():
    hidden, head, _ = problem(0)
    for loss in (hierarchical_cross_entropy, partial(hierarchical_losses, target=dense_target())):
        with pytest.raises(ValueError, match="23"):
            loss(hidden, head, torch.full((7,), V))
        with pytest.raises(ValueError, match=r"`labels` to have shape \(7,\)"):
            loss(hidden, head, torch.zeros(3, dtype=torch.long))


# ---------------------------------------------------------------------- imitation


def dense_target(num_tokens=7, *, bias=True, cap=None):
    """A dense layer that reads hidden states of another width."""
    generator = torch.Generator().manual_seed(9)
    shapes = ((num_tokens, D + 2), (V, D + 2), (V,))
    hidden, rows, offsets = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return DenseTarget(hidden, rows, offsets if bias else None, cap)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("values_a_chunk", [2**26, 800])
def test_imitation_is_the_divergence_of_plain_softmaxes(values_a_chunk, bias, cap, monkeypatch):
    monkeypatch.setattr("lit_logits.functional.chunks.VALUES_A_CHUNK", values_a_chunk)
    hidden, head, codes = problem(6, bias=bias, cap=cap)
    target = dense_target(bias=bias, cap=None if cap is None else 2.0)
    labels, leaves = torch.tensor([0, 5, -100, 22, 7, 7, 1]), leaves_of(hidden, head)
    counts = (labels != -100).double()
    found = hierarchical_losses(hidden, head, labels, target=target)

    logits = target.hidden @ target.weight.T
    logits = logits if cap is None else 2.0 * torch.tanh(logits / 2.0)
    theirs = (logits if target.bias is None else logits + target.bias).log_softmax(-1)
    ours = hierarchical_log_probs(hidden, head)
    torch.testing.assert_close(ours.detach(), by_definition(hidden, head, codes))
    divergence = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * counts
    torch.testing.assert_close(found.divergence, divergence)
    torch.testing.assert_close(
        found.cross_entropy, torch.nn.functional.nll_loss(ours, labels, reduction="none"), msg="cross-entropy"
    )
    torch.testing.assert_close(
        found.target_cross_entropy, torch.nn.functional.nll_loss(theirs, labels, reduction="none"), msg="target"
    )
    weights = torch.linspace(0.5, 2.0, 7)
    loss = (weights * (0.3 * found.cross_entropy + found.divergence)).sum()
    expected = (weights * (0.3 * torch.nn.functional.nll_loss(ours, labels, reduction="none") + divergence)).sum()
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other)
    assert not found.target_cross_entropy.requires_grad


def test_imitation_in_two_dimensions_without_a_target_and_without_a_label():
    hidden, head, _ = problem(7, num_tokens=6)
    labels, target = torch.tensor([[1, -100, 3], [4, 5, 6]]), dense_target(6)
    flat = hierarchical_losses(hidden, head, labels.flatten(), target=target)
    square = target._replace(hidden=target.hidden.view(2, 3, -1))
    for one, other in zip(hierarchical_losses(hidden.view(2, 3, D), head, labels, target=square), flat, strict=True):
        torch.testing.assert_close(one.flatten(), other)
    alone = hierarchical_losses(hidden, head, labels.flatten())
    torch.testing.assert_close(alone.cross_entropy, flat.cross_entropy)
    assert not alone.divergence.any()
    head.clusters.requires_grad_()
    nothing = hierarchical_losses(hidden, head, torch.full((6,), -100), target=target)
    nothing.divergence.sum().backward()
    assert nothing.divergence.sum() == 0
    assert not head.clusters.grad.any()


def test_a_target_of_another_size_is_refused():
    hidden, head, _ = problem(0)
    for target in (dense_target(6), dense_target()._replace(weight=torch.zeros(V + 1, D + 2))):
        with pytest.raises(ValueError, match=r"Expected a target of hidden states \(7,\) and 23 rows, but got"):
            hierarchical_losses(hidden, head, torch.zeros(7, dtype=torch.long), target=target)


# ---------------------------------------------------------------------- decoding


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 4.0]), st.booleans(), st.sampled_from(CAPS))
@settings(max_examples=40, deadline=None)
def test_greedy_is_the_argmax(seed, scale, bias, cap):
    hidden, head, _ = problem(seed, scale=scale, bias=bias, num_tokens=9, cap=cap)
    log_probs = hierarchical_log_probs(hidden, head)
    found = hierarchical_greedy(hidden, head)
    torch.testing.assert_close(log_probs.gather(1, found.unsqueeze(1)).squeeze(1), log_probs.max(-1).values)


@given(st.integers(0, 10_000), st.integers(1, V), st.sampled_from([0.1, 1.0, 4.0]), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_top_k_is_that_of_all_log_probs(seed, k, scale, at_once):
    hidden, head, _ = problem(seed, scale=scale, num_tokens=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_logits.functional.hierarchical_decoding._CLUSTERS_AT_ONCE", at_once)
        found = hierarchical_top_k(hidden.view(3, 3, D), head, k)
    expected = hierarchical_log_probs(hidden, head).view(3, 3, V).topk(k)
    torch.testing.assert_close(found.log_probs, expected.values)
    assert torch.equal(found.token_ids, expected.indices)  # of float64 numbers at random none are equal


@pytest.mark.parametrize("k", [0, V + 1])
def test_more_tokens_than_there_are(k):
    hidden, head, _ = problem(0)
    with pytest.raises(ValueError, match=rf"`k` to be in \[1, 23\], the vocabulary size, but got {k}"):
        hierarchical_top_k(hidden, head, k)


def test_equal_tokens_are_a_tie_that_goes_to_the_lower_id():
    owner, codes = torch.tensor([1, 0, 1, 0]), torch.zeros(4, 1, dtype=torch.long)
    zeros = torch.zeros(2, D)
    head = HierarchicalCodes(zeros, zeros[:1], cluster_layout(owner, codes, 2, [1]), torch.tensor([0.0, 1.0]))
    assert hierarchical_greedy(torch.zeros(2, D), head).tolist() == [0, 0]


def test_greedy_opens_few_clusters(monkeypatch):
    opened = []
    generator = torch.Generator().manual_seed(0)
    owner, codes = torch.arange(4000) % 80, torch.randint(8, (4000, 1), generator=generator)
    from lit_logits.functional import hierarchical_decoding

    real = hierarchical_decoding.member_logits
    monkeypatch.setattr(hierarchical_decoding, "member_logits", lambda *a: opened.append(len(a[1])) or real(*a))
    hidden = 3 * torch.randn(16, 8, generator=generator)
    clusters, table = torch.randn(80, 8, generator=generator), torch.randn(8, 8, generator=generator)
    head = HierarchicalCodes(clusters, table, cluster_layout(owner, codes, 80, [8]), torch.zeros(80))
    found = hierarchical_greedy(hidden, head)
    assert sum(opened) < 16 * 80 / 2
    log_probs = hierarchical_log_probs(hidden, head)
    torch.testing.assert_close(log_probs.gather(1, found.unsqueeze(1)).squeeze(1), log_probs.max(-1).values)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("bias", [True, False])
def test_samples_follow_the_probabilities(bias, cap):
    hidden, head, _ = problem(5, bias=bias, num_tokens=1, cap=cap)
    drawn = hierarchical_sample(hidden.expand(40_000, -1), head, generator=torch.Generator().manual_seed(0))
    expected = hierarchical_log_probs(hidden, head).exp()[0]
    shares = torch.bincount(drawn, minlength=V) / len(drawn)
    torch.testing.assert_close(shares, expected.float(), atol=0.012, rtol=0)


def test_a_cluster_for_each_token_is_a_dense_layer_and_one_cluster_too():
    """The ends of the scale: all of the softmax in the outer level, or all of it in the inner one."""
    hidden, rows = torch.randn(4, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    expected = (hidden @ rows.T).log_softmax(-1)
    zeros = torch.zeros(V, D, dtype=torch.float64)
    outer = cluster_layout(torch.arange(V), torch.zeros(V, 1, dtype=torch.long), V, [1])
    found = hierarchical_log_probs(hidden, HierarchicalCodes(rows, zeros[:1], outer, zeros[:, 0]))
    torch.testing.assert_close(found, expected)
    inner = cluster_layout(torch.zeros(V, dtype=torch.long), torch.arange(V).unsqueeze(1), 1, [V])
    found = hierarchical_log_probs(hidden, HierarchicalCodes(zeros[:1], rows, inner, zeros[:1, 0]))
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------- clusters of bounded size


@given(st.integers(0, 10_000), st.integers(5, 12))
@settings(max_examples=30, deadline=None)
def test_no_cluster_is_over_full_and_none_would_rather_have_another_point(seed, max_size):
    generator = torch.Generator().manual_seed(seed)
    points, centroids = torch.randn(40, 3, generator=generator), torch.randn(8, 3, generator=generator)
    weights = torch.rand(40, generator=generator) + 0.1
    found = capped_assignment(points, centroids, max_size, weights=weights)
    sizes = torch.bincount(found, minlength=8)
    assert int(sizes.max()) <= max_size
    distances = torch.cdist(points, centroids)
    for point in range(40):  # whatever is nearer than what a point got is full
        nearer = distances[point] < distances[point, found[point]] - 1e-6
        assert (sizes[nearer] == max_size).all()


def test_clusters_that_are_not_over_full_are_the_nearest():
    points, centroids = torch.randn(30, 2), torch.randn(4, 2)
    assert torch.equal(capped_assignment(points, centroids, 30), torch.cdist(points, centroids).argmin(1))
    with pytest.raises(ValueError, match="`max_size` to be at least 8"):
        capped_assignment(points, centroids, 7)


# ---------------------------------------------------------------------- the head


def test_the_head_keeps_the_contracts():
    torch.manual_seed(0)  # of which no two tokens are nearly equal
    head = HierarchicalVQLogitsHead(8, 40, (5, 4))
    torch.nn.init.normal_(head.token_bias)  # tokens of equal codes differ then
    assert isinstance(head, OutputHead)
    assert isinstance(head, DecodingHead)
    assert isinstance(head, StartingHead)
    assert isinstance(head, ImitatingHead)
    assert isinstance(head, CappedHead)
    hidden = torch.randn(3, 2, 8)
    assert head(hidden).shape == (3, 2, 40)
    assert torch.equal(head.greedy(hidden), head(hidden).argmax(-1))
    for temperature in (1.0, 0.5):
        assert head.sample(hidden, temperature).shape == (3, 2)
    cold = head.sample(20 * hidden, 0.01)
    assert torch.equal(cold, head.greedy(20 * hidden))


def test_a_start_bias_is_a_unigram_model():
    head = HierarchicalVQLogitsHead(8, 40, (5, 4))
    bias = unigram_bias(torch.arange(40.0))
    head.set_codes(head.token_to_cluster.clone(), head.token_codes.clone(), token_bias=bias)
    torch.testing.assert_close(head(torch.zeros(8)), bias.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_tables_follow_the_mapping():
    head, hidden = HierarchicalVQLogitsHead(8, 40, (5, 4)), torch.randn(6, 8)
    before = head(hidden)
    other = HierarchicalVQLogitsHead(8, 40, (5, 4))
    head.load_state_dict(other.state_dict())
    assert torch.equal(head(hidden), other(hidden))
    assert not torch.equal(head(hidden), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_sizes": (5,)}, r"`codebook_sizes` to be two numbers or more in \[1, 40\]"),
        ({"codebook_sizes": (5, 41)}, r"`codebook_sizes` to be two numbers or more"),
        (
            {"codebook_sizes": (5, 4), "init": "kmeans"},
            "`init` to be one of 'random', 'cooccurrence', 'weighted_kmeans', but got 'kmeans'",
        ),
        ({"codebook_sizes": (5, 4), "start_tokens": 0}, "`start_tokens` to be at least 1"),
        ({"codebook_sizes": (5, 4), "max_cluster_size": 7}, "`max_cluster_size` to be at least 8"),
    ],
)
def test_an_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalVQLogitsHead(8, 40, **arguments)


def test_codes_that_do_not_fit_are_refused_and_nothing_is_written():
    head = HierarchicalVQLogitsHead(8, 40, (5, 4))
    before = head.token_to_cluster.clone()
    with pytest.raises(ValueError, match=r"`token_codes` to have shape \(40, 1\)"):
        head.set_codes(torch.zeros(40, dtype=torch.long), torch.zeros(40, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="4"):
        head.set_codes(torch.zeros(40, dtype=torch.long), torch.full((40, 1), 4))
    assert torch.equal(head.token_to_cluster, before)


# ---------------------------------------------------------------------- in training


def rows(num=48, length=12):
    generator = torch.Generator().manual_seed(0)
    kind = (torch.arange(length) + torch.arange(num).unsqueeze(1)) % 4
    return 5 * kind + torch.randint(5, (num, length), generator=generator)


def make_trainer(tmp_path, **kwargs):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=tmp_path, **options, **kwargs)


def loader():
    return DataLoader([{"input_ids": row, "labels": row} for row in rows()], batch_size=8)


@pytest.mark.parametrize("sizes", [(4, 5), (4, 3, 3)])
def test_fit_starts_the_head_learns_resumes_and_generates(sizes, tmp_path):
    torch.manual_seed(0)
    head = partial(HierarchicalVQLogitsHead, codebook_sizes=sizes)
    model = VQLogitsLM(LLAMA, 20, head=head, optimizer=partial(torch.optim.Adam, lr=0.02))
    trainer = make_trainer(tmp_path, max_epochs=8)
    trainer.fit(model, loader(), loader())
    owner = model.head.token_to_cluster.view(4, 5)
    assert (owner == owner[:, :1]).all()  # words that follow the same words are in one cluster
    assert len(set(owner[:, 0].tolist())) == 4
    assert float(trainer.callback_metrics["val/loss"]) < math.log(20) - 0.9 * math.log(4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = VQLogitsLM.load_from_checkpoint(tmp_path / "last.ckpt")
    ids = rows()[:3, :4]
    assert type(again.head) is HierarchicalVQLogitsHead
    torch.testing.assert_close(again.eval()(ids), model.eval()(ids))
    text = model.generate(ids, max_new_tokens=6)
    kinds = text // 5
    assert ((kinds[:, 1:] - kinds[:, :-1]) % 4 == 1).all()


def test_bfloat16():
    head = HierarchicalVQLogitsHead(8, 40, (5, 4)).bfloat16()
    hidden, labels = torch.randn(6, 8, dtype=torch.bfloat16), torch.arange(6)
    loss = head.loss(hidden, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.codes.grad.dtype == torch.bfloat16


def test_counts_floor_and_use_are_those_of_the_definition():
    head = HierarchicalVQLogitsHead(8, 40, (5, 4))
    labels = torch.tensor([3, 3, 7, -100, 39])
    head.train().loss(torch.randn(5, 8), labels)
    head.eval().loss(torch.randn(5, 8), labels)  # evaluation does not count
    assert head.token_counts.sum() == 4
    assert head.token_counts[3] == 2
    expected = torch.zeros(5)
    for token in (3, 3, 7, 39):
        expected[head.token_to_cluster[token]] += 0.25
    torch.testing.assert_close(head.usage(), expected)
    assert set(head.dead_codes(0.01).tolist()) == set((expected == 0).nonzero().flatten().tolist())
    # A bound for any hidden state: within tokens of equal codes nothing but the bias tells which it is.
    torch.nn.init.normal_(head.token_bias)
    hidden = torch.randn(2000, 8) * 5
    nll = torch.stack([head.loss(hidden, torch.full((2000,), token), reduction="none") for token in (3, 7, 39)], 1)
    best = (nll * torch.tensor([0.5, 0.25, 0.25])).sum(1).min()
    assert float(head.ppl_floor().log()) <= float(best) + 1e-5
    assert head.bfloat16().token_counts.dtype == torch.float32


def test_the_monitor_shows_its_clusters(tmp_path):
    head = partial(HierarchicalVQLogitsHead, codebook_sizes=(4, 5))
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    monitor = CodebookMonitor(every_n_steps=1, num_codes=4)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    trainer = Trainer(logger=logger, callbacks=[monitor], enable_checkpointing=False, **options)
    trainer.fit(VQLogitsLM(LLAMA, 20, head=head), loader(), loader())
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    names = {"vq/used_codes", "vq/code_perplexity", "vq/dead_codes", "vq/dead_stage_codes", "vq/ppl_floor"}
    assert names <= set(events.Tags()["scalars"])
    assert events.Scalars("vq/used_codes")[-1].value == 4
    assert events.Scalars("vq/dead_stage_codes")[-1].value == 0
    assert events.Tags()["images"] == ["vq/tokens", "vq/usage"]
    text = events.Tensors("vq/tokens/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.count("25.") >= 3  # four clusters of five words, each a quarter of the text
