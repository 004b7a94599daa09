"""Training batches of examples of like lengths, and fewer training rows."""

import json

import pytest
import torch
from instruction_pairs import QUIET, Recorder
from lightning.pytorch import Trainer

from lit_logits.datamodules import InstructionDataModule
from lit_logits.datamodules.loaders import LengthSampler
from lit_logits.datamodules.tokenization import train_bpe


def epoch_of(size, batch_size, rank=0, world_size=1, epoch=0, seed=0):
    lengths = torch.randint(1, 100, (size,), generator=torch.Generator().manual_seed(1))
    sampler = LengthSampler(range(size), lengths, batch_size, world_size, rank, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler), lengths


@pytest.mark.parametrize("size", [64, 67, 601, 5])
def test_every_item_once_and_the_incomplete_batch_last(size):
    order, lengths = epoch_of(size, 4)
    assert sorted(order) == list(range(size))
    spread = [
        int(lengths[order[at : at + 4]].max() - lengths[order[at : at + 4]].min()) for at in range(0, size - 3, 4)
    ]
    assert sum(spread) / len(spread) < 25  # of numbers below 100, four at random have 60
    assert epoch_of(size, 4)[0] == order
    assert size < 10 or epoch_of(size, 4, epoch=1)[0] != order != epoch_of(size, 4, seed=1)[0]


def test_lengths_do_not_follow_each_other():
    """Batches are shuffled: the first quarter is no shorter than the rest."""
    order, lengths = epoch_of(1000, 4)
    assert abs(float(lengths[order[:250]].float().mean() - lengths.float().mean())) < 12


def test_ranks_see_what_one_process_sees():
    whole, _ = epoch_of(203, 6)
    dealt = [epoch_of(203, 2, rank, 3)[0] for rank in range(3)]
    for step in range(203 // 6):
        assert sorted(whole[6 * step : 6 * step + 6]) == sorted(
            item for order in dealt for item in order[2 * step : 2 * step + 2]
        )


@pytest.fixture
def make(tmp_path):
    rows = [{"prompt": f"Say a {i}", "response": "a " * (1 + i * i % 41)} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bpe").mkdir()
    train_bpe(["Say a"], 257, tmp_path / "bpe")

    def build(**kwargs):
        options = {"tokenizer": str(tmp_path / "bpe"), "batch_size": 4, "val_fraction": 0.1, "test_fraction": 0.1}
        return InstructionDataModule(
            str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"), **{**options, **kwargs}
        )

    return build


def padding(data):
    data.prepare_data()
    data.setup()
    masks = [batch["attention_mask"] for batch in data.train_dataloader()]
    return sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks)


def test_batches_are_padded_less_and_hold_the_same(make):
    plain, grouped = make(), make(group_by_length=True)
    assert padding(grouped) < 1.1 < 1.3 < padding(plain)
    rows = [
        sorted(row for batch in data.train_dataloader() for row in batch["rows"].tolist()) for data in (plain, grouped)
    ]
    assert rows[0] == rows[1] == list(range(48))
    for ours, theirs in zip(grouped.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(ours["rows"], theirs["rows"])


@pytest.mark.parametrize("save_at", [5, 12, 15])
def test_a_resumed_run_sees_what_the_uninterrupted_run_would_have_seen(make, tmp_path, save_at):
    def fit(module, ckpt_path=None, **kwargs):
        trainer = Trainer(**QUIET, max_epochs=2, enable_checkpointing=False, limit_val_batches=0)
        trainer.fit(module, datamodule=make(**{"group_by_length": True, **kwargs}), ckpt_path=ckpt_path)
        return module.seen

    whole = fit(Recorder(save_at, tmp_path / "x.ckpt"))
    assert len(whole) == 24
    assert fit(Recorder(), tmp_path / "x.ckpt") == whole[save_at:]
    if save_at == 5:
        with pytest.warns(UserWarning, match="group_by_length"):
            fit(Recorder(), save_plain(make, tmp_path))


def save_plain(make, tmp_path):
    """A checkpoint of a run without groups."""
    trainer = Trainer(**QUIET, max_steps=3, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(Recorder(2, tmp_path / "plain.ckpt"), datamodule=make())
    return tmp_path / "plain.ckpt"


def test_fewer_training_rows(make):
    """The first of them; what is held out stays, and so does the entry of the cache where nothing is left out."""
    few, whole = make(max_train_rows=10), make()
    for data in (few, whole):
        data.prepare_data()
        data.setup()
    assert few.sample_ids("train") == whole.sample_ids("train")[:10]
    for stage in ("val", "test"):
        assert few.sample_ids(stage) == whole.sample_ids(stage)
    assert few.fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match="`max_train_rows` to be at least 1, but got 0"):
        make(max_train_rows=0)


def test_ids_and_texts_of_samples(make):
    data = make(predict_split="all")
    data.prepare_data()
    data.setup()
    splits = {stage: data.sample_ids(stage) for stage in ("train", "val", "test")}
    assert data.sample_ids("predict") == [number for ids in splits.values() for number in ids]
    assert make().sample_ids("train") == []  # before `setup`
    texts = {number: (prompt, response) for number, prompt, response in data.sample_texts()}
    for batch in data.predict_dataloader():
        for number, ids in zip(batch["sample_ids"].tolist(), batch["input_ids"], strict=True):
            prompt, response = texts[number]
            assert f"{prompt}\nAnswer: {response}" in data.tokenizer.decode(ids)
    assert set(texts) == set(data.sample_ids("predict"))
