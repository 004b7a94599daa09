"""Assignment of tokens to codes: the first one, re-assignment, and the revival of dead codes.

Letters: d hidden size, V vocabulary, K codes (M: {0..V−1} → {0..K−1}), D dead codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.checks import check_finite, check_token_to_code
from lit_logits.functional.kmeans import KMeansResult, kmeans, nearest_centroids
from lit_logits.functional.reductions import at_least_float32

__all__ = [
    "CodeSplit",
    "MetricRows",
    "code_means",
    "frequency_assignment",
    "metric_rows",
    "random_assignment",
    "reassign_tokens",
    "split_heavy_codes",
    "weighted_kmeans",
]


class CodeSplit(NamedTuple):
    """Result of `split_heavy_codes`.

    Attributes:
        token_to_code: (V,) int64, the new mapping.
        sources: (D,) int64, the code that each dead code was split from; −1 where nothing was left to split.
    """

    token_to_code: Tensor
    sources: Tensor


class MetricRows(NamedTuple):
    """Result of `metric_rows`.

    Attributes:
        points: (V, d) W L.
        weights: (V,) w.
        root: (d, d) L.
    """

    points: Tensor
    weights: Tensor
    root: Tensor

    def back(self, centroids: Tensor) -> Tensor:
        """Return centroids (K, d) of the points in the space of W."""
        # C = C̃ L⁻¹ by substitution, which is more exact than a product with the inverse.
        found: Tensor = torch.linalg.solve_triangular(self.root, centroids, upper=False, left=False)
        return found


def random_assignment(vocab_size: int, codebook_size: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Deal the tokens in random order to the codes in turn, so that the sizes of two codes differ by 1 at most.

    Returns:
        Mapping (V,) int64.

    Example:
        >>> random_assignment(5, 2).bincount()
        tensor([3, 2])
    """
    return torch.randperm(vocab_size, generator=generator) % codebook_size


def frequency_assignment(token_counts: Tensor, codebook_size: int, *, power: float = 0.5) -> Tensor:
    """Assign tokens by frequency rank: frequent tokens share a code with few others, rare ones with many.

    The tokens in order of falling count are cut into K non-empty runs of about equal Σ (count + 1)^power.

    Args:
        token_counts: (V,), non-negative.
        codebook_size: K, in [1, V].
        power: 0 for runs of equal length, 1 for runs of equal frequency.

    Returns:
        (V,) int64; code 0 holds the most frequent token.

    Example:
        >>> frequency_assignment(torch.tensor([1.0, 99.0, 24.0, 0.0, 1.0]), 3)
        tensor([2, 0, 1, 2, 2])
    """
    order = token_counts.argsort(descending=True, stable=True)
    # In float64, as V numbers are added up. A token belongs to the run that holds the middle of its own mass.
    mass = (token_counts[order].double() + 1).pow(power)
    target = ((mass.cumsum(0) - 0.5 * mass) / mass.sum() * codebook_size).long().clamp(max=codebook_size - 1)
    target[0] = 0
    rank = torch.arange(order.numel(), device=order.device)
    # From one rank to the next the code may rise by 1 at most, and it must reach K − 1 at the last rank.
    codes = torch.maximum((target - rank).cummin(0).values + rank, codebook_size - order.numel() + rank)
    return torch.empty_like(codes).scatter_(0, order, codes)


