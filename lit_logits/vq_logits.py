"""`VQLogitsLM`: a causal language model whose output layer is a small codebook and a token → code mapping.

Letters: B batch, T sequence, d hidden size, V vocabulary, K codes.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_logits.functional import check_labels
from lit_logits.modules import (
    CodebookUpdate,
    DenseLogitsHead,
    HeadInit,
    MappingStrategy,
    TokenMean,
    VQLogitsHead,
    calibrate,
    choose_init,
    describe_head,
    describe_untying,
    initialize_dense_head,
    initialize_vq_head,
    load_backbone,
    make_optimizers,
)

__all__ = ["VQLogitsLM"]


class VQLogitsLM(LightningModule):
    """Train a causal language model with a vector-quantised output layer [0], or its dense baseline.

    At the start of training `calibration_batches` batches are read: token counts start the bias and, if the backbone
    is pretrained, k-means turns the rows of its output layer into codes. Logs `train/loss`, `val/loss`, `val/ppl`,
    `test/loss`, `test/ppl`.

    Args:
        backbone: hub id, local folder, `.gguf` path, or the config of a new model as a mapping with `model_type`.
            From Python also a loaded transformers model.
        vocab_size: V of the tokenizer; the CLI links it from the data. A pretrained backbone keeps its own (padded)
            vocabulary, which must not be smaller.
        head: `vq`, or `dense` for the (V, d) baseline in the same module.
        codebook_size: K.
        bias: learn a bias for each token. Without it (the paper's head) tokens of one code are always equally likely.
        init: how codes start: `random`; `frequency`, runs of tokens by frequency rank; `kmeans` or
            `weighted_kmeans` on the rows of a pretrained output layer. Default: `weighted_kmeans` with a pretrained
            backbone, else `frequency`.
        count_power: exponent of the token counts in `weighted_kmeans`.
        calibration_batches: training batches that each rank reads before the first step.
        mapping: `fixed`, `learned` or `reassigned`; see `VQLogitsHead`.
        codebook_update: `gradient` or `ema`; see `VQLogitsHead`.
        commitment_weight: weight of the commitment loss of latents.
        decay: of the EMA codebook, a step.
        reassign_every_n_steps: how often a `learned` or `reassigned` mapping is renewed.
        optimizer: callable that takes the parameters.
        lr_scheduler: callable that takes the optimizer; stepped after every optimizer step, or once an epoch on its
            monitored value for `ReduceLROnPlateau`.

    Raises:
        ValueError: for a backbone or an argument that does not fit; see `load_backbone` and `VQLogitsHead`.

    References:
        [0]: VQ-Logits, 2025, arXiv 2505.10202.

    Example:
        >>> model = VQLogitsLM({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        ...     "num_hidden_layers": 1, "num_attention_heads": 2}, vocab_size=100, codebook_size=10)
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 100])

    """

    head_ready: Tensor

    def __init__(
        self,
        backbone: str | dict[str, Any],
        vocab_size: int | None = None,
        *,
        head: Literal["vq", "dense"] = "vq",
        codebook_size: int = 512,
        bias: bool = True,
        init: HeadInit | None = None,
        count_power: float = 0.75,
        calibration_batches: int = 64,
        mapping: MappingStrategy = "fixed",
        codebook_update: CodebookUpdate = "gradient",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        reassign_every_n_steps: int = 100,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        plain = isinstance(backbone, (str, dict))
        self.save_hyperparameters(
            ignore=["optimizer", "lr_scheduler"] if plain else ["optimizer", "lr_scheduler", "backbone"]
        )
        _check_options(calibration_batches, count_power, commitment_weight)
        parts = load_backbone(backbone, vocab_size=vocab_size)
        pretrained = parts.output_weight is not None
        if parts.output_bias is not None and not bias:
            raise ValueError("Expected `bias=True`, because the pretrained output layer has a bias.")
        self.backbone = parts.model.train()  # `from_pretrained` leaves it in eval mode
        self.init = choose_init(init, pretrained=pretrained)
        self.count_power, self.calibration_batches = count_power, calibration_batches
        self.commitment_weight = commitment_weight
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

        self.head: VQLogitsHead | DenseLogitsHead
        if head == "vq":
            self.head = VQLogitsHead(
                parts.hidden_size,
                parts.vocab_size,
                codebook_size,
                bias=bias,
                mapping=mapping,
                codebook_update=codebook_update,
                decay=decay,
                reassign_every_n_steps=reassign_every_n_steps,
            )
            self.head.bind_token_table(cast(nn.Embedding, parts.model.get_input_embeddings()))
        elif head == "dense":
            self.head = DenseLogitsHead(parts.hidden_size, parts.vocab_size, bias=bias)
            self.head.copy_output_layer(parts.output_weight, parts.output_bias)
        else:
            raise ValueError(f"Expected `head` to be 'vq' or 'dense', but got {head!r}.")
        # Not a module or parameter: the pretrained rows serve the start of the codes and stay out of checkpoints.
        self._output_layer = (parts.output_weight, parts.output_bias) if head == "vq" else (None, None)
        self.register_buffer("head_ready", torch.tensor(head == "dense" and pretrained))
        self.val_nll, self.test_nll = TokenMean(), TokenMean()
        if parts.tied:
            rank_zero_info(describe_untying(parts, self.head))

    # ------------------------------------------------------------------ forward

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Output of the backbone for (B, T) token ids; its `last_hidden_state` (B, T, d) is what the head reads."""
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token logits (B, T, V) in nats."""
        return self.head(self.hidden_states(input_ids, attention_mask).last_hidden_state)

    def _loss(self, batch: Mapping[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the next token, and the shifted labels (B, T − 1)."""
        hidden = self.hidden_states(batch["input_ids"], batch.get("attention_mask")).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:]
        return self.head.loss(hidden, labels, **kwargs), labels

    # ------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        """Start the head from calibration batches, unless a checkpoint brought it along."""
        if not self.head_ready:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.initialize_head(_fresh(self.trainer.train_dataloader if data is None else data.train_dataloader()))
        self._output_layer = (None, None)  # a checkpoint that brought the head along needs the dense rows no more

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Check the labels of the first batch, on an accelerator too."""
        if batch_idx == 0:
            check_labels(batch["labels"], self.head.vocab_size, wait=True)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy and, with latents, the commitment loss."""
        loss, _ = self._loss(batch)
        if isinstance(self.head, VQLogitsHead) and self.head.latents is not None:
            commitment = self.head.commitment_loss()
            self.log_dict({"train/loss_ce": loss, "train/loss_commitment": commitment})
            loss = loss + self.commitment_weight * commitment
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move what gradients do not: before any checkpoint of this step is written."""
        super().optimizer_step(*args, **kwargs)
        if isinstance(self.head, VQLogitsHead):
            self.head.after_step()

    def configure_optimizers(self) -> Any:
        """The injected optimizer and scheduler."""
        return make_optimizers(self.parameters(), self.optimizer, self.lr_scheduler)

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self) -> None:
        """Say so when an untouched head is evaluated."""
        if not self.head_ready and not self.trainer.sanity_checking:
            rank_zero_warn(
                "The output head has not been initialised: `fit` first, load a checkpoint, or call"
                " `initialize_head(dataloader)`."
            )

    on_test_start = on_validation_start

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Sum the loss over tokens."""
        self._evaluate(batch, self.val_nll)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Sum the loss over tokens."""
        self._evaluate(batch, self.test_nll)

    def on_validation_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_perplexity("val", self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_perplexity("test", self.test_nll)

    def _evaluate(self, batch: Mapping[str, Tensor], metric: TokenMean) -> None:
        losses, labels = self._loss(batch, reduction="none")
        metric.update(losses[labels != -100])

    def _log_perplexity(self, stage: str, metric: TokenMean) -> None:
        nll = metric.compute()
        self.log_dict({f"{stage}/loss": nll, f"{stage}/ppl": nll.exp()}, prog_bar=True)
        metric.reset()

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss of each next token in nats (0 where ignored) and the most likely next token, both (B, T − 1)."""
        hidden = self.hidden_states(batch["input_ids"], batch.get("attention_mask")).last_hidden_state[:, :-1]
        losses = self.head.loss(hidden, batch["labels"][:, 1:], reduction="none")
        return {"nll": losses, "greedy": self.head.greedy(hidden)}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts with a KV cache, without token logits and without dropout.

        Args:
            input_ids: (B, T) prompts, left-padded where they differ in length.
            attention_mask: (B, T), 0 at padding; default all 1.
            max_new_tokens: how many tokens to add to each.
            temperature: 0 for the most likely token, else sample.
            eos_token_id: token that ends a text; what would follow it is the same token. Stops when all have ended.
            generator: source of randomness, on the device of the model.

        Returns:
            (B, at most T + max_new_tokens) token ids.

        """
        was_training = self.training
        self.eval()
        try:
            return self._continue(input_ids, attention_mask, max_new_tokens, temperature, eos_token_id, generator)
        finally:
            self.train(was_training)

    def _continue(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: int | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        padded = not bool(mask.all())
        kwargs: dict[str, Tensor] = {}
        fresh, cache = input_ids, None
        ended = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            if padded:
                kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
            output = self.hidden_states(fresh, mask, past_key_values=cache, use_cache=True, **kwargs)
            hidden, cache = output.last_hidden_state[:, -1], output.past_key_values
            token = self.head.sample(hidden, temperature, generator) if temperature else self.head.greedy(hidden)
            if eos_token_id is not None:
                token = token.masked_fill(ended, eos_token_id)
                ended |= token == eos_token_id
            fresh = token.unsqueeze(1)
            input_ids, mask = torch.cat([input_ids, fresh], 1), torch.cat([mask, torch.ones_like(fresh)], 1)
            if bool(ended.all()):
                break
        return input_ids

    # ------------------------------------------------------------------ start of the head

    def initialize_head(self, dataloader: Iterable[Mapping[str, Tensor]]) -> None:
        """Start codes and bias from the first `calibration_batches` batches; every rank must call it.

        `fit` does so by itself. Call it before `fit` where parameters are sharded (FSDP).
        """
        needs_moment = isinstance(self.head, VQLogitsHead) and self.init == "weighted_kmeans"
        calibration = calibrate(
            dataloader,
            num_batches=self.calibration_batches,
            vocab_size=self.head.vocab_size,
            device=self.device,
            backbone=self.backbone if needs_moment else None,
            progress_bar=self.global_rank == 0,
        )
        weight, bias = self._output_layer
        if isinstance(self.head, VQLogitsHead):
            initialize_vq_head(
                self.head,
                self.init,
                calibration,
                output_weight=weight,
                output_bias=bias,
                count_power=self.count_power,
                progress_bar=self.global_rank == 0,
            )
        elif not self.head_ready:  # a pretrained layer has its own start
            initialize_dense_head(self.head, calibration)
        self.head_ready.fill_(True)
        self._output_layer = (None, None)  # frees the dense weights
        rank_zero_info(describe_head(self.head))


def _check_options(calibration_batches: int, count_power: float, commitment_weight: float) -> None:
    if calibration_batches < 1:
        raise ValueError(f"Expected `calibration_batches` to be at least 1, but got {calibration_batches}.")
    for name, value in (("count_power", count_power), ("commitment_weight", commitment_weight)):
        if not value >= 0:
            raise ValueError(f"Expected `{name}` to be non-negative, but got {value}.")


def _fresh(loader: Any) -> Any:
    """A loader to read ahead of training; persistent workers are one iterator, which training must keep to itself."""
    if not (isinstance(loader, DataLoader) and loader.persistent_workers):
        return loader
    loader = copy(loader)
    loader._iterator = None
    return loader
