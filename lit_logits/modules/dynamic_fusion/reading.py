"""Logits of several models at the positions of a batch that count.

Letters: B batch, T sequence, R rows (positions that count), U columns of the batch with a row, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lit_logits.functional.labels import IGNORE_INDEX, next_token_labels
from lit_logits.modules.dynamic_fusion.decoding import position_ids_of
from lit_logits.modules.language_models.calls import accepted_inputs, takes_positions

__all__ = ["logits_at", "prompt_targets"]


def logits_at(
    models: Sequence[PreTrainedModel], input_ids: Tensor, mask: Tensor, keep: Tensor, vocab_size: int
) -> list[Tensor]:
    """Return the logits (R, V) of each model where `keep` is true, on its device, by one pass of each.

    A model whose `forward` takes positions makes logits (B, U, V) of the columns that have a row, not (B, T, V).

    Args:
        models: of one vocabulary.
        input_ids: (B, T).
        mask: (B, T), 0 at padding.
        keep: (B, T) the rows.
        vocab_size: V, the first ids of each model.
    """
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids_of(mask)}
    columns = keep.any(0).nonzero().squeeze(1)
    rows = []
    for model in models:
        fewer = takes_positions(model) and len(columns) < keep.shape[1]
        own = {**inputs, "use_cache": False, "logits_to_keep": columns if fewer else None}
        logits = model(**accepted_inputs(model, own)).logits
        at = keep[:, columns] if fewer else keep
        rows.append(logits[..., :vocab_size][at.to(logits.device)].to(keep.device))
    return rows


def prompt_targets(input_ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, T) of prompts that their rows predict, and where those rows are (B, T).

    Args:
        input_ids: (B, T).
        counted: (B, T) the tokens of prompts.
    """
    return next_token_labels(input_ids.masked_fill(~counted, IGNORE_INDEX), keep=counted)
