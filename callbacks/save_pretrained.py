"""`SavePretrained`: the trained model, as a folder for `from_pretrained` if it is of transformers."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lit_logits.callbacks.parts import averaged_weights, data_class_names, data_tokenizer, uncoded_heads
from lit_logits.contracts import ExportsPretrained, UncodedVectorsError, WritesFolder
from lit_logits.modules.language_models.end_tokens import EndTokens
from lit_logits.modules.language_models.inspect import trained_model_name
from lit_logits.modules.language_models.saving import describe_training, measured, write_model
from lit_logits.storage.folders import check_model_folder, replace_folder, restore_replaced

__all__ = ["SavePretrained"]

Precision = Literal["float32", "bfloat16", "float16"]


class SavePretrained(Callback):
    """Keep the transformers model inside the LightningModule, at its best validation, in a `from_pretrained` folder.

    The model is the first in the order of `modules()` that has an output layer and parameters in training, or else the
    first with an output layer. A `VQLogitsLM` is saved with its compressed head instead, and a student of `DualHeadKD`
    that is not of transformers as its `state_dict` with a config.json (contract `WritesFolder`).

    The model is saved when a validation's `monitor` is better than all before. If there is no validation, or the metric
    is NaN, it is saved at the end. The data module's `tokenizer` is saved with it, if there is one, and its bos, eos
    and pad ids are copied to the saved configs. The eos id is that by which the labels of the first batches end: a chat
    template may end a text by another token than the tokenizer's eos. A list of eos ids is kept if it contains that
    token. A warning tells if no label ends a text. A classifier's config names the classes of the data module. LoRA
    adapters are merged into the saved weights, not into those in training. A card, README.md, says what the model was
    made of and what was measured. A folder is replaced as a whole or not at all; a README.md of your own stays, and the
    card is MODEL_CARD.md then. Where Lightning's `WeightAveraging` keeps averages, validations measure them, and they
    are what is saved.

    A resumed run knows the best metric of the run before and its folder, and replaces that only by a better model.

    Args:
        folder: new, empty, or a saved model, which is replaced; None is `pretrained` in the run folder.
        monitor: a logged metric; None saves at the end only.
        mode: whether the least (`min`) or the greatest (`max`) is best.
        head: form of the head of a `VQLogitsLM`: `compact`, packed codes for this library, or `dense`, decoded rows in
            the original architecture, which a head of two levels does not have.
        dtype: of the saved weights: `float32`, `bfloat16` or `float16`; None is theirs.

    Raises:
        ValueError: If `mode` or `dtype` is none of these; at the start of fit, if the folder holds anything else, the
            model is missing, or the strategy keeps the weights in pieces; after a validation, if `monitor` was not
            logged.

    Example:
        >>> SavePretrained(monitor="val/acc", mode="max").state_dict()
        {'best': None, 'saved_in': None}
    """

    def __init__(
        self,
        folder: str | None = None,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        head: Literal["compact", "dense"] = "compact",
        dtype: Precision | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"Expected `mode` to be 'min' or 'max', but got {mode!r}.")
        if dtype not in (None, *get_args(Precision)):
            raise ValueError(f"Expected `dtype` to be one of {list(get_args(Precision))}, but got {dtype!r}.")
        self.folder, self.monitor, self.mode, self.head = folder, monitor, mode, head
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.best: float | None = None
        self.saved_in: str | None = None
        self._path = Path()
        self._name = ""
        self._ends = EndTokens()

    @property
    def state_key(self) -> str:
        """Return the key of the state, which belongs to this metric and mode."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        """Return the best metric, and the folder of its model."""
        return {"best": self.best, "saved_in": self.saved_in}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best metric and its folder."""
        self.best, self.saved_in = state_dict["best"], state_dict["saved_in"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model, and check that it can be saved."""
        _check_whole(trainer.strategy)
        exports = isinstance(pl_module, ExportsPretrained)
        self._name = "" if exports else _model_name(pl_module)
        gathers = type(trainer.strategy).lightning_module_state_dict is not Strategy.lightning_module_state_dict
        if not self._name and gathers:
            raise ValueError(
                f"Expected a strategy whose weights are whole for {type(pl_module).__name__}, but got"
                f" {type(trainer.strategy).__name__}. Use DDP."
            )
        if exports:
            with suppress(UncodedVectorsError):  # CodebookFit codes them before anything is saved
                self._exported(pl_module)  # raises now if it could not be saved later
        self._path = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir, "pretrained")).resolve()
        if trainer.is_global_zero:
            restore_replaced(self._path)
        trainer.strategy.barrier()  # so that all ranks check the folder that rank zero restored
        check_model_folder(self._path)
        is_there = self.saved_in is not None and Path(self.saved_in, "config.json").is_file()
        if not trainer.strategy.broadcast(is_there):  # rank zero decides, as the others may not see its disk
            self.best = self.saved_in = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note by which tokens the first batches of a language model end their texts."""
        self._ends.watch(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the metric is the best so far; rank zero decides, as all must gather the weights or none.

        Nothing is saved, nor counted as the best, while tokens own vectors that `CodebookFit` is to code.
        """
        if trainer.state.fn != "fit" or self.monitor is None or uncoded_heads(pl_module):
            return
        if self.monitor not in trainer.callback_metrics:
            if trainer.sanity_checking and not self.monitor.startswith("val"):
                return  # a metric of training has no value yet
            raise ValueError(
                f"Expected `monitor` to be one of the logged {sorted(trainer.callback_metrics)}, but got"
                f" {self.monitor!r}."
            )
        value = float(trainer.callback_metrics[self.monitor])
        first = self.best is None and value == value  # not NaN
        is_best = first or (self.best is not None and (value < self.best if self.mode == "min" else value > self.best))
        if trainer.strategy.broadcast(is_best) and not trainer.sanity_checking:
            self._save(trainer)
            self.best = value

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save unless a validation did, and say where the model is."""
        if uncoded_heads(pl_module):
            rank_zero_warn(
                "Nothing was saved, as tokens still own vectors. Add the callback CodebookFit, in front of"
                " SavePretrained."
            )
            return
        if self.best is None:
            self._save(trainer)
        metric = "" if self.best is None else f" ({self.monitor} {self.best:.4f})"
        rank_zero_info(f"Saved model: {self.saved_in}{metric}")

    # ------------------------------------------------------------------ saving

    def _save(self, trainer: Trainer) -> None:
        """Write the folder; rank zero writes, after all have gathered the weights."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with averaged_weights(trainer, trainer.lightning_module):
            weights = self._gathered_weights(trainer)
            if trainer.is_global_zero:
                replace_folder(self._path, lambda folder: self._write(trainer, folder, weights))
        self.saved_in = str(self._path)

    def _write(self, trainer: Trainer, folder: Path, weights: dict[str, Tensor] | None) -> None:
        pl_module = trainer.lightning_module
        options: dict[str, Any] = {
            "class_names": data_class_names(trainer),
            "dtype": self.dtype,
            "figures": measured(trainer),
        }
        if isinstance(pl_module, ExportsPretrained):
            model = self._exported(pl_module)
        elif not self._name:
            return cast(WritesFolder, pl_module).write_folder(folder, **options)
        else:
            model = cast(PreTrainedModel, pl_module.get_submodule(self._name))
        write_model(
            folder,
            model,
            describe_training(pl_module, decoded=self.head == "dense" and isinstance(pl_module, ExportsPretrained)),
            state_dict=weights,
            tokenizer=data_tokenizer(trainer),
            end_token=self._ends.choose(data_tokenizer(trainer)),
            replaced=self._path,
            **options,
        )

    def _exported(self, pl_module: LightningModule) -> PreTrainedModel:
        """Return the model that the module makes of itself, and restore the training mode of each part."""
        modes = {name: module.training for name, module in pl_module.named_modules()}
        model: PreTrainedModel = cast(ExportsPretrained, pl_module).to_pretrained(self.head)
        for name, module in pl_module.named_modules():
            module.training = modes[name]
        return model

    def _gathered_weights(self, trainer: Trainer) -> dict[str, Tensor] | None:
        """Return the whole weights of a sharded model, or None if each rank holds them; all ranks must call this."""
        strategy = trainer.strategy
        if type(strategy).lightning_module_state_dict is Strategy.lightning_module_state_dict:
            return None
        prefix = f"{self._name}.".replace("_fsdp_wrapped_module.", "")  # state dicts do not name FSDP's wrapper
        state = strategy.lightning_module_state_dict()
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _model_name(pl_module: LightningModule) -> str:
    """Return the name of the trained model of transformers; "" if the module itself writes one of another kind."""
    name = trained_model_name(pl_module)
    if name is None and isinstance(pl_module, WritesFolder):
        return ""
    if name is None:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to hold a model of transformers with its output layer, such as"
            " AutoModelForCausalLM makes, but found none."
        )
    return name


def _check_whole(strategy: Strategy) -> None:
    in_pieces = getattr(strategy, "_state_dict_type", "full") == "sharded"
    in_pieces = in_pieces or getattr(strategy, "_save_distributed_checkpoint", False)
    if in_pieces or getattr(strategy, "zero_stage_3", False):
        raise ValueError(
            f"Expected a strategy that gathers whole weights, but got {type(strategy).__name__} that keeps them in"
            " pieces. Use FSDPStrategy(state_dict_type='full') or"
            " ModelParallelStrategy(save_distributed_checkpoint=False)."
        )
