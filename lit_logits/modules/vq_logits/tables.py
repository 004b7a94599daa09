"""A cache of the tables that decoding makes from mapping and bias, valid until these change."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["TableCache"]

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

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()

    def __deepcopy__(self, memo: Any) -> "TableCache":
        return TableCache()
