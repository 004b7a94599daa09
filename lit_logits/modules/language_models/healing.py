"""The model that a trained one came from, which heals it: what was cut away is learned back by imitation.

Letters: N positions that predict a token that counts, d hidden size, V vocabulary.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_logits.functional.chunks import chunked_rows
from lit_logits.functional.kd_losses import kd_kl_divergence
from lit_logits.functional.reductions import at_least_float32
from lit_logits.modules.language_models.calls import counted_states
from lit_logits.modules.language_models.frozen import FrozenModels
from lit_logits.modules.language_models.probes import OutputRule

__all__ = ["HealingLosses", "OriginalLM", "healing_losses", "keep_original_lm"]


class OriginalLM(FrozenModels):
    """A whole causal language model, held out of training, that gives hidden states and logits to imitate.

    Args:
        model: of transformers; frozen in place.
        rule: how it makes logits of its last hidden states.
    """

    def __init__(self, model: PreTrainedModel, rule: OutputRule) -> None:
        super().__init__(model)
        self.rule = rule

    @torch.no_grad()
    def states(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the hidden states (N, d) that the output layer reads where a token that counts is predicted."""
        return counted_states(self.models[0], batch).hidden

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """Return token logits (..., V) of hidden states."""
        return self.rule.logits(self.models[0].get_output_embeddings(), rows)


class HealingLosses(NamedTuple):
    """Result of `healing_losses`, (N,) each, in nats but for `state`.

    Attributes:
        ce: cross-entropy of the next token.
        kd: KL(original ‖ ours) over the vocabulary; None without an original.
        state: squared error of the hidden states that the output layer reads, a mean over d; None without an original.
    """

    ce: Tensor
    kd: Tensor | None = None
    state: Tensor | None = None


def healing_losses(
    model: PreTrainedModel,
    rule: OutputRule,
    batch: Mapping[str, Any],
    original: OriginalLM | None = None,
    *,
    chunk_size: int,
) -> HealingLosses:
    """Run a model, and beside it the original if there is one, and compare both where a token that counts is predicted.

    The (N, V) logits of either are never whole.

    Args:
        model: that learns.
        rule: how it makes logits.
        batch: see `counted_states`.
        original: that it came from.
        chunk_size: positions whose logits are in memory at a time.
    """
    counted = counted_states(model, batch)
    head = cast(nn.Linear, model.get_output_embeddings())

    def compare(rows: Tensor, labels: Tensor, *theirs: Tensor) -> tuple[Tensor, ...]:
        logits = rule.logits(head, rows)
        ce = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
        targets = [cast(OriginalLM, original).logits(one) for one in theirs]
        return (ce, *(kd_kl_divergence(logits, one, temperature=1.0, reduction="none") for one in targets))

    theirs = [] if original is None else [original.states(batch)]
    ce, *kd = chunked_rows(compare, counted.hidden, counted.labels, *theirs, chunk_size=chunk_size)
    if original is None:
        return HealingLosses(ce)
    state = (at_least_float32(counted.hidden) - at_least_float32(theirs[0])).square().mean(-1)
    return HealingLosses(ce, kd[0], state)


def keep_original_lm(source: object, model: PreTrainedModel, rule: OutputRule, *, is_cut: bool) -> OriginalLM:
    """Keep the model that is about to be trained, or that a smaller one was cut from, as it is.

    Args:
        source: that it was loaded from; a mapping is a config.
        model: the whole one.
        rule: how it makes logits.
        is_cut: whether a copy is trained, so that this one can be held itself.

    Raises:
        ValueError: If the model has random weights: there is nothing to imitate.
    """
    if isinstance(source, dict):
        raise ValueError(
            "Expected a pretrained model for `kd_weight` and `state_weight`, which imitate it, but `model` is a config"
            " with random weights."
        )
    return OriginalLM(model if is_cut else copy.deepcopy(model), rule)
