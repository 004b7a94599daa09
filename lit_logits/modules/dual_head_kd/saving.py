"""What is written of a distilled student: a folder or a file, and the card."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_logits.modules.dual_head_kd.classifiers import STUDENT_FILE, zoo_name
from lit_logits.modules.dual_head_kd.net import DualHeadClassifier
from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher
from lit_logits.modules.language_models.card import find_origin
from lit_logits.modules.language_models.saving import PushesToHub, save_model_file, save_model_folder

__all__ = ["ExportsStudent"]


class ExportsStudent(PushesToHub):
    """A LightningModule that writes its student, without the auxiliary head."""

    net: DualHeadClassifier
    method: str
    teacher: FrozenTeacher | None

    @property
    def student(self) -> nn.Module:
        """The student itself, of its own class, which `export` writes."""
        return self.net.student

    @property
    def card_text(self) -> str:
        """What was done, for the card of the saved student."""
        if self.teacher is None:
            return f"Trained on labels (`DualHeadKD`, method `{self.method}`)."
        teacher = self.teacher.model
        name = find_origin(str(getattr(getattr(teacher, "config", None), "_name_or_path", ""))).name
        heads = " through two heads (arXiv 2411.08937)" if self.method == "dual_head" else ""
        return (
            f"Distilled{heads} from the logits of {name or type(teacher).__name__}, and trained on labels"
            f" (`DualHeadKD`, method `{self.method}`); the auxiliary head is left out."
        )

    def export(self, path: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the student without the auxiliary head, in its own format, as a whole or not at all; rank zero writes.

        A transformers student becomes a folder for `from_pretrained`, see `save_model_folder`; any other a file for
        `load_state_dict` of its own class.

        Args:
            path: the folder, or the file.
            tokenizer: saved with a language model; default the data module's, if a trainer is attached.

        Raises:
            ValueError: If the folder holds anything but a saved model.
        """
        trainer = getattr(self, "_trainer", None)
        if isinstance(self.student, PreTrainedModel):
            return save_model_folder(path, self.student, self.card_text, tokenizer=tokenizer, trainer=trainer)
        return save_model_file(path, partial(torch.save, _state(self.student)), trainer=trainer)

    def save_pretrained(self, folder: str | Path, *, tokenizer: Any = None) -> None:
        """Write a transformers student as `export` does, for `from_pretrained`.

        Raises:
            ValueError: If the student is of another kind, or the folder holds anything but a saved model.
        """
        if not isinstance(self.student, PreTrainedModel):
            raise ValueError(
                f"Expected a student of transformers for a folder, but got {type(self.student).__name__}. Use"
                " `export(path)`, which writes a file for `load_state_dict`."
            )
        self.export(folder, tokenizer=tokenizer)

    def write_folder(
        self,
        folder: Path,
        *,
        class_names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Write a student that is not of transformers: its `state_dict`, and a config.json with what it is.

        A folder of a model of the zoo can be passed as `student` or `teacher`.

        Args:
            folder: which is made.
            class_names: C names in the order of the labels.
            dtype: of the saved floats; default theirs.
            figures: measured values by name.
        """
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(_state(self.student, dtype), folder / STUDENT_FILE)
        given = getattr(self, "hparams", {}).get("student")
        settings: dict[str, Any] = {
            "model": zoo_name(given) or type(self.student).__name__,
            "num_classes": self.net.num_classes,
            "description": self.card_text,
        }
        if class_names is not None and len(class_names) == self.net.num_classes:
            settings["id2label"] = {str(number): name for number, name in enumerate(class_names)}
        if figures:
            settings["measured"] = dict(figures)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")


def _state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the `state_dict` on the CPU, with its metadata: by its versions some models know how to read it."""
    state = model.state_dict()
    for name, tensor in state.items():  # in place, as a copy would lose the metadata
        moved = tensor.detach().cpu()
        state[name] = moved.to(dtype) if dtype is not None and moved.is_floating_point() else moved
    return state
