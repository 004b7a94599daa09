"""Random problems for a vector-quantised output layer, and the dense layer that it is compared with.

Letters: N tokens, D hidden size, V vocabulary, K codes.
"""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

__all__ = ["EMPTY", "SEEDS", "D", "K", "N", "V", "correlated", "dense_loss", "gradients", "problem"]

N, D, V, K = 37, 5, 23, 7
EMPTY = (3, 6)  # codes without tokens
SEEDS = st.integers(0, 2**31 - 1)


def problem(seed=0, *, bias=True, dtype=torch.float64, ignore_index=-100, n=N, scale=1.0):
    """Hidden states, codebook, mapping with empty codes, labels of which a fifth is ignored, and a bias."""
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, D, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    codebook = torch.randn(K, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    living = torch.tensor([k for k in range(K) if k not in EMPTY])
    mapping = living[torch.randint(len(living), (V,), generator=g)]
    labels = torch.randint(V, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.2] = ignore_index
    token_bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, codebook, mapping, labels, token_bias


def dense_loss(hidden, weight, labels, bias, *, reduction="mean", ignore_index=-100):
    """The oracle: all (N, V) logits of rows `weight` (V, d), and torch's own cross-entropy."""
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction, ignore_index=ignore_index)
    return loss.view_as(labels) if reduction == "none" else loss


def gradients(loss, *leaves):
    """Of a loss of any shape, weighted so that each token's gradient counts differently."""
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad((loss * weights).sum(), [leaf for leaf in leaves if leaf is not None])


def correlated(vocab_size=400, size=16, seed=0):
    """Rows and a second moment whose dimensions hang together, and counts of Zipf."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, size, generator=generator)
    mix = torch.randn(size, size, generator=generator) + 2 * torch.randn(size, 1, generator=generator)
    counts = 1000 / torch.arange(1, vocab_size + 1)
    return weight, mix @ mix.T / size, counts[torch.randperm(vocab_size, generator=generator)]
