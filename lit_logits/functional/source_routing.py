"""Which source teaches which sample: all, the one that explains the response best, or something in between.

Letters: B samples, T positions, S sources.
"""

import torch
from torch import Tensor

from lit_logits.functional.top_k_logits import SourceLogits

__all__ = ["response_nll", "route_by_nll"]


def response_nll(source: SourceLogits) -> Tensor:
    """Compute how badly a source explains each response: −log p of its text, in nats a byte.

    So tokenizers compare. What it predicts after the last place in the response, an end token, is left out. Where a
    source has no places, of a sample or at all, it is the mean over its tokens.

    Args:
        source: (B, T), with `label_log_probs`.

    Returns:
        (B,), at least float32; 0 for a sample without positions.

    Raises:
        ValueError: If the log-probabilities of the tokens that came are missing.
    """
    if source.label_log_probs is None:
        raise ValueError(
            "Expected the log-probabilities of the tokens that came, but a source lacks them. Write a cache of version"
            " 1 again, or load the model instead."
        )
    log_probs = source.label_log_probs.masked_fill(~source.mask, 0.0)
    ends = source.ends.masked_fill(~source.mask, -1)
    has_end, size = ends >= 0, ends.amax(-1)
    places = torch.arange(ends.shape[-1], device=ends.device).expand(ends.shape)
    last = places.masked_fill(~has_end, -1).amax(-1, keepdim=True)
    inside = (has_end.cumsum(-1) > 0) & (places < last)
    a_byte = log_probs.masked_fill(~inside, 0.0).sum(-1) / size.clamp(min=1)
    a_token = log_probs.sum(-1) / source.mask.sum(-1).clamp(min=1)
    return -torch.where(size > 0, a_byte, a_token)


def route_by_nll(nll: Tensor, temperature: float = 0.0) -> Tensor:
    """Return the share of each source in teaching each sample, softmax(−NLL / temperature).

    Args:
        nll: (B, S) of `response_nll`, in nats a byte.
        temperature: ≥ 0, in the same unit; 0 gives the whole to the best source, the first of equals.

    Returns:
        (B, S) shares, 1 in sum, without gradient.

    Raises:
        ValueError: If the temperature is negative.

    Example:
        >>> route_by_nll(torch.tensor([[0.7, 0.5]])), route_by_nll(torch.tensor([[0.7, 0.5]]), temperature=0.2)
        (tensor([[0., 1.]]), tensor([[0.2689, 0.7311]]))
    """
    if not temperature >= 0:
        raise ValueError(f"Expected `temperature` to be non-negative, but got {temperature}.")
    if temperature == 0:
        return torch.zeros_like(nll).scatter(-1, nll.argmin(-1, keepdim=True), 1.0).detach()
    return (-nll.detach() / temperature).softmax(-1)
