"""Codes of two levels that move: revival of dead ones, and tokens that get other codes.

Letters: d hidden size, V vocabulary, K clusters, S stages with L codes in all, G groups.
"""

import torch
from torch import Tensor, nn

from lit_logits.contracts import Reassigned, Revival
from lit_logits.functional.code_reassignment import Positions, hierarchical_token_statistics
from lit_logits.functional.codebook import dead_codes
from lit_logits.functional.distributed import broadcast_
from lit_logits.functional.hierarchical_vq import HierarchicalCodes, gather_codes, spread_codes
from lit_logits.functional.hierarchy_revival import revive_hierarchy
from lit_logits.modules.vq_logits.counting import CountsTokens
from lit_logits.modules.vq_logits.reassigning import move_codes, set_aside
from lit_logits.modules.vq_logits.tables import TableCache

__all__ = ["MovingHierarchy"]


class MovingHierarchy(CountsTokens):
    """The half of `HierarchicalVQLogitsHead` that changes its codes; the arguments and tensors are that head's."""

    codebook_sizes: tuple[int, ...]
    num_groups: int
    max_cluster_size: int
    clusters: nn.Parameter
    codes: nn.Parameter
    cluster_bias: nn.Parameter
    token_bias: nn.Parameter | None
    token_to_cluster: Tensor
    token_codes: Tensor
    _tables: TableCache

    def tensors(self) -> HierarchicalCodes:
        """Return the tensors of the head."""
        raise NotImplementedError

    @property
    def has_own_vectors(self) -> bool:
        """Whether tokens own vectors, which are not coded yet."""
        raise NotImplementedError

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """Number of codes of each stage, those of the first group, then of the second, etc."""
        return self.codebook_sizes[1:] * self.num_groups

    def dead_codes(self, min_usage: float = 0.0) -> Tensor:
        """Return clusters that own no token, or carry less than `min_usage` times an even share of the targets."""
        return dead_codes(self.token_counts, self.token_to_cluster, len(self.clusters), min_usage)

    def dead_stage_codes(self, min_usage: float = 0.0) -> list[Tensor]:
        """Return the same of the codes of each stage."""
        stages = zip(self.token_codes.T, self.stage_sizes, strict=True)
        return [dead_codes(self.token_counts, codes, size, min_usage) for codes, size in stages]

    @torch.no_grad()
    def revive_dead(self, min_usage: float = 0.0, *, generator: torch.Generator | None = None) -> Revival:
        """Give dead clusters and codes one half of a heavy one; see `revive_hierarchy` and `RevivableHead`.

        None while tokens own vectors.
        """
        if self.has_own_vectors:
            return Revival(0, {})
        dead = [self.dead_codes(min_usage), *self.dead_stage_codes(min_usage)]
        sizes = (self.codebook_sizes[0], *self.stage_sizes)
        dead = [_of_rank_zero(codes, size) for codes, size in zip(dead, sizes, strict=True)]
        if not any(codes.numel() for codes in dead):
            return Revival(0, {})
        parameters = {parameter: parameter.clone() for parameter in self.parameters()}
        mapping = self._mapping()
        spread = self.tensors()._replace(codes=spread_codes(self.codes, self.num_groups), num_groups=1)
        found = revive_hierarchy(
            spread,
            self.token_codes,
            self.stage_sizes,
            dead_clusters=dead[0],
            dead_codes=dead[1:],
            token_counts=self.token_counts,
            max_cluster_size=self.max_cluster_size,
            generator=generator,
        )
        found = found._replace(codes=gather_codes(found.codes, self.num_groups))
        for name, tensor in found._asdict().items():
            if tensor is not None:
                getattr(self, name).copy_(tensor)
        broadcast_(*self.state_dict().values())
        self._tables.clear()
        # Compared, and not noted on the way: these are the rows in which every rank now has what rank 0 has.
        changed = {parameter: (parameter != old).view(len(old), -1).any(1) for parameter, old in parameters.items()}
        moved = zip(dead, mapping.T, self._mapping().T, strict=True)
        num_revived = sum(int(torch.isin(codes, new[new != old]).sum()) for codes, old, new in moved)
        return Revival(num_revived, {parameter: rows.nonzero().squeeze(1) for parameter, rows in changed.items()})

    @property
    def can_reassign(self) -> bool:
        """Whether tokens can get other codes: always."""
        return True

    @torch.no_grad()
    def reassign(self, positions: Positions, *, min_gain: float = 2.0, slack: float = 0.0) -> Reassigned:
        """Give tokens the codes of the stages that lower the loss most; clusters stay. See `move_codes`.

        None while tokens own vectors.
        """
        if self.has_own_vectors:
            return Reassigned(0, 0.0, 0)
        held: list[tuple[Tensor, Tensor]] = []
        sums = hierarchical_token_statistics(set_aside(positions, held), self.tensors())

        def write(token_codes: Tensor) -> None:
            self.token_codes.copy_(token_codes)
            self._tables.clear()

        stages = spread_codes(self.codes, self.num_groups).split(self.stage_sizes)
        before = self.token_codes.clone()
        changed = move_codes(self, sums, stages, before, held, write=write, min_gain=min_gain, slack=slack)
        broadcast_(*self.state_dict().values())
        self._tables.clear()
        return changed

    def _mapping(self) -> Tensor:
        """Return cluster and codes of each token (V, 1 + G · S), a copy."""
        return torch.cat([self.token_to_cluster.unsqueeze(1), self.token_codes], 1)


def _of_rank_zero(codes: Tensor, size: int) -> Tensor:
    """Return what rank 0 has: ranks whose running counts round differently must still revive the same codes."""
    mask = torch.zeros(size, dtype=torch.uint8, device=codes.device)
    mask[codes] = 1
    broadcast_(mask)
    return mask.nonzero().squeeze(1)
