"""`ResidualVQLogitsHead`: the output layer of a pretrained model as residual product codes, tiered by frequency.

Letters: N tokens, d hidden size, V vocabulary, K codes, G groups of width d/G, S stages, of which token v owns S_v.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_logits.contracts import Calibrate, OutputLayer
from lit_logits.functional.checks import check_finite, check_not_negative
from lit_logits.functional.codebook import Footprint
from lit_logits.functional.lookup.device import (
    StreamedHead,
    has_kernel,
    streamed_greedy,
    streamed_head,
    streamed_logits,
)
from lit_logits.functional.lookup.lookup import LookupLayout, lookup_greedy, lookup_layout, packed_lookup_logits
from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens, soft_cap
from lit_logits.functional.residual_codes import MetricKind
from lit_logits.functional.residual_rows import decode_all_rows
from lit_logits.functional.residual_vq import (
    DenseTarget,
    ResidualVQLosses,
    residual_vq_greedy,
    residual_vq_logits,
    residual_vq_losses,
)
from lit_logits.functional.vq_decoding import sample_logits
from lit_logits.modules.vq_logits.coded_rows import CodedRows
from lit_logits.modules.vq_logits.tables import is_traced

__all__ = ["ResidualVQLogitsHead"]

# Hidden states; a look-up costs the same for each of them, while decoding the codes to rows is paid once. With more of
# them a matrix product is faster. The bound for GPUs is a guess.
_MAX_LOOKUPS = 256
_MAX_KERNEL_LOOKUPS = 64


class ResidualVQLogitsHead(CodedRows):
    """Output layer whose rows are sums of codes: one from each of G groups, in one or more residual stages.

        W_v = Σ_{s < S_v} [C_{s,0}[M_{s,0}(v)], …, C_{s,G−1}[M_{s,G−1}(v)]]      z_v = ⟨h, W_v⟩ + b_v

    With one group and one stage it is the paper's head. The mapping is kept as it is stored: packed to ⌈log2 K⌉ bits a
    code. `VQLogitsHead.from_dense` fits one to a pretrained layer; here codes start at random.

    Args:
        hidden_size: d.
        vocab_size: V.
        codebook_size: K, in [1, V].
        num_groups: G, a divisor of d.
        num_stages: S, which all tokens own, or tiers {frequency rank: stages}; see `stages_by_rank`. Default 1, or up
            to 5 with a budget.
        byte_budget: share of the bfloat16 dense layer that the head may take; `start` chooses the tiers by it.
        token_stages: S_v of each token (V,), or one number for all, if it is known; at most S.
        bias: learn a bias for each token.
        metric: what of E[h hᵀ] `start` uses; see `metric_matrix`.
        token_weights: weight of an error in the row of a token in `start`: `counts`, how often it occurs, to the power
            `count_power`; or `fisher`, the information of its logit, E[p (1 − p)] under the original, which keeps the
            divergence lowest and is the better start for `kd_weight: 1`. The weights also decide which tokens get more
            stages.
        count_power: exponent of the token counts.
        smoothing: share of those weights that is spread evenly over the vocabulary, so that text of another kind than
            that of `start` loses less; see `fit_output_layer`.
        num_sweeps: passes of `start` that renew all codes after the first fit; see `fit_output_layer`.

    Attributes:
        codebook: (S, G, K, d/G) parameter.
        token_bias: (V,) parameter in nats, or None.
        logit_cap: c of a soft cap on the logits before the bias is added, or None; see `CappedHead`.
        packed_codes: (⌈Σ_v S_v · G · ⌈log2 K⌉ / 8⌉,) uint8 buffer: stage after stage, in each the tokens that own it.
        packed_stages: uint8 buffer of S_v − 1 in ⌈log2 S⌉ bits each; empty where all tokens own all stages.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> head = ResidualVQLogitsHead(hidden_size=8, vocab_size=100, codebook_size=16, num_groups=4, token_stages=2)
        >>> head(torch.randn(2, 8)).shape, tuple(head.codebook.shape)
        (torch.Size([2, 100]), (2, 4, 16, 2))
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        codebook_size: int = 256,
        *,
        num_groups: int = 1,
        num_stages: int | dict[int, int] | None = None,
        byte_budget: float | None = None,
        token_stages: Tensor | int | None = None,
        bias: bool = False,
        metric: MetricKind = "full",
        token_weights: Literal["counts", "fisher"] = "counts",
        count_power: float = 0.75,
        smoothing: float = 0.0,
        num_sweeps: int = 2,
    ) -> None:
        super().__init__(
            hidden_size,
            vocab_size,
            codebook_size,
            num_groups=num_groups,
            num_stages=num_stages,
            byte_budget=byte_budget,
            token_stages=token_stages,
            metric=metric,
            smoothing=smoothing,
            num_sweeps=num_sweeps,
        )
        if token_weights not in ("counts", "fisher"):
            raise ValueError(f"Expected `token_weights` to be 'counts' or 'fisher', but got {token_weights!r}.")
        check_not_negative(count_power=count_power)
        self.token_weights, self.count_power = token_weights, count_power
        self.token_bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.logit_cap: float | None = None

    # ------------------------------------------------------------------ logits and loss

    def forward(self, hidden: Tensor) -> Tensor:
        """Return token logits (..., V) in nats of hidden states (..., d).

        A few hidden states, as in decoding, are looked up: on a CPU, see `packed_lookup_logits`, and on a GPU where
        Triton is installed. Others, and those in training, are multiplied with rows that are decoded a chunk at a time,
        and in code that is traced with all rows.
        """
        if is_traced():
            rows = decode_all_rows(self.codebook, self.stages()).to(hidden.dtype)
            logits = soft_cap(F.linear(hidden, rows), self.logit_cap)
            return logits if self.token_bias is None else logits + self.token_bias.to(logits.dtype)
        if not self._is_decoding(hidden) and not self._takes_kernel(hidden):
            return self._decoded_logits(hidden, self.codebook, self.token_bias)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *self.parameters())):
            return _LookUp.apply(hidden, self.codebook, self.token_bias, self)
        return self.look_up(hidden)

    def look_up(self, hidden: Tensor) -> Tensor:
        """Return the logits of `forward` for a few hidden states, without a graph."""
        if self._takes_kernel(hidden):
            return streamed_logits(hidden, self._streamed())
        logits = packed_lookup_logits(hidden, self._layout())
        if self.logit_cap is not None:  # the layout then has no bias, which is not capped
            logits = soft_cap(logits, self.logit_cap)
            logits = logits if self.token_bias is None else logits + self.token_bias
        return logits.to(hidden.dtype)

    def _decoded_logits(self, hidden: Tensor, codebook: Tensor, token_bias: Tensor | None) -> Tensor:
        return residual_vq_logits(hidden, codebook, self.stages(), self.vocab_size, token_bias, cap=self.logit_cap)

    @property
    def weight(self) -> Tensor:
        """The rows (V, d), decoded: for programs that read the output layer of a model instead of calling it."""
        return decode_all_rows(self.codebook, self.stages())

    @property
    def bias(self) -> Tensor | None:
        """The token bias, under the name that it has in a dense layer."""
        return self.token_bias

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy in nats; arguments as in `VQLogitsHead.loss`.

        The (N, V) logits are not made, but where code is traced that does not train: exported, or compiled in `eval`
        mode. A compiler leaves the loss of a training to Python, so that `fullgraph=True` refuses it.
        """
        if is_traced() and not self.training:
            logits = at_least_float32(self(hidden)).flatten(0, -2)
            wanted = labels.flatten()
            values = F.cross_entropy(logits, wanted, ignore_index=ignore_index, reduction="none").view(labels.shape)
            return reduce_tokens(values, labels != ignore_index, reduction)
        losses = self.imitation_losses(hidden, labels, ignore_index=ignore_index).cross_entropy
        return reduce_tokens(losses, labels != ignore_index, reduction)

    def imitation_losses(
        self, hidden: Tensor, labels: Tensor, *, target: DenseTarget | None = None, ignore_index: int = -100
    ) -> ResidualVQLosses:
        """Return cross-entropy (...) and divergence (...) from the output layer that is imitated, in nats a token."""
        return residual_vq_losses(
            hidden,
            self.codebook,
            self.stages(),
            labels,
            token_bias=self.token_bias,
            target=target,
            cap=self.logit_cap,
            ignore_index=ignore_index,
        )

    # ------------------------------------------------------------------ decoding

    @torch.no_grad()
    def greedy(self, hidden: Tensor) -> Tensor:
        """Return the most likely tokens (...) of hidden states (..., d), exactly; ties go to the lowest id."""
        if self._takes_kernel(hidden):
            return streamed_greedy(hidden, self._streamed())
        if self._is_decoding(hidden):
            return (
                self.look_up(hidden).argmax(-1) if self.logit_cap is not None else lookup_greedy(hidden, self._layout())
            )
        return residual_vq_greedy(
            hidden, self.codebook, self.stages(), self.vocab_size, self.token_bias, cap=self.logit_cap
        )

    @torch.no_grad()
    def sample(self, hidden: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return tokens (...) drawn from softmax(logits / temperature) of hidden states (..., d)."""
        return sample_logits(self(hidden), temperature, generator)

    def _is_decoding(self, hidden: Tensor) -> bool:
        few = hidden.device.type == "cpu" and hidden.numel() <= _MAX_LOOKUPS * self.hidden_size
        return few and not self._trains(hidden)

    def _takes_kernel(self, hidden: Tensor) -> bool:
        few = hidden.numel() <= _MAX_KERNEL_LOOKUPS * self.hidden_size
        return few and not is_traced() and not self._trains(hidden) and has_kernel(hidden, self.codebook_size)

    def _trains(self, hidden: Tensor) -> bool:
        # The layout of a look-up would be made again at each step.
        trains = self.training and torch.is_grad_enabled()
        return trains and any(tensor.requires_grad for tensor in (hidden, *self.parameters()))

    def _streamed(self) -> StreamedHead:
        """Return the head for the kernel, made again if any part of it was written to."""
        bias = () if self.token_bias is None else (self.token_bias,)
        sources = (self.codebook, self.packed_codes, self.packed_stages, *bias)
        return self._tables.get(f"stream with cap {self.logit_cap}", sources, self._make_streamed)

    def _make_streamed(self) -> StreamedHead:
        stages = self.stages()  # which tells a damaged mapping
        codebook = self.codebook.detach()[: len(stages)]  # no token may own the last ones
        return streamed_head(codebook, self.packed_codes, stages, self.token_bias, self.logit_cap)

    def _layout(self) -> LookupLayout:
        """Return the head in the layout of the look-up, made again if any part of it was written to."""
        bias = () if self.token_bias is None else (self.token_bias,)
        sources = (self.codebook, self.packed_codes, self.packed_stages, *bias)
        return self._tables.get(f"layout with cap {self.logit_cap}", sources, self._make_layout)

    def _make_layout(self) -> LookupLayout:
        stages = self.stages()
        missing = self.num_stages - len(stages)  # last stages that no token owns
        codebook = self.codebook.detach()[: self.num_stages - missing]
        without = self.token_bias is None or self.logit_cap is not None
        bias = None if without else cast(Tensor, self.token_bias).detach()
        return lookup_layout(codebook, [stage.codes for stage in stages], [stage.members for stage in stages], bias)

    # ------------------------------------------------------------------ start

    @torch.no_grad()
    def set_codes(
        self, codebook: Tensor, codes: Tensor, token_stages: Tensor, *, token_bias: Tensor | None = None
    ) -> None:
        """Replace codes, on this rank only; arguments as in `CodedRows.set_codes`.

        Args:
            codebook: (S, G, K, d/G).
            codes: (Σ_v S_v · G,).
            token_stages: (V,).
            token_bias: (V,) in nats; None leaves it as it is.

        Raises:
            ValueError: If a shape differs, a code is out of range or a value is not finite; nothing is written then.
        """
        if token_bias is not None:
            if self.token_bias is None:
                raise ValueError("Expected `bias=True` for a token bias, but this head has none.")
            if token_bias.shape != self.token_bias.shape:
                raise ValueError(
                    f"Expected `token_bias` to have shape ({self.vocab_size},), but got {tuple(token_bias.shape)}."
                )
            check_finite(token_bias, "token_bias")
        super().set_codes(codebook, codes, token_stages)
        if token_bias is not None and self.token_bias is not None:
            self.token_bias.copy_(token_bias)

    def prepare(self, layer: OutputLayer, table: nn.Embedding) -> bool:
        """Refuse a model of random weights, as there is nothing to fit to; return False. See `StartingHead`."""
        if layer.weight is None:
            raise ValueError(
                "Expected a pretrained backbone for residual product codes, which are fitted to its output layer, but"
                " the backbone is a config with random weights. Use `VQLogitsHead`."
            )
        return False

    def start(self, calibrate: Calibrate, layer: OutputLayer, *, progress_bar: bool = False) -> None:
        """Fit the codes to a pretrained output layer; see `fit_output_layer`. All ranks get the codes of rank 0."""
        if layer.weight is None:
            raise ValueError(
                "Expected the rows of the pretrained output layer, but they were freed when the head was initialised."
                " Make a new module to start again."
            )
        calibration = calibrate(second_moment=True, information=self.token_weights == "fisher")
        weights, moment, power = calibration.token_counts, calibration.hidden_second_moment, self.count_power
        if calibration.token_information is not None:  # already what an error costs, so its exponent is 1
            weights, moment, power = calibration.token_information, calibration.informed_second_moment, 1.0
        if self.token_bias is not None and layer.bias is not None:
            with torch.no_grad():
                self.token_bias.copy_(layer.bias)
        self.fit(layer.weight, token_weights=weights, second_moment=moment, power=power, progress_bar=progress_bar)

    @property
    def can_imitate(self) -> bool:
        """Whether it can be trained to imitate: always."""
        return True

    # ------------------------------------------------------------------ inspection

    def footprint(self) -> Footprint:
        """Return parameters and bytes as stored, and those of the dense head in the same dtype."""
        rows, bias = super().footprint(), 0 if self.token_bias is None else self.token_bias.numel()
        taken = rows.bytes + bias * self.codebook.dtype.itemsize
        return rows._replace(parameters=rows.parameters + bias, bytes=taken)

    def extra_repr(self) -> str:
        """Return the settings that `print(module)` shows."""
        return f"{super().extra_repr()}, bias={self.token_bias is not None}"


class _LookUp(torch.autograd.Function):
    """The look-up, with the gradient of the decoded rows: a graph that nobody walks back costs nothing."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, codebook: Tensor, token_bias: Tensor | None, head: ResidualVQLogitsHead
    ) -> Tensor:
        ctx.save_for_backward(hidden, codebook, token_bias)
        ctx.head = head
        return head.look_up(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = [None if tensor is None else tensor.detach() for tensor in ctx.saved_tensors]
        asked = zip(given, ctx.needs_input_grad, strict=False)
        wanted = [tensor for tensor, needs in asked if needs and tensor is not None]
        with torch.enable_grad():
            for tensor in wanted:
                tensor.requires_grad_()
            logits = ctx.head._decoded_logits(*given)
        found = iter(torch.autograd.grad(logits, wanted, grad))
        return *(next(found) if needs else None for needs in ctx.needs_input_grad[:3]), None
