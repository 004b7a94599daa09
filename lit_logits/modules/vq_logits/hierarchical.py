"""`HierarchicalVQLogitsHead`: tokens in clusters, with codes of their own in each; exact, and cheap at any vocabulary.

Letters: d hidden size, V vocabulary, K clusters, S stages, G groups.
"""

from collections.abc import Sequence
from typing import ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from lit_logits.contracts import Calibrate, OutputLayer
from lit_logits.functional.checks import check_finite, check_not_negative
from lit_logits.functional.code_assignment import random_assignment
from lit_logits.functional.codebook import Footprint, code_usage, hierarchical_footprint, ppl_floor
from lit_logits.functional.distributed import broadcast_
from lit_logits.functional.hierarchical_decoding import (
    TopTokens,
    hierarchical_greedy,
    hierarchical_sample,
    hierarchical_top_k,
)
from lit_logits.functional.hierarchical_vq import (
    ClusterLayout,
    HierarchicalCodes,
    cluster_layout,
    hierarchical_cross_entropy,
    hierarchical_log_probs,
    hierarchical_losses,
)
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.own_vectors import own_vector_cross_entropy
from lit_logits.functional.reductions import Reduction
from lit_logits.functional.residual_vq import DenseTarget, ResidualVQLosses
from lit_logits.functional.vq_decoding import sample_logits
from lit_logits.modules.vq_logits.counting import running_dtype
from lit_logits.modules.vq_logits.own_vectors import OwnVectors
from lit_logits.modules.vq_logits.start import PAIR_TOKENS, HierarchyInit, choose_init, start_hierarchy
from lit_logits.modules.vq_logits.tables import TableCache

__all__ = ["HierarchicalVQLogitsHead"]

_INIT_STD = 0.02


