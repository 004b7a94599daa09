"""`NeuralCollapseMonitor` in the real Trainer, against NumPy over the whole validation set and real event files."""

import io
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from scripts import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_neural_collapse import oracle
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lit_logits.callbacks import NeuralCollapseMonitor, neural_collapse_monitor
from lit_logits.callbacks.pictures.collapse import cosine_figure
from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.functional import cosine_matrix
from lit_logits.functional.dual_head_kd import logit_loss
from lit_logits.modules import DualHeadClassifier, load_classifier

C = 4
NAMES = ["nc1", "nc2_norm_means", "nc2_norm_rows", "nc2_angle_means", "nc2", "nc3"]  # in the order of the oracle


class Net(nn.Module):
    """A classifier with a layer that its forward leaves out, as some have."""

    def __init__(self, width=7):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.Tanh())
        self.spare = nn.Linear(3, 2)
        self.fc = nn.Linear(width, C)

    def forward(self, x):
        return self.fc(self.body(x))


class Counted(torch.autograd.Function):
    """The identity, which counts how often a gradient passes."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.passes += 1
        return grad


def rows(count=24, seed=0, ignored=False):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (count,), generator=generator)
    if ignored:
        labels[::5] = -100
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def batch_of(data):
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def make(student=None, seed=0, optimizer=None, **kwargs):
    torch.manual_seed(seed)
    student, teacher = student or Net(), Net(width=9)
    with torch.no_grad():
        teacher.fc.weight.mul_(6)
    sgd = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9))
    return DualHeadKD(student, teacher, num_classes=C, optimizer=sgd, **{"method": "dual_head", **kwargs})


def trainer_of(*callbacks, **kwargs):
    defaults = {"max_epochs": 1, "precision": "64-true", "accelerator": "cpu", "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{**defaults, **quiet, "num_sanity_val_steps": 0, **kwargs}, callbacks=list(callbacks))


def fit(model, *callbacks, data=None, val=None, batch_size=6, **kwargs):
    trainer = trainer_of(*callbacks, **kwargs)
    val = None if val is None else DataLoader(val, batch_size=5)
    trainer.fit(model, DataLoader(data or rows(), batch_size=batch_size), val)
    return trainer


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def logger_of(tmp_path):
    return TensorBoardLogger(tmp_path, name="run", version="")


def expected_figures(model, data):
    """All samples in one go; the aux head's rows pair by pair."""
    batch = batch_of(data)
    known = batch["labels"] != -100
    features, labels = model.student.body(batch["pixel_values"][known]).detach(), batch["labels"][known]
    values = dict(zip(NAMES, oracle(features, labels, model.student.fc.weight.detach()), strict=True))
    values = {f"nc/{name}": float(value) for name, value in values.items()}
    if model.net.aux_head is not None:
        w = model.net.aux_head.classifier.weight.detach().numpy()
        gaps = []
        for i in range(C):
            gaps += [
                abs(w[i] @ w[j] / (np.linalg.norm(w[i]) * np.linalg.norm(w[j])) + 1 / 3) for j in range(C) if i != j
            ]
        lengths = [np.sqrt(sum(x * x)) for x in w]
        values |= {"nc_aux/nc2": np.mean(gaps), "nc_aux/nc2_norm_rows": np.std(lengths) / np.mean(lengths)}
    return values


class Watch(L.Callback):
    """What each validation should log; and, at every hook, whether something hangs on the model."""

    def __init__(self, data):
        self.data, self.expected, self.hooked = data, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.hooked.append(("train", len(pl_module.net._forward_hooks)))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.hooked.append(("sanity" if trainer.sanity_checking else "val", len(pl_module.net._forward_hooks)))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.expected.append(expected_figures(pl_module, self.data))


# ---------------------------------------------------------------------- scalars


