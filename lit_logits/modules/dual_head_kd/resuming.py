"""What checkpoints of `DualHeadKD` tell of the teacher, which is not in them."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher

__all__ = ["NamesTeacher", "check_class_order", "check_same_teacher"]

_KEY = "teacher_digest"


class _ofclass(classmethod):  # as `classmethod`
    """A class method that an instance does not have: it would make another object and leave the instance as it is."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return super().__get__(instance, owner)

        def refuse(*args: Any, **kwargs: Any) -> None:
            name = type(instance).__name__
            raise TypeError(f"Expected `load_from_checkpoint` of the class {name}, but got that of an instance.")

        return refuse


class NamesTeacher:
    """A LightningModule whose checkpoints tell which teacher they learned from, and that is evaluated without it."""

    teacher: FrozenTeacher | None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the digest of the teacher."""
        if self.teacher is not None:
            checkpoint[_KEY] = self.teacher.digest

    @_ofclass  # type: ignore[arg-type]  # mypy takes what follows for a method of instances
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as Lightning does; where the teacher of the run is not at hand, without it, and say so.

        That serves evaluation, prediction and export. To train on, pass a `teacher`.
        """
        load: Any = super().load_from_checkpoint  # type: ignore[misc]
        try:
            return load(checkpoint_path, *args, **kwargs)
        except ValueError as error:
            if "teacher" in kwargs or "teacher_checkpoint" in kwargs:
                raise
            model = load(checkpoint_path, *args, **kwargs, teacher=None, teacher_checkpoint=None)
            warnings.warn(f"The model is loaded without its teacher, to be evaluated: {error}", stacklevel=2)
            return model


def check_same_teacher(teacher: FrozenTeacher | None, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume with a teacher of other weights than that of the checkpoint, which may not tell its own.

    Raises:
        ValueError: If it has others.
    """
    saved = checkpoint.get(_KEY)
    if teacher is not None and saved is not None and teacher.digest != saved:
        raise ValueError(
            f"Expected the teacher of the checkpoint to resume, but {type(teacher.model).__name__} has other weights"
            f" (digest {teacher.digest[:8]}, there {saved[:8]}). Resume with the teacher that the run began with, or"
            " start a new run from the student that `export` writes."
        )


def check_class_order(teacher: FrozenTeacher | None, names: Sequence[str] | None) -> None:
    """Refuse a teacher whose classes have other numbers than the data's, as far as both tell their names.

    Names that are not in both, or not once in each, are not compared.

    Raises:
        ValueError: If a class has two numbers.
    """
    if teacher is None or teacher.class_names is None or names is None:
        return
    theirs, own = _numbers(teacher.class_names), _numbers(names)
    for name in sorted(own.keys() & theirs.keys()):
        if own[name] != theirs[name]:
            raise ValueError(
                f"Expected the classes of the teacher in the order of the data's, but {name!r} is its class"
                f" {theirs[name]} and class {own[name]} of the data. Reorder the rows of its last layer and its"
                " `id2label`, or name the folders or labels of the data so that they are in its order."
            )


def _numbers(names: Sequence[str]) -> dict[str, int]:
    """Return the number of each name that occurs once."""
    plain = [str(name).strip().casefold() for name in names]
    counts = Counter(plain)
    return {name: number for number, name in enumerate(plain) if counts[name] == 1}
