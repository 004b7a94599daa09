"""Pictures and texts arrive at the loggers that take them, and the others break nothing."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_logits.callbacks.loggers import picture_writers


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
