"""Updates of `DualHeadKD` against oracles: projected, of a step of one's own, on two processes."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from scripts import run_script
from tiny_classifiers import batch_of, check, fit, make, oracle, rows

from lit_logits.callbacks import NeuralCollapseMonitor
from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.functional.dual_head_kd import logit_loss

# --- the projected update ---


@pytest.mark.parametrize("mode", ["none", "backbone", "all"])
@pytest.mark.parametrize("method", ["dual_head", "single_head", "kd"])
def test_update_is_the_formula(method, mode):
    model = make(method, grad_align=mode, ce_weight=0.7, kd_factor=1.3)
    expected, dot = oracle(model, batch_of(rows()), mode)
    trainer = fit(model, rows())
    check(model, expected)
    if mode != "none":
        assert trainer.callback_metrics["kd/conflict"] == float(dot < 0)


@pytest.mark.parametrize("mode", ["backbone", "all"])
def test_the_cases_above_are_in_conflict(mode):
    for method in ("dual_head", "single_head", "kd"):
        assert oracle(make(method, grad_align=mode), batch_of(rows()), mode)[1] < 0


@pytest.mark.parametrize("mode", ["none", "backbone"])
def test_two_micro_batches_are_one_batch(mode):
    """The gradients of all micro-batches are joined once: projecting each would be another update."""
    model = make(grad_align=mode)
    expected, _ = oracle(model, batch_of(rows()), mode)
    fit(model, rows(), batch_size=6, accumulate_grad_batches=2)
    check(model, expected)


@pytest.mark.parametrize("mode", ["none", "all"])
def test_clipping_acts_on_the_joined_gradient(mode):
    model = make(grad_align=mode)
    expected, _ = oracle(model, batch_of(rows()), mode, clip=0.05)
    fit(model, rows(), gradient_clip_val=0.05)
    check(model, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_scaling_changes_nothing_and_an_overflow_skips_the_step(accumulate):
    """A real GradScaler on CPU, with float32 autocast switched off inside by a scale of 2¹⁶ only."""

    def run(scale, poison):
        model = make(grad_align="backbone")
        data = [{**row, "pixel_values": row["pixel_values"].float()} for row in rows()]
        if poison:
            data[0]["pixel_values"] = torch.full((6,), float("inf"))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        before = copy.deepcopy(model.net.state_dict())
        sizes = {"batch_size": 12 // accumulate, "accumulate_grad_batches": accumulate}
        fit(model, data, precision=None, plugins=[plugin], gradient_clip_val=0.05, **sizes)
        return before, model, scaler.get_scale()

    _, scaled, scale = run(2.0**16, poison=False)
    _, plain, _ = run(1.0, poison=False)
    assert scale == 2**16
    check(scaled, {name: p.detach() for name, p in plain.net.named_parameters()}, rtol=1e-5, atol=1e-6)
    before, poisoned, scale = run(2.0**16, poison=True)
    assert scale == 2**15
    assert all(torch.equal(before[name], value) for name, value in poisoned.net.state_dict().items())


def test_a_fit_that_was_cut_off_leaves_no_gradients_to_the_next():
    model = make(grad_align="backbone")
    expected, _ = oracle(model, batch_of(rows()), "backbone")
    model.double()
    ce, kd = model.losses(batch_of(rows(seed=1)))
    model.aligner.collect(ce + kd, list(model.net.parameters()))  # no step follows
    fit(model, rows())
    check(model, expected)


def test_an_overflow_does_not_spoil_the_mean_angle():
    model = make(grad_align="backbone")
    data = rows(24)
    data[0]["pixel_values"] = torch.full((6,), float("nan"), dtype=torch.float64)
    metrics = fit(model, data, max_steps=2, gradient_clip_val=0.0).callback_metrics
    assert "kd/grad_cosine" not in metrics  # nothing but NaN after the first step
    model = make(grad_align="backbone", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    metrics = fit(model, data[::-1], max_steps=2).callback_metrics
    assert torch.isfinite(metrics["kd/grad_cosine"])


def test_sharded_gradients_are_refused():
    class FSDPStrategy:
        pass

    model = make(grad_align="all")
    model._trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="FSDPStrategy shards the gradients"):
        model.on_fit_start()


# --- a step of one's own ---


class HalfTheTeacher(DualHeadKD):
    """`backward` once read a term that only the library's own step left behind: AttributeError `_kd_term`."""

    def training_step(self, batch, batch_idx):
        ce, kd = self.losses(batch)
        return ce + 0.5 * kd


class TwoBatches(DualHeadKD):
    def training_step(self, batch, batch_idx):
        total = 0
        for part in (slice(None, 2), slice(2, None)):
            some = {name: value[part] for name, value in batch.items()}
            ce, kd = self.losses(some)
            total = total + (ce + 0.5 * kd) * len(some["labels"]) / len(batch["labels"])
        return total


