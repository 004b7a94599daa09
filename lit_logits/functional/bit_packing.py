"""Codes as a stream of bits, as they are stored."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["code_bits", "pack_bits", "pack_codes", "packed_size", "unpack_bits", "unpack_codes"]

_PACK_CHUNK = 1 << 20  # values; bounds what is spread out to a number a bit


def code_bits(codebook_size: int) -> int:
    """Return the bits of a code, ⌈log2 K⌉.

    Example:
        >>> code_bits(1), code_bits(256), code_bits(257)
        (0, 8, 9)
    """
    return (codebook_size - 1).bit_length()


def pack_bits(values: Tensor, num_bits: int) -> Tensor:
    """Pack integers in [0, 2^bits) into a stream of bits, the highest bit of each first.

    Args:
        values: (n,) of any integer dtype.
        num_bits: in [0, 32].

    Returns:
        (⌈n · bits / 8⌉,) uint8; zeros fill up the last byte.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0]), num_bits=2)
        tensor([108], dtype=torch.uint8)
    """
    if num_bits == 8:  # bytes already, and the commonest case
        return values.to(torch.uint8)
    parts = []
    for chunk in values.split(_PACK_CHUNK):  # a multiple of 8 values, so that each chunk ends with a byte
        bits = (chunk.unsqueeze(1) >> _shifts(num_bits, chunk.device)) & 1
        bits = torch.cat([bits.flatten(), bits.new_zeros(-bits.numel() % 8)]).view(-1, 8)
        parts.append((bits << _shifts(8, bits.device)).sum(1).to(torch.uint8))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=values.device)


def unpack_bits(packed: Tensor, num_bits: int, count: int) -> Tensor:
    """Unpack the `count` integers that `pack_bits` packed.

    Returns:
        (count,), uint8 for up to 8 bits, else int32.

    Raises:
        ValueError: If the stream has another length.

    Example:
        >>> unpack_bits(torch.tensor([108], dtype=torch.uint8), num_bits=2, count=4)
        tensor([1, 2, 3, 0], dtype=torch.uint8)
    """
    if packed.numel() != -(-count * num_bits // 8):
        raise ValueError(
            f"Expected {-(-count * num_bits // 8)} bytes for {count} values of {num_bits} bits, but got"
            f" {packed.numel()}."
        )
    dtype = torch.uint8 if num_bits <= 8 else torch.int32
    if num_bits == 8:
        return packed
    parts = []
    for start in range(0, count, _PACK_CHUNK):  # the chunks of `pack_bits`, which start at whole bytes
        size = min(_PACK_CHUNK, count - start)
        stream = packed[start * num_bits // 8 : -(-(start + size) * num_bits // 8)].int()
        bits = ((stream.unsqueeze(1) >> _shifts(8, stream.device)) & 1).flatten()[: size * num_bits]
        parts.append((bits.view(size, num_bits) << _shifts(num_bits, bits.device)).sum(1).to(dtype))
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=packed.device)


def packed_size(num_tokens: int, codebook_sizes: Sequence[int]) -> int:
    """Return the bytes of what `pack_codes` packs.

    Example:
        >>> packed_size(100, [256, 16])
        150
    """
    return sum(-(-num_tokens * code_bits(size) // 8) for size in codebook_sizes)


def pack_codes(codes: Tensor, codebook_sizes: Sequence[int]) -> Tensor:
    """Pack the codes that tokens own of several codebooks: those of the first for all tokens, then of the next.

    Args:
        codes: (V, S) integers, in column s in [0, K_s).
        codebook_sizes: K_s; a code takes ⌈log2 K_s⌉ bits.

    Returns:
        uint8 of `packed_size`.

    Example:
        >>> pack_codes(torch.tensor([[1, 0], [2, 1]]), [4, 2])
        tensor([96, 64], dtype=torch.uint8)
    """
    columns = zip(codes.unbind(1), codebook_sizes, strict=True)
    return torch.cat([pack_bits(column, code_bits(size)) for column, size in columns])


def unpack_codes(packed: Tensor, codebook_sizes: Sequence[int], num_tokens: int) -> Tensor:
    """Unpack the codes (V, S) int64 that `pack_codes` packed.

    Raises:
        ValueError: If there are too many or too few bytes, or a code is out of range.

    Example:
        >>> unpack_codes(torch.tensor([96, 64], dtype=torch.uint8), [4, 2], num_tokens=2)
        tensor([[1, 0],
                [2, 1]])
    """
    expected = packed_size(num_tokens, codebook_sizes)
    if packed.numel() != expected:
        raise ValueError(
            f"Expected {expected:,} bytes for {num_tokens:,} tokens in codebooks of {list(codebook_sizes)}, but got"
            f" {packed.numel():,}: the mapping is cut off or another head's."
        )
    columns = []
    parts = packed.split([packed_size(num_tokens, [size]) for size in codebook_sizes])
    for part, size in zip(parts, codebook_sizes, strict=True):
        codes = unpack_bits(part, code_bits(size), num_tokens).long()
        if int(codes.max()) >= size:
            raise ValueError(
                f"Expected codes in [0, {size}), but the largest is {int(codes.max())}: the mapping is damaged or"
                " another head's."
            )
        columns.append(codes)
    return torch.stack(columns, 1)


def _shifts(num_bits: int, device: torch.device) -> Tensor:
    return torch.arange(num_bits - 1, -1, -1, dtype=torch.int32, device=device)
