"""`CodebookMonitor`: how the codes of a vector-quantised head are used, as scalars, a picture and text.

Letters: V vocabulary, K codes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_logits.callbacks.loggers import picture_writers
from lit_logits.callbacks.parts import check_at_least, check_min_usage, data_tokenizer, find_part
from lit_logits.callbacks.pictures.codebook import CodeTokens, tokens_figure, usage_figure
from lit_logits.callbacks.pictures.tokens import visible_token
from lit_logits.callbacks.scalars import log_scalars
from lit_logits.contracts import StagedHead, WatchedHead
from lit_logits.functional.codebook import code_perplexity

__all__ = ["CodebookMonitor"]

_MAX_SNAPSHOTS = 256


class CodebookMonitor(Callback):
    """Log how a codebook is used, and show what its codes mean; of a `HierarchicalVQLogitsHead` its clusters.

    Scalars, every n optimizer steps: `vq/used_codes` (codes that carry targets), `vq/code_perplexity` (exponential of
    the entropy of their use), `vq/dead_codes` (codes that own no token or carry less than `min_usage` of an even
    share; where tokens have codes of further stages, `vq/dead_stage_codes` counts those), `vq/ppl_floor` (the
    perplexity below which no backbone gets). After each validation TensorBoard gets
    `vq/usage`, a heat map of use over training, and `vq/tokens`, the most frequent tokens of some codes, as a picture
    and as text. Warns once when the floor, and not the backbone, limits the perplexity.

    Args:
        every_n_steps: optimizer steps between looks.
        min_usage: share below which a code counts as dead, in units of the even share 1/K.
        target_ppl: perplexity that the user trains for; warns as soon as the floor is above 80 % of it.
        num_codes: codes to show the tokens of, spread evenly from the most to the least used.
        num_tokens: tokens to show of each.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> CodebookMonitor(every_n_steps=20).num_codes
        16
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        min_usage: float = 0.01,
        target_ppl: float | None = None,
        num_codes: int = 16,
        num_tokens: int = 12,
    ) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        check_min_usage(min_usage)
        self.every_n_steps, self.min_usage, self.target_ppl = every_n_steps, min_usage, target_ppl
        self.num_codes, self.num_tokens = num_codes, num_tokens
        self.last_step, self.stride, self.looks = -1, 1, 0
        self.steps: list[int] = []
        self.snapshots: list[Tensor] = []
        self.warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the model has no head to watch."""
        if find_part(pl_module, WatchedHead) is None:
            rank_zero_warn(
                "CodebookMonitor found no head with codes in the model, such as a VQLogitsHead, and will do nothing."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log scalars and remember the usage when a multiple of `every_n_steps` has just been reached."""
        step, head = trainer.global_step, find_part(pl_module, WatchedHead)
        # With gradient accumulation several batches end at the same step.
        if head is None or step in (0, self.last_step) or (step % self.every_n_steps and step != 1):
            return
        self.last_step = step
        usage, floor = head.usage(), float(head.ppl_floor())
        scalars = {
            "vq/used_codes": float((usage > 0).sum()),
            "vq/code_perplexity": float(code_perplexity(usage)),
            "vq/dead_codes": float(head.dead_codes(self.min_usage).numel()),
            "vq/ppl_floor": floor,
        }
        if isinstance(head, StagedHead):
            scalars["vq/dead_stage_codes"] = float(sum(dead.numel() for dead in head.dead_stage_codes(self.min_usage)))
        log_scalars(trainer, scalars)
        if self.target_ppl is not None and floor > 0.8 * self.target_ppl:
            self._warn(floor, f"`target_ppl` is {self.target_ppl:g}")
        self._remember(step, usage.float().cpu())  # pictures cannot draw bfloat16

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the heat map, show tokens of codes, and compare the floor with the perplexity of this validation."""
        head = find_part(pl_module, WatchedHead)
        if head is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        reached = trainer.callback_metrics.get("val/ppl")
        if reached is not None and float(head.ppl_floor()) > 0.8 * float(reached):
            self._warn(float(head.ppl_floor()), f"validation reached {float(reached):.2f}")
        tokenizer = data_tokenizer(trainer)
        for writer in picture_writers(trainer):
            codes = self._code_tokens(head, tokenizer)
            writer.add_figure("vq/tokens", tokens_figure(codes), trainer.global_step)
            writer.add_text("vq/tokens", _table(codes), trainer.global_step)
            if self.snapshots:
                usage = usage_figure(torch.stack(self.snapshots), self.steps)
                writer.add_figure("vq/usage", usage, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the usage so far, so that a resumed run draws the whole picture."""
        snapshots = torch.stack(self.snapshots) if self.snapshots else None
        return {
            "last_step": self.last_step,
            "looks": self.looks,
            "stride": self.stride,
            "steps": self.steps,
            "snapshots": snapshots,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the usage of the run before."""
        self.last_step, self.looks, self.stride = (state_dict[name] for name in ("last_step", "looks", "stride"))
        self.steps = list(state_dict["steps"])
        snapshots = state_dict["snapshots"]
        self.snapshots = [] if snapshots is None else list(snapshots)

    def _remember(self, step: int, usage: Tensor) -> None:
        """Keep fewer than `_MAX_SNAPSHOTS`, evenly spaced: at that many, drop every second, now and from then on."""
        self.looks += 1
        if self.looks % self.stride:
            return
        self.steps.append(step)
        self.snapshots.append(usage)
        if len(self.steps) >= _MAX_SNAPSHOTS:
            self.steps, self.snapshots, self.stride = self.steps[1::2], self.snapshots[1::2], 2 * self.stride

    def _warn(self, floor: float, against: str) -> None:
        if not self.warned:
            self.warned = True
            rank_zero_warn(
                f"The mapping of tokens to codes allows no perplexity below {floor:.2f}, and {against}: a better"
                " backbone will not help. Use a larger `codebook_size`, `bias=True` or a `learned` mapping."
            )

    def _code_tokens(self, head: WatchedHead, tokenizer: Any) -> list[CodeTokens]:
        """Return some codes with their most frequent tokens."""
        usage, sizes = head.usage(), torch.bincount(head.token_to_code, minlength=head.codebook_size)
        order = usage.argsort(descending=True)
        picks = torch.linspace(0, order.numel() - 1, min(self.num_codes, order.numel())).round().long()
        codes = []
        for code in order[picks.to(order.device)].tolist():
            tokens = (head.token_to_code == code).nonzero().squeeze(1)
            top = tokens[head.token_counts[tokens].argsort(descending=True, stable=True)][: self.num_tokens].tolist()
            words = [str(token) if tokenizer is None else visible_token(tokenizer.decode([token])) for token in top]
            codes.append(CodeTokens(code, usage[code].item(), int(sizes[code]), words))
        return codes


def _table(codes: Sequence[CodeTokens]) -> str:
    """Return a Markdown table of codes."""
    rows = ["| code | share of targets | tokens | most frequent |", "|---|---|---|---|"]
    for code, share, size, tokens in codes:
        words = " ".join(f"`{token.replace('|', '&#124;').replace('`', chr(39))}`" for token in tokens)
        rows.append(f"| {code} | {share:.3%} | {size} | {words} |")
    return "\n".join(rows)
