"""Output layers that people have instead of a codebook, as heads of `VQLogitsLM`.

Letters: d hidden size, V vocabulary, r rank.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_logits.contracts import Calibrate, OutputLayer
from lit_logits.functional import reduce_tokens, unigram_bias
from lit_logits.functional.reductions import Reduction

__all__ = ["AdaptiveSoftmaxHead", "LowRankHead", "equal_rank"]


def equal_rank(rows: int, hidden_size: int, vocab_size: int) -> int:
    """The rank whose two factors have as many floats as so many rows of size d, or nearly; 1 at least."""
    return max(1, round(rows * hidden_size / (vocab_size + hidden_size)))


class _StartsFromCounts(nn.Module):
    """A head that starts from token counts alone; see `StartingHead`."""

    def prepare(self, layer: OutputLayer, table: nn.Embedding) -> bool:
        """Ask for data."""
        return False

    def start(self, calibrate: Calibrate, layer: OutputLayer, *, progress_bar: bool = False) -> None:
        """Start biases as those of a unigram model."""
        self.set_counts(calibrate().token_counts)

    def set_counts(self, token_counts: Tensor) -> None:
        """Set what depends on counts (V,)."""
        raise NotImplementedError


class LowRankHead(_StartsFromCounts):
    """Logits through r numbers, U D h + b, with U (V, r) and D (r, d): the dense layer factorised."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int) -> None:
        super().__init__()
        std = (0.02 / rank**0.5) ** 0.5  # of both, so that the entries of U D have 0.02, as the dense layer's
        self.down = nn.Parameter(torch.randn(rank, hidden_size) * std)
        self.up = nn.Parameter(torch.randn(vocab_size, rank) * std)
        self.token_bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., d)."""
        return F.linear(F.linear(hidden, self.down), self.up, self.token_bias)

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy, by way of the logits."""
        logits = self(hidden).flatten(0, -2)
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="none")
        return reduce_tokens(losses.view_as(labels), labels != ignore_index, reduction)

    @torch.no_grad()
    def set_counts(self, token_counts: Tensor) -> None:
        """Start the bias as that of a unigram model."""
        self.token_bias.copy_(unigram_bias(token_counts))


class AdaptiveSoftmaxHead(_StartsFromCounts):
    """torch's `nn.AdaptiveLogSoftmaxWithLoss`: a short list, and groups of rarer tokens in fewer dims.

    Its classes are tokens in the order of their counts.

    Args:
        hidden_size: d.
        vocab_size: V.
        cutoffs: tokens of the short list, and where the further groups end.
        div_value: each group has this factor fewer dims than the one before.
    """

    token_to_class: Tensor

    def __init__(self, hidden_size: int, vocab_size: int, cutoffs: Sequence[int], *, div_value: float = 4.0) -> None:
        super().__init__()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(
            hidden_size, vocab_size, list(cutoffs), div_value=div_value, head_bias=True
        )
        self.register_buffer("token_to_class", torch.arange(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities (..., V) of hidden states (..., d)."""
        log_probs = self.softmax.log_prob(hidden.flatten(0, -2))[:, self.token_to_class]
        return log_probs.unflatten(0, hidden.shape[:-1])

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy."""
        mask = labels != ignore_index
        log_probs = self.softmax(hidden[mask], self.token_to_class[labels[mask]]).output
        losses = log_probs.new_zeros(labels.shape).masked_scatter(mask, -log_probs)
        return reduce_tokens(losses, mask, reduction)

    @torch.no_grad()
    def set_counts(self, token_counts: Tensor) -> None:
        """Order the classes by count, and start the biases of short list and groups as those of a unigram model."""
        order = token_counts.argsort(descending=True, stable=True)
        self.token_to_class[order] = torch.arange(len(order), device=order.device)
        probs = unigram_bias(token_counts)[order].exp()
        short, *ends = self.softmax.cutoffs
        groups = [probs[begin:end].sum() for begin, end in zip([short, *ends], ends, strict=False)]
        self.softmax.head.bias.copy_(torch.cat([probs[:short], torch.stack(groups)]).log())
