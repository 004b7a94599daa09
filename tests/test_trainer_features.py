"""What the Trainer offers, with every method and its monitors: each cell works, or is a sentence of this library."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.tuner import Tuner
from test_filling import LLAMA, QUIET, folder, make_data, make_model  # noqa: F401  # `folder` is a fixture

from lit_logits import VQLogitsLM
from lit_logits.callbacks import (
    CodebookMonitor,
    CodebookReinit,
    ExactResume,
    FusionWeightLogger,
    GWApproximationLogger,
    LastCheckpoint,
    NeuralCollapseMonitor,
    ResumeCheck,
    SampleTextLogger,
)
from lit_logits.modules import HierarchicalVQLogitsHead, VQLogitsHead

pytestmark = pytest.mark.nightly
METHODS = ["vq", "two levels", "lm", "kd", "gld"]
DATA = {"vq": "text", "two levels": "text", "lm": "text", "kd": "images", "gld": "pairs"}
VQ = ["vq", "two levels"]


def make_parts(method, folder, optimizer=torch.optim.AdamW):  # noqa: F811
    """A model, its data and its monitors."""
    data = make_data(DATA[method], folder)
    torch.manual_seed(0)
    if method in VQ:
        head = partial(VQLogitsHead, codebook_size=8) if method == "vq" else HierarchicalVQLogitsHead
        model = VQLogitsLM(LLAMA, vocab_size=data.vocab_size, head=head, optimizer=optimizer)
        return model, data, [CodebookMonitor(every_n_steps=1), CodebookReinit(every_n_steps=1, stop_step=2)]
    monitors = {"lm": SampleTextLogger, "kd": NeuralCollapseMonitor, "gld": partial(GWApproximationLogger, 1)}
    return make_model(DATA[method], data), data, [monitors[method]()]


def make_trainer(tmp_path, callbacks=(), **options):
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "limit_val_batches": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    }
    defaults |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "enable_model_summary": False}
    defaults |= {"logger": TensorBoardLogger(tmp_path / "tb"), "default_root_dir": tmp_path}
    saves = [LastCheckpoint(), ResumeCheck(), ExactResume()] if options.get("enable_checkpointing", True) else []
    return Trainer(accelerator="cpu", **defaults | options, callbacks=[*saves, *callbacks])


def fit(method, folder, tmp_path, callbacks=(), **options):  # noqa: F811
    """Train with the method's monitors; the weights stay finite, and what is logged is."""
    model, data, monitors = make_parts(method, folder)
    trainer = make_trainer(tmp_path, [*monitors, *callbacks], **options)
    trainer.fit(model, data)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    return trainer, model


