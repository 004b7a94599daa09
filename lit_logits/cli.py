"""The command line: `lit-logits fit|validate|test|predict --config RECIPE.yaml [--model... --data... --trainer...]`.

A recipe that is not a file here is looked up among those that the package ships, so `--config vq_logits.yaml` works
wherever the package is installed. `lit-logits import --config RECIPE.yaml --files ... --folder ... --tokenizer ...`
makes a cache of served log-probabilities for the data of a recipe, see `lit_logits.modules.import_log_probs`.
"""

import errno
import gc
import logging
import os
import pickle
import pkgutil
import shlex
import signal
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch.distributed as dist
from jsonargparse import SUPPRESS, ArgumentParser, Namespace, class_from_function
from lightning.pytorch.callbacks import BasePredictionWriter, LearningRateMonitor, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard.summary import hparams
from transformers import get_wsd_schedule

import lit_logits
from lit_logits import callbacks, datamodules, modules
from lit_logits.callbacks.atomic_checkpoints import AtomicCheckpointIO
from lit_logits.callbacks.exact_resume import ExactResume
from lit_logits.callbacks.last_checkpoint import LastCheckpoint
from lit_logits.callbacks.line_progress import LineProgress
from lit_logits.callbacks.prediction_writer import PredictionWriter
from lit_logits.callbacks.resume_check import ResumeCheck
from lit_logits.recipe_parser import RecipeFile, RecipeParser, forget_classes, schedule_warning
from lit_logits.run_folders import best_checkpoint, claim_version, last_checkpoint, runs_folder
from lit_logits.text_classifiers import fill_vocabulary

__all__ = ["LitLogitsCLI", "SaveRun", "WarmupStableDecayLR", "main"]

# The parser finds `--model VQLogitsLM` among imported classes only.
for _package in (lit_logits, modules, callbacks, datamodules):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        if not _module.name.endswith("__main__"):
            import_module(_module.name)
    for _name in _package.__all__:
        getattr(_package, _name)

_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR}

# A recipe can give `init_args` only to classes, and transformers' schedules are functions. After its end this one stays
# at its floor, where `OneCycleLR` raises and the other cosines of torch and transformers rise again.
WarmupStableDecayLR = class_from_function(get_wsd_schedule, LambdaLR, name="WarmupStableDecayLR")


class SaveRun(SaveConfigCallback):
    """Save the resolved config in the run folder, and in TensorBoard as text and as hyper-parameters."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Log the config; Lightning calls this on rank zero only."""
        parts = Namespace({key: self.config.get(key) for key in ("model", "data", "seed_everything")})
        flat = {k.replace(".init_args", ""): v for k, v in vars(parts.as_flat()).items() if v is not None}
        flat = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat.items()}
        text = "".join(f"    {line}\n" for line in self.parser.dump(self.config, skip_none=False).splitlines())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", text)
                # The zeros are never shown: TensorBoard's HParams tab reads the values from the scalars of the run.
                for summary in hparams(flat, dict.fromkeys(["val/loss", "val/ppl", "val/acc"], 0.0)):
                    logger.experiment.file_writer.add_summary(summary)
            else:
                logger.log_hyperparams(flat)


