"""Where pairs come from and how they are split: files, data sets, Python questions, and rows that are refused."""

import json
import random
import re

import pytest
from datasets import Dataset
from instruction_pairs import (
    PAIRS,
    as_rows,
    make_data,  # noqa: F401  # a fixture
    pairs_folder,  # noqa: F401  # a fixture
    ready,
    texts_of,
    write_jsonl,
)

from lit_logits.datamodules import InstructionDataModule
from lit_logits.datamodules.instructions.python_questions import read_python_questions
from lit_logits.datamodules.instructions.sources import PairSource, parse_row
from lit_logits.datamodules.instructions.splits import Example, group_examples, split_examples
from lit_logits.datamodules.instructions.storage import InstructionSize
from lit_logits.datamodules.prepared import read_sizes

# --- rows and files ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "Expected the column 'prompt' to hold text, but got an empty prompt in line 3 of "),
        ({"prompt": " \n"}, "an empty prompt in line 3 of "),
        ({"response": ""}, "an empty response in line 3 of "),
        ({"response": None}, "Expected the column 'response' to hold strings, but got NoneType in line 3 of "),
        ({"response": 42}, "but got int in line 3 of .*Convert it, or set `response_column`"),
    ],
)
def test_row_that_is_not_as_it_should_be(make, tmp_path, change, message):
    rows = as_rows(PAIRS[:5])
    rows[1] |= change
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "bad.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    with pytest.raises(ValueError, match=message):
        make(source=str(tmp_path / "bad.jsonl")).prepare_data()


@pytest.mark.parametrize("broken", ["{not json", "[1]", "3"])
def test_broken_line_is_named(make, tmp_path, broken):
    (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "p", "response": "r"}}\n{broken}\n')
    with pytest.raises(ValueError, match=r"Expected a JSON object in line 2 of .*bad.jsonl, but got"):
        make(source=str(tmp_path / "bad.jsonl")).prepare_data()


def test_line_in_another_encoding_is_named(make, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "p", "response": "r"}\n{"prompt": "na\xefve"}\n')
    with pytest.raises(ValueError, match=r"in line 2 of .*bad.jsonl, but got: 'utf-8' codec"):
        make(source=str(tmp_path / "bad.jsonl")).prepare_data()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_missing_column_is_named_with_those_present(make, tmp_path, kind):
    rows = [{"question": "q", "answer": "a"}]
    name = tmp_path / ("train.jsonl" if kind == "folder" else f"x.{kind}")
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(name)
    else:
        write_jsonl(name, rows)
    where = {"jsonl": "line 1 of .*x.jsonl", "parquet": "row 0 of .*x.parquet", "folder": "row 0 of 'train' of '"}
    message = r"Expected `prompt_column` to be one of \['answer', 'question'\], but got 'prompt', in " + where[kind]
    with pytest.raises(ValueError, match=message):
        make(source=str(tmp_path if kind == "folder" else name)).prepare_data()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "Expected `source` to be 'python-questions', files, or a Hugging Face data set, but got"),
        (__file__, r"Expected `source` to be files with a suffix of \('.jsonl', '.parquet'\), but got"),
        ([], "Expected `source` to name at least one file"),
    ],
)
def test_missing_source(make, source, message):
    with pytest.raises(ValueError, match=message):
        make(source=source).prepare_data()


def test_file_without_rows(make, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for column in ("response", None):
        with pytest.raises(ValueError, match=r"Expected .*source.* to hold"):
            make(source={"path": str(tmp_path / "empty.jsonl"), "response_column": column}).prepare_data()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "glob"])
def test_every_format_gives_the_same_rows(make, tmp_path, kind):
    rows = [{"question": prompt, "answer": response} for prompt, response in PAIRS]
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    else:
        write_jsonl(tmp_path / "a.jsonl", rows[:40] if kind == "glob" else rows)
    if kind == "glob":
        Dataset.from_list(rows[40:]).to_parquet(tmp_path / "b.parquet")
    files = {"jsonl": "a.jsonl", "parquet": "x.parquet", "glob": "*"}
    columns = {"prompt_column": "question", "response_column": "answer"}
    data = ready(make(source={"path": str(tmp_path / files[kind]), **columns}))
    same = ready(make())
    assert texts_of(data.test_dataloader(), data.tokenizer) == texts_of(same.test_dataloader(), same.tokenizer)


def test_own_splits_of_a_data_set_are_used_and_missing_ones_carved(make, tmp_path):
    """A folder for `load_dataset` stands for a hub data set: it has a test split and no validation split."""
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", as_rows(PAIRS[:80]))
    write_jsonl(tmp_path / "set" / "test.jsonl", as_rows(PAIRS[80:]))
    data = ready(make(source=str(tmp_path / "set"), test_fraction=0.5))
    assert [row[:2] for row in data.pairs.splits["test"]] == PAIRS[80:]
    assert {name: len(rows) for name, rows in data.pairs.splits.items()} == {"train": 72, "val": 8, "test": 20}
    first = ready(make(source=str(tmp_path / "set"), max_test_rows=3))
    assert [row[:2] for row in first.pairs.splits["test"]] == PAIRS[80:83]
    assert [batch["rows"].tolist() for batch in first.test_dataloader()] == [[0, 1, 2]]
    prompts = ready(make(source={"path": str(tmp_path / "set"), "response_column": None}))
    assert [row.prompt for row in prompts.pairs.splits["test"]] == [prompt for prompt, _ in PAIRS[80:]]


