"""Predictions as lines of JSON, in the real Trainer: runs that are killed, resumed and mixed up."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from scripts import run_script
from torch.utils.data import DataLoader

from lit_logits.callbacks import JsonLinesWriter

TEXTS = ["grüße", "日本語", "zwei\nZeilen", 'ein "Zitat"', "ein\u2028Trenner", "🙂", "\udc80"]


class Teller(LightningModule):
    """Answers with a text that tells the row. Stops before the batch that holds row `stop_at`."""

    def __init__(self, solver="grid", steps=3, stop_at=None, answer=None):
        super().__init__()
        self.save_hyperparameters(ignore=["stop_at", "answer"])
        self.stop_at, self.answer, self.asked = stop_at, answer, []

    def predict_step(self, batch, batch_idx):
        rows = batch.tolist()
        if self.stop_at in rows:
            raise RuntimeError("killed")
        self.asked += rows
        if self.answer is not None:
            return self.answer(rows)
        return [{"row": row, "text": f"{TEXTS[row % len(TEXTS)]} {row}", "score": row / 4} for row in rows]


class Data(LightningDataModule):
    def __init__(self, count=7, fingerprint="abc", resumable=True, batch_size=2):
        super().__init__()
        self.count, self.fingerprint, self.batch_size = count, fingerprint, batch_size
        if resumable:
            self.finished_rows = set()

    def predict_dataloader(self):
        """Every rank gets a row, if any does: Lightning's sampler insists. Finished ones fill up."""
        finished = getattr(self, "finished_rows", set())
        rows = [row for row in range(self.count) if row not in finished]
        missing = self.trainer.world_size - len(rows) if rows else 0
        return DataLoader(rows + sorted(finished)[: max(0, missing)], batch_size=self.batch_size)


def predict(folder, model=None, data=None, ckpt_path=None, **kwargs):
    model = model or Teller()
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(**{**settings, **kwargs}, callbacks=[JsonLinesWriter(None if folder is None else str(folder))])
    trainer.predict(model, datamodule=data or Data(), return_predictions=False, ckpt_path=ckpt_path)
    return model


def killed(folder, stop_at, **kwargs):
    model = Teller(stop_at=stop_at)
    with pytest.raises(RuntimeError, match="killed"):
        predict(folder, model, **kwargs)
    return model


def lines(file):
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def check_complete(folder, count=7):
    """Each row once, in order, as told; the parts have none twice either."""
    expected = [{"row": row, "text": f"{TEXTS[row % len(TEXTS)]} {row}", "score": row / 4} for row in range(count)]
    assert lines(folder / "predictions.jsonl") == expected
    parts = [example["row"] for part in folder.glob("part-*.jsonl") for example in lines(part)]
    assert max(Counter(parts).values()) == 1
    assert not list(folder.glob("*.partial"))


def test_one_run(tmp_path, caplog):
    """Unicode stands as it is; a half surrogate pair, which UTF-8 has not, stands as its escape."""
    with caplog.at_level(logging.INFO):
        predict(tmp_path / "out")
    check_complete(tmp_path / "out")
    raw = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert "日本語 1".encode() in raw
    assert rb'"\udc80 6"' in raw
    assert f"{tmp_path}/out/predictions.jsonl, 7 rows, of which 0 were there before" in caplog.text


def test_the_default_folder_is_in_the_run_folder(tmp_path):
    predict(None, default_root_dir=tmp_path)
    check_complete(tmp_path / "predictions")


@pytest.mark.parametrize("resumable", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("stop_at", [0, 3, 6])
def test_a_killed_run_goes_on(tmp_path, stop_at, resumable, caplog):
    """The data module learns what is there before its loader is asked for; one that cannot, makes no row double."""
    first = killed(tmp_path, stop_at)
    assert first.asked == list(range(stop_at - stop_at % 2))
    assert not (tmp_path / "predictions.jsonl").exists()
    with caplog.at_level(logging.INFO):
        if resumable or not first.asked:
            second = predict(tmp_path, data=Data(resumable=resumable))
        else:
            with pytest.warns(UserWarning, match=f"already has {len(first.asked)} rows"):
                second = predict(tmp_path, data=Data(resumable=resumable))
    assert second.asked == [row for row in range(7) if not resumable or row not in first.asked]
    check_complete(tmp_path)
    assert f"7 rows, of which {len(first.asked)} were there before" in caplog.text


def test_every_byte_at_which_a_kill_can_come(tmp_path):
    """Whatever the part file was cut to: whole lines stay, the torn one is made again."""
    predict(tmp_path / "whole")
    whole = (tmp_path / "whole" / "part-0.jsonl").read_bytes()
    settings = (tmp_path / "whole" / "settings.json").read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for size in sorted({0, len(whole), *ends, *(end - 1 for end in ends), *range(3, len(whole), 37)}):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "settings.json").write_bytes(settings)
        (folder / "part-0.jsonl").write_bytes(whole[:size])
        done = sum(end <= size for end in ends)
        assert predict(folder).asked == list(range(done, 7)), size
        check_complete(folder)


