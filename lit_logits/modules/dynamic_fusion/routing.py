"""Which of several experts acts: the one under which the text so far is likeliest.

Letters: B batch, T sequence, P prompt, R rows (positions that count), V vocabulary, S experts.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.functional.reductions import at_least_float32
from lit_logits.modules.dynamic_fusion.reading import logits_at

__all__ = ["FusionRouting", "TextRouter", "likelihoods_of_tokens"]

FusionRouting = Literal["step", "text"]


def likelihoods_of_tokens(
    models: Sequence[PreTrainedModel],
    input_ids: Tensor,
    mask: Tensor,
    vocab_size: int,
    check: Callable[[int, Tensor], None] = lambda number, logits: None,
) -> Tensor:
    """Return how likely each token of a text is under each model, by one pass of each.

    The models read in turn, so that the logits (B, T, V) of one are held at a time.

    Args:
        models: S of one vocabulary.
        input_ids: (B, T).
        mask: (B, T), 0 at padding.
        vocab_size: V, the first ids of each model.
        check: is given the number of each model and its logits (R, V).

    Returns:
        (S, B, T) log-probabilities in nats, in float64 in host memory; 0 at padding, at the first token of a text, and
        at a token that no model can emit, which says nothing of them.
    """
    follows = mask[:, :-1].bool() & mask[:, 1:].bool()  # a token after one of the same text
    keep, targets = F.pad(follows, (0, 1)), input_ids[:, 1:][follows]
    found = torch.zeros(len(models), *mask.shape, dtype=torch.float64)
    for number, model in enumerate(models):
        (logits,) = logits_at([model], input_ids, mask, keep, vocab_size)
        check(number, logits)
        size = rows_a_chunk(vocab_size)
        parts = [_token_log_probs(*part) for part in zip(logits.split(size), targets.split(size), strict=True)]
        if parts:
            found[number, :, 1:][follows.cpu()] = torch.cat(parts).double().cpu()
    return _without_impossible(found)


class TextRouter:
    """Follows texts while they are decoded, and tells the expert under which each is likeliest.

    Args:
        log_likelihoods: (S, B) of the prompts under the experts, in nats.
    """

    def __init__(self, log_likelihoods: Tensor) -> None:
        self.sums = log_likelihoods
        self.last: Tensor | None = None

    def choose(self, expert_logits: Tensor, read: Tensor) -> Tensor:
        """Return the expert (R,) that acts next; the lowest number among equals.

        Args:
            expert_logits: (S, R, V), after the tokens that were read.
            read: (R,) the last of these. With the first call it is the last of the prompt, which has been counted.
        """
        if self.last is None:
            copies = len(read) // self.sums.shape[1]  # with `num_return_sequences`, side by side
            # Not all devices have float64.
            dtype = torch.float64 if read.device.type == "cpu" else torch.float32
            self.sums = self.sums.repeat_interleave(copies, 1).to(read.device, dtype)
        else:
            # A text that has ended reads padding, whose id need not be of the vocabulary, and goes nowhere.
            read = read.clamp(max=self.last.shape[2] - 1)
            came = torch.stack([_token_log_probs(logits, read) for logits in self.last])
            self.sums = self.sums + _without_impossible(came).to(self.sums.dtype)
        self.last = expert_logits
        return self.sums.argmax(0)


def _token_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probabilities (R,) of tokens (R,) under logits (R, V)."""
    logits = at_least_float32(logits)
    return logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


def _without_impossible(log_probs: Tensor) -> Tensor:
    """Return log-probabilities (S, ...) with 0 where all are −inf; else sums would stay there, and all be alike."""
    return log_probs.masked_fill((log_probs == -torch.inf).all(0), 0.0)
