"""What `predict` tells of a generated text, in plain values of JSON.

Letters: N generated tokens, S experts.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_logits.modules.dynamic_fusion.decoding import FusionTrace, TopTokens

__all__ = ["sample_record", "top_record"]


def sample_record(
    trace: FusionTrace, index: int, tokenizer: PreTrainedTokenizerBase, expert_names: Sequence[str]
) -> dict[str, Any]:
    """Return one text of a trace, its tokens and their weights.

    Args:
        trace: of the texts of a batch.
        index: of the text.
        tokenizer: of all models.
        expert_names: S.
    """
    kept = trace.mask[index]
    tokens = trace.token_ids[index][kept].tolist()
    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": tokenizer.convert_ids_to_tokens(tokens),
        "alpha": {name: _rounded(trace.alpha[number, index][kept]) for number, name in enumerate(expert_names)},
        "kl_forward": _rounded(trace.kl_forward[index][kept]),
        "kl_reverse": _rounded(trace.kl_reverse[index][kept]),
    }


def top_record(
    tops: TopTokens, index: int, kept: Tensor, tokenizer: PreTrainedTokenizerBase, model_names: Sequence[str]
) -> dict[str, Any]:
    """Return the likeliest tokens of each model at each token of a text.

    Args:
        tops: of the texts of a batch.
        index: of the text.
        kept: (N,) True where a token belongs to the text.
        tokenizer: of all models.
        model_names: of the models in `tops`.

    Returns:
        For each model `tokens`, `ids` and `log_probs`, lists of k for each token.
    """
    record = {}
    for name, ids, log_probs in zip(model_names, tops.token_ids[:, index], tops.log_probs[:, index], strict=True):
        chosen = ids[kept].tolist()
        record[name] = {
            "tokens": [tokenizer.convert_ids_to_tokens(row) for row in chosen],
            "ids": chosen,
            "log_probs": [_rounded(row) for row in log_probs[kept]],
        }
    return record


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
