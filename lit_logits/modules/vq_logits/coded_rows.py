"""`CodedRows`: a (V, d) layer or table as residual product codes, with the mapping kept as it is stored.

Letters: d hidden size, V vocabulary, K codes, G groups of width d/G, S stages, of which token v owns S_v.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_logits.functional.bit_packing import code_bits, pack_bits, unpack_bits
from lit_logits.functional.checks import check_finite, check_not_negative
from lit_logits.functional.code_tiers import stages_by_rank
from lit_logits.functional.codebook import Footprint
from lit_logits.functional.distributed import broadcast_
from lit_logits.functional.residual_codes import MetricKind
from lit_logits.functional.residual_rows import StageCodes, decode_rows, decode_token_rows, stage_codes, stage_places
from lit_logits.modules.vq_logits.fit import check_codebook_size, check_smoothing, default_stages, fit_output_layer
from lit_logits.modules.vq_logits.tables import PackedMapping, TableCache, is_traced

__all__ = ["CodedRows", "stages_of_sizes"]

_INIT_STD = 0.02


class CodedRows(PackedMapping):
    """Rows that are sums of codes: one from each of G groups, in one or more residual stages. They start at random.

    Args:
        hidden_size: d.
        vocab_size: V.
        codebook_size: K, in [1, V].
        num_groups: G, a divisor of d.
        num_stages: S, which all tokens own, or tiers {frequency rank: stages}; see `stages_by_rank`. Default 1, or up
            to 5 with a budget.
        byte_budget: share of the bfloat16 rows that the codes may take; `fit` chooses the tiers by it.
        token_stages: S_v of each token (V,), or one number for all, if it is known; at most S.
        metric: what of a second moment `fit` uses; see `metric_matrix`.
        smoothing: share of the weights of tokens that `fit` spreads evenly; see `fit_output_layer`.
        num_sweeps: passes of `fit` that renew all codes after the first; see `fit_output_layer`.

    Attributes:
        codebook: (S, G, K, d/G) parameter.
        packed_codes: (⌈Σ_v S_v · G · ⌈log2 K⌉ / 8⌉,) uint8 buffer: stage after stage, in each the tokens that own it.
        packed_stages: uint8 buffer of S_v − 1 in ⌈log2 S⌉ bits each; empty where all tokens own all stages.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> codes = CodedRows(hidden_size=8, vocab_size=100, codebook_size=16, num_groups=4, token_stages=2)
        >>> codes.rows(torch.tensor([[3, 99]])).shape
        torch.Size([1, 2, 8])
    """

    codebook: nn.Parameter
    settled_buffers: ClassVar[tuple[str, ...]] = ("packed_codes", "packed_stages")  # see `SettledHead`
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
        metric: MetricKind = "full",
        smoothing: float = 0.0,
        num_sweeps: int = 2,
    ) -> None:
        super().__init__()
        check_codebook_size(codebook_size, vocab_size)
        if num_groups < 1 or hidden_size % num_groups:
            good = f" Groups of 8 dimensions are a good size: {hidden_size // 8}." if hidden_size % 8 == 0 else ""
            raise ValueError(
                f"Expected `num_groups` to divide the hidden size {hidden_size}, but got {num_groups}.{good}"
            )
        check_not_negative(num_sweeps=num_sweeps)
        check_smoothing(smoothing)
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
        self.metric, self.smoothing, self.num_sweeps = metric, smoothing, num_sweeps
        self.num_stages = num_stages if isinstance(num_stages, int) else int(stages.max())
        if self.num_stages < int(stages.max()):
            raise ValueError(
                f"Expected `num_stages` to be at least {int(stages.max())}, the most of a token, but got {num_stages}."
            )
        shape = self.num_stages, num_groups, codebook_size, hidden_size // num_groups
        self.codebook = nn.Parameter(torch.randn(shape) * _INIT_STD)
        codes = torch.randint(codebook_size, (int(stages.sum()) * num_groups,))
        self.register_buffer("packed_codes", pack_bits(codes, code_bits(codebook_size)))
        self.register_buffer("packed_stages", self._pack_stages(stages))
        self._tables = TableCache()
        self.register_load_state_dict_pre_hook(_take_over_sizes)

    # ------------------------------------------------------------------ rows

    def rows(self, tokens: Tensor) -> Tensor:
        """Return the rows W_v (..., d) of token ids (...), and decode no others."""
        stages = self.stages()
        if is_traced():
            places = stage_places(stages, self.vocab_size)
        else:
            sources = (self.packed_codes, self.packed_stages)
            places = self._tables.get("places", sources, lambda: stage_places(stages, self.vocab_size))
        return decode_token_rows(tokens, self.codebook, stages, places)

    def dense_weight(self) -> Tensor:
        """Return all rows W_v (V, d)."""
        return decode_rows(self.codebook, self.stages(), self.vocab_size)

    def footprint(self) -> Footprint:
        """Return parameters and bytes as stored, and those of the dense rows in the same dtype."""
        itemsize, dense = self.codebook.dtype.itemsize, self.vocab_size * self.hidden_size
        mapping = self.packed_codes.numel() + self.packed_stages.numel()
        return Footprint(self.codebook.numel(), self.codebook.numel() * itemsize + mapping, dense, dense * itemsize)

    def stage_sizes(self) -> list[int]:
        """Return how many tokens own each of the S stages."""
        sizes = [stage.codes.shape[0] for stage in self.stages()]
        return sizes + [0] * (self.num_stages - len(sizes))

    # ------------------------------------------------------------------ the mapping

    def train(self, mode: bool = True) -> "CodedRows":
        """Switch between training and evaluation, and forget what was unpacked.

        Writing through `.data`, as some optimizers do, does not change a tensor's version, which the cache goes by. The
        mapping stays unpacked, as no optimizer writes to it: code that is traced needs it.
        """
        self._tables.clear(but="stages")
        return super().train(mode)

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

    def _unpacked(self) -> object:
        return self.stages()

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
    def set_codes(self, codebook: Tensor, codes: Tensor, token_stages: Tensor) -> None:
        """Replace codes, on this rank only.

        Args:
            codebook: (S, G, K, d/G); last stages that are missing become zero.
            codes: (Σ_v S_v · G,) integers in [0, K), as `fit_residual_codes` gives them.
            token_stages: (V,) S_v in [1, S], which may differ from those before.

        Raises:
            ValueError: If a shape differs, a code is out of range or a value is not finite; nothing is written then.
        """
        _check_stages(token_stages, self.vocab_size)
        count = int(token_stages.sum()) * self.num_groups
        missing = self.num_stages - codebook.shape[0]
        if missing > 0:
            codebook = torch.cat([codebook, codebook.new_zeros(missing, *codebook.shape[1:])])
        for name, value, shape in (("codebook", codebook, tuple(self.codebook.shape)), ("codes", codes, (count,))):
            if tuple(value.shape) != shape:
                raise ValueError(f"Expected `{name}` to have shape {shape}, but got {tuple(value.shape)}.")
        check_finite(codebook, "codebook")
        if int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size or int(token_stages.max()) > self.num_stages:
            raise ValueError(
                f"Expected codes in [0, {self.codebook_size}) and up to {self.num_stages} stages, but got"
                f" [{int(codes.min())}, {int(codes.max())}] and {int(token_stages.max())}."
            )
        device = self.codebook.device
        self.codebook.copy_(codebook)
        self.packed_codes = pack_bits(codes, code_bits(self.codebook_size)).to(device)
        self.packed_stages = self._pack_stages(token_stages).to(device)
        self._tables.clear()

    def fit(
        self,
        weight: Tensor,
        *,
        token_weights: Tensor,
        second_moment: Tensor | None,
        power: float = 1.0,
        progress_bar: bool = False,
    ) -> None:
        """Fit the codes to dense rows (V, d); see `fit_output_layer`. All ranks get the codes of rank 0.

        Args:
            weight: (V, d).
            token_weights: (V,), what an error in the row of a token costs, or how often it occurs.
            second_moment: (d, d) of what the rows are multiplied with; None for the identity.
            power: exponent of the weights.
            progress_bar: show one line of progress on a terminal.
        """
        device = self.codebook.device
        fit = fit_output_layer(
            weight.to(device),
            codebook_size=self.codebook_size,
            num_groups=self.num_groups,
            num_stages=self.planned_stages,
            byte_budget=self.byte_budget,
            keep_stages=True,  # the optimizer holds the codebooks of all stages, whether tokens own them or not
            token_counts=token_weights,
            hidden_second_moment=second_moment,
            metric=self.metric,
            count_power=power,
            smoothing=self.smoothing,
            num_sweeps=self.num_sweeps,
            generator=torch.Generator(device).manual_seed(torch.initial_seed() % (1 << 63)),
            progress_bar=progress_bar,
        )
        self.set_codes(fit.codebooks, fit.codes, fit.token_stages)
        # Codes may differ by seed or by rounding. The tiers, which give the buffers their sizes, do not: they follow
        # from counts that are summed over ranks.
        broadcast_(*(tensor for tensor in self.state_dict().values() if tensor.numel()))
        self.train(self.training)  # forgets what was unpacked of this rank's codes

    def extra_repr(self) -> str:
        """Return the settings that `print(module)` shows."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, codebook_size={self.codebook_size},"
            f" num_groups={self.num_groups}, num_stages={self.num_stages}"
        )


def stages_of_sizes(stage_sizes: Sequence[int], vocab_size: int) -> Tensor:
    """Return stages (V,) of as many tokens: they give buffers their sizes, and the weights tell which tokens own one.

    Args:
        stage_sizes: how many tokens own each stage, V first.
        vocab_size: V.
    """
    stages = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    for size in stage_sizes:
        stages[:size] += 1
    return stages


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
