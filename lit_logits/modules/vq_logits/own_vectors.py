"""The half of `HierarchicalVQLogitsHead` in which tokens own vectors, until these are coded.

Letters: N positions, d hidden size, V vocabulary, K clusters, S stages, G groups.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_logits.contracts import Coded
from lit_logits.functional.code_reassignment import Positions
from lit_logits.functional.distributed import all_reduce_sum_, broadcast_
from lit_logits.functional.hierarchical_vq import ClusterLayout, HierarchicalCodes
from lit_logits.functional.own_vectors import code_vectors, own_vector_layout
from lit_logits.modules.vq_logits.moving_hierarchy import MovingHierarchy
from lit_logits.modules.vq_logits.reassigning import mean_loss, set_aside

__all__ = ["OwnVectors"]


class OwnVectors(MovingHierarchy):
    """What `HierarchicalVQLogitsHead(own_vectors=True)` does before its codes; arguments and tensors are that head's.

    The rows of `vectors` are in the order of clusters, so that the loss cuts them without a copy.
    """

    vectors: nn.Parameter | None
    hidden_size: int
    vocab_size: int
    count_power: float
    logit_cap: float | None

    def check_own_vectors(self) -> None:
        """Refuse sizes that vectors cannot be coded with."""
        sizes = self.codebook_sizes[1:]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"Expected `codebook_sizes` with as many codes in each stage for own_vectors=True, but got {sizes}."
            )

    @property
    def has_own_vectors(self) -> bool:
        """Whether tokens still own vectors."""
        return self.vectors is not None

    def own_tensors(self) -> HierarchicalCodes:
        """Return the tensors of the head with a row of codes for each token; see `own_vector_layout`."""
        layout = cast(
            ClusterLayout,
            self._tables.get(
                "own", [self.token_to_cluster], lambda: own_vector_layout(self.token_to_cluster, len(self.clusters))
            ),
        )
        vectors = cast(Tensor, self.vectors)
        return HierarchicalCodes(
            self.clusters, vectors, layout, self.cluster_bias, self.token_bias, self.logit_cap, num_groups=1
        )

    def token_vectors(self) -> Tensor:
        """Return the vectors (V, d) in the order of tokens, a copy."""
        vectors = cast(Tensor, self.vectors).detach()
        rows = torch.empty_like(vectors)
        rows[self.token_to_cluster.argsort(stable=True)] = vectors
        return rows

    @torch.no_grad()
    def start_vectors(self, rows: Tensor | None) -> None:
        """Give each token the vector that its codes add up to, or its row (V, d) of a pretrained layer.

        A softmax over the members of a cluster does what that layer would do among them.
        """
        vectors = cast(nn.Parameter, self.vectors)
        if rows is None:
            codes = zip(self.codes.chunk(self.num_groups, -1), self.token_codes.chunk(self.num_groups, 1), strict=True)
            offsets = self.codebook_sizes[1] * torch.arange(len(self.codebook_sizes) - 1, device=self.codes.device)
            rows = torch.cat([part[own + offsets].sum(1) for part, own in codes], 1)
        vectors.copy_(rows[self.token_to_cluster.argsort(stable=True)])
        broadcast_(vectors.data)

    @torch.no_grad()
    def code_vectors(self, positions: Positions, *, progress_bar: bool = False) -> Coded:
        """Fit the codes to the vectors, which are dropped; see `CodingHead`."""
        vectors = self.vectors
        if vectors is None:
            raise ValueError("Expected a head whose tokens own vectors, but these are coded already.")
        held: list[tuple[Tensor, Tensor]] = []
        moments = torch.zeros(self.hidden_size + 1, self.hidden_size + 1, dtype=torch.float64, device=vectors.device)
        for hidden, _ in set_aside(positions, held):
            rows = torch.cat([hidden.double(), hidden.new_ones(len(hidden), 1).double()], 1)
            moments.addmm_(rows.T, rows)
        num_read = float(all_reduce_sum_(moments)[-1, -1])
        before = mean_loss(self, held)
        found = code_vectors(
            self.token_vectors(),
            self.token_to_cluster,
            len(self.clusters),
            codebook_size=self.codebook_sizes[1],
            num_stages=len(self.codebook_sizes) - 1,
            num_groups=self.num_groups,
            token_weights=self.token_counts.clamp(min=0.5 * float(self.token_counts.mean())) ** self.count_power,
            hidden_mean=moments[:-1, -1] / num_read,
            hidden_second_moment=moments[:-1, :-1] / num_read,
            has_bias=self.token_bias is not None,
            shift=self.logit_cap is None,
            progress_bar=progress_bar,
        )
        self.codes.copy_(found.codes)
        self.token_codes.copy_(found.token_codes)
        if self.token_bias is not None:
            self.token_bias.add_(found.bias_shift)
        self.vectors = None
        self._tables.clear()
        broadcast_(*self.state_dict().values())
        num_held = float(all_reduce_sum_(moments.new_tensor(float(sum(len(labels) for _, labels in held)))))
        return Coded(vectors, self.codes, found.error, mean_loss(self, held) - before, int(num_read + num_held))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Follow a state whose vectors are coded already, as of a run that is resumed after it."""
        if self.vectors is not None and f"{prefix}vectors" not in state_dict and f"{prefix}codes" in state_dict:
            self.vectors = None
            self._tables.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)
