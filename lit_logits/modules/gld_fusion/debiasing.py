"""What chunks need to be compared together with a new word behind them: the tokens that may begin one.

Letters: M tokens that a boundary begins.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lit_logits.functional.chunk_debiasing import boundary_tokens
from lit_logits.modules.gld_fusion.sources import LogitSource
from lit_logits.storage.logit_cache import LogitCache

__all__ = ["ChunkDebias", "check_chunk_debias", "find_boundary", "without_boundary"]


class ChunkDebias(NamedTuple):
    """How the chunks of a source of another tokenizer are compared.

    Attributes:
        threshold: γ of `merge_cuts`.
        pivot_boundary: (M,) tokens of the pivot that a boundary begins.
    """

    threshold: float
    pivot_boundary: Tensor


def check_chunk_debias(chunk_debias: float | None) -> None:
    """Raise unless γ is in [0, 1), or None.

    Raises:
        ValueError: If it is not.
    """
    if chunk_debias is not None and not 0 <= chunk_debias < 1:
        raise ValueError(f"Expected `chunk_debias` to be None or in [0, 1), but got {chunk_debias}.")


def find_boundary(whose: str, tokens: Sequence[bytes | None] | None, vocab_size: int) -> Tensor:
    """Return the tokens of a model that a boundary begins.

    Args:
        whose: the model, in messages.
        tokens: what each of its tokens stands for, or None where that is not known.
        vocab_size: how many of them it has.

    Raises:
        ValueError: If its tokens are not known, or none begins with white space or ends a text.
    """
    if tokens is None:
        raise ValueError(
            f"Expected to know the tokenizer of {whose}, by which `chunk_debias` finds the tokens that begin a word,"
            " but got none. Name the model by a path that has one (for the pivot a data module with a `tokenizer` does,"
            " too), or leave `chunk_debias` out."
        )
    found = boundary_tokens(tokens, vocab_size)
    if not len(found):
        raise ValueError(
            f"Expected the tokenizer of {whose} to have tokens that begin with white space or end a text, by which"
            f" `chunk_debias` tells words apart, but none of its {len(tokens)} does. Leave `chunk_debias` out."
        )
    return found


def without_boundary(name: str, source: LogitSource | LogitCache) -> ValueError:
    """Return the error for a source that does not tell how likely a new word is."""
    if isinstance(source, LogitCache) and source.settings.get("served"):
        found = (
            "it was imported, and a server tells the likeliest tokens alone, whose sum is less by an unknown part."
            " Leave `chunk_debias` out"
        )
    else:
        found = (
            "it was written without. Write it again, with `chunk_debias` in the predict command too, or leave that out"
        )
    return ValueError(
        f"Expected the logit cache of {name!r} to hold the log-probabilities of a new word, which `chunk_debias` needs,"
        f" but {found}."
    )
