"""Sources that a pivot learns from: frozen models, which read the text in their own tokens, or caches of their logits.

Letters: B batch, T sequence, N positions that count, d hidden size, V vocabulary, k `top_k`, M tokens
of a boundary.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_logits.functional.checks import may_read
from lit_logits.functional.chunk_debiasing import boundary_log_probs
from lit_logits.functional.chunks import chunked_rows, rows_a_chunk
from lit_logits.functional.labels import next_token_labels
from lit_logits.functional.reductions import at_least_float32, true_places
from lit_logits.functional.top_k_logits import SourceLogits, TopKLogits, place_rows, top_k_logits
from lit_logits.modules.gld_fusion.alignment import read_ends
from lit_logits.modules.language_models.calls import text_inputs
from lit_logits.modules.language_models.frozen import FrozenModels, input_device
from lit_logits.modules.language_models.inspect import check_causal_lm, digest_model, num_logits
from lit_logits.modules.language_models.loading import is_plain_causal_lm, load_causal_lm
from lit_logits.modules.language_models.tokenizers import find_tokenizer, token_table, tokenizer_id
from lit_logits.storage.logit_cache import LogitCache, is_logit_cache

__all__ = ["LogitSource", "counted_positions", "ends_to_align", "load_source", "view_of"]

Model = nn.Module | str


class LogitSource(FrozenModels):
    """A frozen causal language model that gives the top-k logits of responses, in chunks.

    It keeps its dtype under autocast too, and follows its batches to their device unless it is pinned.

    Args:
        model: causal language model of transformers; frozen in place.
        name: of the source, in errors and logs.
        origin: hub id or path that it came from, for the cache.
        tokenizer: its own, if it is known: then batches of another one are refused, and logits beyond its tokens
            (padding of the vocabulary) are left out.
        pinned: leave it where it is; default for a model that is not on the CPU.
        chunk_size: positions whose logits are in memory at a time; None goes by the memory that they take.

    Raises:
        ValueError: If the model is not a causal language model; see `check_causal_lm`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str = "source",
        origin: str = "",
        tokenizer: PreTrainedTokenizerBase | None = None,
        pinned: bool | None = None,
        chunk_size: int | None = None,
    ) -> None:
        check_causal_lm(model, f"the source {name!r}")
        if pinned is None:
            pinned = cast(torch.device, input_device(model)).type != "cpu"
        super().__init__(model, keep_dtype=True, pinned=pinned)
        self.name, self.origin = name, origin or type(model).__name__
        self.tokenizer_id = None if tokenizer is None else tokenizer_id(tokenizer)
        self.tokens = None if tokenizer is None else token_table(tokenizer)
        self.vocab_size = min(num_logits(model), num_logits(model) if tokenizer is None else len(tokenizer))
        self.chunk_size = rows_a_chunk(self.vocab_size, chunk_size)
        self.is_plain = is_plain_causal_lm(model)
        self._checked: set[str] = set()

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.models[0]

    @torch.no_grad()
    def forward(
        self, batch: Mapping[str, Any], top_k: int, temperature: float = 1.0, boundary: Tensor | None = None
    ) -> SourceLogits:
        """Return the top-k logits of the positions that predict a response.

        Args:
            batch: with `sources[name]` in this model's tokens, or itself in its tokens.
            top_k: k.
            temperature: τ.
            boundary: (M,) tokens whose log-probability in sum is wanted, too, as `boundary_tokens` finds them.

        Returns:
            The positions of each sample that count, without gaps, padded at the end; on the device of
            `batch["input_ids"]`.

        Raises:
            ValueError: If tokens are another tokenizer's, k is above the vocabulary, or logits are not finite; on an
                accelerator tokens and logits are looked at in the first batch alone.
        """
        view = view_of(batch, self.name)
        self._check(view)
        mask, home = counted_positions(view), view["input_ids"].device
        if self.anchor.device != home:
            self.to(home)
        device = cast(torch.device, input_device(self.model))
        inputs = {"input_ids": view["input_ids"].to(device)}
        inputs |= text_inputs(self.model, view.get("attention_mask"), view.get("position_ids"))
        with torch.autocast(device.type, enabled=False):
            hidden = self._hidden(inputs)
            rows_at = true_places(mask)  # once, as the host waits to learn how many there are
            # Of a model on several devices, the output is on the last one.
            hidden = hidden.flatten(0, 1)[rows_at.to(hidden.device)]
            labels = next_token_labels(view["labels"]).labels.flatten()[rows_at].to(hidden.device)
            ids = None if boundary is None else boundary.to(hidden.device)
            make = partial(self._rows, top_k=top_k, temperature=temperature, boundary=ids)
            found = chunked_rows(make, hidden, labels, chunk_size=self.chunk_size)
        size = len(TopKLogits._fields)
        label_log_probs, *rest = (values.to(home) for values in found)
        top, bounds = rest[:size], rest[size:]
        rows = TopKLogits(*top)
        if self._checks("logits", rows.log_normalizer) and not bool(rows.log_normalizer.isfinite().all()):
            raise ValueError(
                f"Expected the logits of source {self.name!r} to be finite, but got NaN or infinities at"
                f" {int((~rows.log_normalizer.isfinite()).sum())} of {len(rows.log_normalizer)} positions. Load it in"
                " another dtype (float16 overflows in models that were trained in bfloat16)."
            )
        given = read_ends(view)
        ends = (torch.full_like(view["input_ids"], -1) if given is None else given).flatten()[rows_at]
        # Without gaps, as a cache stores them: then sums over positions are the same to the bit, model or cache.
        counts = mask.sum(-1, keepdim=True)
        width = int(counts.max()) if may_read(counts) else mask.shape[1]  # on an accelerator the bound will do
        dense = torch.arange(max(1, width), device=home) < counts
        placed = torch.full_like(dense, -1, dtype=ends.dtype).masked_scatter(dense, ends)
        values = [one.new_zeros(dense.shape).masked_scatter(dense, one) for one in (label_log_probs, *bounds)]
        return SourceLogits(place_rows(rows, dense), dense, placed, *values)

    def settings(self, top_k: int, temperature: float) -> dict[str, Any]:
        """Return the settings that a cache of its logits depends on."""
        return {
            "model": self.origin,
            "model_digest": digest_model(self.model),
            "tokenizer_id": self.tokenizer_id,
            "top_k": top_k,
            "temperature": temperature,
            "vocab_size": self.vocab_size,
        }

    def _check(self, view: Mapping[str, Tensor]) -> None:
        """Raise if the tokens cannot be this model's; on an accelerator, where the host would wait, only at first."""
        if not self._checks("tokens", view["input_ids"]):
            return
        given = view.get("tokenizer_id")
        if given is not None and self.tokenizer_id is not None and int(given) != self.tokenizer_id:
            raise ValueError(
                f"Expected the tokens of source {self.name!r} to be of the tokenizer of {self.origin!r}, but they are"
                f" of another one. Name it in the data module: `source_tokenizers: {{{self.name}: {self.origin}}}`."
            )
        highest = int(view["input_ids"].max())
        rows = cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]
        if highest >= rows:
            raise ValueError(
                f"Expected tokens below {rows}, the vocabulary of source {self.name!r}, but got {highest}. Give the"
                " data module the tokenizer of this model in `source_tokenizers`."
            )

    def _checks(self, what: str, tensor: Tensor) -> bool:
        """Return whether to look at values: always where that is free, else once for each thing that is checked."""
        is_new = what not in self._checked
        if not may_read(tensor):
            self._checked.add(what)
        return is_new or may_read(tensor)

    def _hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what `_logits` takes: hidden states (B, T, d), or the logits of a model that changes them."""
        if self.is_plain:
            return self.model.base_model(**inputs).last_hidden_state
        return self.model(**inputs).logits  # whole, because only the model knows what it does to them

    def _rows(
        self, rows: Tensor, labels: Tensor, *, top_k: int, temperature: float, boundary: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the log-probabilities (N,) of the labels, what `top_k_logits` gives, and those of a boundary."""
        logits = self._logits(rows)
        top = top_k_logits(logits, top_k, temperature=temperature)
        total = top.log_normalizer if temperature == 1 else at_least_float32(logits).logsumexp(-1)
        bounds = () if boundary is None else (boundary_log_probs(logits, boundary),)
        return (logits.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1) - total, *top, *bounds)

    def _logits(self, rows: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(rows) if self.is_plain else rows
        return logits[..., : self.vocab_size]


def load_source(
    source: Model, name: str, kwargs: Mapping[str, Any] | None = None, *, chunk_size: int | None = None
) -> LogitSource | LogitCache:
    """Load a source: a model, or a cache of its logits.

    Args:
        source: hub id, local folder, `.gguf` path, a loaded causal language model, or the folder of a logit cache.
        name: of the source, in errors and logs.
        kwargs: for `from_pretrained`, such as `dtype` and `device_map`.
        chunk_size: positions whose logits are in memory at a time; None goes by the memory that they take.

    Raises:
        ValueError: If the source cannot be loaded, or the cache is incomplete.
    """
    if not isinstance(source, str):
        return LogitSource(cast(PreTrainedModel, source), name=name, chunk_size=chunk_size)
    if is_logit_cache(source):
        return LogitCache(source)
    folder = Path(source).expanduser()
    if caches := sorted(str(path) for path in folder.iterdir() if is_logit_cache(path)) if folder.is_dir() else []:
        raise ValueError(f"Expected the folder of one logit cache as source {name!r}, but {source} holds {caches}.")
    model, tokenizer = load_causal_lm(source, **(kwargs or {})), find_tokenizer(source)
    pinned = "device_map" in (kwargs or {})
    return LogitSource(model, name=name, origin=source, tokenizer=tokenizer, pinned=pinned, chunk_size=chunk_size)


def view_of(batch: Mapping[str, Any], name: str) -> Mapping[str, Tensor]:
    """Return the batch in the tokens of a source: its own view of the text, or the batch itself."""
    return batch.get("sources", {}).get(name, batch)


def counted_positions(view: Mapping[str, Tensor]) -> Tensor:
    """Return the mask (B, T) of positions that predict a label, wherever they end."""
    return next_token_labels(view["labels"]).mask


def ends_to_align(name: str, source: LogitSource | LogitCache, batch: Mapping[str, Any]) -> Tensor | None:
    """Return by which ends (B, T) of the pivot a source is aligned: the argument of `align_source`.

    It is None, position by position, where the source reads the pivot's own tokens. A cache of version 1 lacks some of
    these positions, and counts characters.

    Raises:
        ValueError: If the batch does not say how much a position has read, which another tokenizer needs.
    """
    view, is_cache = view_of(batch, name), isinstance(source, LogitCache)
    if is_cache and not source.counts_bytes:
        return batch["response_ends"]
    # A cache may hold other tokens than the batch, whose view of it may be missing.
    theirs = source.layout_id if is_cache else int(view["layout_id"]) if "layout_id" in view else None
    same = theirs is not None and "layout_id" in batch and int(batch["layout_id"]) == theirs
    if same or (view is batch and not is_cache):
        return None
    ends = read_ends(batch)
    if ends is None:
        raise ValueError(
            f"Expected batches with `response_bytes` or `response_ends`, by which the tokens of source {name!r} are"
            f" aligned, but got {sorted(batch)}."
        )
    return ends
