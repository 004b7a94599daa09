"""Terms that say what a source knows: divergences of next tokens, and of the likelihoods of chunks.

Letters: B batch, T positions of the pivot, U positions of the source, N of the pivot's that predict a label, k `top_k`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.chunk_debiasing import close_chunks, merge_cuts
from lit_logits.functional.chunk_likelihood import chunk_likelihood_loss, sum_chunks
from lit_logits.functional.matched_tokens import UnmatchedTokens, match_top_k, match_vocabularies
from lit_logits.functional.reductions import sample_means, true_places
from lit_logits.functional.top_k_logits import SourceLogits, gather_positions
from lit_logits.modules.gld_fusion.alignment import SourceAlignment
from lit_logits.modules.gld_fusion.cached import without_label_log_probs
from lit_logits.modules.gld_fusion.sources import LogitSource, view_of
from lit_logits.storage.logit_cache import LogitCache

__all__ = [
    "ChunkTerms",
    "TokenTargets",
    "check_same_vocabulary",
    "chunk_terms",
    "has_same_vocabulary",
    "match_source",
    "token_targets",
]


class TokenTargets(NamedTuple):
    """What `top_k_kl` compares the pivot's logits with.

    Attributes:
        token_ids: (N, k) ids of the pivot, −1 where there is none, as where the source is not aligned; P times as many
            for pieces of tokens.
        log_probs: of their shape, in nats.
        tail: (N,) probability of all other tokens.
    """

    token_ids: Tensor
    log_probs: Tensor
    tail: Tensor


class ChunkTerms(NamedTuple):
    """Result of `chunk_terms`.

    Attributes:
        losses: (B,) nats; 0 for a sample without chunks.
        share: scalar, of the chunks that are left once they are merged, 1 without debiasing.
    """

    losses: Tensor
    share: Tensor


def token_targets(
    source: SourceLogits, alignment: SourceAlignment, mask: Tensor, vocab_size: int, table: Tensor | None = None
) -> TokenTargets:
    """Return what a source says of the pivot's next tokens.

    Args:
        source: (B, U).
        alignment: of the pivot's positions with it.
        mask: (B, T) the N positions of the pivot that predict a label.
        vocab_size: V of the pivot; what a padded table of the source has beyond it belongs to the tail.
        table: (W,) or (W, P) of `match_vocabularies`; None where the vocabularies are one.
    """
    partner = alignment.partner
    top = gather_positions(source.top_k, partner.clamp(min=0))
    rows = true_places(mask)  # once, as the host waits to learn how many there are
    token_ids, log_probs, tail = (one.flatten(0, 1)[rows] for one in (top.token_ids, top.log_probs, top.tail))
    if table is not None:
        token_ids, log_probs, tail = match_top_k(token_ids, log_probs, table, tail=tail)
    is_beyond = token_ids >= vocab_size
    tail = tail + log_probs.exp().masked_fill(~is_beyond, 0.0).sum(-1)
    is_there = (partner.flatten()[rows] >= 0).unsqueeze(-1) & ~is_beyond
    return TokenTargets(token_ids.masked_fill(~is_there, -1), log_probs, tail)


def chunk_terms(
    label_log_probs: Tensor,
    source: SourceLogits,
    alignment: SourceAlignment,
    *,
    temperature: float,
    same_tokens: bool,
    name: str = "source",
    boundary_log_probs: Tensor | None = None,
    threshold: float = 0.0,
) -> ChunkTerms:
    """Compute the mean of `chunk_likelihood_loss` over the chunks of each sample.

    Args:
        label_log_probs: (B, T) of the pivot for the token that came after each position, 0 where none counts.
        source: (B, U), with its own.
        alignment: of the pivot's positions with it.
        temperature: τ of the chunks.
        same_tokens: whether both read the same tokens; else what follows the last place that both have read is left
            out, which may be the end of a template or of a response that was cut.
        name: of the source, for messages.
        boundary_log_probs: (B, T) of the pivot for a boundary at each position, to compare chunks together with a new
            word behind them (`close_chunks`), which the source must have, too; None compares them as they are.
        threshold: γ of `merge_cuts`, by the source.

    Raises:
        ValueError: If the source has no log-probabilities of the tokens that came.
    """
    if source.label_log_probs is None:
        raise without_label_log_probs(name)
    partner = alignment.partner
    is_cut, places = partner >= 0, partner.clamp(min=0)
    all_cuts, theirs_behind = is_cut, None
    if boundary_log_probs is not None and source.boundary_log_probs is not None:
        theirs_behind = source.boundary_log_probs.gather(-1, places)
        is_cut = merge_cuts(all_cuts, theirs_behind, threshold=threshold)
    # Positions that are no cut write to a column of their own behind the others.
    num_places = source.mask.shape[-1]
    is_source_cut = source.mask.new_zeros(len(partner), num_places + 1)
    is_source_cut = is_source_cut.scatter(1, partner.masked_fill(~is_cut, num_places), True)[:, :num_places]
    own = sum_chunks(label_log_probs, is_cut)
    theirs = sum_chunks(source.label_log_probs.masked_fill(~source.mask, 0.0), is_source_cut).gather(-1, places)
    if boundary_log_probs is not None and theirs_behind is not None:
        own, theirs = close_chunks(own, boundary_log_probs, is_cut), close_chunks(theirs, theirs_behind, is_cut)
    counts = is_cut if same_tokens else _with_end(is_cut)
    losses = chunk_likelihood_loss(own, theirs, counts, temperature=temperature, reduction="none")
    share = counts.sum() / (all_cuts if same_tokens else _with_end(all_cuts)).sum().clamp(min=1)
    return ChunkTerms(sample_means(losses, counts), share)


def _with_end(is_cut: Tensor) -> Tensor:
    """Return the cuts (B, T) that another one follows: where it begins, a chunk has its end."""
    places = torch.arange(is_cut.shape[-1], device=is_cut.device)
    return is_cut & (places < places.masked_fill(~is_cut, -1).amax(-1, keepdim=True))


def has_same_vocabulary(name: str, source: LogitSource | LogitCache, batch: Mapping[str, Any]) -> bool:
    """Return whether a source has the vocabulary of the batch's own tokens, as far as both tell."""
    own, theirs = batch.get("tokenizer_id"), view_of(batch, name).get("tokenizer_id", source.tokenizer_id)
    if isinstance(source, LogitCache) and source.tokenizer_id is not None:  # the batch need not know its tokens
        theirs = source.tokenizer_id
    if own is None or theirs is None:
        return view_of(batch, name) is batch
    return int(own) == int(theirs)


