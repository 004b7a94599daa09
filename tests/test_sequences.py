"""The data module of texts with classes: splits, labels, ids, order, resuming; sources are in a file of their own."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from test_loaders import SaveEverywhere
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_logits.datamodules import SequenceDataModule, SequenceSource
from lit_logits.datamodules.prepared import read_sizes
from lit_logits.datamodules.sequences.storage import SequenceSize
from lit_logits.datamodules.tokenization import train_bpe

pytestmark = pytest.mark.usefixtures("no_network")

CLASSES = ["cold", "mild", "warm"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_rows(per_class=(30, 20, 10), split="train"):
    """Texts of 1 to 7 words, each with its number, which tells them apart."""
    return [
        {"text": f"{name} {split} {number} {'word ' * (number % 7)}", "label": name, "split": split}
        for name, count in zip(CLASSES, per_class, strict=True)
        for number in range(count)
    ]


@pytest.fixture
def make(tmp_path):
    """Build a data module over rows, ready for use."""

    def build(rows=None, ready=True, source=None, **kwargs):
        file = write_jsonl(tmp_path / "rows.jsonl", make_rows() if rows is None else rows)
        source = SequenceSource(file, **(source or {}))
        data = SequenceDataModule(source, **{"cache_dir": str(tmp_path / "cache"), "bpe_vocab_size": 300, **kwargs})
        if ready:
            data.prepare_data()
            data.setup()
        return data

    return build


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    """A tokenizer like that of an encoder: no end-of-sequence token, types for pairs, and a limit."""
    folder = tmp_path_factory.mktemp("bert")
    train_bpe(["cold mild warm words of a text"], 280, folder, for_encoders=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows_of(data, split):
    """Texts of a split, without their special tokens and padding, with their labels, in its order."""
    loader = getattr(data, f"{split}_dataloader")()
    return [
        (data.tokenizer.decode(ids, skip_special_tokens=True), label)
        for batch in loader
        for ids, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]


def counts(data, split):
    return Counter(data._sequences[split].labels.tolist())


# ---------------------------------------------------------------- batches


def test_batches_are_what_the_tokenizer_itself_gives(make):
    """Oracle: the tokenizer of the cache, called as a pipeline would call it."""
    data = make(batch_size=16, max_length=24)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer.name_or_path)
    texts = {row["text"]: row["label"] for row in make_rows()}
    seen = 0
    for batch in data.val_dataloader():
        assert list(batch) == ["input_ids", "attention_mask", "labels"]
        assert type(batch) is dict
        assert {value.dtype for value in batch.values()} == {torch.int64}
        found = [
            next(t for t in texts if tokenizer(t, truncation=True, max_length=24)["input_ids"] == ids[mask].tolist())
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ]
        again = tokenizer(found, truncation=True, max_length=24, padding=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], again["input_ids"])
        assert torch.equal(batch["attention_mask"], again["attention_mask"])
        assert [data.class_names[label] for label in batch["labels"]] == [texts[text] for text in found]
        seen += len(found)
    assert seen == 6


def test_long_rows_are_cut_and_counted(make):
    data = make(max_length=12)
    whole = make(max_length=100)
    for name in ("train", "val", "test"):
        size = read_sizes(data._directory, SequenceSize)[name]
        lengths = whole._sequences[name].lengths
        assert size.truncated == int((lengths > 12).sum())
        assert size.tokens == int(lengths.clamp(max=12).sum())
        assert data._sequences[name].lengths.tolist() == lengths.clamp(max=12).tolist()
    assert sum(size.truncated for size in read_sizes(data._directory, SequenceSize).values()) > 0
    cut = [row["input_ids"] for row in data._sequences["train"] if len(row["input_ids"]) == 12]
    assert {(ids[0], ids[-1]) for ids in cut} == {(data.tokenizer.cls_token_id, data.tokenizer.sep_token_id)}


def test_the_side_that_is_cut_is_the_tokenizers(make, bert_tokenizer, tmp_path):
    """It stands beside the tokenizer's own file, and the cache of one side is not that of the other."""
    rows = {}
    for side in ("right", "left"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(bert_tokenizer, truncation_side=side)
        tokenizer.save_pretrained(tmp_path / side)
        rows[side] = [
            row["input_ids"] for row in make(tokenizer=str(tmp_path / side), max_length=6)._sequences["train"]
        ]
    assert rows["left"] != rows["right"]


def test_pairs_have_types_where_the_tokenizer_tells_them(make, bert_tokenizer):
    rows = [{"one": f"cold {n}", "two": "warm", "label": n % 2} for n in range(20)]
    columns = {"text_column": ["one", "two"]}
    data = make(rows, source=columns, tokenizer=bert_tokenizer, max_length=40)
    batch = next(iter(data.val_dataloader()))
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer)
    expected = tokenizer([row["one"] for row in rows], [row["two"] for row in rows])
    found = [
        (ids[mask].tolist(), types[mask].tolist())
        for ids, types, mask in zip(
            batch["input_ids"], batch["token_type_ids"], batch["attention_mask"].bool(), strict=True
        )
    ]
    for pair in found:
        assert pair in list(zip(expected["input_ids"], expected["token_type_ids"], strict=True))
    own = make(rows, source=columns)
    assert own.tokenizer.decode(own._sequences["train"][0]["input_ids"]) == "<|cls|>cold 0<|sep|>warm<|sep|>"
    assert "token_type_ids" not in own._sequences["train"][0]  # DistilBERT and others refuse them


