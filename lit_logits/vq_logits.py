"""`VQLogitsLM`: a causal language model whose output layer is a small codebook and a token → code mapping.

Letters: B batch, T sequence, d hidden size, V vocabulary, K codes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_logits.contracts import (
    LearningHead,
    OutputLayer,
    SizedHead,
    StartingHead,
)
from lit_logits.functional.checks import check_labels
from lit_logits.functional.labels import next_token_labels
from lit_logits.functional.reductions import reduce_tokens
from lit_logits.functional.residual_vq import ResidualVQLosses
from lit_logits.modules.ddp_buffers import broadcast_settled, leave_out_of_ddp
from lit_logits.modules.language_models.calls import text_inputs
from lit_logits.modules.language_models.inspect import find_layers, freeze_first_layers
from lit_logits.modules.language_models.loading import CausalBackbone, ModelOrConfig, load_backbone
from lit_logits.modules.metrics import StageMeans, loss_and_perplexity
from lit_logits.modules.optimization import TokenWindow, counted_steps, make_optimizers
from lit_logits.modules.vq_logits.calibration import fresh_loader
from lit_logits.modules.vq_logits.checks import check_averages, check_head_in_pieces, check_steps, steps_left
from lit_logits.modules.vq_logits.data_start import start_head
from lit_logits.modules.vq_logits.describe import describe_head, describe_model, describe_untying
from lit_logits.modules.vq_logits.embedding import code_table, coded_table
from lit_logits.modules.vq_logits.generation import VQGeneration
from lit_logits.modules.vq_logits.head import VQLogitsHead
from lit_logits.modules.vq_logits.joining import VQExport, export_warning
from lit_logits.modules.vq_logits.original import OriginalOutput, keep_original
from lit_logits.modules.vq_logits.parts import (
    HeadFactory,
    check_imitates,
    head_recipe,
    make_head,
    most_likely,
    names_embedding,
    set_cap,
)

__all__ = ["VQLogitsLM"]


class VQLogitsLM(VQExport, VQGeneration, LightningModule):
    """A causal language model with a vector-quantised output layer [0], or with the dense one as its baseline.

    At the start of training the head reads data. With a new backbone it reads the text once, so that tokens of like
    contexts share a code; with a pretrained one it reads `calibration_batches` batches, and k-means turns the rows of
    the output layer into codes. Token counts start the bias. A step is on the mean over all tokens that count, of its
    micro-batches and ranks together, see `TokenWindow`. Logs `train/loss`, `val/loss`, `val/ppl`, `test/loss`,
    `test/ppl`.

    Args:
        backbone: hub id, local folder, `.gguf` path, or the config of a new model as a mapping with `model_type`.
            From Python also a loaded transformers model.
            An architecture that multiplies or caps its logits (Cohere, Granite, Gemma-2) does so with another head too;
            see `CappedHead` in `lit_logits.contracts` for what a token bias is then.
        vocab_size: V of the tokenizer; the CLI links it from the data. A pretrained backbone keeps its own (padded)
            vocabulary, which must not be smaller.
        head: called with (hidden_size, vocab_size) to make the output layer: `VQLogitsHead`, `ResidualVQLogitsHead`,
            `DenseLogitsHead` for the (V, d) baseline, or a class of your own, see `lit_logits.contracts.OutputHead`;
            arguments are given by `functools.partial`, in a recipe by `class_path` and `init_args`.
        calibration_batches: training batches that each rank reads before the first step, where the start needs hidden
            states or counts alone.
        kd_weight: share of KL(original ‖ ours) in the loss, in [0, 1]; the rest is cross-entropy. The original model is
            kept frozen and out of checkpoints; validation then logs `val/kl`, and `val/ppl_ratio` to it.
        num_trainable_layers: how many of the last layers of the backbone are trained, with what follows them; 0 trains
            the head alone. Default all, embeddings included.
        compress: `head`, or `head` and `embedding`: the input table of a pretrained model is read from codes too, those
            of a `ResidualVQLogitsHead`. A tied model keeps one set for both, which are fitted to what errors cost in
            both (`token_weights` of the head does not count then); else the table has codes of its own, as many.
        optimizer: callable that takes the parameters.
        lr_scheduler: callable that takes the optimizer; stepped after every optimizer step, or once an epoch on its
            monitored value for `ReduceLROnPlateau`.

    Raises:
        ValueError: If the backbone or an argument does not fit; see `load_backbone` and `VQLogitsHead`.

    References:
        [0]: VQ-Logits, 2025, arXiv 2505.10202.

    Example:
        >>> from functools import partial
        >>> model = VQLogitsLM({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        ...     "num_hidden_layers": 1, "num_attention_heads": 2}, 100, head=partial(VQLogitsHead, codebook_size=10))
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 100])
    """

    head_ready: Tensor

    def __init__(
        self,
        backbone: ModelOrConfig,
        vocab_size: int | None = None,
        *,
        head: HeadFactory = VQLogitsHead,
        calibration_batches: int = 64,
        kd_weight: float = 0.0,
        num_trainable_layers: int | None = None,
        compress: Sequence[str] = ("head",),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        # `save_hyperparameters` reads the local variables: a checkpoint is to hold the head's recipe, which is data.
        make, head = head, cast(Any, head_recipe(head))
        plain = isinstance(backbone, (str, dict))
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *([] if plain else ["backbone"])])
        if not 0 <= kd_weight <= 1:
            raise ValueError(f"Expected `kd_weight` to be in [0, 1], but got {kd_weight}.")
        if calibration_batches < 1:
            raise ValueError(f"Expected `calibration_batches` to be at least 1, but got {calibration_batches}.")
        parts = load_backbone(backbone, vocab_size=vocab_size)
        made = make_head(make, parts.hidden_size, parts.vocab_size, has_bias=parts.output_bias is not None)
        set_cap(made, parts.rule.cap)
        if kd_weight:
            check_imitates(made)

        self.kd_weight, self.calibration_batches = kd_weight, calibration_batches
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.vocab_size = parts.vocab_size
        self._generation_config, self._tied = parts.generation_config, parts.tied
        self.output_rule = parts.rule  # its factors multiply the hidden states that the head reads
        self.backbone = parts.model
        self._frozen: list[nn.Module] = []  # kept in `eval` mode
        num_frozen_layers = 0
        if num_trainable_layers is not None:
            self._frozen = freeze_first_layers(self.backbone, num_trainable_layers)
            num_frozen_layers = len(find_layers(self.backbone)[1]) - num_trainable_layers
        coded = names_embedding(compress)
        self.original = keep_original(parts, num_frozen_layers, same_inputs=not coded) if kd_weight else None
        self.head: Any = made
        self._prepare_head(parts, coded)
        self.means = StageMeans("nll", *(["kl", "original_nll"] if kd_weight else []))
        self.token_window = TokenWindow()
        self.train()  # `from_pretrained` leaves the backbone in eval mode

    def _prepare_head(self, parts: CausalBackbone, coded: bool) -> None:
        """Let the head take what it needs of the pretrained model, and note whether it has to start from data."""
        # Not a module or parameter: the pretrained rows serve the start of the codes and stay out of checkpoints.
        self._output_layer = OutputLayer(parts.output_weight, parts.output_bias)
        table = cast(nn.Embedding, parts.model.get_input_embeddings())
        self._starts = isinstance(self.head, StartingHead) and not self.head.prepare(self._output_layer, table)
        if not self._starts:
            self._output_layer = OutputLayer(None, None)
        self.register_buffer("head_ready", torch.tensor(not self._starts))  # a buffer, so that checkpoints keep it
        if coded:
            code_table(parts.model, self.head, tied=parts.tied)
            self.register_load_state_dict_post_hook(_read_codes)
        warning = export_warning(self.backbone, self.head, hidden_size=parts.hidden_size, vocab_size=parts.vocab_size)
        if warning is not None:
            rank_zero_warn(warning)
        if parts.tied and isinstance(self.head, SizedHead) and not coded:
            rank_zero_info(describe_untying(parts, self.head))

    def train(self, mode: bool = True) -> "VQLogitsLM":
        """Switch between training and evaluation; a frozen backbone, or its frozen layers, stay in evaluation."""
        super().train(mode)
        is_trained = any(parameter.requires_grad for parameter in self.backbone.parameters())
        for module in self._frozen if is_trained else [self.backbone]:
            module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the pretrained rows that a head which has not started yet will start from."""
        if not self.head_ready:
            checkpoint["output_layer"] = tuple(self._output_layer)
            checkpoint["input_rows"] = getattr(coded_table(self.backbone), "dense", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the rows to start from, and copy what the original shares with the backbone if it will change."""
        # A search for a learning rate or a batch size trains a little, which frees the rows, and then loads such a
        # checkpoint.
        self._output_layer = OutputLayer(*checkpoint.get("output_layer", self._output_layer))
        table = coded_table(self.backbone)
        if table is not None:
            table.dense = checkpoint.get("input_rows", table.dense)
        if self.original is None:
            return
        loaded = checkpoint["state_dict"]
        shared = {f"backbone.{name}": p for name, p in self.backbone.named_parameters() if not p.requires_grad}
        if any(name in loaded and not torch.equal(loaded[name].to(p), p) for name, p in shared.items()):
            self.original = self.original.separate(self.backbone)

    # ------------------------------------------------------------------ forward

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return what the head reads for token ids (B, T): last hidden states (B, T, d) by the architecture's factor.

        Position ids (B, T), as of packed sequences, are for backbones that take them.
        """
        output = self.backbone(input_ids=input_ids, **text_inputs(self.backbone, attention_mask, position_ids))
        return self.output_rule.scale_hidden(output.last_hidden_state)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return token logits (B, T, V) in nats."""
        return self.head(self.hidden_states(input_ids, attention_mask, position_ids))

    def _loss(self, batch: Mapping[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the next tokens, and the (B, T) positions that count."""
        labels, mask = next_token_labels(batch["labels"])
        hidden = self.hidden_states(**_inputs(batch))
        return self.head.loss(hidden, labels, **kwargs), mask

    def _losses(self, batch: Mapping[str, Tensor], original: OriginalOutput) -> tuple[ResidualVQLosses, Tensor]:
        """Return losses (B, T) of the next tokens, the original's among them, and the positions that count."""
        inputs = _inputs(batch)
        with original.sharing_layers(self.backbone):
            hidden = self.hidden_states(**inputs)
            target = original.target(hidden, **inputs)
        labels, mask = next_token_labels(batch["labels"])
        return self.head.imitation_losses(hidden, labels, target=target), mask

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        """Keep the mapping out of what DDP, which wraps the model next, sends at every forward."""
        leave_out_of_ddp(self)

    def on_fit_start(self) -> None:
        """Start all ranks with the mapping of rank 0; refuse averages or pieces of weights that are other codes."""
        check_head_in_pieces(self.head, self.trainer.strategy, is_ready=bool(self.head_ready))
        broadcast_settled(self)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                with_buffers = getattr(callback, "_use_buffers", False)
                check_averages(self, type(callback).__name__, with_buffers=with_buffers)

    def on_train_start(self) -> None:
        """Start the head from calibration batches, unless a checkpoint has restored it."""
        if not self.head_ready:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.initialize_head(
                fresh_loader(self.trainer.train_dataloader if data is None else data.train_dataloader())
            )
        self._output_layer = OutputLayer(None, None)  # frees the dense weights; a restored head never read them
        warning = check_steps(self.head, steps_left(self.trainer))
        if warning:
            rank_zero_warn(warning)

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Note how the first texts end, and check the labels of the first batch, on an accelerator too."""
        self.end_tokens.watch(batch)
        if batch_idx == 0:
            check_labels(batch["labels"], self.vocab_size, wait=True)  # once, because the host waits for the device

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy, plus the commitment loss of latents or the divergence from the original model."""
        if self.original is not None:
            losses, mask = self._losses(batch, self.original)
            ce, kd = (reduce_tokens(values, mask) for values in losses[:2])
            self.log_dict({"train/loss_ce": ce, "train/loss_kd": kd})
            loss = self.kd_weight * kd + (1 - self.kd_weight) * ce
            self.log("train/loss", loss, prog_bar=True)
            return self.token_window.weigh(loss, mask.sum(), batch_idx, self._trainer)
        loss, mask = self._loss(batch)
        terms = self.head.penalties() if isinstance(self.head, LearningHead) else {}
        if terms:
            penalties = {f"train/loss_{name}": value for name, (_, value) in terms.items()}
            self.log_dict({"train/loss_ce": loss, **penalties})
        for weight, value in terms.values():
            loss = loss + weight * value
        self.log("train/loss", loss, prog_bar=True)
        return self.token_window.weigh(loss, mask.sum(), batch_idx, self._trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every token of the step weigh the same, whatever micro-batch and rank it was in."""
        self.token_window.normalize_(self.parameters(), self.trainer)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then move what gradients do not, unless the loss scaler left the step out."""
        with counted_steps(optimizer) as steps:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Here and not in `on_train_batch_end`: once for each optimizer step, whatever the accumulation, and before a
        # callback writes the checkpoint of this step.
        if steps.taken and isinstance(self.head, LearningHead):
            self.head.after_step()

    def configure_optimizers(self) -> Any:
        """Return the injected optimizer and scheduler."""
        return make_optimizers(self.parameters(), self.optimizer, self.lr_scheduler, trainer=self._trainer)

    # ------------------------------------------------------------------ evaluation
    # Written out in each module, as Lightning names them: the house has no shared LightningModule base class.

    def on_validation_start(self) -> None:
        """Warn if the head that is evaluated was neither started nor loaded."""
        if not self.head_ready and not self.trainer.sanity_checking:
            rank_zero_warn(
                "The output head has not been initialised: `fit` first, load a checkpoint, or call"
                " `initialize_head(dataloader)`."
            )

    on_test_start = on_validation_start

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Sum the losses over tokens."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Sum the losses over tokens."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_means("test")

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        if self.original is None:
            values, mask = self._loss(batch, reduction="none")
            self.means.update(stage, nll=values[mask])
            return
        losses, mask = self._losses(batch, self.original)
        nll, kl, original_nll = (values[mask] for values in losses)
        self.means.update(stage, nll=nll, kl=kl, original_nll=original_nll)

    def _log_means(self, stage: str) -> None:
        means = self.means.compute(stage)
        values = loss_and_perplexity(stage, means["nll"])
        if "kl" in means:
            ratio = (means["nll"] - means["original_nll"]).exp()
            values |= {f"{stage}/kl": means["kl"], f"{stage}/ppl_ratio": ratio}
        self.log_dict(values, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of each next token in nats (0 where ignored) and the most likely one, both (B, T − 1).

        A batch without labels gets the most likely tokens alone.
        """
        hidden = self.hidden_states(**_inputs(batch))[:, :-1]
        greedy = {"greedy": most_likely(self.head, hidden)}
        if "labels" not in batch:
            return greedy
        return {"nll": self.head.loss(hidden, batch["labels"][:, 1:], reduction="none"), **greedy}

    # ------------------------------------------------------------------ start of the head

    def initialize_head(self, dataloader: Iterable[Mapping[str, Tensor]]) -> None:
        """Start codes and bias from batches, as many as the head asks for; every rank must call it.

        `fit` does so by itself. If parameters are sharded (FSDP), call it before `fit`.
        """
        if self._starts:
            start_head(
                self.head,
                self.backbone,
                self._output_layer,
                self.output_rule,
                dataloader,
                num_batches=self.calibration_batches,
                vocab_size=self.vocab_size,
                device=self.device,
                progress_bar=self.global_rank == 0,
            )
        self.head_ready.fill_(True)
        self._output_layer = OutputLayer(None, None)  # frees the dense weights
        if isinstance(self.head, SizedHead):
            rank_zero_info(f"{describe_head(self.head)} {describe_model(self.backbone, self.head, tied=self._tied)}")


def _read_codes(module: Any, _: object) -> None:
    """Let the input table read its codes, if the state that was loaded has them fitted."""
    if module.head_ready:
        module.backbone.get_input_embeddings().dense = None


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the backbone's inputs of a batch."""
    return {name: batch.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
