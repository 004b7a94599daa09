"""A mode that finds where the host would wait for an accelerator, found on CPU by the operators that read values."""

import linecache
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lit_logits

_PACKAGE = str(Path(lit_logits.__file__).parent)
_WAITING = {
    "aten::_local_scalar_dense",  # .item(), bool(), int(), float(), .tolist() of one value
    "aten::item",
    "aten::nonzero",  # and an index by a mask, which is told by its boolean index below
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::repeat_interleave",
    "aten::lift_fresh",  # torch.tensor(list), which is copied from pageable memory
}


class HostReads(TorchDispatchMode):
    """Collects as `path function: operator: line` where the package reads values, or calls what reads them.

    `.tolist()` of several values reads memory without an operator: it is replaced while the mode is on.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __enter__(self):
        self._tolist = torch.Tensor.tolist

        def tolist(tensor):
            self._note("tolist")
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*error)

    def _note(self, name):
        frame = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        if frame is not None:
            file, line = frame.f_code.co_filename, frame.f_lineno
            where = f"{Path(file).relative_to(_PACKAGE)} {frame.f_code.co_name}"
            self.found.append(f"{where}: {name}: {linecache.getline(file, line).strip()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = name in {"aten::index", "aten::index_put_", "aten::index_put"} and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # A mask that is set to one number is a `masked_fill`, for which no one waits.
        if by_mask and name != "aten::index" and args[2].numel() == 1:
            by_mask = False
        if name in _WAITING or by_mask:
            self._note(name)
        return func(*args, **(kwargs or {}))
