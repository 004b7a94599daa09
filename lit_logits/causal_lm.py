"""`CausalLM`: a plain causal language model, trained from scratch or fine-tuned; the methods are compared with it.

Letters: B batch, T sequence, N tokens that count, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_logits.functional.checks import check_labels
from lit_logits.functional.chunks import chunked_sum, rows_a_chunk
from lit_logits.functional.reductions import at_least_float32
from lit_logits.modules.language_models.calls import accepted_inputs, counted_states
from lit_logits.modules.language_models.inspect import num_logits
from lit_logits.modules.language_models.loading import ModelOrConfig, load_plain_causal_lm
from lit_logits.modules.language_models.saving import PushesToHub, save_model_folder
from lit_logits.modules.metrics import StageMeans, loss_and_perplexity
from lit_logits.modules.optimization import TokenWindow, make_optimizers

__all__ = ["CausalLM"]


class CausalLM(PushesToHub, LightningModule):
    """A causal language model of transformers, trained by cross-entropy from scratch or from pretrained weights.

    Labels of −100 do not count, so that prompts can be masked. A step is on the mean over all tokens that count, of its
    micro-batches and ranks together, see `TokenWindow`. Logs `train/loss`, `val/loss`, `val/ppl`, `test/loss`,
    `test/ppl`. The callback `SavePretrained` writes the model for `from_pretrained`.

    Args:
        model: hub id, local folder, `.gguf` path, or the config of a new model as a mapping with `model_type`. From
            Python also a loaded model.
        vocab_size: V of the tokenizer; the CLI links it from the data. A pretrained model keeps its own (padded)
            vocabulary, which must not be smaller.
        chunk_size: tokens whose logits are in memory at a time; None goes by the memory that they take.
        optimizer: callable that takes the parameters.
        lr_scheduler: callable that takes the optimizer; stepped after every optimizer step, or once an epoch on its
            monitored value for `ReduceLROnPlateau`.

    Raises:
        ValueError: If the model cannot be loaded or does not fit the vocabulary; see `check_plain_causal_lm`.

    Example:
        >>> lm = CausalLM({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        ...     "num_attention_heads": 2}, vocab_size=100)
        >>> lm(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 100])
    """

    def __init__(
        self,
        model: ModelOrConfig,
        vocab_size: int | None = None,
        *,
        chunk_size: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        plain = isinstance(model, (str, dict))
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *([] if plain else ["model"])])
        self.model, self.output_rule = load_plain_causal_lm(model, vocab_size)
        self.model.train()  # `from_pretrained` leaves it in eval mode
        self.chunk_size = rows_a_chunk(num_logits(self.model), chunk_size)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.means = StageMeans("nll")
        self.token_window = TokenWindow()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return token logits (B, T, V) in nats; position ids are for models that take them."""
        positions = accepted_inputs(self.model, {"position_ids": position_ids})
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **positions).logits

    def _loss_sum(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy of the next tokens that count, in nats, and their number."""
        mask, hidden, labels = counted_states(self.model, batch)
        head = cast(nn.Linear, self.model.get_output_embeddings())

        def cross_entropy(rows: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(at_least_float32(self.output_rule.logits(head, rows)), targets, reduction="sum")

        return chunked_sum(cross_entropy, hidden, labels, chunk_size=self.chunk_size), mask.sum()

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Note how the first texts end, and check the labels of the first batch, on an accelerator too."""
        self.end_tokens.watch(batch)
        if batch_idx == 0:
            size = cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]
            check_labels(batch["labels"], size, wait=True)  # once, because the host waits for the device

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy over the tokens that count; a zero with a graph if none does."""
        total, count = self._loss_sum(batch)
        loss = total / count.clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        return self.token_window.weigh(loss, count, batch_idx, self._trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every token of the step weigh the same, whatever micro-batch and rank it was in."""
        self.token_window.normalize_(self.parameters(), self.trainer)

    def configure_optimizers(self) -> Any:
        """Return the injected optimizer and scheduler."""
        return make_optimizers(self.parameters(), self.optimizer, self.lr_scheduler)

    # ------------------------------------------------------------------ evaluation
    # Written out in each module, as Lightning names them: the house has no shared LightningModule base class.

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Sum the loss over tokens."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Sum the loss over tokens."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_means("test")

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        total, count = self._loss_sum(batch)
        self.means.update(stage, nll=(total / count.clamp(min=1), count))

    def _log_means(self, stage: str) -> None:
        self.log_dict(loss_and_perplexity(stage, **self.means.compute(stage)), prog_bar=True)

    # ------------------------------------------------------------------ export

    @property
    def card_text(self) -> str:
        """What was done, for the card of the saved model."""
        return "Trained by the cross-entropy of the next token (`CausalLM`)."

    def save_pretrained(self, folder: str | Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None) -> None:
        """Write the model for `from_pretrained`; see `save_model_folder`."""
        options: dict[str, Any] = {"tokenizer": tokenizer, "dtype": dtype, "trainer": self._trainer}
        save_model_folder(folder, self.model, self.card_text, end_tokens=self.end_tokens, **options)
