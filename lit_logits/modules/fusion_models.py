"""The models of dynamic logit fusion: loaded, merged, and held to one vocabulary.

Letters: V vocabulary.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lit_logits.functional import add_task_vectors
from lit_logits.modules.backbone import load_causal_lm

__all__ = [
    "FusionModels",
    "check_causal_lm",
    "check_same_tokenizer",
    "digest_model",
    "eos_token_ids",
    "find_tokenizer",
    "load_fusion_models",
    "num_logits",
]

Model = nn.Module | str


class FusionModels(NamedTuple):
    """Result of `load_fusion_models`.

    Attributes:
        large: the model to specialise.
        base: small model, or None where there are no experts.
        experts: fine-tuned from `base`.
        expert_names: one for each expert.
        vocab_size: V, the ids that all have.
        tokenizer: theirs, where one was given or found.
        notes: what a user should know about them.

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
    """Load a large model, a small base and its experts, and see that their tokens are the same.

    Args:
        large: hub id, local folder, `.gguf` path, or a loaded causal language model.
        base: the same; needed where there are experts.
        experts: the same for each; a list of several is merged into one expert by task arithmetic.
        tokenizer: of all models. Each model that is given by name is held to it by its own tokenizer; without it those
            are compared with each other.
        eos_token_id: ids that end a text; needed where the models' own differ.
        merge_weight: λ of the task vectors that are merged.
        large_kwargs: for `from_pretrained` of the large model, such as `dtype` and `device_map`.
        small_kwargs: the same for base and experts.

    Raises:
        ValueError: for models that cannot be loaded, vocabularies, tokenizers or end tokens that disagree, or experts
            without a base.

    """
    if isinstance(experts, str | nn.Module) and not isinstance(experts, nn.ModuleList):
        raise ValueError(f"Expected `experts` to be a list of models, but got {_said(experts)}.")
    if experts and base is None:
        raise ValueError(f"Expected `base`, which the {len(experts)} expert(s) were fine-tuned from, but got None.")
    notes: list[str] = []
    own_tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    loaded: dict[str, PreTrainedModel] = {}

    def load(model: Model, label: str, kwargs: Mapping[str, Any] | None) -> PreTrainedModel:
        if isinstance(model, str):
            found = find_tokenizer(model)
            if found is not None:
                own_tokenizers[label] = found
        loaded[label] = _load(model, label, kwargs)
        return loaded[label]

    large_model = load(large, "model", large_kwargs)
    base_model = None if base is None else load(base, "base", small_kwargs)
    expert_models, names = [], []
    for number, expert in enumerate(experts):
        several = isinstance(expert, Sequence) and not isinstance(expert, str)
        parts = list(cast(Sequence[Model], expert)) if several else [cast(Model, expert)]
        if not parts:
            raise ValueError(
                f"Expected expert {number} to be a model or a list of models to merge, but got an empty list."
            )
        labels = [f"experts[{number}]" + (f"[{i}]" if several else "") for i in range(len(parts))]
        models = [load(part, label, small_kwargs) for part, label in zip(parts, labels, strict=True)]
        if several:
            assert base_model is not None
            expert_models.append(_merge(base_model, models, merge_weight))
            loaded[labels[0]] = expert_models[-1]  # the parts are done with
            for label in labels[1:]:
                del loaded[label]
        else:
            expert_models.append(models[0])
        names.append(_name(parts, number))
    given = find_tokenizer(tokenizer, required=True) if isinstance(tokenizer, str) else tokenizer
    shared = given or next(iter(own_tokenizers.values()), None)
    reference = "`tokenizer`" if given is not None else f"`{next(iter(own_tokenizers), '')}`"
    for label, own in own_tokenizers.items():
        check_same_tokenizer(shared, own, reference, f"`{label}`")  # type: ignore[arg-type]
    known = set(loaded) if given is not None else {label for label in loaded if label in own_tokenizers}
    vocab_size = _common_vocabulary(loaded, shared, known, notes)
    if eos_token_id is None:
        _check_eos(loaded)
    return FusionModels(large_model, base_model, expert_models, _unique(names), vocab_size, shared, notes)


