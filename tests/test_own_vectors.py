"""Tokens that own vectors, and the codes that are fitted to them: the loss, the fit, and the callback in real runs."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lit_logits import VQLogitsLM
from lit_logits.callbacks import CodebookFit, CodebookReassign, CodebookReinit, ExactResume, SavePretrained
from lit_logits.contracts import CodingHead, UncodedVectorsError
from lit_logits.datamodules import TextDataModule
from lit_logits.functional import (
    HierarchicalCodes,
    code_vectors,
    hierarchical_cross_entropy,
    hierarchical_log_probs,
    own_vector_cross_entropy,
    own_vector_layout,
)
from lit_logits.modules import HierarchicalVQLogitsHead, PackedHierarchicalVQLogitsHead, VQLogitsHead

V, D, K = 24, 6, 5
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 32}
TWO = partial(HierarchicalVQLogitsHead, codebook_sizes=(K, 4, 4), own_vectors=True)


def problem(seed, *, bias=True, cap=None, num_tokens=9):
    """Clusters of any sizes, one of them empty, and some labels that do not count."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    owner = torch.randint(K - 1, (V,), generator=generator)
    layout = own_vector_layout(owner, K)
    head = HierarchicalCodes(randn(K, D), randn(V, D), layout, randn(K), randn(V) if bias else None, cap)
    labels = torch.randint(V, (num_tokens,), generator=generator)
    labels[::4] = -100
    return randn(num_tokens, D), head, labels


# ---------------------------------------------------------------------- loss


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([None, 1.5]), st.sampled_from(["mean", "sum", "none"]))
@settings(max_examples=25, deadline=None)
def test_loss_and_gradients_are_those_of_a_token_by_token_definition(seed, bias, cap, reduction):
    hidden, head, labels = problem(seed, bias=bias, cap=cap)
    leaves = [hidden, head.clusters, head.codes, head.cluster_bias, *([head.token_bias] if bias else [])]
    found = own_vector_cross_entropy(hidden, head, labels, reduction=reduction)
    owner, place = head.layout.token_to_cluster, {}
    for row, v in enumerate(sorted(range(V), key=lambda v: (int(owner[v]), v))):
        place[v] = row

    def capped(logit):
        return logit if cap is None else cap * torch.tanh(logit / cap)

    used, losses = sorted(set(owner.tolist())), []
    for h, y in zip(hidden, labels.tolist(), strict=True):
        if y == -100:
            losses.append(h.sum() * 0)
            continue
        outer = torch.stack([capped(h @ head.clusters[k]) + head.cluster_bias[k] for k in used]).log_softmax(0)
        mates = [v for v in range(V) if owner[v] == owner[y]]
        inner = torch.stack([capped(h @ head.codes[place[v]]) + (head.token_bias[v] if bias else 0) for v in mates])
        losses.append(-outer[used.index(int(owner[y]))] - inner.log_softmax(0)[mates.index(y)])
    values = torch.stack(losses)
    expected = {"none": values, "sum": values.sum(), "mean": values.sum() / (labels != -100).sum()}[reduction]
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True) for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


def test_it_is_the_loss_of_two_levels_with_a_code_for_each_token():
    hidden, head, labels = problem(3)
    torch.testing.assert_close(
        own_vector_cross_entropy(hidden, head, labels), hierarchical_cross_entropy(hidden, head, labels)
    )


