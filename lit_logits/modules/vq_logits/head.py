"""`VQLogitsHead`: the output layer as a small codebook and a token → code mapping.

Letters: N tokens, d hidden size, V vocabulary, K codes (M: {0..V−1} → {0..K−1}).
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lit_logits.contracts import Calibrate, OutputLayer
from lit_logits.functional.checks import check_not_negative, check_token_to_code
from lit_logits.functional.code_assignment import random_assignment
from lit_logits.functional.codebook import (
    Footprint,
    commitment_loss,
    ppl_floor,
    unigram_bias,
    vq_footprint,
)
from lit_logits.functional.reductions import Reduction, at_least_float32
from lit_logits.functional.residual_codes import MetricKind
from lit_logits.functional.residual_rows import StageCodes
from lit_logits.functional.residual_vq import DenseTarget, ResidualVQLosses, residual_vq_losses
from lit_logits.functional.vq_decoding import (
    GreedyTables,
    SamplingTables,
    greedy_tables,
    sampling_tables,
    vq_greedy,
    vq_sample,
)
from lit_logits.functional.vq_logits import (
    code_logits,
    scatter_code_logits,
    straight_through_vq_cross_entropy,
    vq_cross_entropy,
)
from lit_logits.modules.vq_logits.counting import running_dtype
from lit_logits.modules.vq_logits.fit import check_codebook_size, fit_output_layer
from lit_logits.modules.vq_logits.moving import CodebookUpdate, MappingStrategy, MovingCodes
from lit_logits.modules.vq_logits.residual import ResidualVQLogitsHead
from lit_logits.modules.vq_logits.start import PAIR_TOKENS, HeadInit, choose_init, start_codes
from lit_logits.modules.vq_logits.tables import TableCache

__all__ = ["VQLogitsHead"]

_INIT_STD = 0.02


class VQLogitsHead(MovingCodes):
    """Output layer made of a small codebook and a token → code mapping [0].

    `loss`, `greedy` and `sample` never make the (N, V) logits; calling the head does, as any other output layer would.
    Call `after_step` after each optimizer step: it moves what gradients do not (mapping, EMA codebook). The head starts
    from a random codebook and a random mapping of equal cluster sizes; `set_codes` replaces them.

    Args:
        hidden_size: d.
        vocab_size: V.
        codebook_size: K, in [1, V].
        bias: learn a bias for each token, so that tokens of one code differ; without it they are equally likely (the
            paper's head).
        init: how `start` finds the codes: `cooccurrence`, tokens that follow the same contexts share one, see
            `cooccurrence_assignment`; `random`; `frequency`, runs of tokens by frequency rank; `kmeans` or
            `weighted_kmeans` of the rows of a pretrained output layer. Default: `weighted_kmeans` with a pretrained
            layer, else `cooccurrence`.
        start_tokens: tokens of text that `cooccurrence` reads on each rank at most, ahead of training.
        count_power: exponent of the token counts in `weighted_kmeans`.
        mapping: `fixed`; `learned`: each token owns a trained latent (V, d) and belongs to the nearest code;
            `reassigned`: one k-means step of the token table every `reassign_every_n_steps`.
        codebook_update: `gradient`, or `ema`: codes are running means of the latents of their tokens.
        decay: of the running means of `ema`, a step.
        reassign_every_n_steps: how often `after_step` renews a `learned` or `reassigned` mapping.
        usage_decay: of the running token counts, a training batch.
        commitment_weight: weight of the commitment loss of latents.

    Attributes:
        codebook: (K, d) parameter.
        token_to_code: (V,) int64 buffer.
        token_bias: (V,) parameter in nats, or None.
        logit_cap: c of a soft cap on the code logits, before the bias is added, or None; see `CappedHead`.
        latents: (V, d) parameter kept for training only, or None.
        token_counts: (V,) buffer, running counts of the targets of all ranks; at least float32 in any module.

    Raises:
        ValueError: If the codebook is larger than the vocabulary, or an argument is out of range.

    References:
        [0]: VQ-Logits, 2025, arXiv 2505.10202.

    Example:
        >>> head = VQLogitsHead(hidden_size=8, vocab_size=100, codebook_size=10)
        >>> head(torch.randn(2, 8)).shape, head.greedy(torch.randn(2, 8)).shape
        (torch.Size([2, 100]), torch.Size([2]))
    """

    settled_buffers: ClassVar[tuple[str, ...]] = ("token_to_code",)  # see `SettledHead`

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        codebook_size: int = 512,
        *,
        bias: bool = True,
        init: HeadInit | None = None,
        start_tokens: int = PAIR_TOKENS,
        count_power: float = 0.75,
        mapping: MappingStrategy = "fixed",
        codebook_update: CodebookUpdate = "gradient",
        decay: float = 0.99,
        reassign_every_n_steps: int = 100,
        usage_decay: float = 0.99,
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__()
        check_codebook_size(codebook_size, vocab_size)
        _check_options(mapping, codebook_update, decay, reassign_every_n_steps, usage_decay)
        check_not_negative(count_power=count_power, commitment_weight=commitment_weight)
        if start_tokens < 1:
            raise ValueError(f"Expected `start_tokens` to be at least 1, but got {start_tokens}.")
        self.hidden_size, self.vocab_size, self.codebook_size = hidden_size, vocab_size, codebook_size
        self.mapping, self.codebook_update = mapping, codebook_update
        self.decay, self.usage_decay = decay, usage_decay
        self.reassign_every_n_steps = reassign_every_n_steps
        self.init, self.start_tokens = init, start_tokens
        self.count_power, self.commitment_weight = count_power, commitment_weight

        self.codebook = nn.Parameter(torch.randn(codebook_size, hidden_size) * _INIT_STD)
        self.codebook.requires_grad_(codebook_update == "gradient")
        self.token_bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.logit_cap: float | None = None
        has_latents = mapping == "learned" or codebook_update == "ema"
        self.latents = nn.Parameter(torch.empty(vocab_size, hidden_size)) if has_latents else None
        self.register_buffer("token_to_code", random_assignment(vocab_size, codebook_size))
        self.register_buffer("token_counts", torch.zeros(vocab_size, dtype=running_dtype()))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        if codebook_update == "ema":
            self.register_buffer("ema_sums", torch.empty(codebook_size, hidden_size, dtype=running_dtype()))
            self.register_buffer("ema_mass", torch.empty(codebook_size, dtype=running_dtype()))
        # In a tuple, so that it is not registered here: it is the backbone's, and would be in the checkpoint twice.
        self._token_table: tuple[nn.Embedding, ...] = ()
        self._tables = TableCache()
        self.register_load_state_dict_pre_hook(_check_vocabulary)
        self._restart_latents()

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        *,
        codebook_size: int,
        num_groups: int = 1,
        num_stages: int | Mapping[int, int] | None = None,
        byte_budget: float | None = None,
        token_counts: Tensor | None = None,
        hidden_second_moment: Tensor | None = None,
        bias: Tensor | None = None,
        metric: MetricKind = "full",
        count_power: float = 0.75,
        smoothing: float = 0.0,
        num_sweeps: int = 2,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> "VQLogitsHead | ResidualVQLogitsHead":
        """Compress a pretrained output layer into a head whose logits are near h Wᵀ + b for typical hidden states.

        One group and one stage give this class, the paper's head, with a bias that splits each code among its tokens
        if there are counts (under DDP every rank must call it then, and gets the codes of rank 0). Other settings give
        a `ResidualVQLogitsHead`. `fit_output_layer` describes the arguments; `bias` (V,) is kept. The head has the
        dtype of `weight`.

        Example:
            >>> weight = torch.randn(100, 8)
            >>> type(VQLogitsHead.from_dense(weight, codebook_size=16)).__name__
            'VQLogitsHead'
            >>> head = VQLogitsHead.from_dense(weight, codebook_size=16, num_groups=4, num_stages=2)
            >>> head(torch.randn(2, 8)).shape
            torch.Size([2, 100])
        """
        fit = fit_output_layer(
            weight,
            codebook_size=codebook_size,
            num_groups=num_groups,
            num_stages=num_stages,
            byte_budget=byte_budget,
            token_counts=token_counts,
            hidden_second_moment=hidden_second_moment,
            metric=metric,
            count_power=count_power,
            smoothing=smoothing,
            num_sweeps=num_sweeps,
            generator=generator,
            progress_bar=progress_bar,
        )
        is_single, bias = fit.codebooks.shape[:2] == (1, 1), None if bias is None else bias.detach()
        if is_single and token_counts is not None:
            split = unigram_bias(token_counts.to(weight.device), fit.codes, codebook_size)
            bias = split if bias is None else bias + split
        options: dict[str, Any] = {"bias": bias is not None}
        with torch.device(weight.device):
            if is_single:
                single = cls(weight.shape[1], weight.shape[0], codebook_size, **options).to(weight.dtype)
                single.set_codes(fit.codebooks[0, 0], fit.codes, token_bias=bias, token_counts=token_counts)
                return single
            options |= {"num_groups": num_groups, "token_stages": fit.token_stages}
            head = ResidualVQLogitsHead(weight.shape[1], weight.shape[0], codebook_size, **options)
        head.to(weight.dtype).set_codes(fit.codebooks, fit.codes, fit.token_stages, token_bias=bias)
        return head

    # ------------------------------------------------------------------ logits and loss

    def forward(self, hidden: Tensor) -> Tensor:
        """Return token logits (..., V) in nats of hidden states (..., d)."""
        logits = code_logits(hidden, self.codebook, cap=self.logit_cap)
        return scatter_code_logits(logits, self.token_to_code, self.token_bias)

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy in nats, in O(N·K); in training mode also count the labels and feed the latents.

        Args:
            hidden: (..., d).
            labels: (...), already shifted: the token to predict from each hidden state, or `ignore_index`.
            ignore_index: label of tokens that do not count.
            reduction: `mean` over the tokens that count, `sum` or `none`.

        Raises:
            ValueError: If a label is out of range (checked in host memory only).
        """
        args = (hidden, self.codebook, self.token_to_code, labels)
        options: Any = {"cap": self.logit_cap, "ignore_index": ignore_index, "reduction": reduction}
        if not self.training:
            return vq_cross_entropy(*args, token_bias=self.token_bias, **options)
        if self.latents is None:
            loss = vq_cross_entropy(*args, token_bias=self.token_bias, **options)
        else:
            loss = straight_through_vq_cross_entropy(*args, latents=self.latents, token_bias=self.token_bias, **options)
        self._count(labels, ignore_index)
        return loss

    def imitation_losses(
        self, hidden: Tensor, labels: Tensor, *, target: DenseTarget | None = None, ignore_index: int = -100
    ) -> ResidualVQLosses:
        """Return cross-entropy (...) and divergence (...) from the output layer that is imitated, in nats a token.

        The target's logits cost O(N·V·d) anyway, so nothing is gained by scoring codes alone, as `loss` does. In
        training mode it counts the labels.
        """
        if self.training:
            self._count(labels, ignore_index)
        return residual_vq_losses(
            hidden,
            self.codebook[None, None],
            [StageCodes(None, self.token_to_code.unsqueeze(1))],
            labels,
            token_bias=self.token_bias,
            target=target,
            cap=self.logit_cap,
            ignore_index=ignore_index,
        )

    def commitment_loss(self) -> Tensor:
        """Return the mean squared distance of latents to their codes, which moves the latents; 0 without latents."""
        if self.latents is None:
            return self.codebook.new_zeros(())
        return commitment_loss(self.latents, self.codebook, self.token_to_code)

    # ------------------------------------------------------------------ decoding

    def greedy(self, hidden: Tensor) -> Tensor:
        """Return the most likely tokens (...) of hidden states (..., d), exactly; ties in a code go to the lower id."""
        tables = self._table("greedy", lambda: greedy_tables(self.token_to_code, self.codebook_size, self.token_bias))
        return vq_greedy(hidden, self.codebook, cast(GreedyTables, tables), cap=self.logit_cap)

    def sample(self, hidden: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return tokens (...) drawn from softmax(logits / temperature) of hidden states (..., d), exactly."""
        tables = self._table(
            f"sampling at {temperature}",
            lambda: sampling_tables(self.token_to_code, self.codebook_size, self.token_bias, temperature=temperature),
        )
        return vq_sample(
            hidden,
            self.codebook,
            cast(SamplingTables, tables),
            temperature=temperature,
            cap=self.logit_cap,
            generator=generator,
        )

    def train(self, mode: bool = True) -> "VQLogitsHead":
        """Switch between training and evaluation, and forget the decoding tables; see `TableCache`."""
        self._tables.clear()
        return super().train(mode)

    def _table(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a table made from mapping and bias; it is kept until one of them changes."""
        sources = [self.token_to_code] if self.token_bias is None else [self.token_to_code, self.token_bias]
        with torch.no_grad():
            return self._tables.get(name, sources, make)

    # ------------------------------------------------------------------ inspection

    def dense_weight(self) -> Tensor:
        """Return the rows C_{M(v)} of the dense (V, d) layer that gives the same logits, bias aside."""
        return self.codebook[self.token_to_code]

    def ppl_floor(self) -> Tensor:
        """Return the perplexity that no backbone can go below on the counted targets; NaN before any were counted."""
        bias = None if self.token_bias is None else self.token_bias.detach()
        return ppl_floor(self.token_counts, self.token_to_code, self.codebook_size, bias)

    def footprint(self) -> Footprint:
        """Return parameters and bytes after export, and those of the dense head in the same dtype."""
        return vq_footprint(
            self.hidden_size,
            self.vocab_size,
            self.codebook_size,
            bias=self.token_bias is not None,
            itemsize=self.codebook.dtype.itemsize,
        )

    # ------------------------------------------------------------------ start, and what training asks for

    def prepare(self, layer: OutputLayer, table: nn.Embedding) -> bool:
        """Choose the start and bind the token table; return False, as data must be read. See `StartingHead`."""
        self.init = choose_init(self.init, pretrained=layer.weight is not None)
        self.bind_token_table(table)
        return False

    def start(self, calibrate: Calibrate, layer: OutputLayer, *, progress_bar: bool = False) -> None:
        """Set codes, mapping, bias and counts by `start_codes`; all ranks get those of rank 0."""
        # Only the weighted start needs hidden states; the others count labels, without a pass through the backbone.
        init = self.init or choose_init(None, pretrained=layer.weight is not None)
        if init == "cooccurrence":
            calibration = calibrate(pair_tokens=self.start_tokens)
        else:
            calibration = calibrate(second_moment=init == "weighted_kmeans")
        found = start_codes(
            init,
            calibration,
            layer,
            codebook_size=self.codebook_size,
            device=self.codebook.device,
            count_power=self.count_power,
            progress_bar=progress_bar,
        )
        counts = calibration.token_counts
        self.set_codes(
            found.codebook, found.token_to_code, token_bias=found.token_bias, token_counts=counts, latents=found.latents
        )

    def penalties(self) -> dict[str, tuple[float, Tensor]]:
        """Return the commitment loss of latents with its weight, if there are latents."""
        return {} if self.latents is None else {"commitment": (self.commitment_weight, self.commitment_loss())}

    @property
    def can_imitate(self) -> bool:
        """Whether there are no latents, which only the cross-entropy feeds."""
        return self.latents is None

    def extra_repr(self) -> str:
        """Return the settings that `print(module)` shows."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, codebook_size={self.codebook_size},"
            f" bias={self.token_bias is not None}, mapping={self.mapping!r}, codebook_update={self.codebook_update!r}"
        )


def _check_options(
    mapping: str, codebook_update: str, decay: float, reassign_every_n_steps: int, usage_decay: float
) -> None:
    if mapping not in ("fixed", "learned", "reassigned"):
        raise ValueError(f"Expected `mapping` to be 'fixed', 'learned' or 'reassigned', but got {mapping!r}.")
    if codebook_update not in ("gradient", "ema"):
        raise ValueError(f"Expected `codebook_update` to be 'gradient' or 'ema', but got {codebook_update!r}.")
    if reassign_every_n_steps < 1:
        raise ValueError(f"Expected `reassign_every_n_steps` to be at least 1, but got {reassign_every_n_steps}.")
    for name, value in (("decay", decay), ("usage_decay", usage_decay)):
        if not 0 <= value < 1:
            raise ValueError(f"Expected `{name}` to be in [0, 1), but got {value}.")


def _check_vocabulary(module: Any, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Refuse a checkpoint of another vocabulary or codebook size, or with an invalid mapping, and say what to do."""
    for name, what in (("token_to_code", "vocab_size"), ("codebook", "codebook_size")):
        loaded, own = state_dict.get(prefix + name), getattr(module, name)
        if loaded is not None and loaded.shape[0] != own.shape[0]:
            raise ValueError(
                f"Expected a checkpoint with `{what}` {own.shape[0]}, but this one has {loaded.shape[0]}. Use the"
                " tokenizer and the codebook size that it was trained with."
            )
    for name in module.running_buffers():  # also where tensors are taken over as they are, with `assign=True`
        if prefix + name in state_dict:
            state_dict[prefix + name] = at_least_float32(state_dict[prefix + name])
    mapping = state_dict.get(prefix + "token_to_code")
    if mapping is not None and mapping.device.type != "meta":
        check_token_to_code(mapping, module.vocab_size, module.codebook_size)
