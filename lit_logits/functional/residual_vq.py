"""Residual product codes as an output layer: logits, greedy tokens and losses of rows that are decoded by the chunk.

    W_v = Σ_{s < S_v} [C_{s,0}[M_{s,0}(v)], …, C_{s,G−1}[M_{s,G−1}(v)]]      z_v = ⟨h, W_v⟩ + b_v

One stage and one group is the paper's head. Nothing of the size (N, V) or (V, d) is made by the loss or kept for its
backward: both walk over the vocabulary in chunks, and each decodes the rows of a chunk itself.

Letters: N tokens, d hidden size, V vocabulary, K codes, G groups of width d/G, S stages, of which token v owns S_v.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_logits.functional.checks import check_labels, may_read
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import soft_cap, true_places
from lit_logits.functional.residual_rows import StageCodes, codes_of_range, decode_rows

__all__ = [
    "DenseTarget",
    "ResidualVQLosses",
    "check_target",
    "residual_vq_greedy",
    "residual_vq_logits",
    "residual_vq_losses",
]

_CHUNK_ELEMENTS = 1 << 22  # logits a chunk: 16 MiB in float32


class DenseTarget(NamedTuple):
    """Output layer that is imitated, with the hidden states that it reads.

    Attributes:
        hidden: (..., d) hidden states of the original model.
        weight: (V, d).
        bias: (V,) in nats, or None.
        cap: c of the soft cap of its logits before the bias is added, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None


class ResidualVQLosses(NamedTuple):
    """Result of `residual_vq_losses`, in nats a token, 0 where the label is ignored.

    Attributes:
        cross_entropy: (...) of the labels.
        divergence: (...) KL(target ‖ ours) over the vocabulary; 0 without a target.
        target_cross_entropy: (...) of the labels under the target, without a graph; 0 without a target.
    """

    cross_entropy: Tensor
    divergence: Tensor
    target_cross_entropy: Tensor


def residual_vq_logits(
    hidden: Tensor,
    codebooks: Tensor,
    stages: list[StageCodes],
    vocab_size: int,
    token_bias: Tensor | None = None,
    *,
    cap: float | None = None,
) -> Tensor:
    """Compute token logits (..., V) in nats of hidden states (..., d), a chunk of the vocabulary at a time.

    Args:
        hidden: (..., d).
        codebooks: (S, G, K, d/G).
        stages: S of them.
        vocab_size: V.
        token_bias: (V,) in nats; default 0.
        cap: c of the soft cap c · tanh(z / c) of logits before the bias is added, or None.
    """
    walk = _chunk_logits(hidden, codebooks, stages, vocab_size, token_bias, cap)
    return torch.cat([logits for _, logits in walk], dim=-1)


def residual_vq_greedy(
    hidden: Tensor,
    codebooks: Tensor,
    stages: list[StageCodes],
    vocab_size: int,
    token_bias: Tensor | None = None,
    *,
    cap: float | None = None,
) -> Tensor:
    """Find the most likely tokens (...) of hidden states (..., d), a chunk of the vocabulary at a time.

    Ties go to the lowest id. Arguments as in `residual_vq_logits`.
    """
    best = torch.full(hidden.shape[:-1], -torch.inf, device=hidden.device)
    tokens = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    for start, logits in _chunk_logits(hidden, codebooks, stages, vocab_size, token_bias, cap):
        highest, index = logits.max(dim=-1)
        # Strictly greater, so that an equal logit of a later chunk does not win.
        tokens = torch.where(highest > best, index + start, tokens)
        best = torch.maximum(best, highest)
    return tokens


def residual_vq_losses(
    hidden: Tensor,
    codebooks: Tensor,
    stages: list[StageCodes],
    labels: Tensor,
    *,
    token_bias: Tensor | None = None,
    target: DenseTarget | None = None,
    cap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> ResidualVQLosses:
    """Compute cross-entropy and divergence from a dense output layer, in memory that grows with neither N·V nor V·d.

    Both are exact. Forward walks over the vocabulary once, for normalisers and expectations, and backward once, for the
    gradients, which go from the logits of a chunk straight into hidden states and codebooks. The target gets no
    gradient.

    Args:
        hidden: (..., d) hidden states.
        codebooks: (S, G, K, d/G).
        stages: S of them, the first of all V tokens.
        labels: (...) token ids in [0, V) or `ignore_index`, already shifted.
        token_bias: (V,) in nats; default 0.
        target: what to measure the divergence from; None leaves it out.
        cap: c of the soft cap of our logits before the bias is added, or None; the target has its own.
        ignore_index: label of tokens that do not count.

    Raises:
        ValueError: If labels or target have another shape, or a label is out of range (checked in host memory only).

    Example:
        >>> codebooks, codes = torch.zeros(1, 1, 2, 3), StageCodes(None, torch.tensor([[0], [1], [1], [0]]))
        >>> target = DenseTarget(torch.ones(1, 3), torch.zeros(4, 3))
        >>> residual_vq_losses(torch.ones(1, 3), codebooks, [codes], torch.tensor([3]), target=target)
        ResidualVQLosses(cross_entropy=tensor([1.3863]), divergence=tensor([0.]), target_cross_entropy=tensor([1.3863]))
    """
    vocab_size = stages[0].codes.shape[0]
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Expected `labels` to have shape {tuple(hidden.shape[:-1])}, one for each hidden state, but got"
            f" {tuple(labels.shape)}."
        )
    check_labels(labels, vocab_size, ignore_index=ignore_index)
    if target is not None:
        check_target(target, labels, vocab_size)
    # Ignored tokens are dropped before the products, and put back as zeros.
    mask = (labels != ignore_index).flatten()
    places = true_places(mask)  # once, as the host waits to learn how many there are
    tokens = labels.flatten()[places]
    flat = hidden.reshape(-1, hidden.shape[-1])[places]
    if target is not None:
        target = target._replace(hidden=target.hidden.reshape(-1, target.hidden.shape[-1])[places])
    losses = _Losses.apply(flat, codebooks, token_bias, tokens, stages, target, cap, _compute_dtype(hidden))
    return ResidualVQLosses(
        *(values.new_zeros(mask.shape).index_copy(0, places, values).view(labels.shape) for values in losses)
    )


