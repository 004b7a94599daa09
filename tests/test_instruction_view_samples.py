"""Samples in several tokenizers: their ids, what is cut or dropped for all, and predictions of every split."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from instruction_pairs import QUIET, ready
from instruction_views import (
    BATCH,
    PAIRS,
    batches,
    make_views,  # noqa: F401  # a fixture
    save,
    sequences,
    single,
    views_folder,  # noqa: F401  # a fixture
    write_jsonl,
)
from lightning.pytorch import LightningModule, Trainer
from scripts import run_script
from tokenizers import Tokenizer, models

from lit_logits.datamodules.instructions.storage import InstructionSize
from lit_logits.datamodules.prepared import read_sizes
from lit_logits.datamodules.tokenization import load_tokenizer, tokenizer_id, train_bpe

# --- sample ids and vocabularies ---


def ids_of(data):
    """Sample id → texts, of all splits."""
    found = {}
    data = ready(data)
    for name, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        for batch in loader:
            for row, number in zip(batch["rows"].tolist(), batch["sample_ids"].tolist(), strict=True):
                found[number] = data.pairs.splits[name][row][:2]
    assert data.batch_size == 1  # else a last batch of training is left out
    for batch in data.train_dataloader():
        found[batch["sample_ids"].item()] = data.pairs.splits["train"][batch["rows"].item()][:2]
    return found


def test_sample_ids_are_of_the_content(make, folder):
    first = ids_of(make(batch_size=1))
    assert set(first.values()) == set(PAIRS)
    assert len(first) == 60
    assert all(0 <= number < 2**63 for number in first)
    text = repr((None, [], *PAIRS[3])).encode()
    assert first[int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1] == PAIRS[3]
    others = [{"seed": 1, "test_fraction": 0.4}, {"tokenizer": str(folder / "bpe400"), "template": "chat"}]
    for other in (*others, {"template": "{prompt} {response}", "sources": ["words"], "max_length": 60}):
        assert ids_of(make(batch_size=1, **other)) == first
    changed = [{"num_shots": 1}, {"num_shots": 2}, {"num_shots": 1, "seed": 2}]
    seen = set(first)
    for other in (*changed, {"template": "chat", "system_prompt": "s"}):
        new = ids_of(make(batch_size=1, **other))
        assert len(new) == 60
        assert not seen & set(new)
        seen |= set(new)


def test_tokenizer_ids_tell_vocabularies_apart(make, folder):
    """The formula is shared with the models' side, which may not import this one."""
    [batch, *_] = batches(make(["bpe300", "bpe400", "words"]))
    found = {name: view["tokenizer_id"].item() for name, view in batch["sources"].items()}
    assert batch["tokenizer_id"] == found["bpe300"]
    assert len(set(found.values())) == 3
    assert batch["tokenizer_id"].dtype == torch.long
    for name, number in found.items():
        tokenizer = load_tokenizer(folder / name)
        tokens = {i: token for token, i in tokenizer.get_vocab().items()}
        text = "\n".join(f"{i} {tokens[i]}" for i in range(len(tokens)))
        assert number == tokenizer_id(tokenizer) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2


# --- storage ---


def test_responses_are_cut_in_each_tokenizer(make):
    whole = batches(make(["bpe400"], batch_size=100, predict_split="all"))[0]
    cut = batches(make(["bpe400"], batch_size=100, max_length=18, predict_split="all"))[0]
    shorter = []
    for one, other in ((cut, whole), (cut["sources"]["bpe400"], whole["sources"]["bpe400"])):
        lengths = other["attention_mask"].sum(1).clamp(max=18)
        assert torch.equal(one["attention_mask"].sum(1), lengths)
        assert one["input_ids"].shape[1] == 18
        for row, length in enumerate(lengths):
            for name in ("input_ids", "labels", "response_ends"):
                assert torch.equal(one[name][row, :length], other[name][row, :length])
        shorter.append(int((other["attention_mask"].sum(1) > 18).sum()))
    assert shorter[0] > shorter[1] > 0


