"""Classifiers of any origin: made from a name or a config, called with a batch, and their last linear layer found.

Letters: B batch, T sequence, C classes, d features.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from lit_logits.modules.dual_head_kd.batches import taken_inputs
from lit_logits.modules.dual_head_kd.weights import read_weights
from lit_logits.modules.language_models.inspect import is_encoder
from lit_logits.modules.language_models.loading import load_causal_lm, make_config
from lit_logits.modules.zoo import mobilenet, resnet, shufflenet, vgg, wrn

__all__ = [
    "MODEL_ZOO",
    "STUDENT_FILE",
    "HeadCall",
    "as_name",
    "check_not_compiled",
    "class_names_of",
    "classifier_logits",
    "find_classifier",
    "is_causal_lm",
    "load_classifier",
    "mark_multi_label",
    "tap_features",
    "zoo_name",
]

STUDENT_FILE = "student.pt"
"""Weights in the folder of a student that is not of transformers."""

MODEL_ZOO: dict[str, Callable[[int], nn.Module]] = {
    name: getattr(module, name)
    for module in (resnet, wrn, vgg, mobilenet, shufflenet)
    for name in module.__all__
    if name.islower()
}
"""Models for small images by the names of the literature's tables; each takes the number of classes."""


def load_classifier(
    model: nn.Module | str | dict[str, Any] | Path, num_classes: int | None = None, *, new_head: bool = False
) -> nn.Module:
    """Load or make a classifier or causal language model, in float32.

    Args:
        model: a module, which is returned as it is; a name of `MODEL_ZOO`, or a folder that `SavePretrained` wrote of
            one; a hub id or local folder of transformers; a `.gguf` file of a language model; or the config of a new
            transformers model as a mapping with `model_type`.
        num_classes: C of a new model, the vocabulary of a language model; a pretrained one keeps its own.
        new_head: give a pretrained classifier that lacks a last layer of `num_classes` outputs a new one, to be
            trained; otherwise that is an error.

    Raises:
        ValueError: If the name cannot be loaded, a mapping has no `model_type`, `num_classes` is missing, pretrained
            weights lack the last layer, or a layer has no size yet.

    Example:
        >>> load_classifier("resnet8", num_classes=10).fc
        Linear(in_features=64, out_features=10, bias=True)
    """
    if isinstance(model, nn.Module):
        _check_has_sizes(model)
        return model
    if isinstance(model, dict):
        return _from_config(model, num_classes)
    name: str = as_name(model)
    if name in MODEL_ZOO:
        if num_classes is None:
            raise ValueError(f"Expected `num_classes` for the new model {name!r}, but got None.")
        return MODEL_ZOO[name](num_classes)
    if name.endswith(".gguf"):
        return load_causal_lm(name)
    path = os.path.expanduser(name)
    if Path(path, STUDENT_FILE).is_file():
        return _from_folder(Path(path), num_classes)
    try:
        config = _with_architectures(AutoConfig.from_pretrained(path))
        model_class = _class_for(config)
        kwargs: dict[str, Any] = {}
        if new_head and num_classes is not None and model_class is not transformers.AutoModelForCausalLM:
            config.num_labels, kwargs = num_classes, {"ignore_mismatched_sizes": True}
        loaded, info = model_class.from_pretrained(
            path, config=config, dtype="float32", output_loading_info=True, **kwargs
        )
        if info["missing_keys"] and not new_head:
            raise ValueError(f"its weights lack {sorted(info['missing_keys'])[:3]}, which would be random")
        return loaded
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected a module, one of {sorted(MODEL_ZOO)}, a hub id, a local folder or a mapping with `model_type`,"
            f" but got {name!r}, which could not be loaded: {error}"
        ) from error


def as_name(model: Any) -> Any:
    """Return a path as a string, which a checkpoint may hold, and anything else as it is."""
    return str(model) if isinstance(model, Path) else model


def is_causal_lm(model: nn.Module) -> bool:
    """Return whether `model` predicts next tokens: a transformers model that generates and has no encoder."""
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return False
    return model.can_generate() and isinstance(model.get_output_embeddings(), nn.Module)


