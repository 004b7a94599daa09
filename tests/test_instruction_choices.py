"""Multiple choice: all choices in test batches, the right one in the others, and choices that are refused."""

import pytest
from instruction_pairs import (
    NUMBERS,
    PLAIN,
    make_data,  # noqa: F401  # a fixture
    pairs_folder,  # noqa: F401  # a fixture
    ready,
    texts_of,
    write_jsonl,
)

from lit_logits.datamodules.instructions.batches import Vocabulary, collate_examples
from lit_logits.datamodules.instructions.storage import InstructionSize
from lit_logits.datamodules.prepared import read_sizes


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
