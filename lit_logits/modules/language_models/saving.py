"""Writing of models: a folder, or a file of weights."""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedModel

from lit_logits.contracts import DescribesItself, HasClassNames, offers
from lit_logits.contracts.checks import data_tokenizer
from lit_logits.modules.language_models.card import write_card
from lit_logits.modules.language_models.end_tokens import EndTokens
from lit_logits.modules.language_models.lora import merged_state_dict, save_merged
from lit_logits.modules.language_models.version_4 import rename_tokenizer_settings, rotary_settings
from lit_logits.storage.folders import check_model_folder, replace_file, replace_folder

__all__ = [
    "PushesToHub",
    "describe_training",
    "measured",
    "save_any_generation_config",
    "save_model_file",
    "save_model_folder",
    "take_special_ids",
    "write_model",
]

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class PushesToHub:
    """A LightningModule with `save_pretrained` that can send what it saves to the Hugging Face hub."""

    save_pretrained: Callable[..., Any]

    @cached_property
    def end_tokens(self) -> EndTokens:
        """How the first texts of the training end, for `save_pretrained`."""
        return EndTokens()

    def push_to_hub(
        self,
        repo_id: str,
        *args: Any,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Model saved by lit-logits",
        **kwargs: Any,
    ) -> str | None:
        """Save the model, and upload the folder as one commit; rank zero does.

        Args:
            repo_id: `user/name` of the repository, which is made if it is not there.
            *args: of `save_pretrained`, after the folder.
            private: whether a new repository is private; default that of the account.
            token: of the hub; default that of `hf auth login`.
            commit_message: of the commit.
            **kwargs: of `save_pretrained`.

        Returns:
            The address of the commit; None on other ranks.

        Raises:
            ValueError: If `save_pretrained` refuses; nothing is uploaded then.
        """
        with TemporaryDirectory() as folder:
            path = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(path, *args, **kwargs)
            if getattr(self, "global_rank", 0) != 0:
                return None
            api = HfApi(token=token)
            repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(repo_id=repository, folder_path=path, commit_message=commit_message)
        return str(commit.commit_url)


def save_model_folder(
    folder: str | Path,
    model: PreTrainedModel,
    summary: str,
    *,
    tokenizer: Any = None,
    trainer: Any = None,
    dtype: torch.dtype | None = None,
    end_tokens: EndTokens | None = None,
) -> Path:
    """Write a folder for `from_pretrained`, as a whole or not at all; rank zero writes and the others wait.

    Args:
        folder: new, empty, or a saved model, which is replaced.
        model: of transformers.
        summary: sentences for its card on what was done to it.
        tokenizer: saved with it; default the data module's, if a trainer is attached and has one.
        trainer: of Lightning, or None; the card gets what it measured.
        dtype: of the saved weights; default theirs.
        end_tokens: how the texts that the model was trained on end; default by the tokenizer's eos.

    Returns:
        The folder's full path.

    Raises:
        ValueError: If the folder holds anything but a saved model; nothing is written then.
    """
    path = Path(folder).expanduser().resolve()
    check_model_folder(path)
    tokenizer = data_tokenizer(trainer) if tokenizer is None else tokenizer

    def write(target: Path) -> None:
        options: dict[str, Any] = {"tokenizer": tokenizer, "dtype": dtype, "figures": measured(trainer)}
        if trainer is not None and offers(trainer.datamodule, HasClassNames):
            options["class_names"] = trainer.datamodule.class_names
        end_token = None if end_tokens is None else end_tokens.choose(tokenizer)
        write_model(target, model, summary, end_token=end_token, replaced=path, **options)

    _on_rank_zero(trainer, path, partial(replace_folder, path, write))
    return path


def write_model(
    folder: Path,
    model: PreTrainedModel,
    summary: str,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    end_token: int | None = None,
    figures: Mapping[str, float] | None = None,
    class_names: Sequence[str] | None = None,
    replaced: Path | None = None,
) -> None:
    """Write weights, configs, tokenizer and card of a model: all that a saved folder holds.

    Adapters are merged into the weights. The tokenizer's bos, eos and pad ids are written into both configs, as texts
    end with its tokens whatever the architecture's defaults are; a list of eos ids stays if it holds the right one.

    Args:
        folder: to write to.
        model: of transformers; stays as it is.
        summary: see `write_card`, as `figures` and `replaced`.
        state_dict: the weights, if a strategy gathered them; None takes the model's.
        tokenizer: of the model's tokens. A warning tells if a language model gets none.
        dtype: of the saved weights; default theirs.
        end_token: that of the texts that the model was trained on, in place of the tokenizer's eos.
        figures: measured values by name.
        class_names: of the data, for a classifier of as many classes.
        replaced: folder that this one will replace.
    """
    if dtype is not None:
        state_dict = _cast(merged_state_dict(model, state_dict), dtype)
    save_any_generation_config(model, partial(save_merged, model, folder, state_dict), folder)
    has_tokenizer = tokenizer is not None and hasattr(tokenizer, "save_pretrained")
    if has_tokenizer:
        tokenizer.save_pretrained(folder)
        rename_tokenizer_settings(folder)
    elif model.can_generate():
        warnings.warn(
            "The model is saved without a tokenizer, and with the end tokens of its config: pass `tokenizer`, or let"
            " the data module have one, so that the folder reads and ends texts by itself.",
            stacklevel=2,
        )
    _write_configs(folder, model, tokenizer if has_tokenizer else None, dtype, end_token)
    if class_names is not None and not model.can_generate() and len(class_names) == model.config.num_labels:
        _write_class_names(folder / "config.json", class_names)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors' 0600 locks out a server of another user
    write_card(folder, model, summary, figures=figures, replaced=replaced)


