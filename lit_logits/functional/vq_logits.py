"""Vector-quantised logits: a codebook scores K codes, a mapping gives each of V tokens the score of its code.

The probability of a token splits into that of its code and that of the token within the code,

    l = h Cᵀ      z_v = l_{M(v)} + b_v      β_k = logsumexp_{v: M(v)=k} b_v
    p(v | h) = softmax(l + β)_{M(v)} · exp(b_v − β_{M(v)}),

so the loss is exact without the (N, V) logits. The second factor does not depend on h: its
cross-entropy is a floor under the loss of any backbone.

Letters: N tokens, d hidden size, V vocabulary, K codes (M: {0..V−1} → {0..K−1}).

References:
    [0]: VQ-Logits, 2025, arXiv 2505.10202. The collapsed loss is ours.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.checks import check_labels, check_token_to_code, may_read
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens, soft_cap

__all__ = [
    "code_log_mass",
    "code_logits",
    "scatter_code_logits",
    "straight_through_vq_cross_entropy",
    "vq_cross_entropy",
]


def code_log_mass(
    token_to_code: Tensor,
    codebook_size: int,
    token_bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the log mass of each code, β_k = logsumexp_{v: M(v)=k} b_v; without a bias, the log of its token count.

    Args:
        token_to_code: (V,) int64.
        codebook_size: K.
        token_bias: (V,) in nats; default 0.
        dtype: of the result without a bias.

    Returns:
        (K,), at least float32, −inf for an empty code; differentiable in `token_bias`.

    Raises:
        ValueError: If a code is out of range (checked in host memory only).

    Example:
        >>> code_log_mass(torch.tensor([0, 0, 2]), codebook_size=3).exp()
        tensor([2., 0., 1.])
    """
    if may_read(token_to_code):
        check_token_to_code(token_to_code, token_to_code.shape[0], codebook_size)
    if token_bias is None:
        ones = torch.ones_like(token_to_code, dtype=dtype)
        return ones.new_zeros(codebook_size).index_add_(0, token_to_code, ones).log()  # bincount would wait for a GPU
    # The maximum of each code is subtracted first, so that the sum neither overflows nor vanishes. It is detached: the
    # result does not depend on it.
    bias = at_least_float32(token_bias)
    highest = bias.detach().new_full((codebook_size,), -torch.inf)
    highest = highest.scatter_reduce(0, token_to_code, bias.detach(), "amax")
    mass = bias.new_zeros(codebook_size).index_add(0, token_to_code, (bias - highest[token_to_code]).exp())
    return highest + mass.clamp(min=torch.finfo(mass.dtype).tiny).log()  # no infinite slope at empty codes


def scatter_code_logits(code_logits: Tensor, token_to_code: Tensor, token_bias: Tensor | None = None) -> Tensor:
    """Compute token logits z_v = l_{M(v)} + b_v: the paper's "scatter", and the readable reference of everything here.

    Args:
        code_logits: (..., K) in nats.
        token_to_code: (V,) int64.
        token_bias: (V,) in nats; default 0.

    Returns:
        (..., V).

    Example:
        >>> scatter_code_logits(torch.tensor([1.0, 2.0]), torch.tensor([1, 0, 1]))
        tensor([2., 1., 2.])
    """
    if may_read(token_to_code):
        check_token_to_code(token_to_code, token_to_code.shape[0], code_logits.shape[-1])
    logits = code_logits.index_select(-1, token_to_code)
    return logits if token_bias is None else logits + token_bias


