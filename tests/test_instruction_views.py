"""The same pairs in several tokenizers: what each of their tokens has read of the response, in characters and bytes."""

import pytest
import torch
from instruction_pairs import PLAIN, ready
from instruction_views import (
    BATCH,
    batches,
    make_views,  # noqa: F401  # a fixture
    only,
    save,
    sequences,
    single,
    views_folder,  # noqa: F401  # a fixture
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe


def test_bytes_by_hand(make, tmp_path):
    """Of `é` and `🙂`, two and four bytes, only the last one ends at the end of a character."""
    (tmp_path / "bytes").mkdir()
    train_bpe(["x"], 257, tmp_path / "bytes")
    _, ids, ends = only(make(tokenizer=str(tmp_path / "bytes"), **single(tmp_path, "aé🙂 ")))
    assert len(ids) == 1 + 1 + 2 + 4 + 1 + 1
    assert ends == [0, 1, -1, 2, -1, -1, -1, 3, 4, -1]


def test_bytes_are_counted_within_a_character(make, tmp_path):
    """Oracle: each character of a byte-level token's name is a byte. A fallback of single bytes is counted alike."""
    (tmp_path / "bytes").mkdir()
    train_bpe(["x"], 257, tmp_path / "bytes")
    response = "aé🙂 日本 "
    [batch] = batches(make(tokenizer=str(tmp_path / "bytes"), **single(tmp_path, response)))
    [(_, ids, _)] = sequences(batch)
    size = len(response.encode())
    assert read_in_bytes(batch) == [[0, *range(1, size + 1), -1]]  # the token before the first is the space
    assert len(ids) == 1 + size + 1
    pieces = {"<eos>": 0, "<unk>": 1, "a": 2, " ": 3, "p": 4, **{f"<0x{i:02X}>": 5 + i for i in range(256)}}
    fallback = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    save(fallback, tmp_path / "fallback")
    data = make(tokenizer=str(tmp_path / "fallback"), template="{prompt} {response}", **single(tmp_path, response))
    assert read_in_bytes(batches(data)[0]) == [[0, *range(1, size + 1), -1]]


def read_in_bytes(view):
    """Bytes read after each token of the responses."""
    rows = zip(view["labels"], view["response_bytes"], strict=True)
    return [ends[labels != -100].tolist() for labels, ends in rows]


def test_bytes_of_two_tokenizers_are_the_same_places(make, folder):
    """Every token of two byte-level BPEs has a number, and it is what their names sum up to."""
    for batch in batches(make(["bpe400", "words"], predict_split="all", batch_size=7)):
        for name, view in [("bpe300", batch), ("bpe400", batch["sources"]["bpe400"])]:
            tokenizer = load_tokenizer(folder / name)
            for (_, ids, _), ends in zip(sequences(view), read_in_bytes(view), strict=True):
                names = tokenizer.convert_ids_to_tokens(ids[:-1])
                read, expected = -1, []  # the template's space is none of the response's
                for text in names:
                    read += len(text)
                    expected.append(read)
                assert ends == [*expected, -1]
        words = batch["sources"]["words"]
        for ends, characters in zip(words["response_bytes"].tolist(), words["response_ends"].tolist(), strict=True):
            assert [end < 0 for end in ends] == [end < 0 for end in characters]  # its tokens are not bytes


def test_a_normalized_character_has_no_place_within(make, tmp_path):
    """`é` is read as an `e` and an accent; the byte of the `e` is none of the text's."""
    letters = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "e": 2, "\u0301": 3, "b": 4}, unk_token="<unk>"))
    letters.normalizer = normalizers.NFD()
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    save(letters, tmp_path / "letters")
    data = make(tokenizer=str(tmp_path / "letters"), template="{prompt}{response}", **single(tmp_path, "béb"))
    assert read_in_bytes(batches(data)[0]) == [[1, -1, 3, 4, -1]]


def tiny(path, *merges, **parts):
    """A BPE of letters and a few merges."""
    pieces = [*"abcr.\n <>end|", *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(["<eos>", "<unk>", *dict.fromkeys(pieces)])}
    backend = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>"))
    for name, part in parts.items():
        setattr(backend, name, part)
    save(backend, path)
    return str(path)


@pytest.mark.parametrize(
    ("template", "tokens", "ends"),
    [
        ("{prompt} {response}", [" a", "bc", "<eos>"], [1, 3, -1]),
        ("{prompt}\n {response}", ["\n", " a", "bc", "<eos>"], [0, 1, 3, -1]),
        ("{prompt} {response}.", [" a", "b", "c.", "<eos>"], [1, 2, -1, -1]),
        ("{prompt} {response}\n.", [" a", "bc", "\n", ".", "<eos>"], [1, 3, -1, -1, -1]),
        ("{prompt}{response}", ["a", "bc", "<eos>"], [1, 3, -1]),
    ],
)
def test_template_by_hand(make, tmp_path, template, tokens, ends):
    """A token may take in white space before the response, but nothing behind it."""
    path = tiny(tmp_path / "tiny", (" ", "a"), ("c", "."), ("b", "c"))
    data = make(tokenizer=path, template=template, **single(tmp_path, "abc", "r"))
    _, ids, found = only(data)
    assert data.tokenizer.convert_ids_to_tokens(ids) == tokens
    assert found == ends


