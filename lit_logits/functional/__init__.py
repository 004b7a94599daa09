"""Tensors in, tensors out: the mathematics of the four methods, without state."""

from lit_logits.functional.checks import check_finite, check_labels, check_token_to_code
from lit_logits.functional.code_assignment import (
    CodeSplit,
    code_means,
    frequency_assignment,
    random_assignment,
    reassign_tokens,
    split_heavy_codes,
    weighted_kmeans,
)
from lit_logits.functional.codebook import (
    Footprint,
    code_perplexity,
    code_usage,
    commitment_loss,
    ppl_floor,
    unigram_bias,
    vq_footprint,
)
from lit_logits.functional.distributed import all_reduce_sum_, broadcast_
from lit_logits.functional.kmeans import KMeansResult, kmeans, nearest_centroids
from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens
from lit_logits.functional.vq_decoding import (
    GreedyTables,
    SamplingTables,
    greedy_tables,
    sampling_tables,
    vq_greedy,
    vq_sample,
)
from lit_logits.functional.vq_logits import (
    code_log_mass,
    code_logits,
    scatter_code_logits,
    straight_through_vq_cross_entropy,
    vq_cross_entropy,
)

__all__ = [
    "CodeSplit",
    "Footprint",
    "GreedyTables",
    "KMeansResult",
    "Reduction",
    "SamplingTables",
    "all_reduce_sum_",
    "at_least_float32",
    "broadcast_",
    "check_finite",
    "check_labels",
    "check_token_to_code",
    "code_log_mass",
    "code_logits",
    "code_means",
    "code_perplexity",
    "code_usage",
    "commitment_loss",
    "frequency_assignment",
    "greedy_tables",
    "kmeans",
    "nearest_centroids",
    "ppl_floor",
    "random_assignment",
    "reassign_tokens",
    "reduce_tokens",
    "sampling_tables",
    "scatter_code_logits",
    "split_heavy_codes",
    "straight_through_vq_cross_entropy",
    "unigram_bias",
    "vq_cross_entropy",
    "vq_footprint",
    "vq_greedy",
    "vq_sample",
    "weighted_kmeans",
]