def code_logits(
    hidden: Tensor, codebook: Tensor, log_mass: Tensor | None = None, *, cap: float | None = None
) -> Tensor:
    """Compute code logits l = h Cᵀ, plus `log_mass` if given, in at least float32 whatever the autocast.

    A cap c bounds l before `log_mass` is added: c · tanh(h Cᵀ / c).

    Args:
        hidden: (..., d).
        codebook: (K, d).
        log_mass: (K,) in nats, such as β.
        cap: c, or None for no cap.

    Returns:
        (..., K) in nats.
    """
    device = hidden.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if hidden.dtype.itemsize >= 4 and not autocast and cap is None:  # one fused pass
        return F.linear(hidden, codebook, None if log_mass is None else log_mass.to(hidden.dtype))
    # A bfloat16 sum with log_mass would round away the mass.
    logits = soft_cap(at_least_float32(F.linear(hidden, codebook)), cap)
    return logits if log_mass is None else logits + log_mass


def vq_cross_entropy(
    hidden: Tensor,
    codebook: Tensor,
    token_to_code: Tensor,
    labels: Tensor,
    *,
    token_bias: Tensor | None = None,
    cap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the exact next-token cross-entropy of vector-quantised logits, in O(N·K) time and memory.

    CE(y) = −log softmax(l + β)_{M(y)} + (β_{M(y)} − b_y), with l = h Cᵀ and β = `code_log_mass`. Equal in value and
    gradient to `cross_entropy(scatter_code_logits(l, M, b), y)`, which makes the (N, V) logits.

    Args:
        hidden: (..., d) hidden states.
        codebook: (K, d).
        token_to_code: (V,) int64.
        labels: (...) token ids in [0, V) or `ignore_index`, already shifted: `labels[n]` is the token after n.
        token_bias: (V,) in nats; default 0, the paper's head.
        cap: c of the soft cap of l, or None; the bias is not capped.
        ignore_index: label of tokens that do not count.
        reduction: `mean` over the tokens that count (0 if none does), `sum` or `none`.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`.

    Raises:
        ValueError: If labels have another shape, or a label or a code is out of range (values are checked in host
            memory only).

    Example:
        >>> hidden, codebook = torch.zeros(1, 2), torch.zeros(2, 2)
        >>> vq_cross_entropy(hidden, codebook, torch.tensor([0, 0, 1, 1]), torch.tensor([3])).exp()
        tensor(4.)
    """
    losses = _token_losses(hidden, codebook, token_to_code, labels, token_bias, cap, ignore_index)
    return reduce_tokens(losses.values, losses.mask, reduction)


# The arguments of `vq_cross_entropy` are written out again, as typed signatures are the interface.
def straight_through_vq_cross_entropy(
    hidden: Tensor,
    codebook: Tensor,
    token_to_code: Tensor,
    labels: Tensor,
    *,
    latents: Tensor,
    token_bias: Tensor | None = None,
    cap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute `vq_cross_entropy` with a gradient that also reaches the latent table, straight through its codes.

    Value and other gradients are those of `vq_cross_entropy`; the latents get the gradient that a dense (V, d) output
    layer holding each token's code would get,

        dCE/dA_v = exp(b_v − β_{M(v)}) · (Pᵀ H)_{M(v)} − Σ_{n: y_n=v} h_n,    P = softmax(l + β),

    from collapsed quantities alone: O(N·K·d + V·d). Departure from the usual straight-through estimator: the codebook
    keeps its own gradient too.

    Args:
        hidden: (..., d) hidden states.
        codebook: (K, d).
        token_to_code: (V,) int64, the nearest code of each latent.
        labels: (...) token ids in [0, V) or `ignore_index`.
        latents: (V, d) table A, whose value does not enter.
        token_bias: (V,) in nats; default 0.
        cap: c of the soft cap of l, or None; each h above is then multiplied by its slope 1 − (l / c)².
        ignore_index: label of tokens that do not count.
        reduction: `mean` over the tokens that count (0 if none does), `sum` or `none`.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`.

    Raises:
        ValueError: If labels have another shape, or a label or a code is out of range (values are checked in host
            memory only).
    """
    args = (hidden, codebook, token_to_code, labels, token_bias, cap, ignore_index)
    values, mask, log_probs, log_mass, logits = _token_losses(*args)
    # l + β less β; only a cap needs it.
    slope = (
        None if cap is None else 1 - ((logits.detach() - log_mass.detach()) / cap).square().reshape(-1, len(log_mass))
    )
    log_share = -log_mass[token_to_code] if token_bias is None else token_bias - log_mass[token_to_code]
    # Added to the losses before the reduction, so that the latents get the gradient of each token with its weight.
    port = _StraightThrough.apply(
        latents,
        hidden.detach().reshape(-1, hidden.shape[-1]),
        log_probs.detach().reshape(-1, log_probs.shape[-1]),
        log_share.detach().exp(),
        token_to_code,
        labels.masked_fill(~mask, 0).reshape(-1),
        None if slope is None else slope.nan_to_num(0.0),  # of codes without tokens, whose β is −∞
    )
    return reduce_tokens(values + port.reshape(labels.shape), mask, reduction)


class _StraightThrough(torch.autograd.Function):
    """Zeros (N,) whose backward is the gradient of the per-token losses with respect to the latent table."""

    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        hidden: Tensor,
        log_probs: Tensor,
        share: Tensor,
        token_to_code: Tensor,
        tokens: Tensor,
        slope: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, log_probs, share, token_to_code, tokens, slope)
        ctx.dtype = latents.dtype
        return log_probs.new_zeros(tokens.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, log_probs, share, token_to_code, tokens, slope = ctx.saved_tensors
        hidden, grad = hidden.to(log_probs.dtype), grad.unsqueeze(1)
        # The first term depends on v through its code and share only, so (K, d) sums are made and then spread. Ignored
        # tokens have label 0 here, and a gradient of 0.
        with torch.autocast(hidden.device.type, enabled=False):
            probs = log_probs.exp() * grad if slope is None else log_probs.exp() * grad * slope
            code_sums = probs.T @ hidden
        grad_latents = share.unsqueeze(1).to(log_probs.dtype) * code_sums[token_to_code]
        own = grad if slope is None else grad * slope.gather(1, token_to_code[tokens].unsqueeze(1))
        grad_latents.index_add_(0, tokens, hidden * own, alpha=-1)
        return grad_latents.to(ctx.dtype), None, None, None, None, None, None


class _TokenLosses(NamedTuple):
    """Cross-entropy of each token and what a straight-through gradient needs besides.

    Attributes:
        values: (...) nats; of ignored tokens finite numbers without meaning.
        mask: boolean (...), the tokens that count.
        log_probs: (..., K) log softmax(l + β) of the codes.
        log_mass: (K,) β.
        logits: (..., K) l + β.
    """

    values: Tensor
    mask: Tensor
    log_probs: Tensor
    log_mass: Tensor
    logits: Tensor


def _token_losses(
    hidden: Tensor,
    codebook: Tensor,
    token_to_code: Tensor,
    labels: Tensor,
    token_bias: Tensor | None,
    cap: float | None,
    ignore_index: int,
) -> _TokenLosses:
    """Check the labels and compute the loss of each token, not reduced."""
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Expected `labels` to have shape {tuple(hidden.shape[:-1])}, one for each hidden state, but got"
            f" {tuple(labels.shape)}."
        )
    check_labels(labels, token_to_code.shape[0], ignore_index=ignore_index)
    token_bias = None if token_bias is None else at_least_float32(token_bias)  # its gradient is summed there too
    loss_dtype = torch.promote_types(hidden.dtype, torch.float32)
    log_mass = code_log_mass(token_to_code, codebook.shape[0], token_bias, dtype=loss_dtype)
    logits = code_logits(hidden, codebook, log_mass, cap=cap)
    log_probs = F.log_softmax(logits, dim=-1)
    mask = labels != ignore_index
    tokens = labels.masked_fill(~mask, 0)
    codes = token_to_code[tokens]
    within = log_mass[codes] if token_bias is None else log_mass[codes] - token_bias[tokens]
    values = within - log_probs.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    return _TokenLosses(values, mask, log_probs, log_mass, logits)