def check_target(target: DenseTarget, labels: Tensor, vocab_size: int) -> None:
    """Raise unless a target has hidden states of the labels' shape, and a row for each token.

    Raises:
        ValueError: If it has not.
    """
    if target.hidden.shape[:-1] != labels.shape or target.weight.shape[0] != vocab_size:
        raise ValueError(
            f"Expected a target of hidden states {tuple(labels.shape)} and {vocab_size} rows, but got"
            f" {tuple(target.hidden.shape[:-1])} and {target.weight.shape[0]}."
        )


def _chunk_logits(
    hidden: Tensor,
    codebooks: Tensor,
    stages: list[StageCodes],
    vocab_size: int,
    token_bias: Tensor | None,
    cap: float | None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first token of each chunk of the vocabulary, and its logits."""
    for start, end in _chunks(vocab_size, hidden.shape[-1]):
        logits = soft_cap(
            F.linear(hidden, decode_rows(codebooks, stages, vocab_size, start, end).to(hidden.dtype)), cap
        )
        yield start, logits if token_bias is None else logits + token_bias[start:end].to(logits.dtype)


class _Losses(torch.autograd.Function):
    """Cross-entropy and divergence (N,) of tokens that all count.

    A Function of its own, as autograd would keep the logits and rows of every chunk until backward. With z our logits,
    u the target's and Z, Z_u their normalisers, CE = log Z − z_y and KL = E_u[u − z] + log Z − log Z_u.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        codebooks: Tensor,
        token_bias: Tensor | None,
        tokens: Tensor,
        stages: list[StageCodes],
        target: DenseTarget | None,
        cap: float | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.stages, ctx.target, ctx.cap, ctx.dtype = stages, target, cap, dtype
        walk = _Walk(hidden, codebooks, token_bias, stages, target, cap, dtype)
        zeros = torch.zeros(len(hidden), dtype=walk.sum_dtype, device=hidden.device)
        ours, theirs = _LogSumExp(zeros), _LogSumExp(zeros)
        label_logits, target_label_logits = zeros.clone(), zeros.clone()
        expected = zeros.clone()  # Σ_v exp(u_v − max u) (u_v − z_v), rescaled as it goes
        for start, end, _, logits, target_logits in walk:
            ours.add(logits)
            here = (tokens >= start) & (tokens < end)
            index = (tokens - start).clamp(0, end - start - 1).unsqueeze(1)
            label_logits = torch.where(here, logits.gather(1, index).squeeze(1), label_logits)
            if target_logits is not None:
                scale, weights = theirs.add(target_logits)
                expected = expected * scale + (weights * (target_logits - logits)).sum(1)
                found = target_logits.gather(1, index).squeeze(1)
                target_label_logits = torch.where(here, found, target_label_logits)
        normalizer, target_normalizer = ours.value(), theirs.value()
        ctx.save_for_backward(hidden, codebooks, token_bias, tokens, normalizer, target_normalizer)
        if target is None:
            ctx.mark_non_differentiable(zeros)
            return normalizer - label_logits, zeros, zeros
        divergence = expected / theirs.total + normalizer - target_normalizer
        target_losses = target_normalizer - target_label_logits
        ctx.mark_non_differentiable(target_losses)
        return normalizer - label_logits, divergence, target_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, grad_kl: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, codebooks, token_bias, tokens, normalizer, target_normalizer = ctx.saved_tensors
        target = ctx.target
        # A loss without divergence needs no target here; on an accelerator the host would wait to learn of it.
        if target is None or (may_read(grad_kl) and not bool(grad_kl.any())):
            target, grad_kl = None, torch.zeros_like(grad_ce)
        walk = _Walk(hidden, codebooks, token_bias, ctx.stages, target, ctx.cap, ctx.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=walk.sum_dtype)
        grad_codebooks = torch.zeros_like(codebooks, dtype=walk.sum_dtype)
        grad_bias = None if token_bias is None else torch.zeros_like(token_bias, dtype=walk.sum_dtype)
        wants_rows = ctx.needs_input_grad[1]
        # dCE/dz = softmax(z) − onehot(y) and dKL/dz = softmax(z) − softmax(u): the softmax of both is made once.
        level = (grad_ce + grad_kl).unsqueeze(1)
        for start, end, rows, logits, target_logits in walk:
            grad = (logits - normalizer.unsqueeze(1)).exp_().mul_(level)
            if target_logits is not None:
                grad.addcmul_((target_logits - target_normalizer.unsqueeze(1)).exp_(), grad_kl.unsqueeze(1), value=-1)
            is_here = (tokens >= start) & (tokens < end)
            place = (tokens - start).clamp(0, end - start - 1).unsqueeze(1)
            grad.scatter_add_(1, place, (-grad_ce).masked_fill(~is_here, 0.0).unsqueeze(1).to(grad.dtype))
            if grad_bias is not None:
                grad_bias[start:end] = grad.sum(0)
            if ctx.cap is not None:  # d(c · tanh(z / c)) / dz = 1 − tanh²
                capped = logits if token_bias is None else logits - token_bias[start:end]
                grad *= 1 - (capped.nan_to_num(0.0) / ctx.cap).square()  # not a number where the bias is −∞
            # Products in the dtype of forward's; sums over chunks in at least float32.
            narrow = grad.to(ctx.dtype)
            if ctx.needs_input_grad[0]:
                grad_hidden += narrow @ rows
            if wants_rows:
                grad_rows = (narrow.T @ walk.hidden).to(walk.sum_dtype)
                for stage, where, index in codes_of_range(codebooks, ctx.stages, start, end):
                    part = grad_rows if where is None else grad_rows[where]
                    flat = grad_codebooks[stage].view(-1, codebooks.shape[3])
                    flat.index_add_(0, index.flatten(), part.reshape(-1, codebooks.shape[3]))
        return (
            grad_hidden.to(hidden.dtype) if ctx.needs_input_grad[0] else None,
            grad_codebooks.to(codebooks.dtype) if wants_rows else None,
            None if grad_bias is None else grad_bias.to(token_bias.dtype),
            *(None,) * 5,
        )


class _Walk:
    """Chunks of the vocabulary: bounds, rows in the dtype of the products, logits, and those of the target."""

    def __init__(
        self,
        hidden: Tensor,
        codebooks: Tensor,
        token_bias: Tensor | None,
        stages: list[StageCodes],
        target: DenseTarget | None,
        cap: float | None,
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.codebooks, self.token_bias = hidden.to(dtype), codebooks, token_bias
        self.stages, self.target, self.cap, self.dtype = stages, target, cap, dtype
        self.sum_dtype = torch.promote_types(dtype, torch.float32)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor | None]]:
        vocab_size, target = self.stages[0].codes.shape[0], self.target
        target_hidden = None if target is None else target.hidden.to(self.dtype)
        with torch.autocast(self.hidden.device.type, enabled=False):
            for start, end in _chunks(vocab_size, max(self.hidden.shape)):
                rows = decode_rows(self.codebooks, self.stages, vocab_size, start, end).to(self.dtype)
                bias = None if self.token_bias is None else self.token_bias[start:end]
                logits = self._logits(self.hidden, rows, bias, self.cap)
                target_logits = None
                if target is not None and target_hidden is not None:
                    bias = None if target.bias is None else target.bias[start:end]
                    target_rows = target.weight[start:end].to(self.dtype)
                    target_logits = self._logits(target_hidden, target_rows, bias, target.cap)
                yield start, end, rows, logits, target_logits

    def _logits(self, hidden: Tensor, rows: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
        logits = soft_cap(F.linear(hidden, rows).to(self.sum_dtype), cap)
        return logits if bias is None else logits.add_(bias)


class _LogSumExp:
    """Running log-sum-exp of (N, ·) chunks; the sum is relative to the highest logit so far and cannot overflow."""

    def __init__(self, zeros: Tensor) -> None:
        self.highest, self.total = torch.full_like(zeros, -torch.inf), zeros.clone()

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take a chunk in; return the factor (N,) that rescales earlier sums, and exp(logits − highest)."""
        highest = torch.maximum(self.highest, logits.amax(1))
        scale = (self.highest - highest).exp()
        weights = (logits - highest.unsqueeze(1)).exp_()
        self.total = self.total * scale + weights.sum(1)
        self.highest = highest
        return scale, weights

    def value(self) -> Tensor:
        return self.highest + self.total.log()


def _chunks(vocab_size: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield bounds of chunks of the vocabulary with about `_CHUNK_ELEMENTS` numbers in (width, chunk)."""
    size = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, vocab_size, size):
        yield start, min(start + size, vocab_size)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products: that of autocast, else of the hidden states."""
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
