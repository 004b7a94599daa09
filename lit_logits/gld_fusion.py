"""`GLDFusionModule`: several language models, of any tokenizer, fused into one by distillation of their logits.

Letters: B samples, T positions, N of them that predict a label, S sources, V vocabulary, k `top_k`.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_logits.contracts import HasTokenizer, offers
from lit_logits.functional.checks import check_labels, check_not_negative, check_positive
from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.functional.gld_fusion import GraphNodes
from lit_logits.functional.matched_tokens import UnmatchedTokens
from lit_logits.functional.top_k_kl import KLKind, check_kl_kind
from lit_logits.functional.top_k_logits import LogitValues
from lit_logits.modules.gld_fusion.cached import check_cached
from lit_logits.modules.gld_fusion.checks import check_options
from lit_logits.modules.gld_fusion.comparison import (
    GLDLosses,
    SourceComparison,
    collect_losses,
    column_shares,
    nll_shares,
)
from lit_logits.modules.gld_fusion.criterion import GLDCriterion
from lit_logits.modules.gld_fusion.pivot import load_pivot, num_tokens, pivot_rows
from lit_logits.modules.gld_fusion.source_set import SourceSet
from lit_logits.modules.gld_fusion.sources import LogitSource
from lit_logits.modules.gld_fusion.validation import TermMeans
from lit_logits.modules.gld_fusion.weights import SourceRouting, TermWeights
from lit_logits.modules.language_models.calls import CountedStates, counted_states
from lit_logits.modules.language_models.inspect import num_embeddings
from lit_logits.modules.language_models.loading import ModelOrConfig, Models
from lit_logits.modules.language_models.probes import OutputRule
from lit_logits.modules.language_models.saving import PushesToHub, save_model_folder
from lit_logits.modules.language_models.tokenizers import find_tokenizer, token_table
from lit_logits.modules.metrics import StageMeans, loss_and_perplexity
from lit_logits.modules.optimization import make_optimizers
from lit_logits.modules.schedules import StepValue, value_at
from lit_logits.storage.logit_cache import LogitCache

__all__ = ["GLDFusionModule"]


class GLDFusionModule(PushesToHub, LightningModule):
    """A pivot model that learns from frozen source models by graph-on-logits distillation [0].

    L = (1 − λ) L_SFT + λ Σ_s ω_s (L_ULD^s + γ L_GLD^s): cross-entropy on the responses, the ℓ1 distance of the sorted
    top-k values where pivot and source have read the same text, and the sorted Gromov–Wasserstein bound between the
    co-activation graphs of their responses, which needs no alignment. Sources may have tokenizers of their own: those
    that the data module names under `source_tokenizers` read the text in their own tokens, the others in the pivot's.

    With `terms` the bracket is Σ_term w_term L_term^s of any of these, which say what a source knows, and not only how
    sure it is: `uld` and `gld`; `kl`, the divergence of next tokens from a source of the pivot's tokenizer
    (`top_k_kl`); `matched`, the same over the tokens that a source of another tokenizer shares with the pivot; `chunk`,
    of the likelihoods of chunks that both tokenizers cut at the same places (`chunk_likelihood_loss`).

    Every term is a mean over the samples of a batch. The loss is therefore the same however a batch is padded, or split
    over micro-batches and processes with equally many samples in each. (`val/loss` is a mean over tokens, as in
    `CausalLM`.)

    Logs `train/loss` and `train/loss_ce`; for each source `train/loss_<term>`, `train/aligned`, with `matched` also
    `train/matched` (probability that found a token of the pivot), with `chunk_debias` also `train/chunks` (share of the
    chunks that is left), and with a routing `train/share`, its mean share of the samples, with `/<name>` appended if
    there are several sources, all before weighting; `val/loss` (cross-entropy over tokens), `val/ppl` and, where the
    sources are at hand, `val/loss_<term>`; the first two under `test/` as well.
    `predict` gives the top-k logits of the sources, which the callback `LogitCacheWriter` writes to a folder that can
    take the place of the model.

    Args:
        pivot: the model that learns: hub id, local folder, `.gguf` path, or the config of a new model as a mapping with
            `model_type`; from Python also a loaded model. Not needed to predict.
        sources: S models by names of your choice: hub id, local folder, `.gguf` path, the folder of a logit cache, or
            from Python a loaded model. They are frozen, in `eval`, and in neither checkpoint nor optimizer. They are
            loaded when training or predicting begins, those that weigh nothing not at all.
        vocab_size: V of the pivot's tokenizer; the CLI links it from the data. A pretrained pivot keeps its own
            (padded) vocabulary, which must not be smaller.
        pivot_kwargs: for `from_pretrained` of the pivot, such as `dtype`, `attn_implementation`, or with `lora`
            `quantization_config: {load_in_4bit: true}` (QLoRA; needs bitsandbytes).
        source_weights: ω_s by name; default 1/S each, or 1 each with `source_routing`.
        source_kwargs: by name, for `from_pretrained` of a source, such as `dtype` and `device_map`. The latter pins it
            to its device; one that is not pinned follows the batches. A cache ignores it.
        kd_weight: λ in [0, 1], or a function of the optimizer steps taken that returns it, such as `LinearRamp`; 0 is
            supervised fine-tuning, which runs no source.
        gld_weight: γ ≥ 0; small, because the bound sums strengths over nodes, each of the order of 10 with
            `standardize`. Unused with `terms`.
        terms: w_term by name, at least 0: a number or a function of the step, or these by the name of the source, such
            as `{"kl": {"twin": 1.0}, "chunk": 1.0}`; None is `{"uld": 1, "gld": γ}`.
        source_routing: which source teaches which sample: None, all by ω_s; `column`, the one that the batch names in
            `teachers` (a `teacher_column` of the data); `nll`, the one that explains the response best, by its −log p a
            byte. ω_s is then a factor of its share.
        routing_temperature: of `nll`: shares are softmax(−NLL / temperature); 0 is all to the best.
        top_k: k.
        temperature: τ of the softmax; for sources online also a function of the step.
        kl_kind: of `kl` and `matched`: `forward`, `reverse` or `jsd`, see `top_k_kl`.
        kl_beta: β of `jsd`.
        chunk_temperature: τ of `chunk`.
        chunk_debias: γ, 0.1 in the paper's public code: `chunk` compares each chunk together with a new word behind it,
            where the source gives that at least γ (`merge_cuts`); None compares chunks as they are.
        uld_values: what the token-wise loss compares; see `top_k_values`.
        graph_values: what the graphs are made of.
        nodes: nodes of the graphs: `rank`; ids of each `vocabulary`, compared by strength; or `matched` ids, compared
            token by token, of those that pivot and source share.
        unmatched: what `matched` does with a source's token that the pivot lacks: its probability joins the `tail`, or
            goes to the `first` of the pivot's pieces of it, or to its `pieces`; see `match_vocabularies`.
        lora: settings of peft's `LoraConfig` (extra `peft`): trains adapters of the pivot alone.
        gradient_checkpointing: recompute the pivot's activations in backward.
        validate_terms: log `val/loss_<term>` too, of sources that training has loaded, which runs them in validations.
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
        pivot_kwargs: dict[str, Any] | None = None,
        source_weights: dict[str, float] | None = None,
        source_kwargs: dict[str, dict[str, Any]] | None = None,
        kd_weight: StepValue = 0.3,
        gld_weight: float = 0.001,
        terms: dict[str, StepValue | dict[str, StepValue]] | None = None,
        source_routing: SourceRouting | None = None,
        routing_temperature: float = 0.0,
        top_k: int = 10,
        temperature: StepValue = 1.0,
        kl_kind: KLKind = "forward",
        kl_beta: float = 0.5,
        chunk_temperature: float = 100.0,
        chunk_debias: float | None = None,
        uld_values: LogitValues = "softmax",
        graph_values: LogitValues = "standardize",
        nodes: GraphNodes = "rank",
        unmatched: UnmatchedTokens = "tail",
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        validate_terms: bool = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        sources = sources or {}
        given = {"pivot": pivot, "sources": sources, "kd_weight": kd_weight, "terms": terms, "temperature": temperature}
        kept_out = [name for name, value in given.items() if _has_code(value)]
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *kept_out])
        self.weights = check_options(sources, source_weights, source_kwargs, kd_weight, source_routing=source_routing)
        if not 0 <= gld_weight < float("inf"):
            raise ValueError(f"Expected `gld_weight` ≥ 0, but got {gld_weight}.")
        chosen = {"uld": 1.0, "gld": gld_weight} if terms is None else terms
        self.term_weights = TermWeights(kd_weight, self.weights, chosen)
        if top_k < 1 or (not callable(temperature) and not temperature > 0):
            raise ValueError(
                "Expected `top_k` to be at least 1 and `temperature` to be positive, but got"
                f" {top_k} and {temperature}."
            )
        check_kl_kind(kl_kind, kl_beta)
        check_positive(chunk_temperature=chunk_temperature)
        check_not_negative(routing_temperature=routing_temperature)
        self.kd_weight, self.gld_weight, self.top_k, self.temperature = kd_weight, gld_weight, top_k, temperature
        self.kl_kind, self.kl_beta, self.chunk_temperature = kl_kind, kl_beta, chunk_temperature
        self.source_routing, self.routing_temperature = source_routing, routing_temperature
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

        self.pivot, self.output_rule = None, OutputRule()
        if pivot is not None:
            self.pivot, self.output_rule = load_pivot(pivot, vocab_size, lora, gradient_checkpointing, pivot_kwargs)
        self.vocab_size = 0 if self.pivot is None else num_tokens(self.pivot, vocab_size, top_k)
        # Noted here, as FSDP cuts the table into pieces.
        self._num_embeddings = 0 if self.pivot is None else num_embeddings(self.pivot)
        self.criterion = GLDCriterion(uld_values=uld_values, graph_values=graph_values, nodes=nodes)
        self._pivot_name = pivot if isinstance(pivot, str) else None
        shared: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "pivot": self.pivot}
        shared |= {"unmatched": unmatched, "matched_graphs": nodes == "matched", "chunk_debias": chunk_debias}
        self._sources = SourceSet(sources, source_kwargs, **shared)
        self.chunk_size = rows_a_chunk(self.vocab_size or 1)
        self.validate_terms, self.term_means = validate_terms, TermMeans(self.term_weights)
        self.means = StageMeans("nll")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the pivot's token logits (B, T, V) in nats."""
        return self._pivot(input_ids=input_ids, attention_mask=attention_mask).logits

    @property
    def _pivot(self) -> PreTrainedModel:
        if self.pivot is None:
            raise ValueError("Expected a `pivot` to train or to evaluate, but got None, which serves predicting only.")
        return self.pivot

    # ------------------------------------------------------------------ sources

    def setup(self, stage: str) -> None:
        """Load the sources that this stage runs: to fit those that weigh something, to predict all.

        Raises:
            ValueError: If one cannot be loaded, or a cache lacks what a term needs or some of the training samples.
        """
        for name in {"fit": self.term_weights.used_sources, "predict": list(self._sources)}.get(stage, []):
            source = self._sources.load(name)
            if stage == "fit":
                data = getattr(self._trainer, "datamodule", None)
                debiases = self._sources.chunk_debias is not None
                check_cached(name, source, self.term_weights.of(name), self.criterion, data, debiases=debiases)

    @property
    def sources(self) -> dict[str, LogitSource | LogitCache]:
        """All sources by name, loaded."""
        return {name: self._sources.load(name) for name in self._sources}

    @cached_property
    def pivot_tokens(self) -> list[bytes | None] | None:
        """What each token of the pivot stands for: by the data module's tokenizer, or the one beside the pivot."""
        data = getattr(self._trainer, "datamodule", None)
        tokenizer = data.tokenizer if offers(data, HasTokenizer) else None
        if tokenizer is None and self._pivot_name is not None:
            tokenizer = find_tokenizer(self._pivot_name)
        return None if tokenizer is None else token_table(tokenizer)

    # ------------------------------------------------------------------ losses

    def losses(self, batch: Mapping[str, Any]) -> GLDLosses:
        """Return every term before weighting; with λ = 0 the cross-entropy alone.

        Args:
            batch: `input_ids`, `attention_mask` and `labels` (B, T); `response_bytes` (or `response_ends`, of any
                unit) (B, T) and `sources` for sources with other tokenizers, `sample_ids` (B,) for cached ones,
                `teachers`, B names, for the routing by a column.

        Raises:
            ValueError: If tokens are another tokenizer's, a cache lacks a sample or what a term needs, or a source
                emits NaN.
        """
        weights = self.term_weights.at(self.global_step)
        shares: dict[str, Tensor] = {}
        if weights and self.source_routing == "column":
            shares = column_shares(batch, weights)
            weights = {name: weights[name] for name in shares}
        states = counted_states(self._pivot, batch)
        shown = self._shown(batch, states)
        compared = [self._sources.compare(name, list(terms), **shown) for name, terms in weights.items()]
        if self.source_routing == "nll":
            shares = nll_shares(compared, self.routing_temperature)
        return self._collect(states, compared, shares)

    def _shown(self, batch: Mapping[str, Any], states: CountedStates) -> dict[str, Any]:
        """Return what a source is compared with, beside the pivot's logits."""
        own: dict[str, Any] = {"mask": states.mask, "vocab_size": self.vocab_size, "step": self.global_step}
        return {**own, "batch": batch, "pivot_tokens": lambda: self.pivot_tokens}

    def _collect(self, states: CountedStates, compared: list[SourceComparison], shares: dict[str, Tensor]) -> GLDLosses:
        """Make the pivot's logits, and return all terms of the sources that it is compared with."""
        mask, hidden, labels = states
        rows = pivot_rows(
            self._head,
            hidden,
            labels,
            compared,
            vocab_size=self.vocab_size,
            top_k=self.top_k,
            temperature=value_at(self.temperature, self.global_step),
            kl=(self.kl_kind, self.kl_beta),
            chunk_size=self.chunk_size,
        )
        return collect_losses(compared, rows, self.criterion, mask, shares, chunk_temperature=self.chunk_temperature)

    # ------------------------------------------------------------------ the pivot

    def _head(self, rows: Tensor) -> Tensor:
        return self.output_rule.logits(cast(nn.Linear, self._pivot.get_output_embeddings()), rows)

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Note how the first texts end, and check the labels of the first batch, on an accelerator too."""
        self.end_tokens.watch(batch)
        if batch_idx == 0:
            check_labels(batch["labels"], self._num_embeddings, wait=True)  # once: the host waits for the device

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the weighted sum of all terms; a zero with a graph if nothing counts."""
        losses = self.losses(batch)
        kd_weight, weights = self.term_weights.kd_weight_at(self.global_step), self.term_weights.at(self.global_step)
        loss = (1 - kd_weight) * losses.ce
        self.log("train/loss_ce", losses.ce)
        for name, terms in losses.terms.items():
            share = losses.shares.get(name, 1.0)
            for term, values in terms.items():
                loss = loss + kd_weight * self.weights[name] * weights[name][term] * (share * values).mean()
            suffix = self.term_weights.suffix(name)
            self.log_dict({f"train/{key}{suffix}": value for key, value in losses.logged(name).items()})
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the injected optimizer and scheduler."""
        return make_optimizers(self.parameters(), self.optimizer, self.lr_scheduler, trainer=self._trainer)

    # ------------------------------------------------------------------ evaluation
    # Written out in each module, as Lightning names them: the house has no shared LightningModule base class.

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sum the cross-entropy over tokens, and the terms of the sources that are at hand over samples."""
        weights = self.term_weights.at(self.global_step) if self.validate_terms else {}
        states = counted_states(self._pivot, batch)
        shown = {**self._shown(batch, states), "tell": rank_zero_info}
        tried = [self._sources.try_compare(name, list(terms), **shown) for name, terms in weights.items()]
        losses = self._collect(states, [one for one in tried if one is not None], {})
        self.means.update("val", nll=losses.nll)
        if weights:
            self.term_means.update(losses.terms, counts=states.mask.any(-1))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sum the cross-entropy over tokens."""
        self.means.update("test", nll=self._collect(counted_states(self._pivot, batch), [], {}).nll)

    def on_validation_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks, and the terms."""
        self._log_means("val")
        self.log_dict(self.term_means.compute(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log mean loss and perplexity over all tokens of all ranks."""
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        self.log_dict(loss_and_perplexity(stage, **self.means.compute(stage)), prog_bar=True, sync_dist=True)

    # ------------------------------------------------------------------ prediction for a cache, and export

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the top-k logits of every source, for `LogitCacheWriter`."""
        if "sample_ids" not in batch:
            raise ValueError(
                f"Expected batches with `sample_ids`, as InstructionDataModule gives them, but got {sorted(batch)}."
            )
        return {
            "sample_ids": batch["sample_ids"],
            "sources": {name: self._sources.logits(name, batch, self.global_step) for name in self._sources},
        }

    @property
    def cache_settings(self) -> dict[str, dict[str, Any]]:
        """Settings that the top-k logits of each source depend on.

        Raises:
            ValueError: If the logits of a source are in a cache already, or τ changes.
        """
        return self._sources.settings()

    @property
    def cache_tokens(self) -> dict[str, list[bytes | None] | None]:
        """The bytes of each token of each source, for its cache; None where the tokenizer is not known."""
        return {name: source.tokens for name, source in self.sources.items()}

    @property
    def card_text(self) -> str:
        """What was done, for the card of the saved model."""
        names, weights = ", ".join(f"`{name}`" for name in self._sources) or "none", self.term_weights
        share = "" if callable(weights.kd_weight) else f", a share of {weights.kd_weight:g} of the loss"
        return (
            "Fused by graph-on-logits distillation (InfiGFusion, arXiv 2505.13893; `GLDFusionModule`): it learned from"
            f" the {self.top_k} likeliest tokens of its sources {names} by the terms {', '.join(weights.terms)}{share},"
            " and by cross-entropy."
        )

    def save_pretrained(self, folder: str | Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None) -> None:
        """Write the pivot in its own architecture, for `from_pretrained`, adapters merged; see `save_model_folder`."""
        options: dict[str, Any] = {"tokenizer": tokenizer, "dtype": dtype, "trainer": self._trainer}
        save_model_folder(folder, self._pivot, self.card_text, end_tokens=self.end_tokens, **options)


def _has_code(value: Any) -> bool:
    """Return whether a value is or holds a module or a function, which do not belong into a checkpoint."""
    return callable(value) or (isinstance(value, Mapping) and any(map(_has_code, value.values())))
