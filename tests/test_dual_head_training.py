"""`DualHeadKD` under the real Trainer: updates against oracles, teachers, students, export, two processes."""

import argparse
import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from scripts import run_script
from torch import nn
from torch.utils.data import DataLoader

from lit_logits.callbacks import NeuralCollapseMonitor
from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.functional.dual_head_kd import logit_loss
from lit_logits.modules.dual_head_kd.classifiers import find_classifier, load_classifier
from lit_logits.modules.dual_head_kd.teacher import load_weights

CLASSES = 3


class Net(nn.Module):
    """A classifier in one file, with a layer that nothing else knows."""

    def __init__(self, width=8, classes=CLASSES, norm=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Tanh())
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.body(x))


def rows(count=12, seed=38):
    """Samples with labels by lot; with this seed all gradients of the tests here are in conflict."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def make(method="dual_head", seed=0, norm=False, optimizer=None, kind=DualHeadKD, **kwargs):
    torch.manual_seed(seed)
    student, teacher = Net(norm=norm), Net(width=16, norm=norm)
    with torch.no_grad():
        teacher.fc.weight.mul_(6)
    sgd = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    return kind(student, teacher, method=method, optimizer=sgd, **kwargs)


def fit(model, data, batch_size=12, sampler=None, **kwargs):
    defaults = {"max_steps": 1, "precision": "64-true", "accelerator": "cpu", "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**{**defaults, **quiet, **kwargs})
    trainer.fit(model, DataLoader(data, batch_size=batch_size, sampler=sampler))
    return trainer


def oracle(model, batch, mode, *, clip=None, lr=0.5):
    """One SGD step with explicit losses, two plain backward passes over one flat vector, and the formula."""
    student = copy.deepcopy(model.net).double()
    teacher = copy.deepcopy(model.teacher.model).double()
    x, y = batch["pixel_values"], batch["labels"]
    z1 = student.student(x)
    features = student.student.body(x)
    z2 = z1 if student.aux_head is None else student.aux_head(features)
    ce = model.ce_weight * F.cross_entropy(z1, y)
    kd = model.kd_factor * logit_loss(z2, teacher(x), kind=model.kd_loss, temperature=model.temperature)
    parameters = dict(student.named_parameters())

    def flat(loss):
        grads = torch.autograd.grad(loss, parameters.values(), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True)]

    g1, g2 = flat(ce), flat(kd)
    inside = [mode == "all" or "body" in name for name in parameters]
    dot = sum((a * b).sum() for a, b, use in zip(g1, g2, inside, strict=True) if use)
    norm = sum((a * a).sum() for a, use in zip(g1, inside, strict=True) if use)
    if mode != "none" and dot < 0:
        g2 = [b - dot / norm * a if use else b for a, b, use in zip(g1, g2, inside, strict=True)]
    total = [a + b for a, b in zip(g1, g2, strict=True)]
    if clip is not None:
        length = torch.sqrt(sum((g * g).sum() for g in total))
        total = [g * min(1.0, clip / (length + 1e-6)) for g in total]
    step = {name: p.detach() - lr * g for (name, p), g in zip(parameters.items(), total, strict=True)}
    return step, dot.item()


def batch_of(data):
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def check(model, expected, **tolerance):
    own = dict(model.net.named_parameters())
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name].detach(), value, **{"rtol": 1e-12, "atol": 1e-13, **tolerance})


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


def test_schedulers_step_by_epoch_or_by_step():
    for interval, lrs in (("epoch", [0.5, 0.5, 0.05]), ("step", [0.5, 0.05, 0.05])):
        seen = []
        milestone = 1
        model = make(
            grad_align="all",
            lr_interval=interval,
            lr_scheduler=lambda optimizer, at=milestone: torch.optim.lr_scheduler.MultiStepLR(optimizer, [at]),
        )
        model.on_train_batch_start = lambda *_, seen=seen, m=model: seen.append(m.optimizers().param_groups[0]["lr"])
        fit(model, rows(), batch_size=6, max_steps=3)
        assert seen == pytest.approx(lrs)


def test_a_plateau_scheduler_reads_its_monitored_value():
    model = make(
        lr_scheduler=lambda o: L.pytorch.cli.ReduceLROnPlateau(o, monitor="train/loss", patience=0, threshold=1e9)
    )
    fit(model, rows(), max_steps=3)
    assert model.optimizers().param_groups[0]["lr"] < 0.5


@pytest.mark.parametrize("kind", ["kl", "binary_kl", "binary_kl_norm", "mse", "l1", "cosine"])
def test_every_loss_trains(kind):
    model = make(kd_loss=kind, aux_head="nonlinear")
    metrics = fit(model, rows(), max_steps=3).callback_metrics
    assert torch.isfinite(metrics["train/loss"])
    torch.testing.assert_close(metrics["train/loss"], metrics["train/loss_ce"] + metrics["train/loss_kd"])


def test_defaults_follow_the_method():
    assert (make("kd").kd_loss, make("kd").temperature) == ("kl", 4.0)
    assert (make().kd_loss, make().temperature) == ("binary_kl_norm", 2.0)
    assert make("single_head").net.aux_head is None


def test_cross_entropy_alone_needs_no_teacher():
    model = DualHeadKD(Net(), method="ce", optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    x, y = batch_of(rows()).values()
    twin = copy.deepcopy(model.student).double()
    grads = torch.autograd.grad(F.cross_entropy(twin(x), y), twin.parameters())
    fit(model, rows())
    for p, q, g in zip(model.student.parameters(), twin.parameters(), grads, strict=True):
        torch.testing.assert_close(p, q - 0.5 * g)


def test_cross_entropy_alone_has_nothing_to_align():
    """So a recipe with `grad_align` trains its teacher by another `method` alone."""
    model = DualHeadKD(Net(), method="ce", grad_align="all")
    assert "kd/conflict" not in fit(model, rows()).callback_metrics


def test_a_term_that_a_subclass_adds_is_trained_in_every_mode():
    class Regularised(DualHeadKD):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 100 * self.student.body[0].bias.square().sum()

    for mode in ("none", "all"):
        model = make(grad_align=mode)
        model.__class__ = Regularised
        with torch.no_grad():
            model.student.body[0].bias.fill_(1.0)
        model.optimizer = lambda p: torch.optim.SGD(p, lr=0.005)
        fit(model, rows())
        assert model.student.body[0].bias.abs().max() < 0.05


def test_a_single_row_has_no_batch_statistic():
    metrics = fit(make(aux_head="nonlinear"), rows(13), batch_size=12, max_steps=2).callback_metrics
    assert torch.isfinite(metrics["train/loss"])


def test_students_that_return_a_mapping_or_call_by_keyword():
    class Named(Net):
        def forward(self, x):
            return {"logits": self.fc(input=self.body(x)), "extra": None}

    model = DualHeadKD(Named(), Net())
    data = [{**row, "labels": row["labels"].int()} for row in rows()]
    trainer = fit(model, data)
    assert torch.isfinite(trainer.callback_metrics["train/loss_kd"])
    (result,) = trainer.validate(model, DataLoader(data, batch_size=5), verbose=False)
    assert 0 < result["val/loss"] < 10


def test_samples_without_a_label_still_learn_from_the_teacher():
    batch = batch_of(rows())
    batch["labels"][::3] = -100
    model = make().double()
    ce, kd = model.losses(batch)
    known = batch["labels"] != -100
    torch.testing.assert_close(ce, F.cross_entropy(model(batch["pixel_values"][known]), batch["labels"][known]))
    batch["labels"][:] = -100
    nothing = model.losses(batch)
    assert nothing.ce == 0
    torch.testing.assert_close(nothing.kd, kd)


def test_evaluation_is_over_samples_not_batches():
    model = make().double()
    data = rows(11)
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, precision="64-true")
    (result,) = trainer.test(model, DataLoader(data, batch_size=4), verbose=False)
    x, y = batch_of(data).values()
    assert result["test/loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert result["test/acc"] == pytest.approx((model(x).argmax(1) == y).double().mean().item(), rel=1e-6)
    predicted = torch.cat([p["predictions"] for p in trainer.predict(model, DataLoader(data, batch_size=4))])
    assert torch.equal(predicted, model(x).argmax(1))


# --- the teacher ---


def test_teacher_is_frozen_in_eval_and_nowhere_to_be_found(tmp_path):
    model = make(norm=True, grad_align="backbone")
    before = copy.deepcopy(model.teacher.model.state_dict())
    modes = []
    model.on_train_batch_end = lambda *_: modes.append(model.teacher.model.training or not model.student.training)
    trainer = fit(model, rows(), batch_size=6, max_steps=4)
    assert modes == [False] * 4
    assert all(torch.equal(before[k], v.to(before[k])) for k, v in model.teacher.model.state_dict().items())
    held = {id(p) for p in model.teacher.model.parameters()}
    assert held.isdisjoint(id(p) for group in model.optimizers().param_groups for p in group["params"])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"net"}
    assert model.teacher.model.fc.weight.dtype == torch.float64  # it followed to another dtype


def test_evaluation_needs_no_teacher(tmp_path):
    model = make()
    fit(model, rows()).save_checkpoint(tmp_path / "last.ckpt")
    alone = DualHeadKD.load_from_checkpoint(tmp_path / "last.ckpt", student=Net(), teacher=None).double()
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, precision="64-true")
    (result,) = trainer.test(alone, DataLoader(rows(), batch_size=4), verbose=False)
    x, y = batch_of(rows()).values()
    assert result["test/acc"] == pytest.approx((model(x).argmax(1) == y).double().mean().item())
    with pytest.raises(ValueError, match="without an auxiliary head for method='kd', but this one is with it"):
        DualHeadKD.load_from_checkpoint(tmp_path / "last.ckpt", student=Net(), teacher=None, method="kd")


def test_the_whole_teacher_stays_in_eval_mode():
    model = make(norm=True).train()
    assert not any(module.training for module in [*model.teacher.modules(), *model.teacher.model.modules()])


def test_resumed_training_equals_an_uninterrupted_run(tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def run(steps, **kwargs):
        model = make(grad_align="backbone", optimizer=sgd).double()  # Lightning restores before it converts
        trainer = L.Trainer(
            max_steps=steps,
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            precision="64-true",
        )
        trainer.fit(model, DataLoader(rows(), batch_size=12), **kwargs)
        return model, trainer

    whole, _ = run(6)
    _, trainer = run(3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(6, ckpt_path=tmp_path / "half.ckpt")
    check(resumed, {name: p.detach() for name, p in whole.net.named_parameters()}, rtol=0, atol=0)


def saved_teachers(tmp_path):
    """The same weights in every kind of file that people have."""
    trained = DualHeadKD(Net(norm=True), method="ce", optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    state = trained.student.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "ddp.pt")
    torch.save({"epoch": 3, "model": state, "opt": {"lr": 0.1}}, tmp_path / "loop.pth")
    torch.save({"state_dict": {f"module.net.student.{k}": v for k, v in state.items()}}, tmp_path / "both.ckpt")
    torch.save({"state_dict": trained.state_dict(), "epoch": 1}, tmp_path / "lightning.ckpt")
    loop = {"model": state, "accuracy": torch.tensor(79.4), "optimizer": {"state": {}}, "epoch": 240}
    torch.save(loop, tmp_path / "table.pth")  # as the field's tables were made
    torch.save({**loop, "opt": argparse.Namespace(lr=0.1)}, tmp_path / "table_last.pth")
    from safetensors.torch import save_file

    save_file(state, tmp_path / "plain.safetensors")
    return state


def test_teacher_weights_from_every_kind_of_file(tmp_path):
    state = saved_teachers(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        model = DualHeadKD(Net(), Net(norm=True), teacher_checkpoint=str(file))
        for name, tensor in model.teacher.model.state_dict().items():
            assert torch.equal(tensor, state[name]), (file, name)


def test_teacher_from_a_checkpoint_of_the_trainer(tmp_path):
    """The whole way: `ce` trains it, Lightning saves it, `dual_head` loads it."""
    trained = DualHeadKD(Net(norm=True), method="ce", num_classes=CLASSES)
    data = [{**row, "pixel_values": row["pixel_values"].float()} for row in rows()]
    fit(trained, data, precision="32-true", max_steps=2).save_checkpoint(tmp_path / "last.ckpt")
    model = DualHeadKD(Net(), Net(norm=True), teacher_checkpoint=str(tmp_path / "last.ckpt"))
    for a, b in zip(model.teacher.model.parameters(), trained.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_teacher_file_of_another_architecture_is_named(tmp_path):
    def error(model, state):
        torch.save(state, tmp_path / "teacher.pt")
        with pytest.raises(ValueError, match="another architecture or number of classes") as caught:
            load_weights(model, tmp_path / "teacher.pt")
        return str(caught.value)

    resnet = load_classifier("resnet20", 10)
    assert "more, such as `layer1.3" in error(resnet, load_classifier("resnet32", 10).state_dict())
    assert "`fc.weight` is (100, 64) there and (10, 64) here" in error(
        resnet, load_classifier("resnet20", 100).state_dict()
    )
    assert "missing" in error(resnet, load_classifier("resnet8", 10).state_dict())
    assert "`block0.0.weight` (64, 3, 3, 3)" in error(resnet, load_classifier("vgg8", 10).state_dict())


def test_files_that_are_no_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.pt' is not there"):
        load_weights(Net(), "nowhere.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "nothing.pt").write_bytes(b"")
    for name in ("text.pt", "nothing.pt"):
        with pytest.raises(ValueError, match=f"{name}' to (be a file of|hold tensors)"):
            load_weights(Net(), tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="to hold a state dict"):
        load_weights(Net(), tmp_path / "empty.pt")
    torch.save(Net(), tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="would run code of its author"):
        load_weights(Net(), tmp_path / "pickled.pt")


# --- bad input ---


def test_bad_arguments_say_what_to_pass():
    with pytest.raises(ValueError, match=r"same classes, but Net has 3 and Net has 4"):
        DualHeadKD(Net(), Net(classes=4))
    with pytest.raises(ValueError, match="a `teacher` for method='kd', but got None, which serves evaluation only"):
        fit(DualHeadKD(Net(), method="kd"), rows())
    with pytest.raises(ValueError, match=r"`kd_loss` to be one of .*, but got 'kld'"):
        DualHeadKD(Net(), Net(), kd_loss="kld")
    with pytest.raises(ValueError, match="`kd_factor` to be non-negative, but got -1"):
        DualHeadKD(Net(), Net(), kd_factor=-1.0)
    with pytest.raises(ValueError, match="`lr_interval` to be 'epoch' or 'step', but got 'batch'"):
        DualHeadKD(Net(), Net(), lr_interval="batch")
    with pytest.raises(ValueError, match="'single_head' or 'dual_head', but got 'dual'"):
        DualHeadKD(Net(), Net(), method="dual")
    with pytest.raises(ValueError, match="'backbone' or 'all', but got 'heads'"):
        DualHeadKD(Net(), Net(), grad_align="heads")
    with pytest.raises(ValueError, match="`temperature` to be positive, but got 0"):
        DualHeadKD(Net(), Net(), temperature=0)
    with pytest.raises(ValueError, match="Pass a copy"):
        DualHeadKD(same := Net(), same)
    with pytest.raises(ValueError, match="would have random weights"):
        DualHeadKD(Net(), "resnet8", num_classes=3)
    with pytest.raises(ValueError, match="`num_classes` for the new model 'resnet8', but got None"):
        DualHeadKD("resnet8", method="ce")
    with pytest.raises(ValueError, match="'linear' or 'nonlinear', but got 'mlp'"):
        DualHeadKD(Net(), Net(), aux_head="mlp")


def test_a_label_out_of_range_is_named():
    data = rows()
    data[5]["labels"] = torch.tensor(3)
    with pytest.raises(ValueError, match=r"in \[0, 3\) or -100 \(ignored\), but got 3"):
        fit(make(), data)


def test_a_teacher_whose_classes_show_only_in_the_first_batch():
    teacher = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 4, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"one shape, but got \(12, 3\) and \(12, 4\)"):
        fit(DualHeadKD(Net(), teacher), rows())


def test_finding_the_classifier():
    two = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"several: `0` \(3\), `1` \(3\). Pass the dotted name"):
        find_classifier(two)
    assert find_classifier(two, "1") == "1"
    with pytest.raises(ValueError, match=r"such as `0` \(3\), `1` \(3\), but got 'fc'"):
        find_classifier(two, "fc")
    with pytest.raises(ValueError, match="Sequential has none"):
        find_classifier(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match=r"Expected one nn.Linear of 7 outputs in Net, but found none; it has"):
        find_classifier(Net(), num_classes=7)
    unused = Net()
    unused.spare = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="its forward does not call it"):
        DualHeadKD(unused, Net(), classifier="spare").double().losses(batch_of(rows()))
    with pytest.raises(ValueError, match=r"to give the logits \(12, 3\) of Net, but it gives \(12, 8\)"):
        DualHeadKD(Net(), Net(classes=8), classifier="body.0").double().losses(batch_of(rows()))


# --- export ---


def test_exported_student_predicts_the_same_without_the_library(tmp_path):
    """A process that cannot import lit_logits loads the class from its file and the weights into it."""
    source = Path(__file__).read_text()
    definition = source[source.index("class Net") : source.index("def rows")]
    (tmp_path / "net.py").write_text(f"from torch import nn\n\nCLASSES = 3\n\n\n{definition}")
    model = make(norm=True)
    fit(model, rows(), max_steps=3)
    model.eval().float()
    model.export(tmp_path / "student.pt")
    x = torch.randn(5, 6)
    torch.save({"x": x, "logits": model(x).detach()}, tmp_path / "expected.pt")
    program = (
        "import sys; sys.modules['lit_logits'] = None\n"
        "import torch; from net import Net\n"
        "net = Net(norm=True); net.load_state_dict(torch.load('student.pt', weights_only=True)); net.eval()\n"
        "expected = torch.load('expected.pt', weights_only=True)\n"
        "assert torch.equal(net(expected['x']), expected['logits'])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_student_keeps_no_trace_of_the_method():
    model = make()
    fit(model, rows())
    assert list(model.student.state_dict()) == list(Net().state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.student.modules())


# --- two processes ---

TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_dual_head_training import fit, make, rows


class TakeTurns(torch.utils.data.Sampler):  # Lightning's own would shuffle
    def __len__(self):
        return 12

    def __iter__(self):
        return iter(range(torch.distributed.get_rank(), 24, 2))


if __name__ == "__main__":
    model = make(grad_align={mode!r}).double()
    trainer = fit(model, rows(24), batch_size=6 // {accumulate}, accumulate_grad_batches={accumulate},
                  max_steps=2, devices=2, strategy="ddp_fork", gradient_clip_val=0.5,
                  sampler=TakeTurns(), use_distributed_sampler=False)
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
