"""Token logits and greedy tokens of packed residual codes on a GPU, in Triton; imported only where Triton is.

    T_{s,g,k} = ⟨h_g, C_{s,g,k}⟩      z_v = b_v + cap(Σ_{s: v ∈ members_s} Σ_g T_{s,g,M_{s,g}(v)})

A matrix product makes the tables T in float32, S·G·K numbers for each hidden state. They lie in the GPU's memory, those
of up to 16 hidden states side by side, and the kernel reads them through the caches, not through shared memory. A
program takes a tile of tokens and these hidden states, and a block of groups at a time. For one hidden state their
tables are small, 16 KiB at K = 256, so that most entries should be found in L1 and the others in L2. Codes are read as
the head stores them, a stream of ⌈log2 K⌉ bits each, and nothing is unpacked into memory. Sums are float32.

Greedy decoding writes no logits: a program writes the highest of its tile and that token, and torch reduces these few.

Letters: N hidden states, d hidden size, V vocabulary, K codes, G groups of width d/G, S stages.
"""

# mypy: disallow-untyped-defs=false
# Triton gives the arguments of kernels their types.

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lit_logits.functional.bit_packing import code_bits
from lit_logits.functional.lookup.device import StreamedHead

__all__ = ["triton_greedy", "triton_logits"]

_ROWS, _GROUPS, _TOKENS, _ELEMENTS = 16, 16, 128, 4096
"""Most hidden states, groups, tokens and sums of a program; all are powers of 2."""