class _LearningRates(LearningRateMonitor):
    """A `LearningRateMonitor` that logs each step once, not at every micro-batch."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log before the first micro-batch of a step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def _attributes(data: Namespace | None) -> list[str]:
    """Return the names that the class of a parsed `data` has, before it is instantiated."""
    return [] if data is None else dir(pkgutil.resolve_name(data.class_path))


class LitLogitsCLI(LightningCLI):
    """LightningCLI with the library's classes by their short names, and runs that leave a record.

    Runs are kept in `runs/RECIPE`, or without a recipe under the model's name; `--ckpt_path last` takes the newest
    there, `--ckpt_path best` the best checkpoint of that run. A model whose `vocab_size` or `num_classes` is not given
    gets that of the data, and so does a new classifier of texts. These callbacks are added: a `LastCheckpoint`, a
    `ResumeCheck` and an `ExactResume`, a `LearningRateMonitor`, a progress bar (a `LineProgress` if the output is not a
    terminal) and, to predict, a `PredictionWriter`. Each is left out if `trainer.callbacks` has one for the same
    purpose, or if the Trainer's switch is off (`enable_checkpointing`, `logger`, `enable_progress_bar`).

    Args:
        args: the arguments as on the command line, or as a dict; None takes `sys.argv`.
    """

    def __init__(self, args: ArgsType = None) -> None:
        logger = {"save_dir": "runs", "default_hp_metric": False}
        super().__init__(
            save_config_callback=SaveRun,
            save_config_kwargs={"overwrite": True},  # for a run that resumes in a given `version`
            trainer_defaults={"logger": {"class_path": "TensorBoardLogger", "init_args": logger}},
            seed_everything_default=42,
            auto_configure_optimizers=False,  # models take theirs as arguments
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose `--config` finds shipped recipes."""
        forget_classes()
        if Path(sys.argv[0]).name == "__main__.py":
            kwargs.setdefault("prog", "python -m lit_logits")
        parser = RecipeParser(dump_header=[f"lightning=={L.__version__}"], version=lit_logits.__version__, **kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="Path of a recipe, or name of a shipped one.")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Keep the config as given: Lightning ≥ 2.6 would silently prefer the checkpoint's hyper-parameters."""

    def before_instantiate_classes(self) -> None:
        """Link data and model, name the run's folder and find the newest checkpoint for `ckpt_path: last`."""
        config = self.config[self.subcommand]
        for size in ("vocab_size", "num_classes"):
            # A given size is kept. Saved configs leave linked sizes out, so that a run from one links them again.
            if config.model.get(f"init_args.{size}", 0) is None:
                # A language model classifies into tokens.
                source = size if size in _attributes(config.get("data")) else "vocab_size"
                links = self._parser(self.subcommand)
                links.link_arguments(f"data.{source}", f"model.init_args.{size}", apply_on="instantiate")
        if config.get("weights_only") is None:
            config.weights_only = True  # Lightning's default would run the code in a checkpoint from a URL
        if self.subcommand == "predict" and config.get("return_predictions") is None:
            config.return_predictions = False  # a writer stores them, and memory may be too small
        warning = schedule_warning(config.model, config.trainer.max_steps) if self.subcommand == "fit" else None
        if warning:
            rank_zero_warn(warning)
        given = config.trainer.logger
        loggers = [one.init_args for one in (given if isinstance(given, list) else [given]) if _has_arguments(one)]
        recipes = [Path(str(path)).stem for path in config.get("config") or []]
        for logger in loggers:
            if logger.get("name") == "lightning_logs":
                logger.name = recipes[-1] if recipes else config.model.class_path.rpartition(".")[2]
        folder = next((runs_folder(logger) for logger in loggers), None)  # checkpoints go to the first logger's
        job = os.environ.get("SLURM_JOB_ID")
        if job and folder and config.trainer.get("default_root_dir") is None:
            # What Lightning saves when a job is requeued, and looks for when it starts: of this job alone.
            config.trainer.default_root_dir = str(folder / f"job_{job}")
        wanted = config.get("ckpt_path")
        if wanted in ("last", "best") and folder:
            # Lightning itself looks into the folder of the new run, which is empty.
            found = last_checkpoint(folder) if wanted == "last" else best_checkpoint(folder)
            if found is None:
                kept = "" if wanted == "last" else " and the best one that its `ModelCheckpoint` kept"
                self.parser.error(
                    f"Expected `ckpt_path: {wanted}` to find {folder}/*/checkpoints/last.ckpt{kept}, got none."
                )
            config.ckpt_path = str(found)
            rank_zero_info(f"`ckpt_path: {wanted}` is {config.ckpt_path}.")

    def instantiate_classes(self) -> None:
        """Make all parts, after a new classifier of texts has been told of the data's tokens."""
        fill_vocabulary(self.config[self.subcommand].model, self.config[self.subcommand].get("data"))
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the trainer, with the default callbacks that the class lists."""
        config = self._get(self.config_init, "trainer")
        chosen = config.callbacks if isinstance(config.callbacks, list) else [c for c in [config.callbacks] if c]
        if config.enable_checkpointing is not False and not any(getattr(c, "save_last", False) for c in chosen):
            chosen.append(LastCheckpoint())
        for kind in (ResumeCheck, ExactResume) if config.enable_checkpointing is not False else ():
            if not any(isinstance(c, kind) for c in chosen):
                chosen.append(kind())
        if config.logger is not False and not any(isinstance(c, LearningRateMonitor) for c in chosen):
            chosen.append(_LearningRates(logging_interval="step"))
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in chosen):
            chosen.append(TQDMProgressBar() if sys.stdout.isatty() else LineProgress())
        if self.subcommand == "predict" and not any(isinstance(c, BasePredictionWriter) for c in chosen):
            chosen.append(PredictionWriter())
        plugins = config.plugins if isinstance(config.plugins, list) else [p for p in [config.plugins] if p]
        # DeepSpeed writes folders, by itself.
        if "deepspeed" not in str(config.strategy) and not any(isinstance(p, CheckpointIO) for p in plugins):
            kwargs = {"plugins": [*plugins, AtomicCheckpointIO()], **kwargs}
        if config.logger is False:
            self.save_config_callback = None  # without a run folder, it would write into the working directory
        elif getattr(rank_zero_only, "rank", 0) == 0 and not config.fast_dev_run:
            for logger in config.logger if isinstance(config.logger, list) else [config.logger]:
                claim_version(logger)
        return super().instantiate_trainer(**{"callbacks": chosen, **kwargs})

    def after_fit(self) -> None:
        """Print where the run is, how to look at it, how to test it and how it ended."""
        folder = str(self.trainer.log_dir)  # asked for on every rank, as it is broadcast
        if self.trainer.is_global_zero and isinstance(self.trainer.logger, TensorBoardLogger):
            print(f"\nRun folder: {folder}\nLook at it: tensorboard --logdir {self.trainer.logger.save_dir}")
            config, last = Path(folder, "config.yaml"), Path(folder, "checkpoints", "last.ckpt")
            if config.exists() and last.exists() and is_overridden("test_step", self.model):
                told = shlex.join(["test", "--config", str(config), "--ckpt_path", str(last)])
                print(f"Test it: {_command()} {told}")
            metrics = self.trainer.callback_metrics.items()
            print("\n".join(f"{name}: {value:.4f}" for name, value in metrics if name.startswith("val/")))


def _command() -> str:
    """Return the command that this is, as a person types it here, where no environment may be active."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"{_near(Path(sys.executable))} -m lit_logits"
    return f"{_near(Path(sys.executable))} {script}" if script.suffix == ".py" else _near(script.absolute())


