"""Pictures and texts arrive at the loggers that take them, and the others break nothing."""

import csv
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_logits import DualHeadKD, VQLogitsLM
from lit_logits.callbacks import CodebookMonitor, ConfusionMatrixLogger, NeuralCollapseMonitor
from lit_logits.callbacks.loggers import picture_writers
from lit_logits.modules import VQLogitsHead


def test_tensorboard_beside_csv(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    writers = picture_writers(SimpleNamespace(loggers=loggers))
    assert len(writers) == 1
    writers[0].add_figure("a/picture", Figure(), 3)
    writers[0].flush()
    read = EventAccumulator(loggers[1].log_dir).Reload()
    assert [event.step for event in read.Images("a/picture")] == [3]


def test_a_logger_without_pictures_is_named_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lit_logits.callbacks.loggers.rank_zero_info", said.append)
    trainer = SimpleNamespace(loggers=[CSVLogger(tmp_path)])
    assert picture_writers(trainer) == picture_writers(trainer) == []
    assert len(said) == 1
    assert "CSVLogger" in said[0]
    assert picture_writers(SimpleNamespace(loggers=[])) == []  # logger=False


def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("tiny", tracking_uri=tmp_path.as_uri())
    (writer,) = picture_writers(SimpleNamespace(loggers=[logger]))
    writer.add_figure("a/picture", Figure(), 3)
    writer.add_text("a/text", "words", 3)
    assert len(list(tmp_path.rglob("a/picture/3.png"))) == 1
    assert [path.read_text() for path in tmp_path.rglob("a/text/3.md")] == ["words"]


# ---------------------------------------------------------------------- real runs

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2}
PICTURES = {"vq/tokens", "vq/usage", "nc/cosines", "nc_aux/cosines", "val/confusion"}
SCALARS = {"train/loss", "val/loss", "vq/used_codes", "nc/nc1", "nc_aux/nc2"}


class Words(L.LightningDataModule):
    """Ids that are texts of their own number."""

    class tokenizer:
        convert_ids_to_tokens = staticmethod(lambda ids: [f"w{number}" for number in ids])
        decode = staticmethod(lambda ids, **_: " ".join(f"w{int(number)}" for number in ids))

    def train_dataloader(self):
        rows = torch.randint(30, (16, 12), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4)

    val_dataloader = train_dataloader


def run_both(tmp_path, **options):
    """A language model and a classifier, with the callbacks that draw."""
    options = {"default_root_dir": tmp_path, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1} | options
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    model = VQLogitsLM(LLAMA, 30, head=partial(VQLogitsHead, codebook_size=6, init="random"))
    L.Trainer(max_epochs=2, callbacks=[CodebookMonitor(every_n_steps=1)], **options).fit(model, Words())
    torch.manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(number % 3)} for number in range(12)]
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    student = DualHeadKD("resnet8", teacher, num_classes=3)
    trainer = L.Trainer(max_epochs=1, callbacks=[NeuralCollapseMonitor(), ConfusionMatrixLogger()], **options)
    trainer.fit(student, DataLoader(images, batch_size=4), DataLoader(images, batch_size=4))


def test_tensorboard_gets_what_the_others_are_held_to(tmp_path):
    run_both(tmp_path, logger=TensorBoardLogger(tmp_path, name="", version=""))
    read = EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["images"]) == PICTURES
    assert set(read.Tags()["scalars"]) >= SCALARS


def test_scalars_arrive_in_csv_files_and_nothing_breaks(tmp_path):
    run_both(tmp_path, logger=[CSVLogger(tmp_path, name="", version="")])
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {name for row in rows for name, value in row.items() if value} >= {"nc/nc1", "nc_aux/nc2", "val/loss"}


def test_no_logger_breaks_nothing(tmp_path):
    run_both(tmp_path, logger=False)


def test_mlflow_gets_scalars_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("tiny", tracking_uri=(tmp_path / "mlruns").as_uri())
    run_both(tmp_path, logger=logger)
    folder = next((tmp_path / "mlruns").rglob(logger.run_id))
    assert {str(path.parent.relative_to(folder / "artifacts")) for path in folder.rglob("*.png")} == PICTURES
    assert {
        str(path.relative_to(folder / "metrics")) for path in folder.glob("metrics/**/*") if path.is_file()
    } >= SCALARS
    assert len(list(folder.rglob("artifacts/vq/tokens/*.md"))) > 0


def test_wandb_offline_gets_scalars_and_pictures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    run_both(tmp_path, logger=logger)
    summary = {name: logger.experiment.summary[name] for name in logger.experiment.summary.keys()}  # noqa: SIM118
    wandb.finish()
    assert set(summary) >= SCALARS | PICTURES
    drawn = {path.relative_to(path.parents[3]).parts[-1] for path in tmp_path.rglob("media/images/**/*.png")}
    assert len(drawn) >= len(PICTURES)
