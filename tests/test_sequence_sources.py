"""Where texts with classes come from: formats, splits, names of classes, and what is refused."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lit_logits.datamodules.rows import read_rows
from lit_logits.datamodules.sequences import python_paragraphs
from lit_logits.datamodules.sequences.labels import order_classes, read_label
from lit_logits.datamodules.sequences.sources import SequenceSource, fingerprint_sequences, read_sequences

pytestmark = pytest.mark.usefixtures("no_network")

ROWS = [
    {"text": 'a "quoted", and\nbroken line', "label": "NA"},
    {"text": "null", "label": "None"},
    {"text": "tab\tand comma,", "label": "é"},
]
NAMES = ["low", "high"]
LABELLED = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})


def write(file, rows):
    """Write rows in the format of the file's suffix, by other code than reads them."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with open(file, "w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(file)


def rows_of(*names, label="x"):
    return [{"text": name, "label": label} for name in names]


def read(path, **kwargs):
    """Texts and labels of each split."""
    splits, _ = read_sequences(SequenceSource(str(path), **kwargs))
    return {name: [(*row.texts, row.label) for row in rows] for name, rows in splits.items()}


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_each_format_gives_the_rows_as_they_were_written(tmp_path, suffix):
    """What other readers take for missing values, `NA`, `null` and `None`, are a text and classes like others."""
    file = write(tmp_path / f"rows.{suffix}", ROWS)
    assert read(file) == {"train": [(row["text"], row["label"]) for row in ROWS]}


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.csv", "validation.csv", "test.csv"], ["train", "val", "test"]),
        (["b-train-0.jsonl", "b-train-1.jsonl", "dev.tsv"], ["train", "train", "val"]),
        (["train/0.csv", "test/0.parquet"], ["train", "test"]),
        (["a.csv", "contest.csv"], ["train", "train"]),
        (["my-test.csv"], ["train"]),
    ],
)
def test_names_below_the_folder_tell_the_splits_of_several_files(tmp_path, files, splits):
    """A word of the folder's own path, here `test`, tells nothing, and neither does `contest`."""
    folder = tmp_path / "test" / "data"
    expected: dict[str, list[str]] = {}
    for name, split in zip(files, splits, strict=True):
        write(folder / name, rows_of(name))
        expected.setdefault(split, []).append(name)
    assert {name: sorted(text for text, _ in rows) for name, rows in read(folder).items()} == expected


def test_globs_and_lists_of_files_are_split_by_their_names_too(tmp_path):
    files = [write(tmp_path / name, rows_of(name)) for name in ("bank-train.csv", "bank-test.csv", "other.csv")]
    expected = {"train": [("bank-train.csv", "x")], "test": [("bank-test.csv", "x")]}
    assert read(tmp_path / "bank-*.csv") == expected
    splits, _ = read_sequences(SequenceSource(files[:2]))
    assert {name: [(*row.texts, row.label) for row in rows] for name, rows in splits.items()} == expected
    with pytest.raises(ValueError, match=r"Expected every file to have one of 'train'.*other\.csv'\]. Rename them"):
        read(tmp_path)


def test_a_column_tells_the_split_of_each_row(tmp_path):
    rows = [{"text": name, "label": "x", "split": name} for name in ("train", "dev", "test", "validation")]
    file = write(tmp_path / "rows.jsonl", rows)
    expected = {"train": [("train", "x")], "val": [("dev", "x"), ("validation", "x")], "test": [("test", "x")]}
    assert read(file) == expected
    for other in ("part", None):
        assert read(file, split_column=other) == {"train": [(row["text"], "x") for row in rows]}
    folds = write(tmp_path / "folds.jsonl", [{"text": "a", "label": "x", "split": 3}])
    with pytest.raises(ValueError, match=r"'split' to hold one of \['train', .* got 3 in line 1 .*split_column: null"):
        read(folds)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": "b"}\nnonsense\n', r"Expected a JSON object in line 2 of .*a\.jsonl"),
        ("a.jsonl", "[1]\n", r"Expected a JSON object in line 1 of .*a\.jsonl, but got list"),
        ("a.csv", "text,label\na,b\na,b,c\n", r"Expected 2 values \(text, label\) in line 3 of .*a\.csv, but got 3"),
        ("a.csv", 'text,label\n"a,b\n', r"Expected a table in UTF-8 in .*a\.csv, but got, after line 2"),
        ("a.tsv", b"text\tlabel\n\xff\tb\n", r"Expected a table in UTF-8 in .*a\.tsv"),
        ("a.csv", "text,label\n", r"Expected .* to have rows to train on, but got none"),
        (
            "a.csv",
            "txt,label\na,b\n",
            r"Expected `text_column` to be one of \['label', 'txt'\], but got 'text', in line 2",
        ),
        ("a.csv", "text,class\na,b\n", r"Expected `label_column` to be one of \['class', 'text'\], but got 'label'"),
        ("a.jsonl", '{"text": 3, "label": "b"}\n', r"the column 'text' to hold strings, but got int in line 1"),
        (
            "a.jsonl",
            '{"text": "a", "label": ["b", "c"]}\n',
            r"one class a row in the column 'label', but got \['b', 'c'\]",
        ),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', r"to hold strings or whole numbers, but got 0\.5 in line 1"),
        ("a.jsonl", r'{"text": "cut \ud83d", "label": "b"}', r"Expected text in line 1 of .*a\.jsonl, but character 4"),
        ("a.xlsx", "a", r"Expected `source` to be files with a suffix of"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read(file)


def test_a_path_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"Expected `source` to be 'python-paragraphs', files, or .*absent\.csv"):
        fingerprint_sequences(SequenceSource("./absent.csv"))
    with pytest.raises(ValueError, match=r"Expected the folder .* to hold files with a suffix of .* but got none"):
        read(tmp_path)


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text("\ntext,label\n\na,b\n\n")
    (tmp_path / "a.jsonl").write_text('\n{"text": "a", "label": "b"}\n\n')
    for file, line in (("a.csv", 4), ("a.jsonl", 2)):
        path = str(tmp_path / file)
        assert list(read_rows([path])) == [({"text": "a", "label": "b"}, f"line {line} of {path}")]