def take_special_ids(model: PreTrainedModel, tokenizer: Any, end_tokens: EndTokens) -> None:
    """Put the ids that `write_model` writes into the configs of a model, which are its own."""
    end_token = end_tokens.choose(tokenizer)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            for name, value in _special_ids(config, tokenizer, end_token).items():
                setattr(config, name, value)


def measured(trainer: Any) -> dict[str, float]:
    """Return what a trainer's last validation and test logged, and the step; only finite values."""
    if trainer is None:
        return {}
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    kept = {
        name: value for name, value in logged.items() if name.startswith(("val/", "test/")) and math.isfinite(value)
    }
    return {**kept, "step": trainer.global_step} if kept else {}


def describe_training(module: object, *, decoded: bool = False) -> str:
    """Return what a LightningModule says for the card of its model, or its class.

    Args:
        module: which made the model.
        decoded: whether the model holds the rows that codes stand for, in place of the codes.
    """
    if offers(module, DescribesItself):
        note = " In this folder the codes are decoded: the tables are dense, and as large as the original's."
        return module.card_text + (note if decoded else "")
    return f"Trained in Lightning, as part of `{type(module).__name__}`."


def save_model_file(path: str | Path, save: Callable[[Path], object], *, trainer: Any = None) -> Path:
    """Write a file, as a whole or not at all; rank zero writes and the others wait.

    Args:
        path: the file, which is replaced if it is there.
        save: writes the file that it is given.
        trainer: of Lightning, or None.

    Returns:
        The file's full path.
    """
    path = Path(path).expanduser().resolve()
    _on_rank_zero(trainer, path, partial(replace_file, path, save))
    return path


def _on_rank_zero(trainer: Any, path: Path, write: Callable[[], None]) -> None:
    if trainer is None or trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    if trainer is not None:  # other ranks may read the files as soon as they return
        trainer.strategy.barrier()


def _cast(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return floats in another dtype; tensors that were one stay one, as saving looks for tied weights by it."""
    made: dict[Any, Tensor] = {}
    return {
        name: made.setdefault((value.data_ptr(), value.shape, value.stride()), value.to(dtype))
        if value.is_floating_point()
        else value
        for name, value in state_dict.items()
    }


def save_any_generation_config(model: PreTrainedModel, save: Callable[[], None], folder: Path) -> None:
    """Save a model whose generation config transformers may refuse to write, though it has read it.

    Published ones have a `temperature` without `do_sample`. Some versions refuse them, and others only if changed.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return save()
    model.generation_config = type(config)()
    try:
        save()
    finally:
        model.generation_config = config
    (folder / "generation_config.json").write_text(config.to_json_string(), encoding="utf-8")


def _write_configs(
    folder: Path, model: PreTrainedModel, tokenizer: Any, dtype: torch.dtype | None, end_token: int | None
) -> None:
    """Put the tokenizer's ids, the dtype and old names into the configs that `save_pretrained` has written.

    Into the files, so that the model stays as it is.
    """
    for name, config in (("config", model.config), ("generation_config", getattr(model, "generation_config", None))):
        path = folder / f"{name}.json"
        if config is None or not path.is_file():
            continue
        written = json.loads(path.read_text(encoding="utf-8"))
        written.update({**_special_ids(config, tokenizer, end_token), **rotary_settings(config)})
        if dtype is not None and name == "config":
            written["dtype"] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_class_names(path: Path, class_names: Sequence[str]) -> None:
    written = json.loads(path.read_text(encoding="utf-8"))
    written["id2label"] = {str(number): name for number, name in enumerate(class_names)}
    written["label2id"] = {name: number for number, name in enumerate(class_names)}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _special_ids(config: Any, tokenizer: Any, end_token: int | None) -> dict[str, int]:
    ids = {}
    for name in _SPECIAL_IDS:
        token, known = getattr(tokenizer, name, None), getattr(config, name, None)
        if name == "eos_token_id" and end_token is not None:
            token = end_token
        if token is not None and not (isinstance(known, list) and token in known):
            ids[name] = token
    return ids