def test_pair_is_dropped_for_all_if_it_is_too_long_for_one(make, tmp_path):
    """A byte a token is much for the first tokenizer; the words of the other are few."""
    (tmp_path / "bytes").mkdir()
    train_bpe(["x"], 257, tmp_path / "bytes")
    pairs = [("Say number 1", "Hello world"), ("Say number 1 " * 3, "Hello"), ("Say", "number")]
    source = write_jsonl(tmp_path / "long.jsonl", pairs)
    options = {
        "source": source,
        "template": "{prompt}{response}",
        "val_fraction": 0,
        "test_fraction": 0,
        "batch_size": 1,
    }
    other = {"source_tokenizers": {"bytes": str(tmp_path / "bytes")}}
    for kwargs in (other, {"tokenizer": str(tmp_path / "bytes"), "sources": ["bpe400"]}):
        data = ready(make(max_length=30, **kwargs, **options))
        found = [(batch["rows"].item(), list(batch["sources"])) for batch in data.train_dataloader()]
        assert sorted(row for row, _ in found) == [0, 2]
        assert read_sizes(data._directory, InstructionSize)["train"].dropped == 1
    ready(make(max_length=30, **options))  # it has room in the other one
    data = make(max_length=30, **other, **{**options, "source": single_test_set(tmp_path, pairs)})
    with pytest.warns(UserWarning, match="Of the 3 examples of the split 'test', 1 are left out"):
        data.prepare_data()
    with pytest.raises(ValueError, match=r"to have at most 9 tokens of `source_tokenizers\['bytes'\]`, but got 12"):
        make(max_length=10, **other, **{**options, "source": str(tmp_path / "set")}).prepare_data()


def single_test_set(tmp_path, pairs):
    """A folder for `load_dataset` whose test split is too long."""
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", pairs[:1])
    write_jsonl(tmp_path / "set" / "test.jsonl", pairs)
    return str(tmp_path / "set")


@pytest.mark.parametrize("own", [True, False])
def test_response_without_tokens_is_named(make, tmp_path, own):
    """A BPE without an unknown token says nothing of letters that it has not."""
    save(Tokenizer(models.BPE({"<eos>": 0, "<unk>": 1, "p": 2, " ": 3}, [])), tmp_path / "silent")
    settings = {"template": "{prompt} {response}", **single(tmp_path, "xyz", "p")}
    name = "`tokenizer`" if own else r"`source_tokenizers\['s'\]`"
    path = str(tmp_path / "silent")
    chosen = {"tokenizer": path} if own else {"source_tokenizers": {"s": path}}
    with pytest.raises(
        ValueError, match=f"Expected the response of line 1 of .* to give tokens, but {name} gives none"
    ):
        make(**chosen, **settings).prepare_data()


def test_sources_are_part_of_the_fingerprint(make, folder):
    chat = str(folder / "bpe400")
    prints = {
        make(**kwargs).fingerprint
        for kwargs in (
            {},
            {"sources": ["bpe400"]},
            {"source_tokenizers": {"other": str(folder / "bpe400")}},
            {"source_tokenizers": {"bpe400": str(folder / "bpe300")}},
            {"sources": ["bpe400"], "templates": {"bpe400": "chat"}},
            {"sources": ["bpe400"], "templates": {"bpe400": "chat"}, "system_prompt": "s"},
            {"source_tokenizers": {"bpe400": {"tokenizer": chat, "template": "chat", "system_prompt": "t"}}},
            {"sources": ["bpe400", "words"]},
            {"predict_split": "all"},
        )
    }
    assert len(prints) == 9
    one, other = (make(sources).fingerprint for sources in (["bpe400", "words"], ["words", "bpe400"]))
    assert one == other


def test_multiple_choice(make, tmp_path):
    """A test batch has all choices and no sources, the others the right choice in all tokenizers."""
    rows = [{"prompt": f"Say {i}", "options": ["no", f"{i}", "é"], "label": i % 3} for i in range(20)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "choices.jsonl"), "choices_column": "options", "answer_column": "label"}
    data = ready(make(["bpe400"], source=source, batch_size=2))
    right = {}
    for batch in data.predict_dataloader():
        for view in (batch, batch["sources"]["bpe400"]):
            for row, number, (_, _, ends) in zip(
                batch["rows"].tolist(), batch["sample_ids"].tolist(), sequences(view), strict=True
            ):
                right[row] = number
                assert max(ends) == len(data.pairs.splits["test"][row].response)
    for batch in data.test_dataloader():
        assert set(batch) == {*BATCH, "rows", "sample_ids", "choices", "correct"}
        assert batch["sample_ids"].tolist() == [right[row] for row in batch["rows"].tolist()]
        assert len(batch["sample_ids"].unique()) * 3 == len(batch["rows"])
        for row, choice, (_, _, ends) in zip(
            batch["rows"].tolist(), batch["choices"].tolist(), sequences(batch), strict=True
        ):
            assert max(ends) == len(data.pairs.splits["test"][row].choices[choice])


# --- predict over all splits ---


class Recorder(LightningModule):
    """Gives the batches back."""

    def predict_step(self, batch, batch_idx):
        return batch