def test_a_last_line_of_garbage(tmp_path):
    """As a lost write leaves it on some file systems; it ends as a line does."""
    killed(tmp_path, 4)
    with (tmp_path / "part-0.jsonl").open("ab") as part:
        part.write(b'{"row": 4, "te\0\0\0\0\n')
    assert predict(tmp_path).asked == [4, 5, 6]
    check_complete(tmp_path)


def test_parts_of_more_ranks_than_there_are_now(tmp_path):
    """Rows of ranks 0 to 3 count, one twice, rank 3's torn; only the part of this rank is mended."""
    predict(tmp_path)
    rows = (tmp_path / "part-0.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").unlink()
    contents = {0: rows[5] + rows[2][:9], 1: rows[0], 2: b"", 3: rows[0] + rows[3] + rows[1][:-1]}
    for rank, content in contents.items():
        (tmp_path / f"part-{rank}.jsonl").write_bytes(content)
    assert predict(tmp_path).asked == [1, 2, 4, 6]
    assert [example["row"] for example in lines(tmp_path / "predictions.jsonl")] == list(range(7))
    assert (tmp_path / "part-0.jsonl").read_bytes() == rows[5] + b"".join(rows[at] for at in (1, 2, 4, 6))
    assert (tmp_path / "part-3.jsonl").read_bytes() == contents[3]


def test_a_finished_run_makes_nothing_anew(tmp_path):
    """Nor does one that was killed between its last row and the join: Lightning starts no loop without batches."""
    predict(tmp_path)
    joined, part = ((tmp_path / name).read_bytes() for name in ("predictions.jsonl", "part-0.jsonl"))
    for _ in range(2):
        assert predict(tmp_path).asked == []
        assert (tmp_path / "predictions.jsonl").read_bytes() == joined
        assert (tmp_path / "part-0.jsonl").read_bytes() == part
        (tmp_path / "predictions.jsonl").unlink()


def test_a_join_that_is_killed_leaves_the_old_file(tmp_path, monkeypatch):
    predict(tmp_path, limit_predict_batches=2)
    assert [example["row"] for example in lines(tmp_path / "predictions.jsonl")] == [0, 1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr("lit_logits.storage.folders.os.replace", lambda *_: 1 / 0)
        patch.setattr("lit_logits.callbacks.json_lines_writer._add_settings", lambda *_: None)
        with pytest.raises(ZeroDivisionError):
            predict(tmp_path)
    assert [example["row"] for example in lines(tmp_path / "predictions.jsonl")] == [0, 1, 2, 3]
    assert predict(tmp_path).asked == []
    check_complete(tmp_path)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"solver": "tilting"}, {}, "but `model.solver` was 'grid' there and is 'tilting' now. Pass another `folder`"),
        ({"solver": "tilting", "steps": 4}, {}, "is 'tilting' now, `model.steps` was 3 there and is 4 now"),
        ({"solver": {"name": "grid"}}, {}, "`model.solver` was 'grid' there and is absent now, `model.solver.name`"),
        ({}, {"fingerprint": "xyz"}, "`data` was 'abc' there and is 'xyz' now"),
    ],
)
def test_other_settings_are_refused(tmp_path, model, data, message):
    """And what is there stays."""
    killed(tmp_path, 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        predict(tmp_path, Teller(**model), Data(**data))
    assert str(error.value).startswith(f"Expected {tmp_path} to hold predictions of this run")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_settings_that_json_does_not_take(tmp_path):
    """Are compared as texts, without the addresses and orders that differ between processes."""

    class Odd(Teller):
        @property
        def prediction_settings(self):
            odd = {"call": lambda: 0, "set": {"b", "a"}, "nan": float("nan"), "pair": (1, 2), 3: torch.float32}
            return {"odd": odd, "object": object()}

    for _ in range(2):
        predict(tmp_path, Odd())
    text = (tmp_path / "settings.json").read_text()
    assert " at 0x" not in text
    odd = json.loads(text, parse_constant=lambda name: 1 / 0)["model"]["odd"]
    assert (odd["set"], odd["nan"], odd["pair"], odd["3"]) == (["a", "b"], "NaN", [1, 2], "torch.float32")


def test_a_model_can_name_the_settings_that_count(tmp_path):
    class Named(Teller):
        @property
        def prediction_settings(self):
            return {"solver": self.hparams.solver}  # type: ignore[attr-defined]

    predict(tmp_path, Named(steps=3), Data(4))
    assert predict(tmp_path, Named(steps=4)).asked == [4, 5, 6]
    with pytest.raises(ValueError, match=r"`model.solver` was 'grid'"):
        predict(tmp_path, Named(solver="tilting"))


@pytest.mark.parametrize("stop_at", [4, None], ids=["rows are left", "no rows are left"])
def test_another_checkpoint_is_refused(tmp_path, stop_at):
    """Also where every row is there, or the command would pass off the answers of the old one as those of the new."""
    out = tmp_path / "out"
    for name in ("a", "b"):
        trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(Teller())
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    if stop_at is None:
        predict(out, ckpt_path=tmp_path / "a.ckpt")
    else:
        killed(out, stop_at, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"`checkpoint` was '.*a.ckpt of .*' there and is '.*b.ckpt of .*' now"):
        predict(out, ckpt_path=tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"`checkpoint` was '.*a.ckpt of .*' there and is None now"):
        predict(out)
    predict(out, ckpt_path=tmp_path / "a.ckpt")
    check_complete(out)


@pytest.mark.parametrize("name", ["part-0.jsonl", "predictions.jsonl"])
def test_files_of_others_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("not ours")
    with pytest.raises(ValueError, match=f"has {name} and no settings.json"):
        predict(tmp_path)
    assert (tmp_path / name).read_text() == "not ours"


# ---------------------------------------------------------------------- what predict_step returns


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rows: None, "to return a list of dicts, but got NoneType"),
        (lambda rows: {"row": 0}, "to return a list of dicts, but got dict"),
        (lambda rows: [{"text": "a"}], "an int, as `row`, but got {'text': 'a'}"),
        (lambda rows: [{"row": "1"}], "an int, as `row`, but got {'row': '1'}"),
        (lambda rows: [{"row": True}], "an int, as `row`"),
        (lambda rows: ["a"], "an int, as `row`, but got 'a'"),
        (lambda rows: [{"row": 1, "x": torch.ones(1)}], "plain JSON values, but in row 1: .*Tensor"),
        (lambda rows: [{"row": 1, "x": float("nan")}], "plain JSON values, but in row 1: .*not JSON compliant"),
    ],
)
def test_other_returns_are_refused(tmp_path, answer, message):
    with pytest.raises(ValueError, match=message):
        predict(tmp_path, Teller(answer=answer))
    assert not list(tmp_path.glob("part-*"))


