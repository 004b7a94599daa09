"""Exact greedy and sampled decoding from vector-quantised logits, without the (N, V) logits.

A code is chosen first, then one of its tokens. What the second choice needs from mapping and bias is tabulated once.

Letters: N positions, d hidden size, V vocabulary, K codes (M: {0..V−1} → {0..K−1}), b token bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.vq_logits import code_log_mass, code_logits

__all__ = [
    "GreedyTables",
    "SamplingTables",
    "greedy_tables",
    "sample_logits",
    "sampling_tables",
    "vq_greedy",
    "vq_sample",
]


class GreedyTables(NamedTuple):
    """Tables for exact greedy decoding, made from mapping and bias.

    Attributes:
        best_bias: (K,), max_{v∈k} b_v in nats; −inf for an empty code.
        best_token: (K,) int64, the token that reaches it, the lowest id among equals; 0 for an empty code.
    """

    best_bias: Tensor
    best_token: Tensor


class SamplingTables(NamedTuple):
    """Tables for exact sampling at one temperature τ, made from mapping and bias.

    Attributes:
        log_mass: (K,), β of b/τ in nats; −inf for an empty code.
        tokens: (V,) int64, the tokens sorted by code.
        cumulative: (V,) float64, code + cumulative probability within the code, in the order of `tokens`.
        last: (K,) int64, where the last token of each code stands in `tokens`.
    """

    log_mass: Tensor
    tokens: Tensor
    cumulative: Tensor
    last: Tensor


def greedy_tables(token_to_code: Tensor, codebook_size: int, token_bias: Tensor | None = None) -> GreedyTables:
    """Find the best token of each code and its bias; ties go to the lowest id.

    Args:
        token_to_code: (V,) int64.
        codebook_size: K.
        token_bias: (V,) in nats; default 0.

    Example:
        >>> greedy_tables(torch.tensor([0, 0, 1]), 2, torch.tensor([0.5, 0.7, 0.1])).best_token
        tensor([1, 2])
    """
    bias = torch.zeros_like(token_to_code, dtype=torch.float32) if token_bias is None else token_bias
    best_bias = bias.new_full((codebook_size,), -torch.inf).scatter_reduce(0, token_to_code, bias, "amax")
    vocab_size = token_to_code.shape[0]
    ids = torch.arange(vocab_size, device=token_to_code.device)
    # `amax` tells the best bias but not its token: the least id that reaches it is an `amin` over all that do.
    candidates = torch.where(bias == best_bias[token_to_code], ids, vocab_size)
    best_token = torch.full_like(best_bias, vocab_size, dtype=torch.int64)
    best_token = best_token.scatter_reduce(0, token_to_code, candidates, "amin")
    return GreedyTables(best_bias, best_token.masked_fill(best_token == vocab_size, 0))


def vq_greedy(hidden: Tensor, codebook: Tensor, tables: GreedyTables, *, cap: float | None = None) -> Tensor:
    """Find the most likely token, argmax_v z_v, without the token logits.

    k* = argmax_k (l_k + max_{v∈k} b_v), then that code's best token. Two codes with exactly equal scores are a tie
    that goes to the lower code.

    Args:
        hidden: (..., d).
        codebook: (K, d).
        tables: of `greedy_tables`.
        cap: c of the soft cap of l, or None.

    Returns:
        (...) int64 token ids.
    """
    return tables.best_token.take(code_logits(hidden, codebook, tables.best_bias, cap=cap).argmax(dim=-1))


def sampling_tables(
    token_to_code: Tensor, codebook_size: int, token_bias: Tensor | None = None, *, temperature: float = 1.0
) -> SamplingTables:
    """Compute the log mass of the codes and the cumulative distribution within each, at one temperature.

    Args:
        token_to_code: (V,) int64.
        codebook_size: K.
        token_bias: (V,) in nats; default 0.
        temperature: τ > 0; b is divided by it before β is formed.

    Raises:
        ValueError: If `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive, but got {temperature}; use greedy decoding for 0.")
    bias = None if token_bias is None else token_bias.detach().double() / temperature
    log_mass = code_log_mass(token_to_code, codebook_size, bias)
    codes, tokens = token_to_code.sort(stable=True)
    log_share = -log_mass[codes].double() if bias is None else bias[tokens] - log_mass[codes]
    # One cumulative sum over all tokens, less what came before each code. In float64, as the sum goes up to K and the
    # number of the code is added to it: float32 would leave few digits for the draw within a code.
    total = log_share.exp().cumsum(0)
    sizes = torch.bincount(codes, minlength=codebook_size)
    last = sizes.cumsum(0) - 1
    before = torch.cat([total.new_zeros(1), total])[last - sizes + 1]
    return SamplingTables(log_mass.float(), tokens, codes + (total - before[codes]), last)


def vq_sample(
    hidden: Tensor,
    codebook: Tensor,
    tables: SamplingTables,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw from softmax(z/τ) without the token logits: a code from softmax(l/τ + β), then a token of that code.

    Args:
        hidden: (..., d).
        codebook: (K, d).
        tables: of `sampling_tables` at the same temperature.
        temperature: τ > 0.
        cap: c of the soft cap of l, or None.
        generator: source of randomness, on the device of `hidden`.

    Returns:
        (...) int64 token ids.
    """
    if cap is None:
        logits = code_logits(hidden / temperature, codebook, tables.log_mass)
    else:
        logits = code_logits(hidden, codebook, cap=cap) / temperature + tables.log_mass
    logits = logits.reshape(-1, codebook.shape[0])
    codes = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
    # `cumulative` of code k rises from k to k + 1, so one search over all V finds the token within the code drawn.
    uniform = torch.rand(codes.shape, dtype=torch.float64, device=codes.device, generator=generator)
    slots = torch.searchsorted(tables.cumulative, codes + uniform, right=True)
    # Rounding may carry a draw close to 1 past the end of its code.
    tokens = tables.tokens[torch.minimum(slots, tables.last[codes])]
    return tokens.reshape(hidden.shape[:-1])


def sample_logits(logits: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw tokens (...) int64 from softmax(logits / temperature) of logits (..., V) in nats.

    Raises:
        ValueError: If `temperature` is not positive.

    Example:
        >>> sample_logits(torch.tensor([[0.0, 50.0], [50.0, 0.0]]))
        tensor([1, 0])
    """
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive, but got {temperature}; use `greedy` for 0.")
    probs = (logits.float() / temperature).softmax(dim=-1).reshape(-1, logits.shape[-1])
    return torch.multinomial(probs, 1, generator=generator).view(logits.shape[:-1])
