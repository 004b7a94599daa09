"""`ResidualVQLogitsHead`: the output layer of a pretrained model as residual product codes, tiered by frequency.

Letters: N tokens, d hidden size, V vocabulary, K codes, G groups of width d/G, S stages, of which token v owns S_v.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_logits.contracts import Calibrate, OutputLayer
from lit_logits.functional.bit_packing import code_bits, pack_bits, unpack_bits
from lit_logits.functional.checks import check_finite, check_not_negative
from lit_logits.functional.code_tiers import stages_by_rank
from lit_logits.functional.codebook import Footprint
from lit_logits.functional.distributed import broadcast_
from lit_logits.functional.lookup.lookup import LookupLayout, lookup_greedy, lookup_layout, packed_lookup_logits
from lit_logits.functional.reductions import Reduction, reduce_tokens, soft_cap
from lit_logits.functional.residual_codes import MetricKind
from lit_logits.functional.residual_vq import (
    DenseTarget,
    ResidualVQLosses,
    StageCodes,
    decode_all_rows,
    decode_rows,
    residual_vq_greedy,
    residual_vq_logits,
    residual_vq_losses,
    stage_codes,
)
from lit_logits.functional.vq_decoding import sample_logits
from lit_logits.modules.vq_logits.fit import check_codebook_size, default_stages, fit_output_layer
from lit_logits.modules.vq_logits.tables import PackedMapping, TableCache, is_traced

__all__ = ["ResidualVQLogitsHead"]

_INIT_STD = 0.02
# Hidden states; a look-up costs the same for each of them, while decoding the codes to rows is paid once. With more of
# them a matrix product is faster.
_MAX_LOOKUPS = 256


class ResidualVQLogitsHead(PackedMapping):
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

    codebook: nn.Parameter
    packed_codes: Tensor
    packed_stages: Tensor

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
        num_sweeps: int = 2,
    ) -> None:
        super().__init__()
        check_codebook_size(codebook_size, vocab_size)
        if num_groups < 1 or hidden_size % num_groups:
            raise ValueError(f"Expected `num_groups` to divide the hidden size {hidden_size}, but got {num_groups}.")
        if token_weights not in ("counts", "fisher"):
            raise ValueError(f"Expected `token_weights` to be 'counts' or 'fisher', but got {token_weights!r}.")
        check_not_negative(count_power=count_power, num_sweeps=num_sweeps)
        planned = default_stages(num_stages, byte_budget)
        if token_stages is None:
            stages = stages_by_rank(torch.ones(vocab_size, device="cpu"), planned)
        elif isinstance(token_stages, Tensor):
            stages = token_stages
        else:
            stages = torch.full((vocab_size,), token_stages, device="cpu")
        _check_stages(stages, vocab_size)
        self.hidden_size, self.vocab_size, self.codebook_size = hidden_size, vocab_size, codebook_size
        self.num_groups = num_groups
        self.planned_stages, self.byte_budget = planned, byte_budget
        self.metric, self.token_weights, self.count_power = metric, token_weights, count_power
        self.num_sweeps = num_sweeps
        self.num_stages = num_stages if isinstance(num_stages, int) else int(stages.max())
        if self.num_stages < int(stages.max()):
            raise ValueError(
                f"Expected `num_stages` to be at least {int(stages.max())}, the most of a token, but got {num_stages}."
            )
        shape = self.num_stages, num_groups, codebook_size, hidden_size // num_groups
        self.codebook = nn.Parameter(torch.randn(shape) * _INIT_STD)
        self.token_bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.logit_cap: float | None = None
        codes = torch.randint(codebook_size, (int(stages.sum()) * num_groups,))
        self.register_buffer("packed_codes", pack_bits(codes, code_bits(codebook_size)))
        self.register_buffer("packed_stages", self._pack_stages(stages))
        self._tables = TableCache()
        self.register_load_state_dict_pre_hook(_take_over_sizes)

    # ------------------------------------------------------------------ logits and loss

    def forward(self, hidden: Tensor) -> Tensor:
        """Return token logits (..., V) in nats of hidden states (..., d).

        A few hidden states on a CPU, as in decoding, are looked up; see `packed_lookup_logits`. Others, and those in
        training, are multiplied with rows that are decoded a chunk at a time, and in code that is traced with all rows.
        """
        if is_traced():
            rows = decode_all_rows(self.codebook, self.stages()).to(hidden.dtype)
            logits = soft_cap(F.linear(hidden, rows), self.logit_cap)
            return logits if self.token_bias is None else logits + self.token_bias.to(logits.dtype)
        if not self._is_decoding(hidden):
            return self._decoded_logits(hidden, self.codebook, self.token_bias)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *self.parameters())):
            return _LookUp.apply(hidden, self.codebook, self.token_bias, self)
        return self.look_up(hidden)

    def look_up(self, hidden: Tensor) -> Tensor:
        """Return the logits of `forward` for a few hidden states on a CPU, without a graph."""
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
        """Return the cross-entropy in nats, without the (N, V) logits; arguments as in `VQLogitsHead.loss`."""
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
        # The look-up is CPU code. In training its layout would be made again at each step.
        few = hidden.device.type == "cpu" and hidden.numel() <= _MAX_LOOKUPS * self.hidden_size
        trains = self.training and torch.is_grad_enabled()
        return few and not (trains and any(tensor.requires_grad for tensor in (hidden, *self.parameters())))

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

    def train(self, mode: bool = True) -> "ResidualVQLogitsHead":
        """Switch between training and evaluation, and forget what was unpacked.

        Writing through `.data`, as some optimizers do, does not change a tensor's version, which the cache goes by. The
        mapping stays unpacked, as no optimizer writes to it: code that is traced needs it.
        """
        self._tables.clear(but="stages")
        return super().train(mode)

    def _unpacked(self) -> object:
        return self.stages()

    # ------------------------------------------------------------------ the mapping

    def token_stages(self) -> Tensor:
        """Return the number of stages S_v (V,) int64 that each token owns."""
        if self.packed_stages.numel() == 0:
            return torch.full((self.vocab_size,), self.num_stages, device=self.packed_codes.device)
        return unpack_bits(self.packed_stages, code_bits(self.num_stages), self.vocab_size).long() + 1

    def stages(self) -> list[StageCodes]:
        """Return the mapping, unpacked; it is kept until the buffers are written to."""
        if is_traced():
            return self._tables.kept("stages")
        return self._tables.get("stages", (self.packed_codes, self.packed_stages), self._unpack)

    def _unpack(self) -> list[StageCodes]:
        stages = self.token_stages()
        bits, count = code_bits(self.codebook_size), int(stages.sum()) * self.num_groups
        if int(stages.max()) > self.num_stages or self.packed_codes.numel() != -(-count * bits // 8):
            raise ValueError(
                f"Expected {-(-count * bits // 8):,} bytes of codes in {self.num_stages} stages, but got"
                f" {self.packed_codes.numel():,} in {int(stages.max())}: the mapping is cut off or another head's."
            )
        codes = unpack_bits(self.packed_codes, bits, count)
        if int(codes.max()) >= self.codebook_size:
            raise ValueError(
                f"Expected codes in [0, {self.codebook_size}), but the largest is {int(codes.max())}: the mapping is"
                " damaged or another head's."
            )
        return stage_codes(stages, codes, self.num_groups)

    def _pack_stages(self, stages: Tensor) -> Tensor:
        if bool((stages == self.num_stages).all()):
            return torch.empty(0, dtype=torch.uint8, device=stages.device)
        return pack_bits(stages - 1, code_bits(self.num_stages))

    @torch.no_grad()
    def set_codes(
        self, codebook: Tensor, codes: Tensor, token_stages: Tensor, *, token_bias: Tensor | None = None
    ) -> None:
        """Replace codes, on this rank only.

        Args:
            codebook: (S, G, K, d/G); last stages that are missing become zero.
            codes: (Σ_v S_v · G,) integers in [0, K), as `fit_residual_codes` gives them.
            token_stages: (V,) S_v in [1, S], which may differ from those before.
            token_bias: (V,) in nats; None leaves it as it is.

        Raises:
            ValueError: If a shape differs, a code is out of range or a value is not finite; nothing is written then.
        """
        _check_stages(token_stages, self.vocab_size)
        count = int(token_stages.sum()) * self.num_groups
        missing = self.num_stages - codebook.shape[0]
        if missing > 0:
            codebook = torch.cat([codebook, codebook.new_zeros(missing, *codebook.shape[1:])])
        given = [("codebook", codebook, tuple(self.codebook.shape)), ("codes", codes, (count,))]
        given += [] if token_bias is None else [("token_bias", token_bias, (self.vocab_size,))]
        for name, value, shape in given:
            if tuple(value.shape) != shape:
                raise ValueError(f"Expected `{name}` to have shape {shape}, but got {tuple(value.shape)}.")
            if value.is_floating_point():
                check_finite(value, name)
        if int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size or int(token_stages.max()) > self.num_stages:
            raise ValueError(
                f"Expected codes in [0, {self.codebook_size}) and up to {self.num_stages} stages, but got"
                f" [{int(codes.min())}, {int(codes.max())}] and {int(token_stages.max())}."
            )
        if token_bias is not None and self.token_bias is None:
            raise ValueError("Expected `bias=True` for a token bias, but this head has none.")
        device = self.codebook.device
        self.codebook.copy_(codebook)
        self.packed_codes = pack_bits(codes, code_bits(self.codebook_size)).to(device)
        self.packed_stages = self._pack_stages(token_stages).to(device)
        if token_bias is not None and self.token_bias is not None:
            self.token_bias.copy_(token_bias)
        self._tables.clear()

    # ------------------------------------------------------------------ start

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
        device, count_power = self.codebook.device, self.count_power
        weights, moment = calibration.token_counts, calibration.hidden_second_moment
        if calibration.token_information is not None:  # already what an error costs, so its exponent is 1
            weights, moment, count_power = calibration.token_information, calibration.informed_second_moment, 1.0
        fit = fit_output_layer(
            layer.weight.to(device),
            codebook_size=self.codebook_size,
            num_groups=self.num_groups,
            num_stages=self.planned_stages,
            byte_budget=self.byte_budget,
            keep_stages=True,  # the optimizer holds the codebooks of all stages, whether tokens own them or not
            token_counts=weights,
            hidden_second_moment=moment,
            metric=self.metric,
            count_power=count_power,
            num_sweeps=self.num_sweeps,
            generator=torch.Generator(device).manual_seed(torch.initial_seed() % (1 << 63)),
            progress_bar=progress_bar,
        )
        bias = None if self.token_bias is None else layer.bias
        self.set_codes(fit.codebooks, fit.codes, fit.token_stages, token_bias=bias)
        # Codes may differ by seed or by rounding. The tiers, which give the buffers their sizes, do not: they follow
        # from counts that are summed over ranks.
        broadcast_(*(tensor for tensor in self.state_dict().values() if tensor.numel()))
        self.train(self.training)  # forgets what was unpacked of this rank's codes

    @property
    def can_imitate(self) -> bool:
        """Whether it can be trained to imitate: always."""
        return True

    # ------------------------------------------------------------------ inspection

    def dense_weight(self) -> Tensor:
        """Return the rows W_v of the dense (V, d) layer that gives the same logits, bias aside."""
        return decode_rows(self.codebook, self.stages(), self.vocab_size)

    def footprint(self) -> Footprint:
        """Return parameters and bytes as stored, and those of the dense head in the same dtype."""
        parameters = self.codebook.numel() + (0 if self.token_bias is None else self.token_bias.numel())
        itemsize, dense = self.codebook.dtype.itemsize, self.vocab_size * self.hidden_size
        mapping = self.packed_codes.numel() + self.packed_stages.numel()
        return Footprint(parameters, parameters * itemsize + mapping, dense, dense * itemsize)

    def extra_repr(self) -> str:
        """Return the settings that `print(module)` shows."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, codebook_size={self.codebook_size},"
            f" num_groups={self.num_groups}, num_stages={self.num_stages}, bias={self.token_bias is not None}"
        )


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


def _check_stages(stages: Tensor, vocab_size: int) -> None:
    if stages.shape != (vocab_size,) or int(stages.min()) < 1:
        raise ValueError(
            f"Expected `token_stages` to be at least 1 for each of {vocab_size} tokens, but got shape"
            f" {tuple(stages.shape)} and minimum {int(stages.min()) if stages.numel() else None}."
        )


def _take_over_sizes(module: Any, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Give the mapping the sizes of the checkpoint, whose tiers may differ; refuse another vocabulary or codebook."""
    module._tables.clear()
    codebook = state_dict.get(prefix + "codebook")
    if codebook is not None and codebook.shape != module.codebook.shape:
        raise ValueError(
            f"Expected a checkpoint with codebooks (stages, groups, codes, width) {tuple(module.codebook.shape)}, but"
            f" this one has {tuple(codebook.shape)}. Use the arguments that it was trained with."
        )
    for name in ("packed_codes", "packed_stages"):
        loaded, own = state_dict.get(prefix + name), getattr(module, name)
        if loaded is not None and loaded.shape != own.shape:
            setattr(module, name, own.new_empty(loaded.shape))
