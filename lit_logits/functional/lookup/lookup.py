"""Token logits of residual product codes by look-up, for decoding: tables of code scores, then sums of their entries.

A token's row of the output layer is a sum, over the stages that it owns, of one code from each group, so that

    T_{s,g,k} = ⟨h_g, C_{s,g,k}⟩      z_v = b_v + Σ_{s: v ∈ members_s} Σ_g T_{s,g,M_{s,g}(v)}

takes S·K·d multiplications and one look-up a code where a dense layer takes V·d multiplications, and reads bytes where
that one reads rows. `lookup_logits` is written in torch. `packed_lookup_logits` and `lookup_greedy` run vq_lookup.cpp,
which the machine's C++ compiler builds at first use; without one they warn once and use torch.

Letters: N positions, d hidden size, V vocabulary, K codes, G groups of width d/G, S stages, of which n_s tokens own
stage s; M the codes, b the token bias.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.checks import check_finite
from lit_logits.functional.lookup.kernel import EIGHT, PackedHead, head_struct, lookup_kernel
from lit_logits.functional.reductions import at_least_float32

__all__ = ["LookupLayout", "lookup_greedy", "lookup_layout", "lookup_logits", "packed_lookup_logits"]

_BLOCK = 2048  # tokens, as in vq_lookup.cpp


class LookupLayout(NamedTuple):
    """A head as it was given, not copied, and packed.

    Attributes:
        codebooks: (S, G, K, d/G).
        codes: S of (n_s, G).
        members: S of (n_s,), or None.
        token_bias: (V,) in nats, or None.
        packed: a copy for vq_lookup.cpp; None where that cannot serve: not on a CPU, float64, or K > 32,767.
    """

    codebooks: Tensor
    codes: Sequence[Tensor]
    members: Sequence[Tensor | None]
    token_bias: Tensor | None
    packed: PackedHead | None


def lookup_logits(
    hidden: Tensor,
    codebooks: Tensor,
    codes: Sequence[Tensor],
    members: Sequence[Tensor | None],
    token_bias: Tensor | None = None,
) -> Tensor:
    """Compute token logits by look-up, on any device and differentiable: the readable reference of this file.

    Args:
        hidden: (..., d).
        codebooks: (S, G, K, d/G).
        codes: S of (n_s, G) of any integer dtype, in [0, K); n_0 = V.
        members: S of (n_s,) int64 tokens that own the stage, rising; None where all of them do, as of the first.
        token_bias: (V,) in nats; default 0.

    Returns:
        (..., V) in nats, at least float32.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> codebooks = torch.tensor([[[[1.0], [2.0]]], [[[0.5], [0.0]]]])  # two stages, one group, two codes
        >>> codes, members = [torch.tensor([[0], [1], [1]]), torch.tensor([[0]])], [None, torch.tensor([1])]
        >>> lookup_logits(torch.tensor([2.0]), codebooks, codes, members)
        tensor([2., 5., 4.])
    """
    _check_shapes(codebooks, codes, members, token_bias)
    _check_hidden(hidden, codebooks)
    num_stages, num_groups, codebook_size, width = codebooks.shape
    codebooks = at_least_float32(codebooks)
    rows = hidden.reshape(-1, num_groups, width).to(torch.promote_types(hidden.dtype, codebooks.dtype))
    tables = codebooks.to(rows.dtype) @ rows.permute(1, 2, 0)  # (S, G, K, N)
    first_entry = torch.arange(num_groups, device=hidden.device, dtype=torch.int32) * codebook_size  # of each table
    logits = rows.new_zeros(codes[0].shape[0], rows.shape[0])
    for stage in range(num_stages):
        owners, table = members[stage], tables[stage].flatten(0, 1)
        # In chunks, as int32 indices are four times as large as codes; `embedding_bag` gathers and adds up in one pass.
        chunks = codes[stage].split(_BLOCK)
        sums = torch.cat([F.embedding_bag(chunk + first_entry, table, mode="sum") for chunk in chunks])
        logits = logits + sums if owners is None else logits.index_add(0, owners, sums)
    logits = logits if token_bias is None else logits + token_bias[:, None]
    return logits.T.reshape(*hidden.shape[:-1], logits.shape[0])


def lookup_layout(
    codebooks: Tensor,
    codes: Sequence[Tensor],
    members: Sequence[Tensor | None],
    token_bias: Tensor | None = None,
) -> LookupLayout:
    """Pack a head for `packed_lookup_logits` and `lookup_greedy`; pack it again when any part of it changes.

    Arguments as in `lookup_logits`.

    Raises:
        ValueError: If shapes do not fit, codes or tokens are out of range, tokens do not rise, codebooks are not
            finite, or the bias is NaN or ∞.
    """
    _check_shapes(codebooks, codes, members, token_bias)
    check_finite(codebooks, "codebooks")
    _check_values(codes, members, codebooks.shape[2], token_bias)
    is_served = codebooks.device.type == "cpu" and codebooks.dtype != torch.float64 and codebooks.shape[2] < 1 << 15
    packed = _pack(codebooks, codes, members, token_bias) if is_served else None
    return LookupLayout(codebooks, codes, members, token_bias, packed)


@torch.no_grad()
def _pack(
    codebooks: Tensor, codes: Sequence[Tensor], members: Sequence[Tensor | None], token_bias: Tensor | None
) -> PackedHead:
    num_groups, codebook_size = codebooks.shape[1:3]
    vocab_size, padding = codes[0].shape[0], -num_groups % EIGHT
    # Block by block, and in a block group after group, as the kernel reads: the tables of a few groups stay in the
    # cache while the codes stream through. Groups are filled up with slots of code 0, whose tables are 0.
    edges = torch.arange(0, vocab_size + _BLOCK, _BLOCK).clamp(max=vocab_size)
    tiles, places, starts, total = [], [], [], 0
    for stage_codes, owners in zip(codes, members, strict=True):
        owners = torch.arange(vocab_size) if owners is None else owners
        cuts = torch.searchsorted(owners, edges)
        slots = F.pad(stage_codes, (0, padding)).to(torch.uint8 if codebook_size <= 256 else torch.int16)
        tiles += [tile.T.flatten() for tile in slots.tensor_split(cuts[1:-1])]
        places.append(owners % _BLOCK)
        starts.append(cuts + total)
        total += owners.numel()
    tiles.append(tiles[0].new_zeros(64))  # the last tokens are read by 64
    bias = torch.zeros(vocab_size) if token_bias is None else token_bias.detach().float().clone()
    return PackedHead(
        codebooks.float().transpose(2, 3).contiguous(),
        torch.cat(tiles),
        torch.cat(places).to(torch.int16),
        torch.stack(starts),
        bias,
    )


def packed_lookup_logits(hidden: Tensor, layout: LookupLayout) -> Tensor:
    """Compute token logits by look-up, equal to `lookup_logits` up to the rounding of float32 sums.

    Where a gradient is wanted, hidden states are float64, or nothing is packed, this is `lookup_logits`.

    Args:
        hidden: (..., d).
        layout: of `lookup_layout`.

    Returns:
        (..., V) in nats, float32.

    Raises:
        ValueError: If `hidden` is not of width d.

    Example:
        >>> codebooks, codes = torch.tensor([[[[1.0], [2.0]]]]), [torch.tensor([[0], [1], [1]])]
        >>> packed_lookup_logits(torch.tensor([2.0]), lookup_layout(codebooks, codes, [None]))
        tensor([2., 4., 4.])
    """
    _check_hidden(hidden, layout.codebooks)
    packed, kernel = layout.packed, _kernel_for(hidden, layout)
    inputs = (hidden, layout.codebooks, layout.token_bias)
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if packed is None or kernel is None or wants_grad:
        return lookup_logits(hidden, *layout[:4])
    rows = hidden.detach().reshape(-1, hidden.shape[-1]).float().contiguous()
    num_rows, vocab_size = rows.shape[0], packed.token_bias.shape[0]
    tables, logits = _room_for_tables(packed, 1 if num_rows == 1 else EIGHT), torch.empty(num_rows, vocab_size)
    pointers = (tensor.data_ptr() for tensor in (rows, tables, logits))
    kernel.lookup_logits(head_struct(packed), packed.codes.itemsize, num_rows, *pointers)
    return logits.reshape(*hidden.shape[:-1], vocab_size)


@torch.no_grad()
def lookup_greedy(hidden: Tensor, layout: LookupLayout) -> Tensor:
    """Find the most likely token, argmax_v z_v of float32 logits; ties go to the lowest id.

    With K ≤ 256 and AVX-512 VBMI (Ice Lake, Zen 4 and later) this is faster than the logits, and as exact: tables
    rounded up to bytes, which fit into the processor's registers, give upper bounds of all logits. The token of the
    best bound is looked up in float32, then those others whose bounds reach its logit: no other token can win.

    Args:
        hidden: (..., d).
        layout: of `lookup_layout`.

    Returns:
        (...) int64 token ids.

    Raises:
        ValueError: If `hidden` is not of width d.

    Example:
        >>> codebooks, codes = torch.tensor([[[[1.0], [2.0]]]]), [torch.tensor([[0], [1], [1]])]
        >>> lookup_greedy(torch.tensor([[2.0], [-1.0]]), lookup_layout(codebooks, codes, [None]))
        tensor([1, 0])
    """
    _check_hidden(hidden, layout.codebooks)
    packed, kernel = layout.packed, _kernel_for(hidden, layout)
    if packed is None or kernel is None or packed.codes.dtype != torch.uint8 or not hasattr(kernel, "lookup_greedy"):
        return packed_lookup_logits(hidden, layout).argmax(dim=-1)
    rows = hidden.reshape(-1, hidden.shape[-1]).float().contiguous()
    num_rows = rows.shape[0]
    at_once = min(num_rows, EIGHT)  # rows that the kernel holds tables and bounds of at a time
    tables, bounds = _room_for_tables(packed, at_once), torch.empty(at_once * packed.token_bias.shape[0])
    tokens = torch.empty(num_rows, dtype=torch.int64)
    pointers = (tensor.data_ptr() for tensor in (rows, tables, bounds, tokens))
    kernel.lookup_greedy(head_struct(packed), num_rows, *pointers)
    # The kernel gives up where bounds are not finite or leave so many candidates that all logits are faster.
    failed = tokens < 0
    if failed.any():
        tokens[failed] = packed_lookup_logits(rows[failed], layout).argmax(dim=-1)
    return tokens.reshape(hidden.shape[:-1])


def _room_for_tables(packed: PackedHead, num_rows: int) -> Tensor:
    num_stages, num_groups, _, codebook_size = packed.codebooks.shape
    # With codes of one byte every table has 256 entries, so that the kernel's addresses are constants.
    entries = 256 if packed.codes.dtype == torch.uint8 else codebook_size
    return torch.empty(num_rows * num_stages * (num_groups + -num_groups % EIGHT) * entries)


def _kernel_for(hidden: Tensor, layout: LookupLayout) -> ctypes.CDLL | None:
    """Return the kernel if it can serve these hidden states."""
    is_served = layout.packed is not None and hidden.device.type == "cpu" and hidden.dtype != torch.float64
    return lookup_kernel() if is_served else None


def _check_shapes(
    codebooks: Tensor, codes: Sequence[Tensor], members: Sequence[Tensor | None], token_bias: Tensor | None
) -> None:
    if codebooks.dim() != 4 or not codebooks.is_floating_point():
        raise ValueError(f"Expected `codebooks` to be floats of shape (S, G, K, d/G), but got {_described(codebooks)}.")
    num_stages, num_groups = codebooks.shape[:2]
    if not len(codes) == len(members) == num_stages > 0:
        raise ValueError(
            f"Expected `codes` and `members` of {num_stages} stages, as `codebooks` has, but got {len(codes)} and"
            f" {len(members)}."
        )
    vocab_size = codes[0].shape[0]
    for stage, (stage_codes, owners) in enumerate(zip(codes, members, strict=True)):
        num_tokens = vocab_size if owners is None or stage == 0 else owners.numel()
        is_integer = not stage_codes.is_floating_point() and stage_codes.dtype != torch.bool
        if stage_codes.shape != (num_tokens, num_groups) or not is_integer:
            raise ValueError(
                f"Expected `codes[{stage}]` to be integers of shape ({num_tokens}, {num_groups}), but got"
                f" {_described(stage_codes)}."
            )
        if owners is not None and (owners.shape != (num_tokens,) or owners.dtype != torch.int64):
            raise ValueError(
                f"Expected `members[{stage}]` to be int64 of shape ({num_tokens},), but got {_described(owners)}."
            )
    if token_bias is not None and token_bias.shape != (vocab_size,):
        raise ValueError(f"Expected `token_bias` to be of shape ({vocab_size},), but got {_described(token_bias)}.")


def _check_values(
    codes: Sequence[Tensor], members: Sequence[Tensor | None], codebook_size: int, token_bias: Tensor | None
) -> None:
    vocab_size = codes[0].shape[0]
    for stage, (stage_codes, owners) in enumerate(zip(codes, members, strict=True)):
        if stage_codes.numel():
            lowest, highest = (int(value) for value in stage_codes.aminmax())
            if lowest < 0 or highest >= codebook_size:
                raise ValueError(
                    f"Expected `codes[{stage}]` to be in [0, {codebook_size}), but got {lowest} to {highest}."
                )
        if owners is not None and owners.numel():
            lowest, highest = int(owners[0]), int(owners[-1])
            if lowest < 0 or highest >= vocab_size or bool((owners.diff() <= 0).any()):
                raise ValueError(
                    f"Expected `members[{stage}]` to be rising token ids in [0, {vocab_size}), but got {lowest} …"
                    f" {highest}, or some that do not rise."
                )
    if token_bias is not None and not bool((token_bias < torch.inf).all()):
        raise ValueError("Expected `token_bias` to be finite or −∞, but got NaN or ∞.")


def _check_hidden(hidden: Tensor, codebooks: Tensor) -> None:
    hidden_size = codebooks.shape[1] * codebooks.shape[3]
    if hidden.dim() == 0 or hidden.shape[-1] != hidden_size or not hidden.is_floating_point():
        raise ValueError(f"Expected `hidden` to be floats of shape (..., {hidden_size}), but got {_described(hidden)}.")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
