"""The command line: `lit-logits fit|validate|test|predict --config RECIPE.yaml [--model... --data... --trainer...]`.

A recipe that is no file here is looked for among those that the package ships, so `--config vq_logits.yaml` works
wherever the package is installed.
"""

import pkgutil
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ActionConfigFile, Namespace, class_from_function
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard.summary import hparams
from transformers import get_wsd_schedule

import lit_logits
from lit_logits import callbacks, datamodules

__all__ = ["LastCheckpoint", "LineProgress", "LitLogitsCLI", "WarmupStableDecayLR", "main"]

# The parser finds `--model VQLogitsLM` among the classes that have been imported.
for _package in (lit_logits, callbacks, datamodules):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        import_module(_module.name)

# A recipe gives `init_args` to classes only, and transformers' schedules are functions. This one stays at its floor
# past the end, where `OneCycleLR` raises and the other cosines of torch and transformers climb again.
WarmupStableDecayLR = class_from_function(get_wsd_schedule, LambdaLR, name="WarmupStableDecayLR")


class LastCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt` of the run folder up to date, whatever makes training stop.

    Saves after every validation and epoch, at the end, and when an exception, Ctrl-C or SIGTERM ends training.
    Lightning's `save_last` comes only with a top-k checkpoint, and stays behind once the metric is past its best.
    """

    saved_step = 0

    def __init__(self) -> None:
        super().__init__(save_top_k=0, save_last=True)  # of the parent only its choice of the folder is used

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a run that goes on has a folder of its own."""
        return {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves, unless the epoch is about to end: its own hook saves with the epoch counted as complete."""
        if not trainer.is_last_batch:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves and tells how to go on."""
        self._save(trainer)
        if self.saved_step:
            rank_zero_info(f"Stopped at step {self.saved_step}; go on with `--ckpt_path {self.dirpath}/last.ckpt`.")

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule | None = None) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.saved_step != trainer.global_step:
            trainer.save_checkpoint(Path(str(self.dirpath), "last.ckpt"), weights_only=False)
            self.saved_step = trainer.global_step

    on_train_epoch_end = on_train_end = _save


class LineProgress(ProgressBar):
    """One line every `log_every_n_steps` steps and one a validation, for output that is a file or a pipe."""

    printed_step = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Prints once for each step that is due, however many batches are accumulated into it."""
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and trainer.global_step != self.printed_step:
            self.printed_step = trainer.global_step
            self._print(trainer, pl_module)

    def _print(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
            values = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
            print(f"epoch {trainer.current_epoch}  step {trainer.global_step}  {values}", flush=True)

    on_validation_end = _print


class SaveRun(SaveConfigCallback):
    """Puts the resolved config into the run folder, and into TensorBoard as text and as hyper-parameters."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Logs the config; called on rank zero only."""
        parts = Namespace({key: self.config.get(key) for key in ("model", "data", "seed_everything")})
        flat = {k.replace(".init_args", ""): v for k, v in vars(parts.as_flat()).items() if v is not None}
        flat = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat.items()}
        text = "".join(f"    {line}\n" for line in self.parser.dump(self.config, skip_none=False).splitlines())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", text)
                # The metrics' names only: TensorBoard's HParams tab takes their values from the scalars of the run.
                for summary in hparams(flat, dict.fromkeys(["val/loss", "val/ppl", "val/acc"], 0.0)):
                    logger.experiment.file_writer.add_summary(summary)
            else:
                logger.log_hyperparams(flat)


def _attributes(data: Namespace | None) -> list[str]:
    """What the class of a parsed `data` has, before anything is made of it."""
    return [] if data is None else dir(pkgutil.resolve_name(data.class_path))


class _RecipeFile(ActionConfigFile):
    """`--config`, which also finds the shipped recipes by their file names."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if str(values).endswith(".yaml") and not Path(values).is_file():
            shipped = {path.name: str(path) for path in Path(str(files("lit_logits.configs"))).glob("*.yaml")}
            if values not in shipped:
                parser.error(f"Expected a file or one of the shipped recipes {sorted(shipped)}, but got {values!r}.")
            values = shipped[values]
        super().__call__(parser, cfg, values, option_string)


class LitLogitsCLI(LightningCLI):
    """LightningCLI with the library's classes by their short names, and runs that leave a record.

    A model whose `vocab_size` or `num_classes` is not given gets that of the data. `trainer.callbacks` is joined by a
    `LastCheckpoint`, a `LearningRateMonitor` and a progress bar (a `LineProgress` where the output is no terminal):
    each unless the list has one for the same purpose, or the Trainer's switch is off (`enable_checkpointing`,
    `logger`, `enable_progress_bar`).

    Args:
        args: The arguments as on the command line, or as a dict; None takes `sys.argv`.
    """

    def __init__(self, args: ArgsType = None) -> None:
        logger = {"save_dir": "runs", "default_hp_metric": False}
        super().__init__(
            save_config_callback=SaveRun,
            save_config_kwargs={"overwrite": True},  # for a run that goes on in a given `version`
            trainer_defaults={"logger": {"class_path": "TensorBoardLogger", "init_args": logger}},
            seed_everything_default=42,
            auto_configure_optimizers=False,  # models take theirs as arguments
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser whose `--config` finds shipped recipes."""
        parser = self.parser_class(dump_header=[f"lightning=={L.__version__}"], **kwargs)
        parser.add_argument("-c", "--config", action=_RecipeFile, help="Path of a recipe, or name of a shipped one.")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Keeps the config as given; Lightning ≥ 2.6 would silently lay the checkpoint's hyper-parameters over it."""

    def before_instantiate_classes(self) -> None:
        """Links data and model, names the run's folder and finds the newest checkpoint for `ckpt_path: last`."""
        config = self.config[self.subcommand]
        for size in ("vocab_size", "num_classes"):
            if config.model.get(f"init_args.{size}", 0) is None:  # dumps leave linked values out, so never a given one
                source = size if size in _attributes(config.get("data")) else "vocab_size"  # classes may be tokens
                links = self._parser(self.subcommand)
                links.link_arguments(f"data.{source}", f"model.init_args.{size}", apply_on="instantiate")
        logger: Any = config.trainer.logger.get("init_args", {}) if isinstance(config.trainer.logger, Namespace) else {}
        if logger.get("name") == "lightning_logs":
            logger.name = config.model.class_path.rpartition(".")[2]
        if config.get("ckpt_path") == "last" and logger.get("save_dir"):
            folder = Path(logger.save_dir, logger.get("name") or "")  # Lightning looks into the new run's, empty one
            found = sorted(folder.glob("*/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
            if not found:
                self.parser.error(f"Expected `ckpt_path: last` to find {folder}/*/checkpoints/last.ckpt, got none.")
            config.ckpt_path = str(found[-1])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Makes the trainer with the default callbacks that the class lists."""
        config = self._get(self.config_init, "trainer")
        chosen = config.callbacks if isinstance(config.callbacks, list) else [c for c in [config.callbacks] if c]
        if config.enable_checkpointing is not False and not any(getattr(c, "save_last", False) for c in chosen):
            chosen.append(LastCheckpoint())
        if config.logger is not False and not any(isinstance(c, LearningRateMonitor) for c in chosen):
            chosen.append(LearningRateMonitor(logging_interval="step"))
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in chosen):
            chosen.append(TQDMProgressBar() if sys.stdout.isatty() else LineProgress())
        if config.logger is False:
            self.save_config_callback = None  # it would write into the working directory
        return super().instantiate_trainer(**{"callbacks": chosen, **kwargs})

    def after_fit(self) -> None:
        """Tells where the run is, how to look at it and how it ended."""
        folder = self.trainer.log_dir  # on every rank, as it is broadcast
        if self.trainer.is_global_zero and self.trainer.logger:
            print(f"\nRun folder: {folder}\nLook at it: tensorboard --logdir {self.trainer.logger.save_dir}")
            metrics = self.trainer.callback_metrics.items()
            print("\n".join(f"{name}: {value:.4f}" for name, value in metrics if name.startswith("val/")))


def main(args: ArgsType = None) -> None:
    """Runs the command line: the `lit-logits` command and `train.py`."""
    LitLogitsCLI(args)
