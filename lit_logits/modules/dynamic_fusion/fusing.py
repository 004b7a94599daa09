"""Models whose logits are fused, position by position, and the weights that each position gets.

Letters: R rows (positions that count), V vocabulary, S experts.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_logits.functional.checks import may_read
from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.functional.dynamic_fusion import (
    FusionCriterion,
    FusionMode,
    FusionSolver,
    fuse_logits,
    fusion_weights,
)
from lit_logits.functional.fusion_problem import acting_rows, expert_divergences, one_hot_rows
from lit_logits.functional.prompt_fusion import prompt_fusion_weights
from lit_logits.functional.reductions import at_least_float32
from lit_logits.modules.dynamic_fusion.decoding import FusedStep, FusionTrace
from lit_logits.modules.dynamic_fusion.inputs import check_static_alpha
from lit_logits.modules.dynamic_fusion.routing import FusionRouting
from lit_logits.modules.language_models.frozen import FrozenModels
from lit_logits.modules.language_models.inspect import num_logits

__all__ = ["FusedModels"]


class FusedModels(FrozenModels):
    """The half of `FusedCausalLM` that fuses logits, where the other reads texts; arguments are those of that class."""

    def __init__(
        self,
        large: PreTrainedModel,
        base: PreTrainedModel | None = None,
        experts: Sequence[PreTrainedModel] = (),
        *,
        expert_names: Sequence[str] | None = None,
        vocab_size: int | None = None,
        criterion: FusionCriterion | Literal["prompt"] = "distance",
        solver: FusionSolver = "tilting",
        mode: FusionMode = "single",
        bounds: tuple[float, float] = (0.0, 2.0),
        step: float = 0.1,
        scale: float = 1.0,
        min_entropy: float | None = None,
        routing: FusionRouting = "step",
        static_alpha: float | Sequence[float] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if experts and base is None:
            raise ValueError(f"Expected a `base` for {len(experts)} expert(s), but got None.")
        small = [base, *experts] if base is not None else []
        super().__init__(large, *small, keep_dtype=True)
        self.num_experts = len(experts)
        self.expert_names = list(expert_names or [f"expert_{number}" for number in range(len(experts))])
        self.vocab_size = vocab_size or min(num_logits(model) for model in self.models)
        self.criterion = criterion
        self.scale = scale
        self._limits = {"mode": mode, "bounds": bounds}
        self._steps = {"solver": solver, "step": step, "min_entropy": min_entropy}
        if criterion == "prompt" and min_entropy is not None:
            raise ValueError(
                f"Expected no `min_entropy` with criterion='prompt', whose weight holds for a whole text, but got"
                f" {min_entropy}."
            )
        if routing not in get_args(FusionRouting):
            raise ValueError(f"Expected `routing` to be one of {get_args(FusionRouting)}, but got {routing!r}.")
        self.routing = routing
        if self.routes and (criterion == "prompt" or mode == "joint"):
            raise ValueError(
                "Expected routing='step' with criterion='prompt', which chooses an expert by itself, and with"
                f" mode='joint', where all act, but got routing='text', criterion={criterion!r} and mode={mode!r}."
            )
        # Beside the models' logits there are the fused ones and what the search keeps for each position.
        self.chunk_size = rows_a_chunk((len(self.models) + 4) * self.vocab_size, chunk_size)
        self.static_alpha = check_static_alpha(static_alpha, len(experts))
        self._trace_hooks: OrderedDict[int, Callable[[FusionTrace], Any]] = OrderedDict()
        if experts:  # wrong arguments of the search are refused now, not at the first token
            zeros, none = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
            if criterion == "prompt":
                prompt_fusion_weights(zeros, zeros, zeros.unsqueeze(0), none, **self.search)
            else:
                fusion_weights(zeros, zeros, zeros.unsqueeze(0), **self.search)

    @property
    def search(self) -> dict[str, Any]:
        """The arguments of the search for weights."""
        return self.search_by(self.criterion, self.scale)

    def search_by(self, criterion: str, scale: float) -> dict[str, Any]:
        """Return arguments of `fusion_weights`, or of `prompt_fusion_weights`, for a criterion and a scale."""
        shared = {**self._limits, "scale": scale}
        return shared if criterion == "prompt" else {**shared, "criterion": criterion, **self._steps}

    @property
    def large(self) -> PreTrainedModel:
        """The model that is specialised."""
        return self.models[0]

    @property
    def base(self) -> PreTrainedModel | None:
        """The small base."""
        return self.models[1] if len(self.models) > 1 else None

    @property
    def experts(self) -> tuple[PreTrainedModel, ...]:
        """The small experts."""
        return self.models[2:]

    @property
    def is_active(self) -> bool:
        """Whether any expert can act."""
        return self.num_experts > 0 and (self.static_alpha is None or any(self.static_alpha))

    @property
    def routes(self) -> bool:
        """Whether texts choose the expert that acts."""
        return self.routing == "text" and self.num_experts > 1

    @property
    def _searches(self) -> bool:
        """Whether weights are searched for."""
        return self.num_experts > 0 and self.static_alpha is None

    @property
    def _asks_prompts(self) -> bool:
        return self.criterion == "prompt" and self._searches

    @property
    def _labels(self) -> list[str]:
        return ["large model", "base", *(f"expert {name!r}" for name in self.expert_names)]

    @property
    def _named_models(self) -> dict[str, PreTrainedModel]:
        return dict(zip(self._labels, self.models, strict=False))

    def register_trace_hook(self, hook: Callable[[FusionTrace], Any]) -> RemovableHandle:
        """Call `hook` with the trace of every `generate` and `score` from now on.

        Returns:
            The handle whose `remove()` ends that.
        """
        handle = RemovableHandle(self._trace_hooks)
        self._trace_hooks[handle.id] = hook
        return handle

    def _hand_out(self, trace: FusionTrace) -> FusionTrace:
        for hook in self._trace_hooks.values():
            hook(trace)
        return trace

    # ------------------------------------------------------------------ fusing

    def fuse(
        self,
        large_logits: Tensor,
        small_logits: Sequence[Tensor],
        alpha: Tensor | None = None,
        *,
        acting: Tensor | None = None,
    ) -> FusedStep:
        """Return the fused logits, weights and divergences of some positions.

        Args:
            large_logits: (R, V).
            small_logits: (R, V) of the base and of each expert; if empty, the logits stay the large model's.
            alpha: (S, R) weights to take; default those that the arguments of the class ask for.
            acting: (R,) the number of the expert whose weight is searched for; default as the criterion chooses.

        Raises:
            ValueError: If a model emits NaN or +inf; the error names it.
        """
        large = at_least_float32(large_logits)
        if not small_logits or len(large) == 0:
            self.check_logits(large)
            zero = large.new_zeros(len(large))
            return FusedStep(large, large.new_zeros(self.num_experts, len(large)), zero, zero)
        base, experts = small_logits[0], torch.stack(list(small_logits[1:]))
        if alpha is None and self.static_alpha is None:
            searched = experts if acting is None else acting_rows(experts, acting).unsqueeze(0)
            if acting is not None and may_read(large):
                self.check_logits(large, base, *experts)  # also those that do not act here
            try:
                found = fusion_weights(large, base, searched, **self.search)
            except ValueError:  # it checks the numbers too, but does not know whose they are
                self.check_logits(large, base, *experts)
                raise
            alpha = found.alpha if acting is None else found.alpha * one_hot_rows(acting, len(experts))
            return FusedStep(fuse_logits(large, base, searched, found.alpha), alpha, *found[2:4])
        self.check_logits(large, base, *experts)
        if alpha is None:
            alpha = large.new_tensor(self.static_alpha).unsqueeze(1).expand(-1, len(large))
        fused = fuse_logits(large, base, experts, alpha)
        forward, reverse = expert_divergences(large, fused.unsqueeze(0))
        return FusedStep(fused, alpha, forward.squeeze(0), reverse.squeeze(0))

    def check_logits(self, *all_logits: Tensor) -> None:
        """Refuse NaN and +inf in logits (..., V) of the large model, the base and the experts, in this order.

        Raises:
            ValueError: If there are any; the error names the model.
        """
        for name, logits in zip(self._labels, all_logits, strict=False):
            self._refuse_broken(name, logits)

    def _refuse_broken(self, name: str, logits: Tensor) -> None:
        if not bool((logits < torch.inf).all()):  # NaN is not below either
            raise ValueError(
                f"Expected the {name} to emit logits that are finite or −inf, but got NaN or +inf. Check its"
                " weights, or load it in another dtype (float16 overflows)."
            )

    def _fuse_rows(
        self, rows: Sequence[Tensor], alpha: Tensor | None = None, acting: Tensor | None = None
    ) -> Iterator[FusedStep]:
        """Yield the fused steps of logits (R, V) of all models, in chunks.

        Args:
            rows: of the large model, the base and the experts.
            alpha: (S, R) weights, if they are known.
            acting: (R,) the experts that act, if they are.
        """
        for start in range(0, max(1, len(rows[0])), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            own = None if alpha is None else alpha[:, chunk]
            one = None if acting is None else acting[chunk]
            yield self.fuse(rows[0][chunk], [logits[chunk] for logits in rows[1:]], own, acting=one)
