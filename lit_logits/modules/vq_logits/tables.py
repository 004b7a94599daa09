"""A cache of the tables that decoding makes from mapping and bias, valid until these change; a packed mapping in it."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["PackedMapping", "TableCache", "is_traced"]

_MAX_TABLES = 8
_Head = TypeVar("_Head", bound="PackedMapping")


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


class PackedMapping(nn.Module):
    """A head with a packed mapping, which is unpacked whenever it evaluates: code that is traced needs it."""

    packed_codes: Tensor
    _tables: TableCache

    def _unpacked(self) -> object:
        """Return the mapping as tables, which are kept.

        Raises:
            ValueError: If it is damaged.
        """
        raise NotImplementedError

    def train(self: _Head, mode: bool = True) -> _Head:
        """Switch between training and evaluation; for the latter the mapping is unpacked."""
        super().train(mode)
        self._unpack_to_trace()
        return self

    def _apply(self: _Head, fn: Any, recurse: bool = True) -> _Head:
        """Follow to devices and dtypes, with the mapping unpacked there."""
        super()._apply(fn, recurse)
        self._tables.clear()
        self._unpack_to_trace()
        return self

    def _unpack_to_trace(self) -> None:
        if not self.training and self.packed_codes.device.type != "meta":
            with contextlib.suppress(ValueError):  # a damaged mapping is told where it is used
                self._unpacked()


def is_traced() -> bool:
    """Return whether this code is being compiled, exported or traced, where no value of a tensor can be looked at."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
