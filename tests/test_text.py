"""The data module: batches, tokenizers, the cache and its promises, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules import TextDataModule, tokenization
from lit_logits.datamodules.text import packing

TOKENIZE = packing.tokenize
WORDS = ["".join(random.Random(i).choices("abcdefgh", k=2 + i % 4)) for i in range(200)]


def write_corpus(path, num_documents=120, seed=0):
    rng = random.Random(seed)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in documents))
    return documents


@pytest.fixture
def make(tmp_path):
    """Build a data module over a small corpus of JSON lines, with a cache of its own."""
    write_corpus(tmp_path / "corpus.jsonl")

    def build(**kwargs):
        defaults = {"source": str(tmp_path / "corpus.jsonl"), "cache_dir": str(tmp_path / "cache")}
        sizes = {"bpe_vocab_size": 300, "block_size": 12, "batch_size": 4, "val_fraction": 0.1, "test_fraction": 0.1}
        return TextDataModule(**{**defaults, **sizes, **kwargs})

    return build


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def rows_of(loader):
    return [row for batch in loader for row in batch["input_ids"].tolist()]


def tokens_of(loader):
    return torch.cat([batch["input_ids"] for batch in loader]).flatten().tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_long_documents_are_not_tokenised_all_at_once(make, monkeypatch, streaming):
    """Sixty documents of 160 kB each took 1.9 GB; the blocks are the same."""
    whole = tokens_of(ready(make(streaming=streaming)).train_dataloader())
    monkeypatch.setattr(tokenization, "CHARACTERS_A_BATCH", 100)
    sizes = []
    monkeypatch.setattr(packing, "tokenize", lambda texts, *args: sizes.append(texts) or TOKENIZE(texts, *args))
    data = ready(make(streaming=streaming, cache_dir=str(make().cache_dir / "other")))
    assert tokens_of(data.train_dataloader()) == whole
    assert len(sizes) > 20
    assert all(sum(map(len, texts[:-1])) < 100 for texts in sizes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_transformers_dicts(make, num_workers):
    data = ready(make(num_workers=num_workers))
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) > 5
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(tensor.shape == (4, 12) and tensor.dtype == torch.long for tensor in batch.values())
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
        assert (batch["attention_mask"] == 1).all()


def test_blocks_are_the_documents_joined_by_eos(make, tmp_path):
    """Oracle: encode document by document with `tokenizers`, join in Python."""
    data = ready(make())
    backend, eos = data.tokenizer.backend_tokenizer, data.tokenizer.eos_token_id
    documents = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    seen = []
    for loader in (data.val_dataloader(), data.test_dataloader()):
        tokens = tokens_of(loader)
        text = data.tokenizer.decode(tokens).split("<|endoftext|>")
        split = [document for document in documents if document in text]
        expected = [token for document in split for token in [*backend.encode(document).ids, eos]]
        assert len(expected) > 50
        both = min(len(tokens), len(expected))
        assert tokens[:both] == expected[:both]
        assert eos not in tokens[len(expected) :]  # the last block may end inside a document
        seen.append(set(split))
    train = data.tokenizer.decode(tokens_of(data._loader("train", train=False))).split("<|endoftext|>")
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & set(train)
    assert len(set(train) & set(documents)) > 80


def test_evaluation_keeps_the_short_batch_and_the_order(make):
    data = ready(make(batch_size=7, block_size=8))
    assert len(data._blocks["val"]) % 7
    assert tokens_of(data.val_dataloader()) == data._blocks["val"]["input_ids"][:].flatten().tolist()
    assert tokens_of(data.predict_dataloader()) == tokens_of(data.test_dataloader()) != tokens_of(data.val_dataloader())


def test_split_that_is_switched_off_has_no_batches(make):
    data = ready(make(val_fraction=0.0))
    assert data.val_dataloader() == []
    assert len(data.test_dataloader()) > 0


def test_vocabulary_is_known_before_anything_is_prepared(make):
    data = make()
    assert data.vocab_size == len(data.tokenizer) == 300
    assert data.tokenizer.decode(data.tokenizer.encode("späte Ω\n\t  bytes")) == "späte Ω\n\t  bytes"
    special = data.tokenizer
    assert special.eos_token == special.bos_token == special.pad_token == "<|endoftext|>"


def test_corpus_too_small_for_the_vocabulary_is_reported(make):
    with pytest.warns(UserWarning, match="Expected the corpus to be large enough for `bpe_vocab_size`=60000"):
        vocab_size = make(bpe_vocab_size=60_000).vocab_size
    assert 257 < vocab_size < 60_000


def test_bpe_learns_from_the_training_split_only(make, tmp_path):
    """A word that fills one held-out document and no other earns no token."""
    data = make()
    held_out = data.corpus.documents("val")[0]
    rows = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert held_out in rows
    documents = list(data.corpus.documents("train"))
    assert held_out not in documents
    oracle = Tokenizer(models.BPE())
    from tokenizers import pre_tokenizers, trainers

    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 300, "special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
    oracle.train_from_iterator(documents, trainers.BpeTrainer(**options, show_progress=False))
    assert data.tokenizer.get_vocab() == oracle.get_vocab()
    assert data.tokenizer.get_vocab() != make(seed=7).tokenizer.get_vocab()


@pytest.mark.parametrize("change", ["eos", "slow", "missing", "gguf", "text"])
def test_tokenizer_that_cannot_serve_is_refused(make, tmp_path, change, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = str(tmp_path / "tokenizer")
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(name)
    if change == "eos":
        message = "Expected `tokenizer` to have an end-of-sequence token"
    elif change == "slow":
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: object())
        message = "Expected `tokenizer` to be a fast one, but .* is a object"
    else:
        name = {"missing": "nobody/nothing", "gguf": str(tmp_path / "no.gguf"), "text": str(tmp_path / "no")}[change]
        message = "Expected `tokenizer` to be a hub id, a local folder, or a `.gguf` file, but got"
    with pytest.raises(ValueError, match=message):
        make(tokenizer=name).vocab_size  # noqa: B018


def test_truncation_in_a_tokenizer_file_does_not_cut_documents(make, tmp_path):
    trained = make().tokenizer
    trained.backend_tokenizer.enable_truncation(4)
    trained.backend_tokenizer.enable_padding(length=64)
    trained.save_pretrained(tmp_path / "truncating")
    data, plain = ready(make(tokenizer=str(tmp_path / "truncating"))), ready(make())
    assert tokens_of(data.val_dataloader()) == tokens_of(plain.val_dataloader())


CHANGES = {
    "text_column": "body",
    "bpe_vocab_size": 280,
    "block_size": 8,
    "val_fraction": 0.2,
    "test_fraction": 0.2,
    "seed": 1,
    "source": None,
    "tokenizer": None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_setting_never_meets_a_stale_cache(make, tmp_path, name):
    before = ready(make())
    value = CHANGES[name]
    if name == "source":
        write_corpus(tmp_path / "corpus.jsonl", seed=1)  # the same path, other content of about the same size
        value = str(tmp_path / "corpus.jsonl")
    if name == "tokenizer":
        before.tokenizer.add_tokens(["ab"])
        before.tokenizer.save_pretrained(tmp_path / "tokenizer")
        value = str(tmp_path / "tokenizer")
    change = {name: value}
    if name == "text_column":
        change = {"source": {"path": str(tmp_path / "corpus.jsonl"), **change}}
    after = ready(make(**change))
    assert after._directory != before._directory
    assert rows_of(after.val_dataloader()) != rows_of(before.val_dataloader())
    fresh = ready(make(**{**change, "cache_dir": str(tmp_path / "other")}))
    assert tokens_of(after._loader("train", train=False)) == tokens_of(fresh._loader("train", train=False))


def test_same_setting_reads_the_cache(make, monkeypatch):
    first = ready(make())
    monkeypatch.setattr("lit_logits.datamodules.text.corpus.read_source", lambda *_: pytest.fail("read again"))
    again = ready(make(batch_size=2, num_workers=1))
    assert again._directory == first._directory
    assert tokens_of(again.val_dataloader()) == tokens_of(first.val_dataloader())


def test_blocks_are_read_by_other_versions_of_datasets(make):
    """An older one refuses an Arrow file whose metadata name types that came after it."""
    file = ready(make())._directory / "train.arrow"
    with pa.memory_map(str(file)) as source:
        assert not pa.ipc.open_stream(source).schema.metadata


def test_setup_only_reads(make):
    with pytest.raises(RuntimeError, match="Expected `prepare_data` to have written"):
        make().setup()


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert TextDataModule().cache_dir == tmp_path / "lit_logits"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert TextDataModule().cache_dir == Path.home() / ".cache" / "lit_logits"
    assert TextDataModule(cache_dir="~/x").cache_dir == Path.home() / "x"


def run_python(code, *args, **kwargs):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)


PREPARE = """
    import sys
    from lit_logits.datamodules import TextDataModule
    from lit_logits.datamodules.text import packing
    {patch}
    data = TextDataModule(sys.argv[1], cache_dir=sys.argv[2], bpe_vocab_size=300, block_size=12, val_fraction=0.1,
                          test_fraction=0.1)
    print(data.vocab_size, flush=True)
    data.prepare_data(); data.setup()
    print(data._directory.name, [sum(row) for row in data._blocks["train"].with_format(None)["input_ids"]])
