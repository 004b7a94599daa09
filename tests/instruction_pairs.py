"""A hundred sums as prompts and responses, a tokenizer with a chat template, and a data module of both."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule

from lit_logits.datamodules import InstructionDataModule
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe

__all__ = [
    "CHAT",
    "NUMBERS",
    "PAIRS",
    "PLAIN",
    "QUIET",
    "Recorder",
    "as_rows",
    "make_data",
    "pairs_folder",
    "prompts_of",
    "ready",
    "texts_of",
    "write_jsonl",
]

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PAIRS = [(f"{a} plus {b}", f"{a} and {b} give {i + j}") for i, a in enumerate(NUMBERS) for j, b in enumerate(NUMBERS)]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PLAIN = "Question: {prompt}\nAnswer: {response}"


def as_rows(pairs):
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]


@pytest.fixture(name="folder", scope="module")
def pairs_folder(tmp_path_factory):
    """A hundred sums as JSON lines, and a byte-level BPE with a chat template."""
    folder = tmp_path_factory.mktemp("instructions")
    write_jsonl(folder / "pairs.jsonl", as_rows(PAIRS))
    (folder / "bpe").mkdir()
    train_bpe([f"Question: {prompt}\nAnswer: {response}" for prompt, response in PAIRS], 300, folder / "bpe")
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "bpe")
    return folder


@pytest.fixture(name="make")
def make_data(folder, tmp_path):
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
