"""Top-k logits on disk: written by the real Trainer, killed, resumed and read back; the same bytes in the end."""

import copy
import functools
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lit_logits.callbacks.logit_cache_writer import LogitCacheWriter
from lit_logits.functional.top_k_logits import SourceLogits, TopKLogits, top_k_logits
from lit_logits.storage import joining as logit_cache_joining
from lit_logits.storage import writing as logit_cache_writing
from lit_logits.storage.logit_cache import LogitCache, is_logit_cache

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
def _interrupts():
    """Lightning ignores Ctrl-C from an interrupt on, in the whole process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of an uninterrupted run with one source, and with two."""
    folder = tmp_path_factory.mktemp("whole")
    predict(folder / "one")
    predict(folder / "two", Model(["base", "other"]))
    return {1: bytes_of(folder / "one"), 2: bytes_of(folder / "two")}


@pytest.fixture
def cache(whole, tmp_path):
    """A finished cache."""
    for name, content in whole[1].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path / "base"


# ---------------------------------------------------------------------- one run


def test_what_is_written_is_read(tmp_path, caplog):
    """Bit for bit, and only what counts; two sources at once, with ids of two and of four bytes."""
    with caplog.at_level(logging.INFO):
        predict(tmp_path, Model(["base", "other"]))
    for source in VOCAB_SIZES:
        reader = LogitCache(tmp_path / source)
        order = [12, 40, 1, 33, 12, 3]
        read, expected = reader.read(torch.tensor(order)), source_logits(source, order)
        counts = expected.mask.sum(1)
        assert read.mask.shape == (6, int(counts.max()))
        assert torch.equal(read.mask, torch.arange(int(counts.max())) < counts[:, None])
        for row, (ours, theirs) in enumerate(zip(rows_of(read), rows_of(expected), strict=True)):
            for one, other in zip(ours, theirs, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other), (source, order[row])
        assert (read.top_k.std[~read.mask] == 1).all()
        assert (read.ends[~read.mask] == -1).all()
        assert all((field[~read.mask] == 0).all() for field in read.top_k[:-1])
        shards = [logit_cache_joining.safe_open(path, "pt") for path in sorted((tmp_path / source).glob("shard-*"))]
        assert [sample for shard in shards for sample in shard.get_tensor("sample_ids").tolist()] == sorted(IDS)
        assert {shard.get_tensor("token_ids").dtype for shard in shards} == {
            torch.uint16 if source == "base" else torch.int32
        }
        num_tokens = sum(int(sample(source, sample_id)[1].sum()) for sample_id in IDS)
        assert len(shards) > 2
        assert (len(reader), reader.num_tokens, reader.top_k, reader.temperature) == (9, num_tokens, 4, 1.5)
        assert (reader.vocab_size, reader.tokenizer_id, reader.settings["data"]) == (VOCAB_SIZES[source], 7, "abc")
        assert reader.settings == {**settings_of(source), "data": "abc", "dtype": "float32"}
        assert 12 in reader
        assert torch.tensor(40) in reader
        assert not {0, 2, 41} & {sample_id for sample_id in range(50) if sample_id in reader}
        assert f"{tmp_path / source}, 9 samples, {num_tokens} tokens," in caplog.text


def test_samples_without_positions(tmp_path):
    """Are there, and read as rows that do not count; so does no sample at all."""
    predict(tmp_path)
    reader = LogitCache(tmp_path / "base")
    for ids in ([40, 5], [25], []):
        read = reader.read(torch.tensor(ids, dtype=torch.int64))
        assert read.mask.shape == read.ends.shape == (len(ids), 1)
        assert read.top_k.log_probs.shape == read.top_k.token_ids.shape == (len(ids), 1, 4)
        assert not read.mask.any()
    predict(tmp_path / "none", data=Data([40, 5, 25]))
    assert LogitCache(tmp_path / "none" / "base").read(torch.tensor([5])).mask.tolist() == [[False]]