@pytest.mark.parametrize("aux_head", ["linear", "nonlinear"])
def test_scalars_are_the_definitions_over_the_whole_validation_set(tmp_path, aux_head):
    """23 samples in batches of 5, a fifth of them without a label; each validation stands where `val/loss` does."""
    data = rows(23, seed=1, ignored=True)
    watch = Watch(data)
    model = make(aux_head=aux_head)
    settings = {"max_epochs": 3, "logger": logger_of(tmp_path), "num_sanity_val_steps": 2}
    trainer = fit(model, NeuralCollapseMonitor(), watch, val=data, **settings)
    events = read(tmp_path / "run")
    assert len(watch.expected) == 3
    for name in watch.expected[0]:
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [event.step for event in events.Scalars("val/loss")]
        np.testing.assert_allclose(
            [event.value for event in logged], [values[name] for values in watch.expected], rtol=1e-5, err_msg=name
        )
        assert float(trainer.callback_metrics[name]) == pytest.approx(watch.expected[-1][name], rel=1e-5)
    assert watch.expected[0]["nc/nc2"] != pytest.approx(watch.expected[-1]["nc/nc2"], rel=1e-3)
    assert set(watch.hooked) == {("sanity", 0), ("train", 0), ("val", 1)}
    assert not model.net._forward_hooks


def test_several_data_loaders_count_as_one_set():
    data = rows(23, seed=1)
    trainer = trainer_of(NeuralCollapseMonitor())
    model = make()

    def validation_step(batch, batch_idx, dataloader_idx=0):
        return DualHeadKD.validation_step(model, batch, batch_idx)

    model.validation_step = validation_step
    trainer.validate(model, [DataLoader(data[:9], batch_size=5), DataLoader(data[9:], batch_size=5)], verbose=False)
    for name, value in expected_figures(model.double(), data).items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-5), name


def test_validate_and_test_log_without_fit(tmp_path):
    """Figures of the test set have names of their own: both may lie at one step of one run."""
    data, model = rows(23, seed=1), make()
    trainer = trainer_of(NeuralCollapseMonitor(), logger=logger_of(tmp_path))
    (validated,) = trainer.validate(model, DataLoader(data, batch_size=5), verbose=False)
    (tested,) = trainer.test(model, DataLoader(data[:17], batch_size=5), verbose=False)
    for name, value in expected_figures(model.double(), data).items():
        assert validated[name] == pytest.approx(value, rel=1e-5), name
    for name, value in expected_figures(model, data[:17]).items():
        assert tested[name] == pytest.approx(value, rel=1e-5)
    assert not any(name.startswith("test/nc") for name in tested)
    assert {"nc/cosines", "nc_aux/cosines"} == set(read(tmp_path / "run").Tags()["images"])
    assert not model.net._forward_hooks


def test_a_checkpoint_is_chosen_by_it(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="nc/nc2", filename="{epoch}")
    watch = Watch(rows(23, seed=1))
    fit(make(), NeuralCollapseMonitor(), watch, best, val=watch.data, max_epochs=4, enable_checkpointing=True)
    values = [values["nc/nc2"] for values in watch.expected]
    assert Path(best.best_model_path).name == f"epoch={np.argmin(values)}.ckpt"


def test_the_model_runs_once_a_batch():
    calls = {}
    for monitored in (False, True):
        model = make()
        seen = calls.setdefault(monitored, [])
        model.student.body.register_forward_hook(lambda module, *_, seen=seen: seen.append(module.training))
        fit(model, *[NeuralCollapseMonitor()] * monitored, val=rows(23), max_epochs=2)
    assert calls[True] == calls[False] == 2 * ([True] * 4 + [False] * 5)


class Own(L.LightningModule):
    """Another LightningModule with the classifier inside it: the monitor goes by the type of the part."""

    def __init__(self, student):
        super().__init__()
        self.parts = nn.ModuleList([DualHeadClassifier(student, num_classes=C)])

    def validation_step(self, batch, batch_idx):
        images = batch["pixel_values"] if isinstance(batch, dict) else batch[0]
        self.parts[0]({"pixel_values": images.repeat(2, 1)})  # something else before what counts
        self.parts[0]({"pixel_values": images})

    def test_step(self, batch, batch_idx):
        self.parts[0].student(batch["pixel_values"])


