"""Models and data whose top-k logits are the same in every process, predicted into a cache, and ways to stop that."""

import functools
import os
import signal

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lit_logits.callbacks.logit_cache_writer import LogitCacheWriter
from lit_logits.functional.top_k_logits import SourceLogits, TopKLogits, top_k_logits
from lit_logits.storage import joining as logit_cache_joining
from lit_logits.storage import writing as logit_cache_writing

__all__ = [
    "IDS",
    "KILLS",
    "VOCAB_SIZES",
    "Data",
    "Model",
    "bytes_of",
    "check_same",
    "die_at",
    "finished_cache",
    "interrupts",
    "predict",
    "rows_of",
    "sample",
    "settings_of",
    "source_logits",
    "top_of",
    "whole_runs",
]

VOCAB_SIZES = {"base": 50, "other": 70_000}
IDS = [17, 3, 40, 8, 25, 1, 12, 33, 5]  # out of order; 40, 25 and 5 have no positions


def settings_of(source, top_k=4, **more):
    return {"top_k": top_k, "temperature": 1.5, "vocab_size": VOCAB_SIZES[source], "tokenizer_id": 7, **more}


def sample(source, sample_id):
    """Logits (T, V), the positions that count, and where they end: (T,) each, the same in every process."""
    generator = torch.Generator().manual_seed(100 * sample_id + len(source))
    length = 1 + sample_id % 6
    logits = 3 * torch.randn(length, VOCAB_SIZES[source], generator=generator)
    mask = torch.rand(length, generator=generator) < (0.7 if sample_id % 5 else 0)
    ends = torch.where(mask, torch.randint(1000, (length,), generator=generator), -1)
    return logits, mask, ends


@functools.cache
def top_of(source, sample_id, top_k):
    logits, mask, ends = sample(source, sample_id)
    return top_k_logits(logits, top_k, temperature=1.5), mask, ends


def source_logits(source, sample_ids, top_k=4):
    """As `predict_step` returns them."""
    tops, mask, ends = zip(*(top_of(source, sample_id, top_k) for sample_id in sample_ids), strict=True)
    top = TopKLogits(*(pad_sequence(fields, batch_first=True) for fields in zip(*tops, strict=True)))
    return SourceLogits(top, pad_sequence(mask, batch_first=True), pad_sequence(ends, True, padding_value=-1))


class Model(LightningModule):
    """Stops before the batch that holds sample `stop_at`."""

    def __init__(self, sources=("base",), stop_at=None, error=RuntimeError, change=None, **settings):
        super().__init__()
        self.stop_at, self.error, self.change, self.asked = stop_at, error, change, []
        self.cache_settings = {name: settings_of(name, **settings) for name in sources}

    def predict_step(self, batch, batch_idx):
        ids = batch.tolist()
        if self.stop_at in ids:
            raise self.error("killed")
        self.asked += ids
        prediction = {"sample_ids": batch, "sources": {name: source_logits(name, ids) for name in self.cache_settings}}
        return self.change(prediction) if self.change else prediction


class Data(LightningDataModule):
    def __init__(self, ids=IDS, fingerprint="abc", resumable=True, batch_size=2):
        super().__init__()
        self.ids, self.fingerprint, self.batch_size = list(ids), fingerprint, batch_size
        if resumable:
            self.finished_samples = set()

    def predict_dataloader(self):
        """Every rank gets a sample, if any does: Lightning's sampler insists. Finished ones fill up."""
        finished = getattr(self, "finished_samples", set())
        left = [sample for sample in self.ids if sample not in finished]
        missing = self.trainer.world_size - len(left) if left else 0
        return DataLoader(left + sorted(finished)[: max(0, missing)], batch_size=self.batch_size)


def predict(folder, model=None, data=None, shard_tokens=6, **kwargs):
    model = model or Model()
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    quiet = {"enable_model_summary": False, "callbacks": [LogitCacheWriter(str(folder), shard_tokens=shard_tokens)]}
    trainer = Trainer(**{**settings, **quiet, **kwargs})
    trainer.predict(model, datamodule=data or Data(), return_predictions=False)
    return model


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_same(folder, expected):
    """Every file of `expected`, byte for byte, and nothing else, not even an empty folder."""
    found = bytes_of(folder)
    assert found.keys() == expected.keys()
    assert found == expected
    assert {path.name for path in folder.rglob("*") if path.is_dir()} <= set(VOCAB_SIZES)


def rows_of(logits):
    """The fields of each sample's positions that count."""
    fields = (*logits.top_k, logits.ends)
    return [[field[row][mask] for field in fields] for row, mask in enumerate(logits.mask)]


@pytest.fixture(autouse=True)
def interrupts():
    """Lightning ignores Ctrl-C from an interrupt on, in the whole process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(name="whole", scope="module")
def whole_runs(tmp_path_factory):
    """Files of an uninterrupted run with one source, and with two."""
    folder = tmp_path_factory.mktemp("whole")
    predict(folder / "one")
    predict(folder / "two", Model(["base", "other"]))
    return {1: bytes_of(folder / "one"), 2: bytes_of(folder / "two")}


@pytest.fixture(name="cache")
def finished_cache(whole, tmp_path):
    """A finished cache."""
    for name, content in whole[1].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path / "base"


def die_at(monkeypatch, patched, call, error=None, after=False):
    """Let the n-th call of a function of a module fail, before or after its work; None sends SIGKILL."""
    module, name = patched
    function, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            if after:
                function(*args, **kwargs)
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error("killed")
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)
    return calls


KILLS = {
    "move": (os, "replace"),
    "write": (logit_cache_writing, "save_file"),
    "tidy": (logit_cache_joining.shutil, "rmtree"),
}