def test_float16(tmp_path):
    """Halves the log-probabilities alone."""
    predict(tmp_path, Model(dtype="float16"))
    read = LogitCache(tmp_path / "base").read(torch.tensor(IDS))
    assert read.top_k.log_probs.dtype == torch.float32
    for ours, theirs in zip(rows_of(read), rows_of(source_logits("base", IDS)), strict=True):
        torch.testing.assert_close(ours[0], theirs[0], atol=2e-3, rtol=1e-3)
        assert all(torch.equal(one, other) for one, other in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float16", 2e-3)])
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_fewer_columns(tmp_path, top_k, dtype, atol):
    """Those of a top-k of fewer; no probability is lost."""
    predict(tmp_path, Model(dtype=dtype))
    read = LogitCache(tmp_path / "base").read(torch.tensor(IDS), top_k=top_k)
    torch.testing.assert_close(
        (read.top_k.log_probs.exp().sum(-1) + read.top_k.tail)[read.mask],
        torch.ones(int(read.mask.sum())),
        atol=atol,
        rtol=0,
    )
    for ours, theirs in zip(rows_of(read), rows_of(source_logits("base", IDS, top_k)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-3)
    assert (read.top_k.tail[~read.mask] == 0).all()
    assert read.top_k.log_probs.is_contiguous()


def test_bytes_a_token(tmp_path):
    """At k = 32 and 262,144 tokens, as `cache.json` says and as the files are."""
    generator = torch.Generator().manual_seed(0)
    settings = {"top_k": 32, "vocab_size": 262_144, "dtype": "float32"}
    floats = [torch.randn(8, 150, generator=generator) for _ in range(4)]
    log_probs = torch.randn(8, 150, 32, generator=generator)
    token_ids = torch.randint(262_144, (8, 150, 32), generator=generator)
    logits = SourceLogits(
        TopKLogits(log_probs, token_ids, *floats), torch.rand(8, 150) < 0.9, torch.ones(8, 150).long()
    )
    folder = tmp_path / "base"
    logit_cache_writing.begin_cache(folder, settings)
    part = logit_cache_writing.pack_logits("base", logits, torch.arange(8), range(8), settings)
    logit_cache_writing.write_part(folder, part)
    description = logit_cache_joining.join_cache(folder)
    size = sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert description["num_tokens"] == int(logits.mask.sum())
    assert description["bytes_per_token"] == round(size / description["num_tokens"], 2) <= 300
    assert json.loads((folder / "cache.json").read_text()) == description


def test_files_are_as_readable_as_others(cache):
    """A cache that several users share; safetensors would leave its files to one."""
    assert len({path.stat().st_mode for path in cache.iterdir()}) == 1


# ---------------------------------------------------------------------- kills


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


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kill", KILLS)
def test_every_step_at_which_a_kill_can_come(tmp_path, whole, monkeypatch, kill, after):
    """Of two sources, one of which may have what the other lacks; then the same command ends in the same bytes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here, and hundreds take long
    call, killed = 0, True
    while killed:
        call += 1
        folder, error = tmp_path / str(call), (RuntimeError, KeyboardInterrupt)[call % 2]
        with monkeypatch.context() as patch:
            die_at(patch, KILLS[kill], call, error, after)
            try:
                predict(folder, Model(["base", "other"]))
                killed = False
            except (RuntimeError, SystemExit):  # Lightning makes an exit of an interrupt
                pass
        finished = [check_finished(folder / source) for source in VOCAB_SIZES]
        assert set(predict(folder, Model(["base", "other"])).asked) == set(IDS) - set.intersection(*finished)
        check_same(folder, whole[2])
    assert call > {"move": 20, "write": 14, "tidy": 4}[kill]


def test_files_are_on_disk_before_they_appear(tmp_path, monkeypatch):
    """And their names before parts go, for which they stand."""
    events = []

    def spy(name, function):
        def spying(path, *args, **kwargs):
            where = os.readlink(f"/proc/self/fd/{path}") if name == "fsync" else str(path)
            events.append((name, where))
            return function(path, *args, **kwargs)

        return spying

    for module, name in ((os, "fsync"), (os, "replace"), (logit_cache_joining.shutil, "rmtree")):
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    predict(tmp_path)
    moves = [at for at, (name, _) in enumerate(events) if name == "replace"]
    assert len(moves) > 9
    for at in moves:
        assert events[at - 1] == ("fsync", events[at][1])
        assert events[at + 1][0] == "fsync"
        assert Path(events[at + 1][1]).is_relative_to(tmp_path / "base")
    assert [name for name, _ in events[moves[-1] + 1 :]] == ["fsync", "rmtree", "rmtree"]


def check_finished(folder):
    """What a killed run has finished; it reads as a cache if it says that it is one, and else not."""
    finished = set(logit_cache_writing.find_finished(folder))
    try:
        assert set(LogitCache(folder).sample_ids.tolist()) == finished == set(IDS)
    except ValueError as error:
        assert "was stopped before its end" in str(error) or "has none" in str(error)  # noqa: PT017
    return finished


@pytest.mark.filterwarnings("ignore:.*samples already")
def test_killed_twice_and_with_other_batches(tmp_path, whole):
    """Samples that lie in parts of both runs are taken once."""
    for stop_at, size, resumable in ((8, 2, True), (12, 3, False), (33, 1, True), (None, 4, False)):
        data = Data(batch_size=size, resumable=resumable, ids=IDS[::-1] if size == 3 else IDS)
        try:
            predict(tmp_path, Model(stop_at=stop_at), data)
        except RuntimeError:
            assert stop_at is not None
            assert not (json.loads((tmp_path / "base" / "cache.json").read_text()))["complete"]
    check_same(tmp_path, whole[1])


def test_overlapping_parts(tmp_path, whole):
    """As ranks with different views leave them; a torn one of a failing disk is made anew."""
    settings = {**settings_of("base"), "data": "abc", "dtype": "float32"}
    folder = tmp_path / "base"
    logit_cache_writing.begin_cache(folder, settings)
    for ids in ([3, 17], [17, 3], [40, 8, 3], [1, 12, 17]):
        part = logit_cache_writing.pack_logits(
            "base", source_logits("base", ids), torch.tensor(ids), range(len(ids)), settings
        )
        logit_cache_writing.write_part(folder, part)
    parts = sorted((folder / "parts").iterdir())
    assert len(parts) == 3  # the same two samples are the same file
    (folder / "parts" / "torn.safetensors").write_bytes(parts[0].read_bytes()[:-1])
    assert set(predict(tmp_path).asked) == {25, 33, 5}
    check_same(tmp_path, whole[1])


def test_samples_that_come_twice(tmp_path, whole):
    """In a batch, and in two."""
    predict(tmp_path, data=Data([17, 17, *IDS, 3, 17, 5]))
    check_same(tmp_path, whole[1])


def test_other_shard_sizes(tmp_path, monkeypatch):
    """A join that was killed had more shards than the one that follows; a shard larger than all is one file."""
    with monkeypatch.context() as patch:
        die_at(patch, (logit_cache_joining, "write_description"), 1, RuntimeError)
        with pytest.raises(RuntimeError, match="killed"):
            predict(tmp_path, shard_tokens=1)
    assert len(list(tmp_path.glob("base/shard-*"))) > 3
    predict(tmp_path, shard_tokens=10_000)
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["cache.json", "shard-00000.safetensors"]
    assert len(LogitCache(tmp_path / "base")) == 9


@pytest.mark.parametrize("call", [1, 4, 6, 8, 9])
def test_sigkill(tmp_path, whole, monkeypatch, call):
    """Of a process, where nothing is tidied: while parts are written, and while they are joined."""

    def run():
        torch.set_num_threads(1)
        die_at(monkeypatch, KILLS["move"], call)
        predict(tmp_path)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob("base/partial/*"))
    assert (
        not list(tmp_path.glob("base/cache.json"))
        or not json.loads((tmp_path / "base" / "cache.json").read_text())["complete"]
    )
    before = sorted(tmp_path.glob("base/parts/*"))
    assert len(predict(tmp_path).asked) == max(0, 9 - 2 * len(before))
    check_same(tmp_path, whole[1])


def test_a_finished_run_makes_nothing_anew(tmp_path, whole, caplog):
    """Lightning starts no loop without batches. A source that is added later gets its own."""
    predict(tmp_path)
    with caplog.at_level(logging.INFO):
        assert predict(tmp_path).asked == []
    assert "9 samples" in caplog.text
    check_same(tmp_path, whole[1])
    with pytest.warns(UserWarning, match="already has 9 samples"):
        assert len(predict(tmp_path, data=Data(resumable=False)).asked) == 9
    check_same(tmp_path, whole[1])
    predict(tmp_path, Model(["base", "other"]))
    check_same(tmp_path, whole[2])


@pytest.mark.parametrize("limit", [0, 1, 2, 0.5])
def test_a_limited_run_is_not_complete(tmp_path, whole, caplog, limit):
    with caplog.at_level(logging.INFO):
        asked = predict(tmp_path, limit_predict_batches=limit).asked
    assert f"{len(asked)} samples so far, as `limit_predict_batches` cut the run short" in caplog.text
    with pytest.raises(ValueError, match="was stopped before its end: run the predict command again"):
        LogitCache(tmp_path / "base")
    assert len(predict(tmp_path, limit_predict_batches=100).asked) == 9 - len(asked)
    check_same(tmp_path, whole[1])


def test_an_interrupted_run_tells_how_to_go_on(tmp_path, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit):
        predict(tmp_path, Model(stop_at=12, error=KeyboardInterrupt))
    assert f"the same command goes on from the samples that are in {tmp_path}" in caplog.text
    with pytest.raises(ValueError, match="was stopped before its end"):
        LogitCache(tmp_path / "base")


# ---------------------------------------------------------------------- more samples


class ContentData(Data):
    """Numbers samples by their content."""

    def sample_ids(self, stage):
        assert stage == "predict"
        return self.ids


def test_a_cache_is_extended_by_what_it_lacks(tmp_path, whole):
    """By other data: the new samples alone are predicted, and the cache is that of all, byte for byte."""
    first = predict(tmp_path, Model(["base", "other"]), ContentData(IDS[:4], fingerprint="first"))
    assert first.asked == IDS[:4]
    before, times = bytes_of(tmp_path), [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))]
    for ids in (IDS[1:3], IDS[:4]):  # nothing is new
        assert predict(tmp_path, Model(["base", "other"]), ContentData(ids, fingerprint="some")).asked == []
    assert bytes_of(tmp_path) == before
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))] == times
    more = predict(tmp_path, Model(["base", "other"]), ContentData(IDS[2:][::-1]))
    assert sorted(more.asked) == sorted(IDS[4:])
    check_same(tmp_path, whole[2])
    assert predict(tmp_path, Model(["base", "other"]), ContentData(IDS[:4], fingerprint="first")).asked == []
    check_same(tmp_path, whole[2])
    with pytest.raises(ValueError, match="`top_k` was 4 there and is 5 now"):
        predict(tmp_path, Model(["base", "other"], top_k=5), ContentData([*IDS, 2]))
    check_same(tmp_path, whole[2])


@pytest.mark.parametrize("kill", [*KILLS, "take apart"])
def test_an_extension_that_is_killed_loses_nothing(tmp_path, whole, monkeypatch, kill):
    """At every step, also between the parts that it makes of what was there."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    call, killed = 0, True
    while killed:
        call += 1
        folder = tmp_path / str(call)
        predict(folder, data=ContentData(IDS[:5], fingerprint="first"), shard_tokens=3)
        patched = KILLS.get(kill, (logit_cache_writing, "_part_of"))
        with monkeypatch.context() as patch:
            die_at(patch, patched, call, RuntimeError)
            try:
                predict(folder, data=ContentData())
                killed = False
            except RuntimeError:
                pass
        left = predict(folder, data=ContentData()).asked
        assert set(left) <= set(IDS[5:])
        check_same(folder, whole[1])
    assert call > {"move": 8, "write": 4, "tidy": 2, "take apart": 4}[kill]


# ---------------------------------------------------------------------- what is refused at writing


@pytest.mark.parametrize("stop_at", [25, None], ids=["stopped", "complete"])
@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"top_k": 5}, {}, r"`top_k` was 4 there and is 5 now\. Pass another `folder`, or delete it"),
        ({"model": "a/b"}, {}, r"`model` was absent there and is 'a/b' now"),
        ({"dtype": "float16"}, {"fingerprint": "xyz"}, r"`data` was 'abc' there and is 'xyz' now, `dtype` was 'float"),
    ],
)
def test_other_settings_are_refused(tmp_path, model, data, message, stop_at):
    """And what is there stays, also that of the source that would fit."""
    try:
        predict(tmp_path, Model(stop_at=stop_at))
    except RuntimeError:
        assert stop_at
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        predict(tmp_path, Model(["other", "base"], **model), Data(**data))
    assert str(error.value).startswith(f"Expected {tmp_path / 'base'} to hold logits of these settings")
    assert bytes_of(tmp_path) == before


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "base").mkdir()
    for name, content in (("notes.txt", "mine"), ("cache.json", "{}"), ("cache.json", "no JSON")):
        (tmp_path / "base" / name).write_text(content)
        before = bytes_of(tmp_path)
        with pytest.raises(ValueError, match=r"to be new or .* but it has \S* and no cache.json of one"):
            predict(tmp_path)
        assert bytes_of(tmp_path) == before
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "base").write_text("mine")
    with pytest.raises(ValueError, match="but it is a file"):
        predict(tmp_path)


