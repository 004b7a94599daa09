"""What each GPU needs to train a pivot by graph-on-logits distillation under FSDP: a dry run that allocates nothing.

    python -m benchmarks.gld_memory --config configs/gld_fusion_14b_fsdp.yaml [--pivot JSON] [--gpus 8]

Makes the pivot on the meta device, checks that the layer classes that the FSDP policies name occur in it, lists the
units that would be wrapped, and adds up bytes. `--pivot` replaces the recipe's pivot, by a config as a mapping or the
name of a model. Shapes of hub models are read from the local cache of the hub, or else from the table `PUBLISHED`
below; the output says which. Counted is what the formulas in `plan` say, in GB of 1e9 bytes: not the allocator's
fragments, NCCL's buffers or CUDA's context, for which some GB must be left.

Letters: P parameters, G GPUs, B samples and T tokens of a micro-batch, d hidden size, L layers, I intermediate size,
V vocabulary, k `top_k` of the cache.
"""

import argparse
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.measure import markdown_table
from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.modules.language_models.loading import new_causal_lm
from lit_logits.modules.language_models.lora import add_lora

# As in the `config.json` of the hub's models.
_QWEN = {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48}
_QWEN |= {"num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152_064, "tie_word_embeddings": False}
_PHI4 = {"model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17_920, "num_hidden_layers": 40}
_PHI4 |= {"num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100_352, "tie_word_embeddings": False}
_MISTRAL = {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32_768, "num_hidden_layers": 40}
_MISTRAL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131_072}
PUBLISHED: dict[str, dict[str, Any]] = {
    "microsoft/phi-4": _PHI4,
    "Qwen/Qwen2.5-14B-Instruct": _QWEN,
    "Qwen/Qwen2.5-Coder-14B-Instruct": _QWEN,
    "mistralai/Mistral-Small-24B-Instruct-2501": _MISTRAL,
}

GPU_BYTES = 80e9
FUSION_TOKENS = 520_000_000  # "Fusing data" of the README of Reallm-Labs/InfiGFusion


class Unit(NamedTuple):
    """What FSDP shards and gathers together: parameters of a wrapped module that no unit inside of it has."""

    name: str
    kind: str
    parameters: int
    trained: int


class Row(NamedTuple):
    """A line of the table."""

    what: str
    formula: str
    bytes: float
    is_counted: bool = True  # in the sum of a GPU


class Precision(NamedTuple):
    """Bytes a number: as kept and updated, as gathered for a layer, as gradients that are reduced, as computed with."""

    stored: int
    gathered: int
    reduced: int
    computed: int


# ---------------------------------------------------------------------- models


def make_model(source: str | dict[str, Any]) -> tuple[PreTrainedModel, str]:
    """A model on the meta device, and where its shape is from."""
    with torch.device("meta"):
        if isinstance(source, dict):
            return new_causal_lm(source), "the mapping"
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, local_files_only=True)), "local"
        except (OSError, ValueError) as error:
            if source not in PUBLISHED:
                raise ValueError(
                    f"Expected a folder, a model in the hub's local cache or one of {sorted(PUBLISHED)}, but got"
                    f" {source!r}. Pass its config as a mapping: --pivot '{{\"model_type\": ...}}'"
                ) from error
            return new_causal_lm(PUBLISHED[source]), "published shape, the hub was not asked"


def published_name(folder: str) -> str | None:
    """The model whose cache a folder is by its name, if the table has it."""
    return next((name for name in PUBLISHED if name.split("/")[-1] == Path(folder).name), None)


def is_cache(source: str) -> bool:
    """Whether a source is a folder of logits, which may be yet to be written, and no model."""
    return source not in PUBLISHED and not Path(source, "config.json").is_file()


# ---------------------------------------------------------------------- FSDP