def _near(program: Path) -> str:
    """Return the path of a program in the working directory, as of an environment that is not active, or its name."""
    return str(program.relative_to(Path.cwd())) if program.is_relative_to(Path.cwd()) else program.name


def _has_arguments(logger: Any) -> bool:
    """Return whether a parsed logger tells where it writes."""
    arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
    return arguments is not None and bool(arguments.get("save_dir"))


def _import(args: list[str]) -> None:
    """Make a cache of served log-probabilities, for the data of a recipe; the rest of the recipe is not used."""
    parser = ArgumentParser(prog="lit-logits import", description=str(modules.import_log_probs.__doc__).split("\n")[0])
    parser.add_argument("-c", "--config", action=RecipeFile, help="Path of a recipe, or name of a shipped one.")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    parser.add_function_arguments(modules.import_log_probs, skip={"data"})
    for name in ("seed_everything", "trainer", "model"):
        parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)
    given = parser.parse_args(args)
    chosen = {name: given[name] for name in ("files", "folder", "tokenizer", "top_k", "dtype", "shard_tokens")}
    cache = modules.import_log_probs(data=parser.instantiate_classes(given).data, **chosen)
    print(f"Log-probabilities: {cache.folder}, {len(cache)} samples, {cache.num_tokens} tokens, k = {cache.top_k}.")


