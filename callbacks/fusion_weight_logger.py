"""`FusionWeightLogger`: what dynamic logit fusion did at each token, as scalars, histograms and pictures.

Letters: B batch, N tokens of a text, R tokens that count, S experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lit_logits.callbacks.loggers import picture_writers
from lit_logits.callbacks.parts import check_at_least, data_tokenizer, find_part
from lit_logits.callbacks.pictures.fusion import curve_figure, text_figure
from lit_logits.callbacks.pictures.tokens import token_texts
from lit_logits.callbacks.scalars import log_scalars
from lit_logits.contracts import HasTokenizer, offers
from lit_logits.modules.dynamic_fusion.decoding import FusionTrace
from lit_logits.modules.dynamic_fusion.fused_lm import FusedCausalLM

__all__ = ["FusionWeightLogger"]

_NUM_BINS = 200


class FusionWeightLogger(Callback):
    """Log what the experts of a `FusedCausalLM` did while it predicted or was tested.

    Scalars are means over the tokens of a batch, every n batches, with the number of the batch as step:
    `fusion/alpha/EXPERT`, `fusion/active/EXPERT` (share of tokens with α ≠ 0), `fusion/kl_forward` and
    `fusion/kl_reverse` (nats a token). In tests the last two are `fusion/kl_forward_batch` and
    `fusion/kl_reverse_batch`, as the shorter names are means over the whole test.

    TensorBoard also gets pictures of the first texts, with the number of the text as step: `fusion/text`, the tokens on
    the colour of their α, and `fusion/alpha_curve`, α and divergences over the position. At the end it gets
    `fusion/alpha_hist/EXPERT`, α at all tokens.

    Of each batch the last `generate` or `score` is shown. A test therefore shows the texts that
    it scored, wrong choices included, or with `exact_match` those that it generated. Only rank zero's share of the data
    is shown.

    Args:
        every_n_batches: batches between scalars, the first included.
        num_texts: texts to draw. TensorBoard shows ten, and more with `--samples_per_plugin images=N`.
        max_tokens: tokens to draw of each text.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> FusionWeightLogger(num_texts=8).num_texts
        8
    """

    def __init__(self, every_n_batches: int = 1, num_texts: int = 4, max_tokens: int = 400) -> None:
        check_at_least(1, every_n_batches=every_n_batches, max_tokens=max_tokens)
        check_at_least(0, num_texts=num_texts)
        self.every_n_batches, self.num_texts, self.max_tokens = every_n_batches, num_texts, max_tokens
        self._warned = False
        self._handle: RemovableHandle | None = None
        self._reset(None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn once if the model has no experts to watch."""
        if stage in ("predict", "test") and not self._warned and _fused(pl_module) is None:
            self._warned = True
            rank_zero_warn("FusionWeightLogger found no FusedCausalLM with experts in the model and will do nothing.")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset histograms and counts, and watch the part from here on."""
        self._reset(_fused(pl_module))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset histograms and counts, and watch the part from here on."""
        self._reset(_fused(pl_module))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Log what was done to the batch."""
        self._log_batch(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Log what was done to the batch."""
        self._log_batch(trainer, pl_module, batch)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._stop()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the histograms."""
        self._log_histograms(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the histograms."""
        self._log_histograms(trainer, pl_module)

    # ------------------------------------------------------------------ logging

    def _reset(self, fused: FusedCausalLM | None) -> None:
        self._stop()
        self._trace: FusionTrace | None = None  # the last one of the batch
        if fused is not None:
            self._handle = fused.register_trace_hook(self._keep)
        self._num_batches = self._num_drawn = 0
        self._counts = torch.zeros(0 if fused is None else fused.num_experts, _NUM_BINS, dtype=torch.float64)
        self._sums = torch.zeros(2, len(self._counts), dtype=torch.float64)  # of α and of α²

    def _keep(self, trace: FusionTrace) -> None:
        self._trace = trace

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _log_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        fused, number = _fused(pl_module), self._num_batches
        self._num_batches += 1
        trace, self._trace = self._trace, None
        if fused is None or trace is None or not trainer.is_global_zero:
            return
        alpha = trace.alpha[:, trace.mask]
        if alpha.shape[1] == 0:
            return
        if number % self.every_n_batches == 0:
            self._log_scalars(trainer, fused, trace, number)
        self._count(alpha.double().cpu(), *_alpha_range(fused))
        tokenizer = (pl_module.tokenizer if offers(pl_module, HasTokenizer) else None) or data_tokenizer(trainer)
        for index, kept in enumerate(trace.mask if picture_writers(trainer) else ()):
            if self._num_drawn < self.num_texts and bool(kept.any()):
                text, num_tokens = _text_trace(trace, index, self.max_tokens), int(kept.sum())
                size = f"first {self.max_tokens} of " if num_tokens > self.max_tokens else ""
                name = f"batch {number}, {_text_name(batch, index, len(trace.mask))}, {size}{num_tokens} tokens"
                self._draw(trainer, fused, text, tokenizer, name)

    def _log_scalars(self, trainer: Trainer, fused: FusedCausalLM, trace: FusionTrace, number: int) -> None:
        alpha, suffix = trace.alpha[:, trace.mask].float(), "_batch" if trainer.testing else ""
        values = {f"fusion/alpha/{name}": mean for name, mean in zip(fused.expert_names, alpha.mean(1), strict=True)}
        active = (alpha != 0).float().mean(1)
        values |= {f"fusion/active/{name}": share for name, share in zip(fused.expert_names, active, strict=True)}
        values[f"fusion/kl_forward{suffix}"] = trace.kl_forward[trace.mask].mean()
        values[f"fusion/kl_reverse{suffix}"] = trace.kl_reverse[trace.mask].mean()
        log_scalars(trainer, {name: float(value) for name, value in values.items()}, step=number)

    def _count(self, alpha: Tensor, low: float, high: float) -> None:
        """Add weights (S, R) to the histograms."""
        for counts, values in zip(self._counts, alpha, strict=True):
            counts += torch.histc(values.clamp(low, high), _NUM_BINS, low, high)
        self._sums += torch.stack([alpha.sum(1), alpha.square().sum(1)])

    def _draw(self, trainer: Trainer, fused: FusedCausalLM, text: FusionTrace, tokenizer: Any, name: str) -> None:
        """Draw two figures of one text, as `_text_trace` returns it."""
        pieces, names = token_texts(text.token_ids.tolist(), tokenizer), fused.expert_names
        alpha_range = _alpha_range(fused)
        for writer in picture_writers(trainer):
            curves = curve_figure(pieces, *text[2:], expert_names=names, alpha_range=alpha_range, title=name)
            writer.add_figure("fusion/alpha_curve", curves, self._num_drawn)
            picture = text_figure(pieces, text.alpha, expert_names=names, alpha_range=alpha_range, title=name)
            writer.add_figure("fusion/text", picture, self._num_drawn)
        self._num_drawn += 1

    def _log_histograms(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        fused = _fused(pl_module)
        if fused is None or not trainer.is_global_zero or not self._counts.any():
            return
        low, high = _alpha_range(fused)
        edges = torch.linspace(low, high, _NUM_BINS + 1)[1:].tolist()
        for writer in picture_writers(trainer):
            for index, name in enumerate(fused.expert_names):
                counts, (total, squares) = self._counts[index], self._sums[:, index].tolist()
                writer.add_histogram_raw(
                    f"fusion/alpha_hist/{name}",
                    min=low,
                    max=high,
                    num=int(counts.sum()),
                    sum=total,
                    sum_squares=squares,
                    bucket_limits=edges,
                    bucket_counts=counts.tolist(),
                    global_step=0,
                )


def _fused(pl_module: LightningModule) -> FusedCausalLM | None:
    """Return the part to watch, or None if the model has no experts."""
    fused = find_part(pl_module, FusedCausalLM)
    return fused if fused is not None and fused.num_experts else None


def _alpha_range(fused: FusedCausalLM) -> tuple[float, float]:
    """Return the range of α: from 0, or a negative fixed weight, to the largest that α can be."""
    values = fused.search["bounds"] if fused.static_alpha is None else fused.static_alpha
    low, high = min(0.0, *values), max(0.0, *values)
    return low, high if high > low else low + 1.0


def _text_trace(trace: FusionTrace, index: int, max_tokens: int) -> FusionTrace:
    """Return the first tokens that count of one text, without the dimension B."""
    kept = trace.mask[index].nonzero().squeeze(1)[:max_tokens]
    return FusionTrace(*(tensor[..., index, kept].detach().cpu() for tensor in trace))


def _text_name(batch: Any, index: int, count: int) -> str:
    """Return where one of the `count` texts of a batch comes from, such as `text 1 (row 25)`."""
    rows = batch.get("rows") if isinstance(batch, Mapping) else None
    if rows is not None and len(rows) > count and "correct" in batch:
        rows = rows[batch["correct"].bool()]  # only the right one of several choices is generated for
    if rows is None or len(rows) == 0 or count % len(rows):
        return f"text {index}"
    copies = count // len(rows)
    sample = f", sample {index % copies}" if copies > 1 else ""
    return f"text {index} (row {int(rows[index // copies])}{sample})"
