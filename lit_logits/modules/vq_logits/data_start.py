"""The start of a head, and of a coded input table, from batches of training."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_logits.contracts import OutputLayer, StartingHead
from lit_logits.modules.language_models.probes import OutputRule
from lit_logits.modules.vq_logits.calibration import calibrator
from lit_logits.modules.vq_logits.embedding import coded_table
from lit_logits.modules.vq_logits.table_metric import joined_with_table, table_statistics

__all__ = ["start_head"]


def start_head(
    head: StartingHead,
    backbone: Any,
    layer: OutputLayer,
    rule: OutputRule,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_batches: int,
    vocab_size: int,
    device: torch.device,
    progress_bar: bool = False,
) -> None:
    """Let a head start from batches; an input table that waits for its codes reads them from then on.

    Args:
        head: called with a function that reads the batches, see `StartingHead`.
        backbone: gives the hidden states.
        layer: dense output layer of the pretrained model.
        rule: how the architecture makes logits.
        batches: of training, from the first one on; every rank reads as many.
        num_batches: how many are read where the start needs hidden states or counts; for the input table a quarter of
            them, as each has a backward pass.
        vocab_size: V.
        device: where to compute.
        progress_bar: show one line of progress on a terminal.
    """
    options: Any = {"hidden_scale": rule.bias_free_scale, "logit_cap": rule.cap}
    options |= {"device": device, "progress_bar": progress_bar}
    read = calibrator(batches, backbone, layer, num_batches=num_batches, vocab_size=vocab_size, **options)
    table = coded_table(backbone)
    if table is not None:
        found = table_statistics(batches, backbone, table, layer, num_batches=-(-num_batches // 4), **options)
        if table.tied:
            read = joined_with_table(read, found)
        else:
            weights, moment = found
            table.rows.fit(table.weight, token_weights=weights, second_moment=moment, progress_bar=progress_bar)
    head.start(read, layer, progress_bar=progress_bar)
    if table is not None:
        table.dense = None
