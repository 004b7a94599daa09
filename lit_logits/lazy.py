"""Names of a package that are imported at first use (PEP 562).

So `import lit_logits` reads what a saved model needs to generate, and neither Lightning nor what draws pictures.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose names are imported when they are first asked for.

    Type checkers and editors read the imports that the package writes under `TYPE_CHECKING`; a test holds both equal.
    Modules of the package are its attributes, too, before they are imported.

    Args:
        package: its `__name__`.
        modules: the public names of each module, parted by blanks.

    Example:
        >>> get, names = lazy_names("lit_logits.functional", {"lit_logits.functional.chunks": "chunked_sum"})
        >>> get("chunked_sum").__module__
        'lit_logits.functional.chunks'
        >>> get("chunked_some")
        Traceback (most recent call last):
        ...
        AttributeError: module 'lit_logits.functional' has no attribute 'chunked_some'
    """
    places = {name: module for module, names in modules.items() for name in names.split()}
    inside = (module.removeprefix(f"{package}.") for module in modules if module.startswith(f"{package}."))
    children = {module.split(".")[0] for module in inside}

    def get(name: str) -> Any:
        if name in places:
            value = getattr(import_module(places[name]), name)
            setattr(sys.modules[package], name, value)  # so that it is asked for once
            return value
        if name in children:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places, *children})

    return get, names
