"""Settings that keep apart what different runs wrote into one folder."""

from collections.abc import Mapping
from typing import Any

__all__ = ["differing_settings"]


def differing_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What to say of each setting that is another one in a folder than it is now, or that only one side has.

    Example:
        >>> differing_settings({"top_k": 8, "dtype": "float32"}, {"top_k": 3})
        ['`top_k` was 8 there and is 3 now', "`dtype` was 'float32' there and is absent now"]
    """
    pairs = {name: (_said(there, name), _said(here, name)) for name in {**there, **here}}
    return [f"`{name}` was {one} there and is {other} now" for name, (one, other) in pairs.items() if one != other]


def _said(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "absent"
