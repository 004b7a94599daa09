"""What an error in a row of the input table costs, to second order: the metric that its codes are fitted in.

With g the gradient of the log-probability of a text, drawn from the model, in the row of one of its tokens, an error δ
of the row costs ½ δᵀ E[g gᵀ] δ in KL. An error in the row of the output layer costs ½ λ_v δᵀ E[h hᵀ] δ. Both are in
nats, so codes that serve both tables are fitted to the sum.

Letters: N positions, d hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from lit_logits.contracts import Calibrate, Calibration, OutputLayer
from lit_logits.functional.distributed import all_reduce_sum_
from lit_logits.functional.reductions import soft_cap
from lit_logits.modules.language_models.calls import text_inputs
from lit_logits.modules.vq_logits.embedding import CodedEmbedding

__all__ = ["TableStatistics", "joined_with_table", "table_statistics"]

_CHUNK_ELEMENTS = 1 << 25  # logits a chunk: 128 MiB in float32


class TableStatistics(NamedTuple):
    """Result of `table_statistics`, the same on all ranks.

    Attributes:
        token_shares: (V,) float32 share of each token among the inputs.
        second_moment: (d, d) float32 E[g gᵀ] over the inputs, in nats².
    """

    token_shares: Tensor
    second_moment: Tensor


def table_statistics(
    batches: Iterable[Mapping[str, Tensor]],
    backbone: Any,
    table: CodedEmbedding,
    layer: OutputLayer,
    *,
    num_batches: int,
    device: torch.device,
    hidden_scale: float = 1.0,
    logit_cap: float | None = None,
    progress_bar: bool = False,
) -> TableStatistics:
    """Average g gᵀ over the inputs of the first batches; a backward pass each. Every rank must call it.

    Args:
        batches: dicts with `input_ids` and maybe `attention_mask` and `position_ids`, all (B, T).
        backbone: module whose output has `last_hidden_state` (B, T, d); it runs in eval mode.
        table: its input table, which still reads its dense rows.
        layer: weight (V, d) and bias (V,) or None of the layer that reads those hidden states.
        num_batches: how many of them each rank reads.
        device: where to compute.
        hidden_scale: factor of the hidden states that the layer reads.
        logit_cap: c of the soft cap of the layer's logits, or None.
        progress_bar: show one line of progress on a terminal.
    """
    counts = torch.zeros(table.num_embeddings, device=device)
    moment = torch.zeros(table.embedding_dim, table.embedding_dim, device=device)
    generator = torch.Generator(device).manual_seed(0)  # apart from the global stream; the draws average out
    was_training = backbone.training
    backbone.eval()
    show = None if progress_bar else True
    for batch in tqdm(islice(batches, num_batches), "input table", total=num_batches, disable=show, leave=False):
        input_ids, mask = batch["input_ids"].to(device), batch.get("attention_mask")
        mask = None if mask is None else mask.to(device)
        inputs = text_inputs(backbone, mask, batch.get("position_ids"))
        with torch.enable_grad(), _watched(table) as rows:
            output = backbone(input_ids=input_ids, **inputs)
            hidden = output.last_hidden_state
        pull = _drawn_gradient(hidden.detach() * hidden_scale, layer, logit_cap, generator) * hidden_scale
        if mask is not None:
            pull = pull * mask.unsqueeze(-1).to(pull)
        (grad,) = torch.autograd.grad(hidden, rows, pull.to(hidden))
        grad = grad.flatten(0, 1).float() * table.scale
        moment.addmm_(grad.T, grad)
        read = input_ids.flatten() if mask is None else input_ids[mask.bool()]
        counts += torch.bincount(read, minlength=len(counts))
    backbone.train(was_training)
    all_reduce_sum_(counts)
    total = counts.sum().clamp(min=1)
    return TableStatistics(counts / total, all_reduce_sum_(moment) / total)


def joined_with_table(read: Calibrate, statistics: TableStatistics) -> Calibrate:
    """Return a reader whose answers are those of a layer that is the output layer and the input table at once.

    Its information of a token and its second moment are those of both, in nats: codes that are fitted to them lose
    least of both together.
    """

    def joined(**_: Any) -> Calibration:
        calibration = read(second_moment=True, information=True)
        information, moment = calibration.token_information, calibration.informed_second_moment
        if information is None or moment is None:
            raise ValueError("Expected a pretrained output layer for codes of both tables, but got None.")
        shares, table_moment = (values.to(moment) for values in statistics)
        # Σ_v δ_vᵀ (λ_v M + f_v F) δ_v is not of the form Σ_v w_v δ_vᵀ H δ_v. λ and f are much alike, so H is
        # (Σ λ) M + F, and w is their mean by the share that each has in H.
        level = information.sum()
        head_cost, table_cost = level * moment.trace(), table_moment.trace()
        weights = (information / level * head_cost + shares * table_cost) / (head_cost + table_cost)
        both = moment * level + table_moment
        return calibration._replace(token_information=weights, informed_second_moment=both)

    return joined


@contextlib.contextmanager
def _watched(table: CodedEmbedding) -> Iterator[list[Tensor]]:
    """Give a list whose one item is the last output of a table, from where a graph begins."""
    rows: list[Tensor] = []

    def begin(_: Any, __: Any, output: Tensor) -> Tensor:
        rows[:] = [output.detach().requires_grad_()]
        return rows[0]

    handle = table.register_forward_hook(begin)
    try:
        yield rows
    finally:
        handle.remove()


@torch.no_grad()
def _drawn_gradient(hidden: Tensor, layer: OutputLayer, cap: float | None, generator: torch.Generator) -> Tensor:
    """Return the gradient (B, T, d) of log p(y | h) in hidden states, with y drawn from the layer's own softmax."""
    weight: Any = layer.weight
    parts = []
    for chunk in hidden.flatten(0, 1).split(max(1, _CHUNK_ELEMENTS // len(weight))):
        logits = F.linear(chunk.to(weight.dtype), weight).float()
        capped = soft_cap(logits, cap) if layer.bias is None else soft_cap(logits, cap) + layer.bias
        pull = -capped.softmax(-1)
        drawn = torch.multinomial(-pull, 1, generator=generator)
        pull.scatter_add_(1, drawn, pull.new_ones(drawn.shape))
        if cap is not None:
            pull *= 1 - (soft_cap(logits, cap) / cap).square()
        parts.append((pull.to(weight.dtype) @ weight).float())
    return torch.cat(parts).view(hidden.shape)
