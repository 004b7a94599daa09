"""Prompts and responses: what is masked, where the prompt ends, which rows meet, and what is refused."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from lightning.pytorch import LightningModule, Trainer
from scripts import run_script

from lit_logits import VQLogitsLM
from lit_logits.datamodules import InstructionDataModule
from lit_logits.datamodules.instructions.batches import Vocabulary, collate_examples
from lit_logits.datamodules.instructions.encoding import encode_rendered
from lit_logits.datamodules.instructions.layouts import ChatLayout, TemplateLayout, split_template
from lit_logits.datamodules.instructions.python_questions import read_python_questions
from lit_logits.datamodules.instructions.sources import PairSource, parse_row
from lit_logits.datamodules.instructions.splits import Example, draw_shots, group_examples, split_examples
from lit_logits.datamodules.instructions.storage import InstructionSize
from lit_logits.datamodules.prepared import read_sizes
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.modules import DenseLogitsHead

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PAIRS = [(f"{a} plus {b}", f"{a} and {b} give {i + j}") for i, a in enumerate(NUMBERS) for j, b in enumerate(NUMBERS)]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PROMPTS = PairSource("prompts.jsonl", response_column=None)
PLAIN = "Question: {prompt}\nAnswer: {response}"


def as_rows(pairs):
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hundred sums as JSON lines, and a byte-level BPE with a chat template."""
    folder = tmp_path_factory.mktemp("instructions")
    write_jsonl(folder / "pairs.jsonl", as_rows(PAIRS))
    (folder / "bpe").mkdir()
    train_bpe([f"Question: {prompt}\nAnswer: {response}" for prompt, response in PAIRS], 300, folder / "bpe")
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "bpe")
    return folder


@pytest.fixture
def make(folder, tmp_path):
    def build(**kwargs):
        defaults = {"source": str(folder / "pairs.jsonl"), "tokenizer": str(folder / "bpe")}
        sizes = {"batch_size": 4, "val_fraction": 0.1, "test_fraction": 0.1, "cache_dir": str(tmp_path / "cache")}
        return InstructionDataModule(**{**defaults, **sizes, **kwargs})

    return build


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def texts_of(loader, tokenizer):
    """(prompt, response with what ends it) of every sequence, read off the labels."""
    pairs = []
    for batch in loader:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            response = labels[labels != -100]
            prompt = ids[: int(mask.sum()) - len(response)]
            pairs.append((tokenizer.decode(prompt), tokenizer.decode(response)))
    return pairs


def prompts_of(loader, tokenizer):
    return [prompt for prompt, _ in texts_of(loader, tokenizer)]


def test_batch_by_hand():
    """Prompt [5, 6] with response [8, 9, 1]; prompt [5] with response [1]; the pad token may be a real one."""
    rows = [
        {"row": 3, "sample_id": 2**62, "prompt": [5, 6], "responses": [[8, 9, 1]], "ends": [[2, 5, -1]]},
        {"row": 0, "sample_id": 17, "prompt": [5], "responses": [[1]], "ends": [[-1]]},
    ]
    rows = [
        {**row, "byte_ends": [[2 * end if end > 0 else end for end in row["ends"][0]]], "correct": 0} for row in rows
    ]
    batch = collate_examples(rows, Vocabulary(pad_token_id=1, tokenizer_id=2**61))
    assert batch["input_ids"].tolist() == [[5, 6, 8, 9, 1], [5, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9, 1], [-100, 1, -100, -100, -100]]
    assert batch["response_ends"].tolist() == [[-1, 0, 2, 5, -1], [0, -1, -1, -1, -1]]
    assert batch["response_bytes"].tolist() == [[-1, 0, 4, 10, -1], [0, -1, -1, -1, -1]]
    assert batch["rows"].tolist() == [3, 0]
    assert batch["sample_ids"].tolist() == [2**62, 17]
    assert batch["tokenizer_id"].item() == 2**61
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    tokens = {"input_ids", "attention_mask", "labels", "response_ends", "response_bytes", "tokenizer_id", "layout_id"}
    assert set(batch) == {*tokens, "rows", "sample_ids"}


