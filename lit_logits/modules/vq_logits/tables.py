"""A cache of the tables that decoding makes from mapping and bias, valid until these change."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TableCache", "is_traced"]

_MAX_TABLES = 8


class TableCache:
    """Cache of values computed from tensors, each kept until one of its tensors is replaced or written to.

    Writing through `.data`, as some optimizers do, does not change a tensor's version: call `clear` then.

    Example:
        >>> import torch
        >>> bias, tables = torch.zeros(2), TableCache()
        >>> tables.get("sum", [bias], lambda: float(bias.sum()))
        0.0
        >>> _ = bias.add_(1)
        >>> tables.get("sum", [bias], lambda: float(bias.sum()))
        2.0
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[Tensor], object, Any]] = {}

    def get(self, name: str, sources: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """Return the value of `make()`: the one kept under the name, if the sources have not changed since."""
        if any(source.is_inference() for source in sources):  # such tensors do not count their versions
            return make()
        key = [(source.data_ptr(), source._version) for source in sources]
        kept, found, value = self._kept.get(name, ([], None, None))
        # The tensors themselves are kept: the address of one that is freed may be given to another.
        if found != key or any(one is not other for one, other in zip(kept, sources, strict=True)):
            if name not in self._kept and len(self._kept) >= _MAX_TABLES:
                self._kept.clear()
            value = make()
            self._kept[name] = (list(sources), key, value)
        return value

    def kept(self, name: str) -> Any:
        """Return the value that was kept last under the name, whatever its sources are now.

        Code that is traced cannot look at tensors, whose values it does not have; it takes a table as a constant.

        Raises:
            RuntimeError: If there is none.
        """
        if name not in self._kept:
            raise RuntimeError(
                "Expected a model that has run, or was switched to `eval()`, before it is traced, compiled or exported:"
                " its mapping is unpacked then."
            )
        return self._kept[name][2]

    def clear(self, *, but: str = "") -> None:
        """Forget all of them, but for one name."""
        self._kept = {name: value for name, value in self._kept.items() if name == but}

    def __deepcopy__(self, memo: Any) -> "TableCache":
        return TableCache()


def is_traced() -> bool:
    """Return whether this code is being compiled, exported or traced, where no value of a tensor can be looked at."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