def test_tokenizers_that_cannot_serve_are_refused(make, bert_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="Expected `max_length` to be at most 40, which is what the tokenizer"):
        make(tokenizer=bert_tokenizer, max_length=41)
    bare = tmp_path / "bare"
    bare.mkdir()
    PreTrainedTokenizerFast.from_pretrained(bert_tokenizer, pad_token=None).save_pretrained(bare)
    with pytest.raises(ValueError, match=r"Expected `tokenizer` to have a padding token, but .*bare"):
        make(tokenizer=str(bare), max_length=40)
    train_bpe(["cold"], 257, bare)
    PreTrainedTokenizerFast.from_pretrained(bare, pad_token=None).save_pretrained(bare)
    data = make(tokenizer=str(bare), max_length=40)
    assert data.pad_token_id == data.tokenizer.eos_token_id == 0


# ---------------------------------------------------------------- splits


def test_each_class_gives_its_share_and_a_single_row_stays_in_training(make):
    rows = [*make_rows((30, 20, 10)), {"text": "alone", "label": "hot", "split": "train"}]
    data = make(rows, val_fraction=0.2, test_fraction=0.1)
    assert data.class_names == ["cold", "hot", "mild", "warm"]
    assert (counts(data, "val"), counts(data, "test")) == ({0: 6, 2: 4, 3: 2}, {0: 3, 2: 2, 3: 1})
    assert counts(data, "train") == {0: 21, 1: 1, 2: 14, 3: 7}


def test_equal_texts_stay_together(make):
    rows = [row for row in make_rows() for _ in range(3)]
    data = make(rows, val_fraction=0.2, test_fraction=0.2, batch_size=1)
    texts = {name: Counter(rows_of(data, name)) for name in ("train", "val", "test")}
    assert {count for counter in texts.values() for count in counter.values()} == {3}
    assert (
        sum(len(counter) for counter in texts.values()) == len({row for rows in texts.values() for row in rows}) == 60
    )


def test_own_splits_are_taken_and_the_other_stands_in(make):
    rows = [*make_rows(), *make_rows((3, 2, 1), "test")]
    data = make(rows, val_fraction=0.0)
    assert [len(data._sequences[name]) for name in ("train", "val", "test")] == [60, 6, 6]
    assert rows_of(data, "val") == rows_of(data, "test")
    held = make(rows, val_fraction=0.1)
    assert [len(held._sequences[name]) for name in ("train", "val", "test")] == [54, 6, 6]
    assert not set(rows_of(held, "val")) & set(rows_of(held, "test"))
    none = make(val_fraction=0.0, test_fraction=0.0)
    assert [none.val_dataloader(), none.test_dataloader(), none.predict_dataloader()] == [[], [], []]