def weighted_kmeans(
    weight: Tensor,
    codebook_size: int,
    *,
    token_counts: Tensor,
    hidden_second_moment: Tensor,
    power: float = 0.75,
    num_iters: int = 25,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> KMeansResult:
    """Fit codebook and mapping that minimise the error of the logits that occur, not that of the weights.

    Minimises Σ_v w_v E_h[(h·W_v − h·C_{M(v)})²] = Σ_v w_v ‖(W_v − C_{M(v)}) L‖² with w_v = count_v^power and
    E[h hᵀ] = L Lᵀ: k-means on the rows of W L, then C = C̃ L⁻¹. Frequent tokens become codes of their own. A token
    that was not counted weighs as half an occurrence.

    Args:
        weight: (V, d) rows W of the output (or tied input) embedding.
        codebook_size: K, in [1, V].
        token_counts: (V,), how often each token occurs as a target.
        hidden_second_moment: (d, d) E[h hᵀ] over hidden states; a small ridge keeps L regular.
        power: exponent of the counts.
        num_iters: largest number of k-means iterations.
        generator: source of randomness, on the device of `weight`.
        progress_bar: show one line of progress on a terminal.

    Returns:
        Centroids (K, d) in the space of W, assignments (V,), and the inertia, which is the objective.

    Raises:
        ValueError: If counts or second moment do not fit W or are not finite.
    """
    rows = metric_rows(weight, token_counts=token_counts, hidden_second_moment=hidden_second_moment, power=power)
    result = kmeans(
        rows.points,
        codebook_size,
        weights=rows.weights,
        num_iters=num_iters,
        generator=generator,
        progress_bar=progress_bar,
    )
    return result._replace(centroids=rows.back(result.centroids))


def metric_rows(
    weight: Tensor, *, token_counts: Tensor, hidden_second_moment: Tensor, power: float = 0.75
) -> MetricRows:
    """Return rows as points whose distances are errors of logits, with the weights of tokens; see `weighted_kmeans`.

    Args:
        weight: (V, d) rows W.
        token_counts: (V,).
        hidden_second_moment: (d, d) E[h hᵀ] = L Lᵀ; a small ridge keeps L regular.
        power: exponent of the counts.

    Raises:
        ValueError: If counts or second moment do not fit W or are not finite.
    """
    vocab_size, hidden_size = weight.shape
    if token_counts.shape != (vocab_size,):
        raise ValueError(
            f"Expected `token_counts` to hold one count for each of the {vocab_size} rows of `weight`, but got shape"
            f" {tuple(token_counts.shape)}."
        )
    if hidden_second_moment.shape != (hidden_size, hidden_size):
        raise ValueError(
            f"Expected `hidden_second_moment` to be ({hidden_size}, {hidden_size}), but got"
            f" {tuple(hidden_second_moment.shape)}."
        )
    check_finite(hidden_second_moment, "hidden_second_moment")
    # Factorised in float64: hidden states vary by orders of magnitude more along some directions than along others.
    moment = hidden_second_moment.double()
    ridge = 1e-6 * moment.diagonal().mean().clamp(min=1e-12)
    root = torch.linalg.cholesky(moment + ridge * torch.eye(hidden_size, dtype=moment.dtype, device=moment.device))
    root = root.to(torch.promote_types(weight.dtype, torch.float32))
    return MetricRows(weight.to(root.dtype) @ root, token_counts.to(root.dtype).clamp(min=0.5).pow(power), root)


def code_means(
    vectors: Tensor, token_to_code: Tensor, codebook_size: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the weighted mean vector and the mass of each code.

    Args:
        vectors: (V, d).
        token_to_code: (V,) int64.
        codebook_size: K.
        weights: (V,), non-negative; default all 1.

    Returns:
        Means (K, d), zero for a code without mass, and masses (K,), both at least float32.
    """
    vectors = at_least_float32(vectors)
    weights = torch.ones_like(vectors[:, 0]) if weights is None else weights.to(vectors.dtype)
    mass = vectors.new_zeros(codebook_size).index_add(0, token_to_code, weights)
    sums = vectors.new_zeros(codebook_size, vectors.shape[1])
    sums = sums.index_add(0, token_to_code, vectors * weights.unsqueeze(1))
    return sums / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(1), mass


def reassign_tokens(vectors: Tensor, token_to_code: Tensor, codebook_size: int) -> Tensor:
    """Move each token to the code whose tokens' mean is nearest: one k-means step of a token table.

    Args:
        vectors: (V, d) table that says which tokens are alike, such as the input embedding.
        token_to_code: (V,) int64.
        codebook_size: K.

    Returns:
        (V,) int64. A code without tokens stays without.

    Example:
        >>> reassign_tokens(torch.tensor([[0.0], [0.1], [1.0], [0.2]]), torch.tensor([0, 0, 1, 1]), 2)
        tensor([0, 0, 1, 0])
    """
    means, mass = code_means(vectors, token_to_code, codebook_size)
    living = mass.nonzero().squeeze(1)  # the mean of an empty code is only 0, and would attract tokens near 0
    return living[nearest_centroids(vectors, means[living])]


def split_heavy_codes(
    token_to_code: Tensor,
    codebook_size: int,
    dead: Tensor,
    *,
    token_counts: Tensor,
    vectors: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> CodeSplit:
    """Give each dead code one half of the code that costs most.

    The tokens of a dead code first move to the nearest living one. A code costs its count-weighted distortion
    Σ_v w_v ‖x_v − x̄‖² and is halved by 2-means. Without `vectors` it costs its mass times the entropy within it,
    −Σ_v w_v log(w_v / w), and is halved by dealing out its tokens in order of falling count.

    Args:
        token_to_code: (V,) int64.
        codebook_size: K.
        dead: (D,) int64, distinct codes to revive; at least one code must live.
        token_counts: (V,), how often each token was a target; all 0 counts as all 1.
        vectors: (V, d) table that says which tokens are alike.
        generator: source of randomness, on the device of `vectors`.

    Returns:
        The new mapping and, for each dead code, the code it was split from, or −1 where no code of several counted
        tokens was left: that code ends without tokens.

    Raises:
        ValueError: If every code is dead or the mapping does not fit.
    """
    check_token_to_code(token_to_code, token_counts.shape[0], codebook_size)
    if dead.numel() >= codebook_size:
        raise ValueError(f"Expected at least one living code of {codebook_size}, but all of them are dead.")
    weights = token_counts if bool((token_counts > 0).any()) else torch.ones_like(token_counts)
    mapping = _evacuate(token_to_code, codebook_size, dead, weights, vectors)
    # Tokens grouped by code with one sort and one transfer to the host, not one for each code.
    members = list(mapping.argsort(stable=True).split(mapping.bincount(minlength=codebook_size).tolist()))
    costs = torch.tensor([_cost(tokens, weights, vectors) for tokens in members])
    sources = torch.full_like(dead, -1)
    for i, code in enumerate(dead.tolist()):  # both halves compete again, so a very heavy code may be split repeatedly
        heavy = int(costs.argmax())
        if costs[heavy] <= 0:
            break
        kept, given = _halve(members[heavy], weights, vectors, generator)
        mapping[given] = code
        sources[i] = heavy
        for half, tokens in ((heavy, kept), (code, given)):
            members[half] = tokens
            costs[half] = _cost(tokens, weights, vectors)
    return CodeSplit(mapping, sources)


def _evacuate(
    token_to_code: Tensor, codebook_size: int, dead: Tensor, weights: Tensor, vectors: Tensor | None
) -> Tensor:
    """Move the tokens of dead codes to the nearest living code; without vectors, all to the lightest one."""
    mapping = token_to_code.clone()
    stranded = torch.isin(mapping, dead)
    if not bool(stranded.any()):
        return mapping
    table = weights.unsqueeze(1).float() if vectors is None else vectors
    means, _ = code_means(table, mapping, codebook_size)
    occupied = mapping.bincount(minlength=codebook_size) > 0
    occupied[dead] = False
    living = occupied.nonzero().squeeze(1)
    if living.numel() == 0:
        raise ValueError("Expected at least one living code that holds tokens, but all codes with tokens are dead.")
    if vectors is None:
        mass = weights.new_zeros(codebook_size).index_add(0, mapping, weights)
        mapping[stranded] = living[mass[living].argmin()]
    else:
        mapping[stranded] = living[nearest_centroids(table[stranded], means[living])]
    return mapping


def _cost(tokens: Tensor, weights: Tensor, vectors: Tensor | None) -> float:
    """Compute the cost of a code as in `split_heavy_codes`; 0 where there is nothing to split."""
    counts = weights[tokens].double()
    mass = counts.sum()
    if tokens.numel() < 2 or mass == 0:
        return 0.0
    if vectors is None:
        return float(mass * torch.special.entr(counts / mass).sum())
    points = vectors[tokens].double()
    mean = counts @ points / mass
    return float(counts @ (points - mean).square().sum(dim=1))


def _halve(
    tokens: Tensor, weights: Tensor, vectors: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Split `tokens` in two; the heavier half comes first."""
    if vectors is not None:
        side = kmeans(vectors[tokens], 2, weights=weights[tokens], generator=generator).assignments.bool()
        halves = tokens[~side], tokens[side]
    if vectors is None or min(half.numel() for half in halves) == 0:  # 2-means of equal vectors leaves one side empty
        ranked = tokens[weights[tokens].argsort(descending=True, stable=True)]
        halves = ranked[::2], ranked[1::2]
    first, second = halves
    return (first, second) if weights[first].sum() >= weights[second].sum() else (second, first)
