"""Tokens that get other codes in training: the sums, the choice of codes, and the callback in real runs."""

import copy
import random
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from lit_logits import VQLogitsLM
from lit_logits.callbacks import CodebookReassign, CodebookReinit
from lit_logits.contracts import Reassigned, ReassigningHead
from lit_logits.datamodules import TextDataModule
from lit_logits.functional import (
    TokenStatistics,
    code_reassignment,
    hierarchical_token_statistics,
    reassign_by_loss,
    vq_token_statistics,
)
from lit_logits.modules import DenseLogitsHead, HierarchicalVQLogitsHead, VQLogitsHead
from lit_logits.modules.vq_logits import reassigning
from lit_logits.modules.vq_logits.reassigning import set_aside

V, D = 24, 6
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 32}
TWO = partial(HierarchicalVQLogitsHead, codebook_sizes=(5, 4, 3))
ONE = partial(VQLogitsHead, codebook_size=7)


def random_head(make, std=1.0, **kwargs):
    torch.manual_seed(0)
    head = make(D, V, **kwargs)
    for parameter in head.parameters():
        parameter.data.normal_(std=std)
    return head


def positions(num=40, batches=3, seed=1):
    """Hidden states, and tokens that depend on them; two tokens never come."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(V - 2, D, generator=generator)
    hidden = torch.randn(batches, num, D, generator=generator)
    return [(part, torch.multinomial((part @ rows.T).softmax(-1), 1, generator=generator)[:, 0]) for part in hidden]


# ---------------------------------------------------------------------- sums


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_sums_of_one_level_against_a_vector_for_each_token(bias, cap):
    head = random_head(ONE, bias=bias)
    found = vq_token_statistics(positions(), head.codebook, head.token_to_code, head.token_bias, cap=cap)
    own = torch.zeros(V, D, requires_grad=True)
    hidden, labels = (torch.cat(parts) for parts in zip(*positions(), strict=True))
    head.logit_cap = cap
    logits = head(hidden) + hidden @ own.T
    F.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(found.gradient, own.grad)
    check_rest(found, logits.softmax(-1).detach(), hidden, labels, torch.zeros(V, dtype=torch.int64), 1)


@pytest.mark.parametrize("bias", [True, False])
def test_sums_of_two_levels_against_a_vector_for_each_token(bias):
    head = random_head(TWO, bias=bias)
    owner = head.token_to_cluster.clone()
    owner[owner == 3] = 1  # a cluster without tokens, and another of twice the size
    head.set_codes(owner, head.token_codes)
    found = hierarchical_token_statistics(positions(), head.tensors())
    own = torch.zeros(V, D, requires_grad=True)
    hidden, labels = (torch.cat(parts) for parts in zip(*positions(), strict=True))
    inner = head(hidden) + hidden @ own.T  # log-probabilities: the cluster's is the same for all of its tokens
    inner = inner.masked_fill(owner[labels].unsqueeze(1) != owner, -torch.inf)
    F.cross_entropy(inner, labels, reduction="sum").backward()
    torch.testing.assert_close(found.gradient, own.grad, atol=1e-4, rtol=1e-4)
    check_rest(found, inner.softmax(-1).detach(), hidden, labels, owner, 5)


def check_rest(found, probs, hidden, labels, groups, num_groups):
    torch.testing.assert_close(found.mass, probs.sum(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.variance, (probs * (1 - probs)).sum(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.counts, torch.bincount(labels, minlength=V).float())
    assert torch.equal(found.groups, groups)
    torch.testing.assert_close(
        found.hidden_sum, torch.stack([hidden[groups[labels] == group].sum(0) for group in range(num_groups)])
    )
    torch.testing.assert_close(found.hidden_moment, hidden.T @ hidden)


# ---------------------------------------------------------------------- the choice


def expected_change(sums: TokenStatistics, change, *, has_bias):
    """The quadratic of the module's docstring (V,), summed term by term, for a change (V, d) of the vectors."""
    sizes = torch.stack([sums.counts[sums.groups == group].sum() for group in range(len(sums.hidden_sum))]).clamp(min=1)
    means = sums.hidden_sum / sizes.unsqueeze(1) * has_bias
    moment = sums.hidden_moment - sum(size * mean.outer(mean) for size, mean in zip(sizes, means, strict=True))
    moment /= sums.counts.sum()
    found = []
    for v, delta in enumerate(change):
        gradient = sums.gradient[v] - (sums.mass[v] - sums.counts[v]) * means[sums.groups[v]]
        weight = max(sums.variance[v], sums.counts[v] * (1 - sums.counts[v] / sizes[sums.groups[v]]))
        found.append(gradient @ delta + 0.5 * weight * delta @ moment @ delta)
    return torch.stack(found)


