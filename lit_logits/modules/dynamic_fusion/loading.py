"""The models of dynamic logit fusion: loaded, merged, and checked for one vocabulary.

Letters: V vocabulary.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_logits.functional.task_arithmetic import add_task_vectors
from lit_logits.modules.dynamic_fusion.adapters import (
    is_adapter_folder,
    load_adapted,
    merged_copy,
    without_adapters_of,
)
from lit_logits.modules.language_models.inspect import check_causal_lm, eos_token_ids, model_label, num_logits
from lit_logits.modules.language_models.loading import load_causal_lm
from lit_logits.modules.language_models.tokenizers import check_same_tokenizer, find_tokenizer

__all__ = ["FusionModels", "load_fusion_models"]

Model = nn.Module | str


class FusionModels(NamedTuple):
    """Result of `load_fusion_models`.

    Attributes:
        large: the model to specialise.
        base: small model, or None without experts.
        experts: fine-tuned from `base`.
        expert_names: one for each expert.
        vocab_size: V, the ids that all models have.
        tokenizer: of all models, if one was given or found.
        notes: sentences for the user's log.
    """

    large: PreTrainedModel
    base: PreTrainedModel | None
    experts: list[PreTrainedModel]
    expert_names: list[str]
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase | None
    notes: list[str]


def load_fusion_models(
    large: Model,
    base: Model | None = None,
    experts: Sequence[Model | Sequence[Model]] = (),
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    eos_token_id: int | list[int] | None = None,
    merge_weight: float = 0.5,
    large_kwargs: Mapping[str, Any] | None = None,
    small_kwargs: Mapping[str, Any] | None = None,
) -> FusionModels:
    """Load a large model, a small base and its experts, and check that their tokens are the same.

    Args:
        large: hub id, local folder, `.gguf` path, or a loaded causal language model.
        base: the same; needed with experts.
        experts: the same for each, or a folder of peft's adapters of `base`; adapters are merged into a copy. A list of
            several is merged into one expert by task arithmetic.
        tokenizer: of all models. The tokenizer beside each model that is given by name must agree with it; without it
            those are compared with each other.
        eos_token_id: ids that end a text; needed if the models' own differ.
        merge_weight: λ of the task vectors that are merged.
        large_kwargs: for `from_pretrained` of the large model, such as `dtype` and `device_map`.
        small_kwargs: the same for base and experts.

    Raises:
        ValueError: If a model cannot be loaded, vocabularies, tokenizers or end tokens disagree, or experts have no
            base.
    """
    if isinstance(experts, str | nn.Module) and not isinstance(experts, nn.ModuleList):
        raise ValueError(f"Expected `experts` to be a list of models, but got {model_label(experts)}.")
    if experts and base is None:
        raise ValueError(f"Expected `base`, which the {len(experts)} expert(s) were fine-tuned from, but got None.")
    loaded = _Loaded()
    large_model = loaded.load(large, "model", large_kwargs)
    base_model = None if base is None else loaded.load(without_adapters_of(base, experts), "base", small_kwargs)
    expert_models, names = [], []
    for number, expert in enumerate(experts):
        several = isinstance(expert, Sequence) and not isinstance(expert, str)
        if several:
            parts = list(cast(Sequence[Model], expert))
            merged = loaded.load_merged(parts, number, cast(PreTrainedModel, base_model), merge_weight, small_kwargs)
            expert_models.append(merged)
        else:
            parts = [cast(Model, expert)]
            expert_models.append(loaded.load(parts[0], f"experts[{number}]", small_kwargs))
        names.append(_name(parts, number))
    shared, known = loaded.agree(tokenizer)
    vocab_size, notes = _common_vocabulary(loaded.models, shared, known)
    notes += _format_notes(loaded.tokenizers)
    if eos_token_id is None:
        _check_eos(loaded.models)
    return FusionModels(large_model, base_model, expert_models, _unique(names), vocab_size, shared, notes)


class _Loaded:
    """The models loaded so far and the tokenizers found beside them, both by the label that errors use."""

    def __init__(self) -> None:
        self.models: dict[str, PreTrainedModel] = {}
        self.tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def load(self, model: Model, label: str, kwargs: Mapping[str, Any] | None) -> PreTrainedModel:
        """Load a model, and the tokenizer beside it if it is given by name."""
        if isinstance(model, str):
            found = find_tokenizer(model)
            if found is not None:
                self.tokenizers[label] = found
        base = self.models.get("base")
        if not isinstance(model, str):
            loaded = merged_copy(model, f"`{label}`")
        elif base is not None and is_adapter_folder(model):
            loaded = load_adapted(base, model, f"`{label}`")
        else:
            loaded = load_causal_lm(model, **(kwargs or {}))
        check_causal_lm(loaded, f"`{label}`")
        self.models[label] = cast(PreTrainedModel, loaded)
        return self.models[label]

    def load_merged(
        self,
        parts: Sequence[Model],
        number: int,
        base: PreTrainedModel,
        weight: float,
        kwargs: Mapping[str, Any] | None,
    ) -> PreTrainedModel:
        """Load several models and merge them into one expert, which takes their place."""
        if not parts:
            raise ValueError(
                f"Expected expert {number} to be a model or a list of models to merge, but got an empty list."
            )
        labels = [f"experts[{number}][{i}]" for i in range(len(parts))]
        models = [self.load(part, label, kwargs) for part, label in zip(parts, labels, strict=True)]
        _check_dense({"base": base, **dict(zip(labels, models, strict=True))})
        merged = _merge(base, models, weight)
        # Vocabulary and end tokens are compared once for the expert; its tokenizers are still all compared.
        for label in labels[1:]:
            del self.models[label]
        self.models[labels[0]] = merged
        return merged

    def agree(self, tokenizer: str | PreTrainedTokenizerBase | None) -> tuple[PreTrainedTokenizerBase | None, set[str]]:
        """Return the tokenizer of all models, and the labels of the models that are known to use it.

        If a tokenizer is given, the user says that all models use it; else only those with one of their own are known.
        """
        given = find_tokenizer(tokenizer, required=True) if isinstance(tokenizer, str) else tokenizer
        shared = given or next(iter(self.tokenizers.values()), None)
        reference = "`tokenizer`" if given is not None else f"`{next(iter(self.tokenizers), '')}`"
        for label, own in self.tokenizers.items():
            check_same_tokenizer(shared, own, reference, f"`{label}`")  # type: ignore[arg-type]
        return shared, set(self.models) if given is not None else self.models.keys() & self.tokenizers.keys()


def _check_dense(models: Mapping[str, PreTrainedModel]) -> None:
    for label, model in models.items():
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(
                f"Expected models whose weights can be added up, to merge experts, but `{label}` is quantised. Load it"
                " without `quantization_config`, or give the experts one by one."
            )


def _merge(base: PreTrainedModel, experts: list[PreTrainedModel], weight: float) -> PreTrainedModel:
    merged = deepcopy(experts[0])
    merged.load_state_dict(add_task_vectors(base.state_dict(), [expert.state_dict() for expert in experts], weight))
    return merged


def _name(parts: Sequence[Model], number: int) -> str:
    names = [Path(part).stem if part.endswith(".gguf") else Path(part).name for part in parts if isinstance(part, str)]
    return "+".join(names) if len(names) == len(parts) else f"expert_{number}"


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def _common_vocabulary(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None,
    known: set[str],
) -> tuple[int, list[str]]:
    """Return how many ids are fused, those that the tokenizer uses, and a note if output layers have more.

    Which are padding cannot be told without a tokenizer that is known to be of all models. Then all that there are
    count, and sizes must not differ.
    """
    sizes = {label: num_logits(model) for label, model in models.items()}
    smallest = min(sizes.values())
    listed = ", ".join(f"{label} {size}" for label, size in sizes.items())
    if tokenizer is not None and len(tokenizer) > smallest:
        raise ValueError(
            f"Expected every model to have logits for the {len(tokenizer)} tokens of the tokenizer, but their output"
            f" layers have: {listed}."
        )
    unknown = sorted(set(sizes) - known)
    if len(set(sizes.values())) > 1 and (tokenizer is None or unknown):
        raise ValueError(
            f"Expected models of one vocabulary, but their output layers have: {listed}. If the sizes differ by"
            " padding only, pass the `tokenizer` that all of them use."
        )
    if tokenizer is None or unknown:
        return smallest, []
    ids = [*tokenizer.get_vocab().values(), *(end for model in models.values() for end in eos_token_ids(model))]
    used = min(smallest, max(ids) + 1)
    if used == max(sizes.values()):
        return used, []
    return used, [
        f"Output layers are padded ({listed}): fused over the {used} ids that all have and the tokenizer uses."
    ]


def _format_notes(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> list[str]:
    """Return a note if models were trained with different chat templates: all of them read the same prompts."""
    templates = {label: str(own.chat_template) for label, own in tokenizers.items() if own.chat_template}
    if len(set(templates.values())) < 2:
        return []
    return [
        f"The chat templates of {', '.join(templates)} differ. All models read prompts in one format, the data's: train"
        " experts in that of the large model."
    ]


def _check_eos(models: dict[str, PreTrainedModel]) -> None:
    """Raise if models end a text with different tokens: the fused model could not tell where a text ends."""
    ends = {label: eos_token_ids(model) for label, model in models.items()}
    ends = {label: ids for label, ids in ends.items() if ids}
    if len({frozenset(ids) for ids in ends.values()}) > 1:
        listed = ", ".join(f"{label} {sorted(ids)}" for label, ids in ends.items())
        raise ValueError(
            f"Expected models that end a text with the same special token, but their `eos_token_id` are: {listed}. Pass"
            f" `eos_token_id`, one or a list such as {sorted(set().union(*ends.values()))}, to say where a text ends."
        )