def test_no_labels_that_count_give_zero_with_a_graph():
    hidden, head, labels = problem(1)
    loss = own_vector_cross_entropy(hidden, head, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert not head.codes.grad.any()


def test_rows_in_chunks_give_the_same(monkeypatch):
    hidden, head, labels = problem(2, num_tokens=40)
    whole = own_vector_cross_entropy(hidden, head, labels)
    whole.backward()
    gradient, head.codes.grad = head.codes.grad, None
    monkeypatch.setattr("lit_logits.functional.chunks.VALUES_A_CHUNK", 7 * (K + V))
    parts = own_vector_cross_entropy(hidden, head, labels)
    parts.backward()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(head.codes.grad, gradient)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_low_precision_is_summed_in_float32(precision):
    torch.manual_seed(0)
    head, exact = TWO(D, V), TWO(D, V)
    exact.load_state_dict(head.state_dict())
    hidden, labels = torch.randn(50, D), torch.randint(V, (50,))
    wanted = exact.loss(hidden, labels)
    wanted.backward()
    if precision == "bfloat16":
        head.to(torch.bfloat16)
        hidden = hidden.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        low = head.loss(hidden, labels)
    low.backward()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, wanted, rtol=1e-2, atol=1e-2)
    assert head.vectors.grad.dtype == head.vectors.dtype
    torch.testing.assert_close(head.vectors.grad.float(), exact.vectors.grad, rtol=5e-2, atol=2e-3)


def test_frozen_vectors_pass_the_gradient_on():
    hidden, head, labels = problem(4)
    (wanted,) = torch.autograd.grad(own_vector_cross_entropy(hidden, head, labels), [hidden])
    frozen = head._replace(codes=head.codes.detach(), token_bias=head.token_bias.detach())
    own_vector_cross_entropy(hidden, frozen, labels).backward()
    torch.testing.assert_close(hidden.grad, wanted)


