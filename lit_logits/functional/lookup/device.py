"""The choice between the Triton kernel and torch for look-ups on a GPU.

The kernel runs where hidden states are on a GPU and Triton is installed, as it is with torch's CUDA wheels, and works.
Elsewhere the caller's reference in torch runs, and a line of the log says so once.
"""

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.residual_rows import StageCodes, stage_places

__all__ = ["StreamedHead", "has_kernel", "streamed_greedy", "streamed_head", "streamed_logits"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CODES = 1 << 24
_TAKES_CPU = False  # tests of the kernel in Triton's interpreter set it
_log = logging.getLogger(__name__)


class StreamedHead(NamedTuple):
    """A head whose codes are read as they are stored.

    Attributes:
        codebooks: (S, G, K, d/G).
        stream: uint8 stream of `pack_bits`: stage after stage, the G codes of each token that owns it.
        places: (S, V) int32, where among the tokens of all stages, one stage after another, those of each token stand
            in the stream; −1 where it does not own the stage.
        token_bias: (V,) in nats, or None.
        cap: c of the soft cap of logits before the bias is added, or None.
    """

    codebooks: Tensor
    stream: Tensor
    places: Tensor
    token_bias: Tensor | None
    cap: float | None


def streamed_head(
    codebooks: Tensor,
    stream: Tensor,
    stages: Sequence[StageCodes],
    token_bias: Tensor | None = None,
    cap: float | None = None,
) -> StreamedHead:
    """Return a head for `streamed_logits` and `streamed_greedy`; make it again when any part of it changes.

    Args:
        codebooks: (S, G, K, d/G).
        stream: of `pack_bits`, the codes of all stages with ⌈log2 K⌉ bits each; they must be in [0, K).
        stages: S of them, the same codes unpacked.
        token_bias: (V,) in nats; default 0.
        cap: c of the soft cap c · tanh(z / c) of logits before the bias is added, or None.

    Example:
        >>> stages = [StageCodes(None, torch.tensor([[0], [1]])), StageCodes(torch.tensor([1]), torch.tensor([[0]]))]
        >>> streamed_head(torch.zeros(2, 1, 2, 4), torch.tensor([64], dtype=torch.uint8), stages).places
        tensor([[ 0,  1],
                [-1,  2]], dtype=torch.int32)
    """
    vocab_size, first, places = stages[0].codes.shape[0], 0, []
    for stage, place in zip(stages, stage_places(list(stages), vocab_size), strict=True):
        place = torch.arange(vocab_size, device=stream.device) if place is None else place
        places.append(torch.where(place < 0, -1, place + first))
        first += stage.codes.shape[0]
    bias = None if token_bias is None else token_bias.detach()
    return StreamedHead(codebooks.detach(), stream, torch.stack(places).int(), bias, cap)


def has_kernel(hidden: Tensor, codebook_size: int) -> bool:
    """Return whether the Triton kernel serves such hidden states; where it might but cannot run, say so once.

    Args:
        hidden: (..., d).
        codebook_size: K.
    """
    if not (hidden.is_cuda or _TAKES_CPU) or hidden.dtype not in _DTYPES or codebook_size > _MAX_CODES:
        return False
    return _works(hidden.device)


def streamed_logits(hidden: Tensor, head: StreamedHead) -> Tensor:
    """Compute token logits with the Triton kernel, without a graph; only where `has_kernel`.

    Args:
        hidden: (..., d).
        head: of `streamed_head`.

    Returns:
        (..., V) in nats, of the dtype of `hidden`.

    Raises:
        ValueError: If `hidden` is not of width d.
    """
    from lit_logits.functional.lookup.triton_kernel import triton_logits

    logits = triton_logits(_rows(hidden, head), head)
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def streamed_greedy(hidden: Tensor, head: StreamedHead) -> Tensor:
    """Find the most likely tokens (...) with the Triton kernel; arguments as in `streamed_logits`.

    It compares float32 logits, whatever the dtype of `hidden`; ties go to the lowest id. No logits are written.
    """
    from lit_logits.functional.lookup.triton_kernel import triton_greedy

    return triton_greedy(_rows(hidden, head), head).reshape(hidden.shape[:-1])


def _rows(hidden: Tensor, head: StreamedHead) -> Tensor:
    hidden_size = head.codebooks.shape[1] * head.codebooks.shape[3]
    if hidden.dim() == 0 or hidden.shape[-1] != hidden_size:
        raise ValueError(f"Expected `hidden` to be of shape (..., {hidden_size}), but got {tuple(hidden.shape)}.")
    return hidden.detach().reshape(-1, hidden_size)


@functools.cache
def _works(device: torch.device) -> bool:
    """Try the kernel on a head of one token: Triton may be missing, old, or without a compiler that it needs."""
    if importlib.util.find_spec("triton") is None:
        _log.warning(
            "Triton is not installed: codes are decoded in torch, a chunk of the vocabulary at a time, where a kernel"
            " would look them up. torch's CUDA wheels for Linux bring it; or `pip install triton`."
        )
        return False
    stages = [StageCodes(None, torch.zeros(1, 1, dtype=torch.uint8, device=device))]
    codebooks, stream = torch.ones(1, 1, 2, 1, device=device), torch.zeros(1, dtype=torch.uint8, device=device)
    try:
        streamed_greedy(torch.ones(1, 1, device=device), streamed_head(codebooks, stream, stages))
    except Exception as error:  # Triton raises errors of many types
        _log.warning(
            "Triton's look-up kernel does not run on %s: codes are decoded in torch, a chunk of the vocabulary at a"
            " time. %s: %s",
            device,
            type(error).__name__,
            error,
        )
        return False
    return True
