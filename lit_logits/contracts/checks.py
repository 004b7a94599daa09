"""Whether a part keeps a contract, and what it lacks."""

import inspect
from typing import Any, TypeGuard, TypeVar

from lit_logits.contracts.parts import HasTokenizer

__all__ = ["data_tokenizer", "lacks", "offers"]

_Contract = TypeVar("_Contract")


def offers(part: object, contract: type[_Contract]) -> TypeGuard[_Contract]:
    """Return whether `part` has the members of a contract, without running its properties.

    Example:
        >>> from lit_logits.contracts import HasFingerprint, HasTokenizer
        >>> class Data:
        ...     @property
        ...     def tokenizer(self):
        ...         raise RuntimeError("This trains a tokenizer for an hour.")
        >>> offers(Data(), HasTokenizer), offers(Data(), HasFingerprint), offers(None, HasTokenizer)
        (True, False, False)
    """
    return all(_has(part, name) for name in _members(contract))


def data_tokenizer(trainer: Any) -> Any:
    """Return the tokenizer of a trainer's data module; None without one, or without a trainer.

    Example:
        >>> data_tokenizer(None) is None
        True
    """
    data = getattr(trainer, "datamodule", None)  # which Lightning sets and does not declare
    return data.tokenizer if offers(data, HasTokenizer) else None


def lacks(part: object, contract: type, purpose: str) -> str:
    """Return the sentence that says what `part` should offer, for an error or a warning; None is an absent data module.

    Example:
        >>> from lit_logits.contracts import HasFinishedRows
        >>> lacks(object(), HasFinishedRows, "the rows to leave out")
        'Expected object to have `finished_rows`, the rows to leave out, but got none.'
    """
    names = " and ".join(f"`{name}`" for name in _members(contract))
    owner = "a data module" if part is None else type(part).__name__
    return f"Expected {owner} to have {names}, {purpose}, but got none."


def _members(contract: type) -> list[str]:
    return [name for name in dir(contract) if not name.startswith("_")]


def _has(part: object, name: str) -> bool:
    try:
        inspect.getattr_static(part, name)
    except AttributeError:
        return hasattr(part, name)  # neither attribute nor property, so that this asks `__getattr__` at most
    return True
