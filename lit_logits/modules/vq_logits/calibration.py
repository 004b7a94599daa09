"""Statistics of some batches, in one pass: token counts, second moments of hidden states, information of logits.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import copy
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lit_logits.contracts import Calibration
from lit_logits.functional.checks import check_labels
from lit_logits.functional.distributed import all_reduce_sum_
from lit_logits.functional.reductions import soft_cap
from lit_logits.modules.language_models.calls import accepted_inputs

__all__ = ["calibrate", "fresh_loader"]

_CHUNK_ELEMENTS = 1 << 25  # probabilities a chunk: 128 MiB in float32


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
    ignore_index: int = -100,
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
            mask = batch.get("attention_mask")
            optional = accepted_inputs(backbone, {"position_ids": batch.get("position_ids"), "use_cache": False})
            output = backbone(
                input_ids=batch["input_ids"].to(device),
                attention_mask=None if mask is None else mask.to(device),
                **optional,
            )
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
