"""The k largest logits of each position, taken after the softmax over the whole vocabulary, with the mass of the rest.

Letters: N positions, V vocabulary, k `top_k`, τ temperature, u = z/τ the tempered logits.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_logits.functional.reductions import true_places

__all__ = [
    "LogitValues",
    "SourceLogits",
    "TopKLogits",
    "gather_positions",
    "place_rows",
    "top_k_logits",
    "top_k_values",
]

LogitValues = Literal["softmax", "standardize", "logits"]

_CHUNK_ELEMENTS = 1 << 21  # logits a chunk: what is made on the way stays in the cache of a core


class TopKLogits(NamedTuple):
    """Result of `top_k_logits`, at least float32; u = z/τ.

    Attributes:
        log_probs: (..., k) largest log softmax(u), descending, in nats.
        token_ids: (..., k) their tokens.
        tail: (...) probability of all other tokens, in [0, 1].
        log_normalizer: (...) log Σ_v exp u_v; `log_probs + log_normalizer` are the logits u.
        mean: (...) of u over the vocabulary.
        std: (...) population standard deviation of u over the vocabulary; like `mean` without meaning where tokens are
            ruled out by logits of −inf or of huge size.
    """

    log_probs: Tensor
    token_ids: Tensor
    tail: Tensor
    log_normalizer: Tensor
    mean: Tensor
    std: Tensor


def top_k_logits(logits: Tensor, top_k: int, *, temperature: float = 1.0) -> TopKLogits:
    """Find the k largest log-probabilities of each position, the mass of the tail and two moments of the logits.

    Positions are worked through in chunks, forward and backward: except for the logits and their gradient nothing of
    the size (N, V) is made, whatever their dtype.

    Args:
        logits: (..., V) in nats.
        top_k: k, in [1, V].
        temperature: τ > 0.

    Raises:
        ValueError: If k or τ is out of range.

    Example:
        >>> top = top_k_logits(torch.tensor([0.0, 1.3863, 0.6931]), 2)  # probabilities 1/7, 4/7, 2/7
        >>> top.log_probs.exp(), top.token_ids, top.tail
        (tensor([0.5714, 0.2857]), tensor([1, 2]), tensor(0.1429))
    """
    size = logits.shape[-1]
    if not 1 <= top_k <= size:
        raise ValueError(f"Expected `top_k` to be in [1, {size}], the vocabulary, but got {top_k}.")
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive, but got {temperature}.")
    shape = logits.shape[:-1]
    log_probs, token_ids, *rest = _TopKLogits.apply(logits.reshape(-1, size), top_k, float(temperature))
    tail, log_normalizer, mean, std = (tensor.view(shape) for tensor in rest)
    return TopKLogits(log_probs.view(*shape, top_k), token_ids.view(*shape, top_k), tail, log_normalizer, mean, std)


def top_k_values(top: TopKLogits, values: LogitValues) -> Tensor:
    """Return the values that a loss compares: (..., k), descending.

    Args:
        top: of one model.
        values: `softmax`: probabilities; `standardize`: (u − mean) / std with the moments over the vocabulary, which
            neither a constant nor a factor in the logits changes; `logits`: u itself, constant and all.

    Raises:
        ValueError: If `values` is unknown.

    Example:
        >>> top_k_values(top_k_logits(torch.tensor([0.0, 1.0, 2.0]), 2), "standardize")
        tensor([1.2247, 0.0000])
    """
    if values == "softmax":
        return top.log_probs.exp()
    if values == "logits":
        return top.log_probs + top.log_normalizer.unsqueeze(-1)
    if values == "standardize":
        # Not with the moments of the k values: their sum would be 0, and with it every node strength of the graph.
        return (top.log_probs + (top.log_normalizer - top.mean).unsqueeze(-1)) / top.std.unsqueeze(-1).clamp(min=1e-6)
    raise ValueError(f"Expected values to be 'softmax', 'standardize' or 'logits', but got {values!r}.")


def place_rows(rows: TopKLogits, mask: Tensor) -> TopKLogits:
    """Put the rows of positions that count at their places; elsewhere there are zeros.

    Args:
        rows: (N, ...) of the positions where `mask` is true, in their order.
        mask: boolean (B, T).

    Returns:
        (B, T, ...).

    Example:
        >>> rows = top_k_logits(torch.tensor([[0.0, 0.0]]), 1)
        >>> place_rows(rows, torch.tensor([[False, True]])).log_probs.squeeze(-1)
        tensor([[ 0.0000, -0.6931]])
    """
    places = true_places(mask, len(rows.log_probs))

    def place(tensor: Tensor) -> Tensor:
        empty = tensor.new_zeros(mask.numel(), *tensor.shape[1:])
        return empty.index_copy(0, places, tensor).view(*mask.shape, *tensor.shape[1:])

    return TopKLogits(*map(place, rows))


def gather_positions(top: TopKLogits, index: Tensor) -> TopKLogits:
    """Gather the rows of other positions.

    Args:
        top: (B, U, ...).
        index: (B, T) positions in [0, U).

    Returns:
        (B, T, ...).

    Example:
        >>> top = top_k_logits(torch.tensor([[[0.0, 0.0], [0.0, 9.0]]]), 1)
        >>> gather_positions(top, torch.tensor([[1, 1, 0]])).token_ids.squeeze(-1).shape
        torch.Size([1, 3])
    """
    wide = index.unsqueeze(-1)
    return TopKLogits(
        *(t.gather(1, wide.expand(-1, -1, t.shape[-1])) if t.ndim == 3 else t.gather(1, index) for t in top)
    )


class _TopKLogits(torch.autograd.Function):
    """`top_k_logits` of (N, V); of that size it keeps only the logits for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, ...]:
        dtype, size = torch.promote_types(logits.dtype, torch.float32), logits.shape[1]
        rows = _rows_a_chunk(size)
        parts: list[tuple[Tensor, ...]] = []
        for chunk in logits.split(rows) if len(logits) else [logits]:
            u = chunk.to(dtype) if temperature == 1 else chunk.to(dtype) / temperature
            top, token_ids = u.topk(top_k, dim=-1)
            # In two passes: the mean of squares less the squared mean would cancel for logits far from 0.
            mean = u.mean(-1, keepdim=True)
            std = torch.linalg.vector_norm(u - mean, dim=-1) / math.sqrt(size)
            highest = top[:, :1]
            log_normalizer = highest + (u - highest).exp_().sum(-1, keepdim=True).log_()
            parts.append((top - log_normalizer, token_ids, log_normalizer.squeeze(1), mean.squeeze(1), std))
        log_probs, token_ids, log_normalizer, mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        tail = (1 - log_probs.exp().sum(-1)).clamp_(min=0)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, log_probs, token_ids, log_normalizer, mean, std)
        ctx.mark_non_differentiable(token_ids)
        return log_probs, token_ids, tail, log_normalizer, mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_top, _, grad_tail, grad_normalizer, grad_mean, grad_std = grads
        logits, log_probs, token_ids, log_normalizer, mean, std = ctx.saved_tensors
        size = logits.shape[1]
        # The tail is 1 − Σ exp(log_probs), so its gradient joins that of the log-probabilities. Then, of logits u:
        # dlog Z/du = softmax(u), dmean/du = 1/V, dstd/du = (u − mean) / (V std).
        grad_top = grad_top - grad_tail.unsqueeze(-1) * log_probs.exp()
        grad_normalizer = grad_normalizer - grad_top.sum(-1)  # log-probabilities are u minus the normaliser
        slope = torch.where(grad_std == 0, 0.0, grad_std / (size * std.clamp(min=1e-6)))
        level = grad_mean / size - torch.where(slope == 0, 0.0, slope * mean)
        grad_logits = torch.empty_like(logits)
        for start in range(0, len(logits), rows := _rows_a_chunk(size)):
            part = slice(start, start + rows)
            u = logits[part].to(log_probs.dtype)
            u = u / ctx.temperature if ctx.temperature != 1 else u
            grad = (u - log_normalizer[part, None]).exp_().mul_(grad_normalizer[part, None])
            # Where no gradient reaches the moments, 0 times a logit of −inf would be NaN.
            grad.addcmul_(u.masked_fill(slope[part, None] == 0, 0.0), slope[part, None]).add_(level[part, None])
            grad.scatter_add_(1, token_ids[part], grad_top[part])
            grad_logits[part] = grad if ctx.temperature == 1 else grad.div_(ctx.temperature)
        return grad_logits, None, None


def _rows_a_chunk(vocab_size: int) -> int:
    return max(1, _CHUNK_ELEMENTS // vocab_size)


class SourceLogits(NamedTuple):
    """Top-k logits of one source for a batch of responses.

    Attributes:
        top_k: of each position; `log_probs` and `token_ids` are (B, T, k), the others (B, T). Normalisers and moments
            are NaN at positions that count where log-probabilities are all that is known.
        mask: (B, T) bool; positions that count.
        ends: (B, T) int64; bytes of the response that are read at the position, −1 where there is no such number: where
            it does not count, within a character that tokens do not cut by bytes, and after the response.
        label_log_probs: (B, T) log-probability at τ = 1 of the token that came, in nats, 0 where none counts; None
            where it is not known.
        boundary_log_probs: (B, T) log-probability at τ = 1 of a boundary (`functional.boundary_tokens`), in nats, 0
            where none counts; None where it is not known.
    """

    top_k: TopKLogits
    mask: Tensor
    ends: Tensor
    label_log_probs: Tensor | None = None
    boundary_log_probs: Tensor | None = None
