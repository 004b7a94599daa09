"""The dense output layer, with the methods of `VQLogitsHead`.

Letters: N tokens, d hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_logits.contracts import Calibrate, OutputLayer
from lit_logits.functional.checks import check_labels
from lit_logits.functional.codebook import Footprint, unigram_bias
from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens, soft_cap
from lit_logits.functional.vq_decoding import sample_logits

__all__ = ["DenseLogitsHead"]


class DenseLogitsHead(nn.Module):
    """The (V, d) output layer with the methods of `VQLogitsHead`, as the baseline.

    Args:
        hidden_size: d.
        vocab_size: V.
        bias: learn a bias for each token.

    Attributes:
        logit_cap: c of a soft cap on the logits before the bias is added, or None; see `CappedHead`.
        weight: (V, d) parameter.
        token_bias: (V,) parameter in nats, or None.
    """

    def __init__(self, hidden_size: int, vocab_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.weight = nn.Parameter(torch.randn(vocab_size, hidden_size) * 0.02)
        self.token_bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.logit_cap: float | None = None
        self.register_load_state_dict_pre_hook(_check_vocabulary)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return token logits (..., V) in nats of hidden states (..., d)."""
        if self.logit_cap is None:
            return F.linear(hidden, self.weight, self.token_bias)
        logits = soft_cap(F.linear(hidden, self.weight), self.logit_cap)
        return logits if self.token_bias is None else logits + self.token_bias

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy in nats, by way of the (N, V) logits; arguments as in `VQLogitsHead.loss`."""
        check_labels(labels, self.weight.shape[0], ignore_index=ignore_index)
        logits = at_least_float32(self(hidden)).reshape(-1, self.vocab_size)
        losses = F.cross_entropy(logits, labels.flatten().long(), ignore_index=ignore_index, reduction="none")
        return reduce_tokens(losses.view_as(labels), labels != ignore_index, reduction)

    @torch.no_grad()
    def copy_output_layer(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Copy the rows (V, d) and bias (V,) of a pretrained output layer; None leaves the tensor as it is."""
        if weight is not None:
            self.weight.copy_(weight)
        if bias is None:
            return
        if self.token_bias is None:
            raise ValueError("Expected `bias=True`, because the pretrained output layer has a bias.")
        self.token_bias.copy_(bias)

    def prepare(self, layer: OutputLayer, table: nn.Embedding) -> bool:
        """Copy a pretrained layer; the head is then ready without data. See `StartingHead`."""
        self.copy_output_layer(*layer)
        return layer.weight is not None

    @torch.no_grad()
    def start(self, calibrate: Calibrate, layer: OutputLayer, *, progress_bar: bool = False) -> None:
        """Start the bias from token counts, as a new `VQLogitsHead` does; a pretrained layer stays as it is."""
        if self.token_bias is not None and layer.weight is None:
            self.token_bias.copy_(unigram_bias(calibrate().token_counts))

    def greedy(self, hidden: Tensor) -> Tensor:
        """Return the most likely tokens (...) of hidden states (..., d)."""
        return self(hidden).argmax(dim=-1)

    def sample(self, hidden: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return tokens (...) drawn from softmax(logits / temperature) of hidden states (..., d)."""
        return sample_logits(self(hidden), temperature, generator)

    def dense_weight(self) -> Tensor:
        """Return the weight (V, d); compressed heads decode theirs."""
        return self.weight

    def footprint(self) -> Footprint:
        """Return parameters and bytes, and those of the dense head without a bias."""
        dense = self.weight.numel()
        size = dense + (0 if self.token_bias is None else self.token_bias.numel())
        itemsize = self.weight.dtype.itemsize
        return Footprint(size, size * itemsize, dense, dense * itemsize)


def _check_vocabulary(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Refuse a checkpoint of another vocabulary, and say what to do."""
    loaded, own = state_dict.get(prefix + "weight"), module.vocab_size
    if loaded is not None and loaded.shape[0] != own:
        raise ValueError(
            f"Expected a checkpoint with `vocab_size` {own}, but this one has {loaded.shape[0]}. Use the tokenizer that"
            " it was trained with."
        )
