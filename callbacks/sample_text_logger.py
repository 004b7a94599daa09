"""`SampleTextLogger`: what a language model writes, after each validation.

Letters: B samples, T positions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lit_logits.callbacks.loggers import picture_writers
from lit_logits.callbacks.parts import (
    averaged_weights,
    check_at_least,
    data_tokenizer,
    find_part,
    trained_so_far,
)
from lit_logits.contracts import ContinuesPrompts
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.modules.language_models.end_tokens import end_candidates
from lit_logits.modules.language_models.inspect import trained_model_name

__all__ = ["SampleTextLogger"]


class _Sample(NamedTuple):
    prompt: Tensor  # (T,) token ids
    response: Tensor  # those that the data have behind it


class SampleTextLogger(Callback):
    """Write to TensorBoard, as texts, how the model continues the first prompts of the validation set.

    After each validation, `samples/0`, `samples/1`, … hold a prompt, what the model writes behind it, the likeliest
    token each time, and what the data have there. A prompt is what comes before the first label; where labels begin at
    once, as in running text, it is the first `prompt_tokens` tokens. It serves every LightningModule that holds a
    language model of transformers, or has `generate` (contract `ContinuesPrompts`). Other loggers get nothing. Rank
    zero generates alone, so strategies that keep the weights in pieces get nothing either, and a warning tells.

    Args:
        num_prompts: samples, of the first validation loader.
        max_new_tokens: most tokens to write; a token that may end a text stops earlier.
        prompt_tokens: length of the prompts of running text.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> SampleTextLogger(num_prompts=2).max_new_tokens
        64
    """

    def __init__(self, num_prompts: int = 4, max_new_tokens: int = 64, prompt_tokens: int = 32) -> None:
        check_at_least(1, num_prompts=num_prompts, max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens)
        self.num_prompts, self.max_new_tokens, self.prompt_tokens = num_prompts, max_new_tokens, prompt_tokens
        self._samples: list[_Sample] = []
        self._serves = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if there is nothing to serve."""
        lacking = _lacking(trainer, pl_module)
        self._serves = lacking is None and trainer.is_global_zero
        if lacking is not None and stage in ("fit", "validate"):
            rank_zero_warn(f"SampleTextLogger found {lacking} and will do nothing.")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the prompts of the validation before."""
        self._samples = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the prompts of the first batches."""
        wanted = self._serves and not trainer.sanity_checking and dataloader_idx == 0 and bool(picture_writers(trainer))
        if wanted and len(self._samples) < self.num_prompts and isinstance(batch, Mapping) and "input_ids" in batch:
            self._samples += _samples(batch, self.num_prompts - len(self._samples), self.prompt_tokens)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompts, and write the texts."""
        if not self._samples:
            return
        tokenizer, step = data_tokenizer(trainer), trained_so_far(trainer).step
        averages, precision = averaged_weights(trainer, pl_module), trainer.precision_plugin.forward_context()
        with averages, _evaluating(pl_module), precision:
            written = [self._continue(pl_module, tokenizer, sample.prompt) for sample in self._samples]
        for number, (sample, tokens) in enumerate(zip(self._samples, written, strict=True)):
            text = "".join(
                f"**{title}**\n\n{_as_code(tokenizer.decode(ids.tolist()))}\n\n"
                for title, ids in (("prompt", sample.prompt), ("written", tokens), ("in the data", sample.response))
            )
            for writer in picture_writers(trainer):
                writer.add_text(f"samples/{number}", text, step)

    @torch.no_grad()
    def _continue(self, pl_module: LightningModule, tokenizer: Any, prompt: Tensor) -> Tensor:
        """Return the tokens behind a prompt, which is cut in front to the context of the model."""
        holder = find_part(pl_module, PreTrainedModel)
        context = getattr(holder.config.get_text_config(), "max_position_embeddings", None) if holder else None
        count = min(self.max_new_tokens, (context or self.max_new_tokens + 1) - 1)
        prompt = prompt[-(context - count) :] if context else prompt
        ids, ends = prompt.unsqueeze(0), end_candidates(tokenizer)
        options: dict[str, Any] = {"max_new_tokens": count, "eos_token_id": ends or None}
        if isinstance(pl_module, ContinuesPrompts):
            return pl_module.generate(ids, torch.ones_like(ids), **options)[0, len(prompt) :]
        model: Any = pl_module.get_submodule(trained_model_name(pl_module) or "")
        greedy = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": (ends or [0])[0],
        }
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **greedy)[0, len(prompt) :]


def _lacking(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Return what is there that this cannot serve, or None."""
    strategy = trainer.strategy
    if type(strategy).lightning_module_state_dict is not Strategy.lightning_module_state_dict:
        return f"{type(strategy).__name__}, which may keep the weights in pieces,"
    if not isinstance(pl_module, ContinuesPrompts) and trained_model_name(pl_module) is None:
        return f"no language model in {type(pl_module).__name__}"
    return None if data_tokenizer(trainer) is not None else "no `tokenizer` of a data module"


def _samples(batch: Mapping[str, Tensor], count: int, prompt_tokens: int) -> list[_Sample]:
    """Return prompts and responses of the first rows, without wrong choices and rows that have nothing to read."""
    input_ids = batch["input_ids"]
    labels, mask = batch.get("labels", input_ids), batch.get("attention_mask", torch.ones_like(input_ids)).bool()
    rows = range(len(input_ids)) if "correct" not in batch else batch["correct"].nonzero().flatten().tolist()
    found = []
    for row in rows:
        ids, is_label = input_ids[row][mask[row]], (labels[row] != IGNORE_INDEX)[mask[row]]
        first = int(is_label.int().argmax()) if bool(is_label.any()) else len(ids)
        begin = first if first > 1 else min(prompt_tokens, len(ids))  # a text may begin with a token that is no label
        if begin:
            found.append(_Sample(ids[:begin], ids[begin:]))
    return found[:count]


@contextmanager
def _evaluating(pl_module: LightningModule) -> Iterator[None]:
    """Evaluate all parts, and restore the mode of each."""
    modes = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _as_code(text: str) -> str:
    """Indent a text, so that Markdown shows it as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
