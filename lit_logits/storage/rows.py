"""Rows of floats on disk under numbers, which are written once and read many times.

Letters: B rows of a batch, C floats a row.
"""

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["RowFile"]

ROWS_A_STEP = 1 << 16
"""By how many rows a file grows; those that were never written take no room on most file systems."""


class RowFile:
    """A file of rows of C floats, mapped into memory, which the processes of a machine share.

    Behind each row stands a 1 once it is written, so that a file that a killed process leaves is as good as any.

    Args:
        file: made, with its folder, when the first row is written.
        width: C.

    Example:
        >>> import tempfile
        >>> rows = RowFile(Path(tempfile.mkdtemp()) / "logits.f32", 2)
        >>> rows.write(torch.tensor([3]), torch.tensor([[0.5, -1.0]]))
        >>> values, known = rows.read(torch.tensor([3, 4]))
        >>> values[0].tolist(), known.tolist()
        ([0.5, -1.0], [True, False])
    """

    def __init__(self, file: Path, width: int) -> None:
        self.file, self.width = file, width
        self._rows = torch.zeros(0, width + 1)

    def read(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows (B, C), float32, of numbers (B,) on the CPU, and which of them (B,) are known."""
        if len(numbers) == 0:
            return torch.zeros(0, self.width), torch.zeros(0, dtype=torch.bool)
        size = self.file.stat().st_size if self.file.is_file() else 0
        self._map(min(int(numbers.max()) + 1, size // (4 * (self.width + 1))))
        inside = numbers < len(self._rows)
        rows = torch.zeros(len(numbers), self.width + 1)
        rows[inside] = self._rows[numbers[inside]]
        return rows[:, :-1], rows[:, -1] == 1

    def write(self, numbers: Tensor, rows: Tensor) -> None:
        """Keep rows (B, C) under their numbers (B,)."""
        if len(numbers) == 0:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._map(int(numbers.max()) + 1)
        self._rows[numbers, :-1] = rows.detach().to(self._rows)
        self._rows[numbers, -1] = 1  # last, as a process may be killed in between

    def _map(self, num_rows: int) -> None:
        if num_rows > len(self._rows):
            num_rows = -(-num_rows // ROWS_A_STEP) * ROWS_A_STEP
            size = num_rows * (self.width + 1)
            # This makes the file longer if it is shorter; a longer one, of another process, stays as it is.
            self._rows = torch.from_file(str(self.file), shared=True, size=size).view(num_rows, self.width + 1)
