"""Likelihoods of chunks of text that two tokenizations cut at the same places, and the loss that compares them.

Where both models have read the same text there is a cut. Between two cuts lies a chunk, which each model reads in its
own tokens, and whose log-likelihood is the sum of their log-probabilities: ℓ_s of the source and ℓ_p of the pivot. A
model is asked one question a chunk: how likely was it? [0]

Letters: B samples, T positions.

References:
    [0]: ALM: approximate likelihood matching, 2025, arXiv 2503.20083.
"""

import torch
from torch import Tensor

from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens

__all__ = ["chunk_likelihood_loss", "sum_chunks"]


def chunk_likelihood_loss(
    pivot_log_probs: Tensor,
    source_log_probs: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the binarised divergence of chunk likelihoods [0],

        D(e^{ℓ_s/τ} ‖ e^{ℓ_p/τ}) + D(1 − e^{ℓ_s/τ} ‖ 1 − e^{ℓ_p/τ}),        D(p ‖ q) = p log(p/q).

    It is the KL divergence of two coins: the chunk came, or another text did. It is 0 where both are equally likely. A
    large τ brings likelihoods of long chunks, which are all close to 0, to where their differences show.

    Args:
        pivot_log_probs: ℓ_p of each chunk, any shape, at most 0, in nats.
        source_log_probs: ℓ_s, of the same shape. No gradient reaches it.
        mask: chunks that count; None is all.
        temperature: τ > 0; 100 in the paper's runs.
        reduction: over chunks.

    Returns:
        Nats, at least float32; a scalar, or a value a chunk for `none`.

    Raises:
        ValueError: If τ is not positive, or the chunks do not agree.

    Example:
        >>> chunk_likelihood_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), temperature=1.0)
        tensor(0.1308)
    """
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive, but got {temperature}.")
    if pivot_log_probs.shape != source_log_probs.shape:
        raise ValueError(
            "Expected `pivot_log_probs` and `source_log_probs` of the same chunks, but got shapes"
            f" {tuple(pivot_log_probs.shape)} and {tuple(source_log_probs.shape)}."
        )
    both = pivot_log_probs, source_log_probs.detach()
    log_q, log_p = (_within(at_least_float32(log_probs) / temperature) for log_probs in both)
    yes = log_p.exp() * (log_p - log_q)
    no = -log_p.expm1() * (_log_complement(log_p) - _log_complement(log_q))
    loss = yes + no
    return reduce_tokens(loss, torch.ones_like(loss, dtype=torch.bool) if mask is None else mask, reduction)


def sum_chunks(log_probs: Tensor, is_cut: Tensor) -> Tensor:
    """Sum log-probabilities over chunks: at each cut, from there to before the next cut.

    Args:
        log_probs: (B, T) of the token that came after each position; 0 where none counts.
        is_cut: boolean (B, T), positions where a chunk begins.

    Returns:
        (B, T): the sum of a chunk where it begins, and 0 elsewhere. What comes before the first cut belongs to none.

    Example:
        >>> sum_chunks(torch.tensor([[-9.0, -1.0, -2.0, -4.0]]), torch.tensor([[False, True, False, True]]))
        tensor([[ 0., -3.,  0., -4.]])
    """
    places = torch.arange(is_cut.shape[-1], device=is_cut.device).expand(is_cut.shape)
    begin = places.masked_fill(~is_cut, -1).cummax(-1).values
    values = at_least_float32(log_probs).masked_fill(begin < 0, 0.0)
    return torch.zeros_like(values).scatter_add(-1, begin.clamp(min=0), values)


def _within(log_probs: Tensor) -> Tensor:
    """Keep log-probabilities below 0 and finite, so that neither side of the coin is impossible."""
    finfo = torch.finfo(log_probs.dtype)
    return log_probs.clamp(min=finfo.min / 4, max=-finfo.tiny)


def _log_complement(log_probs: Tensor) -> Tensor:
    """Return log(1 − e^x)."""
    return (-log_probs.expm1()).log()
