"""Where prompt and response meet, and where sequences begin and end: no space and no token too many."""

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules import InstructionDataModule

VOCABULARY = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab", "▁b", "bb"]
MERGES = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "b"), ("b", "b")]
KINDS: dict[str, dict[str, Any]] = {
    "always": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")},
    "first": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
    "in a sequence": {
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always")]),
    },
    "normalizer": {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
    "normalizer alone": {"normalizer": normalizers.Prepend("▁")},
}


def save(path, kind="always", chat_template=None):
    """A tokenizer as of SentencePiece, which writes a space before the first word."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>"))
    for name, part in KINDS[kind].items():
        setattr(backend, name, part)
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return str(path)


def only_batch(tmp_path, response, **kwargs):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a", "response": response}) + "\n")
    options = {"val_fraction": 0, "test_fraction": 0, "predict_split": "all", "batch_size": 1}
    options["cache_dir"] = str(tmp_path / "cache")
    data = InstructionDataModule(str(tmp_path / "one.jsonl"), **{**options, **kwargs})
    data.prepare_data()
    data.setup()
    [batch] = data.predict_dataloader()
    return batch


def pieces(ids):
    return [VOCABULARY[number] for number in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_no_space_comes_in_where_a_template_has_none(tmp_path, kind):
    """`ab` would be one token over the boundary, so the response is tokenised by itself: it had a `▁` before it."""
    tokenizer = save(tmp_path / kind.replace(" ", "-"), kind)
    batch = only_batch(tmp_path, "bb", tokenizer=tokenizer, template="{prompt}{response}")
    assert pieces(batch["input_ids"][0]) == ["<s>", "▁a", "bb", "</s>"]
    assert batch["response_bytes"][0].tolist() == [-1, 0, 2, -1]
    spaced = only_batch(tmp_path, "bb", tokenizer=tokenizer, template="{prompt} {response}")
    if kind != "normalizer alone":  # it does not know a space
        assert pieces(spaced["input_ids"][0]) == ["<s>", "▁a", "▁b", "b", "</s>"]


@pytest.mark.parametrize(
    ("template", "response"),
    [
        ("<s>{prompt} {response}</s>", "ab"),
        ("<s>{prompt} {response}", "ab"),
        ("{prompt} {response}</s>", "ab"),
        ("{prompt} {response}", "ab</s>"),
    ],
)
def test_tokens_that_begin_and_end_a_sequence_are_not_doubled(tmp_path, template, response):
    """Written by a template or in the data, and put there by the layout."""
    tokenizer = save(tmp_path / "tokenizer")
    batch = only_batch(tmp_path, response, tokenizer=tokenizer, template=template)
    assert pieces(batch["input_ids"][0]) == ["<s>", "▁a", "▁ab", "</s>"]
    assert torch.equal(batch["labels"][0, 2:], batch["input_ids"][0, 2:])


CHAT = "<s>{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"


def test_a_chat_template_and_data_that_both_write_the_end(tmp_path):
    tokenizer = save(tmp_path / "tokenizer", chat_template=CHAT)
    batch = only_batch(tmp_path, "ab", tokenizer=tokenizer, template="chat")
    assert pieces(batch["input_ids"][0])[-1:] == ["</s>"]
    assert int((batch["input_ids"] == 1).sum()) == int((batch["input_ids"] == 2).sum()) == 1
    with pytest.raises(
        ValueError, match=r"Expected '</s>' once at a place, .* of line 1 of .* Take it out of the data"
    ):
        only_batch(tmp_path, "ab</s>", tokenizer=tokenizer, template="chat")
