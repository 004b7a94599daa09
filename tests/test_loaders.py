"""Training resumes with the next unseen batch, whatever the checkpoint was saved by, and ranks share one order."""

import json
import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from scripts import run_script
from torch.utils.data import DataLoader

from lit_logits.datamodules import TextDataModule
from lit_logits.datamodules.loaders import BlockSampler


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four shards of random words, no two documents alike, and a cache folder."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(200)]
    for shard in range(4):
        documents = (" ".join(rng.choices(words, k=rng.randint(3, 12))) for _ in range(30))
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def make_data(corpus, **kwargs):
    defaults = {"bpe_vocab_size": 300, "block_size": 12, "batch_size": 16, "val_fraction": 0.1, "test_fraction": 0.1}
    return TextDataModule(str(corpus / "*.jsonl"), cache_dir=str(corpus / "cache"), **{**defaults, **kwargs})


class Recorder(LightningModule):
    """A bigram model that writes down the batches that it completed a step on."""

    def __init__(self, crash_at=None, read_length=False):
        super().__init__()
        self.embedding = torch.nn.Embedding(300, 4)
        self.head = torch.nn.Linear(4, 300)
        self.seen, self.steps, self.crash_at, self.read_length = [], 0, crash_at, read_length

    def training_step(self, batch, batch_idx):
        if self.steps == self.crash_at:
            raise KeyError("crash")
        self.steps += 1
        self.seen.append(batch["input_ids"].flatten().tolist())
        logits = self.head(self.embedding(batch["input_ids"][:, :-1]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        if self.read_length:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    """Saves a checkpoint in every hook that checkpoint callbacks use, and notes how many batches were seen by then."""

    def __init__(self, folder):
        self.folder, self.saved = folder, []

    def save(self, trainer, module, hook):
        path = self.folder / f"{len(self.saved)}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((path, len(module.seen), hook))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.save(trainer, pl_module, "on_train_batch_end")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.save(trainer, pl_module, "on_validation_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, pl_module, "on_train_epoch_end")

    def on_exception(self, trainer, pl_module, exception):
        self.save(trainer, pl_module, "on_exception")


def fit(data, module=None, ckpt_path=None, callbacks=(), **kwargs):
    module = module or Recorder()
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet = {"enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    trainer = Trainer(**{**defaults, **quiet, **kwargs}, callbacks=list(callbacks))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def check_resume(corpus, tmp_path, *, every=1, trainer=None, **data):
    """Interrupt a run at every hook; each resumed run must complete the uninterrupted one's list of batches."""
    trainer = trainer or {}
    saver = SaveEverywhere(tmp_path)
    whole = fit(make_data(corpus, **data), callbacks=[saver], **trainer).seen
    by_hook = {}
    for save in saver.saved:
        by_hook.setdefault(save[2], []).append(save)
    failures = []
    for path, seen, hook in (save for saves in by_hook.values() for save in saves[::every]):
        resumed = fit(make_data(corpus, **data), ckpt_path=path, **trainer).seen
        if resumed != whole[seen:]:
            where = [whole.index(batch) if batch in whole else None for batch in resumed]
            failures.append((hook, seen, where))
    assert not failures, f"of {len(whole)}: {failures}"
    return whole, by_hook


STREAM = {"streaming": True, "shuffle_buffer": 10, "val_blocks": 8}


@pytest.mark.parametrize(
    ("trainer", "data", "every"),
    [
        ({"max_epochs": 3}, {}, 5),
        ({"accumulate_grad_batches": 3}, {}, 5),
        ({"val_check_interval": 2}, {}, 5),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, {}, 5),
        ({"limit_train_batches": 3, "max_epochs": 3}, {}, 1),
        ({"max_steps": 11, "max_epochs": -1}, {}, 2),
        ({}, {"val_fraction": 0.0}, 5),
        ({"reload_dataloaders_every_n_epochs": 1}, {}, 5),
        ({"num_sanity_val_steps": 2, "max_epochs": 2}, {"num_workers": 2}, 9),
        ({"max_epochs": 3}, STREAM, 5),
        ({"val_check_interval": 2}, STREAM, 5),
        ({"limit_train_batches": 3, "max_epochs": 3}, STREAM, 1),
        ({"accumulate_grad_batches": 3, "max_steps": 9, "max_epochs": -1}, STREAM, 5),
        ({}, {**STREAM, "val_fraction": 0.0}, 5),
        ({"max_epochs": 2}, {**STREAM, "num_workers": 2}, 9),
    ],
)
def test_resumed_run_sees_what_the_uninterrupted_run_would_have_seen(corpus, tmp_path, trainer, data, every):
    whole, by_hook = check_resume(corpus, tmp_path, every=every, trainer=trainer, **data)
    assert len({tuple(batch) for batch in whole}) == len(whole) > 8  # the epochs differ, so a wrong one would show
    assert by_hook.keys() >= {"on_train_batch_end", "on_train_epoch_end"}


@pytest.mark.parametrize("data", [{}, STREAM], ids=["map", "stream"])
def test_training_is_extended_from_a_max_steps_that_cut_an_epoch_short(corpus, tmp_path, data):
    """Lightning counts the epoch that max_steps=5 stopped as complete; a sampler that follows it skips the rest."""
    limits = {"max_steps": 23, "max_epochs": -1}
    whole = fit(make_data(corpus, **data), **limits).seen
    saver = SaveEverywhere(tmp_path)
    fit(make_data(corpus, **data), callbacks=[saver], max_steps=5, max_epochs=-1)
    path, seen, hook = saver.saved[-1]
    assert (seen, hook) == (5, "on_train_epoch_end")
    assert fit(make_data(corpus, **data), ckpt_path=path, **limits).seen == whole[5:]


@pytest.mark.parametrize("crash_at", [0, 4, 8, 9])
@pytest.mark.parametrize("data", [{}, STREAM], ids=["map", "stream"])
def test_batch_whose_step_raised_is_given_again(corpus, tmp_path, data, crash_at):
    """It was fetched, as was the next one of a stream, but no step was taken on it; 8 is the last of an epoch."""
    whole = fit(make_data(corpus, **data), max_epochs=2).seen
    saver = SaveEverywhere(tmp_path)
    with pytest.raises(KeyError, match="crash"):
        fit(make_data(corpus, **data), Recorder(crash_at=crash_at), callbacks=[saver], max_epochs=2)
    path, seen, hook = saver.saved[-1]
    assert (seen, hook) == (crash_at, "on_exception")
    assert fit(make_data(corpus, **data), ckpt_path=path, max_epochs=2).seen == whole[seen:]


@pytest.mark.parametrize("data", [{}, STREAM], ids=["map", "stream"])
def test_position_survives_reading_the_number_of_steps_in_configure_optimizers(corpus, tmp_path, data):
    """`trainer.estimated_stepping_batches` builds the loader before Lightning restores its own copy of the state."""
    saver = SaveEverywhere(tmp_path)
    limits = {"max_steps": 20, "max_epochs": 3}
    whole = fit(make_data(corpus, **data), Recorder(read_length=True), callbacks=[saver], **limits).seen
    for path, seen, _ in (saver.saved[3], saver.saved[13]):
        assert fit(make_data(corpus, **data), Recorder(read_length=True), path, **limits).seen == whole[seen:]


def test_checkpoint_that_is_tested_does_not_move_the_next_fit(corpus, tmp_path):
    saver = SaveEverywhere(tmp_path)
    data = make_data(corpus)
    whole = fit(data, callbacks=[saver], max_epochs=1).seen
    again = make_data(corpus)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.validate(Recorder(), datamodule=again, ckpt_path=saver.saved[3][0], verbose=False)
    assert fit(again, max_epochs=1).seen == whole


def test_changed_batch_size_is_reported_on_resume(corpus, tmp_path):
    saver = SaveEverywhere(tmp_path)
    fit(make_data(corpus), callbacks=[saver], max_epochs=1)
    with pytest.warns(UserWarning, match=r"Expected the checkpoint's \['batch_size'\] to be unchanged"):
        fit(make_data(corpus, batch_size=8), ckpt_path=saver.saved[1][0], max_epochs=1)


def test_loader_resumes_in_a_plain_loop(corpus):
    data = make_data(corpus)
    data.prepare_data()
    data.setup()
    whole = [batch["input_ids"].tolist() for epoch in range(2) for batch in iterate(data, epoch)]
    loader = data.train_dataloader()
    iterator = iter(loader)
    head = [next(iterator)["input_ids"].tolist() for _ in range(3)]
    other = data.train_dataloader()
    other.load_state_dict(loader.state_dict())
    assert len(other) == len(loader) == len(whole) / 2
    assert head + [batch["input_ids"].tolist() for _ in range(2) for batch in other] == whole


def iterate(data, epoch):
    """The epoch's batches by a loader of torch's over indices that are written out here."""
    rows = data.train_dataloader().dataset
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42 * 1_000_003 + epoch)).tolist()
    for i in range(0, len(order) - 15, 16):
        yield {"input_ids": torch.stack([rows[j]["input_ids"] for j in order[i : i + 16]])}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("start", [0, 2])
