"""Rows that are sums of codes: decoded one after another, all at once, or those of some tokens alone.

    W_v = Σ_{s < S_v} [C_{s,0}[M_{s,0}(v)], …, C_{s,G−1}[M_{s,G−1}(v)]]

Letters: d hidden size, V vocabulary, K codes, G groups of width d/G, S stages, of which token v owns S_v.
"""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "StageCodes",
    "codes_of_range",
    "decode_all_rows",
    "decode_rows",
    "decode_token_rows",
    "stage_codes",
    "stage_places",
]


class StageCodes(NamedTuple):
    """Mapping of one stage.

    Attributes:
        members: (n,) int64 tokens that own the stage, rising; None where all of them do.
        codes: (n, G) of any integer dtype, in [0, K).
    """

    members: Tensor | None
    codes: Tensor


def stage_codes(token_stages: Tensor, codes: Tensor, num_groups: int) -> list[StageCodes]:
    """Cut the codes of all stages, stored one after the other, into stages.

    Args:
        token_stages: (V,) integer number of stages that each token owns, at least 1.
        codes: (Σ_v S_v · G,) of any integer dtype: stage after stage, in each the tokens that own it in rising order.
        num_groups: G.

    Example:
        >>> first, second = stage_codes(torch.tensor([1, 2, 1]), torch.arange(8), num_groups=2)
        >>> second
        StageCodes(members=tensor([1]), codes=tensor([[6, 7]]))
    """
    stages, start = [], 0
    for stage in range(int(token_stages.max())):
        members = (token_stages > stage).nonzero().squeeze(1)
        end = start + members.numel() * num_groups
        whole = members.numel() == token_stages.numel()
        stages.append(StageCodes(None if whole else members, codes[start:end].view(-1, num_groups)))
        start = end
    return stages


def decode_rows(
    codebooks: Tensor, stages: list[StageCodes], vocab_size: int, start: int = 0, end: int | None = None
) -> Tensor:
    """Decode rows [start, end) of the dense (V, d) layer that gives the same logits.

    Args:
        codebooks: (S, G, K, d/G).
        stages: S of them, the first of all tokens.
        vocab_size: V.
        start: first token.
        end: one past the last token; default V.

    Returns:
        (end − start, d), differentiable in the codebooks.

    Example:
        >>> codebooks = torch.tensor([[[[1.0], [2.0]]], [[[0.5], [0.0]]]])  # two stages, one group, two codes
        >>> stages = [StageCodes(None, torch.tensor([[0], [1]])), StageCodes(torch.tensor([1]), torch.tensor([[0]]))]
        >>> decode_rows(codebooks, stages, vocab_size=2)
        tensor([[1.0000],
                [2.5000]])
    """
    end = vocab_size if end is None else end
    rows: Tensor | None = None
    for stage, where, index in codes_of_range(codebooks, stages, start, end):
        part = F.embedding(index, codebooks[stage].flatten(0, 1)).flatten(1)
        if where is None:
            rows = part if rows is None else rows + part
        else:
            rows = cast(Tensor, rows).index_add(0, where, part)
    return cast(Tensor, rows)


def decode_all_rows(codebooks: Tensor, stages: list[StageCodes]) -> Tensor:
    """Decode the dense (V, d) layer at once, by operations whose shapes do not depend on values.

    Equal to `decode_rows`; for code that is traced, which cannot look at the codes.

    Args:
        codebooks: (S, G, K, d/G).
        stages: up to S of them, the first of all tokens.

    Example:
        >>> codebooks = torch.tensor([[[[1.0], [2.0]]], [[[0.5], [0.0]]]])  # two stages, one group, two codes
        >>> stages = [StageCodes(None, torch.tensor([[0], [1]])), StageCodes(torch.tensor([1]), torch.tensor([[0]]))]
        >>> decode_all_rows(codebooks, stages)
        tensor([[1.0000],
                [2.5000]])
    """
    num_groups, codebook_size = codebooks.shape[1:3]
    first_entry = torch.arange(num_groups, device=codebooks.device) * codebook_size  # of each codebook
    first, *others = (
        F.embedding(codes.long() + first_entry, codebooks[stage].flatten(0, 1)).flatten(1)
        for stage, (_, codes) in enumerate(stages)
    )
    rows = first
    for part, (members, _) in zip(others, stages[1:], strict=True):
        rows = rows + part if members is None else rows.index_add(0, members, part)
    return rows


def stage_places(stages: list[StageCodes], vocab_size: int) -> list[Tensor | None]:
    """Return for each stage where the codes of each token stand in it: (V,) int64, −1 without any; None: at v itself.

    Args:
        stages: S of them.
        vocab_size: V.

    Example:
        >>> stage_places([StageCodes(None, torch.zeros(3, 1)), StageCodes(torch.tensor([2]), torch.zeros(1, 1))], 3)
        [None, tensor([-1, -1,  0])]
    """
    places: list[Tensor | None] = []
    for members, _ in stages:
        if members is None:
            places.append(None)
            continue
        numbers = torch.arange(len(members), device=members.device)
        places.append(numbers.new_full((vocab_size,), -1).index_copy(0, members, numbers))
    return places


def decode_token_rows(
    tokens: Tensor, codebooks: Tensor, stages: list[StageCodes], places: list[Tensor | None]
) -> Tensor:
    """Decode the rows (..., d) of some tokens, as an input table is read.

    Shapes do not depend on values, so that the code can be traced. Differentiable in the codebooks.

    Args:
        tokens: (...) ids in [0, V).
        codebooks: (S, G, K, d/G).
        stages: up to S of them, the first of all tokens.
        places: what `stage_places` gives for them.

    Example:
        >>> codebooks = torch.tensor([[[[1.0], [2.0]]], [[[0.5], [0.0]]]])  # two stages, one group, two codes
        >>> stages = [StageCodes(None, torch.tensor([[0], [1]])), StageCodes(torch.tensor([1]), torch.tensor([[0]]))]
        >>> decode_token_rows(torch.tensor([1, 0]), codebooks, stages, stage_places(stages, 2))
        tensor([[2.5000],
                [1.0000]])
    """
    num_groups, codebook_size = codebooks.shape[1:3]
    first_entry = torch.arange(num_groups, device=codebooks.device) * codebook_size  # of each codebook
    rows: Tensor | None = None
    for stage, ((_, codes), place) in enumerate(zip(stages, places, strict=True)):
        where = tokens if place is None else place[tokens]
        part = F.embedding(codes[where.clamp(min=0)].long() + first_entry, codebooks[stage].flatten(0, 1)).flatten(-2)
        if place is not None:
            part = part * (where >= 0).unsqueeze(-1)
        rows = part if rows is None else rows + part
    return cast(Tensor, rows)


def codes_of_range(
    codebooks: Tensor, stages: list[StageCodes], start: int, end: int
) -> Iterator[tuple[int, Tensor | None, Tensor]]:
    """Yield for each stage that tokens of [start, end) own its number, which of them, and rows (n, G) of (G·K, d/G)."""
    num_groups, codebook_size = codebooks.shape[1:3]
    offsets = torch.arange(num_groups, device=codebooks.device) * codebook_size
    for stage, (members, codes) in enumerate(stages):
        if members is None:
            yield stage, None, codes[start:end].long() + offsets
            continue
        low, high = torch.searchsorted(members, torch.tensor([start, end], device=members.device)).tolist()
        if high > low:
            yield stage, members[low:high] - start, codes[low:high].long() + offsets
