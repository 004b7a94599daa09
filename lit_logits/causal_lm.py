"""`CausalLM`: a plain causal language model, trained from scratch or fine-tuned; the methods are compared with it.

Letters: B batch, T sequence, N tokens that count, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_logits.functional.checks import check_labels, check_not_negative
from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.modules.language_models.calls import text_inputs
from lit_logits.modules.language_models.healing import HealingLosses, healing_losses, keep_original_lm
from lit_logits.modules.language_models.inspect import freeze_tables, num_embeddings, num_logits
from lit_logits.modules.language_models.loading import ModelOrConfig, load_plain_causal_lm
from lit_logits.modules.language_models.pruning import cut_layers
from lit_logits.modules.language_models.saving import PushesToHub, save_model_folder
from lit_logits.modules.metrics import StageMeans, loss_and_perplexity
from lit_logits.modules.optimization import TokenWindow, make_optimizers

__all__ = ["CausalLM"]


class CausalLM(PushesToHub, LightningModule):
    """A causal language model of transformers, trained by cross-entropy from scratch or from pretrained weights.

    Labels of −100 do not count, so that prompts can be masked. With `keep_layers` or `num_layers` a pretrained decoder
    keeps some of its layers only; with `kd_weight` it learns from the model that it came from, which heals such a cut:

        L = (1 − kd_weight) CE + kd_weight KL(original ‖ ours) + state_weight |h − h_original|² / d

    over the whole vocabulary and h the input of the output layer, means over all tokens that count of a step, in its
    micro-batches and ranks together, see `TokenWindow`. Logs `train/loss`, `val/loss` (cross-entropy), `val/ppl`,
    `test/loss`, `test/ppl`; beside an original also `train/loss_ce`, and `loss_kd` and `loss_state` before weighting
    under `train/`, `val/` and `test/`. The callback `SavePretrained` writes the model for `from_pretrained`.

    Args:
        model: hub id, local folder, `.gguf` path, or the config of a new model as a mapping with `model_type`. From
            Python also a loaded model.
        vocab_size: V of the tokenizer; the CLI links it from the data. A pretrained model keeps its own (padded)
            vocabulary, which must not be smaller.
        keep_layers: numbers of the layers to keep, from 0 in rising order, see `modules.keep_layers`; None keeps all.
        num_layers: how many to keep instead, evenly spread, the first and the last among them.
        kd_weight: share of KL(original ‖ ours) in the loss, in [0, 1]; the rest is cross-entropy. The original is the
            model as it was loaded, all of its layers. It is frozen, and in neither checkpoint nor optimizer.
        state_weight: weight of the squared error of the hidden states that the output layer reads, at least 0.
        freeze_embeddings: leave the input table and the output layer as they are: the other layers then heal with less
            memory and time.
        chunk_size: tokens whose logits are in memory at a time; None goes by the memory that they take.
        optimizer: callable that takes the parameters.
        lr_scheduler: callable that takes the optimizer; stepped after every optimizer step, or once an epoch on its
            monitored value for `ReduceLROnPlateau`.

    Raises:
        ValueError: If the model cannot be loaded or does not fit the vocabulary; see `check_plain_causal_lm`. If it has
            no such layers, a weight is out of range, or there are no pretrained weights to imitate.

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
        keep_layers: Sequence[int] | None = None,
        num_layers: int | None = None,
        kd_weight: float = 0.0,
        state_weight: float = 0.0,
        freeze_embeddings: bool = False,
        chunk_size: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        plain = isinstance(model, (str, dict))
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *([] if plain else ["model"])])
        if not 0 <= kd_weight <= 1:
            raise ValueError(f"Expected `kd_weight` to be in [0, 1], but got {kd_weight}.")
        check_not_negative(state_weight=state_weight)
        whole, self.output_rule = load_plain_causal_lm(model, vocab_size)
        self.model = cut_layers(whole, keep_layers, num_layers).train()  # `from_pretrained` leaves it in eval mode
        self.is_cut = self.model is not whole
        self.kd_weight, self.state_weight, self.original = kd_weight, state_weight, None
        if kd_weight or state_weight:
            self.original = keep_original_lm(model, whole, self.output_rule, is_cut=self.is_cut)
        if freeze_embeddings:
            freeze_tables(self.model)
        self.chunk_size = rows_a_chunk(num_logits(self.model), chunk_size)
        self._num_embeddings = num_embeddings(self.model)  # noted here, as FSDP cuts the table into pieces
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.means = StageMeans("nll", *(["loss_kd", "loss_state"] if self.original is not None else []))
        self.token_window = TokenWindow()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return token logits (B, T, V) in nats; position ids are for models that take them."""
        return self.model(input_ids=input_ids, **text_inputs(self.model, attention_mask, position_ids)).logits

    def _losses(self, batch: Mapping[str, Tensor]) -> HealingLosses:
        """Return the losses (N,) of the next tokens that count."""
        return healing_losses(self.model, self.output_rule, batch, self.original, chunk_size=self.chunk_size)

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Note how the first texts end, and check the labels of the first batch, on an accelerator too."""
        self.end_tokens.watch(batch)
        if batch_idx == 0:
            check_labels(batch["labels"], self._num_embeddings, wait=True)  # once: the host waits for the device

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of means over the tokens that count; a zero with a graph if none does."""
        losses = self._losses(batch)
        ce, *healing = (values.sum() / max(1, len(values)) for values in losses if values is not None)
        loss, count = ce, torch.tensor(len(losses[0]), device=ce.device)
        if healing:
            kd, state = healing
            self.log_dict({"train/loss_ce": ce, "train/loss_kd": kd, "train/loss_state": state})
            loss = (1 - self.kd_weight) * ce + self.kd_weight * kd + self.state_weight * state
        self.log("train/loss", loss, prog_bar=True)
        return self.token_window.weigh(loss, count, batch_idx, self._trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every token of the step weigh the same, whatever micro-batch and rank it was in."""
        self.token_window.normalize_(self.parameters(), self.trainer)

    def configure_optimizers(self) -> Any:
        """Return the injected optimizer and scheduler."""
        return make_optimizers(self.parameters(), self.optimizer, self.lr_scheduler, trainer=self._trainer)

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
        losses = self._losses(batch)
        found = {"nll": losses.ce, "loss_kd": losses.kd, "loss_state": losses.state}
        self.means.update(stage, **{name: values for name, values in found.items() if values is not None})

    def _log_means(self, stage: str) -> None:
        means = self.means.compute(stage)
        values = loss_and_perplexity(stage, means.pop("nll"))
        values |= {f"{stage}/{name}": value for name, value in means.items()}
        self.log_dict(values, prog_bar=True, sync_dist=True)

    # ------------------------------------------------------------------ export

    @property
    def card_text(self) -> str:
        """What was done, for the card of the saved model."""
        text = "Trained by the cross-entropy of the next token (`CausalLM`)."
        if self.is_cut:
            kept = self.model.config.get_text_config().num_hidden_layers
            text += f" It has {kept} of the layers of the model that it came from."
        return text

    def save_pretrained(self, folder: str | Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None) -> None:
        """Write the model for `from_pretrained`; see `save_model_folder`."""
        options: dict[str, Any] = {"tokenizer": tokenizer, "dtype": dtype, "trainer": self._trainer}
        save_model_folder(folder, self.model, self.card_text, end_tokens=self.end_tokens, **options)
