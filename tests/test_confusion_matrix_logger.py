"""`ConfusionMatrixLogger` in the real Trainer, and pictures of a test on a checkpoint."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.metrics import confusion_matrix
from test_neural_collapse_monitor import C, batch_of, fit, logger_of, make, read, rows, trainer_of
from torch.utils.data import DataLoader

from lit_logits.callbacks import ConfusionMatrixLogger, NeuralCollapseMonitor, confusion_matrix_logger
from lit_logits.callbacks.pictures.confusion import confusion_figure
from lit_logits.dual_head_kd import DualHeadKD


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to the pictures."""
    found = []

    def figure(counts, epoch, names):
        found.append((counts, epoch, names))
        return confusion_figure(counts, epoch, names)

    monkeypatch.setattr(confusion_matrix_logger, "confusion_figure", figure)
    return found


@pytest.mark.parametrize("soft", [False, True])
def test_the_counts_are_those_of_scikit_learn_over_all_samples(tmp_path, drawn, soft):
    data, model = rows(23, ignored=True), make()
    labels = batch_of(data)["labels"]
    if soft:
        for row in data:
            hard = torch.zeros(C, dtype=torch.float64)
            row["labels"] = hard if row["labels"] < 0 else hard.index_fill(0, row["labels"], 1.0)
    fit(model, ConfusionMatrixLogger(), val=data, batch_size=5, max_epochs=2, logger=logger_of(tmp_path))
    predicted = model(batch_of(data)["pixel_values"]).argmax(-1)
    known = labels >= 0
    expected = confusion_matrix(labels[known], predicted[known], labels=range(C))
    (_, first, _), (counts, second, names) = drawn
    np.testing.assert_array_equal(counts, expected)
    assert (first, second, names) == (0, 1, ["0", "1", "2", "3"])
    assert len(read(tmp_path / "run").Images("val/confusion")) == 2


def test_the_model_runs_once_a_batch_and_its_training_is_the_same(tmp_path):
    with_it, without = make(), make()
    calls = []
    for model in (with_it, without):
        model.student.register_forward_hook(lambda module, *_: calls.append(module))
    fit(with_it, ConfusionMatrixLogger(), val=rows(), max_epochs=2, logger=logger_of(tmp_path))
    fit(without, val=rows(), max_epochs=2)
    for name, value in without.net.state_dict().items():
        assert torch.equal(value, with_it.net.state_dict()[name])
    assert calls.count(with_it.student) == calls.count(without.student) > 0
    assert not with_it.net._forward_hooks


def test_pictures_of_a_test_stand_where_the_checkpoint_was_made(tmp_path, drawn):
    """They were titled "epoch 0" and stood at step 0: Lightning's counters are those of training alone."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(make(), saving, val=rows(), max_epochs=3, logger=False, enable_checkpointing=True)
    model = make()
    logger = TensorBoardLogger(tmp_path, name="", version="test")
    tester = trainer_of(ConfusionMatrixLogger(), NeuralCollapseMonitor(), logger=logger)
    loader = DataLoader(rows(), batch_size=6)
    tester.test(model, loader, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    written = read(tmp_path / "test")
    steps = 2 * len(loader)
    assert [image.step for tag in ("test/confusion", "nc/cosines") for image in written.Images(tag)] == [steps, steps]
    assert drawn[0][1] == 1


def test_a_checkpoint_that_cannot_be_read_without_its_code_leaves_the_counters(tmp_path, drawn):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(make(), saving, max_epochs=1, logger=False, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)
    torch.save(saved | {"mine": ModelCheckpoint}, tmp_path / "code.ckpt")
    tester = trainer_of(ConfusionMatrixLogger(), logger=logger_of(tmp_path))
    loader = DataLoader(rows(), batch_size=6)
    tester.test(make(), loader, ckpt_path=tmp_path / "code.ckpt", verbose=False, weights_only=False)
    assert drawn[0][1] == 0


def test_it_says_when_there_is_nothing_to_draw():
    several = DualHeadKD(torch.nn.Linear(5, C), method="ce", multi_label=True).double()
    for model in (several, L.LightningModule()):
        with pytest.warns(UserWarning, match="ConfusionMatrixLogger will do nothing"):
            ConfusionMatrixLogger().setup(trainer_of(), model, "fit")


def test_the_figure_shows_shares_of_rows():
    counts = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    figure = confusion_figure(counts, 7, ["cat", "dog", "a name that is much too long for the axis"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    assert axes.get_title() == "6 samples, epoch 7: accuracy 83.33%"
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "3"),
        ((1, 0), "1"),
        ((1, 1), "2"),
    }
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog", "a name that is much "]
    assert not confusion_figure(torch.eye(13), 0, [str(i) for i in range(13)]).axes[0].texts
    many = confusion_figure(torch.eye(31), 0, ["name"] * 31).axes[0]
    assert "name" not in [tick.get_text() for tick in many.get_xticklabels()]
