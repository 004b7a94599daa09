"""What a head may offer, from a loss to the revival of dead codes.

Letters: N tokens, d hidden size, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lit_logits.functional.codebook import Footprint
from lit_logits.functional.cooccurrence import PairCounts
from lit_logits.functional.reductions import Reduction
from lit_logits.functional.residual_vq import DenseTarget, ResidualVQLosses

__all__ = [
    "Calibrate",
    "Calibration",
    "CappedHead",
    "Coded",
    "CodingHead",
    "DecodingHead",
    "ExportableHead",
    "ImitatingHead",
    "LearningHead",
    "OutputHead",
    "OutputLayer",
    "Reassigned",
    "ReassigningHead",
    "RevivableHead",
    "Revival",
    "SettledHead",
    "SizedHead",
    "StagedHead",
    "StartingHead",
    "UncodedVectorsError",
    "WatchedHead",
]


class Calibration(NamedTuple):
    """Result of `calibrate`, the same on all ranks.

    Attributes:
        token_counts: (V,) float32, how often each token is a target.
        hidden_second_moment: (d, d) float32 E[h hᵀ] over the positions that have a target, or None.
        token_information: (V,) float32 E[p_v (1 − p_v)] under the output layer over the same positions: the Fisher
            information of each token's logit, which is what an error there costs in KL to second order. Or None.
        informed_second_moment: (d, d) float32 E[h hᵀ] with each position weighted by its Σ_v p_v (1 − p_v), or None.
        pairs: how often tokens occurred with the tokens before them, or None.
    """

    token_counts: Tensor
    hidden_second_moment: Tensor | None
    token_information: Tensor | None = None
    informed_second_moment: Tensor | None = None
    pairs: PairCounts | None = None


class OutputLayer(NamedTuple):
    """Output layer of a pretrained model: weight (V, d) and bias (V,); both None for a model of random weights."""

    weight: Tensor | None
    bias: Tensor | None


class Calibrate(Protocol):
    """A function that reads the training data for a head; all ranks must make the same calls."""

    def __call__(
        self, *, second_moment: bool = False, information: bool = False, pair_tokens: int | None = None
    ) -> Calibration:
        """Return counts and, where asked for, the moments of hidden states and the information of logits.

        With `pair_tokens`, return counts and pairs of as much of the text: as many tokens a rank, or all there are.
        """
        ...


@runtime_checkable
class OutputHead(Protocol):
    """A head: an `nn.Module`, made by a call with (hidden_size, vocab_size). Other contracts of heads are optional."""

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
    """A head that finds next tokens without token logits; any other head decodes from its logits."""

    def greedy(self, hidden: Tensor) -> Tensor:
        """Return the most likely tokens (...) of hidden states (..., d)."""
        ...

    def sample(self, hidden: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return tokens (...) drawn from softmax(logits / temperature)."""
        ...


@runtime_checkable
class StartingHead(Protocol):
    """A head that starts from data, or from the output layer of a pretrained model; any other starts as it is made."""

    def prepare(self, layer: OutputLayer, table: nn.Embedding) -> bool:
        """Check, when the model is made, that the head can start; return whether it is ready without reading data.

        Args:
            layer: output layer of the pretrained model.
            table: (≥ V, ·) input embedding of the backbone.

        Raises:
            ValueError: If the head cannot start, as without an output layer that it needs.
        """
        ...

    def start(self, calibrate: Calibrate, layer: OutputLayer, *, progress_bar: bool = False) -> None:
        """Start from the data that `calibrate` reads, with the same result on all ranks."""
        ...


@runtime_checkable
class CappedHead(Protocol):
    """A head for architectures that cap their logits, such as Gemma-2.

    The model sets `logit_cap` to c. Logits are then z_v = c · tanh(⟨h, W_v⟩ / c) + b_v: a token bias is added after the
    cap, so that it shifts the log-odds of its token by b_v whatever the hidden state, and is not bounded by c. A head
    of two softmaxes, as `HierarchicalVQLogitsHead`, caps the logits of each, before its bias is added.
    """

    logit_cap: float | None


@runtime_checkable
class WatchedHead(Protocol):
    """A head of codes that `CodebookMonitor` can show: K codes, or clusters, each with the tokens that it owns."""

    token_counts: Tensor

    @property
    def codebook_size(self) -> int:
        """K."""
        ...

    @property
    def token_to_code(self) -> Tensor:
        """The code of each token (V,)."""
        ...

    def usage(self) -> Tensor:
        """Return the share (K,) of the targets that each code carries."""
        ...

    def dead_codes(self, min_usage: float = 0.0) -> Tensor:
        """Return codes without tokens, or with less than `min_usage` times an even share of the targets."""
        ...

    def ppl_floor(self) -> Tensor:
        """Return the perplexity that no backbone can go below."""
        ...


@runtime_checkable
class StagedHead(Protocol):
    """A head whose tokens own codes of further stages, beside the code that `WatchedHead` tells of."""

    def dead_stage_codes(self, min_usage: float = 0.0) -> Sequence[Tensor]:
        """Return of each stage the codes without tokens, or with less than `min_usage` times an even share."""
        ...


