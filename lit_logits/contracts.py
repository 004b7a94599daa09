"""What parts ask of each other: Protocols for heads, and what passes between a model and its head.

Letters: N tokens, d hidden size, V vocabulary.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lit_logits.functional.codebook import Footprint
from lit_logits.functional.reductions import Reduction
from lit_logits.functional.residual_vq import DenseTarget, ResidualVQLosses

__all__ = [
    "Calibrate",
    "Calibration",
    "DecodingHead",
    "ExportableHead",
    "ImitatingHead",
    "LearningHead",
    "OutputHead",
    "OutputLayer",
    "StartingHead",
]


class Calibration(NamedTuple):
    """Result of `calibrate`, the same on all ranks.

    Attributes:
        token_counts: (V,) float32, how often each token is a target.
        hidden_second_moment: (d, d) float32 E[h hᵀ] over the positions that have a target, or None.
        token_information: (V,) float32 E[p_v (1 − p_v)] under the output layer over the same positions: the Fisher
            information of each token's logit, which is what an error there costs in KL to second order. Or None.
        informed_second_moment: (d, d) float32 E[h hᵀ] with each position weighted by its Σ_v p_v (1 − p_v), or None.
    """

    token_counts: Tensor
    hidden_second_moment: Tensor | None
    token_information: Tensor | None = None
    informed_second_moment: Tensor | None = None


class OutputLayer(NamedTuple):
    """The output layer of a pretrained model: weight (V, d) and bias (V,); both None for a model of random weights."""

    weight: Tensor | None
    bias: Tensor | None


class Calibrate(Protocol):
    """Reads the training data for a head, as much as the head asks for; every rank must call it alike."""

    def __call__(self, *, second_moment: bool = False, information: bool = False) -> Calibration:
        """Return counts and, where asked for, the moments of hidden states and the information of logits."""
        ...


@runtime_checkable
class OutputHead(Protocol):
    """What every head is: an `nn.Module`, made by a call with (hidden_size, vocab_size). Other contracts add to it."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return token logits (..., V) in nats of hidden states (..., d)."""
        ...

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy in nats of labels (...), already shifted: `mean` or `sum`, or (...) for `none`."""
        ...


@runtime_checkable
class DecodingHead(Protocol):
    """A head that finds next tokens without token logits; those of others are taken from their logits."""

    def greedy(self, hidden: Tensor) -> Tensor:
        """Return the most likely tokens (...) of hidden states (..., d)."""
        ...

    def sample(self, hidden: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return tokens (...) drawn from softmax(logits / temperature)."""
        ...


@runtime_checkable
class StartingHead(Protocol):
    """A head that starts from data, or from the output layer of a pretrained model; others start as they are made."""

    def prepare(self, layer: OutputLayer, table: nn.Embedding) -> bool:
        """Check that the head can start, when the model is made; True if it is ready, so that no data need be read.

        Args:
            layer: of the pretrained model.
            table: (≥ V, ·) input embedding of the backbone.

        Raises:
            ValueError: If it cannot, as for a layer that it needs and that is not there.
        """
        ...

    def start(self, calibrate: Calibrate, layer: OutputLayer, *, progress_bar: bool = False) -> None:
        """Start from the data that `calibrate` reads; on all ranks alike."""
        ...


@runtime_checkable
class LearningHead(Protocol):
    """A head whose training needs more than gradients of the cross-entropy."""

    def penalties(self) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of each further term of the loss, by the name in `train/loss_…`."""
        ...

    def after_step(self) -> None:
        """Move what gradients do not, after each optimizer step."""
        ...


@runtime_checkable
class ImitatingHead(Protocol):
    """A head that can be trained to imitate a dense output layer."""

    @property
    def can_imitate(self) -> bool:
        """Whether this one can, with its settings."""
        ...

    def imitation_losses(
        self, hidden: Tensor, labels: Tensor, *, target: DenseTarget | None = None, ignore_index: int = -100
    ) -> ResidualVQLosses:
        """Return cross-entropy and divergence from the imitated layer (...), in nats a token."""
        ...


@runtime_checkable
class ExportableHead(Protocol):
    """A head that equals a dense layer of rows (V, d) and a bias (V,), or None, and knows its size beside it."""

    token_bias: nn.Parameter | None

    def dense_weight(self) -> Tensor:
        """Return the rows (V, d)."""
        ...

    def footprint(self) -> Footprint:
        """Return parameters and bytes, beside those of the dense head in the same dtype."""
        ...
