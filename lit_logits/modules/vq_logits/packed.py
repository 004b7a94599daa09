"""`PackedHierarchicalVQLogitsHead`: two levels of codes as models of transformers hold and save them.

Letters: d hidden size, V vocabulary, K clusters, S stages.
"""

from typing import Any, cast

import torch
from torch import Tensor

from lit_logits.contracts import UncodedVectorsError
from lit_logits.functional.bit_packing import pack_codes, unpack_codes
from lit_logits.functional.hierarchical_vq import (
    ClusterLayout,
    HierarchicalCodes,
    cluster_layout,
    hierarchical_cross_entropy,
    hierarchical_log_probs,
)
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import Reduction
from lit_logits.modules.vq_logits.hierarchical import HierarchicalVQLogitsHead
from lit_logits.modules.vq_logits.tables import PackedMapping, TableCache, is_traced

__all__ = ["PackedHierarchicalVQLogitsHead"]


class PackedHierarchicalVQLogitsHead(PackedMapping):
    """A `HierarchicalVQLogitsHead` without what only its training needs: the mapping is packed, and nothing is counted.

    Args:
        head: gives its parameters, which are shared, and its mapping, which is packed as it is now.

    Attributes:
        clusters: (K, d) parameter.
        codes: (Σ K_s, d) parameter, the codebooks of the stages one after another.
        cluster_bias: (K,) parameter in nats.
        token_bias: (V,) parameter in nats, or None.
        logit_cap: c of the soft cap of both levels, or None; see `CappedHead`.
        packed_codes: uint8 buffer, ⌈log2 K⌉ bits for the cluster of each token, then as many as each stage needs, group
            after group.

    Raises:
        UncodedVectorsError: If tokens still own vectors.

    Example:
        >>> head = HierarchicalVQLogitsHead(hidden_size=8, vocab_size=100, codebook_sizes=(10, 16))
        >>> packed, hidden = PackedHierarchicalVQLogitsHead(head), torch.randn(2, 8)
        >>> torch.equal(packed(hidden), head(hidden)), packed.packed_codes.shape
        (True, torch.Size([100]))
    """

    packed_codes: Tensor

    def __init__(self, head: HierarchicalVQLogitsHead) -> None:
        super().__init__()
        if head.has_own_vectors:
            raise UncodedVectorsError(
                "Expected a head whose tokens have codes, but they still own vectors. Train with the callback"
                " `CodebookFit`, which codes them, or call `code_vectors`."
            )
        self.hidden_size, self.vocab_size, self.codebook_sizes = head.hidden_size, head.vocab_size, head.codebook_sizes
        self.num_groups = head.num_groups
        self.clusters, self.codes = head.clusters, head.codes
        self.cluster_bias, self.token_bias = head.cluster_bias, head.token_bias
        self.logit_cap = head.logit_cap
        mapping = torch.cat([head.token_to_cluster.unsqueeze(1), head.token_codes], 1)
        self.register_buffer("packed_codes", pack_codes(mapping, self._mapped_sizes()))
        self._tables = TableCache()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities (..., V) in nats, at least float32, of hidden states (..., d)."""
        return hierarchical_log_probs(hidden, self._tensors())

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy in nats, without the (N, V) logits; arguments as in `VQLogitsHead.loss`."""
        return hierarchical_cross_entropy(
            hidden, self._tensors(), labels, ignore_index=ignore_index, reduction=reduction
        )

    def _tensors(self) -> HierarchicalCodes:
        return HierarchicalCodes(
            self.clusters,
            self.codes,
            self.layout(),
            self.cluster_bias,
            self.token_bias,
            self.logit_cap,
            self.num_groups,
        )

    def _mapped_sizes(self) -> list[int]:
        """Return the number of clusters, and of codes of each stage of each group."""
        num_clusters, *stage_sizes = self.codebook_sizes
        return [num_clusters, *stage_sizes * self.num_groups]

    def layout(self) -> ClusterLayout:
        """Return the tables of the mapping, unpacked; they are kept until it is written to.

        Raises:
            ValueError: If the mapping is cut off, or a code is out of range.
        """
        if is_traced():
            return cast(ClusterLayout, self._tables.kept("layout"))
        return cast(ClusterLayout, self._tables.get("layout", [self.packed_codes], self._unpack))

    _unpacked = layout

    def __getattr__(self, name: str) -> Any:
        """Say of the rows of a dense layer, which some programs read in place of logits, that there are none."""
        if name in ("weight", "bias"):
            raise AttributeError(
                f"Expected an output layer with `{name}`, but two levels of codes equal no dense layer. Let the program"
                " take the loss that the model itself returns for `labels`, as `transformers.Trainer` does;"
                " docs/how_to/use_saved_models.md has the lines for trl's `SFTTrainer`."
            )
        return super().__getattr__(name)

    def _unpack(self) -> ClusterLayout:
        num_clusters, *stage_sizes = sizes = self._mapped_sizes()
        clusters, *codes = unpack_codes(self.packed_codes, sizes, self.vocab_size).unbind(1)
        return cluster_layout(clusters, torch.stack(codes, 1), num_clusters, stage_sizes)

    def extra_repr(self) -> str:
        """Return the settings that `print(module)` shows."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, codebook_sizes={self.codebook_sizes},"
            f" num_groups={self.num_groups}, bias={self.token_bias is not None}"
        )
