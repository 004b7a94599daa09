"""The token that ends the texts that a model learns from: read off the labels, as templates end in tokens of their own.

Letters: B samples, T positions.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lit_logits.functional.labels import IGNORE_INDEX

__all__ = ["end_candidates", "last_candidates"]


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
