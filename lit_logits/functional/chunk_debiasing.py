"""Likelihoods of chunks that say the same of two tokenizers: a chunk, and behind it a new word.

A token says more than its text: that the text does not go on as in a longer token. Where one vocabulary has `ab` and
another `ab` and `abc`, `ab` is a text that begins with it for the first, and one that does not go on with `c` for the
second. With the probability that the text goes on with a boundary, both say that `ab` came, and then a new word. [0]

A boundary is white space, which tokens hold at their beginning, or the end of the text.

Letters: B samples, T positions, N rows, V vocabulary, M tokens that a boundary begins.

References:
    [0]: ALM: approximate likelihood matching, 2025, arXiv 2503.20083, Section 3.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_logits.functional.reductions import at_least_float32

__all__ = ["boundary_log_probs", "boundary_tokens", "close_chunks", "merge_cuts"]


def boundary_tokens(tokens: Sequence[bytes | None], vocab_size: int | None = None) -> Tensor:
    r"""Find the tokens that a boundary begins: those that begin with white space, and those without text.

    The latter are special tokens, which end a text or a turn. (Of tokens that no text ever holds, such as a second one
    for the same byte, a model expects nothing.)

    Args:
        tokens: V texts, in the order of the ids; None for one that stands for no text.
        vocab_size: how many of them the model has; None is all.

    Returns:
        (M,) int64 ids, ascending.

    Example:
        >>> boundary_tokens([None, b"a", b" a", b"a ", b"\n"])
        tensor([0, 2, 4])
    """
    shown = tokens[:vocab_size]
    return torch.tensor([i for i, text in enumerate(shown) if text is None or text[:1].isspace()], dtype=torch.int64)


def boundary_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probability that the next token is one of these, log Σ_v∈ids softmax(z)_v.

    Args:
        logits: z, (N, V) in nats.
        token_ids: (M,) of `boundary_tokens`, at least one.

    Returns:
        (N,) nats, at least float32; very small, with a gradient of 0, where all of them are ruled out.

    Example:
        >>> boundary_log_probs(torch.zeros(1, 4), torch.tensor([0, 2])).exp()
        tensor([0.5000])
    """
    values = at_least_float32(logits)
    # Where all of them are −inf, the gradient of their logsumexp would be NaN.
    among = values[..., token_ids].clamp(min=torch.finfo(values.dtype).min / 4)
    return among.logsumexp(-1) - values.logsumexp(-1)


def merge_cuts(is_cut: Tensor, log_probs: Tensor, *, threshold: float) -> Tensor:
    """Keep the cuts at which a new word is likely enough; a chunk that would end at another is one with the next.

    A boundary that hardly comes would make the likelihood of any chunk before it as good as 0. The source's
    probabilities decide [0: so the paper's public code]: the pivot's would leave out the places at which it is wrong.

    Args:
        is_cut: boolean (B, T), positions where a chunk begins, and the one before it ends.
        log_probs: (B, T) of `boundary_log_probs` at each position.
        threshold: γ in [0, 1), the least probability; 0.1 in the paper's public code.

    Returns:
        Boolean (B, T). The first cut of each sample stays.

    Example:
        >>> is_cut = torch.tensor([[True, False, True, True]])
        >>> merge_cuts(is_cut, torch.tensor([[0.0, 0.9, 0.05, 0.5]]).log(), threshold=0.1)
        tensor([[ True, False, False,  True]])
    """
    is_first = is_cut & (is_cut.cumsum(-1) == 1)
    return is_first | (is_cut & (log_probs.exp() >= threshold))


def close_chunks(chunk_log_probs: Tensor, log_probs: Tensor, is_cut: Tensor) -> Tensor:
    """Add to the log-likelihood of each chunk that of a boundary behind it.

    Args:
        chunk_log_probs: (B, T) of each chunk where it begins, as `sum_chunks` returns them.
        log_probs: (B, T) of `boundary_log_probs` at each position.
        is_cut: boolean (B, T), positions where a chunk begins, and the one before it ends.

    Returns:
        (B, T). What begins at the last cut of a sample has no end, and is as it was.

    Example:
        >>> is_cut = torch.tensor([[True, False, True, True]])
        >>> close_chunks(torch.tensor([[-3.0, 0.0, -4.0, -5.0]]), torch.tensor([[-9.0, -9.0, -0.5, -0.25]]), is_cut)
        tensor([[-3.5000,  0.0000, -4.2500, -5.0000]])
    """
    length = is_cut.shape[-1]
    places = torch.arange(length, device=is_cut.device).expand(is_cut.shape).masked_fill(~is_cut, length)
    following = places.flip(-1).cummin(-1).values.flip(-1)  # the cut at a position or after it
    end = torch.nn.functional.pad(following[..., 1:], (0, 1), value=length)
    behind = log_probs.gather(-1, end.clamp(max=length - 1))
    return chunk_log_probs + torch.where(is_cut & (end < length), behind, 0.0)
