"""What a causal language model does, found by running it on a few tokens: no config tells this of every model.

A probe takes two or three passes of six tokens, without the output layer. It runs without dropout and leaves modes,
random state, dtype and device of the model as they are. A model on `meta` cannot be run and is not probed.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_logits.functional.reductions import soft_cap
from lit_logits.modules.language_models.calls import accepted_inputs
from lit_logits.modules.language_models.frozen import input_device

__all__ = ["OutputRule", "check_causal", "check_finite_weights", "num_rows", "probe_backbone", "probe_causal_lm"]

_NUM_TOKENS = 6
_SMALL, _LARGE = 2.0**-10, 3e4  # logits that a cap leaves as they are, and that it cuts; powers of two divide exactly
_LOGITS = (_SMALL, -_SMALL, _LARGE, -_LARGE, 0.0, 1.0, -7.0, 19.0, -41.0, 83.0, -200.0)
# Settings by which architectures change logits, with the value that changes nothing.
_LOGIT_SETTINGS = {
    "final_logit_softcapping": None,
    "output_logit_soft_cap": None,
    "logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


class OutputRule(NamedTuple):
    """How token logits follow from the last hidden states h: cap(logit_scale · layer(hidden_scale · h)).

    Attributes:
        hidden_scale: factor of the hidden states.
        logit_scale: factor of the output layer's values, its bias included.
        cap: c of the soft cap c · tanh(z / c), or None.

    Example:
        >>> OutputRule(logit_scale=0.5, cap=2.0).logits(nn.Identity(), torch.tensor([0.5, 100.0]))
        tensor([0.2487, 2.0000])
    """

    hidden_scale: float = 1.0
    logit_scale: float = 1.0
    cap: float | None = None

    def logits(self, layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Return token logits (..., V) of the last hidden states (..., d)."""
        return self.finish(layer(hidden if self.hidden_scale == 1 else hidden * self.hidden_scale))

    @property
    def bias_free_scale(self) -> float:
        """Factor of the hidden states that a head reads, whose bias is not multiplied."""
        return self.hidden_scale * self.logit_scale

    def scale_hidden(self, hidden: Tensor) -> Tensor:
        """Return hidden states for a head: their products with the architecture's rows are its logits, bias aside."""
        return hidden if self.bias_free_scale == 1 else hidden * self.bias_free_scale

    def finish(self, values: Tensor) -> Tensor:
        """Return token logits of the output layer's values."""
        values = values if self.logit_scale == 1 else values * self.logit_scale
        return soft_cap(values, self.cap)


def probe_causal_lm(model: PreTrainedModel) -> OutputRule:
    """Find how a model makes logits of its backbone's last hidden states; three passes of six tokens.

    The output layer is replaced by one of known values for the time, so that the answer does not depend on the size of
    the weights, and the cost of a large vocabulary is not paid. A model on `meta` is judged by its config alone.

    Raises:
        ValueError: If tokens see those that follow, hidden states are not finite, the model changes hidden states
            before its output layer or logits after it by more than a factor and a soft cap, or it cannot be run.
    """
    owner = type(model).__name__
    if _is_meta(model):
        _check_config_is_neutral(model)
        return OutputRule()
    _check_output_layer(model.get_output_embeddings(), owner)
    ids, changed = _two_texts(model)
    with _undisturbed(model):
        hidden = _last_hidden_state(model, ids)
        read, values, logits = _run(model, ids)
        other, _, _ = _run(model, changed)
    if read is None or other is None or values is None:
        raise ValueError(
            f"Expected a model that calls its output layer, but {owner} finds its logits in another way, which another"
            " head cannot take over."
        )
    if not bool(hidden.isfinite().all() and read.isfinite().all()):
        raise ValueError(
            f"Expected finite hidden states, but {owner} gives NaN or infinities. Its weights are damaged, or overflow"
            f" in {hidden.dtype}."
        )
    _check_same_past(read, other, f"{owner}'s", model.config)
    rule = _fit_logits(values, logits, owner)._replace(hidden_scale=_fit_hidden(hidden, read, owner))
    if rule != OutputRule() and (learned := _parameters_between(model)):
        raise ValueError(
            f"Expected a model whose logits are its output layer's, but {owner} changes them afterwards and has the"
            f" parameters {learned} besides backbone and output layer, which would not be trained."
        )
    return rule


