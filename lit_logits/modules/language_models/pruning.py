"""Smaller models out of large ones: a decoder that keeps some of its layers.

Letters: L layers.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["cut_layers", "keep_layers", "spread_layers"]

_BY_NUMBER = "scale_attn_by_inverse_layer_idx"  # of GPT-2; old versions of transformers read it in each forward
_PLAIN = (bool, int, float, str, type(None))


def cut_layers(
    model: PreTrainedModel, keep: Sequence[int] | None = None, num_layers: int | None = None
) -> PreTrainedModel:
    """Return a copy of a model with some of its layers, told in one of two ways; the model itself if in none.

    Args:
        model: of L layers.
        keep: their numbers, see `keep_layers`.
        num_layers: how many, see `spread_layers`.

    Raises:
        ValueError: If both are given, or either does not fit the model.
    """
    if keep is not None and num_layers is not None:
        raise ValueError(
            f"Expected `keep_layers` or `num_layers`, but got both: {list(keep)} and {num_layers}. Leave one out."
        )
    if num_layers is not None:
        keep = spread_layers(num_layers, len(_find_list(model)[1]))
    return model if keep is None else keep_layers(model, keep)


def spread_layers(num_kept: int, num_layers: int) -> list[int]:
    """Return the numbers of layers that are evenly spread, the first and the last among them; one is the first.

    Raises:
        ValueError: If there are fewer layers, or none is to be kept.

    Example:
        >>> spread_layers(5, 30)
        [0, 7, 14, 22, 29]
    """
    if not 1 <= num_kept <= num_layers:
        raise ValueError(f"Expected `num_layers` to be in [1, {num_layers}], the layers there are, but got {num_kept}.")
    return [round(place * (num_layers - 1) / max(1, num_kept - 1)) for place in range(num_kept)]


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a copy of a decoder that has only some of its layers; the model itself stays as it is.

    The config follows, lists with an entry for each layer included, and so do the numbers by which layers find their
    key–value cache: what is saved loads in plain transformers. Dropped layers are not copied on the way.

    Args:
        model: of transformers, whose L layers stand in one `nn.ModuleList`.
        layers: numbers from 0, in rising order.

    Raises:
        ValueError: If the model does not have these layers, its layers stand otherwise, or what a layer does would
            change with its number, so that the config could not say what the copy is.

    Example:
        >>> from lit_logits.modules import new_causal_lm
        >>> model = new_causal_lm({"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9,
        ...     "num_attention_heads": 2, "num_hidden_layers": 6})
        >>> small = keep_layers(model, [0, 2, 5])
        >>> small.config.num_hidden_layers, small.num_parameters() < model.num_parameters()
        (3, True)
    """
    name, found = _find_list(model)
    _check_numbers(layers, len(found))
    if getattr(model.config, _BY_NUMBER, False) and list(layers) != list(range(len(layers))):
        raise ValueError(
            f"Expected layers of {type(model).__name__} that do the same wherever they stand, but with `{_BY_NUMBER}`"
            " the `scaling` of a layer goes by its number. Keep the first layers, or take another model."
        )
    # `deepcopy` takes what its memo holds as copied already: the list is copied as an empty one, its layers after it,
    # and what they share with the rest of the model stays shared.
    memo: dict[int, Any] = {id(found): nn.ModuleList()}
    small = copy.deepcopy(model, memo)
    cast(nn.ModuleList, small.get_submodule(name)).extend(copy.deepcopy(found[number], memo) for number in layers)
    _cut_config(small.config, layers, len(found))
    _renumber(small, name, layers)
    return small


