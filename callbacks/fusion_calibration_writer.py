"""`FusionCalibrationWriter`: the settings of fusion that the validation split likes best, as a recipe."""

import json
from math import exp
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_logits.callbacks.parts import find_part, on_rank_zero
from lit_logits.modules.dynamic_fusion.calibration import FusionCalibration, FusionRating
from lit_logits.storage.folders import replace_file

__all__ = ["FusionCalibrationWriter"]


class FusionCalibrationWriter(Callback):
    """Write the best settings of a `FusionCalibration` after `validate`, and print how all of them did.

    The file is a part of a recipe, which is given after the recipe itself: `lit-logits test --config
    dynamic_fusion.yaml --config runs/dynamic_fusion/version_0/calibrated.yaml`. The settings under which the tokens of
    the responses are likeliest are the best; among equals the present ones.

    Args:
        path: of the file; None is `calibrated.yaml` in the run folder.

    Raises:
        ValueError: If a model that is validated has nothing to calibrate.

    Example:
        >>> FusionCalibrationWriter("calibrated.yaml").path
        'calibrated.yaml'
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._file = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to calibrate, and ask for the run folder, which ranks do together."""
        if stage != "validate":
            return
        if find_part(pl_module, FusionCalibration) is None:
            raise ValueError(
                f"Expected a model with a `FusionCalibration`, such as DynamicFusionDecoder, but got"
                f" {type(pl_module).__name__}. Leave FusionCalibrationWriter out."
            )
        self._file = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir, "calibrated.yaml"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and write the file."""
        part = find_part(pl_module, FusionCalibration)
        if part is None or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        ratings = part.compute()  # on all ranks
        kind = type(pl_module)
        text = _recipe(
            min(ratings, key=lambda rating: rating.nll), ratings[0], f"{kind.__module__}.{kind.__qualname__}"
        )
        on_rank_zero(trainer, lambda: _write(self._file, text))
        rank_zero_info(
            f"{_table(ratings)}\nThe best settings: {self._file}, to be given as `--config` after the recipe."
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if nothing was written: without batches `on_validation_end` is not called."""
        if stage == "validate" and not any(trainer.num_val_batches):
            rank_zero_warn(
                "FusionCalibrationWriter wrote nothing, as the data has no validation split. Set its `val_fraction`."
            )


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda partial: partial.write_text(text))


def _table(ratings: list[FusionRating]) -> str:
    """Return a line for each candidate, the best first."""
    lines = [f"{'criterion':<10} {'scale':>6} {'static alpha':>14} {'val/ppl':>10} {'mean alpha':>10}"]
    for (criterion, scale, static), nll, alpha in sorted(ratings, key=lambda rating: rating.nll):
        settings = (
            f"{'':<10} {'':>6} {_listed(static):>14}" if static is not None else f"{criterion:<10} {scale:>6g} {'':>14}"
        )
        lines.append(f"{settings} {exp(nll):>10.4f} {alpha:>10.3f}")
    return "\n".join(lines)


def _listed(weights: tuple[float, ...]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)


def _recipe(best: FusionRating, given: FusionRating, class_path: str) -> str:
    """Return the settings of a candidate in YAML, of which a value of JSON is one."""
    criterion, scale, static = best.candidate
    settings: dict[str, Any] = {"criterion": criterion, "scale": scale, "static_alpha": None}
    settings = settings if static is None else {"static_alpha": list(static)}
    return "\n".join(
        [
            "# Chosen by `validate`; to be given as `--config` after the recipe. Perplexity of the validation split:",
            f"# {exp(best.nll):.4f}, and {exp(given.nll):.4f} by the settings of that run.",
            "model:",
            f"  class_path: {class_path}",
            "  init_args:",
            *(f"    {name}: {json.dumps(value)}" for name, value in settings.items()),
            "",
        ]
    )