def test_nothing_left_to_train_on_is_told(make):
    with pytest.raises(ValueError, match="Expected the source to hold rows to train on, but got 1, all of them held"):
        make([{"text": "a", "label": "x"}], test_fraction=0.0, source={"class_names": ["x", "y"]})


# ---------------------------------------------------------------- labels


def test_rows_without_a_class_are_ignored_labels_and_stay_where_they_are(make):
    unlabelled = [{"text": f"nobody knows {n}", "label": None, "split": "train"} for n in range(7)]
    data = make([*make_rows(), *unlabelled, *make_rows((2, 2, 2), "val"), {**unlabelled[0], "split": "val"}])
    assert counts(data, "train")[-100] == 7
    assert (counts(data, "val"), counts(data, "test")[-100]) == ({0: 2, 1: 2, 2: 2, -100: 1}, 0)
    assert read_sizes(data._directory, SequenceSize)["train"].unlabelled == 7


def test_a_split_in_which_no_row_has_a_class_counts_as_absent(make):
    rows = [*make_rows(), *[{"text": f"secret {n}", "label": "", "split": "test"} for n in range(5)]]
    with pytest.warns(UserWarning, match="Expected the split 'test' to have labels, but got none in 5 rows"):
        data = make(rows)
    assert counts(data, "test") == {0: 3, 1: 2, 2: 1}


def test_empty_texts_are_left_out_with_a_warning(make):
    rows = [*make_rows(), {"text": " ", "label": "cold", "split": "train"}, {"text": None, "label": "cold"}]
    with pytest.warns(
        UserWarning, match=r"but 2 of 62 in the split 'train' have none, such as line 61 of .*rows\.jsonl"
    ):
        data = make(rows)
    assert sum(len(data._sequences[name]) for name in ("train", "val", "test")) == 60
    assert make([*make_rows(), {"text": "", "label": "hot"}]).class_names == CLASSES  # nor do they make a class
    halves = [{"one": f"a {n}", "two": "", "label": n % 2} for n in range(20)]
    assert len(make(halves, source={"text_column": ["one", "two"]})._sequences["train"]) == 16  # half a pair is a text


def test_classes_are_in_the_order_that_is_given_or_sorted(make):
    numbers = [{"text": f"text {n}", "label": n % 11} for n in range(44)]
    assert make(numbers, ready=False).class_names == [str(n) for n in range(11)]
    given = make(source={"class_names": ["warm", "mild", "hot", "cold"]})
    assert (given.num_classes, counts(given, "val")) == (4, {3: 3, 1: 2, 0: 1})


@pytest.mark.parametrize("source", [{}, {"class_names": ["cold", "mild", "warm"]}])
def test_a_class_that_training_does_not_have_is_told(make, source):
    rows = [*make_rows(), {"text": "new", "label": "hot", "split": "test"}]
    with pytest.raises(ValueError, match=r"all labels of the split 'test' to be among the 3 classes.* got \['hot'\]"):
        make(rows, source=source)


def test_a_single_class_is_told(make):
    with pytest.raises(ValueError, match=r"the column 'label' to hold at least 2 classes, but got \['cold'\]"):
        _ = make(make_rows((9, 0, 0)), ready=False).num_classes


def test_few_rows_are_equally_many_of_each_class(make):
    data = make(max_train_rows=12, batch_size=1)
    assert counts(data, "train") == {0: 4, 1: 4, 2: 4}
    assert sum(counts(data, "val").values()) == 6
    assert set(rows_of(data, "train")) <= set(rows_of(make(batch_size=1), "train"))


