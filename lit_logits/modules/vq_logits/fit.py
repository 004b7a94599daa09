"""Residual codes fitted to the output layer of a pretrained model, within a budget of bytes.

Letters: d hidden size, V vocabulary, K codes, G groups, S stages.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from lit_logits.functional.checks import check_finite
from lit_logits.functional.code_tiers import stages_by_rank, stages_for_bytes
from lit_logits.functional.residual_codes import MetricKind, ResidualCodes, fit_residual_codes, metric_matrix

__all__ = ["check_codebook_size", "default_stages", "fit_output_layer"]


# `VQLogitsHead.from_dense` and the head classes repeat these arguments: each is a public signature, for editors and for
# the command line.
@torch.no_grad()
def fit_output_layer(
    weight: Tensor,
    *,
    codebook_size: int,
    num_groups: int = 1,
    num_stages: int | Mapping[int, int] | None = None,
    byte_budget: float | None = None,
    keep_stages: bool = False,
    token_counts: Tensor | None = None,
    hidden_second_moment: Tensor | None = None,
    metric: MetricKind = "full",
    count_power: float = 0.75,
    smoothing: float = 0.0,
    num_sweeps: int = 2,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> ResidualCodes:
    """Fit codes to a dense output layer so that its logits of typical hidden states are kept; see `fit_residual_codes`.

    Args:
        weight: (V, d) rows of the output (or tied input) embedding.
        codebook_size: K.
        num_groups: G, a divisor of d.
        num_stages: of all tokens, or tiers {frequency rank: stages}; see `stages_by_rank`. Default 1, or up to 5 with a
            budget.
        byte_budget: share of the dense layer's bytes in bfloat16 that codebooks (in bfloat16) and mapping may take, in
            (0, 1]: tiers are chosen to fit it, with up to `num_stages` stages.
        keep_stages: count the codebooks of all `num_stages` in the budget, also of stages that no token gets.
        token_counts: (V,), how often each token occurs, or is expected to; default all alike. With a `count_power` of 1
            it may be what an error in its logit costs, `Calibration.token_information`.
        hidden_second_moment: (d, d) E[h hᵀ] of the hidden states that the head will read; default the identity.
        metric: what of the second moment is used.
        count_power: exponent of the counts. A token without counts weighs as one of half the smallest positive count;
            no count is taken as less than 1e-7 of the largest.
        smoothing: ε in [0, 1], the share of all weights that is spread evenly: (1 − ε) w_v + ε mean(w). Tokens that the
            calibration met rarely then keep more of their rows, and get more stages, on text of another kind.
        num_sweeps: passes that renew all codes after the first fit; 16 take 1 to 3 % off its error, in more time.
        generator: source of randomness, on the device of `weight`.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: If counts or second moment have another size or are not finite, K or G does not fit, or no tiers
            meet the budget.

    Example:
        >>> fit = fit_output_layer(torch.randn(100, 8), codebook_size=32, num_groups=4, num_stages={20: 3, 100: 1})
        >>> fit.codebooks.shape, fit.codes.shape
        (torch.Size([3, 4, 32, 2]), torch.Size([560]))
    """
    if weight.ndim != 2:
        raise ValueError(f"Expected `weight` to be (V, d) rows, but got shape {tuple(weight.shape)}.")
    vocab_size, hidden_size = weight.shape
    check_smoothing(smoothing)
    num_stages = default_stages(num_stages, byte_budget)
    counts = weight.new_ones(vocab_size) if token_counts is None else token_counts.to(weight.device).float()
    if counts.shape != (vocab_size,):
        raise ValueError(
            f"Expected `token_counts` to hold one count for each of the {vocab_size} rows of `weight`, but got shape"
            f" {tuple(counts.shape)}."
        )
    check_finite(counts, "token_counts")
    if bool((counts < 0).any()):
        raise ValueError(f"Expected `token_counts` to be non-negative, but the least is {counts.min().item():g}.")
    moment = torch.eye(hidden_size, device=weight.device) if hidden_second_moment is None else hidden_second_moment
    if moment.shape != (hidden_size, hidden_size):
        raise ValueError(
            f"Expected `hidden_second_moment` to be ({hidden_size}, {hidden_size}), but got {tuple(moment.shape)}."
        )
    # A token that calibration did not meet still occurs: with weight 0 its codes would be arbitrary.
    least = float(counts[counts > 0].min()) / 2 if bool((counts > 0).any()) else 1.0
    weights = counts.clamp(min=max(least, 1e-7 * float(counts.max()))).pow(count_power)
    weights = torch.lerp(weights, weights.mean(), smoothing)
    if byte_budget is None:
        stages = stages_by_rank(counts, num_stages)
    else:
        stages = _affordable_stages(
            weights, byte_budget, num_stages, codebook_size, num_groups, hidden_size, keep_stages
        )
    return fit_residual_codes(
        weight,
        codebook_size,
        num_groups=num_groups,
        token_stages=stages,
        token_weights=weights,
        metric=metric_matrix(moment.to(weight.device), metric, num_groups),
        num_sweeps=num_sweeps,
        generator=generator,
        progress_bar=progress_bar,
    )


def check_smoothing(smoothing: float) -> None:
    """Raise unless it is a share.

    Raises:
        ValueError: If `smoothing` is not in [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"Expected `smoothing` to be a share in [0, 1], but got {smoothing}.")


def check_codebook_size(codebook_size: int, vocab_size: int) -> None:
    """Raise unless there are at most as many codes as tokens.

    Raises:
        ValueError: If `codebook_size` is not in [1, vocab_size].
    """
    if not 1 <= codebook_size <= vocab_size:
        raise ValueError(
            f"Expected `codebook_size` to be in [1, {vocab_size}], the vocabulary size, but got {codebook_size}."
        )


def default_stages(num_stages: int | Mapping[int, int] | None, byte_budget: float | None) -> int | Mapping[int, int]:
    """Return `num_stages`; default one stage, or with a budget up to five."""
    return (1 if byte_budget is None else 5) if num_stages is None else num_stages


def _affordable_stages(
    weights: Tensor,
    byte_budget: float,
    num_stages: int | Mapping[int, int],
    codebook_size: int,
    num_groups: int,
    hidden_size: int,
    keep_stages: bool,
) -> Tensor:
    if not isinstance(num_stages, int):
        raise ValueError(
            f"Expected `num_stages` to be a number where `byte_budget` chooses the tiers, but got {num_stages}."
        )
    if not 0 < byte_budget <= 1:
        raise ValueError(f"Expected `byte_budget` to be a share in (0, 1], but got {byte_budget}.")
    stages: Tensor | None = None
    # From the most stages down: if no token gets the last stage, the bytes of its codebooks are better spent on others.
    for most in range(num_stages, 0, -1):
        codebooks = most * codebook_size * hidden_size * 2
        try:
            stages = stages_for_bytes(
                weights,
                byte_budget * weights.numel() * hidden_size * 2 - codebooks,
                max_stages=most,
                codebook_size=codebook_size,
                num_groups=num_groups,
                width=hidden_size // num_groups,
            )
        except ValueError:
            if keep_stages or most == 1:
                raise
            continue
        if keep_stages or int(stages.max()) == most:
            break
    return cast(Tensor, stages)
