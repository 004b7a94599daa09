"""Measures of a codebook and its mapping: usage, floor, size, and the loss that ties latents to codes.

Letters: d hidden size, V vocabulary, K codes (M: {0..V−1} → {0..K−1}), b token bias.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.bit_packing import code_bits, packed_size
from lit_logits.functional.reductions import at_least_float32
from lit_logits.functional.vq_logits import code_log_mass

__all__ = [
    "Footprint",
    "code_perplexity",
    "code_usage",
    "commitment_loss",
    "dead_codes",
    "hierarchical_footprint",
    "ppl_floor",
    "unigram_bias",
    "vq_footprint",
]


class Footprint(NamedTuple):
    """Size of an output layer beside the dense (V, d) layer in the same dtype.

    Attributes:
        parameters: floating-point parameters: codebooks and biases.
        bytes: floats in their dtype plus the mapping packed to ⌈log2 K⌉ bits a token.
        dense_parameters: V·d.
        dense_bytes: V·d in the same dtype.
    """

    parameters: int
    bytes: int
    dense_parameters: int
    dense_bytes: int


def vq_footprint(hidden_size: int, vocab_size: int, codebook_size: int, *, bias: bool, itemsize: int) -> Footprint:
    """Count parameters and bytes of a codebook with mapping and optional bias; the mapping counts as bytes only.

    Args:
        hidden_size: d.
        vocab_size: V.
        codebook_size: K.
        bias: whether there is a token bias.
        itemsize: bytes of a float, 4 for float32.

    Example:
        >>> vq_footprint(hidden_size=576, vocab_size=49152, codebook_size=512, bias=False, itemsize=2)
        Footprint(parameters=294912, bytes=645120, dense_parameters=28311552, dense_bytes=56623104)
    """
    parameters = codebook_size * hidden_size + (vocab_size if bias else 0)
    mapping_bits = vocab_size * code_bits(codebook_size)
    dense_parameters = vocab_size * hidden_size
    return Footprint(
        parameters, parameters * itemsize + -(-mapping_bits // 8), dense_parameters, dense_parameters * itemsize
    )


def hierarchical_footprint(
    hidden_size: int,
    vocab_size: int,
    codebook_sizes: Sequence[int],
    *,
    bias: bool,
    itemsize: int,
    num_groups: int = 1,
) -> Footprint:
    """Count parameters and bytes of clusters, their codes and biases, with the mapping packed.

    Args:
        hidden_size: d.
        vocab_size: V.
        codebook_sizes: number of clusters, and of the codes of each further stage.
        bias: whether there is a token bias; clusters have one always.
        itemsize: bytes of a float, 4 for float32.
        num_groups: of the codes; a token owns a code of each stage in each group.

    Example:
        >>> hierarchical_footprint(192, 4096, [128, 64, 64], bias=True, itemsize=4)
        Footprint(parameters=53376, bytes=223232, dense_parameters=786432, dense_bytes=3145728)
    """
    parameters = sum(codebook_sizes) * hidden_size + codebook_sizes[0] + (vocab_size if bias else 0)
    num_clusters, *stage_sizes = codebook_sizes
    taken = parameters * itemsize + packed_size(vocab_size, [num_clusters, *stage_sizes * num_groups])
    dense_parameters = vocab_size * hidden_size
    return Footprint(parameters, taken, dense_parameters, dense_parameters * itemsize)


def code_usage(token_counts: Tensor, token_to_code: Tensor, codebook_size: int) -> Tensor:
    """Compute the share of the counted tokens that each code carries; zeros when nothing was counted.

    Args:
        token_counts: (V,), non-negative.
        token_to_code: (V,) int64.
        codebook_size: K.

    Returns:
        (K,), summing to 1 or 0.

    Example:
        >>> code_usage(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), 2)
        tensor([0.7500, 0.2500])
    """
    mass = token_counts.new_zeros(codebook_size).index_add(0, token_to_code, token_counts)
    return mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)


def dead_codes(token_counts: Tensor, token_to_code: Tensor, codebook_size: int, min_usage: float = 0.0) -> Tensor:
    """Return codes (D,) that own no token, or carry less than `min_usage` times an even share of the counted tokens.

    Where nothing was counted yet, only codes without tokens are dead.

    Example:
        >>> dead_codes(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), 3)
        tensor([2])
        >>> dead_codes(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), 3, min_usage=0.8)
        tensor([1, 2])
    """
    dead = torch.bincount(token_to_code, minlength=codebook_size) == 0
    if bool(token_counts.any()):
        dead |= code_usage(token_counts, token_to_code, codebook_size) * codebook_size < min_usage
    return dead.nonzero().squeeze(1)


def code_perplexity(usage: Tensor) -> Tensor:
    """Compute the exponential of the entropy of `usage` (K,): K for even use, 1 when one code takes all.

    Example:
        >>> code_perplexity(torch.tensor([0.5, 0.5, 0.0]))
        tensor(2.)
    """
    return torch.special.entr(usage).sum().exp()


def ppl_floor(
    token_counts: Tensor, token_to_code: Tensor, codebook_size: int, token_bias: Tensor | None = None
) -> Tensor:
    """Compute the perplexity that no backbone can go below with this mapping and bias, exp E_y[β_{M(y)} − b_y].

    It is the perplexity of a token once its code is known. Without a bias it is exp E_y[log n_{M(y)}], known before
    any training. A mapping with a code for every token has floor 1.

    Args:
        token_counts: (V,), how often each token is a target; any scale.
        token_to_code: (V,) int64.
        codebook_size: K.
        token_bias: (V,) in nats; default 0.

    Returns:
        Scalar perplexity, at least 1; NaN when nothing was counted.

    Example:
        >>> ppl_floor(torch.tensor([3, 1]), torch.tensor([0, 0]), codebook_size=2)
        tensor(2.)
    """
    log_mass = code_log_mass(token_to_code, codebook_size, token_bias)[token_to_code]
    within = log_mass if token_bias is None else log_mass - token_bias
    counts = token_counts.to(within.dtype)
    return ((counts * within).sum() / counts.sum()).exp()


def commitment_loss(latents: Tensor, codebook: Tensor, token_to_code: Tensor) -> Tensor:
    """Compute the mean over tokens of ‖sg[c_{M(v)}] − a_v‖², which keeps latents near their codes.

    No gradient reaches the codebook.

    Args:
        latents: (V, d).
        codebook: (K, d).
        token_to_code: (V,) int64.

    Example:
        >>> commitment_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0]]), torch.tensor([0, 0]))
        tensor(2.)
    """
    return at_least_float32(codebook.detach()[token_to_code] - latents).square().sum(dim=1).mean()


def unigram_bias(token_counts: Tensor, token_to_code: Tensor | None = None, codebook_size: int | None = None) -> Tensor:
    """Compute a token bias from token counts, b_v = log(count_v + ½) up to a constant.

    With logits of 0 the model then is the unigram model. With `token_to_code` each code has a constant of its own, such
    that β_k = log n_k as without a bias: the bias splits a code among its tokens and leaves the code's mass to the
    codebook, as a codebook made from pretrained weights needs.

    Args:
        token_counts: (V,), non-negative.
        token_to_code: (V,) int64; default one constant for all.
        codebook_size: K; needed with `token_to_code`.

    Returns:
        (V,) float32, in nats.

    Example:
        >>> unigram_bias(torch.tensor([1.5, 0.5, 9.5]), torch.tensor([0, 0, 1]), 2).exp()
        tensor([1.3333, 0.6667, 1.0000])
    """
    bias = (token_counts.float() + 0.5).log()
    if token_to_code is None or codebook_size is None:
        return bias - bias.logsumexp(0)
    shift = code_log_mass(token_to_code, codebook_size) - code_log_mass(token_to_code, codebook_size, bias)
    return bias + shift[token_to_code]