class OwnTerm(DualHeadKD):
    def training_step(self, batch, batch_idx):
        output, labels = self.net(self._inputs(batch)), batch["labels"]
        teacher = self.teacher(self._inputs(batch))
        kd = logit_loss(output.aux_logits, teacher, kind=self.kd_loss, temperature=self.temperature)
        self.aligner.keep_apart(kd)
        return F.cross_entropy(output.logits, labels) + 0.5 * kd


class WarmUp(DualHeadKD):
    def training_step(self, batch, batch_idx):
        return self.losses(batch).ce


class OwnLoss(DualHeadKD):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.student(batch["pixel_values"]), batch["labels"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["none", "backbone", "all"])
@pytest.mark.parametrize("kind", [HalfTheTeacher, TwoBatches, OwnTerm])
def test_a_step_of_ones_own_is_aligned(kind, mode, accumulate):
    model = make(grad_align=mode, kd_factor=0.5, kind=kind)
    expected, dot = oracle(model, batch_of(rows()), mode)
    assert dot < 0 or mode == "none"
    metrics = fit(model, rows(), batch_size=12 // accumulate, accumulate_grad_batches=accumulate).callback_metrics
    check(model, expected)
    if mode != "none":
        assert metrics["kd/conflict"] == 1


@pytest.mark.parametrize("kind", [HalfTheTeacher, TwoBatches, OwnTerm])
def test_a_step_of_ones_own_is_measured(kind):
    model = make(kd_factor=0.5, kind=kind)
    expected, _ = oracle(model, batch_of(rows()), "none")
    metrics = fit(model, rows(), callbacks=[NeuralCollapseMonitor(1)]).callback_metrics
    check(model, expected)
    aligned = fit(make(kd_factor=0.5, kind=kind, grad_align="backbone"), rows()).callback_metrics
    torch.testing.assert_close(metrics["kd/grad_cosine"], aligned["kd/grad_cosine"])


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(("kind", "mode"), [(WarmUp, "none"), (WarmUp, "backbone"), (OwnLoss, "none")])
def test_a_loss_without_distillation_trains_as_it_is(kind, mode, measured):
    model = make(grad_align=mode, kind=kind)
    expected, _ = oracle(make(kd_factor=0.0), batch_of(rows()), "none")
    metrics = fit(model, rows(), callbacks=[NeuralCollapseMonitor(1)] if measured else None).callback_metrics
    check(model, expected)
    assert "kd/grad_cosine" not in metrics


def test_an_aligned_step_that_names_no_distillation_term_is_refused():
    with pytest.raises(ValueError, match=r"to return a loss made of the terms that `losses\(batch\)` gives"):
        fit(make(grad_align="backbone", kind=OwnLoss), rows())


def test_terms_of_a_loss_that_never_came_are_forgotten():
    model = make(grad_align="backbone")
    expected, _ = oracle(model, batch_of(rows()), "backbone")
    model.double()
    model.losses(batch_of(rows(seed=1)))
    fit(model, rows())
    check(model, expected)


def test_the_angle_is_asked_for_by_the_step():
    """A callback once set a flag of the model, and had to take it away again."""
    model = make().double()
    with pytest.raises(AttributeError):
        model.aligner.measuring = True
    model.aligner.measure_next_step()
    assert model.aligner.is_active
    ce, kd = model.losses(batch_of(rows()))
    model.aligner.collect(ce + kd, list(model.net.parameters()))
    assert model.aligner.join(list(model.net.parameters()), model.net.head_parameters()).conflict == 1
    assert not model.aligner.is_active


class CountBackward(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        CountBackward.calls += 1
        return grad


@pytest.mark.parametrize(("mode", "passes"), [("none", 1), ("backbone", 2), ("all", 2)])
def test_alignment_costs_one_more_backward_pass(mode, passes):
    model = make(grad_align=mode)
    model.student.body.register_forward_hook(lambda _, args, output: CountBackward.apply(output))
    CountBackward.calls = 0
    fit(model, rows())
    assert CountBackward.calls == passes


# --- two processes ---

TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
from scripts import TakeTurns
from tiny_classifiers import fit, make, rows

if __name__ == "__main__":
    model = make(grad_align={mode!r}).double()
    trainer = fit(model, rows(24), batch_size=6 // {accumulate}, accumulate_grad_batches={accumulate},
                  max_steps=2, devices=2, strategy="ddp_fork", gradient_clip_val=0.5,
                  sampler=TakeTurns(24), use_distributed_sampler=False)
    if trainer.global_rank == 0:
        torch.save({{name: p.detach() for name, p in model.net.named_parameters()}}, {out!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "accumulate"), [("none", 1), ("backbone", 1), ("all", 2)])
def test_two_processes_equal_one(tmp_path, mode, accumulate):
    """Both gradients are averaged before the projection: each rank projecting its own is another update."""
    out, tests = tmp_path / "out.pt", str(Path(__file__).parent)
    run_script(tmp_path / "run.py", TWO_RANKS.format(tests=tests, mode=mode, accumulate=accumulate, out=str(out)))
    single = make(grad_align=mode).double()
    fit(single, rows(24), batch_size=12, max_steps=2, gradient_clip_val=0.5)
    check(single, torch.load(out), rtol=1e-10, atol=1e-12)