def validate(model, data, *, test=False, **kwargs):
    trainer = trainer_of(NeuralCollapseMonitor(), **kwargs)
    run = trainer.test if test else trainer.validate
    run(model, data if isinstance(data, DataLoader) else DataLoader(data, batch_size=5), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_classifier_is_found_by_type():
    model, data = Own(Net()).double(), rows(23)
    values = validate(model, data)
    batch = batch_of(data)
    features = model.parts[0].student.body(batch["pixel_values"]).detach()
    wanted = oracle(features, batch["labels"], model.parts[0].student.fc.weight.detach())
    np.testing.assert_allclose([values[f"nc/{name}"] for name in NAMES], wanted, rtol=1e-5)
    assert set(values) == {f"nc/{name}" for name in NAMES}


def test_what_it_cannot_read_is_named(tmp_path):
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in rows()]
    with pytest.warns(UserWarning, match=r"at least two classes, but met 0\. It reads batches with `labels`"):
        values = validate(Own(Net()), unlabelled, logger=logger_of(tmp_path))
    assert np.isnan(values["nc/nc2"])
    assert read(tmp_path / "run").Tags()["images"] == []
    with pytest.warns(UserWarning, match="but met 0"):
        validate(Own(Net()), rows(), test=True)  # goes past the classifier
    one_class = [{**row, "labels": torch.tensor(2)} for row in rows()]
    with pytest.warns(UserWarning, match="but met 1"):
        assert np.isnan(validate(make(), one_class)["nc/nc1"])


def test_a_class_that_never_occurs_is_left_out(tmp_path, monkeypatch):
    """Of the figures and of the picture: both show the same rows."""
    drawn = []
    monkeypatch.setattr(
        neural_collapse_monitor, "cosine_figure", lambda *args: drawn.append(args) or cosine_figure(*args)
    )
    data, model = [row for row in rows(40) if row["labels"] != 1], make()
    values = validate(model, data, logger=logger_of(tmp_path))
    cosines, epoch, names = drawn[0]
    assert names == ["0", "2", "3"]
    assert epoch == 0
    weight = model.student.fc.weight.detach().double()[[0, 2, 3]]
    torch.testing.assert_close(cosines, cosine_matrix(weight))
    off = ~torch.eye(3, dtype=torch.bool)
    assert values["nc/nc2"] == pytest.approx((cosines[off] + 0.5).abs().mean().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*converting a masked element.*")
def test_a_diverged_model_gives_nan_and_goes_on(tmp_path):
    """The SVD behind the figures raises for what is not finite: training would end in the monitor."""
    model = make()
    with torch.no_grad():
        model.student.body[0].weight.fill_(torch.nan)
        model.student.fc.weight.fill_(torch.nan)
    values = validate(model, rows(23), logger=logger_of(tmp_path))
    assert all(np.isnan(values[f"nc/{name}"]) for name in NAMES)


def test_without_its_part_it_warns_and_does_nothing():
    class Bare(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().double()

        def training_step(self, batch, batch_idx):
            return self.net(batch["pixel_values"]).sum()

        def validation_step(self, batch, batch_idx):
            self.net(batch["pixel_values"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="found no DualHeadClassifier"):
        trainer = fit(Bare(), NeuralCollapseMonitor(2), val=rows())
    assert trainer.callback_metrics == {}


def test_a_language_model_has_no_classes_to_collapse():
    settings = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 11}
    model = load_classifier({**settings, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2})
    ids = torch.randint(11, (6, 4))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    with pytest.warns(UserWarning, match="are its vocabulary"):
        values = validate(DualHeadKD(model, method="ce"), data)
    assert set(values) == {"val/loss", "val/acc", "val/ppl"}


# ---------------------------------------------------------------------- hooks


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["validation_step", "training_step"])
def test_nothing_is_left_behind_by_an_exception(where, error):
    model, monitor, data = make(), NeuralCollapseMonitor(1), rows(23)
    step, seen = getattr(model, where), []

    def fail(batch, batch_idx):
        seen.append((len(model.net._forward_hooks), model.aligner.measuring))
        if batch_idx == 2:
            raise error
        return step(batch, batch_idx)

    setattr(model, where, fail)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(model, monitor, val=data)
    assert seen[-1] == ((1, False) if where == "validation_step" else (0, True))
    assert not model.net._forward_hooks
    assert model.aligner.measuring is False
    setattr(model, where, step)
    trainer = trainer_of(monitor)
    trainer.validate(model, DataLoader(data, batch_size=5), verbose=False)  # and what was summed up is forgotten
    for name, value in expected_figures(model.double(), data).items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-5), name