def test_choices_by_hand():
    first = {"prompt": [5], "responses": [[7], [8, 9]], "ends": [[1], [2, -1]], "correct": 1}
    second = {"prompt": [5, 6], "responses": [[7], [8], [9]], "ends": [[1], [2], [3]], "correct": 0}
    rows = [{"row": 0, "sample_id": 70, **first}, {"row": 1, "sample_id": 71, **second}]
    rows = [{**row, "byte_ends": row["ends"]} for row in rows]
    vocabulary = Vocabulary(pad_token_id=0, tokenizer_id=1)
    batch = collate_examples(rows, vocabulary, all_choices=True)
    assert batch["input_ids"].tolist() == [[5, 7, 0], [5, 8, 9], [5, 6, 7], [5, 6, 8], [5, 6, 9]]
    assert batch["labels"].tolist()[1] == [-100, 8, 9]
    assert batch["response_ends"].tolist() == [[0, 1, -1], [0, 2, -1], [-1, 0, 1], [-1, 0, 2], [-1, 0, 3]]
    assert batch["rows"].tolist() == [0, 0, 1, 1, 1]
    assert batch["sample_ids"].tolist() == [70, 70, 71, 71, 71]
    assert batch["choices"].tolist() == [0, 1, 0, 1, 2]
    assert batch["correct"].tolist() == [0, 1, 1, 0, 0]
    assert collate_examples(rows, vocabulary)["input_ids"].tolist() == [[5, 8, 9], [5, 6, 7]]


def test_every_pair_is_there_once_with_its_response_labelled(make):
    data = ready(make())
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        pairs = texts_of(loader, data.tokenizer)
        assert len(pairs) >= 10
        seen += pairs
    assert len(seen) == len(set(seen)) == 100
    expected = {(f"Question: {prompt}\nAnswer:", f" {response}<|endoftext|>") for prompt, response in PAIRS}
    assert set(seen) == expected


def test_ids_are_the_tokens_of_both_parts(make):
    """Oracle: `tokenizers` on the prompt part and on the response part, joined."""
    data = ready(make())
    encode = data.tokenizer.backend_tokenizer.encode
    for batch in data.val_dataloader():
        for row, ids, mask in zip(batch["rows"], batch["input_ids"], batch["attention_mask"], strict=True):
            prompt, response = data.pairs.splits["val"][row][:2]
            start, end = encode(f"Question: {prompt}\nAnswer:").ids, encode(f" {response}").ids
            assert ids[mask.bool()].tolist() == [*start, *end, data.tokenizer.eos_token_id]


def test_token_that_would_span_the_boundary_is_split():
    class Merging:
        """Knows `ab` as one token, and the letters."""

        eos_token_id = 0

        def __call__(self, texts, **_):
            pieces = [list(re.finditer("ab|.", text)) for text in texts]
            ids = [[{"a": 1, "b": 2, "ab": 3}[piece.group()] for piece in row] for row in pieces]
            return {"input_ids": ids, "offset_mapping": [[piece.span() for piece in row] for row in pieces]}

    layout = object.__new__(TemplateLayout)
    layout.pieces, layout.before, layout.after = ("", "", ""), [9], [0]
    rendered = [layout.render(Example("a", "b"), ["b", "a"], [])]
    ends = [[1, -1], [1, -1]]
    assert encode_rendered(rendered, layout, Merging()) == [([9, 1], [[2, 0], [1, 0]], ends, ends, [])]


def test_begin_token_is_added_where_the_tokenizer_adds_one(folder, make, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <|endoftext|>", special_tokens=[("<bos>", bos), ("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "bos")
    data = ready(make(tokenizer=str(tmp_path / "bos")))
    for batch in data.test_dataloader():
        assert (batch["input_ids"][:, 0] == bos).all()
        assert (batch["input_ids"] == bos).sum() == len(batch["rows"])
        assert ((batch["labels"] == 0).sum(1) == 1).all()
    chat = ready(make(tokenizer=str(tmp_path / "bos"), template="chat"))
    assert all((batch["input_ids"] != bos).all() for batch in chat.test_dataloader())  # the template writes none