def test_label_noise_replaces_known_labels_of_training_only(make):
    rows = [*make_rows(), *[{"text": f"nobody knows {n}", "label": None, "split": "train"} for n in range(9)]]
    clean, noisy = make(rows), make(rows, label_noise=0.25)
    before, after = clean._sequences["train"].labels, noisy._sequences["train"].labels
    assert (before != after).sum() == 12  # a quarter of 48
    assert ((before == -100) == (after == -100)).all()
    assert rows_of(clean, "val") == rows_of(noisy, "val")


# ---------------------------------------------------------------- the cache


def test_what_is_prepared_is_not_read_again(make, monkeypatch):
    make()
    monkeypatch.setattr("lit_logits.datamodules.sequences.splits.read_sequences", lambda source: 1 / 0)
    data = make()
    assert (data.class_names, data.vocab_size) == (CLASSES, 300)
    assert len(data._sequences["train"]) == 48
    with pytest.raises(ZeroDivisionError):
        make(make_rows((30, 20, 11)))


def test_arguments_are_checked_before_anything_is_read():
    for arguments in ({"bpe_vocab_size": 258}, {"max_length": 3}, {"batch_size": 0}, {"max_train_rows": 0}):
        with pytest.raises(ValueError, match=f"Expected `{next(iter(arguments))}` to be at least"):
            SequenceDataModule("absent.csv", **arguments)
    with pytest.raises(ValueError, match=r"Expected `label_noise` to be in \[0, 1\)"):
        SequenceDataModule("absent.csv", label_noise=1.0)


# ---------------------------------------------------------------- order and resuming


class Recorder(LightningModule):
    """Writes down the token ids and labels that it took a step on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append({name: value.tolist() for name, value in batch.items()})
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, ckpt_path=None, callbacks=()):
    module = Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", max_epochs=2, enable_model_summary=False, callbacks=list(callbacks), **quiet)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.parametrize("kwargs", [{}, {"group_by_length": True, "label_noise": 0.3, "max_train_rows": 40}])
def test_resumed_run_sees_what_the_uninterrupted_run_would_have_seen(make, tmp_path, kwargs):
    saver = SaveEverywhere(tmp_path)
    whole = fit(make(ready=False, batch_size=8, **kwargs), callbacks=[saver])
    assert len({str(batch) for batch in whole}) == len(whole) == 2 * (kwargs.get("max_train_rows", 48) // 8)
    for path, seen, _ in saver.saved[::4]:
        assert fit(make(ready=False, batch_size=8, **kwargs), path) == whole[seen:]


@pytest.mark.parametrize("change", [{"max_train_rows": 30}, {"group_by_length": True}, {"max_length": 20}])
def test_changed_order_is_reported_on_resume(make, tmp_path, change):
    saver = SaveEverywhere(tmp_path)
    fit(make(ready=False, batch_size=8), callbacks=[saver])
    with pytest.warns(UserWarning, match=r"Expected the checkpoint's \['data'\] .* some texts of this epoch"):
        fit(make(ready=False, batch_size=8, **change), saver.saved[1][0])


@pytest.mark.parametrize("group_by_length", [False, True])
def test_ranks_together_see_the_batches_of_one_process(make, group_by_length):
    def batches(world_size, rank, batch_size):
        data = make(batch_size=batch_size, group_by_length=group_by_length)
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, state=SimpleNamespace(fn=None))
        return [
            [ids[mask].tolist() for ids, mask in zip(b["input_ids"], b["attention_mask"].bool(), strict=True)]
            for b in data.train_dataloader()
        ]

    ranks = [batches(2, rank, 8) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in batches(1, 0, 16)]


def test_groups_of_like_lengths_need_less_padding(make):
    rows = make_rows((300, 200, 100))
    padding = [
        sum(
            int((batch["attention_mask"] == 0).sum()) for batch in make(rows, group_by_length=groups).train_dataloader()
        )
        for groups in (False, True)
    ]
    assert padding[1] < padding[0] / 3
