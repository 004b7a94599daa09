"""Logit caches that are killed, resumed, extended, and written by two processes: the same bytes in the end."""

import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from logit_caches import (
    IDS,
    KILLS,
    VOCAB_SIZES,
    Data,
    Model,
    bytes_of,
    check_same,
    die_at,
    interrupts,  # noqa: F401  # a fixture
    predict,
    settings_of,
    source_logits,
    whole_runs,  # noqa: F401  # a fixture
)
from scripts import run_script

from lit_logits.storage import joining as logit_cache_joining
from lit_logits.storage import writing as logit_cache_writing
from lit_logits.storage.logit_cache import LogitCache

# ---------------------------------------------------------------------- kills


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


# ---------------------------------------------------------------------- several processes

SCRIPT = """
import shutil, sys, torch
sys.path.insert(0, {tests!r})
from logit_caches import Data, Model, predict

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
    out, both, fresh = (tmp_path / name for name in ("out", "both", "fresh"))
    runs = [
        (str(fresh), 2, None, True, "abc"),
        (str(out), 2, 25, True, "abc"),  # rank 0 has samples 17, 40 | 25, 12 | 5 and is killed
        (str(out), 2, None, True, "xyz"),
        (str(out), 1, 12, True, "abc"),
        (str(out), 2, None, True, "abc"),
        (str(out), 2, None, True, "abc"),  # no samples are left, and no rank waits for another
        (str(both), 2, None, False, "abc"),
    ]
    printed = run_script(tmp_path / "run.py", SCRIPT.format(tests=str(Path(__file__).parent)), repr(runs))
    assert "killed" in printed
    assert "Run 2: " in printed
    assert "`data` was 'abc' there and is 'xyz' now" in printed
    assert "Run 3: killed" in printed
    assert all(f"Run {index}" not in printed for index in (0, 4, 5, 6)), printed
    for name in ("fresh-0", "out-4", "out-5", "both-6"):
        check_same(tmp_path / name, whole[2])
    assert {17, 40} <= set(logit_cache_writing.find_finished(tmp_path / "out-1" / "base"))
