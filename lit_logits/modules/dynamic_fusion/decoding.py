"""Decoding with several models: small ones follow what a large one reads during its own `generate`.

Letters: B batch, P prompt, N generated tokens, R rows (positions that count), V vocabulary, S experts.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMode

from lit_logits.modules.language_models.calls import (
    CACHE_NAMES,
    OUTPUT_CACHE_NAME,
    accepted_inputs,
    read_with_cache,
)

__all__ = [
    "FusedStep",
    "FusionTrace",
    "SmallModels",
    "TopTokens",
    "check_decoding",
    "is_drafted",
    "position_ids_of",
    "split_prompts",
]


class FusionTrace(NamedTuple):
    """What fusion did at each token of a text.

    Attributes:
        token_ids: (B, N) the tokens, generated or scored.
        mask: (B, N) True where the token belongs to the text: not after its end, and not ignored.
        alpha: (S, B, N) weight of each expert.
        kl_forward: (B, N) KL(P~ ‖ P) of the fused and the large model's distribution, in nats.
        kl_reverse: (B, N) KL(P ‖ P~) in nats.
    """

    token_ids: Tensor
    mask: Tensor
    alpha: Tensor
    kl_forward: Tensor
    kl_reverse: Tensor


class TopTokens(NamedTuple):
    """The k likeliest tokens of each model at each token of a text, the large model first, then base and experts.

    Attributes:
        token_ids: (M, B, N, k) of M models, in descending order.
        log_probs: (M, B, N, k) in nats, over the common vocabulary.
    """

    token_ids: Tensor
    log_probs: Tensor


class FusedStep(NamedTuple):
    """Fused logits (R, V) of some positions, weights (S, R) and divergences (R,)."""

    logits: Tensor
    alpha: Tensor
    kl_forward: Tensor
    kl_reverse: Tensor


class SmallModels:
    """Base and experts during one `generate`: they read the input of the large model after each of its forwards.

    Args:
        models: base and experts, each with its own device, dtype and cache; may be empty.
        fuse: takes logits (B, V) of the large model, those of `models`, on its device, and the arguments of the large
            model's call.
        vocab_size: V; the first V ids of each model are fused, and the logits of the others become −inf.
        prompt_length: P.
        trace_logits: k of the tokens of each model that are kept for `top_tokens`; 0 keeps none.
        drafted: whether an assistant drafts tokens (B = 1): each call then reads the drafted ones and may take back
            some of those that the last one read.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        fuse: Callable[[Tensor, Sequence[Tensor], Mapping[str, Any]], FusedStep],
        *,
        vocab_size: int,
        prompt_length: int,
        trace_logits: int = 0,
        drafted: bool = False,
    ) -> None:
        self.models, self.fuse = models, fuse
        self.drafted = drafted
        self.vocab_size, self.prompt_length = vocab_size, prompt_length
        self.trace_logits = trace_logits
        self.tops: dict[int, TopTokens] = {}  # (M, B, k), by the tokens read
        self.caches: list[Any] = [_croppable_cache(model) if drafted else None for model in models]
        self.length = 0
        self.steps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # weights and divergences by the tokens read

    def leading(self, large: PreTrainedModel) -> PreTrainedModel:
        """Return the large model with a hook that fuses its logits: an object of its own with the same parts.

        The given one stays as it is for whoever else calls it meanwhile: another thread, a logits processor, or the
        small models, of which it may be one. A hook on it would be seen by all of them.
        """
        own = copy(large)
        own._forward_hooks = OrderedDict(large._forward_hooks)
        own._forward_hooks_with_kwargs = OrderedDict(large._forward_hooks_with_kwargs)
        own._compiled_call_impl = None  # it would call the given one
        own.register_forward_hook(self._after_forward, with_kwargs=True)
        return own

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the logits of the last position by fused ones; of all that predict a drafted token, too."""
        # With a cache each call reads the tokens since the last one, without it the whole text again.
        uses_cache = bool(kwargs.get("use_cache")) or any(kwargs.get(name) is not None for name in CACHE_NAMES)
        read = kwargs["input_ids"].shape[1]
        if self.drafted:
            self._take_back(int(output[OUTPUT_CACHE_NAME].get_seq_length()) - read)
        self.length = self.length + read if uses_cache else read
        count = min(read, self.length - self.prompt_length + 1) if self.drafted else 1
        large = output.logits[:, -max(count, 1) :]
        rows = [self._last_logits(index, kwargs, uses_cache, large.shape[1]) for index in range(len(self.models))]
        if self.length < self.prompt_length:  # a chunk of a long prompt, after which no token is drawn
            return output
        size = self.vocab_size
        everyone = [logits[..., :size].flatten(0, 1).to(large.device) for logits in (large, *rows)]
        step = self.fuse(everyone[0], everyone[1:], kwargs)
        self._record(everyone, step, count)
        output["logits"] = F.pad(step.logits, (0, large.shape[2] - size), value=-torch.inf).view_as(large)
        return output

    def _take_back(self, length: int) -> None:
        """Drop the drafted tokens from the caches that the large model did not keep.

        Raises:
            ValueError: If a cache cannot, such as one of recurrent layers.
        """
        rejected, started = self.length - length, self.length > 0
        self.length = length
        for model, cache in zip(self.models, self.caches, strict=True):
            if started and not getattr(cache, "is_croppable", True):
                raise ValueError(
                    f"Expected models whose caches can drop drafted tokens, but {type(model).__name__} has one that"
                    " cannot. Leave the assistant out."
                )
            # Before transformers 5.24 a cache that is cropped by 0 is emptied, since then windows are cut to size.
            if rejected or (started and hasattr(cache, "activate_past_recording")):
                cache.crop(-rejected)

    def _record(self, everyone: Sequence[Tensor], step: FusedStep, count: int) -> None:
        """Keep weights and divergences by length, so that a position that is read again counts once."""
        for number, at in enumerate(torch.arange(len(step.kl_forward)).view(-1, count).unbind(1)):
            length = self.length - count + 1 + number
            self.steps[length] = step.alpha[:, at], step.kl_forward[at], step.kl_reverse[at]
            if self.trace_logits:
                k = min(self.trace_logits, self.vocab_size)
                found = [logits[at].float().log_softmax(-1).topk(k) for logits in everyone]
                self.tops[length] = TopTokens(*(torch.stack([one[i] for one in found]) for i in (1, 0)))

    def _last_logits(self, index: int, kwargs: Mapping[str, Any], uses_cache: bool, count: int) -> Tensor:
        """Return the logits (B, count, V) of a small model at the last positions."""
        model, ids, mask = self.models[index], kwargs["input_ids"], kwargs.get("attention_mask")
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": count}
        # From the large model or from the mask: a model that counts by itself counts the padding on the left too.
        inputs["position_ids"] = kwargs.get("position_ids")
        if inputs["position_ids"] is None and mask is not None:
            inputs["position_ids"] = position_ids_of(mask)[:, -ids.shape[1] :]
        if uses_cache:
            output, self.caches[index] = read_with_cache(model, inputs, self.caches[index], num_read=self.length)
        else:
            output = model(**accepted_inputs(model, {**inputs, "use_cache": False}))
        return output.logits[:, -count:]

    def trace(self, token_ids: Tensor, eos_token_id: int | Iterable[int], pad_token_id: int | None) -> FusionTrace:
        """Return weights and divergences of the tokens (B, N) that were kept, without steps that `generate` undid."""
        steps = [self.steps[self.prompt_length + i] for i in range(token_ids.shape[1])]
        alpha, forward, reverse = (torch.stack(values, -1) for values in zip(*steps, strict=True))
        ids = torch.as_tensor([*eos_token_id] if isinstance(eos_token_id, set) else eos_token_id).flatten().tolist()
        ends = torch.isin(token_ids, token_ids.new_tensor(ids))
        mask = (ends.cumsum(1) - ends.long()) == 0  # up to the end token, which counts
        # A text that ended in another way, such as by a stop string, has no end token, only padding after it.
        if pad_token_id is not None and pad_token_id not in ids:
            mask = mask & ((token_ids != pad_token_id).long().flip(1).cumsum(1).flip(1) > 0)
        return FusionTrace(token_ids, mask, alpha, forward, reverse)

    def top_tokens(self, num_tokens: int) -> TopTokens:
        """Return the likeliest tokens of each model where the first N tokens were drawn."""
        steps = [self.tops[self.prompt_length + i] for i in range(num_tokens)]
        return TopTokens(*(torch.stack(values, 2) for values in zip(*steps, strict=True)))


def _croppable_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache that can drop its last tokens, also where a layer keeps a window only."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if hasattr(cache, "activate_past_recording"):  # since transformers 5.24
        cache.activate_past_recording()
    return cache


def is_drafted(config: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a `generate` with this config drafts tokens: by an assistant, or by looking them up."""
    return config.get_generation_mode(kwargs.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION


def check_decoding(model: PreTrainedModel, kwargs: Mapping[str, Any], num_prompts: int = 1) -> Any:
    """Return the generation config that `model.generate(**kwargs)` would use, if small models can follow it.

    Raises:
        ValueError: If it asks for beams, caches, inputs or drafts that small models cannot follow.
    """
    config = deepcopy(kwargs.get("generation_config") or model.generation_config)
    config.update(**{k: v for k, v in kwargs.items() if k not in ("generation_config", "assistant_model")})
    for name in (*CACHE_NAMES, "inputs_embeds", "custom_generate"):
        if kwargs.get(name) is not None:
            raise ValueError(f"Expected no `{name}`, which the small models cannot follow, but got one.")
    if config.guidance_scale not in (None, 1) or config.token_healing:
        raise ValueError(
            "Expected neither `guidance_scale` nor `token_healing`, which run the large model on texts of their own,"
            f" but got {config.guidance_scale} and {config.token_healing}."
        )
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION):
        raise ValueError(
            f"Expected greedy search or sampling, because weights are found for one text at a time, but got"
            f" {str(mode.value).replace('_', ' ')}. Use `num_beams=1`."
        )
    drafts = mode == GenerationMode.ASSISTED_GENERATION
    if drafts and (num_prompts > 1 or config.use_cache is False):
        got = f"{num_prompts} prompts" if num_prompts > 1 else "use_cache=False"
        raise ValueError(f"Expected one prompt at a time and a cache where tokens are drafted, but got {got}.")
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"Expected `cache_implementation` to be None or 'dynamic', but got {config.cache_implementation!r}."
        )
    return config


def position_ids_of(mask: Tensor) -> Tensor:
    """Return the position of each token (B, T) among those that are not padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def split_prompts(batch: Mapping[str, Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return the prompts of a batch, all tokens before the first label, left-padded, and their attention mask.

    Args:
        batch: `input_ids` (B, T), optionally `attention_mask` and `labels` (−100 at prompt and padding).
        pad: id to pad with.

    Returns:
        Two tensors (B, longest prompt).

    Example:
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "labels": torch.tensor([[-100, -100, 3],
        ...     [-100, 5, -100]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
        >>> split_prompts(batch, pad=0)
        (tensor([[1, 2],
                [0, 4]]), tensor([[1, 1],
                [0, 1]]))
    """
    input_ids = batch["input_ids"]
    kept = batch.get("attention_mask", torch.ones_like(input_ids)).bool()
    if "labels" in batch:
        kept = kept & ((batch["labels"] != -100).cumsum(1) == 0)
    width = int(kept.sum(1).max())
    order = kept.long().argsort(dim=1, stable=True)[:, input_ids.shape[1] - width :]  # what is kept moves to the end
    mask = kept.gather(1, order)
    return input_ids.gather(1, order).masked_fill(~mask, pad), mask.long()