def probe_backbone(backbone: PreTrainedModel) -> tuple[OutputRule, int, int]:
    """Find what a causal language model of this backbone would do, without making its output layer.

    Returns:
        The rule, and d and V of the output layer.

    Raises:
        ValueError: As for `probe_causal_lm`, or if there is no causal language model around such a backbone.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(backbone.config))
    owner, output = type(whole).__name__, whole.get_output_embeddings()
    inner = whole.base_model
    if output is None or type(inner) is not type(backbone):
        text = backbone.config.get_text_config()
        advice = "" if text is backbone.config else f" Take the type of its text, {text.model_type!r}."
        raise ValueError(
            f"Expected an architecture whose causal language model is a backbone and an output layer, but {owner} is"
            f" made of {type(inner).__name__}, not of {type(backbone).__name__}.{advice}"
        )
    setattr(whole, whole.base_model_prefix, backbone)
    if between := _parameters_between(whole):
        raise ValueError(
            f"Expected a model whose output layer reads the backbone's last hidden state, but {owner} has the"
            f" parameters {between} in between."
        )
    vocab_size, hidden_size = output.weight.shape
    return probe_causal_lm(whole), hidden_size, vocab_size


def check_causal(model: PreTrainedModel, label: str) -> None:
    """Raise if tokens see those that follow; two passes of six tokens. Hidden states that are not finite pass.

    Args:
        model: causal language model.
        label: what the error calls it.

    Raises:
        ValueError: If the hidden states of a text change with its last token, or the model cannot be run.
    """
    if _is_meta(model):
        return
    ids, changed = _two_texts(model)
    with _undisturbed(model):
        runs = [_run(model, text) for text in (ids, changed)]
    one, two = (run[2] if run[0] is None else run[0] for run in runs)
    if bool(one.isfinite().all() and two.isfinite().all()):
        _check_same_past(one, two, f"{label}'s", model.config)


@torch.no_grad()
def check_finite_weights(model: nn.Module) -> None:
    """Raise if a weight is not finite; it costs one reading of the weights.

    Raises:
        ValueError: If one is not; the error names it.
    """
    for name, weight in model.named_parameters():
        known = weight.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16) and not weight.is_meta
        if known and not bool(weight.sum(dtype=torch.float64 if weight.device.type == "cpu" else None).isfinite()):
            if bool(weight.isfinite().all()):  # the sum alone was too large
                continue
            raise ValueError(
                f"Expected finite weights, but `{name}` of {type(model).__name__} has NaN or infinities. The file is"
                " damaged or its training had diverged: take another checkpoint."
            )


def num_rows(layer: Any) -> int:
    """Return the number of rows of an output layer; a compressed one says it without decoding them."""
    size = getattr(layer, "vocab_size", None)
    return layer.weight.shape[0] if size is None else size


# ---------------------------------------------------------------------- running


def _is_meta(model: nn.Module) -> bool:
    # Weights that accelerate keeps elsewhere are on `meta` too, but it fetches them when the model runs.
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return not hasattr(model, "hf_device_map") and any(tensor.is_meta for tensor in table.parameters())


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in `eval` mode, without gradients, and leave modes and random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, _ in modes:  # RWKV divides weights in `eval`, in place, and multiplies them again
                if hasattr(module, "_rescale_layers"):
                    module._rescale_layers()  # type: ignore[operator]


def _two_texts(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return two texts (1, T) that differ in the last token, without special tokens where the vocabulary allows it."""
    table: Any = model.get_input_embeddings()
    config = model.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls", "mask")]
    special = {token for one in named for token in (one if isinstance(one, list | tuple) else [one])}
    num_tokens = min(table.weight.shape[0], 64)
    usual = [token for token in range(num_tokens) if token not in special] or list(range(num_tokens))
    ids = torch.tensor([[usual[i % len(usual)] for i in range(_NUM_TOKENS)]], device=input_device(model))
    changed = ids.clone()
    changed[0, -1] = next((token for token in reversed(usual) if token != int(ids[0, -1])), int(ids[0, -1]))
    return ids, changed


def _call(module: PreTrainedModel, ids: Tensor) -> Any:
    try:
        return module(input_ids=ids, **accepted_inputs(module, {"use_cache": False}))
    except _FAILURES as error:
        raise ValueError(
            f"Expected a language model that runs on token ids alone, but {type(module).__name__} raises"
            f" {type(error).__name__}: {error}"
        ) from error


def _last_hidden_state(model: PreTrainedModel, ids: Tensor) -> Tensor:
    output = _call(model.base_model, ids)  # type: ignore[arg-type]
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(
            f"Expected a model whose backbone gives `last_hidden_state`, but {type(model.base_model).__name__} of"
            f" {type(model).__name__} gives {list(output)}."
        )
    return hidden