def check_same_vocabulary(name: str, source: LogitSource | LogitCache, batch: Mapping[str, Any]) -> None:
    """Raise unless a source has the vocabulary of the batch's own tokens.

    Raises:
        ValueError: If it has another one.
    """
    if not has_same_vocabulary(name, source, batch):
        raise ValueError(
            f"Expected source {name!r} to have the pivot's tokenizer, whose next tokens the term 'kl' compares, but it"
            " has another one. Give it a weight of its own, `terms: {kl: {NAME: ...}}` for the sources that share it,"
            " and `matched` or `chunk` for the others."
        )


def match_source(
    name: str, source: LogitSource | LogitCache, pivot_tokens: list[bytes | None] | None, unmatched: UnmatchedTokens
) -> Tensor:
    """Return the table of `match_vocabularies` for a source.

    Raises:
        ValueError: If it is not known what the tokens of either stand for.
    """
    if pivot_tokens is None:
        raise ValueError(
            "Expected to know the pivot's tokenizer, whose tokens 'matched' terms and nodes compare with those of the"
            " sources, but got none. Train with a data module that has a `tokenizer`, or name the pivot by a path that"
            " has one."
        )
    if source.tokens is None:
        raise ValueError(
            f"Expected to know the tokenizer of source {name!r}, whose tokens 'matched' terms and nodes compare, but"
            " got none. Name the source by a path that has one, or write its cache again."
        )
    return match_vocabularies(pivot_tokens, source.tokens, unmatched=unmatched)
