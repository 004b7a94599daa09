"""Tokens that two vocabularies share: a source's probabilities, carried over to a pivot of another tokenizer.

A source token whose text is also a pivot token gives its probability to that token; several may give to one. One
without such a partner may give it to the pivot's pieces of its text. What is left, and what lies beyond the k likeliest
tokens, is the tail. [0]

Letters: N positions, V and W vocabularies of pivot and source, k `top_k`, P pieces of a token.

References:
    [0]: X-Token: cross-tokenizer distillation, 2026, arXiv 2605.21699.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_logits.functional.reductions import Reduction, at_least_float32
from lit_logits.functional.top_k_kl import KLKind, top_k_kl

__all__ = ["MatchedTopK", "UnmatchedTokens", "check_unmatched", "match_top_k", "match_vocabularies", "matched_kl"]

UnmatchedTokens = Literal["tail", "first", "pieces"]

_MAX_PIECES = 4  # the next one would get a ten-thousandth
_PIECE_DECAY = 0.1  # of the weights of pieces [0]


class MatchedTopK(NamedTuple):
    """Result of `match_top_k`.

    Attributes:
        token_ids: (..., k·P) ids of the pivot, different at each position; −1 where there is none.
        log_probs: (..., k·P) log of the probability that these tokens got, in nats; −inf where there is none.
        tail: (...) probability that found no token, in [0, 1]; 1 − tail is the matched mass.
    """

    token_ids: Tensor
    log_probs: Tensor
    tail: Tensor


def match_vocabularies(
    pivot_tokens: Sequence[bytes | None],
    source_tokens: Sequence[bytes | None],
    *,
    unmatched: UnmatchedTokens = "tail",
) -> Tensor:
    """Find for each token of a source the pivot's token of the same text.

    For a token without one, the pivot would next read the first piece of its text. Pieces are the longest tokens of the
    pivot that the rest of the text begins with, one after the other. (X-Token [0] takes those of the pivot's tokenizer;
    these need none, and cut within characters too.)

    Args:
        pivot_tokens: V texts, in the order of the ids; None for one that stands for no text, such as an end token. Of
            several with one text, the first counts.
        source_tokens: W texts, in the same way.
        unmatched: what a token without a partner has: nothing (`tail`), its `first` piece, or its first four `pieces`.

    Returns:
        (W,) int64 ids of the pivot, −1 where there is none; for `pieces` (W, P), a partner standing for the only piece.

    Raises:
        ValueError: If `unmatched` is unknown.

    Example:
        >>> match_vocabularies([None, b"a", b" b"], [b" b", b"c", None, b"a", b"a"])
        tensor([ 2, -1, -1,  1,  1])
        >>> match_vocabularies([None, b"a", b" b"], [b"ac", b"a b"], unmatched="pieces")
        tensor([[ 1, -1, -1, -1],
                [ 1,  2, -1, -1]])
    """
    check_unmatched(unmatched)
    ids: dict[bytes, int] = {}
    for number, text in enumerate(pivot_tokens):
        if text:
            ids.setdefault(text, number)
    count, longest = {"tail": 0, "first": 1, "pieces": _MAX_PIECES}[unmatched], max(map(len, ids), default=0)
    width, rows = max(1, count), []
    for text in source_tokens:
        found = [ids[text]] if text in ids else _pieces(text or b"", ids, longest, count)
        rows.append(found + [-1] * (width - len(found)))
    table = torch.tensor(rows, dtype=torch.int64).view(-1, width)
    return table if unmatched == "pieces" else table[:, 0]


def check_unmatched(unmatched: str) -> None:
    """Raise unless `unmatched` is one of `match_vocabularies`.

    Raises:
        ValueError: If it is not.
    """
    if unmatched not in get_args(UnmatchedTokens):
        raise ValueError(f"Expected `unmatched` to be one of {list(get_args(UnmatchedTokens))}, but got {unmatched!r}.")


def _pieces(text: bytes, ids: Mapping[bytes, int], longest: int, count: int) -> list[int]:
    """Return up to `count` pieces of a text, up to where none fits."""
    found: list[int] = []
    start = 0
    while len(found) < count:
        ends = range(min(len(text), start + longest), start, -1)
        end = next((end for end in ends if text[start:end] in ids), None)
        if end is None:
            break
        found.append(ids[text[start:end]])
        start = end
    return found


def match_top_k(
    top_k_ids: Tensor, top_k_log_probs: Tensor, source_to_pivot: Tensor, *, tail: Tensor | None = None
) -> MatchedTopK:
    """Carry the k likeliest tokens of a source over to the pivot's vocabulary.

    Piece i of a token gets the share 0.1^i / Σ_j 0.1^j of its probability [0].

    Args:
        top_k_ids: (..., k) ids of the source.
        top_k_log_probs: (..., k) in nats.
        source_to_pivot: (W,) or (W, P) of `match_vocabularies`.
        tail: (...) probability of the source's other tokens; None is what the given ones leave.

    Example:
        >>> probs = torch.tensor([0.5, 0.25, 0.125])
        >>> matched = match_top_k(torch.tensor([3, 1, 4]), probs.log(), torch.tensor([2, -1, -1, 1, 1]))
        >>> matched.token_ids, matched.log_probs.exp(), matched.tail
        (tensor([-1,  1, -1]), tensor([0.0000, 0.6250, 0.0000]), tensor(0.3750))
    """
    probs = at_least_float32(top_k_log_probs).exp()
    ids = source_to_pivot.to(top_k_ids.device)[top_k_ids]
    if source_to_pivot.ndim == 2:
        piece = torch.arange(ids.shape[-1], device=ids.device)
        weights = probs.new_full((), _PIECE_DECAY) ** piece * (ids >= 0)
        weights[..., 0].masked_fill_(ids[..., 0] < 0, 1.0)  # what has no piece goes to the tail with all it has
        probs = (probs.unsqueeze(-1) * weights / weights.sum(-1, keepdim=True)).flatten(-2)
        ids = ids.flatten(-2)
    ids, order = ids.sort(-1)
    probs = probs.gather(-1, order)
    # Equal ids lie side by side now: they are numbered by counting the places where they change.
    is_new = torch.ones_like(ids, dtype=torch.bool)
    is_new[..., 1:] = ids[..., 1:] != ids[..., :-1]
    place = is_new.long().cumsum(-1) - 1
    token_ids = torch.full_like(ids, -1).scatter(-1, place, ids)
    sums = torch.zeros_like(probs).scatter_add(-1, place, probs)
    is_there = token_ids >= 0
    unmatched = sums.masked_fill(is_there, 0.0).sum(-1)
    matched = sums.masked_fill(~is_there, 0.0)
    rest = 1 - matched.sum(-1) if tail is None else tail.to(probs.dtype) + unmatched
    return MatchedTopK(token_ids, matched.log(), rest.clamp(0.0, 1.0))


def matched_kl(
    student_logits: Tensor,
    top_k_ids: Tensor,
    top_k_log_probs: Tensor,
    source_to_pivot: Tensor,
    mask: Tensor | None = None,
    *,
    tail: Tensor | None = None,
    kind: KLKind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute `top_k_kl` of a source of another tokenizer, over the tokens that both have and a tail of the others.

    Args:
        student_logits: (..., V) in nats, at positions where both have read the same text.
        top_k_ids: (..., k) ids of the source.
        top_k_log_probs: (..., k) at τ, in nats.
        source_to_pivot: (W,) or (W, P) of `match_vocabularies`.
        mask: as the other arguments, see `top_k_kl`.
        tail: (...) probability of the source's other tokens; None is what the given ones leave.
        kind: see `top_k_kl`.
        beta: see `top_k_kl`.
        temperature: τ > 0.
        reduction: over positions.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`. 0 where no token found a partner.

    Example:
        >>> matched_kl(torch.zeros(1, 4), torch.tensor([[7]]), torch.tensor([[0.5]]).log(), torch.arange(8) - 5)
        tensor(0.1438)
    """
    matched = match_top_k(top_k_ids, top_k_log_probs, source_to_pivot, tail=tail)
    options: dict[str, Any] = {"kind": kind, "beta": beta, "temperature": temperature, "reduction": reduction}
    return top_k_kl(student_logits, matched.token_ids, matched.log_probs, mask, tail=matched.tail, **options)