def test_another_version_is_refused(cache):
    text = (cache / "cache.json").read_text().replace('"version": 2', '"version": 3')
    (cache / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=r"to be a logit cache of version 2, but got version 3\. Pass another"):
        predict(cache.parent)
    with pytest.raises(ValueError, match=r"to be of a version in \[1, 2\] .* but got version 3"):
        LogitCache(cache)
    assert is_logit_cache(cache)


def test_a_cache_of_version_1_is_read_and_not_written_to(cache):
    """It has neither log-probabilities of labels nor tokens, and its ends count characters."""
    new = LogitCache(cache)
    text = (cache / "cache.json").read_text().replace('"version": 2', '"version": 1')
    (cache / "cache.json").write_text(text)
    old = LogitCache(cache)
    assert (new.counts_bytes, old.counts_bytes, old.has_label_log_probs, old.tokens) == (True, False, False, None)
    one, other = (reader.read(torch.tensor(IDS)) for reader in (new, old))
    assert other.label_log_probs is None
    assert not new.has_boundary_log_probs
    assert one.boundary_log_probs is other.boundary_log_probs is None
    for mine, theirs in zip((*one.top_k, one.mask, one.ends), (*other.top_k, other.mask, other.ends), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=r"to be a logit cache of version 2, but got version 1\. Pass another"):
        predict(cache.parent)