# ---------------------------------------------------------------- data sets


def test_class_labels_keep_their_names_and_order(tmp_path):
    """Of Parquet files, of saved data sets and, behind the same function, of the hub; −1 is no class."""
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    dataset = Dataset.from_dict(rows, features=LABELLED)
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    DatasetDict({"train": dataset, "validation": dataset.select([0])}).save_to_disk(tmp_path / "saved")
    train = [("a", "high"), ("b", "low"), ("c", None)]
    for name, expected in (("rows.parquet", {"train": train}), ("saved", {"train": train, "val": train[:1]})):
        source = SequenceSource(str(tmp_path / name))
        splits, names = read_sequences(source)
        assert {split: [(*row.texts, row.label) for row in rows] for split, rows in splits.items()} == expected
        assert names == NAMES
        assert len(fingerprint_sequences(source)) == 64


def test_a_hub_data_set_is_read_by_its_own_splits(monkeypatch):
    whole = Dataset.from_dict({"text": ["a"], "label": [0]}, features=LABELLED)
    sets = DatasetDict({"train": whole, "validation": whole, "test": whole.select([])})
    module = "lit_logits.datamodules.sequences.sources"
    asked = []
    monkeypatch.setattr(f"{module}.dataset_builder", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr(
        f"{module}.load_dataset", lambda name, subset: sets if (name, subset) == ("glue", "sst2") else 0
    )
    assert read("glue", subset="sst2") == {"train": [("a", "low")], "val": [("a", "low")]}
    assert asked == [("glue", "sst2")]


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("value", "name"),
    [("joy", "joy"), (" joy ", "joy"), (3, "3"), (-1, "-1"), (3.0, "3"), (True, "True")]
    + [(missing, None) for missing in (None, "", " ", float("nan"))],
)
def test_labels_are_names(value, name):
    assert read_label(value, "label", "row 0") == name


@pytest.mark.parametrize("value", [-2, 2, -100])
def test_numbers_of_no_class_are_told(value):
    with pytest.raises(ValueError, match=rf"numbers of its 2 classes, or -1, but got {value} in row 0"):
        read_label(value, "label", "row 0", NAMES)


def test_numbers_that_are_equal_have_one_order():
    """That of a set of strings changes with each process."""
    assert order_classes(["7", "07", "3"]) == order_classes(["07", "7", "3"]) == ["3", "07", "7"]


def test_two_columns_make_pairs_and_three_are_refused(tmp_path):
    file = write(tmp_path / "pairs.csv", [{"one": "a", "two": "b", "label": "x"}])
    assert read(file, text_column=["one", "two"]) == {"train": [("a", "b", "x")]}
    with pytest.raises(ValueError, match="Expected `text_column` to be a name, or two"):
        SequenceSource(file, text_column=["one", "two", "three"])
    with pytest.raises(ValueError, match="Expected `class_names` to differ"):
        SequenceSource(file, class_names=["a", "a"])


# ---------------------------------------------------------------- the embedded source


def test_paragraphs_of_public_modules_with_enough_of_them_are_the_embedded_rows(tmp_path, monkeypatch):
    """One that stands in two modules belongs to none; code, lists and short ones are no paragraphs."""
    first = '"""Read a file of words.\n\nShared by two of the modules.\n\n    x = 1\n\nToo short."""\n'
    (tmp_path / "a.py").write_text(first + 'def f():\n    """Return one word of them."""\n')
    (tmp_path / "b.py").write_text('"""Write a file of words.\n\nShared by two of the modules."""\n')
    (tmp_path / "_c.py").write_text('"""A private file of words.\n\nA private file of letters."""\n')
    monkeypatch.setattr("lit_logits.datamodules.python_docs._root", lambda: tmp_path)
    monkeypatch.setattr(python_paragraphs, "MIN_PARAGRAPHS", 2)
    expected = [("Read a file of words.", "a"), ("Return one word of them.", "a")]
    assert read("python-paragraphs") == {"train": expected}


@pytest.mark.slow
@pytest.mark.nightly
def test_the_library_of_this_python_gives_thousands_of_paragraphs_in_dozens_of_classes():
    rows = read("python-paragraphs")["train"]
    assert len(rows) > 3000
    assert 20 <= len({label for _, label in rows}) <= 60
    assert len({text for text, _ in rows}) == len(rows)