def _run(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return what the output layer reads (T, d), what it is made to give (T, V), and the logits (1, T, V)."""
    layer: Any = model.get_output_embeddings()
    calls: list[tuple[Tensor, Tensor]] = []

    def known_values(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        size = hidden.shape[:-1].numel() * num_rows(layer)
        values = torch.tensor(_LOGITS, device=hidden.device)[torch.arange(size, device=hidden.device) % len(_LOGITS)]
        calls.append((hidden, values := values.view(*hidden.shape[:-1], -1)))
        return values

    own = layer.__dict__.get("forward")  # accelerate puts one there
    layer.forward = known_values
    try:
        logits = _call(model, ids).logits
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
    if len(calls) != 1:
        return None, None, logits
    read, values = calls[0]
    return read.flatten(0, -2), values.flatten(0, -2), logits


# ---------------------------------------------------------------------- judging


def _check_output_layer(layer: Any, owner: str) -> None:
    """Refuse an output layer that does more than multiply by its rows and add a bias, as another head would not."""
    if not isinstance(layer, nn.Linear):  # compressed or adapted
        return
    if layer.weight.shape != (layer.out_features, layer.in_features) or not layer.weight.is_floating_point():
        return  # quantised
    others = sorted(name for name, _ in layer.named_parameters() if name not in ("weight", "bias"))
    changed = type(layer).forward is not nn.Linear.forward
    if others or (changed and not _is_linear(layer)):
        why = f"has the parameters {others}" if others else "makes other values of them"
        raise ValueError(
            f"Expected a model whose output layer multiplies hidden states by its rows, but the {type(layer).__name__}"
            f" of {owner} {why}."
        )


def _is_linear(layer: nn.Linear) -> bool:
    if layer.weight.is_meta:
        return False
    hidden = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device).view(2, -1).to(layer.weight.dtype)
    return torch.allclose(layer(hidden), F.linear(hidden, layer.weight, layer.bias), rtol=1e-2, atol=1e-4)


def _check_same_past(one: Tensor, two: Tensor, label: str, config: Any) -> None:
    before, after = (values.reshape(_NUM_TOKENS, -1)[:-1].cpu().double() for values in (one, two))
    # Rows of a causal model are the same to the bit, but for experts, whose batches change.
    tolerance = 4 * torch.finfo(one.dtype).eps * before.abs().max()
    if bool(((before - after).abs() > tolerance).any()):
        text = config.get_text_config()
        names = [name for name in ("is_decoder", "causal") if getattr(text, name, None) is False]
        advice = f" Set `{names[0]}: true` in its config." if names else ""
        raise ValueError(
            f"Expected a causal language model, but {label} hidden states depend on the tokens that follow, so that it"
            f" would only learn to copy them.{advice}"
        )


def _fit_hidden(hidden: Tensor, read: Tensor, owner: str) -> float:
    """Return the factor of the hidden states that the output layer reads."""
    given = hidden.flatten(0, -2)
    if given.shape == read.shape:
        given, taken = given.cpu().double(), read.cpu().double()
        factor = float((given * taken).sum() / given.square().sum().clamp(min=1e-300))
        factor = 1.0 if abs(factor - 1) < 1e-3 or not bool(given.any()) else factor
        tolerance = 1e-2 * float(taken.abs().max())
        if factor > 0 and torch.allclose(given * factor, taken, rtol=0, atol=tolerance):
            return factor
    raise ValueError(
        f"Expected a model whose output layer reads the backbone's last hidden state, but {owner} transforms it in"
        " between."
    )


def _fit_logits(values: Tensor, logits: Tensor, owner: str) -> OutputRule:
    """Return the factor and the cap that make logits of the output layer's values."""
    if values.numel() == logits.numel():
        given, made = values.cpu().double(), logits.reshape(values.shape).cpu().double()
        scale = float((made / given)[given.abs() == _SMALL].mean())
        scale = 1.0 if abs(scale - 1) < 1e-5 else scale
        largest = float(made[given.abs() == _LARGE].abs().mean())
        cap = None if abs(largest - abs(scale) * _LARGE) < 1e-2 * abs(scale) * _LARGE else largest
        rule = OutputRule(logit_scale=scale, cap=cap)
        eps = torch.finfo(logits.dtype).eps
        if scale > 0 and torch.allclose(rule.finish(given), made, rtol=max(1e-4, 4 * eps), atol=1e-6):
            return rule
    raise ValueError(
        f"Expected a model whose logits are its output layer's but for a factor and a soft cap, but {owner} changes"
        " them afterwards in another way."
    )


def _check_config_is_neutral(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    for name, neutral in _LOGIT_SETTINGS.items():
        if getattr(config, name, neutral) not in (None, neutral):
            raise ValueError(
                f"Expected a model whose weights are loaded, but {type(model).__name__} is on `meta`, and its"
                f" {name}={getattr(config, name)} changes logits in a way that only running it tells."
            )


def _parameters_between(model: PreTrainedModel) -> list[str]:
    """Return the names of up to three parameters that belong neither to the backbone nor to the output layer."""
    known = {id(p) for part in (model.base_model, model.get_output_embeddings()) for p in part.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in known][:3]
