"""The start of a head, and of a coded input table, from batches of training."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_logits.contracts import Calibrate, OutputLayer, StartingHead
from lit_logits.modules.language_models.probes import OutputRule
from lit_logits.modules.vq_logits.calibration import calibrator
from lit_logits.modules.vq_logits.embedding import CodedEmbedding, coded_table
from lit_logits.modules.vq_logits.table_metric import TableStatistics, joined_with_table, table_statistics

__all__ = ["fit_codes", "start_head"]


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
    found = None
    if table is not None:
        found = table_statistics(batches, backbone, table, layer, num_batches=-(-num_batches // 4), **options)
    fit_codes(head, table, layer, read, found, progress_bar=progress_bar)


def fit_codes(
    head: StartingHead,
    table: CodedEmbedding | None,
    layer: OutputLayer,
    read: Calibrate,
    statistics: TableStatistics | None,
    *,
    progress_bar: bool = False,
) -> None:
    """Start a head, and the codes of an input table with it.

    Args:
        head: of the output layer.
        table: which reads its codes from now on, or None for a dense one.
        layer: dense output layer.
        read: see `StartingHead.start`.
        statistics: of the table; None where there is none, or to fit the codes of a tied one to the output layer alone.
        progress_bar: show one line of progress on a terminal.
    """
    if table is not None and statistics is not None:
        if table.tied:
            read = joined_with_table(read, statistics)
        else:
            weights, moment = statistics
            table.source.fit(table.weight, token_weights=weights, second_moment=moment, progress_bar=progress_bar)
    head.start(read, layer, progress_bar=progress_bar)
    if table is not None:
        table.dense = None