def check_policy(model: nn.Module, policy: Sequence[str], argument: str) -> tuple[type[nn.Module], ...]:
    """The classes of a policy; each must occur in the model."""
    classes = tuple(pkgutil.resolve_name(path) for path in policy)
    for path, kind in zip(policy, classes, strict=True):
        if not any(isinstance(module, kind) for module in model.modules()):
            layers = {
                type(child) for module in model.modules() if isinstance(module, nn.ModuleList) for child in module
            }
            found = sorted(f"{layer.__module__}.{layer.__qualname__}" for layer in layers)
            raise ValueError(
                f"Expected `{argument}` to name layers of {type(model).__name__}, but it has no {path}. Its layers are"
                f" {found}."
            )
    return classes


def units_of(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> list[Unit]:
    """Units of a wrap policy in the order of `named_modules`, the root with all that is left first.

    Raises:
        ValueError: for weights that are tied across units, which FSDP cannot shard.
    """
    names = [name for name, module in model.named_modules() if not name or isinstance(module, classes)]
    kinds = {name: type(model.get_submodule(name)).__name__ for name in names}
    sizes: dict[str, list[int]] = {name: [0, 0] for name in names}
    owners: dict[int, str] = {}
    first = {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = max((owner for owner in names if not owner or name.startswith(f"{owner}.")), key=len)
        known = owners.setdefault(id(parameter), unit)
        if known != unit:
            raise ValueError(
                f"Expected tied weights to be in one unit of FSDP, but {name!r} is in {unit or 'the root'!r} and tied"
                f" to a weight in {known or 'the root'!r}."
            )
        if name in first:
            sizes[unit][0] += parameter.numel()
            sizes[unit][1] += parameter.numel() * parameter.requires_grad
    return [Unit(name, kinds[name], *sizes[name]) for name in names]


def tied_weights(model: nn.Module) -> list[str]:
    """Names of parameters that are another one."""
    first = dict(model.named_parameters())
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in first]


def precision_of(trainer: Mapping[str, Any]) -> Precision:
    """Lightning's choice, or that of `FSDPStrategy(mixed_precision=...)`."""
    precision = str(trainer.get("precision") or "32-true")
    mixed: Any = FSDPPrecision(precision).mixed_precision_config  # type: ignore[arg-type]
    stored = mixed.param_dtype if precision.endswith("true") else torch.float32
    computed = mixed.param_dtype
    given = _strategy(trainer).get("mixed_precision")
    if given is None:
        dtypes = mixed.param_dtype, mixed.reduce_dtype
    else:
        given = given.get("init_args", given)
        param = pkgutil.resolve_name(given["param_dtype"]) if given.get("param_dtype") else stored
        dtypes = param, pkgutil.resolve_name(given["reduce_dtype"]) if given.get("reduce_dtype") else param
    return Precision(*(dtype.itemsize for dtype in (stored, *dtypes, computed)))


def optimizer_bytes(optimizer: Mapping[str, Any] | None, itemsize: int) -> float:
    """Bytes of state a parameter, found with a small one."""
    kind: Callable[..., Any] = pkgutil.resolve_name((optimizer or {}).get("class_path", "torch.optim.AdamW"))
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    parameter = nn.Parameter(torch.zeros(128, 128, dtype=dtype))
    made = kind([parameter], **(optimizer or {}).get("init_args", {}))
    parameter.grad = torch.zeros_like(parameter)
    made.step()
    states = [value for value in made.state[parameter].values() if isinstance(value, torch.Tensor) and value.ndim]
    return sum(state.numel() * state.element_size() for state in states) / parameter.numel()


# ---------------------------------------------------------------------- the plan


def plan(
    model: PreTrainedModel, units: Sequence[Unit], config: Mapping[str, Any], gpus: int, *, checkpointed: bool = True
) -> list[Row]:
    """Bytes of each part on a GPU, those of the sources left out."""
    trainer, init, data = config["trainer"], config["model"]["init_args"], config["data"]["init_args"]
    b, t = data.get("batch_size", 8), data.get("max_length", 512)
    precision, shape = precision_of(trainer), model.config.get_text_config()
    d, layers, inner = shape.hidden_size, shape.num_hidden_layers, shape.intermediate_size
    heads = shape.num_attention_heads
    wide = getattr(shape, "head_dim", None) or d // heads  # of a head
    qkv = (heads + 2 * (getattr(shape, "num_key_value_heads", None) or heads)) * wide
    root, wrapped = units[0], units[1:]
    total, trained = sum(unit.parameters for unit in units), sum(unit.trained for unit in units)
    # FSDP's gradient is that of a whole flat unit, where any of its parameters is trained.
    with_gradient = sum(unit.parameters for unit in units if unit.trained)
    largest = max([unit.parameters for unit in wrapped], default=0)
    largest_gradient = max([unit.parameters for unit in units if unit.trained], default=0)
    state = optimizer_bytes(init.get("optimizer"), precision.stored)
    # A layer as it is computed again: two normed inputs, queries, keys and values before and after the rotation, the
    # attention's output, gates and values, the gate's activation and the product; in float32 the two norms' inputs.
    layer = b * t * ((2 * d + 2 * qkv + heads * wide + 4 * inner) * precision.computed + 2 * d * 4)
    # The inputs of layers have the dtype that comes out of the embedding.
    kept = layers * b * t * d * precision.gathered if checkpointed else layers * layer
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return [
        Row("parameters", f"P·{precision.stored} / G", total * precision.stored / gpus),
        Row("gradients", f"P·{precision.stored} / G", with_gradient * precision.stored / gpus),
        Row("optimizer state", f"P·{state:g} / G", trained * state / gpus),
        # The root stays gathered until its backward ends; of the layers the next one is fetched ahead.
        Row(
            "gathered: root and two layers",
            f"(root + 2·layer)·{precision.gathered}",
            (root.parameters + min(len(wrapped), 2) * largest) * precision.gathered,
        ),
        # A unit's gradient is whole before it is reduced: in the dtype of the gathered weights, and in that of the sum.
        Row(
            "whole gradient of the largest unit",
            f"unit·({precision.gathered} + {precision.reduced})",
            largest_gradient * (precision.gathered + precision.reduced),
        ),
        Row(
            "activations, checkpointed" if checkpointed else "activations",
            f"B·T·d·L·{precision.gathered}" if checkpointed else "L·layer",
            kept,
        ),
        Row("a layer, recomputed", "B·T·(2d + 2qkv + heads + 4I)…", layer if checkpointed else 0),
        # Logits of the head, in float32 for the cross-entropy, its softmax and the gradient.
        Row(
            "logits of a chunk",
            f"chunk·V·({precision.computed} + 3·4)",
            min(rows_a_chunk(vocabulary), b * t) * vocabulary * (precision.computed + 3 * 4),
        ),
    ]


def source_rows(
    sources: Mapping[str, str], kwargs: Mapping[str, Mapping[str, Any]], tokens: int, top_k: int
) -> tuple[list[Row], list[str]]:
    """Sources beside the pivot, whole on each GPU; caches on disk; and what is to be said about them."""
    rows, notes = [], []
    for name, source in sources.items():
        cached, known = is_cache(source), published_name(source)
        model, origin = make_model(known or source) if known or not cached else (None, "")
        size = sum(p.numel() for p in model.parameters()) if model else 0
        dtype = str(kwargs.get(name, {}).get("dtype", "bfloat16" if cached else "float32")).removeprefix("torch.")
        bytes_online = size * getattr(torch, dtype).itemsize
        if not cached:
            rows.append(Row(f"source {name}, online", f"{size / 1e9:.1f} B in {dtype}", bytes_online))
            notes.append(f"{name}: {source} ({origin}), not sharded.")
            continue
        vocabulary = model.config.get_text_config().vocab_size if model else 1 << 17
        # ids in 2 bytes up to 65,536 tokens, else 4; log-probabilities in 4, also of the token that came; end, tail,
        # normalizer, mean and deviation
        a_token = top_k * ((2 if vocabulary <= 1 << 16 else 4) + 4) + 6 * 4
        rows.append(Row(f"source {name}, cached", "on no GPU", 0))
        rows.append(Row(f"cache of {name}, on disk", f"{tokens:,} tokens · {a_token}", tokens * a_token, False))
        online = f"; online it would take {bytes_online / 1e9:.1f} GB in {dtype} on each GPU" if model else ""
        notes.append(f"{name}: cache {source}{online}.")
    return rows, notes


def host_rows(units: Sequence[Unit], state: float, gpus: int) -> list[Row]:
    """Memory of the host, if it is one: every process loads the model, in float32; rank zero gathers all to save."""
    total, trained = sum(unit.parameters for unit in units), sum(unit.trained for unit in units)
    return [
        Row("host: loading", "G·P·4", gpus * total * 4, False),
        Row("host and disk: a full checkpoint", f"P·4 + P·{state:g}", total * 4 + trained * state, False),
    ]


def _strategy(trainer: Mapping[str, Any]) -> dict[str, Any]:
    strategy = trainer.get("strategy")
    if not isinstance(strategy, dict) or not strategy["class_path"].endswith("FSDPStrategy"):
        raise ValueError(f"Expected `trainer.strategy` to be an FSDPStrategy with its arguments, but got {strategy!r}.")
    return strategy.get("init_args") or {}


def report(config: Mapping[str, Any], pivot: Any, gpus: int | None, tokens: int, cache_top_k: int) -> str:
    """Everything that the command prints."""
    trainer, init = config["trainer"], config["model"]["init_args"]
    source = pivot if pivot is not None else init["pivot"]
    gpus = gpus or int(trainer.get("devices", 1)) * int(trainer.get("num_nodes", 1))
    model, origin = make_model(source)
    if init.get("lora") is not None:
        with torch.device("meta"):
            model = add_lora(model, init["lora"])
    policies = _strategy(trainer)
    wrap = check_policy(model, policies.get("auto_wrap_policy") or [], "auto_wrap_policy")
    name = "activation_checkpointing_policy"
    checkpointed = bool(check_policy(model, policies.get(name) or [], name)) or bool(init.get("gradient_checkpointing"))
    units = units_of(model, wrap)
    rows = plan(model, units, config, gpus, checkpointed=checkpointed)
    of_sources, notes = source_rows(init.get("sources", {}), init.get("source_kwargs") or {}, tokens, cache_top_k)
    needed = sum(row.bytes for row in [*rows, *of_sources] if row.is_counted)
    precision = precision_of(trainer)
    state = optimizer_bytes(init.get("optimizer"), precision.stored)
    counted = [row for row in [*rows, *of_sources] if row.is_counted]
    others = [row for row in [*of_sources, *host_rows(units, state, gpus)] if not row.is_counted]
    total = Row("sum", f"of {GPU_BYTES / 1e9:.0f} GB", needed)
    table = [[row.what, row.formula, f"{row.bytes / 1e9:.1f}"] for row in [*counted, total, *others]]
    kinds = {unit.kind: [other for other in units[1:] if other.kind == unit.kind] for unit in units[1:]}
    lines = [
        f"Pivot: {source if isinstance(source, str) else type(model).__name__} ({origin}),"
        f" {sum(unit.parameters for unit in units) / 1e9:.2f} B parameters,"
        f" {sum(unit.trained for unit in units) / 1e9:.2f} B trained; {gpus} GPUs, {trainer.get('precision')}.",
        f"- root: {units[0].parameters / 1e6:.1f} M parameters; tied: {tied_weights(model) or 'none'}",
        *(f"- {len(of)} × {kind}: {of[0].parameters / 1e6:.1f} M parameters each" for kind, of in kinds.items()),
        *(f"- {note}" for note in notes),
        "",
        markdown_table(["each GPU", "formula", "GB"], table),
        "",
        f"{'Fits' if needed <= GPU_BYTES else 'Does not fit'}: {needed / 1e9:.1f} of {GPU_BYTES / 1e9:.0f} GB a GPU.",
    ]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/gld_fusion_14b_fsdp.yaml")
    parser.add_argument("--pivot", help="a config as JSON, or the name of a model")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--tokens", type=int, default=FUSION_TOKENS, help="of all responses, for the size of a cache")
    parser.add_argument("--cache_top_k", type=int, default=32)
    given = parser.parse_args(args)
    pivot = json.loads(given.pivot) if (given.pivot or "").startswith("{") else given.pivot
    config = yaml.safe_load(Path(given.config).read_text())
    print(report(config, pivot, given.gpus, given.tokens, given.cache_top_k))


if __name__ == "__main__":
    main()
