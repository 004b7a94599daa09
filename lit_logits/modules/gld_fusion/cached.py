"""Sources whose logits lie in a cache: whether it holds what training needs, and what a batch takes of it.

Letters: B batch, T positions.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_logits.contracts import HasLayoutIds, HasSampleIds, offers
from lit_logits.functional.top_k_logits import SourceLogits, TopKLogits
from lit_logits.modules.gld_fusion.criterion import GLDCriterion, without_scale
from lit_logits.modules.gld_fusion.debiasing import without_boundary
from lit_logits.modules.gld_fusion.sources import LogitSource, counted_positions, view_of
from lit_logits.storage.logit_cache import LogitCache

__all__ = ["check_cached", "read_cached", "without_label_log_probs"]


def check_cached(
    name: str,
    source: LogitSource | LogitCache,
    terms: Collection[str],
    criterion: GLDCriterion,
    data: object = None,
    *,
    debiases: bool = False,
) -> None:
    """Raise unless a source, if it is a cache, holds what training needs.

    Args:
        name: of the source.
        source: any; a model has all that is needed.
        terms: that it is compared by.
        criterion: of sorted values and graphs.
        data: data module of the training, or None.
        debiases: whether chunks are compared together with a new word behind them.

    Raises:
        ValueError: If it lacks what a term needs, or samples; it says how many.
    """
    if not isinstance(source, LogitCache):
        return
    values = {"uld": criterion.uld_values, "gld": criterion.graphs.values}
    if not source.has_scale and any(values[term] != "softmax" for term in values if term in terms):
        raise without_scale(name)
    if "chunk" in terms and not source.has_label_log_probs:
        raise without_label_log_probs(name)
    if debiases and "chunk" in terms and not source.has_boundary_log_probs and not _may_have_layout_of(data, source):
        raise without_boundary(name, source)
    if not offers(data, HasSampleIds):
        return
    wanted = torch.tensor(data.sample_ids("train"), dtype=torch.int64).unique()
    missing = wanted[~torch.isin(wanted, source.sample_ids)]
    if len(missing):
        raise ValueError(
            f"Expected the logit cache of {name!r}, {source.folder}, to hold all {len(wanted)} training samples, but it"
            f" was written for other data and lacks {len(missing)} of them, the first of which is {missing[0]}. Run"
            " `predict` with these data into the same folder, which adds what is missing, or import their answers, too."
        )


def _may_have_layout_of(data: object, source: LogitCache) -> bool:
    """Return whether a cache may have the pivot's own tokens, whose chunks need no debiasing.

    Batches tell, if the data module does not.
    """
    if source.layout_id is None:
        return False
    return not offers(data, HasLayoutIds) or data.layout_ids.get("") == source.layout_id


def without_label_log_probs(name: str) -> ValueError:
    """Return the error for a cache without the log-probabilities of the tokens that came, which are needed."""
    return ValueError(
        f"Expected the logit cache of {name!r} to hold the log-probabilities of the tokens that came, which the"
        " term 'chunk' needs, but it is one of version 1. Write it again, or leave the term out."
    )


def read_cached(name: str, cache: LogitCache, batch: Mapping[str, Any], top_k: int) -> SourceLogits:
    """Return what a cache holds of a batch, as far as the batch reaches.

    Args:
        name: of the source.
        cache: of it.
        batch: with `sample_ids` and the ends of responses. If it has a view of its own for the source, that and the
            cache must be of one tokenizer and layout. Without one the cache speaks for itself.
        top_k: k.

    Raises:
        ValueError: If the batch lacks what is needed, its tokens are others, or more than the cache has.
    """
    if "sample_ids" not in batch or "response_ends" not in batch:
        raise ValueError(
            f"Expected batches with `sample_ids` and `response_ends` for the logit cache of {name!r}, as"
            f" InstructionDataModule gives them, but got {sorted(batch)}."
        )
    view = view_of(batch, name)
    has_layout = cache.layout_id is not None and "layout_id" in view
    is_same = has_layout and int(view["layout_id"]) == cache.layout_id
    is_other = has_layout and not is_same
    if not has_layout and cache.tokenizer_id is not None and "tokenizer_id" in view:
        is_other = int(view["tokenizer_id"]) != cache.tokenizer_id
    if is_other and view is not batch:
        raise ValueError(
            f"Expected the tokens that the logit cache {cache.folder} was written for, but those of source {name!r} in"
            " the batch are of another tokenizer or template. Give the data module the same `source_tokenizers` as"
            f" then, or none for {name!r}, which the cache does not need, or write another cache."
        )
    logits = cache.read(batch["sample_ids"], top_k=top_k, device=batch["input_ids"].device)
    return _cut(logits, counted_positions(view).sum(-1), name, cache) if is_same else logits


def _cut(logits: SourceLogits, counts: Tensor, name: str, cache: LogitCache) -> SourceLogits:
    """Keep the first `counts` (B,) positions of each sample: a cache of a larger `max_length` holds more."""
    held = logits.mask.sum(-1)
    if bool((counts > held).any()):
        row = int((counts - held).argmax())
        raise ValueError(
            f"Expected the logit cache of {name!r}, {cache.folder}, to reach as far as the batch, but of a response of"
            f" {int(counts[row])} tokens it holds {int(held[row])}. Lower `max_length` to what it was written with, or"
            " write another cache."
        )
    width = max(1, int(counts.max()))
    mask = logits.mask[:, :width] & (torch.arange(width, device=counts.device) < counts.unsqueeze(-1))
    top = TopKLogits(*(values[:, :width] for values in logits.top_k))
    given = logits.label_log_probs, logits.boundary_log_probs
    labelled = [None if values is None else values[:, :width].masked_fill(~mask, 0.0) for values in given]
    return SourceLogits(top, mask, logits.ends[:, :width].masked_fill(~mask, -1), *labelled)
