"""Sources, splits and their error messages."""

import ast
import json
import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest
from datasets import Dataset

from lit_logits.datamodules.python_docs import read_python_docs
from lit_logits.datamodules.sources import fingerprint_source, read_source, stream_source
from lit_logits.datamodules.splitting import bucket_of, carve_splits
from lit_logits.datamodules.text.corpus import Corpus, TextSource


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def test_every_file_format_gives_its_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.md").write_text("# three\n")
    write_jsonl(tmp_path / "c.jsonl", ["four", "", "  ", "five"], "body")
    Dataset.from_dict({"body": ["six", None, "seven"], "other": [1, 2, 3]}).to_parquet(tmp_path / "d.parquet")
    source = [str(tmp_path / "*.txt"), str(tmp_path / "*.md"), str(tmp_path / "c.jsonl"), str(tmp_path / "d.parquet")]
    assert read_source(source, None, "body") == {
        "train": ["one\ntwo\n", "# three\n", "four", "five", "six", "seven"],
    }
    streamed = [row["body"] for row in stream_source(source, None, "body")["train"]]
    assert [text for text in streamed if text and text.strip()] == [
        "one\ntwo\n",
        "# three\n",
        "four",
        "five",
        "six",
        "seven",
    ]


def test_file_that_two_patterns_match_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert read_source([str(tmp_path / "a.txt"), str(tmp_path / "*")], None, "text")["train"] == ["one"]


@pytest.mark.parametrize("streaming", [False, True])
def test_own_splits_of_a_data_set_are_used_and_missing_ones_carved(tmp_path, streaming):
    """A folder for `load_dataset` stands for a hub data set: it has a validation split and no test split."""
    write_jsonl(tmp_path / "train.jsonl", [f"train {i}" for i in range(300)])
    write_jsonl(tmp_path / "validation.jsonl", [f"own {i}" for i in range(7)])
    fractions = {"val": 0.3, "test": 0.3}
    corpus = Corpus(TextSource(str(tmp_path)), streaming=streaming, fractions=fractions, seed=0)
    assert set(corpus.splits) == {"train", "val", "test"}
    train, val, test = ([*corpus.documents(name)] for name in ("train", "val", "test"))
    assert val == [f"own {i}" for i in range(7)]
    assert sorted(train + test) == sorted(f"train {i}" for i in range(300))
    assert 60 < len(test) < 120  # the validation share was not carved as well


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "missing.txt",
            "Expected `source` to be .* but got 'missing.txt'. As a path: nothing matches it in .* As a data",
        ),
        ("./missing", "nothing matches it in .* that is not the name of a data set"),
        ("nobody/nothing-here", "As a path: nothing matches it in .* As a data set \\(subset None\\): "),
        (["*.missing"], "Expected every `source` of a list to be a file or glob, but nothing matches '\\*.missing'"),
        ([], "Expected `source` to name at least one file"),
        (__file__, "Expected `source` to be files with a suffix of .*, but got '.*test_corpora.py'"),
    ],
)
def test_missing_source(source, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for function in (fingerprint_source, read_source, stream_source):
        with pytest.raises(ValueError, match=message):
            function(source, None, "text")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_unknown_text_column_lists_those_present(tmp_path, kind):
    rows = {"title": ["a", "b"], "body": ["c", "d"]}
    if kind == "parquet":
        Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    else:
        name = "x.jsonl" if kind == "jsonl" else "train.jsonl"
        (tmp_path / name).write_text('{"title": "a", "body": "c"}\n')
    source = str(tmp_path) if kind == "folder" else str(tmp_path / f"x.{kind}")
    with pytest.raises(ValueError, match=r"Expected `text_column` to be one of \['body', 'title'\], but got 'text'"):
        read_source(source, None, "text")


@pytest.mark.parametrize("broken", ["{not json", "[1, 2]", '{"text": 3}', '"text"'])
def test_broken_line_is_named(tmp_path, broken):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "fine"}}\n\n{broken}\n')
    with pytest.raises(ValueError, match=re.escape(f"line 3 of {tmp_path / 'x.jsonl'}")):
        read_source(str(tmp_path / "x.jsonl"), None, "text")


