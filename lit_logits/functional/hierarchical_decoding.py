"""Decoding of two levels of codes: exact, and from the likeliest clusters alone. See `hierarchical_vq`.

Letters: N hidden states, d hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.hierarchical_vq import (
    HierarchicalCodes,
    cluster_log_probs,
    member_log_probs,
    member_logits,
    padded_bias,
    stage_logits,
)

__all__ = ["TopTokens", "hierarchical_greedy", "hierarchical_sample", "hierarchical_top_k"]

_CLUSTERS_AT_ONCE = 8


class TopTokens(NamedTuple):
    """Result of `hierarchical_top_k`.

    Attributes:
        log_probs: (..., k) in nats, falling.
        token_ids: (..., k) int64.
    """

    log_probs: Tensor
    token_ids: Tensor


def hierarchical_greedy(hidden: Tensor, head: HierarchicalCodes) -> Tensor:
    """Return the most likely tokens (...) of hidden states (..., d), exactly, without logits of all tokens.

    See `hierarchical_top_k`. Ties go to the likelier cluster, and in it to the lower id.
    """
    return hierarchical_top_k(hidden, head, 1).token_ids.squeeze(-1)


@torch.no_grad()
def hierarchical_top_k(hidden: Tensor, head: HierarchicalCodes, k: int) -> TopTokens:
    """Return the k most likely tokens of hidden states (..., d), exactly, without logits of all tokens.

    No token is likelier than its cluster, so clusters are opened from the likeliest on, until the last of the k best
    tokens found is as likely as the next cluster.

    Args:
        hidden: (..., d).
        head: the codes.
        k: in [1, V].

    Raises:
        ValueError: If k is out of range.

    Example:
        >>> from lit_logits.functional.hierarchical_vq import cluster_layout
        >>> layout = cluster_layout(torch.tensor([1, 0, 1]), torch.tensor([[0], [0], [1]]), 2, [2])
        >>> bias = torch.tensor([1.0, 0.0, 0.0])
        >>> head = HierarchicalCodes(torch.zeros(2, 4), torch.zeros(2, 4), layout, torch.zeros(2), token_bias=bias)
        >>> hierarchical_top_k(torch.zeros(4), head, 2)
        TopTokens(log_probs=tensor([-0.6931, -1.0064]), token_ids=tensor([1, 0]))
    """
    layout = head.layout
    if not 1 <= k <= len(layout.places):
        raise ValueError(f"Expected `k` to be in [1, {len(layout.places)}], the vocabulary size, but got {k}.")
    rows = hidden.reshape(-1, hidden.shape[-1])
    bounds, order = cluster_log_probs(rows, head).sort(dim=-1, descending=True, stable=True)
    stages, bias = stage_logits(rows, head), padded_bias(head)
    best = bounds.new_full((len(rows), k), -torch.inf)
    tokens = order.new_zeros(len(rows), k)
    open_rows = torch.arange(len(rows), device=rows.device)
    for start in range(0, order.shape[1], _CLUSTERS_AT_ONCE):
        chosen = order[open_rows, start : start + _CLUSTERS_AT_ONCE]
        width = chosen.shape[1]
        inner = member_logits(stages[open_rows].repeat_interleave(width, 0), chosen.flatten(), head, bias)
        inside = F.log_softmax(inner, -1).nan_to_num(nan=-torch.inf)  # NaN of clusters without members
        joint = bounds[open_rows, start : start + width].unsqueeze(-1) + inside.view(*chosen.shape, -1)
        values, at = _largest(joint.flatten(1), k)
        found = layout.members[chosen].flatten(1).gather(1, at)
        # Those of likelier clusters first: among equals they stay.
        values, found = torch.cat([best[open_rows], values], 1), torch.cat([tokens[open_rows], found], 1)
        best[open_rows], at = _largest(values, k)
        tokens[open_rows] = found.gather(1, at)
        if start + width >= order.shape[1]:
            break
        open_rows = open_rows[best[open_rows, -1] < bounds[open_rows, start + width]]
        if len(open_rows) == 0:
            break
    shape = *hidden.shape[:-1], k
    return TopTokens(best.view(shape), tokens.view(shape))


@torch.no_grad()
def hierarchical_sample(hidden: Tensor, head: HierarchicalCodes, *, generator: torch.Generator | None = None) -> Tensor:
    """Return tokens (...) drawn from p(v | h) of hidden states (..., d): a cluster, then a token of it."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    drawn = torch.multinomial(cluster_log_probs(rows, head).exp(), 1, generator=generator).squeeze(1)
    inner = member_log_probs(rows, drawn, head)
    places = torch.multinomial(inner.exp(), 1, generator=generator).squeeze(1)
    return head.layout.members[drawn, places].reshape(hidden.shape[:-1])


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row, or all if there are fewer, and their places; for k = 1 the first of equals."""
    if k == 1:
        highest, at = values.max(-1, keepdim=True)
        return highest, at
    found, at = values.topk(min(k, values.shape[-1]), -1)
    return found, at