def classifier_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of any classifier, of the inputs that its forward takes, see `taken_inputs`.

    Raises:
        TypeError: If the output is neither a tensor, nor has `logits`, nor is a tuple that starts with a tensor; or the
            forward takes none of the inputs.
    """
    by_position, by_keyword = taken_inputs(model, inputs)
    output = model(*by_position, **by_keyword)
    logits = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
    logits = getattr(logits, "logits", logits)
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    if not isinstance(logits, Tensor):
        raise TypeError(f"Expected {type(model).__name__} to return logits, but got {type(output).__name__}.")
    return logits


def find_classifier(model: nn.Module, name: str | None = None, *, num_classes: int | None = None) -> str:
    """Find the dotted name of the linear layer that gives the logits.

    Without `name` it is the layer that transformers' `get_output_embeddings` or timm's `get_classifier` returns, else
    the only linear layer of `num_classes` outputs (default: those of the last layer).

    Raises:
        ValueError: If `name` is not a linear layer, the model has none, or several fit.

    Example:
        >>> find_classifier(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        '2'
    """
    linears = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    owner = type(model).__name__
    if not linears:
        raise ValueError(
            f"Expected a classifier whose last layer is an nn.Linear, but {owner} has none. Distillation reads the"
            " features before it: replace a 1 × 1 convolution by pooling and an nn.Linear."
        )
    if name is not None:
        if name not in linears:
            raise ValueError(
                f"Expected `classifier` to name an nn.Linear of {owner}, such as {_listed(linears)}, but got {name!r}."
            )
        return name
    for getter in ("get_output_embeddings", "get_classifier"):
        told = getattr(model, getter)() if hasattr(model, getter) else None
        if hasattr(told, "packed_codes"):
            raise ValueError(
                f"Expected a student whose output layer is an nn.Linear, but that of {owner} is compressed. Distil into"
                " the original model and compress it afterwards; as a teacher it is welcome."
            )
        for key, module in linears.items():
            if module is told:
                return key
    outputs = num_classes if num_classes is not None else list(linears.values())[-1].out_features
    candidates = {key: module for key, module in linears.items() if module.out_features == outputs}
    if len(candidates) == 1:
        return next(iter(candidates))
    found = f"several: {_listed(candidates)}" if candidates else f"none; it has {_listed(linears)}"
    raise ValueError(
        f"Expected one nn.Linear of {outputs} outputs in {owner}, but found {found}. Pass the dotted name of the"
        " classification layer as `classifier`, or the right `num_classes`."
    )


class HeadCall(NamedTuple):
    """A call of a head.

    Attributes:
        features: its input.
        outputs: what it gave.
        version: how often that had been changed in place by then, or None in inference mode, which does not count.
    """

    features: Tensor
    outputs: Tensor
    version: int | None

    def gave(self, logits: Tensor) -> bool:
        """Return whether `logits` are the outputs, as they were; values are compared if they are another tensor."""
        if _version(self.outputs) != self.version:
            return False
        if logits is self.outputs:
            return True
        outputs = self.outputs.to(logits.dtype)  # autocast's, in a model that returns float32
        return outputs.shape == logits.shape and torch.allclose(outputs, logits, rtol=0, atol=0, equal_nan=True)


@contextmanager
def tap_features(linear: nn.Linear) -> Iterator[list[HeadCall]]:
    """Collect every call of `linear` within the context.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with tap_features(layer) as calls:
        ...     _ = layer(torch.zeros(1, 2))
        >>> calls[0].features.shape
        torch.Size([1, 2])
    """
    calls: list[HeadCall] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        calls.append(HeadCall(args[0] if args else kwargs["input"], output, _version(output)))

    handle = linear.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _from_config(settings: dict[str, Any], num_classes: int | None) -> nn.Module:
    model_class = _class_for(make_config(settings))
    if num_classes is not None:
        key = "vocab_size" if model_class is transformers.AutoModelForCausalLM else "num_labels"
        if settings.get(key, num_classes) != num_classes:
            raise ValueError(f"Expected `{key}` to be `num_classes` = {num_classes}, but got {settings[key]}.")
        settings = {**settings, key: num_classes}
    return model_class.from_config(_with_architectures(make_config(settings)))


def _with_architectures(config: Any) -> Any:
    """Return a config that names some; where a type has several models for a task, transformers reads the list."""
    config.architectures = config.architectures or []
    return config


def check_not_compiled(student: nn.Module) -> None:
    """Refuse a student inside the wrapper of `torch.compile`, which hides its class, its names and its last layer.

    Raises:
        ValueError: If it is.
    """
    if hasattr(student, "_orig_mod"):
        raise ValueError(
            f"Expected a student that is not compiled yet, but got {type(student._orig_mod).__name__} inside"
            " `torch.compile`. Pass the module itself, and call `model.net.compile()` on the DualHeadKD."
        )


def mark_multi_label(student: nn.Module) -> None:
    """Let the config of a transformers student say that its classes do not exclude each other, as pipelines read."""
    if isinstance(student, PreTrainedModel):
        student.config.problem_type = "multi_label_classification"


def _check_has_sizes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(
                f"Expected a model whose layers have their sizes, but `{name}` ({type(module).__name__}) of"
                f" {type(model).__name__} has none yet. Call the model once on a batch, and pass it then."
            )


def zoo_name(model: Any) -> str | None:
    """Return the name of the model of `MODEL_ZOO` that a name, or a folder of `SavePretrained`, stands for, or None."""
    folder = Path(os.path.expanduser(model)) if isinstance(model, str) else None
    if folder is not None and (folder / STUDENT_FILE).is_file():
        model = _settings(folder)["model"]
    return model if isinstance(model, str) and model in MODEL_ZOO else None


def class_names_of(model: nn.Module, given: Any) -> list[str] | None:
    """Return the names of a model's classes in the order of its outputs, or None where it does not tell them.

    Args:
        model: the loaded model.
        given: what it was loaded from, such as a folder of `SavePretrained`.
    """
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    folder = Path(os.path.expanduser(given)) if isinstance(given, str | Path) else None
    if id2label is None and folder is not None and (folder / STUDENT_FILE).is_file():
        id2label = _settings(folder).get("id2label")
    if not id2label:
        return None
    names = [str(name) for _, name in sorted((int(number), name) for number, name in id2label.items())]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def _settings(folder: Path) -> dict[str, Any]:
    """Return what `write_folder` wrote of a student."""
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return {**settings, "model": str(settings["model"]), "num_classes": int(settings["num_classes"])}
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"Expected {file} to tell `model` and `num_classes`, but got: {error!r}.") from error


def _from_folder(folder: Path, num_classes: int | None) -> nn.Module:
    settings, name = _settings(folder), zoo_name(str(folder))
    if name is None or num_classes not in (None, settings["num_classes"]):
        asked = "" if num_classes is None else f" with {num_classes} classes"
        raise ValueError(
            f"Expected the folder of one of {sorted(MODEL_ZOO)}{asked}, but {folder} holds {settings['model']!r} with"
            f" {settings['num_classes']}. Make a model of another class yourself, and read {STUDENT_FILE} with its"
            " `load_state_dict`."
        )
    model = MODEL_ZOO[name](settings["num_classes"])
    model.load_state_dict(read_weights(folder / STUDENT_FILE))
    return model


def _class_for(config: Any) -> Any:
    """Return the auto class of a config: by its `architectures` if it names them, else by its type.

    A type may serve several tasks; image classifiers come first, then decoders, then sequence classifiers.
    """
    known = (getattr(config, "architectures", None) or [""])[0]
    for suffix, auto_class in (
        ("ForImageClassification", transformers.AutoModelForImageClassification),
        ("ForSequenceClassification", transformers.AutoModelForSequenceClassification),
        ("ForCausalLM", transformers.AutoModelForCausalLM),
        ("LMHeadModel", transformers.AutoModelForCausalLM),
    ):
        if known.endswith(suffix):
            return auto_class
    if type(config) in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForImageClassification
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and not is_encoder(config):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


def _listed(linears: Mapping[str, nn.Linear], most: int = 6) -> str:
    """Return the last few layers with their numbers of outputs, for errors."""
    shown = [f"`{key}` ({module.out_features})" for key, module in linears.items()]
    return ", ".join((["..."] if len(shown) > most else []) + shown[-most:])