class HierarchicalVQLogitsHead(OwnVectors):
    """Output layer of two levels of codes: a token belongs to a cluster, and owns codes that all clusters share.

    See `functional.hierarchical_vq` for the formulas. Where tokens of one code of a `VQLogitsHead` differ by a bias
    alone, each token has logits of its own here, for hardly more time: the loss looks at the tokens of one cluster, not
    at all. It starts from random codes; `fit` calls `start`, which clusters tokens by the contexts that they follow.

    Args:
        hidden_size: d.
        vocab_size: V.
        codebook_sizes: number of clusters K, and of the codes of each further stage, whose logits are added: two
            numbers or more.
        num_groups: G, a divisor of d. The codes of a stage are cut into G parts, and each token owns one of each, so
            that as many floats tell more tokens apart; the loss then sums G times as many logits. All groups start with
            the same codes of a token, and `CodebookReassign` gives each its own.
        own_vectors: give each token a vector of its own in its cluster, until `CodebookFit`, or `code_vectors`, fits
            the codes to them. In a long training they learn what shared codes do not, at the cost of V · d floats more
            while they last, as many as a dense layer has; the loss stays cheap, see `own_vector_cross_entropy`. It
            needs as many codes in each stage.
        bias: learn a bias for each token in its cluster; without it tokens of equal codes are equally likely.
        init: how `start` finds clusters and codes: `cooccurrence`, tokens that follow the same contexts, see
            `cooccurrence_hierarchy`; `random`; or `weighted_kmeans` of the rows of a pretrained output layer, see
            `weighted_kmeans_hierarchy`. Default: `weighted_kmeans` with a pretrained layer, else `cooccurrence`.
        start_tokens: tokens of text that `cooccurrence` reads on each rank at most, ahead of training.
        count_power: exponent of the token counts in `weighted_kmeans`.
        max_cluster_size: tokens a cluster; it bounds the time of the loss. Default four times the mean, 4 ⌈V/K⌉.
        usage_decay: of the running token counts, a training batch.

    Attributes:
        clusters: (K, d) parameter.
        codes: (Σ K_s, d) parameter, the codebooks of the stages one after another.
        vectors: (V, d) parameter, in the order of clusters, while tokens own vectors; else None.
        cluster_bias: (K,) parameter in nats.
        token_bias: (V,) parameter in nats, or None.
        logit_cap: c of a soft cap on the logits of clusters, and on the summed logits of a token's codes, each before
            its bias is added; None for no cap. See `CappedHead`.
        token_to_cluster: (V,) int64 buffer.
        token_codes: (V, G · S) int64 buffer: the codes of the stages in the first group, then in the second, etc.
        token_counts: (V,) buffer, running counts of the targets of all ranks.

    Raises:
        ValueError: If a codebook is larger than the vocabulary, or an argument is out of range.

    Example:
        >>> head = HierarchicalVQLogitsHead(hidden_size=8, vocab_size=100, codebook_sizes=(10, 10))
        >>> head(torch.randn(2, 8)).exp().sum(-1).round(decimals=4), head.greedy(torch.randn(2, 8)).shape
        (tensor([1., 1.], grad_fn=<RoundBackward1>), torch.Size([2]))
    """

    settled_buffers: ClassVar[tuple[str, ...]] = ("token_to_cluster", "token_codes")  # see `SettledHead`

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        codebook_sizes: Sequence[int] = (256, 256),
        *,
        num_groups: int = 1,
        own_vectors: bool = False,
        bias: bool = True,
        init: HierarchyInit | None = None,
        start_tokens: int = PAIR_TOKENS,
        count_power: float = 0.75,
        max_cluster_size: int | None = None,
        usage_decay: float = 0.99,
    ) -> None:
        super().__init__()
        num_clusters, *stage_sizes = codebook_sizes
        if not stage_sizes or not all(1 <= size <= vocab_size for size in codebook_sizes):
            raise ValueError(
                f"Expected `codebook_sizes` to be two numbers or more in [1, {vocab_size}], the vocabulary size, but"
                f" got {tuple(codebook_sizes)}."
            )
        if num_groups < 1 or hidden_size % num_groups:
            raise ValueError(f"Expected `num_groups` to divide the hidden size {hidden_size}, but got {num_groups}.")
        if init not in (None, *get_args(HierarchyInit)):
            names = ", ".join(map(repr, get_args(HierarchyInit)))
            raise ValueError(f"Expected `init` to be one of {names}, but got {init!r}.")
        check_not_negative(count_power=count_power)
        if start_tokens < 1:
            raise ValueError(f"Expected `start_tokens` to be at least 1, but got {start_tokens}.")
        if not 0 <= usage_decay < 1:
            raise ValueError(f"Expected `usage_decay` to be in [0, 1), but got {usage_decay}.")
        mean = -(-vocab_size // num_clusters)
        if max_cluster_size is not None and max_cluster_size < mean:
            raise ValueError(
                f"Expected `max_cluster_size` to be at least {mean}, so that {num_clusters} clusters hold {vocab_size}"
                f" tokens, but got {max_cluster_size}."
            )
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.codebook_sizes, self.num_groups = tuple(codebook_sizes), num_groups
        self.init, self.start_tokens, self.usage_decay = init, start_tokens, usage_decay
        self.count_power = count_power
        self.max_cluster_size = max_cluster_size or min(vocab_size, 4 * mean)
        self.vectors = nn.Parameter(torch.randn(vocab_size, hidden_size) * _INIT_STD) if own_vectors else None
        self.clusters = nn.Parameter(torch.randn(num_clusters, hidden_size) * _INIT_STD)
        self.codes = nn.Parameter(torch.randn(sum(stage_sizes), hidden_size) * _INIT_STD)
        self.cluster_bias = nn.Parameter(torch.zeros(num_clusters))
        self.token_bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.logit_cap: float | None = None
        self.register_buffer("token_to_cluster", random_assignment(vocab_size, num_clusters))
        codes = [random_assignment(vocab_size, size) for size in stage_sizes]
        self.register_buffer("token_codes", torch.stack(codes * num_groups, 1))
        self.register_buffer("token_counts", torch.zeros(vocab_size, dtype=running_dtype()))
        self._tables = TableCache()
        if own_vectors:
            self.check_own_vectors()

    # ------------------------------------------------------------------ logits and loss

    def forward(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities (..., V) in nats of hidden states (..., d): logits that are normalised already."""
        return hierarchical_log_probs(hidden, self.tensors())

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy in nats, without the (N, V) logits. Arguments as in `VQLogitsHead.loss`."""
        cross_entropy = own_vector_cross_entropy if self.has_own_vectors else hierarchical_cross_entropy
        loss = cross_entropy(hidden, self.tensors(), labels, ignore_index=ignore_index, reduction=reduction)
        if self.training:
            self._count(labels, ignore_index)
        return loss

    def imitation_losses(
        self, hidden: Tensor, labels: Tensor, *, target: DenseTarget | None = None, ignore_index: int = IGNORE_INDEX
    ) -> ResidualVQLosses:
        """Return cross-entropy (...) and divergence (...) from the output layer that is imitated, in nats a token.

        The divergence takes log-probabilities of all tokens, for a chunk of hidden states at a time. In training mode
        it counts the labels.
        """
        losses = hierarchical_losses(hidden, self.tensors(), labels, target=target, ignore_index=ignore_index)
        if self.training:
            self._count(labels, ignore_index)
        return losses

    @property
    def can_imitate(self) -> bool:
        """Whether it can be trained to imitate: always."""
        return True

    # ------------------------------------------------------------------ decoding

    def greedy(self, hidden: Tensor) -> Tensor:
        """Return the most likely tokens (...) of hidden states (..., d), exactly, from the likeliest clusters alone."""
        return hierarchical_greedy(hidden, self.tensors())

    def top_k(self, hidden: Tensor, k: int) -> TopTokens:
        """Return log-probabilities and ids (..., k) of the likeliest tokens, exactly; see `hierarchical_top_k`."""
        return hierarchical_top_k(hidden, self.tensors(), k)

    @torch.no_grad()
    def sample(self, hidden: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return tokens (...) drawn from softmax(logits / temperature) of hidden states (..., d), exactly."""
        if temperature == 1.0:
            return hierarchical_sample(hidden, self.tensors(), generator=generator)
        # At another temperature the probability of a cluster depends on all of its tokens.
        return sample_logits(self(hidden), temperature, generator)

    def tensors(self) -> HierarchicalCodes:
        """Return the tensors of the head; they are shared, not copied."""
        if self.has_own_vectors:
            return self.own_tensors()
        return HierarchicalCodes(
            self.clusters,
            self.codes,
            self._layout(),
            self.cluster_bias,
            self.token_bias,
            self.logit_cap,
            self.num_groups,
        )

    def _layout(self) -> ClusterLayout:
        """Return the tables of the mapping; they are kept until it changes."""

        def make() -> ClusterLayout:
            return cluster_layout(self.token_to_cluster, self.token_codes, len(self.clusters), self.stage_sizes)

        return cast(ClusterLayout, self._tables.get("layout", [self.token_to_cluster, self.token_codes], make))

    # ------------------------------------------------------------------ inspection: see `WatchedHead`

    @property
    def token_to_code(self) -> Tensor:
        """The cluster of each token (V,)."""
        return self.token_to_cluster

    @property
    def codebook_size(self) -> int:
        """K, the number of clusters."""
        return len(self.clusters)

    def usage(self) -> Tensor:
        """Return the running share (K,) of the targets that each cluster carries; zeros before any training."""
        return code_usage(self.token_counts, self.token_to_cluster, len(self.clusters))

    def ppl_floor(self) -> Tensor:
        """Return the perplexity that no backbone can go below: tokens of one cluster with equal codes share logits."""
        if self.has_own_vectors:
            return torch.ones((), device=self.token_counts.device)
        equal = torch.cat([self.token_to_cluster.unsqueeze(1), self.token_codes], 1).unique(dim=0, return_inverse=True)
        bias = None if self.token_bias is None else self.token_bias.detach()
        return ppl_floor(self.token_counts, equal[1], len(equal[0]), bias)

    def footprint(self) -> Footprint:
        """Return parameters and bytes after export, and those of the dense head in the same dtype."""
        return hierarchical_footprint(
            self.hidden_size,
            self.vocab_size,
            self.codebook_sizes,
            num_groups=self.num_groups,
            bias=self.token_bias is not None,
            itemsize=self.clusters.dtype.itemsize,
        )

    # ------------------------------------------------------------------ start

    def prepare(self, layer: OutputLayer, table: nn.Embedding) -> bool:
        """Choose the start; return False, as data must be read. See `StartingHead`."""
        self.init = cast(HierarchyInit, choose_init(self.init, pretrained=layer.weight is not None))
        if layer.bias is not None and self.token_bias is None:
            raise ValueError("Expected `bias=True`, because the pretrained output layer has a bias.")
        return False

    def start(self, calibrate: Calibrate, layer: OutputLayer, *, progress_bar: bool = False) -> None:
        """Set codes, mapping, biases and counts by `start_hierarchy`; all ranks get those of rank 0."""
        init = cast(HierarchyInit, self.init or choose_init(None, pretrained=layer.weight is not None))
        if init == "cooccurrence":
            calibration = calibrate(pair_tokens=self.start_tokens)
        else:
            calibration = calibrate(second_moment=init == "weighted_kmeans")
        found = start_hierarchy(
            init,
            calibration,
            layer,
            codebook_sizes=self.codebook_sizes,
            max_cluster_size=self.max_cluster_size,
            device=self.clusters.device,
            count_power=self.count_power,
            progress_bar=progress_bar,
        )
        self.token_counts.copy_(calibration.token_counts)
        self.set_codes(**found._asdict())
        if self.has_own_vectors:
            self.start_vectors(layer.weight)

    @torch.no_grad()
    def set_codes(
        self,
        token_to_cluster: Tensor | None = None,
        token_codes: Tensor | None = None,
        *,
        token_bias: Tensor | None = None,
        clusters: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> None:
        """Replace codes, on every rank by those of rank 0; None leaves a tensor as it is.

        Args:
            token_to_cluster: (V,) int64 in [0, K).
            token_codes: (V, S) int64, of stage s in [0, K_s), for all groups; or (V, G · S), those of one group after
                another.
            token_bias: (V,) log-probabilities of tokens, split into those of the clusters and of tokens in them.
            clusters: (K, d).
            codes: (Σ K_s, d).

        Raises:
            ValueError: If a shape differs, a code is out of range or a value is not finite; nothing is written then.
        """
        if token_codes is not None and token_codes.shape[1] != self.token_codes.shape[1]:
            token_codes = token_codes.repeat(1, self.num_groups)
        given = {"token_to_cluster": token_to_cluster, "token_codes": token_codes, "clusters": clusters, "codes": codes}
        found = {name: value for name, value in given.items() if value is not None}
        for name, value in found.items():
            if value.shape != getattr(self, name).shape:
                raise ValueError(
                    f"Expected `{name}` to have shape {tuple(getattr(self, name).shape)}, but got {tuple(value.shape)}."
                )
            if value.is_floating_point():
                check_finite(value, name)
        owner, stages = found.get("token_to_cluster", self.token_to_cluster), found.get("token_codes", self.token_codes)
        cluster_layout(owner, stages, len(self.clusters), self.stage_sizes)
        vectors = self.token_vectors() if self.has_own_vectors else None
        for name, value in found.items():
            getattr(self, name).copy_(value)
        if vectors is not None:  # which lie in the order of clusters
            self.start_vectors(vectors)
        if token_bias is not None:
            sizes = torch.bincount(self.token_to_cluster, minlength=len(self.clusters))
            mass = token_bias.new_zeros(len(sizes)).index_add_(0, self.token_to_cluster, token_bias.exp())
            # Clusters without members have no mass, and no place in the softmax either.
            log_mass = mass.clamp(min=torch.finfo(mass.dtype).tiny).log()
            self.cluster_bias.copy_(torch.where(sizes > 0, log_mass, 0))
            if self.token_bias is not None:
                self.token_bias.copy_(token_bias - log_mass[self.token_to_cluster])
        self._tables.clear()
        # DDP broadcasts parameters when it wraps the model, and that is before the head starts.
        broadcast_(*self.state_dict().values())

    def extra_repr(self) -> str:
        """Return the settings that `print(module)` shows."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, codebook_sizes={self.codebook_sizes},"
            f" num_groups={self.num_groups}, own_vectors={self.has_own_vectors}, bias={self.token_bias is not None},"
            f" max_cluster_size={self.max_cluster_size}"
        )
