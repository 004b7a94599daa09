"""How likely given tokens are under many settings of fusion, from one set of logits.

Letters: R rows (positions), V vocabulary, S experts, C candidates.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lit_logits.functional.dynamic_fusion import fuse_logits

__all__ = ["fused_log_probs"]


@torch.no_grad()
def fused_log_probs(
    large_logits: Tensor, base_logits: Tensor, expert_logits: Tensor, labels: Tensor, candidates: Iterable[Tensor]
) -> Tensor:
    """Return the log-probabilities of tokens under fused distributions with different weights.

    One fused distribution (R, V) is held at a time, however many candidates there are.

    Args:
        large_logits: (R, V) of the large model, before each token.
        base_logits: (R, V) of the small base.
        expert_logits: (S, R, V) of the experts.
        labels: (R,) the tokens that came.
        candidates: C times weights (S, R).

    Returns:
        (C, R) log-probabilities in nats.

    Example:
        >>> zeros, expert = torch.zeros(1, 2), torch.tensor([[[0.0, 2.0]]])
        >>> weights = [torch.tensor([[0.0]]), torch.tensor([[1.0]])]
        >>> fused_log_probs(zeros, zeros, expert, torch.tensor([1]), weights)
        tensor([[-0.6931],
                [-0.1269]])
    """
    found = []
    for alpha in candidates:
        fused = fuse_logits(large_logits, base_logits, expert_logits, alpha)
        found.append(fused.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1))
    return torch.stack(found)
