"""Codes as a stream of bits, as they are stored."""

import torch
from torch import Tensor

__all__ = ["code_bits", "pack_bits", "unpack_bits"]

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


def _shifts(num_bits: int, device: torch.device) -> Tensor:
    return torch.arange(num_bits - 1, -1, -1, dtype=torch.int32, device=device)