class Made(TorchDispatchMode):
    """Counts the numbers of all tensors that operations make."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        in_place = result is args[0] or "out" in (kwargs or {})
        if isinstance(result, torch.Tensor) and not func.is_view and not in_place:
            self.count += result.numel()
        return result


def test_the_gradient_of_the_vectors_is_made_once():
    """Autograd would make a gradient for each cluster, and join them."""
    head = HierarchicalVQLogitsHead(64, 2000, codebook_sizes=(10, 1), own_vectors=True)
    loss = head.loss(torch.randn(4, 64), torch.arange(4))
    with Made() as made:
        loss.backward()
    assert made.count < 1.5 * head.vectors.numel()
    assert head.vectors.grad.any(1).sum() < 2000  # clusters without a label have none


def test_wrong_labels_are_told():
    hidden, head, labels = problem(0)
    with pytest.raises(ValueError, match=r"Expected `labels` to have shape \(9,\)"):
        own_vector_cross_entropy(hidden, head, labels[1:])
    with pytest.raises(ValueError, match="Expected `labels`"):
        own_vector_cross_entropy(hidden, head, labels + V)


# ---------------------------------------------------------------------- fit


def test_vectors_that_codes_can_make_come_back():
    """What is common to a cluster cancels, and the rest is lost nowhere."""
    generator = torch.Generator().manual_seed(0)
    books, codes = torch.randn(2, 4, D // 2, generator=generator), torch.randint(4, (V, 2), generator=generator)
    vectors = torch.cat([books[0][codes[:, 0]], books[1][codes[:, 1]]], 1)
    hidden = torch.randn(500, D, generator=generator)
    found = code_vectors(
        vectors, torch.zeros(V, dtype=torch.long), 1, codebook_size=4, num_stages=1, num_groups=2,
        token_weights=torch.ones(V), hidden_mean=hidden.mean(0), hidden_second_moment=hidden.T @ hidden / 500,
    )  # fmt: skip
    assert found.error < 1e-9
    rows = torch.cat([found.codes[:, :3][found.token_codes[:, 0]], found.codes[:, 3:][found.token_codes[:, 1]]], 1)
    torch.testing.assert_close(
        F.log_softmax(hidden @ rows.T, -1), F.log_softmax(hidden @ vectors.T, -1), atol=1e-4, rtol=1e-4
    )


def test_what_is_common_to_a_cluster_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    owner, vectors = torch.arange(V) % K, torch.randn(V, D, generator=generator)
    moved = vectors + 100 * torch.randn(K, D, generator=generator)[owner]
    one, other = (
        code_vectors(
            rows, owner, K, codebook_size=4, num_stages=2, num_groups=2, token_weights=torch.ones(V),
            hidden_mean=torch.zeros(D), hidden_second_moment=torch.eye(D),
            generator=torch.Generator().manual_seed(1),
        )
        for rows in (vectors, moved)
    )  # fmt: skip
    assert one.error == pytest.approx(other.error, rel=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_error_is_the_variance_of_the_logits_that_is_lost(bias):
    generator = torch.Generator().manual_seed(1)
    owner, weights = torch.randint(3, (V,), generator=generator), torch.rand(V, generator=generator)
    vectors, hidden = torch.randn(V, D, generator=generator), torch.randn(400, D, generator=generator) + 1
    found = code_vectors(
        vectors, owner, 3, codebook_size=3, num_stages=2, num_groups=3, token_weights=weights,
        hidden_mean=hidden.mean(0), hidden_second_moment=hidden.T @ hidden / len(hidden), has_bias=bias,
    )  # fmt: skip
    means = torch.stack(
        [(weights[owner == k, None] * vectors[owner == k]).sum(0) / weights[owner == k].sum() for k in range(3)]
    )
    centred = vectors - means[owner]
    rows = torch.zeros(V, D)
    for v in range(V):
        for g in range(3):
            for s in range(2):
                code = found.token_codes[v, 2 * g + s]
                rows[v, 2 * g : 2 * g + 2] += found.codes[3 * s + code, 2 * g : 2 * g + 2]
    wrong, right = hidden @ (rows - centred).T + found.bias_shift, hidden @ centred.T
    if bias:  # which takes up the mean of each error
        torch.testing.assert_close(wrong.mean(0), torch.zeros(V), atol=1e-4, rtol=0)
        wrong, right = wrong - wrong.mean(0), right - right.mean(0)
    else:
        assert not found.bias_shift.any()
    lost = (weights * wrong.square().mean(0)).sum() / (weights * right.square().mean(0)).sum()
    assert found.error == pytest.approx(float(lost), rel=1e-3)
    assert 0 < found.error < 0.5


def positions(num=64, batches=9):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(V, D, generator=generator)
    hidden = torch.randn(batches, num, D, generator=generator)
    return [(part, torch.multinomial((part @ rows.T).softmax(-1), 1, generator=generator)[:, 0]) for part in hidden]


def test_a_head_codes_its_vectors_and_the_loss_hardly_rises():
    torch.manual_seed(0)
    head = HierarchicalVQLogitsHead(D, V, (K, 8, 8), num_groups=3, own_vectors=True)
    assert isinstance(head, CodingHead)
    assert head.has_own_vectors
    assert head.ppl_floor() == 1
    read = positions()
    hidden, labels = (torch.cat(parts) for parts in zip(*read, strict=True))
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(hidden, labels).backward()
        optimizer.step()
    before = head.loss(hidden, labels).item()
    found = head.code_vectors(read)
    assert not head.has_own_vectors
    assert "vectors" not in dict(head.named_parameters())
    assert found.codes is head.codes
    assert found.vectors.shape == (V, D)
    after = head.loss(hidden, labels).item()
    assert 0 < found.error < 0.02
    assert after - before == pytest.approx(found.cost, abs=0.02)
    assert abs(after - before) < 0.02
    assert -head(hidden).gather(1, labels[:, None]).mean().item() == pytest.approx(after, rel=1e-5)
    with pytest.raises(ValueError, match="coded already"):
        head.code_vectors(read)


def test_the_start_gives_each_token_what_its_codes_add_up_to():
    torch.manual_seed(0)
    head = HierarchicalVQLogitsHead(D, V, (K, 4, 4), num_groups=2, own_vectors=True)
    head.start_vectors(None)
    plain = HierarchicalVQLogitsHead(D, V, (K, 4, 4), num_groups=2)
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if name != "vectors"})
    hidden = torch.randn(7, D)
    torch.testing.assert_close(head(hidden), plain(hidden))
    assert torch.equal(head.greedy(hidden), plain.greedy(hidden))


def test_rows_of_a_pretrained_layer_keep_its_odds_within_clusters():
    torch.manual_seed(0)
    head, rows, hidden = TWO(D, V), torch.randn(V, D), torch.randn(7, D)
    head.start_vectors(rows)
    found, expected = head(hidden), F.log_softmax(hidden @ rows.T, -1)
    for cluster in range(K):
        of = head.token_to_cluster == cluster
        torch.testing.assert_close(found[:, of].log_softmax(-1), expected[:, of].log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_vectors_stay_with_their_tokens_when_clusters_change():
    torch.manual_seed(0)
    head = TWO(D, V)
    before = head.token_vectors()
    head.set_codes(token_to_cluster=(head.token_to_cluster + 1) % K)
    assert torch.equal(head.token_vectors(), before)
    head.set_codes(token_to_cluster=torch.arange(V) % K)
    hidden = torch.randn(7, D)
    for cluster in range(K):
        expected = (hidden @ before[cluster::K].T).log_softmax(-1)
        torch.testing.assert_close(head(hidden)[:, cluster::K].log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_packed_revived_or_reassigned_while_tokens_own_vectors():
    head = TWO(D, V)
    with pytest.raises(ValueError, match="still own vectors"):
        PackedHierarchicalVQLogitsHead(head)
    assert head.revive_dead(1.0).num_revived == 0
    assert head.reassign(positions()).num_tokens == 0


def test_stages_must_be_of_one_size():
    with pytest.raises(ValueError, match=r"as many codes in each stage for own_vectors=True, but got \(4, 3\)"):
        HierarchicalVQLogitsHead(D, V, (K, 4, 3), own_vectors=True)


# ---------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = [f"w{number}" for number in range(30)]
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(30, (20,), generator=generator).tolist()) for _ in range(300)]
    (folder / "a.txt").write_text("\n".join(lines))
    data = TextDataModule(str(folder / "a.txt"), bpe_vocab_size=300, block_size=16, batch_size=8, cache_dir=folder)
    data.prepare_data()
    data.setup()
    return data


def make_model(data, head=TWO, steps=8):
    L.seed_everything(0, verbose=False)
    return VQLogitsLM(
        LLAMA, data.vocab_size, head=partial(head, codebook_sizes=(20, 16, 16), num_groups=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1),
    )  # fmt: skip


def make_trainer(tmp_path, callbacks=(), steps=8, **options):
    options = {"logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        max_steps=steps, max_epochs=-1, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, limit_val_batches=2, num_sanity_val_steps=0,
        callbacks=list(callbacks), **options,
    )  # fmt: skip


def test_codes_take_the_place_of_vectors_in_model_and_optimizer(texts, tmp_path):
    model = make_model(texts)
    trainer = make_trainer(tmp_path, [CodebookFit(at=0.5)], logger=TensorBoardLogger(tmp_path))
    seen = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            names = {parameter: name for name, parameter in pl_module.named_parameters()}
            own = [p for group in optimizer.param_groups for p in group["params"]]
            assert {names[p] for p in own} == set(names.values())
            seen[trainer.global_step] = {names[p] for p in own if p.grad is not None and names[p].startswith("head.")}

    trainer.callbacks.append(Watch())
    trainer.fit(model, texts)
    assert "head.vectors" in seen[3]
    assert "head.codes" not in seen[3]
    assert "head.codes" in seen[4]
    assert "head.vectors" not in seen[4]
    state = trainer.optimizers[0].state[model.head.codes]
    assert int(state["step"]) == 4  # its moments began with it
    log = EventAccumulator(trainer.logger.log_dir).Reload()
    assert 0 < log.Scalars("vq/coding_error")[0].value < 1
    assert log.Scalars("vq/coding_cost")[0].step == 3  # of the batch, counted from 0


def test_codes_are_fitted_at_the_end_if_training_stops_before(texts, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 2

    model = make_model(texts)
    saver = SavePretrained(str(tmp_path / "saved"))
    make_trainer(tmp_path, [saver, CodebookFit(), Stop()]).fit(model, texts)
    assert not model.head.has_own_vectors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.randint(texts.vocab_size, (2, 5))
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids), atol=1e-5, rtol=1e-5)


def test_nothing_is_saved_as_the_best_before_the_codes(texts, tmp_path):
    model = make_model(texts)
    saver = SavePretrained(str(tmp_path / "saved"))
    trainer = make_trainer(tmp_path, [saver, CodebookFit(at=0.75)], val_check_interval=1, check_val_every_n_epoch=None)
    saved_at = []
    original = saver._save
    saver._save = lambda trainer: (saved_at.append(trainer.global_step), original(trainer))
    trainer.fit(model, texts)
    assert saved_at
    assert min(saved_at) >= 6


def test_what_cannot_be_saved_is_told_before_training_also_with_vectors(texts, tmp_path):
    model = make_model(texts)
    saver = SavePretrained(str(tmp_path / "saved"), head="dense")
    with pytest.raises(ValueError, match="two levels equals no dense layer"):
        make_trainer(tmp_path, [CodebookFit(), saver]).fit(model, texts)
    with pytest.raises(UncodedVectorsError, match="still own vectors"):
        model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("save_at", [2, 4, 6])
def test_resumed_is_uninterrupted(save_at, texts, tmp_path):
    """Before the codes, at the very step, and after it, where the checkpoint has no vectors."""
    whole = make_model(texts)
    make_trainer(tmp_path, [CodebookFit(at=0.5)]).fit(whole, texts)
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=save_at, save_top_k=-1)
    make_trainer(tmp_path, [CodebookFit(at=0.5), ExactResume(), keep], enable_checkpointing=True).fit(
        make_model(texts), texts
    )
    path = next(path for path in (tmp_path / "kept").glob("*.ckpt") if f"step={save_at}" in path.name)
    resumed = make_model(texts)
    make_trainer(tmp_path, [CodebookFit(at=0.5), ExactResume()]).fit(resumed, texts, ckpt_path=path)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_what_cannot_work_is_told_at_the_start(texts, tmp_path):
    with pytest.raises(ValueError, match=r"Expected `at` to be a share in \(0, 1\], but got 1.5"):
        CodebookFit(at=1.5)
    with pytest.raises(ValueError, match="Expected `num_tokens`"):
        CodebookFit(num_tokens=0)
    with pytest.raises(ValueError, match="Expected no EMAWeightAveraging with CodebookFit"):
        make_trainer(tmp_path, [EMAWeightAveraging(), CodebookFit()]).fit(make_model(texts), texts)
    with pytest.raises(ValueError, match="Expected strategy='ddp_find_unused_parameters_true' with CodebookFit"):
        make_trainer(tmp_path, [CodebookFit()], strategy=DDPStrategy(process_group_backend="gloo"), devices=1).fit(
            make_model(texts), texts
        )
    plain = VQLogitsLM(LLAMA, texts.vocab_size, head=partial(VQLogitsHead, codebook_size=20))
    with pytest.warns(UserWarning, match="CodebookFit found no head"):
        make_trainer(tmp_path, [CodebookFit()], steps=1).fit(plain, texts)


def test_it_goes_together_with_the_other_callbacks_of_codes(texts, tmp_path):
    model = make_model(texts)
    callbacks = [CodebookReinit(every_n_steps=1, min_usage=0.5), CodebookReassign([2, 6]), CodebookFit(at=0.5)]
    make_trainer(tmp_path, callbacks).fit(model, texts)
    assert not model.head.has_own_vectors
    ids = torch.randint(texts.vocab_size, (2, 5))
    torch.testing.assert_close(model(ids).exp().sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(model(ids), hierarchical_log_probs(model.hidden_states(ids), model.head.tensors()))
