"""Which of several experts acts: the one under which the text so far is likeliest.

Letters: B batch, T sequence, R rows (positions that count), V vocabulary, S experts.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lit_logits.functional.reductions import at_least_float32
from lit_logits.modules.dynamic_fusion.reading import logits_at

__all__ = ["FusionRouting", "TextRouter", "acting_logits", "text_log_likelihoods"]

FusionRouting = Literal["step", "text"]


def text_log_likelihoods(models: Sequence[PreTrainedModel], input_ids: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    """Return how likely texts are under each model up to each token, by one pass of each.

    The models read in turn, so that the logits of one are held at a time.

    Args:
        models: S of one vocabulary.
        input_ids: (B, T).
        mask: (B, T), 0 at padding.
        vocab_size: V, the first ids of each model.

    Returns:
        (S, B, T) sums of log-probabilities in nats, of all tokens but the first of a text.
    """
    follows = mask[:, :-1].bool() & mask[:, 1:].bool()  # a token after one of the same text
    keep, targets, found = F.pad(follows, (0, 1)), input_ids[:, 1:][follows], []
    dtype = torch.float64 if mask.device.type == "cpu" else torch.float32  # not all devices have the first
    for model in models:
        (logits,) = logits_at([model], input_ids, mask, keep, vocab_size)
        own = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        own[:, 1:][follows] = _token_log_probs(logits, targets).to(dtype)
        found.append(own.cumsum(1))
    return torch.stack(found)


def acting_logits(expert_logits: Tensor, acting: Tensor) -> Tensor:
    """Return the logits (1, R, V) of the expert of each row, from all (S, R, V) and its number (R,).

    Example:
        >>> acting_logits(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([1, 0])).tolist()
        [[[3.0], [2.0]]]
    """
    return expert_logits[acting, torch.arange(len(acting), device=acting.device)].unsqueeze(0)


class TextRouter:
    """Follows texts while they are decoded, and tells the expert under which each is likeliest.

    Args:
        experts: S models.
        input_ids: (B, P) prompts, which the experts read.
        mask: (B, P), 0 at padding.
        vocab_size: V.
    """

    def __init__(self, experts: Sequence[PreTrainedModel], input_ids: Tensor, mask: Tensor, vocab_size: int) -> None:
        self.sums = text_log_likelihoods(experts, input_ids, mask, vocab_size)[..., -1]
        self.last: list[Tensor] = []

    def choose(self, expert_logits: Sequence[Tensor], read: Tensor) -> Tensor:
        """Return the expert (R,) that acts next.

        Args:
            expert_logits: S times (R, V), after the tokens that were read.
            read: (R,) the last of these. With the first call it is the last of the prompt, which has been counted.
        """
        if not self.last:
            copies = len(read) // self.sums.shape[1]  # with `num_return_sequences`, side by side
            self.sums = self.sums.repeat_interleave(copies, 1).to(read.device)
        else:
            # A text that has ended reads padding, whose id need not be of the vocabulary, and goes nowhere.
            read = read.clamp(max=self.last[0].shape[1] - 1)
            came = torch.stack([_token_log_probs(logits, read) for logits in self.last])
            self.sums = self.sums + came.to(self.sums.dtype)
        self.last = list(expert_logits)
        return self.sums.argmax(0)


def _token_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probabilities (R,) of tokens (R,) under logits (R, V)."""
    logits = at_least_float32(logits)
    return logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
