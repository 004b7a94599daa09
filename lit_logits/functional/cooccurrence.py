"""Which tokens follow the same contexts: a start for codes of a model that has not been trained yet.

Tokens that follow the same contexts should share a code, as in Brown clustering [0]. Contexts are the tokens one and
two places before, so a pass over the text counts pairs. Their positive pointwise mutual information

    PPMI(v, u) = max(0, log p(u | v) − log p_α(u)),      p_α(u) ∝ c(u)^α,

says how much likelier u is before v than before any token. A truncated SVD of that sparse matrix turns its rows into
short vectors [1], which are near each other where tokens have like contexts.

Letters: B samples, T positions, V vocabulary, K codes, S stages, P different pairs, r dimensions.

References:
    [0]: Class-based n-gram models of natural language (Brown et al.), 1992.
    [1]: Improving distributional similarity with lessons learned from word embeddings (Levy et al.), 2015: α and the
        power ½ of the singular values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_logits.functional.code_hierarchy import kmeans_hierarchy
from lit_logits.functional.distributed import all_gather_rows
from lit_logits.functional.kmeans import kmeans
from lit_logits.functional.labels import IGNORE_INDEX

__all__ = [
    "PairCounts",
    "context_vectors",
    "cooccurrence_assignment",
    "cooccurrence_hierarchy",
    "count_pairs",
    "merge_pairs",
    "positive_pmi",
    "sum_pairs_of_ranks",
]

CONTEXT_WEIGHTS = {1: 1.0, 2: 0.5}
"""Weight of a pair by how far the context stands before the token."""


class PairCounts(NamedTuple):
    """How often tokens occurred with contexts, as a sparse (V, V) matrix.

    Attributes:
        keys: (P,) int64 token · V + context, rising.
        counts: (P,) float32, positive.
    """

    keys: Tensor
    counts: Tensor


def count_pairs(
    input_ids: Tensor,
    labels: Tensor,
    vocab_size: int,
    *,
    context_weights: Mapping[int, float] = CONTEXT_WEIGHTS,
    ignore_index: int = IGNORE_INDEX,
) -> PairCounts:
    """Count each token that counts with the tokens before it.

    Args:
        input_ids: (B, T).
        labels: (B, T), unshifted; a token whose label is `ignore_index` is not counted, but may be a context.
        vocab_size: V.
        context_weights: distance → what a pair at that distance counts.
        ignore_index: label of tokens that do not count.

    Example:
        >>> ids = torch.tensor([[2, 0, 1, 0]])
        >>> count_pairs(ids, ids, 3, context_weights={1: 1.0})
        PairCounts(keys=tensor([1, 2, 3]), counts=tensor([1., 1., 1.]))
    """
    keys, counts = [], []
    for distance, weight in context_weights.items():
        mask = labels[:, distance:] != ignore_index
        tokens, contexts = input_ids[:, distance:][mask].long(), input_ids[:, :-distance][mask].long()
        keys.append(tokens * vocab_size + contexts)
        counts.append(torch.full_like(keys[-1], weight, dtype=torch.float32))
    return _sum_equal(torch.cat(keys), torch.cat(counts))


def merge_pairs(parts: Sequence[PairCounts]) -> PairCounts:
    """Return the sum of several counts.

    Example:
        >>> part = PairCounts(torch.tensor([3, 7]), torch.ones(2))
        >>> merge_pairs([part, PairCounts(torch.tensor([7]), torch.ones(1))])
        PairCounts(keys=tensor([3, 7]), counts=tensor([1., 2.]))
    """
    return _sum_equal(torch.cat([part.keys for part in parts]), torch.cat([part.counts for part in parts]))


def sum_pairs_of_ranks(pairs: PairCounts) -> PairCounts:
    """Return the sum over all ranks, on every rank; each must call it."""
    return _sum_equal(all_gather_rows(pairs.keys), all_gather_rows(pairs.counts))


def positive_pmi(pairs: PairCounts, vocab_size: int, *, power: float = 0.75) -> Any:
    """Return the positive pointwise mutual information of tokens and contexts, a scipy CSR matrix (V, V).

    Args:
        pairs: how often they occurred together.
        vocab_size: V.
        power: α, which smooths the counts of contexts, so that rare ones do not stand out.

    Example:
        >>> pairs = PairCounts(torch.tensor([0, 3]), torch.tensor([2.0, 2.0]))
        >>> positive_pmi(pairs, 2).toarray().round(4).tolist()  # each context tells its token: log 2
        [[0.6930999755859375, 0.0], [0.0, 0.6930999755859375]]
    """
    from scipy.sparse import csr_matrix  # comes with scikit-learn; it is read here alone, as it is slow to import

    keys, counts = pairs.keys.cpu().numpy(), pairs.counts.cpu().double().numpy()
    tokens, contexts = keys // vocab_size, keys % vocab_size
    of_token = np.bincount(tokens, counts, vocab_size)
    of_context = np.bincount(contexts, counts, vocab_size) ** power
    information = np.log(counts) - np.log(of_token[tokens]) - np.log(of_context[contexts] / of_context.sum())
    kept = information > 0
    matrix = (information[kept].astype(np.float32), (tokens[kept], contexts[kept]))
    return csr_matrix(matrix, shape=(vocab_size, vocab_size))


def context_vectors(pairs: PairCounts, vocab_size: int, dim: int = 64, *, power: float = 0.75, seed: int = 0) -> Tensor:
    """Return short vectors of tokens, near each other where the tokens follow the same contexts.

    The rows of U Σ^½ of the truncated SVD of `positive_pmi`; a token that was not counted is at the origin.

    Args:
        pairs: how often tokens occurred with contexts.
        vocab_size: V.
        dim: r, cut to what the matrix allows.
        power: α of `positive_pmi`.
        seed: of the randomised SVD.

    Returns:
        (V, r) float32 in host memory.

    Example:
        >>> ids = torch.tensor([[0, 2, 1, 2, 0, 3, 1, 3]])  # 2 and 3 follow 0 and 1
        >>> vectors = context_vectors(count_pairs(ids, ids, 4, context_weights={1: 1.0}), 4, dim=2)
        >>> float((vectors[2] - vectors[3]).norm()) < 0.1 < float((vectors[2] - vectors[0]).norm())
        True
    """
    from sklearn.utils.extmath import randomized_svd

    matrix = positive_pmi(pairs, vocab_size, power=power)
    left, values, _ = randomized_svd(matrix, min(dim, vocab_size), n_iter=4, random_state=seed)
    return torch.from_numpy(np.ascontiguousarray(left * np.sqrt(values), dtype=np.float32))


def cooccurrence_assignment(
    pairs: PairCounts,
    token_counts: Tensor,
    codebook_size: int,
    *,
    dim: int = 64,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> Tensor:
    """Assign tokens that follow the same contexts to the same code: k-means of `context_vectors`.

    A token weighs count^½, so that frequent tokens get codes that fit them, without taking all of them.

    Args:
        pairs: how often tokens occurred with contexts.
        token_counts: (V,), how often each token occurred; they decide the device of k-means.
        codebook_size: K, in [1, V].
        dim: of the vectors.
        generator: source of randomness, on that device.
        progress_bar: show one line of progress on a terminal.

    Returns:
        (V,) int64.
    """
    vectors = context_vectors(pairs, len(token_counts), dim).to(token_counts.device)
    weights = token_counts.to(vectors).clamp(min=0.5).sqrt()
    return kmeans(vectors, codebook_size, weights=weights, generator=generator, progress_bar=progress_bar).assignments


def cooccurrence_hierarchy(
    pairs: PairCounts,
    token_counts: Tensor,
    codebook_sizes: Sequence[int],
    *,
    max_cluster_size: int,
    dim: int = 64,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> tuple[Tensor, Tensor]:
    """Assign tokens to clusters by `context_vectors`, and in all clusters to codes by what the clusters leave of them.

    Args:
        pairs: how often tokens occurred with contexts.
        token_counts: (V,), how often each token occurred.
        codebook_sizes: number of clusters, and of the codes of each further stage.
        max_cluster_size: tokens a cluster.
        dim: of the vectors.
        generator: source of randomness, on the device of `token_counts`.
        progress_bar: show one line of progress on a terminal.

    Returns:
        Clusters (V,) and codes (V, S), int64.
    """
    vectors = context_vectors(pairs, len(token_counts), dim).to(token_counts.device)
    weights = token_counts.to(vectors).clamp(min=0.5).sqrt()
    found = kmeans_hierarchy(
        vectors,
        codebook_sizes,
        weights=weights,
        max_cluster_size=max_cluster_size,
        generator=generator,
        progress_bar=progress_bar,
    )
    return found.token_to_cluster, found.token_codes


def _sum_equal(keys: Tensor, counts: Tensor) -> PairCounts:
    """Join pairs that are there several times."""
    unique, places = keys.unique(return_inverse=True)
    return PairCounts(unique, counts.new_zeros(len(unique)).index_add_(0, places, counts))
