"""A user's own head, with no more than the contract asks of every head."""

import torch
from torch import nn


class LowRankHead(nn.Module):
    """Logits through `rank` numbers."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int = 4) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden_size, rank, bias=False), nn.Linear(rank, vocab_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden))

    def loss(self, hidden, labels, *, ignore_index=-100, reduction="mean"):
        logits = self(hidden).flatten(0, -2)
        losses = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction=reduction)
        return losses.view_as(labels) if reduction == "none" else losses
