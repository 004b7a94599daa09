"""`DualHeadKD` under the real Trainer: schedules, losses, teachers, students, bad input, export."""

import argparse
import copy
import inspect
import subprocess
import sys

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from tiny_classifiers import CLASSES, Net, batch_of, check, fit, make, rows
from torch import nn
from torch.utils.data import DataLoader

from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.modules.dual_head_kd.classifiers import find_classifier, load_classifier
from lit_logits.modules.dual_head_kd.teacher import load_weights


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
    (tmp_path / "net.py").write_text(f"from torch import nn\n\nCLASSES = {CLASSES}\n\n\n{inspect.getsource(Net)}")
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
