"""What tokens stand for, whatever the alphabet of a vocabulary: the same bytes in every one of them."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lit_logits.datamodules.tokenization import load_tokenizer, token_bytes, train_bpe
from lit_logits.functional import match_vocabularies
from lit_logits.modules.language_models.tokenizers import find_tokenizer, token_table

TEXTS = ["the cat sat on the mat", "the café, naïve 日本語 🙂", "one two three the end"] * 20


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(TEXTS, 300, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("日本 x", special=False)])
    return tokenizer


def fast(backend, **kwargs):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", **kwargs)


@pytest.fixture(scope="module")
def unigram():
    """Writes a space as ▁, and has a fallback for every byte, the `a` of which is a token too."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=special[:2], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    state = json.loads(backend.to_str())
    state["model"]["vocab"] += [[token, -20.0] for token in special[2:]]
    state["model"]["byte_fallback"] = True
    return fast(Tokenizer.from_str(json.dumps(state)))


@pytest.fixture(scope="module")
def words():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, **special))
    return fast(backend)


@pytest.mark.parametrize("text", ["the cat sat", "naïve 日本語 🙂 x"])
def test_tokens_of_bytes_join_to_the_text(byte_level, unigram, text):
    """Oracle: the text itself. A space before the first word is that of the Metaspace."""
    for tokenizer, before in ((byte_level, ""), (unigram, " ")):
        table = token_table(tokenizer)
        pieces = [table[number] for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert None not in pieces
        assert b"".join(pieces) == (before + text).encode()


def test_word_pieces_have_the_space_before_a_word(words):
    table = token_table(words)
    ids = words("the cat sat on", add_special_tokens=False)["input_ids"]
    assert b"".join(table[number] for number in ids) == b" the cat sat on"


def test_what_stands_for_no_text(byte_level, unigram):
    """Special tokens, and a fallback of a byte that has a token of its own; added text stands as it is written."""
    table = token_table(byte_level)
    assert len(table) == len(byte_level)
    none = {number for number, text in enumerate(table) if text is None}
    assert none == {byte_level.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert table[byte_level.convert_tokens_to_ids("日本 x")] == "日本 x".encode()
    table = token_table(unigram)
    assert table[unigram.convert_tokens_to_ids("<0xF0>")] == b"\xf0"
    for letter in ("e", "t"):
        assert table[unigram.convert_tokens_to_ids(letter)] == letter.encode()
        assert table[unigram.convert_tokens_to_ids(f"<0x{ord(letter):02X}>")] is None


def test_vocabularies_of_any_alphabet_are_matched_by_text(byte_level, unigram, words):
    tables = [token_table(tokenizer) for tokenizer in (byte_level, unigram, words)]
    for other, tokenizer, name, own_name in ((1, unigram, "▁", "Ġ"), (2, words, "the", "Ġthe")):
        matched = match_vocabularies(tables[0], tables[other])
        assert int(matched[tokenizer.convert_tokens_to_ids(name)]) == byte_level.convert_tokens_to_ids(own_name)
        for number, own in enumerate(matched.tolist()):
            assert own == -1 or tables[0][own] == tables[other][number]
        assert (matched >= 0).sum() > 5


def test_both_layers_read_a_token_alike(byte_level):
    """The data's side may not import the models' side."""
    added = set(byte_level.added_tokens_decoder)
    table = token_table(byte_level)
    for token, number in byte_level.get_vocab().items():
        assert number in added or token_bytes(token) == table[number]


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    """transformers 5.3 made one of 8 tokens of the config alone, and a source's logits were cut to 8."""
    LlamaConfig(vocab_size=40).save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path)) is None
    with pytest.raises(ValueError, match="holds no file of a tokenizer"):
        find_tokenizer(str(tmp_path), required=True)