def test_ranks_together_see_the_global_batches_of_one_process(world_size, start):
    """Rank batches of 5 against one process's of 5·W, over 101 items and two epochs."""
    for epoch in range(2):
        single = BlockSampler(range(101), seed=3, drop_last=True)
        single.set_epoch(epoch)
        single.start = start * 5 * world_size
        expected = list(DataLoader(range(101), batch_size=5 * world_size, sampler=single, drop_last=True))
        ranks = []
        for rank in range(world_size):
            sampler = BlockSampler(range(101), world_size, rank, seed=3, drop_last=True)
            sampler.set_epoch(epoch)
            sampler.start = start * 5
            ranks.append(DataLoader(range(101), batch_size=5, sampler=sampler, drop_last=True))
        steps = [torch.cat(batches).sort().values for batches in zip(*ranks, strict=True)]
        assert len(steps) == len(expected) == 101 // (5 * world_size) - start
        for step, batch in zip(steps, expected, strict=True):
            assert torch.equal(step, batch.sort().values)


def test_permutations_differ_between_epochs_and_seeds():
    def order(seed, epoch):
        sampler = BlockSampler(range(50), seed=seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9  # seed + epoch, torch's rule, gives 5
    assert all(sorted(indices) == list(range(50)) for indices in orders.values())


def test_trainer_predicts_on_every_test_block(corpus):
    data = make_data(corpus, batch_size=3)
    module = Recorder()
    module.predict_step = lambda batch, batch_idx: batch["input_ids"]
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    blocks = torch.cat(trainer.predict(module, datamodule=data))
    assert len(blocks) % 3
    assert torch.equal(blocks, torch.cat([batch["input_ids"] for batch in data.test_dataloader()]))


def test_a_sampler_gives_every_block_once_on_any_number_of_ranks():
    for world_size in (1, 2, 3, 8):
        samplers = [BlockSampler(range(5), world_size, rank, shuffle=False) for rank in range(world_size)]
        ranks = [list(sampler) for sampler in samplers]
        assert sorted(index for rank in ranks for index in rank) == list(range(5))
        assert [len(rank) for rank in ranks] == [len(sampler) for sampler in samplers]
    assert list(BlockSampler(range(5), shuffle=False)) == list(range(5))


TWO_RANKS = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_loaders import Recorder, SaveEverywhere, fit, make_data

if __name__ == "__main__":
    folder, corpus, data = Path({folder!r}), Path({corpus!r}), {data!r}
    ddp = dict(devices=2, strategy="ddp_fork", max_epochs=2)

    class Dump(SaveEverywhere):
        def on_fit_end(self, trainer, module):
            saved = [(str(path), seen) for path, seen, _ in self.saved]
            (folder / (self.folder.name + str(trainer.global_rank))).write_text(json.dumps([module.seen, saved]))

        def on_validation_end(self, *_):
            pass

    for name in ("whole", "resumed"):
        (folder / name).mkdir()
    fit(make_data(corpus, **data), callbacks=[Dump(folder / "whole")], **ddp)
    path, seen = json.loads((folder / "whole0").read_text())[1][{index}]
    fit(make_data(corpus, **data), ckpt_path=path, callbacks=[Dump(folder / "resumed")], **ddp)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "index"),
    [({"batch_size": 8}, 6), ({**STREAM, "batch_size": 8}, 6), ({**STREAM, "batch_size": 8, "shards": 3}, 6)],
    ids=["map", "stream", "stream-by-examples"],
)
def test_two_processes(corpus, tmp_path, data, index):
    """Two gloo ranks see disjoint blocks, a map-style pair one process's batches, and both ranks resume exactly."""
    data = dict(data)
    if shards := data.pop("shards", None):  # 3 shards do not divide by 2 ranks: each takes every other block
        folder = tmp_path / "corpus"
        folder.mkdir()
        for file in sorted(corpus.glob("*.jsonl"))[:shards]:
            (folder / file.name).write_text(file.read_text())
        corpus = folder
    make_data(corpus, **data).prepare_data()
    folders = {"tests": str(Path(__file__).parent), "folder": str(tmp_path), "corpus": str(corpus)}
    run_script(tmp_path / "run.py", TWO_RANKS.format(**folders, data=data, index=index))
    ranks = [json.loads((tmp_path / f"whole{rank}").read_text()) for rank in (0, 1)]
    assert len(ranks[0][0]) == len(ranks[1][0]) > 6
    assert not {tuple(batch) for batch in ranks[0][0]} & {tuple(batch) for batch in ranks[1][0]}
    seen = ranks[0][1][index][1]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"resumed{rank}").read_text())[0] == ranks[rank][0][seen:]
    if not data.get("streaming"):
        single = fit(make_data(corpus, **{**data, "batch_size": 16}), max_epochs=2).seen
        for step, batch in enumerate(single):
            together = ranks[0][0][step] + ranks[1][0][step]
            assert rows_of(together) == rows_of(batch)


def rows_of(tokens):
    return sorted(tokens[i : i + 12] for i in range(0, len(tokens), 12))
