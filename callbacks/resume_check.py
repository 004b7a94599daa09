"""`ResumeCheck`: a run resumes with the optimizer that it had, and is told which of its settings it keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["ResumeCheck"]

_KEY = "optimizer_classes"


class ResumeCheck(Callback):
    """Compare the optimizers of a resumed run with those of its checkpoint, before their states are loaded.

    Another optimizer, or one of other parameters, is refused; torch would fail later with a KeyError, or go on with
    wrong moments. Settings such as the learning rate come from the checkpoint, whatever the recipe says: where they
    differ, a warning names both.

    Raises:
        ValueError: At the start of fit, if class or parameters of an optimizer are not those of the checkpoint.

    Example:
        >>> ResumeCheck().state_key
        'ResumeCheck'
    """

    def __init__(self) -> None:
        self.saved: tuple[list[str] | None, list[list[dict[str, Any]]]] = (None, [])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the classes of the optimizers."""
        checkpoint[_KEY] = [_class_name(optimizer) for optimizer in trainer.optimizers]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what the checkpoint has of optimizers until there are some to compare with."""
        states = checkpoint.get("optimizer_states", [])
        self.saved = checkpoint.get(_KEY), [state["param_groups"] for state in states]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare."""
        names, saved = self.saved
        if not saved:
            return
        own = [_class_name(optimizer) for optimizer in trainer.optimizers]
        if names is not None and names != own:
            raise ValueError(
                f"Expected the optimizer of the checkpoint, {', '.join(names)}, to resume, but got {', '.join(own)}."
                " Resume with the config.yaml of the run, or start a new one."
            )
        for optimizer, groups in zip(trainer.optimizers, saved, strict=True):
            theirs, ours = _sizes(groups), _sizes(optimizer.param_groups)
            if theirs != ours:
                raise ValueError(
                    f"Expected an optimizer of as many parameters as that of the checkpoint, {theirs} in its groups,"
                    f" but got {ours}. Resume with the config.yaml of the run, or start a new one."
                )
            kept = _differences(groups, optimizer.param_groups)
            if kept:
                rank_zero_warn(f"The run resumes with the settings of its checkpoint: {', '.join(kept)}.")


def _class_name(optimizer: object) -> str:
    """Return the name of the class; strategies wrap some optimizers, and compiled ones have the same."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _differences(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the checkpoint has otherwise, such as "lr 0.001 (here 0.002)", each once."""
    found: dict[str, None] = {}
    for theirs, ours in zip(saved, own, strict=True):
        for name in ("lr", "weight_decay", "betas", "momentum", "eps"):
            # A schedule changes `lr`, and a cycle the momentum.
            key = f"initial_{name}" if f"initial_{name}" in theirs and f"initial_{name}" in ours else name
            moves = "max_momentum" in theirs and name in ("betas", "momentum")
            if key in theirs and key in ours and not moves and theirs[key] != ours[key]:
                found[f"{name} {_short(theirs[key])} (here {_short(ours[key])})"] = None
    return list(found)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
