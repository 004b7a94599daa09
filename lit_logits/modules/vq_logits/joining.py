"""A trained backbone and head joined to a model of transformers, and whether they can be: found before training.

For that the model is made on the meta device, of the backbone's config alone, as loading the saved folder makes it.

Letters: d hidden size, V vocabulary.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lit_logits.contracts import ExportableHead, SizedHead
from lit_logits.contracts.checks import data_tokenizer
from lit_logits.modules.language_models.calls import cache_argument
from lit_logits.modules.language_models.probes import OutputRule, probe_backbone
from lit_logits.modules.language_models.saving import (
    PushesToHub,
    describe_training,
    save_model_folder,
    take_special_ids,
)
from lit_logits.modules.vq_logits.config import VQLogitsConfig
from lit_logits.modules.vq_logits.describe import describe_head, describe_table
from lit_logits.modules.vq_logits.embedding import CodedEmbedding, coded_table, with_dense_table
from lit_logits.modules.vq_logits.export import SavedHead, VQLogitsForCausalLM
from lit_logits.modules.vq_logits.head import VQLogitsHead
from lit_logits.modules.vq_logits.hierarchical import HierarchicalVQLogitsHead
from lit_logits.modules.vq_logits.packed import PackedHierarchicalVQLogitsHead
from lit_logits.modules.vq_logits.residual import ResidualVQLogitsHead

__all__ = ["Form", "VQExport", "compact_model", "dense_model", "export_problem", "export_warning"]

Form = Literal["compact", "dense"]

_FORMS: dict[Form, Any] = {
    "compact": VQLogitsHead | ResidualVQLogitsHead | HierarchicalVQLogitsHead,
    "dense": ExportableHead,
}


def export_problem(
    backbone: PreTrainedModel, form: Form, *, hidden_size: int, vocab_size: int, has_dense: bool = True
) -> str | None:
    """Return why no head of this size could be saved with a backbone, or None if it can; nothing is computed.

    Args:
        backbone: of transformers.
        form: see `VQLogitsLM.to_pretrained`.
        hidden_size: d of the head.
        vocab_size: V of the head.
        has_dense: whether the head could take the form `dense`, so that the answer may name it.
    """
    try:
        if form == "compact":
            config = VQLogitsConfig(
                _text_config(backbone), 1, stage_sizes=[vocab_size], table=_table_settings(backbone)
            )
            _check_compact(backbone, config, hidden_size, vocab_size, has_dense)
        else:
            _dense_shell(backbone, hidden_size, vocab_size)
    except ValueError as error:
        return str(error)
    return None


def export_warning(backbone: PreTrainedModel, head: Any, *, hidden_size: int, vocab_size: int) -> str | None:
    """Return what to tell, before training, of a head that could be saved but for its backbone; else None."""
    forms = [form for form, kinds in _FORMS.items() if isinstance(head, kinds)]
    has_dense = "dense" in forms
    check = partial(export_problem, backbone, hidden_size=hidden_size, vocab_size=vocab_size, has_dense=has_dense)
    problem = check(forms[0]) if forms else None
    if problem is None:
        return None
    instead = "".join(f", only with head={other!r}" for other in forms[1:] if check(other) is None)
    return f"This model trains, but cannot be saved with head={forms[0]!r}{instead}: {problem}"


def compact_model(
    backbone: PreTrainedModel, head: nn.Module, generation_config: Any = None, *, rule: OutputRule | None = None
) -> VQLogitsForCausalLM:
    """Join a backbone and a compressed head to a model of transformers, in `eval` mode.

    Tensors are shared, not copied, except those of a `VQLogitsHead`, which are converted, and the mapping of a
    `HierarchicalVQLogitsHead`, which is packed.

    Args:
        backbone: of transformers.
        head: its output layer, one of these or a `ResidualVQLogitsHead`; it reads the hidden states by the factor of
            `rule`.
        generation_config: of the original model.
        rule: how the architecture makes logits; None finds out.

    Raises:
        ValueError: If the head is of another class, or the backbone could not be loaded or generate: it is not what its
            config makes, gives hidden states of another size than the config's, or keeps no cache of attention.
    """
    coded = _with_codes(head)
    saved = _saved_head(coded)
    config = VQLogitsConfig(
        text_config=_text_config(backbone),
        name_or_path=getattr(backbone.config, "_name_or_path", ""),
        **_head_settings(saved),
        hidden_scale=(rule or probe_backbone(backbone)[0]).bias_free_scale,
        table=_table_settings(backbone),
        dtype=backbone.dtype,
    )
    _check_compact(backbone, config, saved.hidden_size, saved.vocab_size, isinstance(head, ExportableHead))
    if coded is not head:
        saved = _saved_head(head)  # raises, after all else was checked
    with torch.device("meta"):  # both parts are replaced, so no memory is spent on their weights
        model = VQLogitsForCausalLM(config)
    model.model, model.head = backbone, saved
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


@torch.no_grad()
def dense_model(
    backbone: PreTrainedModel, head: nn.Module, generation_config: Any = None, *, rule: OutputRule | None = None
) -> PreTrainedModel:
    """Put the decoded rows of a head into the original architecture, in `eval` mode; backbone tensors are shared.

    The architecture multiplies what the head read multiplied, so the rows stay as they are; arguments as for
    `compact_model`.

    Raises:
        ValueError: If the head is not an `ExportableHead`, or has a token bias and the architecture no output bias; if
            the architecture is not that of a causal language model, or its output layer is not fed by the backbone.
    """
    if not isinstance(head, ExportableHead):
        advice = " A softmax in two levels equals no dense layer: save it with head='compact'."
        raise ValueError(
            "Expected a head that equals a dense layer, with `dense_weight` and `token_bias`, for head='dense', but got"
            f" {type(head).__name__}.{advice if isinstance(head, HierarchicalVQLogitsHead) else ''}"
        )
    weight = head.dense_weight().detach()
    model, name = _dense_shell(backbone, weight.shape[1], weight.shape[0])
    output: Any = model.get_output_embeddings()
    table, backbone = coded_table(backbone), with_dense_table(backbone)
    if table is not None and table.tied:  # one set of codes gives one set of rows
        model.config.tie_word_embeddings = True
        output.weight = backbone.get_input_embeddings().weight
    else:
        output.weight = nn.Parameter(weight.to(backbone.dtype), requires_grad=False)
    if output.bias is not None:
        bias = output.weight.new_zeros(len(output.weight)) if head.token_bias is None else head.token_bias.detach()
        bias = bias / (rule or probe_backbone(backbone)[0]).logit_scale  # the architecture multiplies it
        output.bias = nn.Parameter(bias.to(backbone.dtype), requires_grad=False)
    elif head.token_bias is not None:
        raise ValueError(
            f"Expected a head without a token bias, because the output layer of {type(model).__name__} has no place"
            " for one. Train with `bias: false`, or save with head='compact'."
        )
    model.set_submodule(name, backbone)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def _table_settings(backbone: PreTrainedModel) -> dict[str, Any] | None:
    table = coded_table(backbone)
    return None if table is None else table.settings


def _text_config(backbone: PreTrainedModel) -> Any:
    config = copy.deepcopy(backbone.config)
    config.tie_word_embeddings = False  # the output layer is not the input table, which loading would put there
    return config


def _check_compact(
    backbone: PreTrainedModel, config: VQLogitsConfig, hidden_size: int, vocab_size: int, has_dense: bool
) -> None:
    """Raise unless loading would make this backbone of its config, and the result generates."""
    label = type(backbone).__name__
    no_dense = "A softmax in two levels has no dense form either; a `VQLogitsHead` has one."
    advice = "Save it with head='dense', if that can." if has_dense else no_dense
    if getattr(backbone, "_is_stateful", False):
        raise ValueError(f"Expected a backbone whose cache is one of attention, but {label} is recurrent. {advice}")
    try:
        told, needed = (config.vocab_size, config.hidden_size), (vocab_size, hidden_size)
        if told != needed:
            raise ValueError(f"its config says (vocabulary, hidden size) {told}, and the head has {needed}")
        with torch.device("meta"):
            loaded = VQLogitsForCausalLM(VQLogitsConfig.from_dict(config.to_dict()))
        _check_same(backbone, loaded.model)
        _try_cache(loaded)
    except Exception as error:  # of any kind: models of any kind are made
        raise ValueError(
            f"Expected a backbone that loads and generates from its config for head='compact', but {label} does not:"
            f" {_first_line(error)}. {advice}"
        ) from error


def _dense_shell(backbone: PreTrainedModel, hidden_size: int, vocab_size: int) -> tuple[PreTrainedModel, str]:
    """Return the original architecture, and the name that the backbone has in it."""
    label = type(backbone).__name__
    config = _text_config(backbone)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=backbone.dtype)
        name = next((name for name, part in model.named_modules() if name and type(part) is type(backbone)), None)
        if name is None:
            raise ValueError(f"{type(model).__name__} does not hold one")
        inside, output = model.get_submodule(name), model.get_output_embeddings()
        _check_same(backbone, inside)
        shape = None if output is None else tuple(output.weight.shape)
        if shape != (vocab_size, hidden_size):
            raise ValueError(f"the output layer has shape {shape}, and the head {(vocab_size, hidden_size)}")
        placed = {id(parameter) for part in (inside, output) for parameter in part.parameters()}
        others = [other for other, parameter in model.named_parameters() if id(parameter) not in placed]
        if others:
            raise ValueError(f"layers that the head replaced stand before the output layer, such as {others[0]}")
    except Exception as error:
        raise ValueError(
            f"Expected a backbone whose architecture has an output layer for the rows of head='dense', but {label} does"
            f" not fit: {_first_line(error)}. Save it with head='compact', if that can."
        ) from error
    return model, name


def _check_same(backbone: nn.Module, loaded: nn.Module) -> None:
    """Raise unless loading makes a backbone of the same class, with the same names and shapes of weights."""
    if type(backbone) is not type(loaded):
        raise ValueError(f"loading makes {type(loaded).__name__} of it")
    # A pooler reads the last hidden states, and some classes leave it out. A coded table may become a dense one.
    coded = [
        f"{name}."
        for name, part in backbone.named_modules()
        if isinstance(part, CodedEmbedding) and not isinstance(loaded.get_submodule(name), CodedEmbedding)
    ]
    left_out = ("pooler.", *coded)
    ours, theirs = (
        {name: tuple(p.shape) for name, p in m.named_parameters() if not name.startswith(left_out)}
        for m in (backbone, loaded)
    )
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if wrong:
        raise ValueError(f"its config makes {wrong[0]} of shape {theirs.get(wrong[0])}, not {ours.get(wrong[0])}")


@torch.no_grad()
def _try_cache(model: VQLogitsForCausalLM) -> None:
    """Read three tokens and then one more, as `generate` does, on the meta device, where codes cannot be looked at."""
    cache = DynamicCache(config=model.config.text_config)
    cache_argument(model.model, cache)
    model.set_submodule("head", nn.Identity())
    if coded_table(model.model) is not None:
        model.set_input_embeddings(nn.Embedding(model.config.vocab_size, model.config.hidden_size, device="meta"))
    model.eval()
    try:
        for length in (3, 1):
            ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
            model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
    except RuntimeError as error:
        # Only shapes that do not fit tell of the model. Other errors tell of this device: it has no values to look at,
        # as those of a mask, and some operations leave it out.
        if "size" in str(error) or "shape" in str(error):
            raise


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _saved_head(head: nn.Module) -> SavedHead:
    """Return the head as `VQLogitsForCausalLM` holds it."""
    if isinstance(head, ResidualVQLogitsHead):
        return head
    if isinstance(head, VQLogitsHead):
        return _as_residual(head)
    if isinstance(head, HierarchicalVQLogitsHead):
        return PackedHierarchicalVQLogitsHead(head)
    advice = " Use head='dense'." if isinstance(head, ExportableHead) else ""
    raise ValueError(
        "Expected a `VQLogitsHead`, `HierarchicalVQLogitsHead` or `ResidualVQLogitsHead` for head='compact', but got"
        f" {type(head).__name__}.{advice}"
    )


def _with_codes(head: nn.Module) -> nn.Module:
    """Return the head, or while its tokens own vectors one of its sizes, whose place in a model can be checked."""
    if not isinstance(head, HierarchicalVQLogitsHead) or not head.has_own_vectors:
        return head
    sizes = head.hidden_size, head.vocab_size, head.codebook_sizes
    other = HierarchicalVQLogitsHead(*sizes, num_groups=head.num_groups, bias=head.token_bias is not None)
    other.logit_cap = head.logit_cap
    return other.to(head.clusters)


def _head_settings(head: SavedHead) -> dict[str, Any]:
    """Return what `VQLogitsConfig` says of a head."""
    shared = {"head_bias": head.token_bias is not None, "logit_cap": head.logit_cap}
    if isinstance(head, PackedHierarchicalVQLogitsHead):
        return {"codebook_sizes": list(head.codebook_sizes), "num_groups": head.num_groups, **shared}
    sizes = {"codebook_size": head.codebook_size, "num_groups": head.num_groups, "stage_sizes": head.stage_sizes()}
    return {**sizes, **shared}


def _as_residual(head: VQLogitsHead) -> ResidualVQLogitsHead:
    residual = ResidualVQLogitsHead(
        head.hidden_size, head.vocab_size, head.codebook_size, bias=head.token_bias is not None
    ).to(head.codebook)
    stages = torch.ones_like(head.token_to_code)
    residual.logit_cap = head.logit_cap
    residual.set_codes(head.codebook[None, None], head.token_to_code, stages, token_bias=head.token_bias)
    return residual


class VQExport(PushesToHub, nn.Module):
    """The half of `VQLogitsLM` that writes it as a model of transformers; the attributes are that module's."""

    backbone: PreTrainedModel
    head: Any
    output_rule: OutputRule
    _generation_config: Any

    def to_pretrained(self, head: Literal["compact", "dense"] = "compact", *, tokenizer: Any = None) -> PreTrainedModel:
        """Return the model as one of transformers, which shares its tensors and has `generate`, `save_pretrained` etc.

        The model is in `eval` mode, and so are the shared parts of this one until `train()` is called. Its texts end
        with the tokenizer's tokens, as those of a saved folder.

        Args:
            head: `compact`: `VQLogitsForCausalLM`, with packed codes. `dense`: the original architecture, untied,
                whose output rows are the decoded codes, so that other programs read it; a `HierarchicalVQLogitsHead`
                has no such rows.
            tokenizer: whose bos, eos and pad ids the model gets; default the data module's, where a trainer is
                attached, else the ids stay those of the original.

        Raises:
            ValueError: If `head` is neither, the model's head cannot be written so, the original architecture has no
                bias that could take the token bias, or the backbone is one that `compact_model` or `dense_model`
                refuses. A warning tells of such a backbone when the model is made.
        """
        model = self._export(head)
        tokenizer = data_tokenizer(getattr(self, "_trainer", None)) if tokenizer is None else tokenizer
        take_special_ids(model, tokenizer, self.end_tokens)
        return model

    def _export(self, head: str) -> PreTrainedModel:
        exports: dict[str, Any] = {"compact": compact_model, "dense": dense_model}
        if head not in exports:
            raise ValueError(f"Expected `head` to be 'compact' or 'dense', but got {head!r}.")
        return exports[head](self.backbone, self.head, self._generation_config, rule=self.output_rule)

    @property
    def card_text(self) -> str:
        """What was done, for the card of the saved model."""
        size = f" {describe_head(self.head)}" if isinstance(self.head, SizedHead) else ""
        table, kd_weight = coded_table(self.backbone), getattr(self, "kd_weight", 0.0)
        if table is not None:
            size += f" {describe_table(table)}"
        loss = (
            f"{kd_weight:g} · KL(original ‖ this) + {1 - kd_weight:g} · cross-entropy" if kd_weight else "cross-entropy"
        )
        return (
            f"The output layer is a `{type(self.head).__name__}` (`VQLogitsLM`, after VQ-Logits, arXiv 2505.10202)."
            f"{size} The loss that trains it: {loss}."
        )

    def save_pretrained(
        self,
        folder: str | Path,
        head: Literal["compact", "dense"] = "compact",
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a folder for `AutoModelForCausalLM.from_pretrained`, as a whole or not at all; rank zero does.

        A `compact` one loads after `import lit_logits`, or with `trust_remote_code=True` where lit-logits is installed.

        Args:
            folder: new, empty or a saved model, which is replaced.
            head: see `to_pretrained`.
            tokenizer: saved with it; default the data module's, where a trainer is attached.
            dtype: of the weights, such as `torch.bfloat16`; default theirs.

        Raises:
            ValueError: If `to_pretrained` refuses, or the folder holds anything but a saved model.
        """
        was_training = self.training
        model = self._export(head)
        self.train(was_training)
        options = {"tokenizer": tokenizer, "dtype": dtype, "trainer": getattr(self, "_trainer", None)}
        summary = describe_training(self, decoded=head == "dense")
        save_model_folder(folder, model, summary, end_tokens=self.end_tokens, **options)
