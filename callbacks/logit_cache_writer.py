"""`LogitCacheWriter`: the predicted top-k logits as caches on disk, however often the run is killed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_logits.callbacks.parts import data_module, on_rank_zero, tell_finished
from lit_logits.contracts import (
    HasCacheSettings,
    HasCacheTokens,
    HasFingerprint,
    HasFinishedSamples,
    HasLayoutIds,
    HasMaxLength,
    HasSampleIds,
    lacks,
    offers,
)
from lit_logits.storage.joining import join_cache
from lit_logits.storage.logit_cache import describe_cache
from lit_logits.storage.writing import (
    begin_cache,
    check_cache,
    complete_settings,
    find_finished,
    pack_logits,
    reopen_cache,
    write_part,
)

__all__ = ["LogitCacheWriter"]


class LogitCacheWriter(BasePredictionWriter):
    """Write the logits of source models, a cache each; the same command resumes after a kill.

    `predict_step` returns `{"sample_ids": (B,) int64, "sources": {name: SourceLogits}}`. After each batch its samples
    are on disk. A run that starts in the folder of an earlier one gives a data module with a set `finished_samples` the
    samples that all sources have, before its `predict_dataloader` is called; a sample that is predicted again is not
    written again. At the end the parts are joined, and `FOLDER/NAME` is a cache for `LogitCache`. If
    `limit_predict_batches` cuts a run short, its parts stay, and a run without the limit completes them. An id stands
    for one sample, also across data loaders. All processes need to see the same folder.

    Where a data module numbers samples by their content (`sample_ids`), a cache may be extended: a run with other or
    more data predicts the samples that are not there, and joins all. A cache to which nothing is added stays as it is;
    one that is being extended is not complete before the end.

    The module's `cache_settings`, a dict or a method that returns one, are the settings of each source by its name, as
    plain JSON: at least `top_k`, `temperature`, `vocab_size`, `tokenizer_id`. The cache keeps them with `dtype` and the
    data module's `fingerprint`, `layout_ids` and `max_length`, if it has them; runs with other settings are refused.
    With the module's `cache_tokens`, the bytes of each token by the name of its source, a cache tells what its token
    ids mean.

    Args:
        folder: folder of the caches; each source has its own folder there.
        dtype: of the log-probabilities; with `float32` training is the same as with the source itself, bit for bit.
        shard_tokens: approximate number of positions in a file of the finished cache; each takes 280 bytes at k = 32.

    Raises:
        ValueError: If the folder holds logits of other settings or data, or other files; if the module has no
            `cache_settings`; if `predict_step` returns anything else; if a source returns logits that are not finite.

    Example:
        >>> LogitCacheWriter("runs/logits").interval.value
        'batch'
    """

    def __init__(
        self, folder: str, dtype: Literal["float32", "float16"] = "float32", shard_tokens: int = 1 << 20
    ) -> None:
        super().__init__(write_interval="batch")
        if shard_tokens < 1:
            raise ValueError(f"Expected `shard_tokens` to be positive, but got {shard_tokens}.")
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self._settings: dict[str, dict[str, Any]] = {}
        self._tokens: Mapping[str, Sequence[bytes | None] | None] = {}
        self._known: dict[str, set[int]] = {}  # samples of each source that this rank knows to be written
        self._complete: set[str] = set()
        self._num_written = 0
        self._is_running = self._is_stopped = False

    # ------------------------------------------------------------------ start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the finished samples and tell the data module, which Lightning asks for its loader only after this."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        self._num_written, self._is_running, self._is_stopped = 0, False, False
        data = data_module(trainer)
        self._settings = _settings_of(pl_module, self.dtype, data)
        self._tokens = pl_module.cache_tokens if offers(pl_module, HasCacheTokens) else {}
        wanted = set(data.sample_ids("predict")) if offers(data, HasSampleIds) else None
        # Ranks must agree on the samples that are left, as they share them among themselves.
        known, self._complete = on_rank_zero(trainer, lambda: self._begin(wanted))
        self._known = {name: set(ids) for name, ids in known.items()}
        found = set.intersection(*self._known.values())
        tell_finished(
            data.finished_samples if offers(data, HasFinishedSamples) else None,
            found,
            f"{self.folder} already has {len(found)} samples, which are predicted again and not written."
            f" {lacks(data, HasFinishedSamples, 'a set of the samples to leave out')}",
        )

    def _begin(self, wanted: set[int] | None) -> tuple[dict[str, list[int]], set[str]]:
        """Return the finished samples of each source and the complete sources; change nothing if any is refused.

        A complete cache that lacks some of the samples that are wanted, by ids of their content, is not complete.
        """
        folders = {name: Path(self.folder, name) for name in self._settings}
        for name, settings in self._settings.items():
            if problem := check_cache(folders[name], settings, extends=wanted is not None):
                raise ValueError(problem)
        for name, settings in self._settings.items():
            begin_cache(folders[name], settings, self._tokens.get(name))
        known = {name: find_finished(folder) for name, folder in folders.items()}
        complete = {name for name, folder in folders.items() if (describe_cache(folder) or {}).get("complete")}
        for name in [name for name in complete if wanted is not None and not wanted <= set(known[name])]:
            reopen_cache(folders[name], self._settings[name])
            complete.remove(name)
        return known, complete

    # ------------------------------------------------------------------ parts

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there are batches, so that `teardown` joins only if all were predicted."""
        self._is_running = True

    def write_on_batch_end(self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any) -> None:
        """Write this batch's new samples to disk; write nothing if any is refused."""
        if not isinstance(prediction, dict) or prediction.keys() != {"sample_ids", "sources"}:
            raise ValueError(
                "Expected `predict_step` to return a dict of `sample_ids` and `sources`, but got"
                f" {type(prediction).__name__}{list(prediction) if isinstance(prediction, dict) else ''}."
            )
        sources, sample_ids = prediction["sources"], prediction["sample_ids"]
        if sources.keys() != self._settings.keys():
            raise ValueError(f"Expected logits of the sources {list(self._settings)}, but got {list(sources)}.")
        parts = {}
        for name, logits in sources.items():
            if rows := self._new_rows(name, sample_ids.tolist()):
                parts[name] = pack_logits(name, logits, sample_ids, rows, self._settings[name])
        for name, part in parts.items():
            write_part(Path(self.folder, name), part)
            self._known[name].update(part["sample_ids"].tolist())
            self._num_written += 1

    def _new_rows(self, name: str, sample_ids: list[int]) -> list[int]:
        """Return the rows of the batch whose samples the source lacks, the first row of each sample."""
        first = {sample: row for row, sample in reversed(list(enumerate(sample_ids)))}
        rows = sorted(row for sample, row in first.items() if sample not in self._known[name])
        if rows and name in self._complete:
            raise ValueError(
                f"Expected {Path(self.folder, name)}, which is complete, to hold all samples of these data, but it has"
                f" no sample {sample_ids[rows[0]]}. Pass another `folder`, or delete it."
            )
        return rows

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that all batches were written."""
        self._is_running = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to resume."""
        self._is_stopped = True
        if trainer.predicting and self._num_written:
            rank_zero_info(f"Stopped; the same command goes on from the samples that are in {self.folder}.")

    # ------------------------------------------------------------------ end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the parts, and say where they are.

        Not in `on_predict_end`, which a rank without batches does not reach; if all samples are finished, no rank does.
        """
        if stage != "predict" or self._is_stopped or self._is_running:
            return
        trainer.strategy.barrier()  # until all ranks have written their last part
        is_whole = trainer.strategy.reduce_boolean_decision(not _is_cut(trainer), all=True)
        on_rank_zero(trainer, lambda: self._finish(is_whole))

    def _finish(self, is_whole: bool) -> None:
        """Join the parts of each source if no batch was left out."""
        for name in self._settings:
            folder = Path(self.folder, name)
            if is_whole:
                cache = join_cache(folder, self.shard_tokens)
                rank_zero_info(
                    f"Logits of {name}: {folder}, {cache['num_samples']} samples, {cache['num_tokens']} tokens,"
                    f" {cache['bytes_per_token']} bytes a token."
                )
            else:
                rank_zero_info(
                    f"Logits of {name}: {folder}, {len(find_finished(folder))} samples so far, as"
                    " `limit_predict_batches` cut the run short; the command without it goes on."
                )


def _settings_of(pl_module: LightningModule, dtype: str, data: object) -> dict[str, dict[str, Any]]:
    given = pl_module.cache_settings if offers(pl_module, HasCacheSettings) else None
    settings = given() if callable(given) else given
    if not settings:
        raise ValueError(lacks(pl_module, HasCacheSettings, "the settings of each source by its name"))
    layouts = data.layout_ids if offers(data, HasLayoutIds) else None
    fingerprint = data.fingerprint if offers(data, HasFingerprint) else None
    extra: dict[str, Any] = {"dtype": dtype}
    if offers(data, HasMaxLength):
        extra["max_length"] = data.max_length
    completed = {}
    for name, values in settings.items():
        if layouts is not None:  # "" names the data module's own tokens
            extra["layout_id"] = layouts.get(name, layouts.get(""))
        completed[name] = complete_settings(name, {**extra, **values}, fingerprint)
    return completed


def _is_cut(trainer: Trainer) -> bool:
    """Return whether `limit_predict_batches` has left batches out."""
    limit = trainer.limit_predict_batches
    if isinstance(limit, float) and limit == 1:
        return False
    loaders: Any = trainer.predict_dataloaders
    try:
        sizes = [len(loader) for loader in (loaders if isinstance(loaders, list | tuple) else [loaders])]
    except TypeError:  # no loader was made, or one has no length
        return True
    return sizes != list(trainer.num_predict_batches)
