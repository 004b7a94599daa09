"""`JsonLinesWriter`: the predictions as lines of JSON, one an example, however often the run is killed."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_logits.callbacks.parts import data_module, on_rank_zero, tell_finished
from lit_logits.contracts import HasFingerprint, HasFinishedRows, HasPredictionSettings, lacks, offers
from lit_logits.storage.folders import replace_file
from lit_logits.storage.settings import differing_settings

__all__ = ["JsonLinesWriter"]


class JsonLinesWriter(BasePredictionWriter):
    """Write the dicts that `predict_step` returns as lines of JSON; the same command resumes after a kill.

    `predict_step` returns a list of dicts of plain JSON values, each with `row`, the number of its example in the data
    set. After each batch they are on disk, in `FOLDER/part-RANK.jsonl`. A run that starts in the folder of an earlier
    one reads the parts of all ranks, however many those were, and drops a last line that was torn. A data module with a
    set `finished_rows` is given the rows that are there, before its `predict_dataloader` is called. A row that is
    predicted again is not written again: Lightning's sampler wants a row for each rank, so that a data module may have
    to leave some in. At the end `FOLDER/predictions.jsonl` holds each row once, in ascending order; the parts stay. All
    processes need to see the same folder.

    `FOLDER/settings.json` keeps predictions of different runs apart: it holds the data module's `fingerprint` if it has
    one, the model's class, its `prediction_settings` or else its hyper-parameters, and the checkpoint.

    Args:
        folder: None is `predictions` in the run folder, which is new in each run; name the folder to resume in it.

    Raises:
        ValueError: If the folder holds predictions of another model, data set or checkpoint, or lines of JSON that are
            not this callback's; if there are several data loaders, whose rows would be mistaken for each other; if
            `predict_step` returns anything else.

    Example:
        >>> JsonLinesWriter("runs/fusion/answers").interval.value
        'batch'
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self._path = Path()
        self._part = Path()
        self._rows: set[int] = set()  # that this rank knows to be written
        self._num_found = 0
        self._is_checked = False

    # ------------------------------------------------------------------ start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the finished rows and tell the data module, which Lightning asks for its loader only after this."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        self._path = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir, "predictions"))
        self._part = self._path / f"part-{trainer.global_rank}.jsonl"
        self._is_checked = False
        data = data_module(trainer)
        settings = pl_module.prediction_settings if offers(pl_module, HasPredictionSettings) else None
        self._check(
            trainer,
            data=data.fingerprint if offers(data, HasFingerprint) else None,
            model={"class": type(pl_module).__name__, **(pl_module.hparams if settings is None else settings)},
        )
        _drop_torn_line(self._part)
        # Ranks must agree on the rows that are left, as they share them among themselves.
        found = on_rank_zero(trainer, lambda: list(_read_parts(self._path)))
        self._rows, self._num_found = set(found), len(found)
        tell_finished(
            data.finished_rows if offers(data, HasFinishedRows) else None,
            found,
            f"{self._path} already has {len(found)} rows, which are predicted again and not written."
            f" {lacks(data, HasFinishedRows, 'a set of the rows to leave out')}",
        )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that rows of two loaders, or of two checkpoints, are not mixed."""
        if len(trainer.num_predict_batches) > 1:
            raise ValueError(
                "Expected one data loader to predict from, as the `row` of two can be the same, but got"
                f" {len(trainer.num_predict_batches)}."
            )
        self._check_checkpoint(trainer)

    def _check_checkpoint(self, trainer: Trainer) -> None:
        """Compare the checkpoint, once a run: the Trainer knows it after `setup`, and a loop may have no batches."""
        if self._is_checked:
            return
        self._is_checked, checkpoint = True, trainer.ckpt_path and Path(trainer.ckpt_path).absolute()
        if checkpoint and checkpoint.exists():
            time = datetime.fromtimestamp(checkpoint.stat().st_mtime).isoformat(" ", "seconds")
            self._check(trainer, checkpoint=f"{checkpoint} of {time}")
        else:
            self._check(trainer, checkpoint=trainer.ckpt_path and str(trainer.ckpt_path))

    def _check(self, trainer: Trainer, **settings: Any) -> None:
        """Compare with the settings in the folder, and add these to them."""
        on_rank_zero(trainer, lambda: _add_settings(self._path, _as_json(settings)))

    # ------------------------------------------------------------------ lines

    def write_on_batch_end(self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any) -> None:
        """Append the rows that this rank does not know to be written, and flush them to disk."""
        if not isinstance(prediction, list):
            raise ValueError(f"Expected `predict_step` to return a list of dicts, but got {type(prediction).__name__}.")
        lines = dict(map(_encode_line, prediction))
        new = [line for row, line in lines.items() if row not in self._rows]
        if new:
            with self._part.open("ab") as file:
                file.write(b"".join(new))
                file.flush()
                os.fsync(file.fileno())
        self._rows.update(lines)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to resume."""
        if trainer.predicting and len(self._rows) > self._num_found:
            rank_zero_info(f"Stopped; go on with `folder: {self._path}`.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the parts, and say where they are.

        Not in `on_predict_end`, which a rank without batches does not reach; if all rows are finished, no rank does.
        """
        if stage != "predict":
            return
        self._check_checkpoint(trainer)
        trainer.strategy.barrier()  # until all ranks have written their last lines
        count = on_rank_zero(trainer, lambda: _join(self._path))
        rank_zero_info(
            f"Predictions: {self._path / 'predictions.jsonl'}, {count} rows, of which {self._num_found} were there"
            " before."
        )


# ---------------------------------------------------------------------- files


def _encode_line(example: Any) -> tuple[int, bytes]:
    row = example.get("row") if isinstance(example, dict) else None
    if type(row) is not int:
        raise ValueError(
            "Expected `predict_step` to return dicts with the number of their example, an int, as `row`, but got"
            f" {example!r:.200}."
        )
    try:
        text = json.dumps(example, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected `predict_step` to return plain JSON values, but in row {row}: {error}.") from error
    return row, text.encode("utf-8", "backslashreplace") + b"\n"  # \udc80, half a pair, is JSON but not UTF-8


def _whole_lines(part: Path) -> Iterator[tuple[int, int, int]]:
    """Yield row, start and end of each whole line; a kill may have cut one off."""
    end = 0
    with part.open("rb") as file:
        for line in file:
            start, end = end, end + len(line)
            try:
                example = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                continue
            if isinstance(example, dict) and type(example.get("row")) is int:
                yield example["row"], start, end


def _drop_torn_line(part: Path) -> None:
    if part.is_file():
        os.truncate(part, max((end for *_, end in _whole_lines(part)), default=0))


def _read_parts(folder: Path) -> dict[int, tuple[Path, int]]:
    """Return the part of each finished row, and where its line starts there."""
    index: dict[int, tuple[Path, int]] = {}
    for part in sorted(folder.glob("part-*.jsonl")):
        for row, start, _ in _whole_lines(part):
            index.setdefault(row, (part, start))
    return index


def _join(folder: Path) -> int:
    """Write `predictions.jsonl` and return the number of its rows."""
    index = _read_parts(folder)

    def write(partial: Path) -> None:
        with ExitStack() as stack:
            files = {part: stack.enter_context(part.open("rb")) for part in {part for part, _ in index.values()}}
            joined = stack.enter_context(partial.open("wb"))
            for _, (part, start) in sorted(index.items()):
                files[part].seek(start)
                joined.write(files[part].readline())

    replace_file(folder / "predictions.jsonl", write)
    return len(index)


# ---------------------------------------------------------------------- settings


def _add_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Add `settings` to those of the folder.

    Raises:
        ValueError: If the folder has other settings, or files of something else.
    """
    file = folder / "settings.json"
    # Files without settings are not of this callback, and must not be overwritten.
    if not file.is_file() and (strangers := sorted(path.name for path in folder.glob("*.jsonl"))):
        raise ValueError(
            f"Expected `folder` to be new or of an earlier run, but {folder} has {strangers[0]} and no settings.json."
        )
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    there = dict(_flatten({name: known[name] for name in settings if name in known}))
    here = dict(_flatten({name: settings[name] for name in settings if name in known}))
    if differing := differing_settings(there, here):
        raise ValueError(
            f"Expected {folder} to hold predictions of this run, but {', '.join(differing)}. Pass another `folder`, or"
            " delete it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**known, **settings}, ensure_ascii=False, indent=2) + "\n"
    replace_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def _as_json(value: Any) -> Any:
    """Return `value` as JSON reads it back, and anything else as text that is the same in every process."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return json.loads(json.dumps(value), parse_constant=str)  # NaN and infinity become text
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
