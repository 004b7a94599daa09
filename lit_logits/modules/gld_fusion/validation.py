"""Means of the terms over a validation, to be logged beside its cross-entropy.

Letters: B samples of a batch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_logits.modules.gld_fusion.weights import TermWeights
from lit_logits.modules.metrics import StageMeans

__all__ = ["TermMeans"]

_NOTHING = torch.zeros(())


class TermMeans(nn.Module):
    """Means of each term of each source, over the samples of all ranks.

    Args:
        weights: by which terms and sources are known.
    """

    def __init__(self, weights: TermWeights) -> None:
        super().__init__()
        pairs = [(name, term) for name, terms in weights.used_terms.items() for term in terms]
        self.keys = {(name, term): f"loss_{term}{weights.suffix(name)}" for name, term in pairs}
        self.means, self.is_empty = StageMeans(*self.keys.values()), True

    def update(self, terms: Mapping[str, Mapping[str, Tensor]], *, counts: Tensor) -> None:
        """Take in the terms of a batch, of each source by their names, (B,), for the samples (B,) that count."""
        for (name, term), key in self.keys.items():
            values = terms.get(name, {}).get(term)
            # Ranks may differ in what they could compare, but not in what they add up.
            self.means.update("val", **{key: (_NOTHING, _NOTHING) if values is None else (values, counts)})
        self.is_empty = not self.keys

    def compute(self) -> dict[str, Tensor]:
        """Return the log entries of the terms that were compared, and reset them; all ranks must call it."""
        if self.is_empty:
            return {}
        self.is_empty = True
        return {f"val/{key}": mean for key, mean in self.means.compute("val").items() if not mean.isnan()}