# ---------------------------------------------------------------------- the picture


def test_the_picture_in_the_event_file(tmp_path):
    fit(make(), NeuralCollapseMonitor(), val=rows(23), max_epochs=2, logger=logger_of(tmp_path))
    images = read(tmp_path / "run").Images("nc/cosines")
    assert [image.step for image in images] == [4, 8]
    picture = Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB")
    assert picture.size == (images[-1].width, images[-1].height)
    assert 600 <= picture.width <= 2000
    assert 300 <= picture.height <= 1000
    pixels = np.asarray(picture).reshape(-1, 3).astype(int)
    red = (pixels[:, 0] - pixels[:, 2] > 60).mean()
    blue = (pixels[:, 2] - pixels[:, 0] > 60).mean()
    assert red > 0.03  # the diagonal
    assert blue > 0.01
    assert images[0].encoded_image_string != images[1].encoded_image_string


def test_the_figure_shows_the_cosines_it_was_given():
    cosines = torch.tensor([[1.0, -0.2, 0.7], [-0.2, 1.0, 0.1], [0.7, 0.1, 1.0]])
    figure = cosine_figure(cosines, 7, ["cat", "dog", "a name that is much too long for the axis"])
    heat, counts = figure.axes[:2]
    np.testing.assert_allclose(heat.images[0].get_array(), cosines)
    assert heat.images[0].get_clim() == (-1, 1)
    assert "epoch 7: nc2 = 0.700" in heat.get_title()  # (0.3 + 1.2 + 0.6) / 3
    assert [tick.get_text() for tick in heat.get_yticklabels()] == ["cat", "dog", "a name that is much "]
    edges = [bar.get_x() for bar in counts.patches if bar.get_height()]  # type: ignore[attr-defined]
    assert len(edges) == 3  # each pair once, without the diagonal
    assert all(min(abs(edge - value) for edge in edges) < 0.026 for value in (-0.2, 0.1, 0.7))
    assert [line.get_xdata()[0] for line in counts.lines] == pytest.approx([-0.5, 0.2])


@pytest.mark.parametrize("num_classes", [2, 30, 31])
def test_names_are_shown_while_there_is_room(num_classes):
    names = [f"class {i}" for i in range(num_classes)]
    figure = cosine_figure(torch.eye(num_classes), 0, names)
    figure.canvas.draw()
    shown = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert (shown == names) == (num_classes <= 30)


def test_names_come_from_the_datamodule(tmp_path, monkeypatch):
    class Data(L.LightningDataModule):
        class_names = ("ant", "bee", "cow", "dog")

        def val_dataloader(self):
            return DataLoader(rows(23), batch_size=5)

    drawn = []
    monkeypatch.setattr(
        neural_collapse_monitor, "cosine_figure", lambda *args: drawn.append(args[2]) or cosine_figure(*args)
    )
    trainer_of(NeuralCollapseMonitor(), logger=logger_of(tmp_path)).validate(make(), datamodule=Data(), verbose=False)
    assert drawn == [["ant", "bee", "cow", "dog"]] * 2  # of both heads


def test_only_rank_zero_draws(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(neural_collapse_monitor, "cosine_figure", lambda *args: drawn.append(args))
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    assert np.isfinite(validate(make(), rows(23), logger=logger_of(tmp_path))["nc/nc2"])
    assert drawn == []


# ---------------------------------------------------------------------- the angle of the gradients


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)