def test_fingerprint_of_a_folder_follows_its_files(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["one"])
    before = fingerprint_source(str(tmp_path), None, "text")
    assert fingerprint_source(str(tmp_path), None, "text") == before
    os.utime(tmp_path / "train.jsonl", (0, 0))  # as an edit would change it
    assert fingerprint_source(str(tmp_path), None, "text") != before


def test_empty_corpus(tmp_path):
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(ValueError, match="Expected `source` to hold text"):
        read_source(str(tmp_path / "x.txt"), None, "text")


def test_embedded_source_is_no_stream():
    with pytest.raises(ValueError, match="Expected `streaming` to be False"):
        stream_source("python-docs", None, "text")


def test_splits_hold_their_shares_and_no_text_twice():
    documents = [f"{i} " * (1 + i % 50) for i in range(500)] * 2  # every document has a twin
    splits = carve_splits(documents, {"val": 0.1, "test": 0.2}, seed=1)
    total = sum(map(len, documents))
    for name, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        assert sum(map(len, splits[name])) / total == pytest.approx(share, abs=0.01)
    assert not set(splits["train"]) & set(splits["val"]) | set(splits["test"]) & set(splits["train"] + splits["val"])
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == sorted(documents)


def test_split_depends_on_the_seed_and_not_on_the_order_of_the_documents():
    documents = [f"document {i}" for i in range(200)]
    first, reverse = (carve_splits(texts, {"val": 0.2}, seed=1) for texts in (documents, documents[::-1]))
    assert set(first["val"]) == set(reverse["val"])
    assert set(first["val"]) != set(carve_splits(documents, {"val": 0.2}, seed=2)["val"])


@pytest.mark.parametrize(
    "text", [" ".join(map(str, range(2000))), "".join(f"line {i}\n" for i in range(1000))], ids=["line", "lines"]
)
def test_single_document_is_cut_without_loss(text):
    splits = carve_splits([text], {"val": 0.05, "test": 0.05}, seed=0)
    pieces = splits["train"] + splits["val"] + splits["test"]
    assert all(splits.values())
    assert sum(map(len, pieces)) == len(text)
    assert all(piece in text for piece in pieces)


def test_document_larger_than_a_split_goes_to_training():
    documents = ["x" * 100_000, *(f"document {i}" for i in range(100))]
    splits = carve_splits(documents, {"val": 0.01, "test": 0.001}, seed=0)
    assert documents[0] in splits["train"]
    assert splits["val"]
    assert splits["test"]


def test_corpus_of_one_word_cannot_be_split():
    with pytest.raises(ValueError, match="Set `val_fraction` and `test_fraction` to 0"):
        carve_splits(["a"], {"val": 0.1, "test": 0.1}, seed=0)


def test_buckets_of_a_stream_hold_their_shares():
    names = [bucket_of(f"document {i}", {"val": 0.1, "test": 0.2}, seed=5) for i in range(4000)]
    assert names.count("val") / 4000 == pytest.approx(0.1, abs=0.02)
    assert names.count("test") / 4000 == pytest.approx(0.2, abs=0.02)


@pytest.mark.nightly
@pytest.mark.slow
def test_python_docs_are_the_docstrings_of_the_library():
    documents = read_python_docs()
    assert documents == read_python_docs()
    assert 1.5e6 < sum(len(text.encode()) for text in documents) < 4e6
    whole = "\n".join(documents)
    assert "json.decoder.JSONDecoder.raw_decode\n\n" in whole
    assert "test.support" not in whole
    source = ast.parse((Path(sysconfig.get_path("stdlib")) / "shlex.py").read_text())
    assert ast.get_docstring(source) in whole
    assert "pip" not in {text.split("\n")[0].split(".")[0] for text in documents}
    assert sys.modules.get("antigravity") is None  # importing that one opens a browser


def test_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt to be UTF-8 text"):
        read_source(str(tmp_path / "latin.txt"), None, "text")
