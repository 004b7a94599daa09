"""Checks of arguments that data modules share."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from os import PathLike, fspath
from typing import Any, TypeVar

__all__ = ["as_part", "check_at_least", "check_unicode"]

Part = TypeVar("Part")


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raise unless every argument, given by its name, is at least `minimum`.

    Raises:
        ValueError: If one is smaller; it names the first.

    Example:
        >>> check_at_least(1, batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected `batch_size` to be at least 1, but got 0.
    """
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"Expected `{name}` to be at least {minimum}, but got {value}.")


def as_part(argument: str, value: Any, part: type[Part]) -> Part:
    """Return an argument that is a part of its own: given as it is, as a mapping, or as its first field alone.

    Args:
        argument: name of the argument, for messages.
        value: a `part`, a mapping of its fields, or the value of its first one.
        part: a dataclass.

    Raises:
        ValueError: If a mapping has an unknown key or lacks a field that has no default.

    Example:
        >>> from dataclasses import make_dataclass
        >>> Source = make_dataclass("Source", ["path"])
        >>> as_part("source", "my/*.txt", Source), as_part("source", {"path": "my/*.txt"}, Source)
        (Source(path='my/*.txt'), Source(path='my/*.txt'))
    """
    if isinstance(value, part):
        return value
    if isinstance(value, PathLike):
        value = fspath(value)
    known: Any = {field.name: field for field in fields(part)}  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        return part(**{next(iter(known)): value})
    missing = [name for name, field in known.items() if field.default is MISSING and name not in value]
    if missing or not set(value) <= set(known):
        needed = f" and to give {missing}" if missing else ""
        raise ValueError(f"Expected `{argument}` to have keys of {[*known]}{needed}, but got {[*value]}.")
    return part(**value)


def check_unicode(text: str, where: str) -> None:
    r"""Raise for a text with half a surrogate pair, which no tokenizer takes and UTF-8 does not have.

    JSON can hold one as an escape, such as half of an emoji that was cut in two.

    Args:
        text: to check.
        where: its place, for the message.

    Raises:
        ValueError: If there is one; it says where.

    Example:
        >>> check_unicode("cut \ud83d", "line 3 of a.jsonl")
        Traceback (most recent call last):
        ...
        ValueError: Expected text in line 3 of a.jsonl, but character 4 is '\ud83d', half of a pair. Remove it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Expected text in {where}, but character {error.start} is {text[error.start]!r}, half of a pair. Remove"
            " it."
        ) from error