"""


@pytest.mark.slow
def test_processes_that_prepare_at_once_agree(make, tmp_path):
    arguments = (tmp_path / "corpus.jsonl", tmp_path / "cache")
    processes = [run_python(PREPARE.format(patch=""), *arguments) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    other = ready(make(cache_dir=str(tmp_path / "other")))  # training the BPE again gives the same one
    rows = [sum(row) for row in other._blocks["train"].with_format(None)["input_ids"]]
    assert outputs == {f"300\n{other._directory.name} {rows}\n"}
    assert not list((tmp_path / "cache").glob("*partial*"))


@pytest.mark.slow
def test_killed_build_leaves_nothing_that_is_used(make, tmp_path):
    """The build is stopped after its first file and killed there; the next one cleans up and completes."""
    patch = """
    write = packing.write_blocks
    def write_and_hang(file, *args, **kwargs):
        if file.stem == "val":
            print("half", flush=True); import time; time.sleep(60)
        return write(file, *args, **kwargs)
    packing.write_blocks = write_and_hang
    """
    process = run_python(PREPARE.format(patch=patch), tmp_path / "corpus.jsonl", tmp_path / "cache")
    assert [process.stdout.readline().strip() for _ in range(2)] == ["300", "half"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    partial = list((tmp_path / "cache").glob("blocks-*.partial-*"))
    assert len(partial) == 1
    assert [file.name for file in partial[0].iterdir()] == ["train.arrow"]
    assert not [entry for entry in (tmp_path / "cache").glob("blocks-*") if entry.suffix == "" and entry.is_dir()]
    started = time.monotonic()
    data = ready(make())
    assert time.monotonic() - started < 30  # the lock went with the process
    assert not list((tmp_path / "cache").glob("*.partial-*"))
    assert len(data.train_dataloader()) > 5


def test_interrupted_build_leaves_nothing(make, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    data = make()
    monkeypatch.setattr("lit_logits.datamodules.text.packing.tokenize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert not [path for path in (tmp_path / "cache").glob("blocks-*") if path.is_dir()]
    monkeypatch.undo()
    assert len(ready(data).train_dataloader()) > 5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_size": 0}, "Expected `block_size` to be at least 1, but got 0."),
        ({"batch_size": 0}, "Expected `batch_size` to be at least 1, but got 0."),
        ({"num_workers": -1}, "Expected `num_workers` to be at least 0, but got -1."),
        ({"bpe_vocab_size": 256}, "Expected `bpe_vocab_size` to be at least 257, but got 256."),
        ({"shuffle_buffer": 0}, "Expected `shuffle_buffer` to be at least 1, but got 0."),
        ({"val_fraction": 1.0}, r"Expected `val_fraction` to be in \[0, 1\), but got 1.0."),
        ({"test_fraction": -0.1}, r"Expected `test_fraction` to be in \[0, 1\), but got -0.1."),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "to be below 1, but got 0.5"),
    ],
)
def test_argument_out_of_range(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_block_longer_than_a_split(make, tmp_path):
    data = make(block_size=400)
    with pytest.raises(ValueError, match=r"in each split \(train \d{4}, val \d+, test \d+\), but got 400. Lower"):
        data.prepare_data()
    assert not [path for path in (tmp_path / "cache").glob("blocks-*") if path.is_dir()]


def test_batch_larger_than_the_training_split(make):
    data = ready(make(batch_size=1000))
    with pytest.raises(
        ValueError, match=r"Expected at least 1000 training blocks .* Lower `batch_size` or `block_size`"
    ):
        data.train_dataloader()


def test_stream_holds_out_its_validation_documents(make, tmp_path):
    data = ready(make(streaming=True, shuffle_buffer=20, val_blocks=4, batch_size=1, val_fraction=0.2, block_size=60))
    assert len(data._blocks["val"]) == 4
    documents = {json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()}
    split = {name: set(data.corpus.documents(name)) for name in ("train", "val", "test")}
    assert set.union(*split.values()) == documents
    assert sum(map(len, split.values())) == len(documents)
    text = data.tokenizer.decode(tokens_of(data.train_dataloader()))
    whole = [document for document in documents if f"<|endoftext|>{document}<|endoftext|>" in text]
    assert len(whole) > 30
    assert set(whole) <= split["train"]


def test_stream_sees_every_training_document_every_epoch_in_another_order(make):
    data = ready(make(streaming=True, shuffle_buffer=1000, val_blocks=5, batch_size=1))
    loader = data.train_dataloader()
    epochs = [[tuple(batch["input_ids"].flatten().tolist()) for batch in loader] for _ in range(2)]
    tokens = [t for text in data.corpus.documents("train") for t in [*data.tokenizer.encode(text), 0]]
    blocks = [tuple(tokens[i : i + 12]) for i in range(0, len(tokens) - 11, 12)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(blocks)
    assert epochs[0] != epochs[1] != blocks != epochs[0]


def test_stream_shorter_than_a_batch(make):
    data = ready(make(streaming=True, shuffle_buffer=20, val_blocks=5, batch_size=1000))
    with pytest.raises(ValueError, match="Expected the stream to hold at least one batch of 1000 blocks"):
        next(iter(data.train_dataloader()))