FEATURES = {
    "fast_dev_run": {"fast_dev_run": 2, "enable_checkpointing": False},
    "overfit_batches": {"overfit_batches": 2, "val_check_interval": 1},
    "limits": {"limit_train_batches": 3, "val_check_interval": 1.0, "check_val_every_n_epoch": 1, "max_epochs": 1},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "profiler": {"profiler": "simple"},
    "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "max_steps": 2},
    "no logger": {"logger": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("method", METHODS)
def test_options(folder, tmp_path, method, feature):  # noqa: F811
    options = FEATURES[feature]
    trainer, model = fit(method, folder, tmp_path, **options)
    if "fast_dev_run" not in options:
        assert math.isfinite(trainer.callback_metrics["val/loss"])
        dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(feature, torch.float32)
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {dtype}


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_refused_before_it_trains_on_nan(folder, tmp_path, method):  # noqa: F811
    with pytest.raises(ValueError, match=r"to be float32, bfloat16 or float64, but got float16.*Set `precision: 16-"):
        fit(method, folder, tmp_path, precision="16-true")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_early_stopping(folder, tmp_path, method):  # noqa: F811
    stop = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    trainer, _ = fit(method, folder, tmp_path, [stop], max_steps=20)
    assert trainer.global_step == 4


@pytest.mark.slow
@pytest.mark.parametrize("average", [partial(EMAWeightAveraging, use_buffers=False), EMAWeightAveraging])
@pytest.mark.parametrize("method", METHODS)
def test_moving_averages(folder, tmp_path, method, average):  # noqa: F811
    if method in VQ and average is EMAWeightAveraging:
        with pytest.raises(ValueError, match=r"Expected .*use_buffers"):
            fit(method, folder, tmp_path, [average()])
    else:
        trainer, _ = fit(method, folder, tmp_path, [average()])
        assert trainer.global_step == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_stochastic_weight_averaging(folder, tmp_path, method):  # noqa: F811
    swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    epochs = {"max_epochs": 3, "max_steps": -1, "limit_train_batches": 2, "val_check_interval": 1.0}
    trainer, _ = fit(method, folder, tmp_path, [swa], **epochs, check_val_every_n_epoch=1)
    assert trainer.current_epoch == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_rich_bars(folder, tmp_path, method):  # noqa: F811
    pytest.importorskip("rich")
    bars = [RichProgressBar(), RichModelSummary()]
    fit(method, folder, tmp_path, bars, enable_progress_bar=True, enable_model_summary=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_several_loggers(folder, tmp_path, method):  # noqa: F811
    """Scalars are in the table, pictures in TensorBoard, and the checkpoints beside the first logger."""
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    fit(method, folder, tmp_path, logger=loggers)
    assert "val/loss" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert list((tmp_path / "tb" / "version_0").glob("events*"))
    assert (tmp_path / "csv" / "version_0" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_wandb_offline(folder, tmp_path, monkeypatch, method):  # noqa: F811
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(method, folder, tmp_path, logger=WandbLogger(project="tiny", save_dir=tmp_path, offline=True))
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_mlflow(folder, tmp_path, monkeypatch, method):  # noqa: F811
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more packages
    logger = MLFlowLogger("tiny", tracking_uri=tmp_path.as_uri(), save_dir=str(tmp_path))
    fit(method, folder, tmp_path, logger=logger)
    assert "val/loss" in logger.experiment.get_run(logger.run_id).data.metrics


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_search_for_a_learning_rate(folder, tmp_path, method):  # noqa: F811
    """The rate of the injected optimizer is searched, and the model is the one before."""
    model, data, monitors = make_parts(method, folder)
    model.lr = 1e-3  # where Lightning's callback writes what it found
    trainer = make_trainer(tmp_path, monitors, enable_checkpointing=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finder = Tuner(trainer).lr_find(model, datamodule=data, num_training=20, update_attr=False)
    assert len(finder.results["lr"]) >= 15
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    trainer.fit(model, data)
    assert trainer.global_step == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_search_for_a_batch_size(folder, tmp_path, method):  # noqa: F811
    model, data, monitors = make_parts(method, folder)
    data.batch_size = 1
    trainer = make_trainer(tmp_path, monitors, enable_checkpointing=False)
    Tuner(trainer).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=1)
    assert data.batch_size == 4
    trainer.fit(model, data)
    assert trainer.global_step == 4


FUSION = {
    "limits": {"limit_test_batches": 2},
    "fast_dev_run": {"fast_dev_run": 1},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "16-true": {"precision": "16-true"},
    "profiler": {"profiler": "simple"},
    "rich": {"callbacks": [RichProgressBar()]},
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FUSION)
def test_fusion(folder, tmp_path, feature):  # noqa: F811
    """The method that trains nothing: its test and its texts."""
    data = make_data("choices", folder)
    model, options = make_model("choices", data), dict(FUSION[feature])
    callbacks = [FusionWeightLogger(), *options.pop("callbacks", [])]
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path)]
    quiet = {name: value for name, value in QUIET.items() if name not in ("logger", "enable_progress_bar")}
    trainer = Trainer(accelerator="cpu", logger=loggers, callbacks=callbacks, **quiet, **options)
    assert math.isfinite(trainer.test(model, data, verbose=False)[0]["test/loss"])
    assert trainer.predict(model, data)