def with_labels(prediction):
    """Each position's label has a log-probability that tells where it is, and so has a boundary."""
    sources = prediction["sources"]
    return {
        **prediction,
        "sources": {
            name: logits._replace(
                label_log_probs=-logits.ends.float() - 0.125, boundary_log_probs=-logits.ends.float() - 0.25
            )
            for name, logits in sources.items()
        },
    }


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 0), ("float16", 0.5)])
def test_log_probabilities_of_the_tokens_that_came(tmp_path, dtype, atol):
    """Written beside the others, across kills, in two or four bytes."""
    with pytest.raises(RuntimeError, match="killed"):
        predict(tmp_path, Model(change=with_labels, stop_at=12, dtype=dtype))
    predict(tmp_path, Model(change=with_labels, dtype=dtype))
    reader = LogitCache(tmp_path / "base")
    assert reader.has_label_log_probs
    assert reader.has_boundary_log_probs
    read = reader.read(torch.tensor(IDS))
    for values, less in ((read.label_log_probs, 0.125), (read.boundary_log_probs, 0.25)):
        torch.testing.assert_close(values, torch.where(read.mask, -read.ends.float() - less, 0.0), atol=atol, rtol=0)
    [shard, *_] = [logit_cache_joining.safe_open(path, "pt") for path in sorted((tmp_path / "base").glob("shard-*"))]
    for name in ("label_log_probs", "boundary_log_probs"):
        assert shard.get_tensor(name).dtype == getattr(torch, dtype)


