"""The two terms of a batch: of samples whole, of tokens a chunk at a time, so that (N, C) logits are never whole.

Letters: B batch, T sequence, N tokens that count, C classes (for a language model its vocabulary).
"""

from collections.abc import Mapping

from torch import Tensor

from lit_logits.functional.chunks import chunked_rows, chunked_sum
from lit_logits.modules.dual_head_kd.batches import inputs_of, token_targets
from lit_logits.modules.dual_head_kd.criterion import DualHeadCriterion, Losses
from lit_logits.modules.dual_head_kd.judging import judge_rows
from lit_logits.modules.dual_head_kd.net import DualHeadClassifier
from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher
from lit_logits.modules.dual_head_kd.teacher_cache import TeacherCache

__all__ = ["judge_tokens", "sample_losses", "token_losses"]


def sample_losses(
    net: DualHeadClassifier,
    teacher: FrozenTeacher | None,
    criterion: DualHeadCriterion,
    batch: Mapping[str, Tensor],
    cache: TeacherCache | None = None,
) -> Losses:
    """Return both terms over samples; without labels that of the labels is 0, with a graph.

    Args:
        net: student.
        teacher: or None, for the cross-entropy alone.
        criterion: of both terms.
        batch: inputs and `labels`.
        cache: asked in the place of the teacher.
    """
    inputs, labels = inputs_of(batch), batch.get("labels")
    output = net(inputs)
    ce = criterion.label_term(output.logits, labels)
    if teacher is None:
        return Losses(ce, None)
    logits = output.logits if output.aux_logits is None else output.aux_logits
    taught = teacher(inputs) if cache is None else cache(batch)
    return Losses(ce, criterion.kd_term(logits, taught, labels))


def token_losses(
    net: DualHeadClassifier,
    teacher: FrozenTeacher | None,
    criterion: DualHeadCriterion,
    batch: Mapping[str, Tensor],
    chunk_size: int,
) -> Losses:
    """Return both terms over next tokens, from the logits of `chunk_size` tokens at a time."""
    inputs = inputs_of(batch, is_causal_lm=True)
    labels, mask = token_targets(batch)
    hidden, targets = net.hidden_states(inputs)[mask], labels[mask].long()
    count = mask.sum().clamp(min=1)

    def ce(rows: Tensor, targets: Tensor) -> Tensor:
        return criterion.label_sum(net.main_logits(rows), targets)

    ce_term = chunked_sum(ce, hidden, targets, chunk_size=chunk_size) / count
    if teacher is None:
        return Losses(ce_term, None)
    aux, teacher_logits = net.aux_head, teacher.output_logits
    head = net.main_logits if aux is None else aux.classifier

    def kd(rows: Tensor, teacher_rows: Tensor, targets: Tensor) -> Tensor:
        return criterion.kd_term(head(rows), teacher_logits(teacher_rows), targets, reduction="sum")

    rows = hidden if aux is None else aux.hidden(hidden)
    teacher_rows = teacher.hidden_states(inputs)[mask]
    return Losses(ce_term, chunked_sum(kd, rows, teacher_rows, targets, chunk_size=chunk_size) / count)


def judge_tokens(net: DualHeadClassifier, batch: Mapping[str, Tensor], chunk_size: int) -> dict[str, Tensor]:
    """Return the cross-entropy `nll` (N,) of the main head, and `acc`, 1 where its likeliest token is the label."""
    labels, mask = token_targets(batch)
    hidden, targets = net.hidden_states(inputs_of(batch, is_causal_lm=True))[mask], labels[mask].long()

    def judge(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return judge_rows(net.main_logits(rows), targets)

    nll, acc = chunked_rows(judge, hidden, targets, chunk_size=chunk_size)
    return {"nll": nll, "acc": acc}
