"""Files to evaluate with alone: all of their rows are the test split, and nothing is left to train on."""

import json

import pytest

from lit_logits.datamodules import InstructionDataModule
from lit_logits.datamodules.splitting import check_fractions
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe

ROWS = [{"prompt": f"What is {number}?", "response": f"It is {number * 7}."} for number in range(30)]


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words").mkdir()
    train_bpe([row["prompt"] + row["response"] for row in ROWS], 290, tmp_path / "words")
    return str(tmp_path / "words")


def held_out(source, words, tmp_path, **kwargs):
    data = InstructionDataModule(
        str(source), words, batch_size=4, cache_dir=str(tmp_path / "cache"), **{"val_fraction": 0.0} | kwargs
    )
    data.prepare_data()
    data.setup()
    return data


def write(file):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def responses(loader, words):
    tokenizer = load_tokenizer(words)
    labels = [row for batch in loader for row in batch["labels"]]
    return [tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in labels]


def test_a_whole_file_is_the_test_split(words, tmp_path):
    data = held_out(write(tmp_path / "pairs.jsonl"), words, tmp_path, test_fraction=1.0)
    assert responses(data.test_dataloader(), words) == [row["response"] for row in ROWS]
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="Expected"):
        data.train_dataloader()


def test_a_folder_of_a_test_file_alone(words, tmp_path):
    folder = write(tmp_path / "folder" / "test.jsonl").parent
    data = held_out(folder, words, tmp_path)
    assert responses(data.test_dataloader(), words) == [row["response"] for row in ROWS]


@pytest.mark.parametrize("fractions", [{"val": 0.1, "test": 1.0}, {"val": 0.5, "test": 0.5}, {"val": 0.0, "test": 1.1}])
def test_shares_that_do_not_add_up_are_refused(fractions):
    with pytest.raises(ValueError, match="Expected"):
        check_fractions(fractions, may_be_all=True)
    with pytest.raises(ValueError, match="Expected"):
        check_fractions({"val": 0.0, "test": 1.0})
