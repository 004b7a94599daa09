"""Other codes for tokens, by a step whose length is judged on text that is set aside.

Letters: N positions, d hidden size, V vocabulary, S stages.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from lit_logits.contracts import Reassigned
from lit_logits.functional.code_reassignment import CodeReassignment, Positions, TokenStatistics, reassign_by_loss
from lit_logits.functional.distributed import all_reduce_sum_

__all__ = ["mean_loss", "move_codes", "set_aside"]

_ONE_IN = 8  # one in as many batches is set aside
_MAX_NUMBERS = 1 << 24  # of hidden states that are kept: 64 MiB
# The sums take the curvature as if a token were as likely in all contexts. Where contexts differ it is higher along the
# few directions in which the token would move, and the whole step goes too far: in a training with V = 4,096 that step
# promised 0.50 nats and gained 0.00 where half of it gained 0.14, and later on it cost 0.32.
_DAMPINGS = (1.0, 2.0, 4.0, 8.0)


def set_aside(positions: Positions, held: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield most of the batches, and put the others into `held`: the first of every eight, while there is room.

    By whole batches, so that several processes set aside what one does. A batch that is the only one is divided.

    Args:
        positions: hidden states (N, d) and targets (N,), a batch at a time.
        held: gets those that are set aside.
    """
    batches = iter(positions)
    first = list(islice(batches, 2))
    if len(first) == 1:
        hidden, labels = first[0]
        aside = torch.arange(len(labels), device=labels.device) % _ONE_IN == 0
        held.append((hidden[aside], labels[aside]))
        yield hidden[~aside], labels[~aside]
        return
    numbers = 0
    for index, (hidden, labels) in enumerate(chain(first, batches)):
        if index % _ONE_IN == 0 and numbers < _MAX_NUMBERS:
            held.append((hidden, labels))
            numbers += hidden.numel()
        else:
            yield hidden, labels


def move_codes(
    head: Any,
    statistics: TokenStatistics,
    codebooks: Sequence[Tensor],
    before: Tensor,
    held: Iterable[tuple[Tensor, Tensor]],
    *,
    write: Callable[[Tensor], None],
    min_gain: float,
    slack: float,
) -> Reassigned:
    """Give tokens other codes by the longest step within `slack` of the best on the text set aside, or by none.

    Args:
        head: whose `loss` is taken.
        statistics: of the other text, with the codes as they are.
        codebooks: of each stage.
        before: (V, S) the present codes.
        held: what `set_aside` gave.
        write: puts codes (V, S) into the head.
        min_gain: see `reassign_by_loss`.
        slack: nats a token.
    """
    held = list(held)
    bias = None if head.token_bias is None else head.token_bias.clone()

    def take(found: CodeReassignment) -> None:
        write(found.token_codes)
        if bias is not None:
            head.token_bias.copy_(bias + found.bias_shift)

    was_training = head.training
    head.eval()  # else it counts the labels
    nothing = CodeReassignment(before, torch.zeros_like(statistics.mass), torch.zeros_like(statistics.mass))
    start = mean_loss(head, held)
    tried = []
    for damping in _DAMPINGS:
        found = reassign_by_loss(
            statistics, codebooks, before, has_bias=bias is not None, min_gain=min_gain, damping=damping
        )
        take(found)
        tried.append((mean_loss(head, held), found))
    tried.append((start, nothing))
    lowest = min((loss for loss, _ in tried if not math.isnan(loss)), default=start)
    loss, best = next(((loss, found) for loss, found in tried if loss <= lowest + slack), (start, nothing))
    take(best)
    head.train(was_training)
    num_held = all_reduce_sum_(statistics.mass.new_tensor(float(sum(len(labels) for _, labels in held))))
    num_positions = int(statistics.counts.sum()) + int(num_held)
    return Reassigned(int((best.token_codes != before).any(1).sum()), start - loss, num_positions)


def mean_loss(head: Any, held: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss over what all ranks have set aside, which is the same on all of them."""
    sums = torch.zeros(2, dtype=torch.float64, device=head.token_counts.device)
    for hidden, labels in held:
        sums += torch.stack([head.loss(hidden, labels, reduction="none").double().sum(), sums.new_tensor(len(labels))])
    all_reduce_sum_(sums)
    return float(sums[0] / sums[1].clamp(min=1))