def trained(*callbacks, accumulate=1, **kwargs):
    model = make(**kwargs)
    model.student.body.register_forward_hook(lambda _, args, output: Counted.apply(output))
    Counted.passes = 0
    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1}
    trainer = fit(model, *callbacks, data=rows(36), batch_size=6 // accumulate, **settings)
    return model, trainer, Counted.passes


@pytest.mark.parametrize("optimizer", [None, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_measuring_changes_no_weight_and_costs_one_pass_a_measured_batch(accumulate, optimizer):
    """AdamW would decay the spare layer, which no loss reaches, if it got zeros for a gradient."""
    plain, trainer, passes = trained(accumulate=accumulate, optimizer=optimizer)
    assert trainer.global_step == 12
    assert passes == 12 * accumulate
    assert "kd/grad_cosine" not in trainer.callback_metrics
    model, trainer, passes = trained(NeuralCollapseMonitor(4), accumulate=accumulate, optimizer=optimizer)
    assert passes == (12 + 4) * accumulate  # steps 1, 4, 8 and 12
    assert {"kd/grad_cosine", "kd/conflict"} <= set(trainer.callback_metrics)
    assert model.aligner.measuring is False
    for (name, a), b in zip(model.net.named_parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_the_measured_angle_is_that_of_the_two_gradients():
    """Of the whole step, although it comes in two micro-batches."""
    model, data = make(ce_weight=0.7, kd_factor=1.3).double(), rows(12)
    x, y = batch_of(data).values()
    features = model.student.body(x)
    ce = F.cross_entropy(model.student.fc(features), y)
    kd = logit_loss(
        model.net.aux_head(features), model.teacher.model(x), kind=model.kd_loss, temperature=model.temperature
    )
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.student.body.parameters(), retain_graph=True)])
        for loss in (ce, kd)
    ]
    cosine = float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm()))
    settings = {"batch_size": 6, "accumulate_grad_batches": 2}
    metrics = fit(model, NeuralCollapseMonitor(5), data=data, **settings).callback_metrics
    assert float(metrics["kd/grad_cosine"]) == pytest.approx(cosine, rel=1e-9)
    assert float(metrics["kd/conflict"]) == float(cosine < 0)


def test_only_the_steps_that_are_due_are_measured(tmp_path):
    """By the optimizer step, which a resumed run counts on."""
    due = []

    class Look(L.Callback):
        def on_before_backward(self, trainer, pl_module, *_):
            due.append((trainer.global_step + 1, pl_module.aligner.measuring))

    def run(epochs, **kwargs):
        due.clear()
        trainer = trainer_of(NeuralCollapseMonitor(3), Look(), max_epochs=epochs, accumulate_grad_batches=2)
        trainer.fit(make(), DataLoader(rows(30), batch_size=6), **kwargs)  # the fifth batch steps alone
        return trainer, sorted({step for step, measured in due if measured}), list(due)

    trainer, measured, every = run(2)
    assert measured == [1, 3, 6]
    assert every == [(step, step in (1, 3, 6)) for step in (1, 1, 2, 2, 3, 4, 4, 5, 5, 6)]
    trainer, measured, _ = run(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert measured == [1, 3]
    assert run(2, ckpt_path=tmp_path / "half.ckpt")[1] == [6]


@pytest.mark.parametrize("ending", ["error", "stop"])
def test_half_a_measured_step_does_not_reach_into_the_next_training(ending):
    """What was collected before the end used to take the place of the first gradient of the next `fit`."""

    class End(L.Callback):
        def on_train_batch_end(self, trainer, *_):  # the first micro-batch of two
            if ending == "error":
                raise RuntimeError
            trainer.should_stop = True

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.5)

    model, fresh = make(optimizer=sgd), make(optimizer=sgd)
    try:
        fit(model, NeuralCollapseMonitor(1), End(), data=rows(24), accumulate_grad_batches=2)
    except RuntimeError:
        assert ending == "error"
    for one in (model, fresh):
        fit(one, data=rows(12, seed=3), batch_size=12)
    for a, b in zip(model.net.parameters(), fresh.net.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["backbone", "all"])