@pytest.mark.parametrize(
    ("template", "shot", "prompt", "response"),
    [
        ("{prompt}{response}", "{s}t", "p", "r"),
        ("{{x}} {prompt}\n\n### {response} ###\n", "{x} {s}\n\n### t ###\n", "{x} p\n\n###", " r ###\n"),
        ("{prompt} \n {response}{{response}}", "{s} \n t{response}", "p", " \n r{response}"),
    ],
)
def test_template_is_cut_before_the_white_space(template, shot, prompt, response):
    """Double braces are braces, and those of the data are text."""
    layout = object.__new__(TemplateLayout)
    layout.pieces = split_template(template)
    for shots, before in (([], ""), ([Example("{s}", "t")], f"{shot}\n\n")):
        rendered = layout.render(Example("p", "r"), ["r"], shots)
        assert rendered[:2] == (before + prompt, [response])
        begin, end, skipped, _ = rendered.spans[0]
        assert (response[begin:end], response[:begin].strip(), skipped) == ("r", "", 0)


@pytest.mark.parametrize(
    "template", ["", "{prompt}", "{response} {prompt}", "{prompt} {response} {x}", "{prompt!r} {response}", "{", "{}"]
)
def test_template_that_is_none(make, template):
    with pytest.raises(ValueError, match="Expected `template` to"):
        make(template=template)


def test_chat_template_by_hand(make):
    data = ready(make(template="chat", system_prompt="Add."))
    responses = dict(PAIRS)
    for prompt, response in texts_of(data.test_dataloader(), data.tokenizer):
        question = re.fullmatch("<system>Add.<end>\n<user>(.*)<end>\n<assistant>", prompt).group(1)
        assert response == f"{responses[question]}<end>\n"


def test_whole_conversation_is_what_the_template_makes(make):
    data = ready(make(template="chat"))
    [batch, *_] = data.predict_dataloader()
    example = data.pairs.splits["test"][0]
    messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
    ids = data.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == ids


@pytest.mark.parametrize("response", ["r", "<thin ice", "<think>\nno"])
def test_chat_template_whose_prompt_is_not_in_the_conversation(folder, response):
    """As DeepSeek-R1's: the prompt for generation opens a thought that the conversation lacks; even if a response
    begins like the rest of it, all of that is the response.
    """
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = CHAT.replace("<assistant>", "<assistant><think>\n")
    layout = ChatLayout(tokenizer)
    for number in range(2):
        rendered = layout.render(Example(f"p{number}", response, where="row 5"), [response], [])
        assert rendered.prompt == f"<user>p{number}<end>\n<assistant>"
        assert rendered.continuations == [f"{response}<end>\n"]
        assert rendered.spans[0][:2] == (0, len(response))


def test_chat_template_that_does_not_fit(folder):
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content if m == messages[-1] }}")
    with pytest.raises(ValueError, match=r"Expected the chat template to begin a conversation with its prompt.*row 5"):
        ChatLayout(tokenizer).render(Example("p", "r", where="row 5"), ["r"], [])
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ValueError, match=r"take turns of \['system', 'user'\], but got for row 5: no system"):
        ChatLayout(tokenizer, "s").render(Example("p", "r", where="row 5"), ["r"], [])


def test_tokenizer_without_chat_template(folder, make, tmp_path):
    with pytest.raises(ValueError, match="Expected `tokenizer` to name one with a chat template, but got None"):
        make(tokenizer=None, template="chat")
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"Expected `tokenizer` to have a chat template, but '.*plain' has none"):
        make(tokenizer=str(tmp_path / "plain"), template="chat").prepare_data()


def test_shots_are_the_same_training_pairs_for_every_row(make):
    data = ready(make(num_shots=2))
    train = {f"Question: {row.prompt}\nAnswer: {row.response}" for row in data.pairs.splits["train"]}
    heads = set()
    for prompt in prompts_of(data.test_dataloader(), data.tokenizer):
        *shots, last = prompt.split("\n\n")
        assert len(shots) == 2
        assert set(shots) <= train
        assert last not in {shot[: len(last)] for shot in shots}
        heads.add(tuple(shots))
    assert len(heads) == 1
    others = ready(make(num_shots=2, seed=1))
    assert prompts_of(others.test_dataloader(), data.tokenizer)[0].split("\n\n")[:2] != [*heads.pop()]


def test_row_is_never_its_own_shot(make):
    """Three training prompts are drawn for two shots: the third stands in where the row is one of the two."""
    data = ready(make(num_shots=2, batch_size=1))
    drawn = draw_shots(data.pairs.splits["train"], 2, 42)
    stood_in = 0
    for prompt in prompts_of(data.train_dataloader(), data.tokenizer):
        *shots, last = [part.removeprefix("Question: ").partition("\nAnswer:")[0] for part in prompt.split("\n\n")]
        assert shots == [shot.prompt for shot in drawn if shot.prompt != last][:2]
        stood_in += drawn[2].prompt in shots
    assert stood_in == 2


