"""Sixty pairs, four tokenizers, a data module that reads the pairs in several of them, and what its batches hold."""

import json

import pytest
from instruction_pairs import CHAT, ready
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules import InstructionDataModule
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe

__all__ = [
    "BATCH",
    "PAIRS",
    "PIECES",
    "TRIMMING",
    "batches",
    "make_views",
    "only",
    "save",
    "sequences",
    "single",
    "views_folder",
    "write_jsonl",
]

PIECES = [
    "Hello",
    " world",
    ".\n",
    "\n\n",
    "  two",
    " 🙂",
    "🏳️‍🌈",
    " naïve",
    " Größe",
    "日本語",
    " x = f(1)\n    y",
    " 123",
    "!",
]
PAIRS = [(f"Say number {i}", PIECES[i % 13].lstrip() + PIECES[i * 5 % 13] + PIECES[i * 7 % 11]) for i in range(60)]
PAIRS = [(prompt, response if response.strip() else "ok") for prompt, response in PAIRS]
TRIMMING = CHAT.replace("m.content", "m.content | trim").replace("<end>", "[END]")
BATCH = {"input_ids", "attention_mask", "labels", "response_ends", "response_bytes", "tokenizer_id", "layout_id"}


def write_jsonl(path, pairs):
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    return str(path)


def save(backend, path, chat_template=None, eos="<eos>"):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)


@pytest.fixture(name="folder", scope="module")
def views_folder(tmp_path_factory):
    """Sixty pairs, byte-level BPEs of 300 and 400 tokens, a Unigram that writes ▁, and a WordPiece."""
    folder = tmp_path_factory.mktemp("views")
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    texts = [f"Question: {prompt}\nAnswer: {response}" for prompt, response in PAIRS]
    for size, template in ((300, CHAT), (400, TRIMMING)):
        (folder / f"bpe{size}").mkdir()
        train_bpe(texts, size, folder / f"bpe{size}")
        tokenizer = load_tokenizer(folder / f"bpe{size}")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / f"bpe{size}")
    special = ["<unk>", "<eos>"]
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    quiet = {"special_tokens": special, "show_progress": False}
    unigram.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **quiet))
    save(unigram, folder / "unigram")
    words = Tokenizer(models.WordPiece(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=150, **quiet))
    save(words, folder / "words")
    return folder


@pytest.fixture(name="make")
def make_views(folder, tmp_path):
    def build(sources=(), templates=None, **kwargs):
        settings = {"source": str(folder / "pairs.jsonl"), "tokenizer": str(folder / "bpe300"), "batch_size": 4}
        shares = {"val_fraction": 0.1, "test_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        own = templates or {}
        others = {name: {"tokenizer": str(folder / name), "template": own.get(name)} for name in sources} or None
        return InstructionDataModule(**{**settings, **shares, "source_tokenizers": others, **kwargs})

    return build


def batches(data):
    return list(ready(data).predict_dataloader())


def sequences(view):
    """Prompt, response and its ends of each sequence, read off the labels."""
    rows = zip(view["input_ids"], view["labels"], view["response_ends"], strict=True)
    for ids, labels, ends in rows:
        first, end = int((labels != -100).int().argmax()), int((labels != -100).nonzero().max()) + 1
        assert ends[first - 1] == 0
        assert (ends[: first - 1] == -1).all()
        assert (ends[end:] == -1).all()
        yield ids[:first].tolist(), ids[first:end].tolist(), ends[first:end].tolist()


def only(data):
    [batch] = batches(data)
    [sequence] = sequences(batch)
    return sequence


def single(tmp_path, response, prompt="p"):
    options = {"val_fraction": 0, "predict_split": "all", "test_fraction": 0}
    return {"source": write_jsonl(tmp_path / "one.jsonl", [(prompt, response)]), **options}
