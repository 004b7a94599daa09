"""Number of residual stages of each token, by its frequency or within a number of bytes.

Letters: V vocabulary, K codes, G groups of width d/G, S stages, of which token v owns S_v.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_logits.functional.bit_packing import code_bits

__all__ = ["stages_by_rank", "stages_for_bytes"]


def stages_by_rank(token_counts: Tensor, num_stages: int | Mapping[int, int]) -> Tensor:
    """Return the number of stages that each token owns, by its frequency rank.

    Args:
        token_counts: (V,), how often each token occurs; equal counts rank by id.
        num_stages: one number for all tokens, or tiers {rank: stages}. With {1000: 3, 50000: 1}, tokens of frequency
            rank below 1,000 own 3 stages. Tokens beyond the largest rank own as many as the last tier.

    Returns:
        (V,) int64.

    Raises:
        ValueError: If tiers have no stages, or stages that grow with the rank.

    Example:
        >>> stages_by_rank(torch.tensor([5.0, 9.0, 1.0]), {1: 3, 3: 1})
        tensor([1, 3, 1])
    """
    tiers = {token_counts.numel(): num_stages} if isinstance(num_stages, int) else dict(num_stages)
    tiers = {rank: tiers[rank] for rank in sorted(tiers)}
    stages = list(tiers.values())
    if not all(isinstance(number, int) for number in (*tiers, *stages)):
        raise ValueError(f"Expected the ranks and stages of `num_stages` to be integers, but got {num_stages}.")
    if not tiers or min(tiers) < 1 or min(stages) < 1 or stages != sorted(stages, reverse=True):
        raise ValueError(
            "Expected `num_stages` to be a positive number, or tiers {rank: stages} whose stages are positive and fall"
            f" as the rank rises, but got {num_stages}."
        )
    rank = torch.empty(token_counts.numel(), dtype=torch.int64, device=token_counts.device)
    rank[token_counts.argsort(descending=True, stable=True)] = torch.arange(rank.numel(), device=rank.device)
    # Without the last bound, so that tokens beyond it fall into the last tier.
    bounds = torch.tensor(list(tiers)[:-1], dtype=torch.int64, device=rank.device)
    return torch.tensor(stages, device=rank.device)[torch.bucketize(rank, bounds, right=True)]


def stages_for_bytes(
    token_weights: Tensor, num_code_bytes: float, *, max_stages: int, codebook_size: int, num_groups: int, width: int
) -> Tensor:
    """Choose the stages of each token that minimise the expected error within a number of bytes for the codes.

    A stage of K codes in `width` dimensions leaves about K^(−2/width) of a squared error, so that the s-th stage of
    token v is worth w_v · K^(−2 s/width). The most valuable stages are bought first; every token gets its first stage.

    Args:
        token_weights: (V,), what an error of each token weighs.
        num_code_bytes: for the packed codes and the number of stages of each token.
        max_stages: S.
        codebook_size: K.
        num_groups: G.
        width: d/G.

    Returns:
        (V,) int64.

    Raises:
        ValueError: If one stage for each token takes more bytes.

    Example:
        >>> stages_for_bytes(torch.tensor([9.0, 1.0]), 4, max_stages=2, codebook_size=256, num_groups=1, width=8)
        tensor([2, 1])
    """
    vocab_size = token_weights.numel()
    bits = num_groups * code_bits(codebook_size)
    stage_bytes = -(-vocab_size * code_bits(max_stages) // 8)
    affordable = (int(num_code_bytes) - stage_bytes) * 8 // max(1, bits)
    if affordable < vocab_size:
        least = stage_bytes - (-vocab_size * bits // 8)
        raise ValueError(
            f"Expected a budget of at least {least:,} bytes for the mapping, one stage for each of {vocab_size:,}"
            f" tokens, but got {max(0, int(num_code_bytes)):,}. Use fewer groups or stages, or a smaller"
            " `codebook_size`."
        )
    # A token's stages fall in value, so buying the most valuable first never skips a stage, and is optimal. Values are
    # compared as logarithms: K^(−2 s/width) underflows for narrow groups. The sort is stable, so ties go to the lower
    # stage, then to the heavier token.
    order = token_weights.double().argsort(descending=True, stable=True)
    sorted_weights = token_weights.double()[order].clamp(min=1e-300).log()
    left = 2 * torch.tensor(float(codebook_size)).log().item() / width  # nats of squared error that a stage takes
    values = sorted_weights.unsqueeze(0) - left * torch.arange(max_stages, device=order.device).unsqueeze(1)
    values[0] = torch.inf  # the first stage of every token
    bought = torch.zeros(values.numel(), dtype=torch.int64, device=order.device)
    bought[values.flatten().argsort(descending=True, stable=True)[:affordable]] = 1
    stages = torch.empty_like(order)
    stages[order] = bought.view_as(values).sum(0)
    return stages