def test_shots_of_a_chat_are_earlier_turns(make):
    data = ready(make(num_shots=1, template="chat"))
    shot = draw_shots(data.pairs.splits["train"], 1, 42)[0]
    for prompt in prompts_of(data.test_dataloader(), data.tokenizer):
        assert prompt.startswith(f"<user>{shot.prompt}<end>\n<assistant>{shot.response}<end>\n<user>")


def test_more_shots_than_pairs(make):
    with pytest.raises(ValueError, match=r"Expected `num_shots` to be below .* prompts, 80, but got 80. Lower it"):
        make(num_shots=80).prepare_data()


def test_too_long_is_cut_or_dropped(make, tmp_path):
    """`x` is a byte a token here: prompts `Q` + x of 5, 9 and 10 tokens under a limit of 10, responses of 6 and eos."""
    rows = as_rows([("Q" + "ü" * n, "z" * 6) for n in (2, 4)] + [("Q" + "ü" * 4 + "?", "zz")])
    source = write_jsonl(tmp_path / "long.jsonl", rows)
    options = {"source": source, "template": "{prompt}{response}", "val_fraction": 0, "test_fraction": 0}
    data = make(max_length=10, batch_size=1, **options)
    tokens = [len(data.tokenizer.encode(row["prompt"])) for row in rows]
    assert tokens == [5, 9, 10]
    ready(data)
    lengths = {}
    for batch in data.train_dataloader():
        assert batch["attention_mask"].sum() == batch["input_ids"].numel() == 10
        lengths[batch["rows"].item()] = (batch["labels"] != -100).sum().item()
    assert lengths == {0: 5, 1: 1}
    size = read_sizes(data._directory, InstructionSize)["train"]
    assert size == (2, 6, 2, 1)
    assert str(size) == "2 examples, 6 response tokens (2 truncated, 1 dropped, see `max_length`)"


def test_prompts_for_evaluation_that_are_too_long_are_left_out(make, tmp_path):
    """One once stopped everything. Rows keep their numbers, and `finished_rows` are numbers of rows."""
    pairs = [*PAIRS, *((f"{'ü' * 50} {i}", "long") for i in range(100))]
    source = write_jsonl(tmp_path / "long.jsonl", as_rows(pairs))
    data = make(source=source, max_length=60, val_fraction=0.2, test_fraction=0.2, batch_size=1)
    with pytest.warns(UserWarning, match=r"Of the 40 examples of the split 'test', \d+ are left out, .* `max_length`"):
        data.prepare_data()
    data.setup()
    examples = data.pairs.splits["test"]
    kept = [row for row, example in enumerate(examples) if example.response != "long"]
    assert 0 < len(kept) < 40
    assert [batch["rows"].item() for batch in data.predict_dataloader()] == kept
    assert [batch["rows"].item() for batch in data.test_dataloader()] == kept
    assert len(data.val_dataloader()) == sum(example.response != "long" for example in data.pairs.splits["val"])
    data.finished_rows |= set(kept[1::2])
    assert [batch["rows"].item() for batch in data.predict_dataloader()] == kept[::2]


def test_a_split_of_prompts_that_are_all_too_long(make, tmp_path):
    source = write_jsonl(tmp_path / "long.jsonl", as_rows([(f"{'ü' * 50} {i}", "long") for i in range(100)]))
    message = r"Expected the prompt of row 0 \(line \d+ of .*long.jsonl\) to have at most 59 tokens, but got 1\d\d. "
    with pytest.raises(
        ValueError, match=message + "Raise `max_length` or shorten it. So it is with all 80 of the split"
    ):
        make(source=source, max_length=60).prepare_data()