def test_token_across_the_boundary_by_hand(make, tmp_path):
    """`ra` is one token: the response is tokenised by itself, and counted by itself."""
    data = make(
        tokenizer=tiny(tmp_path / "tiny", ("r", "a")), template="{prompt}{response}", **single(tmp_path, "ab", "r")
    )
    prompt, ids, ends = only(data)
    assert [data.tokenizer.convert_ids_to_tokens(part) for part in (prompt, ids)] == [["r"], ["a", "b", "<eos>"]]
    assert ends == [1, 2, -1]


def test_characters_that_a_normalizer_drops_are_read_with_the_one_before(make, tmp_path):
    """`á` of two characters becomes one, and the other mark belongs to no token; white space waits for its token."""
    letters = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "á": 2, "b": 3, ":": 4}, unk_token="<unk>"))
    letters.normalizer = normalizers.NFC()
    isolated = pre_tokenizers.Split("", "isolated")
    letters.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), isolated])
    save(letters, tmp_path / "letters")
    _, ids, ends = only(make(tokenizer=str(tmp_path / "letters"), **single(tmp_path, "a\u0301ba\u0301  b ")))
    assert ids == [2, 3, 2, 3, 0]
    assert ends == [2, 3, 5, 8, -1]


def test_post_processor_that_cuts_white_space_off_the_offsets(folder, make, tmp_path):
    """As GPT-2's does: of a token of spaces nothing is left."""
    tokenizer = load_tokenizer(folder / "bpe300")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save_pretrained(tmp_path / "trimming")
    assert tokenizer("x  ", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (3, 3)]
    response = "Hello \n world\n\n x  "
    plain, trimmed = (
        only(make(tokenizer=str(path), **single(tmp_path, response)))
        for path in (folder / "bpe300", tmp_path / "trimming")
    )
    assert trimmed == plain
    assert max(plain[2]) == len(response)


def read_by(tokenizer, ids):
    """What tokens say, as a text without white space that the tokenizer does not keep."""
    if "words" in tokenizer.name_or_path:
        return "".join("".join(tokenizer.convert_ids_to_tokens(ids)).replace("##", "").split())
    if "unigram" in tokenizer.name_or_path:
        return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ").lstrip()
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix(" ")


@pytest.mark.parametrize("chat", [False, True])
def test_each_token_has_read_what_is_decoded_up_to_it(make, folder, chat):
    """Oracle: the tokenizers' own decoders, at every position of every response, in five of them."""
    names = ["bpe300", "bpe400", "unigram", "words"]
    chats = ["bpe400"] if chat else []
    templates = dict.fromkeys(names, PLAIN) | dict.fromkeys(chats, "chat")
    data = make(names, templates, template="chat" if chat else PLAIN, predict_split="all", batch_size=7)
    responses = [example.response for name in ("train", "val", "test") for example in ready(data).pairs.splits[name]]
    checked = dict.fromkeys([None, *names], 0)
    for batch in batches(data):
        assert set(batch) == {*BATCH, "rows", "sample_ids", "sources"}
        assert list(batch["sources"]) == names
        for name, view in [(None, batch), *batch["sources"].items()]:
            assert name is None or set(view) == BATCH
            assert view["tokenizer_id"].shape == ()
            tokenizer = load_tokenizer(folder / (name or "bpe300"))
            for row, (_, ids, ends) in zip(batch["rows"].tolist(), sequences(view), strict=True):
                response = responses[row].strip() if name in chats else responses[row]
                skipped = len(responses[row]) - len(responses[row].lstrip()) if name in chats else 0
                kept = [end for end in ends if end >= 0]
                assert kept == sorted(kept)
                assert max(kept) == len(response.rstrip() if name == "words" else response) + skipped
                for i, end in enumerate(ends[: ends.index(max(kept)) + 1]):
                    if end == -1:  # within a character
                        assert tokenizer.decode(ids[: i + 1]).endswith("\ufffd")
                        continue
                    expected = response[: max(end - skipped, 0)]
                    read = read_by(tokenizer, ids[: i + 1])
                    assert read == ("".join(expected.split()) if name == "words" else expected)
                    checked[name] += 1
    assert min(checked.values()) > 200


def test_equal_numbers_are_the_same_place(make):
    """Where both have read equally much, they have equally much left; the two BPEs meet at least at every end."""
    for batch in batches(make(["bpe400"])):
        for (_, _, one), (_, _, other) in zip(sequences(batch), sequences(batch["sources"]["bpe400"]), strict=True):
            assert max(one) == max(other)
            assert len(set(one) & set(other) - {-1}) > 1


def test_prompts_alone_have_read_nothing(make, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "and two"}\n')
    [batch] = batches(make(["words"], source={"path": str(tmp_path / "prompts.jsonl"), "response_column": None}))
    for view in (batch, batch["sources"]["words"]):
        lengths = view["attention_mask"].sum(1)
        expected = torch.full_like(view["input_ids"], -1)
        expected[torch.arange(2), lengths - 1] = 0
        assert torch.equal(view["response_ends"], expected)
        assert (view["labels"] == -100).all()