@pytest.mark.parametrize("has_bias", [True, False])
def test_no_change_of_one_code_gains_more_than_asked(has_bias):
    head = random_head(TWO, std=0.3)
    sums = hierarchical_token_statistics(positions(batches=8), head.tensors())
    stages, before = head.codes.detach().split([4, 3]), head.token_codes
    found = reassign_by_loss(sums, stages, before, has_bias=has_bias, min_gain=0.5, num_sweeps=20)

    def change(codes):
        return sum(stage[new] - stage[old] for stage, new, old in zip(stages, codes.T, before.T, strict=True))

    reached = expected_change(sums, change(found.token_codes), has_bias=has_bias)
    torch.testing.assert_close(found.gain, -reached, atol=1e-3, rtol=1e-3)
    assert (found.gain > 0.5).any()
    sizes = torch.zeros(5).index_add_(0, sums.groups, sums.counts)
    means = (sums.hidden_sum / sizes.unsqueeze(1))[sums.groups]
    shift = -(change(found.token_codes) * means).sum(1) if has_bias else torch.zeros(V)
    torch.testing.assert_close(found.bias_shift, shift)
    for stage, codebook in enumerate(stages):
        for code in range(len(codebook)):
            other = found.token_codes.clone()
            other[:, stage] = code
            assert (reached - expected_change(sums, change(other), has_bias=has_bias)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("make", [ONE, TWO])
def test_tokens_whose_codes_were_exchanged_get_them_back(make):
    """Text drawn from the head itself: with other codes for a third of the tokens its loss rises, and falls again."""
    head = random_head(make, std=0.3)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(20_000, D, generator=generator)
    data = [(hidden, head.sample(hidden, generator=generator))]
    best = head.loss(*data[0]).item()
    if make is TWO:
        true = head.token_codes.clone()
        other = true.clone()
        other[::3] = (true[::3] + 1) % 3
        head.set_codes(token_codes=other)
    else:
        true = head.token_to_code.clone()
        other = true.clone()
        other[::3] = (true[::3] + 1) % 7
        head.set_codes(token_to_code=other)
    before = head.loss(*data[0]).item()
    told = head.reassign(data)
    assert told.num_positions == 20_000
    assert 8 <= told.num_tokens < 16  # 8 were exchanged
    for _ in range(3):
        head.reassign(data)
    # All that was lost comes back with one level; with two, both stages of a token were exchanged, and each is chosen
    # by itself.
    now = head.loss(*data[0]).item()
    assert now - best < (1e-3 if make is ONE else 0.6) * (before - best)


def test_the_loss_falls_where_the_whole_step_goes_too_far():
    """Contexts of few kinds: a token is likely in one of them, along which the curvature is many times the mean."""
    generator = torch.Generator().manual_seed(3)
    rows, kinds = torch.randn(60, 16, generator=generator), 4 * torch.randn(6, 16, generator=generator)

    def text(num):
        hidden = 0.2 * torch.randn(num, 16, generator=generator) + kinds[torch.randint(6, (num,), generator=generator)]
        return hidden, torch.multinomial((hidden @ rows.T).softmax(-1), 1, generator=generator)[:, 0]

    torch.manual_seed(0)
    head = HierarchicalVQLogitsHead(16, 60, (10, 32, 32)).eval()
    for parameter in head.parameters():
        parameter.data.normal_(std=0.5)
    read, fresh = [text(500) for _ in range(24)], text(4000)
    with torch.no_grad():
        before = float(head.loss(*fresh))
        whole = copy.deepcopy(head)
        sums = hierarchical_token_statistics(read, whole.tensors())
        found = reassign_by_loss(sums, whole.codes.split([32, 32]), whole.token_codes)
        whole.set_codes(token_codes=found.token_codes)
        whole.token_bias.add_(found.bias_shift)
        assert float(whole.loss(*fresh)) > before
        told = head.reassign(read)
        after = float(head.loss(*fresh))
    assert after < before - 0.3
    assert after - before == pytest.approx(-told.gain, abs=0.3)  # measured on other text


@pytest.mark.parametrize(
    ("losses", "slack", "chosen"),
    [
        ((4.9, 4.8, 4.7, 4.6), 0.05, 8.0),
        ((4.9, 4.8, 4.6, 4.66), 0.05, 4.0),
        ((5.3, 5.01, 5.0, 4.99), 0.05, 2.0),  # at most that much above the lowest
        ((5.3, 5.01, 5.0, 4.99), 0.015, 4.0),
        ((5.3, 5.01, 5.0, 4.99), 0.0, 8.0),
        ((4.5, 4.5, 4.5, 4.5), 0.05, 1.0),
        ((5.2, 5.2, 5.2, 5.2), 0.05, None),
        ((float("nan"), 4.9, 4.9, 4.9), 0.05, 2.0),
        ((float("nan"),) * 4, 0.05, None),
    ],
)
def test_the_longest_step_that_is_nearly_the_best_is_taken(losses, slack, chosen, monkeypatch):
    head = random_head(TWO, std=0.1).eval()
    seen = iter([5.0, *losses])
    monkeypatch.setattr(reassigning, "mean_loss", lambda *_: next(seen))
    data = positions(num=20_000)
    others = list(set_aside(data, []))
    sums = hierarchical_token_statistics(others, head.tensors())
    before = head.token_codes.clone()
    expected = before
    if chosen is not None:
        expected = reassign_by_loss(sums, head.codes.split([4, 3]), before, damping=chosen).token_codes
        assert not torch.equal(expected, before)
    told = head.reassign(data, slack=slack)
    assert torch.equal(head.token_codes, expected)
    assert told.num_tokens == int((expected != before).any(1).sum())


def test_an_eighth_is_set_aside_and_nothing_is_lost():
    data = [(torch.full((3, D), float(index)), torch.arange(3)) for index in range(20)]
    held: list = []
    others = list(set_aside(iter(data), held))
    numbers = [[int(hidden[0, 0]) for hidden, _ in part] for part in (held, others)]
    assert numbers[0] == [0, 8, 16]
    assert sorted(numbers[0] + numbers[1]) == list(range(20))
    held = []
    ((hidden, labels),) = set_aside([(torch.arange(16.0).unsqueeze(1), torch.arange(16))], held)
    assert held[0][1].tolist() == [0, 8]
    assert sorted([*labels.tolist(), 0, 8]) == list(range(16))
    assert torch.equal(hidden.squeeze(1).long(), labels)


def test_arguments_are_checked():
    sums, codes = vq_token_statistics(positions(), torch.eye(D), torch.arange(V) % D), (torch.arange(V) % D)[:, None]
    with pytest.raises(ValueError, match="Expected `min_gain`"):
        reassign_by_loss(sums, [torch.eye(D)], codes, min_gain=-1)
    with pytest.raises(ValueError, match="Expected `num_sweeps` to be at least 1"):
        reassign_by_loss(sums, [torch.eye(D)], codes, num_sweeps=0)


def test_heads_tell_whether_they_can():
    assert not isinstance(DenseLogitsHead(D, V), ReassigningHead)
    assert TWO(D, V).can_reassign
    assert ONE(D, V).can_reassign
    assert not ONE(D, V, mapping="learned").can_reassign
    assert not ONE(D, V, codebook_update="ema").can_reassign


# ---------------------------------------------------------------------- in training


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents of words that follow each other, and a tokenizer of them."""
    folder = tmp_path_factory.mktemp("texts")
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghij", k=4)) for _ in range(60)]
    for number in range(60):
        at = choose.randrange(60)
        text = [words[at := (at * 7 + choose.randrange(3)) % 60] for _ in range(200)]
        (folder / f"{number}.txt").write_text(" ".join(text))

    def make():
        return TextDataModule(
            f"{folder}/*.txt", bpe_vocab_size=300, block_size=32, batch_size=4, cache_dir=str(folder / "cache")
        )

    return make


def run(folder, texts, head=TWO, *, steps=12, callbacks=(), resume=None, save_at=None, dropout=0.0, **kwargs):
    L.seed_everything(0, verbose=False)
    model = VQLogitsLM({**LLAMA, "attention_dropout": dropout}, 300, head=head)
    model.head.init = "random"
    saves = [ModelCheckpoint(folder, every_n_train_steps=save_at, save_top_k=-1, filename="{step}")] if save_at else []
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=bool(saves),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, *saves],
        **kwargs,
    )
    trainer.fit(model, texts(), ckpt_path=resume)
    return trainer, model


@pytest.mark.parametrize("head", [ONE, TWO])
def test_codes_change_at_the_steps_and_training_goes_on(head, texts, tmp_path, capsys):
    callback = CodebookReassign([4, 12], num_tokens=2000, min_gain=0.0)
    trainer, model = run(tmp_path, texts, head, callbacks=[callback])
    told = trainer.callback_metrics
    assert 0 < told["vq/reassigned"] <= 1
    assert told["vq/reassign_gain"] > 0
    assert callback.last_step == 4  # not at the last step, after which nothing would train
    assert model.training


@pytest.mark.parametrize(
    ("length", "shares"),
    [
        ({"steps": 12}, [2 / 3, 1 / 3]),
        ({"steps": -1, "max_epochs": 2, "limit_train_batches": 6}, [2 / 3, 1 / 3]),
        ({"steps": -1, "max_epochs": 1, "limit_train_batches": 16}, [3 / 4, 1 / 2]),
        ({"steps": -1, "max_epochs": -1}, [1, 1]),  # the end is not known
    ],
)
def test_a_late_step_is_a_careful_one(length, shares, texts, tmp_path, monkeypatch):
    seen = []

    def reassign(self, positions, *, min_gain, slack):
        seen.append(slack)
        return Reassigned(0, 0.0, sum(len(labels) for _, labels in positions))

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 9

    monkeypatch.setattr(HierarchicalVQLogitsHead, "reassign", reassign)
    callbacks = [CodebookReassign([4, 8], num_tokens=50), Stop()]
    run(tmp_path, texts, callbacks=callbacks, **length)
    assert seen == pytest.approx([0.05 * share for share in shares])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("head", [ONE, TWO])
def test_sums_are_exact_in_other_precisions(head, precision, texts, tmp_path, monkeypatch):
    """The forward is in the precision of training, the sums over it in float32."""
    seen = []
    monkeypatch.setattr(code_reassignment, "all_reduce_sum_", lambda tensor: seen.append(tensor) or tensor)
    callback = CodebookReassign([2], num_tokens=500, min_gain=0.0)
    trainer, _ = run(tmp_path, texts, head, steps=4, callbacks=[callback], precision=precision)
    assert trainer.callback_metrics["vq/reassigned"] > 0
    assert len(seen) == 6
    assert all(tensor.dtype == torch.float32 for tensor in seen)
    mass, counts = seen[1], seen[3]
    torch.testing.assert_close(mass.sum(), counts.sum(), rtol=1e-3, atol=0)  # probabilities add up to one


def test_reading_changes_nothing_else(texts, tmp_path):
    """With a gain that no change reaches, the run is that without the callback: dropout and order of batches too."""
    _, plain = run(tmp_path, texts, dropout=0.3)
    trainer, read = run(
        tmp_path, texts, dropout=0.3, callbacks=[CodebookReassign([3, 6], min_gain=1e9, num_tokens=3000)]
    )
    assert trainer.callback_metrics["vq/reassigned"] == 0
    for name, value in plain.state_dict().items():
        assert torch.equal(value, read.state_dict()[name]), name


@pytest.mark.parametrize("save_at", [3, 4, 6])
def test_resumed_is_uninterrupted(save_at, texts, tmp_path):
    def callbacks():
        return [CodebookReassign([4], num_tokens=3000), CodebookReinit(every_n_steps=5, min_usage=0.1)]

    _, whole = run(tmp_path / "whole", texts, callbacks=callbacks(), save_at=save_at)
    _, resumed = run(tmp_path, texts, callbacks=callbacks(), resume=tmp_path / "whole" / f"step={save_at}.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_plain_loader_is_read_too():
    starts = torch.randint(40, (40, 1), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in (starts + torch.arange(16)) % 40]  # there is much to gain
    model = VQLogitsLM(LLAMA, 300, head=partial(TWO, init="random"))
    callback = CodebookReassign([2], min_gain=0.0)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=4, callbacks=[callback], **options)
    trainer.fit(model, DataLoader(rows, batch_size=4))
    assert trainer.callback_metrics["vq/reassigned"] > 0


def test_what_cannot_work_is_told_at_the_start(texts, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a head with a fixed mapping .* Set mapping='fixed'"):
        run(tmp_path, texts, partial(ONE, mapping="learned"), callbacks=[CodebookReassign([2])])
    with pytest.raises(ValueError, match="Expected no EMAWeightAveraging with CodebookReassign"):
        run(tmp_path, texts, callbacks=[CodebookReassign([2]), EMAWeightAveraging()])
    with pytest.raises(ValueError, match="Expected `at_steps` to be at least 1, but got 0"):
        CodebookReassign([0])
    with pytest.raises(ValueError, match="Expected `num_tokens` to be at least 1"):
        CodebookReassign([1], num_tokens=0)
    with pytest.raises(ValueError, match="Expected `min_gain` to be at least 0"):
        CodebookReassign([1], min_gain=-1.0)
    with pytest.warns(UserWarning, match="CodebookReassign found no head"):
        run(tmp_path, texts, DenseLogitsHead, steps=1, callbacks=[CodebookReassign([2])])
    with pytest.warns(UserWarning, match=r"reads at steps \[4, 9\], but training ends at step 4. Set at_steps=\[2\]"):
        run(tmp_path, texts, steps=4, callbacks=[CodebookReassign([4, 9])])

    class Mine(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = TWO(D, V)

    with pytest.raises(ValueError, match="Expected Mine to have a method `hidden_states`"):
        CodebookReassign([1]).setup(None, Mine(), "fit")


def test_the_head_is_left_with_tables_of_its_new_codes():
    head = random_head(TWO)
    hidden = torch.randn(50, D)
    head.greedy(hidden)
    head.reassign(positions(batches=8), min_gain=0.0)
    fresh = copy.deepcopy(head)
    fresh._tables.clear()
    assert torch.equal(head(hidden), fresh(hidden))