def test_a_column_of_teachers_is_in_the_batches(make, tmp_path):
    """One name a sequence, in every loader; the pairs are the same samples as without it."""
    rows = [{**row, "who": f"model {i % 3}"} for i, row in enumerate(as_rows(PAIRS))]
    source = {"path": write_jsonl(tmp_path / "taught.jsonl", rows), "teacher_column": "who"}
    of_prompt = {row["prompt"]: row["who"] for row in rows}
    data, plain = ready(make(source=source)), ready(make())
    assert data.fingerprint != plain.fingerprint
    for name, loader in (("train", data.train_dataloader()), ("test", data.test_dataloader())):
        for batch in loader:
            examples = data.pairs.splits[name]
            assert batch["teachers"] == [of_prompt[examples[row].prompt] for row in batch["rows"].tolist()]
    samples = [{n for batch in one.val_dataloader() for n in batch["sample_ids"].tolist()} for one in (data, plain)]
    assert samples[0] == samples[1]
    assert "teachers" not in next(iter(plain.test_dataloader()))
    rows[7]["who"] = ""
    with pytest.raises(ValueError, match="the column 'who' to hold text, but got an empty teacher in line 8"):
        make(source={**source, "path": write_jsonl(tmp_path / "gap.jsonl", rows)}).prepare_data()
    with pytest.raises(ValueError, match="`teacher_column` to be None for the source 'python-questions'"):
        PairSource("python-questions", teacher_column="who")


def test_prompts_only_are_all_for_predict(make, tmp_path):
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt, _ in PAIRS])
    data = ready(make(source={"path": source, "response_column": None}))
    pairs = texts_of(data.predict_dataloader(), data.tokenizer)
    assert pairs == [(f"Question: {prompt}\nAnswer:", "") for prompt, _ in PAIRS]
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"a source with responses to train on, .* Set `response_column`"):
        data.train_dataloader()
    longest = max(len(data.tokenizer.encode(prompt)) for prompt, _ in pairs)
    for limit, found in ((longest, len(PAIRS)), (longest - 1, None)):  # no room for a response is needed
        data = make(source={"path": source, "response_column": None}, max_length=limit)
        if found is None:
            with pytest.warns(UserWarning, match="are left out"):
                data.prepare_data()
            found = sum(len(data.tokenizer.encode(prompt)) < longest for prompt, _ in pairs)
        assert sum(len(batch["rows"]) for batch in ready(data).predict_dataloader()) == found


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


def choice_rows():
    """Sums with three choices, the right one at any place, given as its number, itself, or its number as a text."""
    rows = []
    for i, a in enumerate(NUMBERS):
        for j, b in enumerate(NUMBERS):
            place = (i + 2 * j) % 3
            options = [f"as much as {i + j}", "a lot", "nothing at all"]
            options = options[-place:] + options[:-place]
            label = [place, options[place], str(place)][i % 3]
            rows.append({"prompt": f"{a} plus {b}", "options": options, "label": label, "right": f"as much as {i + j}"})
    return rows


@pytest.fixture
def make_choices(make, tmp_path):
    source = write_jsonl(tmp_path / "choices.jsonl", choice_rows())
    columns = {"choices_column": "options", "answer_column": "label"}
    return lambda path=source, **kwargs: make(source={"path": path, **columns}, **kwargs)


