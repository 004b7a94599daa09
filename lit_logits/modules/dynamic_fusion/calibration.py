"""`FusionCalibration`: how likely held-out texts are under many settings of fusion.

Letters: B batch, T sequence, R rows (positions with a label), V vocabulary, S experts, C candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from lit_logits.functional.dynamic_fusion import FusionCriterion, fusion_weights
from lit_logits.functional.fusion_calibration import fused_log_probs
from lit_logits.functional.fusion_problem import acting_rows, one_hot_rows, scale_weights
from lit_logits.functional.labels import IGNORE_INDEX, next_token_labels
from lit_logits.functional.prompt_fusion import prompt_fusion_weights
from lit_logits.modules.dynamic_fusion.fused_lm import FusedCausalLM
from lit_logits.modules.dynamic_fusion.reading import logits_at, prompt_targets
from lit_logits.modules.metrics import TokenMean

_TINY = 1e-30

__all__ = ["FusionCalibration", "FusionCandidate", "FusionRating"]


class FusionCandidate(NamedTuple):
    """Settings of `FusedCausalLM`: a criterion and its scale, or fixed weights, one for each expert."""

    criterion: str | None
    scale: float = 1.0
    static_alpha: tuple[float, ...] | None = None


class FusionRating(NamedTuple):
    """How a candidate did: mean negative log-likelihood in nats a token, and mean α a token, summed over experts."""

    candidate: FusionCandidate
    nll: float
    alpha: float


class FusionCalibration(nn.Module):
    """Rate settings of fusion by the likelihood of held-out texts.

    The candidates are the model's own settings, the first of them; each criterion with each scale of the grid; and each
    number of the grid as a fixed weight of all experts. The models read a batch once, and the experts once more where
    texts choose among them (`routing`). Weights of a criterion are
    searched for once and then scaled, and the fused logits of one candidate and some positions are made at a time.

    Args:
        fused: whose settings are the first candidate, and whose bounds, solver, mode and `min_entropy` hold for all.
            With a `min_entropy`, or where texts choose the expert (`routing`), the criterion `prompt`, which takes
            neither, is left out.
        scale_grid: scales and fixed weights to try; 0 is the large model alone.
        candidates: to try in place of all of these.

    Raises:
        ValueError: If the grid is empty or holds a negative or infinite number.
    """

    def __init__(
        self, fused: FusedCausalLM, scale_grid: Sequence[float], candidates: Sequence[FusionCandidate] = ()
    ) -> None:
        super().__init__()
        if not scale_grid or not all(0 <= scale < float("inf") for scale in scale_grid):
            raise ValueError(f"Expected `scale_grid` to hold finite numbers of at least 0, but got {list(scale_grid)}.")
        has_floor = fused.search_by("distance", 1.0)["min_entropy"] is not None
        criteria = [*get_args(FusionCriterion), *([] if has_floor or fused.routes else ["prompt"])]
        static = fused.static_alpha
        own = _fixed(static) if static is not None else FusionCandidate(fused.criterion, fused.scale)
        scaled = [FusionCandidate(name, float(scale)) for name in criteria for scale in scale_grid if scale]
        fixed = [_fixed([scale] * fused.num_experts) for scale in scale_grid]
        self.candidates = list(dict.fromkeys(candidates or [own, *scaled, *fixed]))
        if fused.routes and self._asks_prompts:
            raise ValueError(
                "Expected candidates without the criterion 'prompt' with routing='text', as it chooses an expert by"
                f" itself, but got {[one for one in self.candidates if one.criterion == 'prompt']}."
            )
        self.nll = nn.ModuleList(TokenMean() for _ in self.candidates)
        self.alpha = nn.ModuleList(TokenMean() for _ in self.candidates)

    @torch.no_grad()
    def update(
        self, fused: FusedCausalLM, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Take in texts (B, T); labels are those of `FusedCausalLM.score`.

        Raises:
            ValueError: As in `FusedCausalLM.score`, or if there are no experts to weigh.
        """
        if not fused.num_experts:
            raise ValueError("Expected experts whose weights are to be calibrated, but the decoder has none.")
        mask, device = fused.check_texts(input_ids, attention_mask, labels), fused.large.device
        input_ids, labels, mask = input_ids.to(device), labels.to(device), mask.to(device)
        targets, keep = next_token_labels(labels, keep=mask)
        before = mask.bool() & ((labels != IGNORE_INDEX).cumsum(1) == 0)
        prompts, in_prompt = prompt_targets(input_ids, before)
        read = keep | in_prompt if self._asks_prompts else keep
        large, base, *experts = logits_at(fused.models, input_ids, mask, read, fused.vocab_size)
        fused.check_logits(large, base, *experts)
        stacked = torch.stack(experts)
        own = keep[read]
        acting = fused.route(input_ids, mask)
        owner = read.nonzero()[:, 0]
        by_prompt = None
        if self._asks_prompts:
            at = in_prompt[read]
            rows = large[at], base[at], stacked[:, at], prompts[read][at], owner[at]
            search = fused.search_by("prompt", 1.0)
            by_prompt = prompt_fusion_weights(*rows, num_prompts=len(input_ids), **search)[:, owner[own]]
        logits = large[own], base[own], stacked[:, own]
        self._rate(fused, logits, targets[read][own], by_prompt, None if acting is None else acting[keep])

    def _rate(
        self,
        fused: FusedCausalLM,
        logits: tuple[Tensor, Tensor, Tensor],
        labels: Tensor,
        by_prompt: Tensor | None,
        acting: Tensor | None,
    ) -> None:
        """Take in rows of the models, chunk by chunk."""
        large, base, experts = logits
        for start in range(0, len(labels), fused.chunk_size):
            chunk = slice(start, start + fused.chunk_size)
            rows = large[chunk], base[chunk], experts[:, chunk]
            one = None if acting is None else acting[chunk]
            weights = self._weights(fused, rows, None if by_prompt is None else by_prompt[:, chunk], one)
            log_probs = fused_log_probs(*rows, labels[chunk], weights)
            for index, alpha in enumerate(weights):
                self.nll[index].update(-log_probs[index])  # type: ignore[operator]
                self.alpha[index].update(alpha.sum(0))  # type: ignore[operator]

    def _weights(
        self,
        fused: FusedCausalLM,
        rows: tuple[Tensor, Tensor, Tensor],
        by_prompt: Tensor | None,
        acting: Tensor | None,
    ) -> list[Tensor]:
        """Return the weights (S, R) of each candidate; with a criterion only the expert that acts has one, if known."""
        found: dict[str, Tensor] = {} if by_prompt is None else {"prompt": by_prompt}
        low, high = fused.search_by("prompt", 1.0)["bounds"]
        searched = rows if acting is None else (*rows[:2], acting_rows(rows[2], acting).unsqueeze(0))
        for name in {candidate.criterion or "prompt" for candidate in self.candidates} - {"prompt"}:
            search = fused.search_by(name, 1.0)
            # The bounds cut weights that are scaled. The paper's search itself stays within them. With others an
            # expert that acts has a weight above 0, so that it is known from those that do not.
            search["bounds"] = (low, high) if name == "distance" else (_TINY, max(1.0, high))
            alpha = fusion_weights(*searched, **search).alpha
            found[name] = alpha if acting is None else alpha * one_hot_rows(acting, len(rows[2]))
        return [
            torch.tensor(fixed, device=rows[0].device).unsqueeze(1).expand(-1, len(rows[0]))
            if fixed is not None
            else scale_weights(found[str(name)], scale, (low, high))
            for name, scale, fixed in self.candidates
        ]

    @property
    def _asks_prompts(self) -> bool:
        return any(candidate.criterion == "prompt" for candidate in self.candidates)

    def compute(self) -> list[FusionRating]:
        """Return how each candidate did on all texts of all ranks, which must all call it."""
        means = zip(self.candidates, self.nll, self.alpha, strict=True)
        return [FusionRating(one, float(nll.compute()), float(alpha.compute())) for one, nll, alpha in means]  # type: ignore[operator]

    def reset(self) -> None:
        """Forget the texts."""
        for metric in (*self.nll, *self.alpha):
            metric.reset()


def _fixed(weights: Sequence[float]) -> FusionCandidate:
    return FusionCandidate(None, static_alpha=tuple(float(weight) for weight in weights))
