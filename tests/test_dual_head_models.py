"""Students and teachers as people have them, and the teacher of a checkpoint."""

import json
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.trainer.connectors.logger_connector import result
from tiny_classifiers import CLASSES, Net, fit, make, rows
from torch import nn
from torch.utils.data import DataLoader

from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.modules.dual_head_kd.classifiers import load_classifier
from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher, load_teacher, load_weights

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 32}
PERCEIVER = {"num_latents": 4, "d_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 1, "image_size": 16}
PERCEIVER |= {"num_self_attention_heads": 1, "num_cross_attention_heads": 1}
LEVIT = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"model_type": "deit", **TINY}, 32),
        ({"model_type": "perceiver", **PERCEIVER}, 16),
        ({"model_type": "levit", **LEVIT, "image_size": 64}, 64),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_types_with_several_models_for_a_task_train(settings, size):
    """`TypeError: 'NoneType' object is not iterable`: transformers chooses among them by `architectures`."""
    model = DualHeadKD(settings, Stub(size), num_classes=CLASSES, classifier=None)
    terms = model.losses({"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 2])})
    assert terms.ce.isfinite()
    assert terms.kd.isfinite()


class Stub(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.fc = nn.Linear(3 * size * size, CLASSES)

    def forward(self, pixel_values):
        return self.fc(pixel_values.flatten(1))


def test_layers_without_a_size_are_named():
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))
    for student, teacher in ((lazy, Net()), (Net(), lazy)):
        with pytest.raises(ValueError, match=r"`1` \(LazyLinear\) of Sequential has none yet\. Call the model once"):
            DualHeadKD(student, teacher)
    lazy(torch.zeros(2, 6))
    assert DualHeadKD(lazy, Net()).net.num_features == 6


def test_a_compiled_student_is_refused_and_a_compiled_teacher_welcome(tmp_path):
    with pytest.raises(ValueError, match=r"but got Net inside `torch.compile`.*`model.net.compile\(\)`"):
        DualHeadKD(torch.compile(Net()), Net())
    torch.save(Net().state_dict(), tmp_path / "teacher.pt")
    teacher = torch.compile(Net(), backend="eager")
    model = DualHeadKD(Net(), teacher, teacher_checkpoint=tmp_path / "teacher.pt")
    expected = Net()
    load_weights(expected, tmp_path / "teacher.pt")
    x = torch.randn(2, 6)
    torch.testing.assert_close(model.teacher({"x": x}), expected(x))


def test_paths_are_as_good_as_strings(tmp_path):
    torch.save(load_classifier("resnet8", CLASSES).state_dict(), tmp_path / "teacher.pt")
    DualHeadKD("resnet8", num_classes=CLASSES, method="ce").write_folder(tmp_path / "student")
    by_path = DualHeadKD(
        tmp_path / "student", Path("resnet8"), teacher_checkpoint=tmp_path / "teacher.pt", num_classes=CLASSES
    )
    assert by_path.hparams["student"] == str(tmp_path / "student")
    assert by_path.hparams["teacher_checkpoint"] == str(tmp_path / "teacher.pt")
    by_name = load_classifier(str(tmp_path / "student"))
    assert torch.equal(by_path.student.fc.weight, by_name.fc.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype_teaches(dtype):
    """`RuntimeError: mat1 and mat2 must have the same dtype`."""
    torch.manual_seed(0)
    teacher, x = Net().to(dtype), torch.randn(4, 6)
    model = DualHeadKD(Net(), teacher)
    torch.testing.assert_close(model.teacher({"x": x}), teacher(x.to(dtype)))
    assert model.losses((x, torch.tensor([0, 1, 2, 0]))).kd.isfinite()


# --- checkpoints ---


def quiet_trainer(**kwargs):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", precision="64-true", logger=False, **quiet, **kwargs)


def resume(model, file):
    quiet_trainer(max_steps=2).fit(model, DataLoader(rows(), batch_size=12), ckpt_path=file)


def saved(model, tmp_path):
    trainer = fit(model, rows())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize(("kind", "other"), [("linear", "nonlinear"), ("nonlinear", "linear")])
def test_an_auxiliary_head_of_another_kind_is_named(tmp_path, kind, other):
    file = saved(make(aux_head=kind), tmp_path)
    with pytest.raises(ValueError, match=f"with aux_head={other!r}, but this one has {kind!r}"):
        DualHeadKD.load_from_checkpoint(file, student=Net(), teacher=None, aux_head=other)


def test_a_run_does_not_resume_with_another_teacher(tmp_path):
    """It went on, and the student learned from two teachers."""
    model = make()
    file = saved(model, tmp_path)
    resume(make(), file)
    other = make()
    with torch.no_grad():
        other.teacher.model.body[0].weight[0, 0] += 1e-3
    other.teacher = FrozenTeacher(other.teacher.model)
    with pytest.raises(ValueError, match=r"teacher of the checkpoint to resume, but Net has other weights \(digest"):
        resume(other, file)
    DualHeadKD.load_from_checkpoint(file, student=Net(), teacher=Net())  # a new run may have another
    older = torch.load(file, weights_only=True)
    del older["teacher_digest"]
    torch.save(older, tmp_path / "older.ckpt")
    resume(other, tmp_path / "older.ckpt")


def test_every_weight_counts_in_the_digest_and_a_compiled_teacher_is_the_same():
    teacher = nn.Linear(127, 1)
    digest = FrozenTeacher(teacher).digest
    assert FrozenTeacher(torch.compile(teacher)).digest == digest
    with torch.no_grad():
        teacher.weight[0, -1] += 1
    assert FrozenTeacher(teacher).digest != digest


def test_a_teacher_is_the_same_in_any_dtype_that_holds_it():
    teacher = Net().bfloat16()
    digest = FrozenTeacher(teacher).digest
    assert digest == FrozenTeacher(teacher.float()).digest == FrozenTeacher(teacher.double()).digest


def test_a_checkpoint_is_evaluated_where_its_teacher_is_not(tmp_path):
    torch.save(load_classifier("resnet8", CLASSES).state_dict(), tmp_path / "teacher.pt")
    teacher = {"teacher": "resnet8", "teacher_checkpoint": tmp_path / "teacher.pt", "num_classes": CLASSES}
    model = DualHeadKD("resnet8", **teacher)
    data = [{"pixel_values": torch.randn(3, 8, 8, dtype=torch.float64), "labels": torch.tensor(1)}] * 4
    fit(model, data).save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert DualHeadKD.load_from_checkpoint(tmp_path / "last.ckpt").teacher is not None
    (tmp_path / "teacher.pt").unlink()
    with pytest.warns(UserWarning, match=r"without its teacher, to be evaluated: Expected a file of weights"):
        alone = DualHeadKD.load_from_checkpoint(tmp_path / "last.ckpt")
    assert alone.teacher is None
    with pytest.raises(TypeError, match="of the class DualHeadKD, but got that of an instance"):
        alone.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(alone.student.fc.weight, model.student.fc.weight.to(alone.student.fc.weight))
    with pytest.raises(ValueError, match=r"but .* is not there"):
        DualHeadKD.load_from_checkpoint(tmp_path / "last.ckpt", teacher_checkpoint=str(tmp_path / "teacher.pt"))
    with pytest.raises(ValueError, match="without an auxiliary head for method='kd'"):
        DualHeadKD.load_from_checkpoint(tmp_path / "last.ckpt", method="kd")


# --- the order of the classes ---


class Data(L.LightningDataModule):
    def __init__(self, *names):
        super().__init__()
        self.class_names = names

    def train_dataloader(self):
        return DataLoader(rows(), batch_size=12)


class Named(Net):
    def __init__(self, *names):
        super().__init__()
        self.config = type("Config", (), {"id2label": dict(enumerate(names))})()


def trained(teacher, data):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(DualHeadKD(Net(), teacher), datamodule=data)
    return trainer.global_step


def test_a_teacher_with_its_classes_in_another_order_is_refused():
    """It taught wrong classes without a word."""
    with pytest.raises(ValueError, match="but 'cat' is its class 1 and class 0 of the data"):
        trained(Named("Dog", "Cat", "Emu"), Data("cat", "dog", "emu"))
    with pytest.raises(ValueError, match="but 'emu' is its class 0 and class 2 of the data"):
        trained(Named("emu", "horse", "cow"), Data("cat", "dog", "emu"))


@pytest.mark.parametrize(
    "names",
    [("Cat ", "dog", "emu"), ("cat", "hound", "bird"), ("LABEL_0", "LABEL_1", "LABEL_2"), ("dog", "crane", "crane")],
)
def test_names_that_agree_or_cannot_be_compared_are_accepted(names):
    assert trained(Named(*names), Data("cat", "dog" if "dog" not in names[:1] else "crane", "emu")) == 1
    assert trained(Net(), Data("cat", "dog", "emu")) == 1


def test_a_folder_of_the_zoo_tells_its_classes(tmp_path):
    DualHeadKD("resnet8", num_classes=3, method="ce").write_folder(tmp_path / "a", class_names=["x", "y", "z"])
    assert load_teacher(tmp_path / "a").class_names == ["x", "y", "z"]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["id2label"] == {"0": "x", "1": "y", "2": "z"}
    DualHeadKD("resnet8", num_classes=3, method="ce").write_folder(tmp_path / "b")
    assert load_teacher(tmp_path / "b").class_names is None


# --- several processes ---


class Plain(DualHeadKD):
    """Logs a mean as if it were of one process."""

    def on_validation_epoch_end(self):
        self.log("val/plain", torch.tensor(1.0))


def test_what_is_reduced_already_is_not_warned_of(monkeypatch):
    """On two processes Lightning recommended `sync_dist=True` for three values that were equal on both."""
    monkeypatch.setattr(result, "_distributed_is_initialized", lambda: True)
    monkeypatch.setattr(result, "warning_cache", type(result.warning_cache)())
    model, trainer = make().double(), quiet_trainer(use_distributed_sampler=False)
    monkeypatch.setattr(type(trainer._accelerator_connector), "is_distributed", property(lambda self: True))
    with pytest.warns(UserWarning, match="sync_dist"):  # so that the test can fail
        trainer.validate(Plain(Net(), Net()).double(), DataLoader(rows(), batch_size=4), verbose=False)
    monkeypatch.setattr(result, "warning_cache", type(result.warning_cache)())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(model, DataLoader(rows(), batch_size=4), verbose=False)
    assert [str(w.message) for w in caught if "sync_dist" in str(w.message)] == []
    assert set(trainer.callback_metrics) >= {"val/loss", "val/acc", "val/aux_acc"}


# --- recipes ---


@pytest.mark.parametrize("name", [path.name for path in sorted(CONFIGS.glob("dual_head_kd*.yaml"))])
def test_recipes_keep_the_best_checkpoint_beside_the_last(name):
    """README says so; those of digits and CIFAR kept the last alone."""
    recipe = yaml.safe_load((CONFIGS / name).read_text())
    kept = [part["init_args"] for part in recipe["trainer"]["callbacks"] if part["class_path"] == "ModelCheckpoint"]
    assert [options["filename"] for options in kept] == ["best"]
    assert kept[0]["monitor"] in ("val/acc", "val/loss")
