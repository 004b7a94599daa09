"""One pass over some batches: how often tokens occur, and which directions hidden states take.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_logits.functional import all_reduce_sum_, check_labels

__all__ = ["Calibration", "calibrate"]


class Calibration(NamedTuple):
    """Result of `calibrate`, the same on all ranks.

    Attributes:
        token_counts: (V,) float32, how often each token is a target.
        hidden_second_moment: (d, d) float32 E[h hᵀ] over the positions that have a target, or None.

    """

    token_counts: Tensor
    hidden_second_moment: Tensor | None


@torch.no_grad()
def calibrate(
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_batches: int,
    vocab_size: int,
    device: torch.device,
    backbone: nn.Module | None = None,
    ignore_index: int = -100,
    progress_bar: bool = False,
) -> Calibration:
    """Count targets and, with a `backbone`, average h hᵀ over the first `num_batches` batches of every rank.

    Every rank must call it; sums are taken over all of them.

    Args:
        batches: dicts with `input_ids`, `labels` (unshifted) and, if there is padding, `attention_mask`, all (B, T).
        num_batches: how many of them each rank reads.
        vocab_size: V.
        device: where to compute.
        backbone: module whose output has `last_hidden_state` (B, T, d); it runs in eval mode.
        ignore_index: label of positions that do not count.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: for a label outside the vocabulary, or if no batch has a target.

    """
    counts = torch.zeros(vocab_size, device=device)
    moment: Tensor | None = None
    was_training = backbone is not None and backbone.training
    if backbone is not None:
        backbone.eval()
    total = num_batches if num_batches < 1 << 31 else None
    for batch in tqdm(
        islice(batches, num_batches), "calibration", total=total, disable=None if progress_bar else True, leave=False
    ):
        labels = batch["labels"].to(device)[:, 1:]
        check_labels(labels, vocab_size, ignore_index=ignore_index, wait=True)
        counts += torch.bincount(labels[labels != ignore_index], minlength=vocab_size)
        if backbone is not None:
            mask = batch.get("attention_mask")
            output = backbone(
                input_ids=batch["input_ids"].to(device), attention_mask=None if mask is None else mask.to(device)
            )
            hidden = output.last_hidden_state[:, :-1][labels != ignore_index].float()
            moment = hidden.T @ hidden if moment is None else moment.addmm_(hidden.T, hidden)
    if backbone is not None:
        backbone.train(was_training)
    all_reduce_sum_(counts)
    if not bool(counts.any()):
        raise ValueError("Expected calibration batches with targets, but none of their labels counts.")
    return Calibration(counts, None if moment is None else all_reduce_sum_(moment) / counts.sum())