@triton.jit
def _read_codes(stream, places, groups, mask, stream_size, NUM_GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Read codes (groups, tokens) of `BITS` bits, the highest first, from the bytes that hold them."""
    index = places[None, :] * NUM_GROUPS + groups[:, None]
    codes = tl.zeros(mask.shape, tl.int32)
    if BITS == 8:  # bytes that lie side by side, which the compiler sees if nothing is computed with their addresses
        codes = tl.load(stream + index, mask=mask, other=0).to(tl.int32)
    elif BITS > 0:
        WINDOW: tl.constexpr = 1 if 8 % BITS == 0 else (BITS + 14) // 8  # bytes that hold a code wherever it starts
        first = index * BITS >> 3
        for i in tl.static_range(WINDOW):
            byte = tl.load(stream + first + i, mask=mask & (first + i < stream_size), other=0)
            codes = (codes << 8) | byte.to(tl.int32)
        codes = (codes >> (8 * WINDOW - BITS - (index * BITS & 7)).to(tl.int32)) & ((1 << BITS) - 1)
    return codes


@triton.jit
def _tile_logits(
    tables,
    stream,
    places,
    bias,
    cap,
    tokens,
    rows,
    vocab_size,
    stream_size,
    NUM_STAGES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute float32 logits (tokens, rows) of a tile."""
    is_token = tokens < vocab_size
    # Groups first: the threads of a warp then read entries of the same group, whose table is small, or of one token.
    sums = tl.zeros((BLOCK_G, BLOCK_V, BLOCK_N), tl.float32)
    for stage in range(NUM_STAGES):
        place = tl.load(places + stage * vocab_size + tokens, mask=is_token, other=-1).to(tl.int64)
        if tl.max(place, axis=0) >= 0:  # some of the tile own this stage
            for first in range(0, NUM_GROUPS, BLOCK_G):
                groups = first + tl.arange(0, BLOCK_G)
                mask = (groups < NUM_GROUPS)[:, None] & (place >= 0)[None, :]
                codes = _read_codes(stream, place, groups, mask, stream_size, NUM_GROUPS, BITS)
                entries = (stage * NUM_GROUPS + groups)[:, None] * CODEBOOK_SIZE + codes
                where = entries.to(tl.int64)[:, :, None] * TABLE_ROWS + rows[None, None, :]
                sums += tl.load(tables + where, mask=mask[:, :, None], other=0.0)
    logits = tl.sum(sums, axis=0)
    if HAS_CAP:  # c · tanh(z / c)
        decay = tl.exp(-2.0 * tl.abs(logits) / cap)
        capped = cap * (1.0 - decay) / (1.0 + decay)
        logits = tl.where(logits < 0, -capped, capped)
    if HAS_BIAS:
        logits += tl.load(bias + tokens, mask=is_token, other=0.0).to(tl.float32)[:, None]
    return logits


@triton.jit
def _logits_kernel(
    tables,
    stream,
    places,
    bias,
    cap,
    logits,
    vocab_size,
    num_rows,
    stream_size,
    NUM_STAGES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the logits of a tile, in the dtype of `logits` (N, V)."""
    tokens = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # fmt: off
    values = _tile_logits(
        tables, stream, places, bias, cap, tokens, rows, vocab_size, stream_size,
        NUM_STAGES, NUM_GROUPS, CODEBOOK_SIZE, BITS, HAS_BIAS, HAS_CAP, TABLE_ROWS, BLOCK_V, BLOCK_G, BLOCK_N,
    )
    # fmt: on
    where = rows.to(tl.int64)[None, :] * vocab_size + tokens[:, None]
    mask = (tokens < vocab_size)[:, None] & (rows < num_rows)[None, :]
    tl.store(logits + where, values.to(logits.dtype.element_ty), mask=mask)


@triton.jit
def _greedy_kernel(
    tables,
    stream,
    places,
    bias,
    cap,
    highest,
    winners,
    vocab_size,
    num_rows,
    stream_size,
    NUM_STAGES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the highest logit of a tile, and its lowest token, to (tiles, N)."""
    tokens = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # fmt: off
    values = _tile_logits(
        tables, stream, places, bias, cap, tokens, rows, vocab_size, stream_size,
        NUM_STAGES, NUM_GROUPS, CODEBOOK_SIZE, BITS, HAS_BIAS, HAS_CAP, TABLE_ROWS, BLOCK_V, BLOCK_G, BLOCK_N,
    )
    # fmt: on
    is_token = (tokens < vocab_size)[:, None]
    values = tl.where(values == values, values, float("inf"))  # NaN wins, as in torch's argmax
    values = tl.where(is_token, values, float("-inf"))
    best = tl.max(values, axis=0)
    winner = tl.min(tl.where((values == best[None, :]) & is_token, tokens[:, None], vocab_size), axis=0)
    where = tl.program_id(0) * num_rows + rows
    tl.store(highest + where, best, mask=rows < num_rows)
    tl.store(winners + where, winner, mask=rows < num_rows)


def triton_logits(hidden: Tensor, head: StreamedHead) -> Tensor:
    """Compute token logits by look-up, without a graph.

    Args:
        hidden: (N, d) float32, bfloat16 or float16.
        head: on the same device.

    Returns:
        (N, V) in nats, of the dtype of `hidden`.
    """
    num_rows, vocab_size = hidden.shape[0], head.places.shape[1]
    logits = hidden.new_empty(num_rows, vocab_size)
    if num_rows:
        constants = _constants(num_rows, head)
        sizes = vocab_size, num_rows, head.stream.numel()
        with _on_device(hidden):
            inputs = _inputs(hidden, head, constants["TABLE_ROWS"])
            _logits_kernel[_grid(vocab_size, constants)](*inputs, logits, *sizes, **constants)
    return logits


def triton_greedy(hidden: Tensor, head: StreamedHead) -> Tensor:
    """Find the tokens (N,) int64 of the highest float32 logits; ties go to the lowest id. Arguments as above."""
    num_rows, vocab_size = hidden.shape[0], head.places.shape[1]
    if num_rows == 0:
        return hidden.new_empty(0, dtype=torch.int64)
    constants = _constants(num_rows, head)
    grid, sizes = _grid(vocab_size, constants), (vocab_size, num_rows, head.stream.numel())
    highest = hidden.new_empty(grid[0], num_rows, dtype=torch.float32)
    winners = hidden.new_empty(grid[0], num_rows, dtype=torch.int32)
    with _on_device(hidden):
        inputs = _inputs(hidden, head, constants["TABLE_ROWS"])
        _greedy_kernel[grid](*inputs, highest, winners, *sizes, **constants)
    return winners.where(highest == highest.amax(0), vocab_size).amin(0).long()


def _inputs(hidden: Tensor, head: StreamedHead, table_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return tables (S, G, K, `table_rows`), stream, places, bias and cap."""
    num_groups, width = head.codebooks.shape[1], head.codebooks.shape[3]
    rows = F.pad(hidden.float(), (0, 0, 0, table_rows - hidden.shape[0])).view(-1, num_groups, width)
    with torch.autocast(hidden.device.type, enabled=False):
        tables = (head.codebooks.float() @ rows.permute(1, 2, 0)).contiguous()
    # Without a bias or a cap the kernel does not look at what stands for it.
    bias = tables if head.token_bias is None else head.token_bias
    return tables, head.stream, head.places, bias, 1.0 if head.cap is None else head.cap


def _constants(num_rows: int, head: StreamedHead) -> dict[str, int]:
    num_stages, num_groups, codebook_size = head.codebooks.shape[:3]
    rows, groups = min(_ROWS, _power_of_2(num_rows)), min(_GROUPS, _power_of_2(num_groups))
    return {
        "NUM_STAGES": num_stages,
        "NUM_GROUPS": num_groups,
        "CODEBOOK_SIZE": codebook_size,
        "BITS": code_bits(codebook_size),
        "HAS_BIAS": head.token_bias is not None,
        "HAS_CAP": head.cap is not None,
        "TABLE_ROWS": num_rows + -num_rows % rows,
        "BLOCK_V": min(_TOKENS, _ELEMENTS // (rows * groups)),
        "BLOCK_G": groups,
        "BLOCK_N": rows,
    }


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _grid(vocab_size: int, constants: dict[str, int]) -> tuple[int, int]:
    return -(-vocab_size // constants["BLOCK_V"]), constants["TABLE_ROWS"] // constants["BLOCK_N"]


def _on_device(hidden: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may be another one than that of the tensors."""
    return torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext()