def find_tokenizer(name: str, *, required: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model: of a hub id, a local folder or a `.gguf` file; None if there is none.

    Raises:
        ValueError: if there is none and it is `required`.

    """
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:  # of a damaged file, whatever its parser stumbles over
        if required:
            raise ValueError(
                f"Expected `tokenizer` to be a hub id, a local folder or a .gguf file, but got {name!r}: {error}"
            ) from error
        return None


def check_same_tokenizer(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str, other_name: str
) -> None:
    """Raise unless both give every token the same id.

    Raises:
        ValueError: with the first token, special ones first, that has two ids or that one of them lacks.

    """
    first, second = one.get_vocab(), other.get_vocab()
    if first == second:
        return
    different = [token for token in first.keys() | second.keys() if first.get(token) != second.get(token)]
    special = {*one.all_special_tokens, *other.all_special_tokens}
    token = min(different, key=lambda token: (token not in special, first.get(token, second.get(token)), token))
    kind = "special token" if token in special else "token"
    raise ValueError(
        f"Expected {name} and {other_name} to have one tokenizer, because logits are added id by id, but the {kind}"
        f" {token!r} has id {first.get(token)} in the one and {second.get(token)} in the other ({len(different)}"
        " tokens differ). Use models of one family."
    )


def eos_token_ids(model: PreTrainedModel) -> set[int]:
    """Ids that end the model's texts; empty where it does not say."""
    config = model.generation_config
    ids = config.eos_token_id if config is not None else None
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    return set() if ids is None else {int(i) for i in (ids if isinstance(ids, list) else [ids])}


def digest_model(model: PreTrainedModel) -> str:
    """A name for the model: 16 hexadecimal digits from its config and up to 64 values of each tensor."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":  # accelerate keeps these weights elsewhere
            values = tensor.flatten()[:: max(1, tensor.numel() // 64)]
            sha.update(values.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def check_causal_lm(model: Any, label: str) -> None:
    """Raise unless `model`, called `label` in the error, is a decoder of transformers with its output layer.

    Raises:
        ValueError: if it is not.

    """
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(
            f"Expected {label} to be a causal language model of transformers, or the name of one, but got"
            f" {_said(model)}."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"Expected {label} to be decoder-only, but {type(model).__name__} has an encoder.")


def _load(model: Model, label: str, kwargs: Mapping[str, Any] | None) -> PreTrainedModel:
    loaded = load_causal_lm(model, **(kwargs or {})) if isinstance(model, str) else model
    check_causal_lm(loaded, f"`{label}`")
    return cast(PreTrainedModel, loaded)


def _merge(base: PreTrainedModel, experts: list[PreTrainedModel], weight: float) -> PreTrainedModel:
    merged = deepcopy(experts[0])
    merged.load_state_dict(add_task_vectors(base.state_dict(), [expert.state_dict() for expert in experts], weight))
    return merged


def _said(model: Any) -> str:
    return repr(model) if isinstance(model, str) else type(model).__name__


def _name(parts: Sequence[Model], number: int) -> str:
    names = [Path(part).stem if part.endswith(".gguf") else Path(part).name for part in parts if isinstance(part, str)]
    return "+".join(names) if len(names) == len(parts) else f"expert_{number}"


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def num_logits(model: PreTrainedModel) -> int:
    """Rows of the output layer, padding included."""
    return model.get_output_embeddings().weight.shape[0]


def _common_vocabulary(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None,
    known: set[str],
    notes: list[str],
) -> int:
    """The ids that all models have; sizes may differ by padding only, which a tokenizer must tell."""
    sizes = {label: num_logits(model) for label, model in models.items()}
    smallest = min(sizes.values())
    listed = ", ".join(f"{label} {size}" for label, size in sizes.items())
    if tokenizer is not None and len(tokenizer) > smallest:
        raise ValueError(
            f"Expected every model to have logits for the {len(tokenizer)} tokens of the tokenizer, but their output"
            f" layers have: {listed}."
        )
    if len(set(sizes.values())) > 1:
        unknown = sorted(set(sizes) - known)
        if tokenizer is None or unknown:
            raise ValueError(
                f"Expected models of one vocabulary, but their output layers have: {listed}. If the sizes differ by"
                " padding only, pass the `tokenizer` that all of them use."
            )
        notes.append(
            f"Output layers differ in size ({listed}): fused over the {smallest} ids that all have, of which the"
            f" tokenizer uses {len(tokenizer)}."
        )
    return smallest


def _check_eos(models: dict[str, PreTrainedModel]) -> None:
    ends = {label: eos_token_ids(model) for label, model in models.items()}
    ends = {label: ids for label, ids in ends.items() if ids}
    if len({frozenset(ids) for ids in ends.values()}) > 1:
        listed = ", ".join(f"{label} {sorted(ids)}" for label, ids in ends.items())
        raise ValueError(
            f"Expected models that end a text with the same special token, but their `eos_token_id` are: {listed}. Pass"
            f" `eos_token_id`, one or a list such as {sorted(set().union(*ends.values()))}, to say where a text ends."
        )