def predict(data):
    return Trainer(**QUIET).predict(Recorder(), datamodule=data) or []


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other)


def test_all_splits_are_predicted_once(make):
    data = make(["words"], predict_split="all", batch_size=7)
    found = predict(data)
    assert [len(batch["rows"]) for batch in found] == [7] * 8 + [4]
    assert [row for batch in found for row in batch["rows"].tolist()] == list(range(60))
    splits = [ready(data).pairs.splits[name] for name in ("train", "val", "test")]
    texts = [example[:2] for split in splits for example in split]
    known = ids_of(make(batch_size=1))
    assert [known[number] for batch in found for number in batch["sample_ids"].tolist()] == texts
    workers = make(["words"], predict_split="all", batch_size=7, num_workers=1)
    assert all(map(same, found, predict(workers)))


def test_resumed_run_makes_the_very_same_batches(make):
    """One sample of a batch that is missing brings all of it back; rows of the other mode mean nothing."""
    data = make(["bpe400"], predict_split="all", batch_size=7)
    whole = predict(data)
    samples = [batch["sample_ids"].tolist() for batch in whole]
    data.finished_rows |= set(range(60))
    assert len(predict(data)) == 9
    data.finished_samples |= {*samples[0], *samples[3][:6], *samples[8]}
    left = predict(data)
    assert len(left) == 7
    assert all(map(same, left, [*whole[1:8]]))
    data.finished_samples |= {number for numbers in samples for number in numbers}
    assert predict(data) == []


def test_finished_samples_mean_nothing_for_the_test_split(make):
    data = make()
    numbers = {number for batch in batches(data) for number in batch["sample_ids"].tolist()}
    data.finished_samples |= numbers
    assert [row for batch in batches(data) for row in batch["rows"].tolist()] == list(range(12))


def test_finished_batches_fill_up_for_the_ranks(make):
    data = make(predict_split="all", batch_size=7)
    whole = [batch["sample_ids"].tolist() for batch in batches(data)]
    data.finished_samples |= {number for numbers in whole[:8] for number in numbers}
    data.trainer = SimpleNamespace(world_size=3)
    assert [batch["sample_ids"].tolist() for batch in data.predict_dataloader()] == [whole[8], whole[0], whole[1]]


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from instruction_pairs import QUIET
from lightning.pytorch import Trainer
from lit_logits.datamodules import InstructionDataModule
from test_instruction_view_samples import Recorder

class Writer(Recorder):
    def predict_step(self, batch, batch_idx):
        with open({out!r} + f"/{{self.name}}{{self.global_rank}}", "a") as file:
            file.write(json.dumps([batch["rows"].tolist(), batch["sample_ids"].tolist()]) + "\\n")

if __name__ == "__main__":
    data = InstructionDataModule({source!r}, tokenizer={bpe!r}, source_tokenizers={{"other": {other!r}}}, batch_size=7,
                                 val_fraction=0.1, test_fraction=0.2, cache_dir={out!r} + "/cache", predict_split="all")
    for name in ("first", "second"):
        model = Writer()
        model.name = name
        Trainer(**QUIET, devices=2, strategy="ddp_fork").predict(model, datamodule=data, return_predictions=False)
        lines = [json.loads(line) for rank in "01" for line in open({out!r} + f"/{{name}}{{rank}}")]
        data.finished_samples |= {{number for rows, numbers in lines if rows[0] % 3 for number in numbers}}
"""


@pytest.mark.slow
def test_two_processes_predict_each_batch_once(folder, tmp_path):
    """Two gloo ranks share nine batches; then the three that were not finished, and no batch is another one."""
    settings = {"source": folder / "pairs.jsonl", "bpe": folder / "bpe300", "other": folder / "bpe400", "out": tmp_path}
    run_script(
        tmp_path / "run.py", SCRIPT.format(tests=str(Path(__file__).parent), **{k: str(v) for k, v in settings.items()})
    )

    def rows(name):
        ranks = [(tmp_path / f"{name}{rank}").read_text().splitlines() for rank in (0, 1)]
        return [[json.loads(line)[0] for line in lines] for lines in ranks]

    whole = [list(range(start, min(start + 7, 60))) for start in range(0, 60, 7)]
    first, second = rows("first"), rows("second")
    assert [len(lines) for lines in first] == [5, 4]
    assert sorted(first[0] + first[1]) == whole
    assert [len(lines) for lines in second] == [2, 1]
    assert sorted(second[0] + second[1]) == [batch for batch in whole if batch[0] % 3 == 0]