def test_tokens_are_written_once_and_read(tmp_path):
    tokens = [b"a", None, " \u3042".encode(), b"\xf0\x9f", b"\n"]

    class WithTokens(Model):
        @property
        def cache_tokens(self):
            return {"base": tokens, "other": None}

    predict(tmp_path, WithTokens(["base", "other"]))
    assert LogitCache(tmp_path / "base").tokens == tokens
    assert LogitCache(tmp_path / "other").tokens is None
    before = (tmp_path / "base" / "tokens.json").stat().st_mtime_ns
    predict(tmp_path, WithTokens(["base", "other"]))
    assert (tmp_path / "base" / "tokens.json").stat().st_mtime_ns == before
    (tmp_path / "base" / "tokens.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokens\.json to be whole"):
        _ = LogitCache(tmp_path / "base").tokens


def test_more_samples_than_a_complete_cache_has(cache, whole):
    """Fingerprints should differ; where they do not, the cache is not to be half of one and half of the other."""
    with pytest.raises(
        ValueError, match="which is complete, to hold all samples of these data, but it has no sample 2"
    ):
        predict(cache.parent, data=Data([*IDS, 2]))
    check_same(cache.parent, whole[1])


def test_no_samples(tmp_path):
    with pytest.raises(ValueError, match=r"to bring samples for the logit cache .* but got none"):
        predict(tmp_path, data=Data([]))


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_logits_that_are_not_finite(tmp_path, value, name):
    """Stop the run before anything of the batch is written, also for the source that is fine."""

    def spoil(prediction):
        logits = prediction["sources"]["other"]
        if 8 in prediction["sample_ids"]:
            row = prediction["sample_ids"].tolist().index(8)
            logits.top_k.log_normalizer[row, logits.mask[row].nonzero()[-1]] = value
        return prediction

    with pytest.raises(ValueError, match=f"logits of source 'other' to be finite, but got {name} in sample 8"):
        predict(tmp_path, Model(["base", "other"], change=spoil))
    assert [len(list((tmp_path / source / "parts").iterdir())) for source in VOCAB_SIZES] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: None, r"a dict of `sample_ids` and `sources`, but got NoneType\."),
        (lambda p: p["sources"], r"but got dict\['base'\]"),
        (lambda p: {**p, "sources": {}}, r"of the sources \['base'\], but got \[\]"),
        (lambda p: {**p, "sample_ids": torch.arange(3)}, r"but got \(2, \d, 4\) and \(2, \d\) for 3 samples"),
        (
            lambda p: {**p, "sources": {"base": source_logits("base", p["sample_ids"].tolist(), 5)}},
            r"padded to \(B, T, 4\) .* but got \(2, \d, 5\)",
        ),
        (
            lambda p: {**p, "sources": {"base": source_logits("other", p["sample_ids"].tolist())}},
            r"tokens of source 'base' to be in \[0, 50\), but got \d+",
        ),
    ],
)
def test_other_returns_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        predict(tmp_path, Model(change=change))
    assert not list(tmp_path.glob("base/parts/*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "Expected Model to have `cache_settings`, the settings of each source by its name, but got none"),
        ({}, "Expected Model to have `cache_settings`, the settings of each source by its name, but got none"),
        ({"a": {"top_k": 1}}, r"of source 'a' to have \['temperature', 'tokenizer_id', 'vocab_size'\]"),
        ({"a/b": settings_of("base")}, "names of folders, but got 'a/b'"),
        ({"a": settings_of("base", dtype="bfloat16")}, r"to be one of \['float32', 'float16'\]"),
        ({"a": settings_of("base", model=Path("x"))}, "plain JSON values as cache settings of 'a'"),
        ({"a": settings_of("base", limit=float("nan"))}, "plain JSON values as cache settings of 'a'"),
    ],
)
def test_other_cache_settings_are_refused(tmp_path, settings, message):
    model = Model()
    model.cache_settings = settings
    with pytest.raises(ValueError, match=message):
        predict(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_settings_of_a_method(tmp_path, whole):
    model = Model()
    names = model.cache_settings
    model.cache_settings = lambda: names
    model.predict_step = lambda batch, batch_idx: {
        "sample_ids": batch,
        "sources": {"base": source_logits("base", batch.tolist())},
    }
    predict(tmp_path, model)
    check_same(tmp_path, whole[1])


def test_shard_tokens_are_positive():
    with pytest.raises(ValueError, match="`shard_tokens` to be positive, but got 0"):
        LogitCacheWriter("x", shard_tokens=0)


# ---------------------------------------------------------------------- what is refused at reading


def test_what_is_a_cache(cache, tmp_path):
    assert is_logit_cache(cache)
    assert is_logit_cache(str(cache))
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path, tmp_path / "file", tmp_path / "absent", "org/model"):
        assert not is_logit_cache(path)
        with pytest.raises(ValueError, match=r"a folder of cached logits with a cache.json, but .* has none"):
            LogitCache(path)


