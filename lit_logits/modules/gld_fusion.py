"""The parts of graph-on-logits distillation: what compares a student with a source that it learns from.

Letters: B batch, T positions of the student, U positions of the source, k `top_k`.
"""

from typing import get_args

import torch
from torch import Tensor, nn

from lit_logits.functional.gld_fusion import GraphNodes, graph_strengths, sorted_gw_bound
from lit_logits.functional.top_k_logits import LogitValues, TopKLogits, top_k_values

__all__ = ["GraphAlignment"]


class GraphAlignment(nn.Module):
    """Sorted Gromov–Wasserstein bound between the co-activation graphs of a student and a source, per sample.

    Args:
        values: what the graphs are made of, see `top_k_values`.
        nodes: `rank` or `vocabulary`, see `graph_strengths`.

    References:
        [0]: InfiGFusion: graph-on-logits distillation, 2025, arXiv 2505.13893.

    Example:
        >>> from lit_logits.functional import top_k_logits
        >>> top = top_k_logits(torch.randn(2, 5, 30), 4)
        >>> mask = torch.ones(2, 5, dtype=torch.bool)
        >>> GraphAlignment()(top, top, mask, mask)
        tensor([0., 0.])

    """

    def __init__(self, *, values: LogitValues = "standardize", nodes: GraphNodes = "rank") -> None:
        super().__init__()
        if values not in get_args(LogitValues) or nodes not in get_args(GraphNodes):
            raise ValueError(
                f"Expected `graph_values` to be one of {get_args(LogitValues)} and `nodes` of {get_args(GraphNodes)},"
                f" but got {values!r} and {nodes!r}."
            )
        self.values, self.nodes = values, nodes

    def forward(
        self,
        student: TopKLogits,
        source: TopKLogits,
        student_mask: Tensor,
        source_mask: Tensor,
        *,
        name: str = "source",
    ) -> Tensor:
        """GW~ of each sample.

        Args:
            student: (B, T, k).
            source: (B, U, k); the larger k is cut to the smaller. No gradient reaches it.
            student_mask: (B, T) positions that count.
            source_mask: (B, U) positions that count.
            name: of the source, for callbacks that watch.

        Returns:
            (B,), in units of the graphs; 0 where either side has no position that counts.

        """
        size = min(student.log_probs.shape[-1], source.log_probs.shape[-1])
        values = top_k_values(student, self.values), top_k_values(source, self.values).detach()
        strengths = [
            graph_strengths(value[..., :size], top.token_ids[..., :size], mask, nodes=self.nodes)
            for value, top, mask in zip(values, (student, source), (student_mask, source_mask), strict=True)
        ]
        num_nodes = None if self.nodes == "rank" else torch.minimum(strengths[0].num_nodes, strengths[1].num_nodes)
        bound = sorted_gw_bound(strengths[0].strengths, strengths[1].strengths, num_nodes)
        return bound.masked_fill(~(student_mask.any(-1) & source_mask.any(-1)), 0.0)
