"""The token that ends the texts that a model learns from: read off the labels, as templates end in tokens of their own.

Letters: B samples, T positions.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_logits.functional.labels import IGNORE_INDEX

__all__ = ["EndTokens", "end_candidates", "last_candidates"]

_WATCHED_SAMPLES = 64  # whose labels are kept, as on an accelerator the host waits for them


class EndTokens:
    """The labels of the first texts of a training, to find the token that ends them when the model is saved.

    Example:
        >>> ends = EndTokens()
        >>> ends.watch({"labels": torch.tensor([[-100, 5, 2], [-100, 4, 2]])})
        >>> len(ends.texts)
        2
    """

    def __init__(self) -> None:
        self.texts: list[Tensor] = []

    def watch(self, batch: Any) -> None:
        """Keep the labels of a batch, unless there are enough, or they are no tokens."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if len(self.texts) >= _WATCHED_SAMPLES or not isinstance(labels, Tensor):
            return
        if labels.ndim == 2 and not labels.is_floating_point():  # not the classes of images
            self.texts += labels[: _WATCHED_SAMPLES - len(self.texts)].cpu().unbind()

    def choose(self, tokenizer: Any) -> int | None:
        """Return the token that most texts end by, the tokenizer's eos if it is one of them; None if it is not known.

        A warning tells if no text has a token that may end it.
        """
        ends: Counter[int | None] = Counter()
        candidates = end_candidates(tokenizer)
        for labels in self.texts if candidates else ():
            ends += last_candidates(labels.unsqueeze(0), candidates)
        found = {token: count for token, count in ends.items() if token is not None}
        if ends and not found:
            warnings.warn(
                "Expected labels to hold a token that ends a text, but those of the first batches hold none: the saved"
                " model may not end its texts. Let the template or the data module put one behind every response.",
                stacklevel=2,
            )
        eos = getattr(tokenizer, "eos_token_id", None)
        return eos if eos in found else max(found, key=lambda token: found[token], default=None)


def end_candidates(tokenizer: Any) -> list[int]:
    """Return the special tokens that may end a text: all but those that begin or fill up one and do nothing else.

    There are none for what is no tokenizer of transformers.
    """
    if not hasattr(tokenizer, "all_special_ids"):
        return []
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    others = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return sorted(special - others)


def last_candidates(labels: Tensor, candidates: list[int]) -> Counter[int | None]:
    """Count the last candidate in the labels of each sample; None counts samples with labels and without a candidate.

    Args:
        labels: (B, T), ignored ones included.
        candidates: token ids.

    Example:
        >>> labels = torch.tensor([[-100, 5, 2, 9], [-100, 5, 6, -100], [-100, -100, -100, -100]])
        >>> last_candidates(labels, [0, 2]) == {2: 1, None: 1}
        True
    """
    counts: Counter[int | None] = Counter()
    for row in labels[(labels != IGNORE_INDEX).any(-1)]:
        found = row[torch.isin(row, torch.tensor(candidates, dtype=row.dtype, device=row.device))]
        counts[int(found[-1]) if len(found) else None] += 1
    return counts
