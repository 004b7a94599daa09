"""Comparison of settings, so that different runs do not mix their results in one folder."""

from collections.abc import Mapping
from typing import Any

__all__ = ["differing_settings"]


def differing_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return a clause for each setting that differs between a folder and this run, or that only one of them has.

    Example:
        >>> differing_settings({"top_k": 8, "dtype": "float32"}, {"top_k": 3})
        ['`top_k` was 8 there and is 3 now', "`dtype` was 'float32' there and is absent now"]
    """
    pairs = {name: (_shown(there, name), _shown(here, name)) for name in {**there, **here}}
    return [f"`{name}` was {one} there and is {other} now" for name, (one, other) in pairs.items() if one != other]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "absent"
