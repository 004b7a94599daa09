"""From a run of `DualHeadKD` to its student in a folder, and back."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tiny_classifiers import Net, rows
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

from lit_logits.callbacks import SavePretrained
from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.modules.dual_head_kd.classifiers import load_classifier

NAMES = ["cat", "dog", "häuser"]
RESNET = {"model_type": "resnet", "layer_type": "basic", "depths": [1], "hidden_sizes": [4], "embedding_size": 4}


class Named(L.LightningDataModule):
    """Three classes with names, as the data modules of images have."""

    class_names = NAMES

    def __init__(self, vectors=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(6, 3, 32, 32, generator=generator)
        self.rows = [(image, torch.tensor(at % 3)) for at, image in enumerate(images)]
        if vectors:
            self.rows = [(row["pixel_values"].float(), row["labels"]) for row in rows()]

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=3)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=3)


def saved(student, folder, data=None, **kwargs):
    torch.manual_seed(0)
    model = DualHeadKD(student, method="ce", num_classes=3, **kwargs)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = SavePretrained(str(folder), monitor="val/acc", mode="max")
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet)
    trainer.fit(model, datamodule=data or Named())
    return model.eval()


def test_a_student_of_the_zoo_is_saved_and_taken_again(tmp_path):
    """Only students of transformers were saved: the digits' recipe left nothing but checkpoints of the whole module."""
    model = saved("resnet8", tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["id2label"] == dict(zip("012", NAMES, strict=True))
    assert (config["model"], config["num_classes"]) == ("resnet8", 3)
    assert config["measured"].keys() >= {"val/acc", "val/loss"}
    again = load_classifier(str(tmp_path / "first"), 3).eval()
    images = torch.stack([image for image, _ in Named().rows])
    torch.testing.assert_close(again(images), model(images))
    taught = DualHeadKD("resnet8", str(tmp_path / "first"), num_classes=3)
    torch.testing.assert_close(taught.teacher({"x": images}), model(images))
    saved(str(tmp_path / "first"), tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["model"] == "resnet8"
    with pytest.raises(ValueError, match=r"with 4 classes, but .*first holds 'resnet8' with 3"):
        load_classifier(str(tmp_path / "first"), 4)


def test_a_student_of_ones_own_is_saved_for_its_class(tmp_path):
    model = saved(Net(), tmp_path / "own", Named(vectors=True))
    again = Net()
    again.load_state_dict(torch.load(tmp_path / "own" / "student.pt", weights_only=True))
    torch.testing.assert_close(again(torch.ones(1, 6)), model(torch.ones(1, 6)))
    with pytest.raises(ValueError, match=r"holds 'Net' with 3. Make a model of another class yourself"):
        load_classifier(str(tmp_path / "own"))


def test_weights_are_saved_in_the_dtype_that_is_asked_for(tmp_path):
    model = DualHeadKD(Net(norm=True), method="ce")
    model.write_folder(tmp_path / "half", class_names=["too", "few"], dtype=torch.bfloat16)
    state = torch.load(tmp_path / "half" / "student.pt", weights_only=True)
    assert state["fc.weight"].dtype == torch.bfloat16
    assert state["body.1.num_batches_tracked"].dtype == torch.int64
    assert model.student.fc.weight.dtype == torch.float32
    assert "id2label" not in json.loads((tmp_path / "half" / "config.json").read_text())


def test_a_student_of_transformers_names_the_classes_of_the_data(tmp_path):
    saved(RESNET, tmp_path / "student")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "student").config
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: at for at, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    "name",
    ["dual_head_kd", "dual_head_kd_teacher", "dual_head_kd_cifar100", "dual_head_kd_text", "dual_head_kd_text_teacher"],
)
def test_recipes_keep_the_best_beside_the_last(name):
    """README says so of every run folder; the first three wrote last.ckpt alone."""
    recipe = yaml.safe_load(Path(__file__).parents[1].joinpath("configs", f"{name}.yaml").read_text())
    kept = [part["init_args"] for part in recipe["trainer"]["callbacks"] if part["class_path"] == "ModelCheckpoint"]
    assert [(part["filename"], part["monitor"], part["mode"]) for part in kept] == [("best", "val/acc", "max")]
