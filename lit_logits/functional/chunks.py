"""Rows in chunks: a loss over logits that never holds those of all rows.

Letters: N rows, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["chunked_rows", "chunked_sum", "rows_a_chunk"]

VALUES_A_CHUNK = 2**26
"""256 MiB of float32: large enough that a chunk keeps a device busy, small beside the model that made the rows."""


def rows_a_chunk(width: int, chunk_size: int | None = None) -> int:
    """Return how many rows of `width` values are made at a time.

    Args:
        width: values a row, such as V for logits.
        chunk_size: rows that were asked for; None takes as many as make 2²⁶ values.

    Raises:
        ValueError: If `chunk_size` is below 1.

    Example:
        >>> rows_a_chunk(49152), rows_a_chunk(49152, 100)
        (1365, 100)
    """
    if chunk_size is None:
        return max(1, VALUES_A_CHUNK // width)
    if chunk_size < 1:
        raise ValueError(f"Expected `chunk_size` to be at least 1, but got {chunk_size}.")
    return chunk_size


def chunked_sum(function: Callable[..., Tensor], *tensors: Tensor, chunk_size: int) -> Tensor:
    """Return Σ over chunks of `function(*chunk)`; what a chunk makes is freed, and made again in backward.

    Peak memory is that of one chunk, for one more evaluation of `function`: a token loss never holds (N, V) logits.
    Rows that fit into one chunk are evaluated once.

    Args:
        function: takes a slice of every tensor and returns a scalar sum; without randomness.
        *tensors: (N, ...), cut along the first dimension; N may be 0.
        chunk_size: rows a chunk.

    Raises:
        ValueError: If `chunk_size` is below 1.

    Example:
        >>> chunked_sum(lambda x: x.exp().sum(), torch.zeros(5), chunk_size=2)
        tensor(5.)
    """
    return torch.stack(_map_chunks(function, tensors, chunk_size)).sum()


def chunked_rows(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, chunk_size: int) -> list[Tensor]:
    """Return the results of `function(*chunk)`, joined; what a chunk makes is freed, and made again in backward.

    Args:
        function: takes a slice of every tensor and returns tensors with a row for each of its rows; without randomness.
        *tensors: (N, ...), cut along the first dimension; N may be 0.
        chunk_size: rows a chunk.

    Raises:
        ValueError: If `chunk_size` is below 1.

    Example:
        >>> chunked_rows(lambda x: (x + 1, -x), torch.arange(3), chunk_size=2)
        [tensor([1, 2, 3]), tensor([ 0, -1, -2])]
    """
    parts = _map_chunks(function, tensors, chunk_size)
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _map_chunks(function: Callable[..., Any], tensors: tuple[Tensor, ...], chunk_size: int) -> list[Any]:
    if chunk_size < 1:
        raise ValueError(f"Expected `chunk_size` to be at least 1, but got {chunk_size}.")
    if len(tensors[0]) <= chunk_size:  # what fits is not made twice
        return [function(*tensors)]
    chunks = zip(*(tensor.split(chunk_size) for tensor in tensors), strict=True)
    # The non-reentrant kind works without inputs that require gradients, as where only the head inside `function` is
    # trained. Random states are not kept, as `function` draws nothing.
    return [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
