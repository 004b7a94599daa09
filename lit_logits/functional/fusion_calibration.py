"""How likely given tokens are under many settings of fusion, from one set of logits.

Letters: R rows (positions), V vocabulary, S experts, C candidates.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lit_logits.functional.checks import may_read
from lit_logits.functional.fusion_problem import check_alpha, check_fusion_shapes, promoted

__all__ = ["fused_log_probs"]


@torch.no_grad()
def fused_log_probs(
    large_logits: Tensor, base_logits: Tensor, expert_logits: Tensor, labels: Tensor, candidates: Iterable[Tensor]
) -> Tensor:
    """Return the log-probabilities of tokens under fused distributions with different weights.

    The distributions are those of `fuse_logits`. How experts differ from the base is found once, and one fused
    distribution (R, V) is held at a time, however many candidates there are.

    Args:
        large_logits: (R, V) of the large model, before each token.
        base_logits: (R, V) of the small base.
        expert_logits: (S, R, V) of the experts.
        labels: (R,) the tokens that came.
        candidates: C times weights (S, R).

    Returns:
        (C, R) log-probabilities in nats, at least float32.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> zeros, expert = torch.zeros(1, 2), torch.tensor([[[0.0, 2.0]]])
        >>> weights = [torch.tensor([[0.0]]), torch.tensor([[1.0]])]
        >>> fused_log_probs(zeros, zeros, expert, torch.tensor([1]), weights)
        tensor([[-0.6931],
                [-0.1269]])
    """
    check_fusion_shapes(large_logits, base_logits, expert_logits)
    large, base, experts = promoted(large_logits, base_logits, expert_logits)
    impossible = base == -torch.inf  # to the base: the large model's logit stays
    ruled_out = (experts == -torch.inf) & ~impossible
    differences = (experts - base).masked_fill_(ruled_out | impossible, 0.0)
    masked = not may_read(ruled_out) or bool(ruled_out.any())  # a mask costs a pass over V
    found = []
    for alpha in candidates:
        check_alpha(alpha, experts)
        fused = large
        for expert, weight in enumerate(alpha.to(large.dtype).unsqueeze(-1)):
            fused = torch.addcmul(fused, differences[expert], weight)
            if masked:
                fused = fused.masked_fill(ruled_out[expert] & (weight != 0), -torch.inf)
        chosen = fused.gather(1, labels.unsqueeze(1)).squeeze(1)
        found.append(chosen - fused.logsumexp(-1))
    return torch.stack(found)
