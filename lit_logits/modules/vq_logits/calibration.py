"""Statistics of some batches, in one pass: token counts, second moments of hidden states, information of logits.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import copy
from collections.abc import Iterable, Mapping, Sized
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lit_logits.contracts import Calibrate, Calibration, OutputLayer
from lit_logits.functional.checks import check_labels
from lit_logits.functional.cooccurrence import PairCounts, count_pairs, merge_pairs, sum_pairs_of_ranks
from lit_logits.functional.distributed import all_reduce_sum_
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import soft_cap
from lit_logits.modules.language_models.calls import text_inputs

__all__ = ["calibrate", "calibrator", "count_text", "fresh_loader"]

_PAIRS_AT_ONCE = 1 << 20
_CHUNK_ELEMENTS = 1 << 25  # probabilities a chunk: 128 MiB in float32


def calibrator(
    batches: Iterable[Mapping[str, Tensor]],
    backbone: nn.Module,
    layer: OutputLayer,
    *,
    num_batches: int,
    hidden_scale: float = 1.0,
    logit_cap: float | None = None,
    **options: Any,
) -> Calibrate:
    """Return what a head is given to read its data with: `count_text` or `calibrate`, as it asks.

    Args:
        batches: of training; as many as the head asks for are read, from the first one on.
        backbone: makes the hidden states.
        layer: pretrained output layer, whose logits tell which tokens matter.
        hidden_scale: of the hidden states that the head reads; see `calibrate`.
        logit_cap: of the layer's logits.
        num_batches: how many are read where hidden states, or counts alone, are asked for.
        **options: `vocab_size`, `device` and `progress_bar` of both.
    """

    def read(*, second_moment: bool = False, information: bool = False, pair_tokens: int | None = None) -> Calibration:
        if pair_tokens is not None:
            return count_text(batches, num_tokens=pair_tokens, **options)
        return calibrate(
            batches,
            num_batches=num_batches,
            backbone=backbone if second_moment else None,
            hidden_scale=hidden_scale,
            logit_cap=logit_cap,
            output_layer=(layer.weight, layer.bias) if layer.weight is not None and information else None,
            **options,
        )

    return read


@torch.no_grad()
def calibrate(
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_batches: int,
    vocab_size: int,
    device: torch.device,
    backbone: nn.Module | None = None,
    output_layer: tuple[Tensor, Tensor | None] | None = None,
    hidden_scale: float = 1.0,
    logit_cap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    progress_bar: bool = False,
) -> Calibration:
    """Count targets and, with a `backbone`, average h hᵀ over the first `num_batches` batches of every rank.

    With its `output_layer` too, the information of each token's logit is averaged, which costs another product with
    (V, d). Every rank must call it; sums are taken over all of them.

    Args:
        batches: dicts with `input_ids`, `labels` (unshifted) and maybe `attention_mask` and `position_ids`, all (B, T).
        num_batches: how many of them each rank reads.
        vocab_size: V.
        device: where to compute.
        backbone: module whose output has `last_hidden_state` (B, T, d); it runs in eval mode.
        output_layer: weight (V, d) and bias (V,) or None of the layer that reads those hidden states.
        hidden_scale: factor of the hidden states that the layer reads.
        logit_cap: c of the soft cap of the layer's logits, or None.
        ignore_index: label of positions that do not count.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: If a label is outside the vocabulary, or no batch has a target.
    """
    counts = torch.zeros(vocab_size, device=device)
    moment: Tensor | None = None
    information: _Information | None = None
    was_training = backbone is not None and backbone.training
    if backbone is not None:
        backbone.eval()
    length = num_batches if num_batches < 1 << 31 else None  # a huge number means all batches; how many is unknown
    for batch in tqdm(
        islice(batches, num_batches), "calibration", total=length, disable=None if progress_bar else True, leave=False
    ):
        labels = batch["labels"].to(device)[:, 1:]
        check_labels(labels, vocab_size, ignore_index=ignore_index, wait=True)
        counts += torch.bincount(labels[labels != ignore_index], minlength=vocab_size)
        if backbone is not None:
            inputs = text_inputs(backbone, batch.get("attention_mask"), batch.get("position_ids"))
            output = backbone(input_ids=batch["input_ids"].to(device), **inputs)
            hidden = output.last_hidden_state[:, :-1][labels != ignore_index].float() * hidden_scale
            moment = hidden.T @ hidden if moment is None else moment.addmm_(hidden.T, hidden)
            if output_layer is not None:
                information = information or _Information(*output_layer, hidden, logit_cap)
                information.add(hidden)
    if backbone is not None:
        backbone.train(was_training)
    # Sums first, then the division: ranks may have read different numbers of tokens.
    all_reduce_sum_(counts)
    if not bool(counts.any()):
        raise ValueError("Expected calibration batches with targets, but none of their labels counts.")
    total = counts.sum()
    mean = None if moment is None else all_reduce_sum_(moment) / total
    if information is None:
        return Calibration(counts, mean)
    tokens, informed = (all_reduce_sum_(values) for values in (information.tokens, information.moment))
    return Calibration(counts, mean, tokens / total, informed / tokens.sum().clamp(min=1e-30))


def count_text(
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_tokens: int,
    vocab_size: int,
    device: torch.device,
    ignore_index: int = IGNORE_INDEX,
    progress_bar: bool = False,
) -> Calibration:
    """Count targets, and pairs of tokens that stand near each other, in one pass over the text.

    Every rank must call it; sums are taken over all of them. Memory grows with the number of different pairs.

    Args:
        batches: dicts with `input_ids` and `labels` (unshifted), both (B, T).
        num_tokens: tokens that each rank reads at most.
        vocab_size: V.
        device: where to compute.
        ignore_index: label of positions that do not count.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: If a label is outside the vocabulary, or no batch has a target.
    """
    counts = torch.zeros(vocab_size, device=device)
    parts: list[PairCounts] = []
    size = read = 0
    length = len(batches) if isinstance(batches, Sized) else None
    for batch in tqdm(batches, "pairs of tokens", length, disable=None if progress_bar else True, leave=False):
        input_ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        check_labels(labels, vocab_size, ignore_index=ignore_index, wait=True)
        targets = labels[:, 1:]
        counts += torch.bincount(targets[targets != ignore_index], minlength=vocab_size)
        parts.append(count_pairs(input_ids, labels, vocab_size, ignore_index=ignore_index))
        # Merged whenever what came since the last time outweighs it, so that each pair is sorted a few times only.
        if len(parts) > 1 and sum(len(part.keys) for part in parts[1:]) > max(size, _PAIRS_AT_ONCE):
            parts = [merge_pairs(parts)]
            size = len(parts[0].keys)
        read += input_ids.numel()
        if read >= num_tokens:
            break
    all_reduce_sum_(counts)
    if not bool(counts.any()):
        raise ValueError("Expected batches with targets, but none of their labels counts.")
    none = PairCounts(torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device))
    return Calibration(counts, None, pairs=sum_pairs_of_ranks(merge_pairs([none, *parts])))


class _Information:
    """Sums over positions of p (1 − p) for each token, and of h hᵀ weighted by the sum of p (1 − p) over tokens."""

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor, cap: float | None) -> None:
        self.weight, self.bias, self.cap = weight, bias, cap
        self.tokens = hidden.new_zeros(len(weight))
        self.moment = hidden.new_zeros(hidden.shape[1], hidden.shape[1])

    def add(self, hidden: Tensor) -> None:
        """Take in the positions (N, d), a chunk at a time."""
        for chunk in hidden.split(max(1, _CHUNK_ELEMENTS // len(self.weight))):
            logits = soft_cap(F.linear(chunk.to(self.weight.dtype), self.weight, self.bias).float(), self.cap)
            probs = logits.softmax(dim=-1)
            variances = probs.sub_(probs.square())
            if self.cap is not None:  # of the logit before the cap
                variances *= (1 - (logits / self.cap).square()).square()
            self.tokens += variances.sum(0)
            self.moment.addmm_(chunk.T * variances.sum(1), chunk)


def fresh_loader(loader: Any) -> Any:
    """Return a loader to read before training, which leaves the persistent workers of the given one alone."""
    if not (isinstance(loader, DataLoader) and loader.persistent_workers):
        return loader
    # Persistent workers keep one iterator in the loader. To read from it would move the position where training starts.
    loader = copy.copy(loader)
    loader._iterator = None
    return loader