def _find_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return name and list of the layers: the one list with as many modules as the config has layers."""
    size = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    found = {name: part for name, part in lists.items() if len(part) == size and not _is_inside(name, lists)}
    if len(found) != 1:
        raise ValueError(
            f"Expected a model whose {size} layers stand in one list, to keep some of them, but"
            f" {type(model).__name__} has {len(found)} lists of as many: {sorted(found)}. Take a model of one stack of"
            " layers, such as a Llama."
        )
    return next(iter(found.items()))


def _is_inside(name: str, lists: dict[str, nn.ModuleList]) -> bool:
    """Return whether a list is part of another one, as the experts of a layer are."""
    return any(name.startswith(f"{other}.") for other in lists)


def _check_numbers(layers: Sequence[int], num_layers: int) -> None:
    numbers = list(layers)
    is_rising = all(before < after for before, after in pairwise(numbers))
    if not numbers or not is_rising or not 0 <= numbers[0] <= numbers[-1] < num_layers:
        raise ValueError(
            f"Expected `keep_layers` to be numbers in [0, {num_layers}) in rising order, but got {numbers}."
        )


def _cut_config(config: Any, layers: Sequence[int], num_layers: int) -> None:
    """Let a config tell of the kept layers alone."""
    text = config.get_text_config()
    for name, value in vars(text).items():
        is_list = isinstance(value, list | tuple) and len(value) == num_layers
        if is_list and "token" not in name and name != "architectures":  # several end tokens are no layers
            setattr(text, name, type(value)(value[number] for number in layers))
    if getattr(text, "attention_types", None):  # of GPT-Neo, from which its config makes the list of kinds anew
        text.attention_types = [[[kind], 1] for kind in text.attention_layers]
    text.num_hidden_layers = len(layers)


def _renumber(model: PreTrainedModel, name: str, layers: Sequence[int]) -> None:
    """Give the layers their new numbers, and raise unless they then are what the config makes."""
    kept = cast(nn.ModuleList, model.get_submodule(name))
    made = cast(nn.ModuleList, _skeleton(model).get_submodule(name))
    for new, old in enumerate(layers):
        for own, theirs in zip(_parts(kept[new]), _parts(made[new]), strict=False):
            for attribute, value in _settings(theirs).items():
                mine = getattr(own, attribute, None)
                if "layer" in attribute and type(mine) is type(value) is int and mine - old == value - new:
                    setattr(own, attribute, value)
        if problem := _difference(kept[new], made[new]):
            raise ValueError(
                f"Expected layers of {type(model).__name__} that do the same wherever they stand, but layer {old} as"
                f" number {new} would have {problem}. Choose other layers to keep, whose kinds follow one another as"
                " in the whole model."
            )


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Return what plain transformers makes of the config once it is saved, without weights.

    Raises:
        ValueError: If its config class refuses it.
    """
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            return type(model)(config)
    except Exception as error:  # each architecture checks its config in its own way
        raise ValueError(
            f"Expected a model whose config can tell of fewer layers, but that of {type(model).__name__} refuses:"
            f" {error}"
        ) from error


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    return (part for _, part in sorted(layer.named_modules()))


def _settings(part: nn.Module) -> dict[str, Any]:
    """Return what a module does by plain values: sizes, kinds, windows, numbers."""
    own = {name: value for name, value in vars(part).items() if isinstance(value, _PLAIN) and name[0] != "_"}
    return {name: value for name, value in own.items() if name != "training"}


def _difference(one: nn.Module, other: nn.Module) -> str:
    """Return in what two layers differ, weights aside: '' if in nothing."""
    names = [sorted((name, type(part).__name__) for name, part in layer.named_modules()) for layer in (one, other)]
    if names[0] != names[1]:
        return f"other parts, {sorted(set(names[1]) - set(names[0]))}"
    shapes = [{name: tuple(value.shape) for name, value in layer.state_dict().items()} for layer in (one, other)]
    for name in shapes[0].keys() | shapes[1].keys():
        if shapes[0].get(name) != shapes[1].get(name):
            return f"`{name}` of shape {shapes[1].get(name)} in place of {shapes[0].get(name)}"
    for mine, theirs in zip(_parts(one), _parts(other), strict=True):
        own, made = _settings(mine), _settings(theirs)
        for name in own.keys() & made.keys():
            if own[name] != made[name]:
                return f"`{name}` {made[name]!r} in place of {own[name]!r}"
    return ""