class Revival(NamedTuple):
    """Result of `revive_dead`, the same on all ranks.

    Attributes:
        num_revived: how many dead codes got tokens.
        rows: parameter → rows (D,) int64 that changed, whose moments in an optimizer are those of other codes.
    """

    num_revived: int
    rows: Mapping[nn.Parameter, Tensor]


@runtime_checkable
class RevivableHead(Protocol):
    """A head of codes that `CodebookReinit` can put back to use."""

    token_counts: Tensor

    def revive_dead(self, min_usage: float = 0.0, *, generator: torch.Generator | None = None) -> Revival:
        """Give dead codes tokens of codes that have too many; every rank must call it.

        Args:
            min_usage: share of the targets below which a code is dead, in units of an even share; 0 for codes without
                tokens only.
            generator: source of randomness, on the device of `token_counts`.
        """
        ...


class Reassigned(NamedTuple):
    """Result of `reassign`, the same on all ranks.

    Attributes:
        num_tokens: how many tokens got another code.
        gain: by how many nats a position the loss fell, on positions that were set aside.
        num_positions: how many were read.
    """

    num_tokens: int
    gain: float
    num_positions: int


@runtime_checkable
class ReassigningHead(Protocol):
    """A head of codes that `CodebookReassign` can give another mapping."""

    @property
    def can_reassign(self) -> bool:
        """Return whether this head can, with its settings."""
        ...

    def reassign(
        self, positions: Iterable[tuple[Tensor, Tensor]], *, min_gain: float = 2.0, slack: float = 0.0
    ) -> Reassigned:
        """Give tokens the codes that lower the loss most; every rank must call it.

        Args:
            positions: hidden states (N, d) and the tokens (N,) that follow them, a batch at a time.
            min_gain: nats, summed over all positions, that the change of a code must gain.
            slack: nats a token by which the loss may be higher, right after, than the lowest one found, for the sake of
                a longer step.
        """
        ...


class Coded(NamedTuple):
    """Result of `code_vectors`, the same on all ranks.

    Attributes:
        vectors: the parameter that is no longer trained.
        codes: the parameter that takes its place.
        error: share of the weighted variance of the logits that the codes lose.
        cost: by how many nats a position the loss rose, on positions that were set aside.
        num_positions: how many were read.
    """

    vectors: nn.Parameter
    codes: nn.Parameter
    error: float
    cost: float
    num_positions: int


class UncodedVectorsError(ValueError):
    """Codes are asked for while tokens still own vectors."""


@runtime_checkable
class CodingHead(Protocol):
    """A head whose tokens may own vectors, which `CodebookFit` has coded."""

    @property
    def has_own_vectors(self) -> bool:
        """Return whether tokens own vectors, which are not coded yet."""
        ...

    def code_vectors(self, positions: Iterable[tuple[Tensor, Tensor]], *, progress_bar: bool = False) -> Coded:
        """Fit codes to the vectors, which are dropped; every rank must call it.

        Args:
            positions: hidden states (N, d) and the tokens (N,) that follow them, a batch at a time.
            progress_bar: show one line of progress on a terminal.

        Raises:
            ValueError: If tokens own no vectors.
        """
        ...


@runtime_checkable
class LearningHead(Protocol):
    """A head whose training needs more than gradients of the cross-entropy."""

    def penalties(self) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of each further term of the loss, by the name in `train/loss_…`."""
        ...

    def after_step(self) -> None:
        """Update, after each optimizer step, what gradients do not."""
        ...


@runtime_checkable
class ImitatingHead(Protocol):
    """A head that can be trained to imitate a dense output layer."""

    @property
    def can_imitate(self) -> bool:
        """Return whether this head can, with its settings."""
        ...

    def imitation_losses(
        self, hidden: Tensor, labels: Tensor, *, target: DenseTarget | None = None, ignore_index: int = -100
    ) -> ResidualVQLosses:
        """Return cross-entropy and divergence from the imitated layer (...), in nats a token."""
        ...


@runtime_checkable
class ExportableHead(Protocol):
    """A head that equals a dense layer of rows (V, d) with a bias (V,) or none."""

    token_bias: nn.Parameter | None

    def dense_weight(self) -> Tensor:
        """Return the rows (V, d)."""
        ...


@runtime_checkable
class SizedHead(Protocol):
    """A head that can tell how much smaller it is than the dense layer."""

    def footprint(self) -> Footprint:
        """Return parameters and bytes of this head and of the dense one in the same dtype."""
        ...


class SettledHead(Protocol):
    """A head, or a coded table, whose large buffers change rarely, and by itself.

    All ranks have the same in them: wherever the head changes one, it broadcasts it from rank 0. DDP then need not send
    them at every forward. Buffers that move with each step, such as running counts, do not belong here.
    """

    @property
    def settled_buffers(self) -> Sequence[str]:
        """Return the names of these buffers in the head."""
        ...