def main(args: ArgsType = None) -> None:
    """Run the command line: the `lit-logits` command and `train.py`.

    Classes of modules in the working directory can be named. An error that this library explains is shown as its
    sentence alone, whatever the parser wrapped around it. Its traceback is shown too with `--debug`, anywhere among the
    arguments, or with LIT_LOGITS_DEBUG=1. A run on several processes leaves its process group. SIGTERM ends the process
    with status 143, after `LastCheckpoint` has saved.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    args, debug = _without_debug(args)
    _silence_others()
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list) and given[:1] == ["import"]:
            _import(given[1:])
        else:
            LitLogitsCLI(args)
    except SIGTERMException:  # else `fit && test` would go on
        raise SystemExit(128 + signal.SIGTERM) from None
    except (pickle.UnpicklingError, OSError, RuntimeError, ValueError, TypeError) as error:
        explanation = _explanation(error)
        if explanation is None:
            raise
        _stop(explanation, debug)
    if dist.is_available() and dist.is_initialized():
        # Threads of gloo may still hold tensors of the last collective, and to drop them while the interpreter ends
        # aborts it. The threads are joined when the group is freed, so first free what holds it in reference cycles.
        gc.collect()
        dist.destroy_process_group()


def _silence_others() -> None:
    """Leave out what Lightning says of other products, and what torch says to Lightning."""
    warnings.filterwarnings("ignore", message=r".*LeafSpec")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _explanation(error: BaseException) -> str | None:
    """Return what an error means for who runs the command line, or None if only its traceback helps."""
    if isinstance(error, pickle.UnpicklingError):
        return (
            "Expected the checkpoint to hold tensors and plain data, but loading it would run code of its author. If"
            f" you trust it, add `--weights_only false`. {error}"
        )
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        return (
            f"Expected to be able to read and write {error.filename or 'its files'}, but got: {error.strerror}. Make"
            " room or give rights there, or choose another place: runs are kept in `--trainer.logger.save_dir`, caches"
            " in `--data.cache_dir` or `$XDG_CACHE_HOME`."
        )
    if isinstance(error, RuntimeError) and "loading state_dict for" in str(error):
        differences = [line.strip() for line in str(error).splitlines()[1:]]
        return (
            f"Expected the checkpoint to be of the same model, but got other weights: {differences[0][:300]} Resume"
            " with the config.yaml of the run, or leave `ckpt_path` out."
        )
    cause: BaseException | None = error
    while cause is not None and not _is_ours(cause):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else str(cause)


def _is_ours(error: BaseException) -> bool:
    """Return whether a line of this library raised the error, with a sentence that says what it expected.

    Messages of torch and of a user's modules may start like that too.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return str(error).startswith("Expected ") and raised_in.partition(".")[0] == lit_logits.__name__


def _without_debug(args: ArgsType) -> tuple[ArgsType, bool]:
    """Remove `--debug` from the arguments; return them, and whether it or the environment asks for the traceback."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and "--debug" in given:
        given = [argument for argument in given if argument != "--debug"]
        if args is None:  # Lightning starts other ranks with `sys.argv` and this environment
            sys.argv[1:] = given
            os.environ["LIT_LOGITS_DEBUG"] = "1"
        else:
            args = given
        return args, True
    return args, os.environ.get("LIT_LOGITS_DEBUG") == "1"


def _stop(explanation: str, debug: bool) -> NoReturn:
    """End the process with exit code 1 and the explanation, below the traceback of the error if `debug` is set."""
    if debug:
        traceback.print_exc()
    hint = "" if debug else "\nFor the traceback, add `--debug`."
    raise SystemExit(f"\nlit-logits: {explanation}{hint}") from None