# --- splits ---


def test_equal_prompts_and_equal_long_responses_stay_together():
    source = PairSource("rows")
    rng = random.Random(0)
    long = [f"this is the long response number {i}" for i in range(150)]
    rows = [(f"prompt {rng.randrange(150)}", rng.choice(["yes", "no", *long])) for _ in range(300)]
    rows += [(f"alone {i}", "yes") for i in range(300)]
    examples = [parse_row(dict(zip(("prompt", "response"), row, strict=True)), "", source) for row in rows]
    splits = split_examples(examples, {"val": 0.1, "test": 0.1}, seed=0)
    assert sum(map(len, splits.values())) == 600
    assert [len(splits[name]) for name in ("val", "test")] == [60, 60]
    prompts = [{row.prompt for row in rows} for rows in splits.values()]
    responses = [{row.response for row in rows if len(row.response) > 3} for rows in splits.values()]
    for sets in (prompts, responses):
        assert len(set.union(*sets)) == sum(map(len, sets))
    reverse = split_examples(examples[::-1], {"val": 0.1, "test": 0.1}, seed=0)
    assert {name: sorted(rows) for name, rows in splits.items()} == {n: sorted(rows) for n, rows in reverse.items()}


def test_groups_are_the_connected_components():
    """Oracle: grow a set until it stops growing."""
    rng = random.Random(1)
    examples = [Example(str(i), "", tuple(rng.choices("abcdefghijklmnopqrstuvwxyz", k=1 + i % 2))) for i in range(20)]
    groups = group_examples(examples)
    for i in range(20):
        keys, members = set(examples[i].keys), {i}
        for _ in range(20):
            members = {j for j in range(20) if keys & set(examples[j].keys)}
            keys = {key for j in members for key in examples[j].keys}
        assert {j for j in range(20) if groups[j] == groups[i]} == members


def test_few_rows_still_fill_each_split():
    splits = split_examples([Example(str(i), "r", (str(i),)) for i in range(4)], {"val": 0.05, "test": 0.05}, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "val": 1, "test": 1}
    with pytest.raises(
        ValueError, match=r"enough distinct pairs for 3 splits, but got 1 of 5 rows. Set `val_fraction`"
    ):
        split_examples([Example("p", "r", ("p",))] * 5, {"val": 0.1, "test": 0.1}, seed=0)


# --- questions about Python ---


@pytest.fixture(scope="module")
def questions():
    return read_python_questions()


def test_questions_have_answers_of_moderate_length(questions):
    assert 5_000 < len(questions) < 30_000
    assert len({example.prompt for example in questions}) == len(questions)
    assert all(5 <= len(example.response) <= 500 for example in questions)
    assert all(example.prompt[-1] in "?.!:)" or "?" in example.prompt for example in questions)


def test_questions_are_answered_by_the_library(questions):
    """Oracle: the imported module."""
    import inspect
    import textwrap

    answers = {example.prompt: example.response for example in questions}
    first = " ".join(inspect.getdoc(textwrap.dedent).split("\n\n")[0].split())
    assert answers["What does the function `textwrap.dedent` do?"] == first
    assert (
        answers["How is the function `textwrap.wrap` called?"] == f"`textwrap.wrap{inspect.signature(textwrap.wrap)}`"
    )
    assert answers[f"Which function of `textwrap` has this description? {first}"] == "`textwrap.dedent`"
    assert answers["What are the defaults of the function `textwrap.fill`?"] == "In `fill`, `width` is `70`."
    assert answers["What does the class `json.decoder.JSONDecodeError` derive from?"].endswith("from `ValueError`.")
    assert (
        "`JSONDecodeError`"
        in answers["Which exceptions does the method `json.decoder.JSONDecoder.raw_decode` raise itself?"]
    )
    classes = re.findall("`([^`]+)`", answers["Which public classes does the module `json.decoder` define?"])
    assert classes == ["JSONDecodeError", "JSONDecoder"]


def test_answers_of_held_out_questions_are_not_trained_on(questions):
    splits = split_examples(questions, {"val": 0.05, "test": 0.05}, seed=42)
    shares = {name: len(rows) / len(questions) for name, rows in splits.items()}
    assert shares == {
        name: pytest.approx(share, abs=0.001) for name, share in {"train": 0.9, "val": 0.05, "test": 0.05}.items()
    }
    train, val, test = (splits[name] for name in ("train", "val", "test"))
    for one, other in ((train, val), (train, test), (val, test)):
        assert not {example.response for example in one} & {example.response for example in other}
        about = [{example.keys[2] for example in rows} for rows in (one, other)]
        assert not about[0] & about[1]


def test_embedded_source_is_the_default(tmp_path, monkeypatch, questions):
    monkeypatch.setattr("lit_logits.datamodules.instructions.sources.read_python_questions", lambda: questions[::20])
    data = ready(InstructionDataModule(cache_dir=str(tmp_path), bpe_vocab_size=1000))
    assert len(data.train_dataloader()) > 50
    assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == 8
    assert not [size for size in read_sizes(data._directory, InstructionSize).values() if size.dropped]