def test_broken_shards(cache):
    """Are found at opening."""
    shard = cache / "shard-00001.safetensors"
    content, other = shard.read_bytes(), (cache / "shard-00002.safetensors").read_bytes()
    broken = [b"", content[:-1], content[:50], content + b"x", b"\xff" * len(content), other]
    for torn in broken:
        shard.write_bytes(torn)
        with pytest.raises(ValueError, match=r"shard-00001.* to be whole, but .* run the predict command again"):
            LogitCache(cache)
    with pytest.raises(ValueError, match="to be whole"):
        predict(cache.parent)
    shard.unlink()
    with pytest.raises(ValueError, match="but has no such file"):
        LogitCache(cache)


def test_shards_that_were_swapped(cache):
    description = json.loads((cache / "cache.json").read_text())
    first, second = (cache / f"shard-0000{index}.safetensors" for index in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    description["shards"][:2] = description["shards"][1::-1]
    (cache / "cache.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="to be whole, but its shards hold 9 samples"):
        LogitCache(cache)


def test_a_sample_that_is_not_there(cache):
    message = (
        f"Expected the cache {cache} to hold sample 2, but it was written for other data (data fingerprint 'abc'; 9"
        " samples). Run `predict` again for these data."
    )
    with pytest.raises(ValueError, match="other data") as error:
        LogitCache(cache).read(torch.tensor([3, 2, 999]))
    assert str(error.value) == message
    with pytest.raises(ValueError, match="to hold sample 999"):
        LogitCache(cache).read(torch.tensor([999]))


@pytest.mark.parametrize("top_k", [0, 5])
def test_columns_that_are_not_there(cache, top_k):
    with pytest.raises(ValueError, match=rf"`top_k` to be in \[1, 4\], as stored in .*, but got {top_k}"):
        LogitCache(cache).read(torch.tensor([3]), top_k=top_k)


# ---------------------------------------------------------------------- readers elsewhere


def test_copies_and_workers_read_the_same(cache):
    """Pickled, copied, and in workers that were forked after the shards were mapped."""
    reader = LogitCache(cache)
    ids = torch.tensor([33, 12, 1])
    expected = reader.read(ids)
    assert len(pickle.dumps(reader)) < 5000
    for other in (pickle.loads(pickle.dumps(reader)), copy.deepcopy(reader), copy.copy(reader)):
        torch.testing.assert_close(other.read(ids), expected, rtol=0, atol=0)
    workers = DataLoader(
        [ids] * 2, batch_size=None, num_workers=2, collate_fn=reader.read, multiprocessing_context="fork"
    )
    for read in workers:
        torch.testing.assert_close(SourceLogits(TopKLogits(*read[0]), *read[1:]), expected, rtol=0, atol=0)


def test_what_is_read_is_a_copy(cache):
    """Changing it in place changes no later read."""
    reader = LogitCache(cache)
    first = reader.read(torch.tensor([3]))
    expected = copy.deepcopy(first)
    for tensor in (*first.top_k, first.mask, first.ends):
        tensor.zero_()
    torch.testing.assert_close(reader.read(torch.tensor([3])), expected, rtol=0, atol=0)


# ---------------------------------------------------------------------- several processes


SCRIPT = """
import shutil, sys, torch
sys.path.insert(0, {tests!r})
from test_logit_cache import Data, Model, predict

if __name__ == "__main__":
    torch.set_num_threads(1)
    for index, (folder, devices, stop_at, share, fingerprint) in enumerate(eval(sys.argv[1])):
        settings = dict(devices=devices, strategy="ddp_fork" if devices == 2 else "auto", use_distributed_sampler=share)
        try:
            predict(folder, Model(["base", "other"], stop_at=stop_at), Data(fingerprint=fingerprint), **settings)
        except Exception as error:
            print(f"Run {{index}}:", error)
        shutil.copytree(folder, f"{{folder}}-{{index}}")
"""


@pytest.mark.slow
def test_two_processes(tmp_path, whole):
    """Samples are shared out, or made by both; processes come and go; the bytes are those of one."""
    script, out, both, fresh = (tmp_path / name for name in ("run.py", "out", "both", "fresh"))
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    runs = [
        (str(fresh), 2, None, True, "abc"),
        (str(out), 2, 25, True, "abc"),  # rank 0 has samples 17, 40 | 25, 12 | 5 and is killed
        (str(out), 2, None, True, "xyz"),
        (str(out), 1, 12, True, "abc"),
        (str(out), 2, None, True, "abc"),
        (str(out), 2, None, True, "abc"),  # no samples are left, and no rank waits for another
        (str(both), 2, None, False, "abc"),
    ]
    command = [sys.executable, "-W", "ignore", str(script), repr(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "killed" in done.stdout
    assert "Run 2: " in done.stdout
    assert "`data` was 'abc' there and is 'xyz' now" in done.stdout
    assert "Run 3: killed" in done.stdout
    assert all(f"Run {index}" not in done.stdout for index in (0, 4, 5, 6)), done.stdout
    for name in ("fresh-0", "out-4", "out-5", "both-6"):
        check_same(tmp_path / name, whole[2])
    assert {17, 40} <= set(logit_cache_writing.find_finished(tmp_path / "out-1" / "base"))