def test_an_aligned_training_is_left_alone(mode):
    plain, _, passes = trained(grad_align=mode)
    model, _, monitored = trained(NeuralCollapseMonitor(2), grad_align=mode)
    assert passes == monitored
    for a, b in zip(model.net.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_student_without_a_backbone_has_no_angle():
    """Stacking no inner products at all used to end the training."""
    metrics = fit(make(student=nn.Linear(5, C)), NeuralCollapseMonitor(2)).callback_metrics
    assert (metrics["kd/grad_cosine"], metrics["kd/conflict"]) == (0, 0)


def test_cross_entropy_alone_has_nothing_to_measure():
    metrics = fit(make(method="ce"), NeuralCollapseMonitor(1), val=rows(23)).callback_metrics
    assert "nc/nc1" in metrics
    assert "kd/grad_cosine" not in metrics
    assert not any(name.startswith("nc_aux") for name in metrics)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="to be at least 1 or None, but got 0"):
        NeuralCollapseMonitor(0)


# ---------------------------------------------------------------------- two processes


class Shards(IterableDataset):
    """What each of two ranks gets, by a function of the whole: the second may get nothing. One process gets it all."""

    def __init__(self, data, first, second):
        self.data, self.shares = data, (first, second)

    def __iter__(self):
        if not torch.distributed.is_initialized():
            return iter(self.data)
        return iter(self.shares[torch.distributed.get_rank()](self.data))


class Save(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        metrics = {name: value.clone() for name, value in trainer.callback_metrics.items()}
        weights = {name: p.detach().clone() for name, p in pl_module.net.named_parameters()}
        torch.save((metrics, weights), Path(self.folder) / f"{trainer.world_size}-{trainer.global_rank}.pt")


def in_one_or_two_processes(folder, split, accumulate, devices=1, **kwargs):
    halves = [lambda data, i=i: [row for at in range(i, len(data), 12) for row in data[at : at + 6]] for i in (0, 6)]
    loader = DataLoader(Shards(rows(48), *halves), batch_size=12 // devices // accumulate)
    shares = (lambda data: data[:split], lambda data: data[split:])
    val = DataLoader(Shards(rows(23, seed=1, ignored=True), *shares), batch_size=5)
    settings = {"accumulate_grad_batches": accumulate, "devices": devices, "max_epochs": 2}
    model = make(optimizer=adamw)
    model.student.spare.requires_grad_(False)  # plain DDP refuses parameters that no loss reaches
    trainer_of(NeuralCollapseMonitor(3), Save(folder), **settings, **kwargs).fit(model, loader, val)


@pytest.mark.slow
@pytest.mark.parametrize(("split", "accumulate"), [(14, 1), (23, 2)], ids=["unequal", "one rank without batches"])
def test_two_processes_equal_one(tmp_path, split, accumulate):
    text = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\nfrom test_neural_collapse_monitor import in_one_or_two_processes\n\n"
        "if __name__ == '__main__':\n    torch.set_num_threads(1)\n"
        f"    in_one_or_two_processes({str(tmp_path)!r}, {split}, {accumulate}, devices=2, strategy='ddp_fork')\n"
    )
    run_script(tmp_path / "run.py", text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_one_or_two_processes(tmp_path, split, accumulate)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, weight in one[1].items():
        torch.testing.assert_close(first[1][name], weight, rtol=1e-9, atol=1e-11, msg=name)
    watched = [name for name in one[0] if name.startswith(("nc", "kd/"))]
    assert len(watched) == 10
    for name in watched:
        assert first[0][name] == second[0][name], name
        assert float(first[0][name]) == pytest.approx(float(one[0][name]), rel=1e-5), name


def test_a_static_graph_cannot_be_measured():
    """Its first step, measured without DDP's hooks, would part the ranks for good."""
    trainer = SimpleNamespace(strategy=SimpleNamespace(_ddp_kwargs={"static_graph": True}))
    with pytest.raises(ValueError, match="with the DDP option static_graph=True"):
        NeuralCollapseMonitor(measure_gradients_every_n_steps=5).setup(trainer, nn.Module(), "fit")
