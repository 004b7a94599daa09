"""The logits of a teacher, kept on disk for images that come in the same views again.

Letters: B batch, C classes.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lit_logits.contracts import HasFixedViews, lacks, offers
from lit_logits.modules.dual_head_kd.batches import inputs_of
from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher
from lit_logits.storage.rows import RowFile

__all__ = ["TeacherCache"]


class TeacherCache:
    """Ask the teacher once for each view of each sample, and read its logits from disk from then on.

    A file belongs to a teacher (its digest), a precision and the views of the data; others get files of their own.
    The processes of a machine share one. It serves any run with these three, also one that is killed.

    Args:
        folder: of the files.
        teacher: whose logits are kept.
        data: data module, which says what its `sample_ids` stand for, see `HasFixedViews`.
        num_classes: C.
        precision: of the run, in which the teacher computes its logits.

    Raises:
        ValueError: If the data draw new views in each epoch, or do not tell.
    """

    def __init__(
        self, folder: str | Path, teacher: FrozenTeacher, data: object, num_classes: int, precision: str = "32-true"
    ) -> None:
        purpose = "by which cached logits of a teacher are kept apart"
        if not offers(data, HasFixedViews):
            raise ValueError(lacks(data, HasFixedViews, purpose))
        views = data.views_fingerprint
        if views is None:
            raise ValueError(
                "Expected data whose views of a sample come again and are numbered, for `teacher_cache`, but it draws"
                " new ones in each epoch or numbers none. Set `num_views` of ImageDataModule."
            )
        name = hashlib.sha256(f"{teacher.digest}{views}{precision}".encode()).hexdigest()[:32]
        self.teacher, self.rows = teacher, RowFile(Path(os.path.expanduser(folder), f"{name}.f32"), num_classes)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, C) for a batch with `sample_ids` (B,); the teacher runs for those that are not kept yet.

        Raises:
            ValueError: If the batch has no `sample_ids`.
        """
        if "sample_ids" not in batch:
            raise ValueError(
                f"Expected batches with `sample_ids`, which tell the views of samples apart, but got {sorted(batch)}."
            )
        numbers, inputs = batch["sample_ids"].cpu(), inputs_of(batch)
        values, known = self.rows.read(numbers)
        device = batch["sample_ids"].device
        if bool(known.all()):
            return values.to(device)
        missing = (~known).to(device)
        logits = self.teacher({name: value[missing] for name, value in inputs.items()}).cpu()
        self.rows.write(numbers[~known], logits)
        values[~known] = logits.to(values)
        return values.to(device)