def test_an_empty_list_and_a_row_twice(tmp_path):
    predict(tmp_path, Teller(answer=lambda rows: [] if 0 in rows else [{"row": rows[0]}, {"row": rows[0]}, {"row": 2}]))
    assert lines(tmp_path / "part-0.jsonl") == lines(tmp_path / "predictions.jsonl") == [{"row": r} for r in (2, 4, 6)]


def test_several_loaders_are_refused(tmp_path):
    class Two(Data):
        def predict_dataloader(self):
            return [super().predict_dataloader()] * 2

    class Model(Teller):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return super().predict_step(batch, batch_idx)

    with pytest.raises(ValueError, match="Expected one data loader to predict from"):
        predict(tmp_path, Model(), Two())


# ---------------------------------------------------------------------- several processes


SCRIPT = """
import shutil, sys, torch
sys.path.insert(0, {tests!r})
from test_json_lines_writer import Data, Teller, predict

if __name__ == "__main__":
    torch.set_num_threads(1)
    for index, (folder, devices, count, stop_at, share, fingerprint) in enumerate(eval(sys.argv[1])):
        strategy = "ddp_fork" if devices == 2 else "auto"
        settings = dict(devices=devices, strategy=strategy, use_distributed_sampler=share)
        try:
            predict(folder, Teller(stop_at=stop_at), Data(count, fingerprint), **settings)
        except Exception as error:
            print(f"Run {{index}}:", error)
        shutil.copytree(folder, f"{{folder}}-{{index}}")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Rows are shared out unevenly, left over singly, and made by both; processes come and go; no row is lost."""
    out, both = (tmp_path / name for name in ("out", "both"))
    runs = [
        (str(out), 2, 7, 4, True, "abc"),  # rank 0 has rows 0, 2 | 4, 6 and is killed
        (str(out), 2, 7, None, True, "xyz"),
        (str(out), 2, 7, None, True, "abc"),
        (str(out), 2, 7, None, True, "abc"),  # no rows are left, and no rank waits for another
        (str(out), 2, 8, None, True, "abc"),  # one is left for two ranks
        (str(out), 1, 9, None, True, "abc"),
        (str(both), 2, 5, None, False, "abc"),
    ]
    printed = run_script(tmp_path / "run.py", SCRIPT.format(tests=str(Path(__file__).parent)), repr(runs))
    assert "Run 0" in printed
    assert "killed" in printed
    assert "`data` was 'abc' there and is 'xyz' now" in printed
    assert "Run 2" not in printed, printed
    stage = {at: {part.name: lines(part) for part in tmp_path.glob(f"*-{at}/part-*")} for at in range(len(runs))}
    before = [example["row"] for part in stage[0].values() for example in part]
    assert {0, 2} <= set(before) <= {0, 1, 2, 3, 5}
    assert stage[1] == stage[0]
    assert stage[3] == stage[2]
    assert set(stage[2]) == {"part-0.jsonl", "part-1.jsonl"}
    for at, count in ((2, 7), (3, 7), (4, 8), (5, 9)):
        check_complete(tmp_path / f"out-{at}", count)
    for name in ("part-0.jsonl", "part-1.jsonl", "predictions.jsonl"):
        assert [example["row"] for example in lines(both / name)] == list(range(5))
