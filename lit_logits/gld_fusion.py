"""`GLDFusionModule`: several language models, of any tokenizer, fused into one by distillation of their logits.

Letters: B samples, T positions, N of them that predict a label, S sources, V vocabulary, k `top_k`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_logits.functional.checks import check_labels
from lit_logits.functional.chunks import chunked_rows, rows_a_chunk
from lit_logits.functional.gld_fusion import GraphNodes
from lit_logits.functional.reductions import at_least_float32, sample_mean
from lit_logits.functional.top_k_logits import LogitValues, SourceLogits, TopKLogits, place_rows, top_k_logits
from lit_logits.modules.gld_fusion.checks import check_options, check_source
from lit_logits.modules.gld_fusion.criterion import GLDCriterion, SourceTerms
from lit_logits.modules.gld_fusion.sources import LogitSource, ends_to_align, load_source, view_of
from lit_logits.modules.language_models.calls import counted_states
from lit_logits.modules.language_models.inspect import num_logits
from lit_logits.modules.language_models.loading import ModelOrConfig, Models, PlainCausalLM, load_plain_causal_lm
from lit_logits.modules.language_models.lora import add_lora
from lit_logits.modules.language_models.probes import OutputRule
from lit_logits.modules.language_models.saving import PushesToHub, save_model_folder
from lit_logits.modules.metrics import StageMeans, loss_and_perplexity
from lit_logits.modules.optimization import make_optimizers

__all__ = ["GLDFusionModule"]


class GLDLosses(NamedTuple):
    """Terms of the loss before weighting: means over samples of the mean over the positions that count in a sample.

    Attributes:
        ce: cross-entropy of the next tokens of responses, in nats.
        sources: terms of each source.
    """

    ce: Tensor
    sources: dict[str, SourceTerms]


class GLDFusionModule(PushesToHub, LightningModule):
    """A pivot model that learns from frozen source models by graph-on-logits distillation [0].

    L = (1 − λ) L_SFT + λ Σ_s ω_s (L_ULD^s + γ L_GLD^s): cross-entropy on the responses, the ℓ1 distance of the sorted
    top-k values where pivot and source have read the same text, and the sorted Gromov–Wasserstein bound between the
    co-activation graphs of their responses, which needs no alignment. Sources may have tokenizers of their own: those
    that the data module names under `source_tokenizers` read the text in their own tokens, the others in the pivot's.

    Every term is a mean over the samples of a batch. The loss is therefore the same however a batch is padded, or split
    over micro-batches and processes with equally many samples in each. (`val/loss` is a mean over tokens, as in
    `CausalLM`.)

    Logs `train/loss` and `train/loss_ce`; for each source `train/loss_uld`, `train/loss_gld` and `train/aligned`, with
    `/<name>` appended if there are several sources, all before weighting; `val/loss` (cross-entropy over tokens) and
    `val/ppl`; the same under `test/`. `predict` gives the top-k logits of the sources, which the callback
    `LogitCacheWriter` writes to a folder that can take the place of the model.

    Args:
        pivot: the model that learns: hub id, local folder, `.gguf` path, or the config of a new model as a mapping with
            `model_type`; from Python also a loaded model. Not needed to predict.
        sources: S models by names of your choice: hub id, local folder, `.gguf` path, the folder of a logit cache, or
            from Python a loaded model. They are frozen, in `eval`, and in neither checkpoint nor optimizer.
        vocab_size: V of the pivot's tokenizer; the CLI links it from the data. A pretrained pivot keeps its own
            (padded) vocabulary, which must not be smaller.
        source_weights: ω_s by name; default 1/S each.
        source_kwargs: by name, for `from_pretrained` of a source, such as `dtype` and `device_map`. The latter pins it
            to its device; one that is not pinned follows the batches. A cache ignores it.
        kd_weight: λ in [0, 1]; 0 is supervised fine-tuning, which runs no source.
        gld_weight: γ ≥ 0; small, because the bound sums strengths over nodes, each of the order of 10 with
            `standardize`.
        top_k: k.
        temperature: τ of the softmax.
        uld_values: what the token-wise loss compares; see `top_k_values`.
        graph_values: what the graphs are made of.
        nodes: nodes of the graphs: `rank`, or `vocabulary` ids.
        lora: settings of peft's `LoraConfig` (extra `peft`): trains adapters of the pivot alone.
        gradient_checkpointing: recompute the pivot's activations in backward.
        optimizer: callable that takes the parameters.
        lr_scheduler: callable that takes the optimizer; stepped after every optimizer step, or once an epoch on its
            monitored value for `ReduceLROnPlateau`.

    Raises:
        ValueError: If a model cannot be loaded or does not fit the vocabulary, an argument is out of range, weights or
            settings name an unknown source, or a logit cache is incomplete or does not hold k logits at τ.

    References:
        [0]: InfiGFusion: graph-on-logits distillation, 2025, arXiv 2505.13893.

    Example:
        >>> llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        ...     "num_attention_heads": 2, "vocab_size": 100}
        >>> from lit_logits.modules import new_causal_lm
        >>> fusion = GLDFusionModule(llama, {"teacher": new_causal_lm(llama)})
        >>> fusion(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 100])
    """

    def __init__(
        self,
        pivot: ModelOrConfig | None = None,
        sources: Models | None = None,
        vocab_size: int | None = None,
        *,
        source_weights: dict[str, float] | None = None,
        source_kwargs: dict[str, dict[str, Any]] | None = None,
        kd_weight: float = 0.3,
        gld_weight: float = 0.001,
        top_k: int = 10,
        temperature: float = 1.0,
        uld_values: LogitValues = "softmax",
        graph_values: LogitValues = "standardize",
        nodes: GraphNodes = "rank",
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        sources = sources or {}
        modules = [k for k, v in (("pivot", pivot), ("sources", sources)) if _has_modules(v)]
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *modules])
        self.weights = check_options(sources, source_weights, source_kwargs, kd_weight, gld_weight)
        if top_k < 1 or not temperature > 0:
            raise ValueError(
                "Expected `top_k` to be at least 1 and `temperature` to be positive, but got"
                f" {top_k} and {temperature}."
            )
        self.kd_weight, self.gld_weight, self.top_k, self.temperature = kd_weight, gld_weight, top_k, temperature
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

        self.pivot, self.output_rule = None, OutputRule()
        if pivot is not None:
            self.pivot, self.output_rule = _load_pivot(pivot, vocab_size, lora, gradient_checkpointing)
        self.vocab_size = 0 if self.pivot is None else _num_tokens(self.pivot, vocab_size, top_k)
        self.criterion = GLDCriterion(uld_values=uld_values, graph_values=graph_values, nodes=nodes)
        kwargs = source_kwargs or {}
        self.sources = {name: load_source(model, name, kwargs.get(name)) for name, model in sources.items()}
        for name, source in self.sources.items():
            check_source(name, source, top_k, temperature)
            if self.pivot is not None and getattr(source, "model", None) is self.pivot:
                raise ValueError(f"Expected other models as sources, but {name!r} is the pivot, which it would freeze.")
        self.chunk_size = rows_a_chunk(self.vocab_size or 1)
        self.means = StageMeans("nll")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the pivot's token logits (B, T, V) in nats."""
        return self._pivot(input_ids=input_ids, attention_mask=attention_mask).logits

    @property
    def _pivot(self) -> PreTrainedModel:
        if self.pivot is None:
            raise ValueError("Expected a `pivot` to train or to evaluate, but got None, which serves predicting only.")
        return self.pivot

    # ------------------------------------------------------------------ losses

    def losses(self, batch: Mapping[str, Any]) -> GLDLosses:
        """Return every term before weighting; with λ = 0 the cross-entropy alone.

        Args:
            batch: `input_ids`, `attention_mask` and `labels` (B, T); `response_bytes` (or `response_ends`, of any
                unit) (B, T) and `sources` for sources with other tokenizers, `sample_ids` (B,) for cached ones.

        Raises:
            ValueError: If tokens are another tokenizer's, a cache lacks a sample, or a source emits NaN.
        """
        mask, hidden, labels = counted_states(self._pivot, batch)
        if self.kd_weight == 0:
            (ce,) = chunked_rows(self._cross_entropy, hidden, labels, chunk_size=self.chunk_size)
            return GLDLosses(_mean_over_samples(ce, mask), {})
        # One pass over the chunks for both: the (N, V) logits are never whole, and each chunk is made once.
        ce, *top = chunked_rows(self._cross_entropy_and_top_k, hidden, labels, chunk_size=self.chunk_size)
        pivot, terms = place_rows(TopKLogits(*top), mask), {}
        for name, source in self.sources.items():
            ends = ends_to_align(name, source, batch)
            terms[name] = self.criterion(pivot, self._source_logits(name, batch), mask, ends, name=name)
        return GLDLosses(_mean_over_samples(ce, mask), terms)

    def _source_logits(self, name: str, batch: Mapping[str, Any]) -> SourceLogits:
        """Return the top-k logits of a source, from the model itself or from its cache."""
        source, view = self.sources[name], view_of(batch, name)
        if isinstance(source, LogitSource):
            return source(batch, self.top_k, self.temperature)
        if "sample_ids" not in batch or "response_ends" not in batch:
            raise ValueError(
                f"Expected batches with `sample_ids` and `response_ends` for the logit cache of {name!r}, as"
                f" InstructionDataModule gives them, but got {sorted(batch)}."
            )
        if source.layout_id is not None and "layout_id" in view and int(view["layout_id"]) != source.layout_id:
            raise ValueError(
                f"Expected the tokens that the logit cache {source.folder} was written for, but those of source"
                f" {name!r} in the batch are of another tokenizer, template or `max_length`. Give the data module the"
                f" same `source_tokenizers` (one for {name!r}, unless it is the pivot's) and layout as then, or write"
                " another cache."
            )
        return source.read(batch["sample_ids"], top_k=self.top_k, device=batch["input_ids"].device)

    # ------------------------------------------------------------------ the pivot

    def _head(self, rows: Tensor) -> Tensor:
        return self.output_rule.logits(cast(nn.Linear, self._pivot.get_output_embeddings()), rows)

    def _cross_entropy(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(at_least_float32(self._head(rows)), labels, reduction="none"),)

    def _cross_entropy_and_top_k(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = self._head(rows)
        ce = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
        return (ce, *top_k_logits(logits[:, : self.vocab_size], self.top_k, temperature=self.temperature))

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Check the labels of the first batch, on an accelerator too."""
        if batch_idx == 0:
            size = cast(nn.Embedding, self._pivot.get_input_embeddings()).weight.shape[0]
            check_labels(batch["labels"], size, wait=True)  # once, because the host waits for the device

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the weighted sum of all terms; a zero with a graph if nothing counts."""
        losses = self.losses(batch)
        loss = (1 - self.kd_weight) * losses.ce
        self.log("train/loss_ce", losses.ce)
        for name, terms in losses.sources.items():
            loss = loss + self.kd_weight * self.weights[name] * (terms.uld + self.gld_weight * terms.gld)
            suffix = f"/{name}" if len(losses.sources) > 1 else ""
            values = {"loss_uld": terms.uld, "loss_gld": terms.gld, "aligned": terms.aligned}
            self.log_dict({f"train/{key}{suffix}": value for key, value in values.items()})
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the injected optimizer and scheduler."""
        return make_optimizers(self.parameters(), self.optimizer, self.lr_scheduler)

    # ------------------------------------------------------------------ evaluation
    # Written out in each module, as Lightning names them: the house has no shared LightningModule base class.

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sum the cross-entropy over tokens."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sum the cross-entropy over tokens."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_means("test")

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        _, hidden, labels = counted_states(self._pivot, batch)
        (nll,) = chunked_rows(self._cross_entropy, hidden, labels, chunk_size=self.chunk_size)
        self.means.update(stage, nll=nll)

    def _log_means(self, stage: str) -> None:
        self.log_dict(loss_and_perplexity(stage, **self.means.compute(stage)), prog_bar=True)

    # ------------------------------------------------------------------ prediction for a cache, and export

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the top-k logits of every source, for `LogitCacheWriter`."""
        if "sample_ids" not in batch:
            raise ValueError(
                f"Expected batches with `sample_ids`, as InstructionDataModule gives them, but got {sorted(batch)}."
            )
        return {
            "sample_ids": batch["sample_ids"],
            "sources": {name: self._source_logits(name, batch) for name in self.sources},
        }

    @property
    def cache_settings(self) -> dict[str, dict[str, Any]]:
        """Settings that the top-k logits of each source depend on.

        Raises:
            ValueError: If the logits of a source are in a cache already.
        """
        models = {name: source for name, source in self.sources.items() if isinstance(source, LogitSource)}
        if not models or len(models) < len(self.sources):
            raise ValueError(
                "Expected `sources` to be models, whose logits are to be cached, but got caches:"
                f" {sorted(set(self.sources) - set(models))}."
            )
        return {name: source.settings(self.top_k, self.temperature) for name, source in models.items()}

    @property
    def cache_tokens(self) -> dict[str, list[bytes | None] | None]:
        """The bytes of each token of each source, for its cache; None where the tokenizer is not known."""
        return {name: source.tokens for name, source in self.sources.items()}

    @property
    def card_text(self) -> str:
        """What was done, for the card of the saved model."""
        names = ", ".join(f"`{name}`" for name in self.sources) or "none"
        return (
            "Fused by graph-on-logits distillation (InfiGFusion, arXiv 2505.13893; `GLDFusionModule`): it learned from"
            f" the {self.top_k} likeliest tokens of its sources {names}, a share of {self.kd_weight:g} of the loss, and"
            " by cross-entropy."
        )

    def save_pretrained(self, folder: str | Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None) -> None:
        """Write the pivot in its own architecture, for `from_pretrained`, adapters merged; see `save_model_folder`."""
        options: dict[str, Any] = {"tokenizer": tokenizer, "dtype": dtype, "trainer": self._trainer}
        save_model_folder(folder, self._pivot, self.card_text, **options)


def _mean_over_samples(rows: Tensor, mask: Tensor) -> Tensor:
    """Return `sample_mean` of the (N,) values at the positions that count."""
    return sample_mean(rows.new_zeros(mask.shape).masked_scatter(mask, rows), mask)


def _has_modules(value: Any) -> bool:
    return isinstance(value, nn.Module) or (isinstance(value, dict) and any(map(_has_modules, value.values())))


def _load_pivot(
    pivot: Any, vocab_size: int | None, lora: Mapping[str, Any] | None, gradient_checkpointing: bool
) -> PlainCausalLM:
    model, rule = load_plain_causal_lm(pivot, vocab_size)
    if lora is not None:
        model = add_lora(model, lora)
    if gradient_checkpointing:
        # The reentrant kind needs inputs that require a gradient, which frozen embeddings under LoRA do not give.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PlainCausalLM(model.train(), rule)  # `from_pretrained` leaves it in eval mode


def _num_tokens(pivot: PreTrainedModel, vocab_size: int | None, top_k: int) -> int:
    """Return how many logits of the pivot belong to tokens; the others are padding of its table."""
    rows = num_logits(pivot)
    size = min(rows, vocab_size or rows)
    if top_k > size:
        raise ValueError(f"Expected `top_k` to be in [1, {size}], the pivot's vocabulary, but got {top_k}.")
    return size
