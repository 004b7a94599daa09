"""Prepared pairs that are read again, runs that resume, and predictions that leave finished rows out."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from instruction_pairs import (
    CHAT,
    PAIRS,
    QUIET,
    Recorder,
    as_rows,
    make_data,  # noqa: F401  # a fixture
    pairs_folder,  # noqa: F401  # a fixture
    prompts_of,
    ready,
    write_jsonl,
)
from lightning.pytorch import Trainer
from scripts import run_script

from lit_logits.datamodules.tokenization import load_tokenizer

# --- the cache ---


def test_two_constructions_agree(make, tmp_path):
    first = ready(make(num_shots=1, tokenizer=None, bpe_vocab_size=290))
    again = ready(make(num_shots=1, tokenizer=None, bpe_vocab_size=290, cache_dir=str(tmp_path / "other")))
    assert again.fingerprint == first.fingerprint
    for one, other in zip(first.train_dataloader(), again.train_dataloader(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_same_setting_reads_the_cache(make, monkeypatch):
    first = ready(make())
    monkeypatch.setattr("lit_logits.datamodules.instructions.sources.read_rows", lambda *_: pytest.fail("read again"))
    again = ready(make(batch_size=2, num_workers=1))
    assert prompts_of(again.test_dataloader(), again.tokenizer) == prompts_of(first.test_dataloader(), first.tokenizer)
    with pytest.raises(RuntimeError, match="Expected `prepare_data` to have written"):
        make(seed=1).setup()


def test_examples_are_read_by_other_versions_of_datasets(make):
    """An older one refuses an Arrow file whose metadata name types that came after it."""
    file = ready(make())._directory / "train.arrow"
    with pa.memory_map(str(file)) as source:
        assert not pa.ipc.open_stream(source).schema.metadata


CHANGES = {
    "template": "Q: {prompt} A: {response}",
    "template to chat": "chat",
    "num_shots": 1,
    "max_length": 40,
    "max_test_rows": 3,
    "val_fraction": 0.2,
    "seed": 1,
    "prompt_column": "response",
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_setting_never_meets_a_stale_cache(folder, make, name):
    change = {name.split()[0]: CHANGES[name]}
    if name == "prompt_column":
        change = {"source": {"path": str(folder / "pairs.jsonl"), **change}}
    assert make(**change).fingerprint != make().fingerprint


def test_changed_file_or_chat_template_never_meets_a_stale_cache(folder, make, tmp_path):
    before = make(source=write_jsonl(tmp_path / "x.jsonl", as_rows(PAIRS))).fingerprint
    assert make(source=write_jsonl(tmp_path / "x.jsonl", as_rows(PAIRS[::-1]))).fingerprint != before
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = CHAT.replace("end", "END")
    tokenizer.save_pretrained(tmp_path / "other")
    chats = [make(tokenizer=str(path), template="chat") for path in (folder / "bpe", tmp_path / "other")]
    assert chats[0].fingerprint != chats[1].fingerprint


# --- runs ---


@pytest.mark.parametrize("save_at", [3, 20, 27])
def test_resumed_run_sees_what_the_uninterrupted_run_would_have_seen(make, tmp_path, save_at):
    def fit(module, ckpt_path=None):
        trainer = Trainer(**QUIET, max_epochs=2, enable_checkpointing=False, num_sanity_val_steps=0)
        trainer.fit(module, datamodule=make(), ckpt_path=ckpt_path)
        return module.seen

    whole = fit(Recorder(save_at, tmp_path / "x.ckpt"))
    assert len(whole) == 40
    for epoch in (whole[:20], whole[20:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(80))
    assert fit(Recorder(), tmp_path / "x.ckpt") == whole[save_at:]


def test_predict_leaves_finished_rows_out(make):
    """Under Lightning, which once refused a loader whose batch size was no keyword."""
    data = make(batch_size=3)

    def predict():
        trainer = Trainer(**QUIET)
        return [row for rows in trainer.predict(Recorder(), datamodule=data) or [] for row in rows.tolist()]

    assert predict() == list(range(10))
    data.finished_rows |= {0, 3, 4, 9}
    assert predict() == [1, 2, 5, 6, 7, 8]
    data.finished_rows |= set(range(10))
    assert predict() == []
    assert len(data.test_dataloader()) == 4


def test_fewer_rows_than_processes_are_filled_up(make):
    """Lightning's sampler fails without a row for each rank; a prediction writer drops what it has."""
    data = make(batch_size=3)
    data.prepare_data()
    data.setup()
    data.finished_rows |= set(range(9))
    data.trainer = SimpleNamespace(world_size=3)
    assert [row for batch in data.predict_dataloader() for row in batch["rows"].tolist()] == [9, 0, 1]
    data.finished_rows |= {9}
    assert list(data.predict_dataloader()) == []


@pytest.mark.slow
def test_two_processes_predict_each_row_once(folder, tmp_path):
    """Seven rows are left of ten: two ranks take four and three of them, and neither repeats one to fill up."""
    text = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from instruction_pairs import QUIET, Recorder
from lightning.pytorch import Trainer
from lit_logits.datamodules import InstructionDataModule

class Writer(Recorder):
    def predict_step(self, batch, batch_idx):
        with open({str(tmp_path)!r} + f"/rank{{self.global_rank}}", "a") as file:
            file.write("".join(f"{{row}} " for row in batch["rows"].tolist()))

if __name__ == "__main__":
    data = InstructionDataModule({str(folder / "pairs.jsonl")!r}, tokenizer={str(folder / "bpe")!r}, batch_size=2,
                                 val_fraction=0.1, test_fraction=0.1, cache_dir={str(tmp_path / "cache")!r})
    data.finished_rows |= {{0, 5, 9}}
    Trainer(**QUIET, devices=2, strategy="ddp_fork").predict(Writer(), datamodule=data, return_predictions=False)
"""
    run_script(tmp_path / "run.py", text)
    ranks = [[int(row) for row in (tmp_path / f"rank{rank}").read_text().split()] for rank in (0, 1)]
    assert sorted(map(len, ranks)) == [3, 4]
    assert sorted(ranks[0] + ranks[1]) == [1, 2, 3, 4, 6, 7, 8]
