"""What is written of a distilled student: its card, and a folder or a file."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_logits.modules.language_models.card import find_origin
from lit_logits.modules.language_models.saving import save_model_file, save_model_folder

__all__ = ["export_student", "student_card"]


def student_card(method: str, teacher: nn.Module | None) -> str:
    """Return in words what a student was distilled from, for its card."""
    if teacher is None:
        return f"Trained on labels (`DualHeadKD`, method `{method}`)."
    name = find_origin(str(getattr(getattr(teacher, "config", None), "_name_or_path", ""))).name
    heads = " through two heads (arXiv 2411.08937)" if method == "dual_head" else ""
    return (
        f"Distilled{heads} from the logits of {name or type(teacher).__name__}, and trained on labels"
        f" (`DualHeadKD`, method `{method}`); the auxiliary head is left out."
    )


def export_student(
    path: str | Path, student: nn.Module, card: str, *, tokenizer: Any = None, trainer: Any = None
) -> Path:
    """Write a student of transformers as a folder, see `save_model_folder`; any other as a file of its `state_dict`.

    The file keeps the metadata of the `state_dict`: by its versions some models tell how to read their tensors.

    Args:
        path: the folder, or the file.
        student: stays as it is.
        card: see `student_card`.
        tokenizer: of a language model.
        trainer: of Lightning, or None.

    Returns:
        The full path.

    Raises:
        ValueError: If the folder holds anything but a saved model.
    """
    if isinstance(student, PreTrainedModel):
        return save_model_folder(path, student, card, tokenizer=tokenizer, trainer=trainer)
    state = student.state_dict()
    for name, tensor in state.items():  # in place, as a copy would lose `_metadata`
        state[name] = tensor.detach().cpu()
    return save_model_file(path, partial(torch.save, state), trainer=trainer)