@pytest.mark.parametrize("chat", [False, True])
def test_choices_are_sequences_of_a_test_batch(make_choices, chat):
    data = ready(make_choices(template="chat" if chat else PLAIN, num_shots=1, batch_size=3))
    rows = {row["prompt"]: row for row in choice_rows()}
    begin, end = ("", "<end>\n") if chat else (" ", "<|endoftext|>")
    batches = list(data.test_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [9, 9, 9, 3]
    for batch in batches:
        assert all(len(tensor) == len(batch["rows"]) for tensor in batch.values() if tensor.ndim)
        for n, (_, response) in enumerate(texts_of([batch], data.tokenizer)):
            row = rows[data.pairs.splits["test"][batch["rows"][n]].prompt]
            assert batch["choices"][n] == n % 3
            assert response == begin + row["options"][n % 3] + end
            assert batch["correct"][n] == (row["options"][n % 3] == row["right"])
    assert {int(batch["correct"].sum()) for batch in batches} == {3, 1}


def test_other_batches_hold_the_right_choice(make_choices):
    data = ready(make_choices())
    right = {row["prompt"]: row["right"] for row in choice_rows()}
    loaders = [data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()]
    seen = 0
    for loader in loaders:
        assert all("choices" not in batch for batch in loader)
        for prompt, response in texts_of(loader, data.tokenizer):
            question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
            assert response == f" {right[question]}<|endoftext|>"
            seen += 1
    assert seen == 100
    assert read_sizes(data._directory, InstructionSize)["test"].examples == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["one"]}, r"to hold lists of at least 2 texts, but got \['one'\] in line 1 of"),
        ({"options": "one"}, "to hold lists of at least 2 texts, but got 'one' in line 1 of"),
        ({"options": ["one", ""]}, "to hold lists of at least 2 texts"),
        ({"label": 3}, r"Expected the column 'label' to hold a choice or its number, in \[0, 3\), but got 3 in line 1"),
        ({"label": -1}, "but got -1 in line 1"),
        ({"label": "other"}, "but got 'other' in line 1"),
        ({"label": None}, "but got None in line 1"),
    ],
)
def test_choices_that_are_none(make_choices, tmp_path, change, message):
    rows = choice_rows()
    rows[0] |= change
    with pytest.raises(ValueError, match=message):
        make_choices(write_jsonl(tmp_path / "bad.jsonl", rows)).prepare_data()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "Expected `batch_size` to be at least 1, but got 0."),
        ({"max_length": 1}, "Expected `max_length` to be at least 2, but got 1."),
        ({"num_shots": -1}, "Expected `num_shots` to be at least 0, but got -1."),
        ({"max_test_rows": 0}, "Expected `max_test_rows` to be at least 1, but got 0."),
        ({"bpe_vocab_size": 256}, "Expected `bpe_vocab_size` to be at least 257, but got 256."),
        ({"test_fraction": 1.0}, r"Expected `test_fraction` to be in \[0, 1\), but got 1.0."),
        ({"system_prompt": "s"}, "Expected `system_prompt` to be None without a `template` of 'chat', but got 's'."),
        (
            {"source": {"path": "x", "choices_column": "c"}},
            "`choices_column` and `answer_column` to be set both or neither, but got 'c' and",
        ),
        (
            {"source": {"path": "python-questions", "choices_column": "c", "answer_column": "a"}},
            "Expected `choices_column` to be None for the source 'python-questions'",
        ),
        ({"source": PROMPTS, "num_shots": 1}, "`num_shots` to be 0 where `response_column` is None"),
        ({"source": PROMPTS, "tokenizer": None}, "Expected `tokenizer` to be set"),
    ],
)
def test_argument_out_of_range(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_trained_tokenizer_has_read_the_training_split_only(make, tmp_path):
    data = make(tokenizer=None, bpe_vocab_size=290)
    train = [f"Question: {prompt}\nAnswer: {response}" for prompt, response, *_ in data.pairs.splits["train"]]
    (tmp_path / "oracle").mkdir()
    train_bpe(train, 290, tmp_path / "oracle")
    assert data.tokenizer.get_vocab() == load_tokenizer(tmp_path / "oracle").get_vocab()
    assert data.vocab_size == 290
    assert data.pad_token_id == data.tokenizer.eos_token_id == 0


def test_tokenizer_without_pad_token_pads_with_eos(folder, make, tmp_path):
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    data = make(tokenizer=str(tmp_path / "unpadded"))
    assert data.tokenizer.pad_token_id is None
    assert data.pad_token_id == data.tokenizer.eos_token_id


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


QUIET = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Recorder(LightningModule):
    """Writes down the rows that it completed a step on and saves a checkpoint at one of them."""

    def __init__(self, save_at=None, path=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.save_at, self.path = [], save_at, path

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["rows"].tolist())
        return self.weight**2

    def on_train_batch_end(self, *_):
        if len(self.seen) == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch["rows"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


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
from test_instructions import QUIET, InstructionDataModule, Recorder, Trainer

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


def test_tiny_model_is_fitted_and_tested(make):
    """Two steps of a real module on padded batches; its loss is the mean over response tokens alone."""
    data = make(max_test_rows=4)
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = VQLogitsLM({**config, "num_attention_heads": 2}, vocab_size=data.vocab_size, head=DenseLogitsHead)
    trainer = Trainer(**QUIET, max_steps=2, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 2
    loss = trainer.test(model, datamodule=data, verbose=False)[0]["test/loss"]
    [batch] = data.test_dataloader()
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], batch["attention_mask"])[:, :-1]
    losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert loss == pytest.approx(losses[labels != -100].mean().item(), rel=1e-4)


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
