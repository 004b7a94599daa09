"""The same pairs in several tokenizers: what each token has read, what each model's template makes, whose ids stay."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from scripts import run_script
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules import InstructionDataModule, SourceTokenizer
from lit_logits.datamodules.instructions.layouts import ChatLayout
from lit_logits.datamodules.instructions.splits import Example, draw_shots
from lit_logits.datamodules.instructions.storage import InstructionSize
from lit_logits.datamodules.prepared import read_sizes
from lit_logits.datamodules.tokenization import load_tokenizer, tokenizer_id, train_bpe

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
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = CHAT.replace("m.content", "m.content | trim").replace("<end>", "[END]")
BATCH = {"input_ids", "attention_mask", "labels", "response_ends", "response_bytes", "tokenizer_id", "layout_id"}
QUIET = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def write_jsonl(path, pairs):
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    return str(path)


def save(backend, path, chat_template=None, eos="<eos>"):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)


PLAIN = "Question: {prompt}\nAnswer: {response}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
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


@pytest.fixture
def make(folder, tmp_path):
    def build(sources=(), templates=None, **kwargs):
        settings = {"source": str(folder / "pairs.jsonl"), "tokenizer": str(folder / "bpe300"), "batch_size": 4}
        shares = {"val_fraction": 0.1, "test_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        own = templates or {}
        others = {name: {"tokenizer": str(folder / name), "template": own.get(name)} for name in sources} or None
        return InstructionDataModule(**{**settings, **shares, "source_tokenizers": others, **kwargs})

    return build


def ready(data):
    data.prepare_data()
    data.setup()
    return data


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


# --- what has been read ---


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


# --- chat templates ---


def test_each_model_has_its_own_chat_template(make, folder):
    names = ["bpe300", "bpe400", "words"]
    templates = {"bpe300": PLAIN, "words": PLAIN}
    data = make(names, templates, template="chat", system_prompt="Be short.", num_shots=1)
    [shot] = [shot for shot in draw_shots(ready(data).pairs.splits["train"], 1, 42)][:1]
    for batch in batches(data):
        for row, number in enumerate(batch["rows"].tolist()):
            prompt, response = data.pairs.splits["test"][number][:2]
            texts = {}
            for name, view in [(None, batch), *batch["sources"].items()]:
                ids = view["input_ids"][row][view["attention_mask"][row].bool()]
                texts[name] = load_tokenizer(folder / (name or "bpe300")).decode(
                    ids, clean_up_tokenization_spaces=False
                )
            turns = [("system", "Be short."), ("user", shot.prompt), ("assistant", shot.response)]
            turns += [("user", prompt), ("assistant", response)]
            assert texts[None] == "".join(f"<{role}>{text}<end>\n" for role, text in turns)
            assert texts["bpe400"] == "".join(f"<{role}>{text.strip()}[END]\n" for role, text in turns)
            filled = f"Question: {shot.prompt}\nAnswer: {shot.response}\n\nQuestion: {prompt}\nAnswer: {response}"
            assert texts["bpe300"] == f"{filled}<|endoftext|>"
            assert "Be" not in texts["words"]


@pytest.mark.parametrize("template", ["chat", "Q: {prompt} A: {response}"])
def test_sources_follow_the_data_module_by_default(make, template):
    data = make(["bpe300", "bpe400"], template=template)
    assert [view.template for view in data._sources.values()] == [template] * 2
    assert make(["bpe400"], {"bpe400": PLAIN}, template="chat")._sources["bpe400"].template == PLAIN
    assert make(["bpe400"], {"bpe400": "chat"}, system_prompt="s")._sources["bpe400"].system_prompt == "s"


def test_a_source_may_have_a_template_and_a_system_prompt_of_its_own(make, folder):
    tokenizer = str(folder / "bpe300")
    plain = SourceTokenizer(tokenizer, "{prompt} = {response}")
    others = {"plain": plain, "chat": {"tokenizer": tokenizer, "template": "chat", "system_prompt": "Own."}}
    data = make(template="chat", system_prompt="Ours.", source_tokenizers={**others, "same": tokenizer})
    [prompt, response] = ready(data).pairs.splits["test"][0][:2]
    batch = next(iter(data.test_dataloader()))
    views = {"ours": batch, **batch["sources"]}
    texts = {
        name: data.tokenizer.decode(view["input_ids"][0][view["attention_mask"][0].bool()])
        for name, view in views.items()
    }
    turns = f"<user>{prompt}<end>\n<assistant>{response}<end>\n"
    assert texts["ours"] == texts["same"] == f"<system>Ours.<end>\n{turns}"
    assert texts["chat"] == f"<system>Own.<end>\n{turns}"
    assert texts["plain"] == f"{prompt} = {response}<|endoftext|>"
    assert data.layout_ids["same"] == data.layout_ids[""]
    assert len(set(data.layout_ids.values())) == 3


def render(folder, template, response):
    tokenizer = load_tokenizer(folder / "bpe300")
    tokenizer.chat_template = template
    return ChatLayout(tokenizer).render(Example("p", response, where="row 5"), [response], [])


@pytest.mark.parametrize(
    ("template", "response", "span"),
    [
        (CHAT, " end ", (0, 5, 0, 0)),
        (TRIMMING, " \n end ", (0, 3, 3, 3)),
        (TRIMMING, "\u3000end", (0, 3, 1, 3)),
        (
            CHAT.replace("<{{ m.role }}>", "<{{ m.role }}>{% if m.role == 'assistant' %}the end: {% endif %}"),
            "end",
            (9, 12, 0, 0),
        ),
        (CHAT.replace("m.content", "m.content.lstrip('\n')"), "\n\n x ", (1, 2, 3, 3)),
        (CHAT.replace("m.content", "m.content.rstrip()"), "  x ", (2, 3, 2, 2)),
    ],
    ids=["as it is", "trimmed", "wide space trimmed", "opening", "newlines trimmed", "end trimmed"],
)
def test_response_is_found_in_its_turn(folder, template, response, span):
    """Behind what stands at every turn's beginning, though that holds the same word."""
    rendered = render(folder, template, response)
    assert rendered.spans == [span]


def test_template_that_changes_the_response_is_refused(folder):
    message = (
        r"Expected the chat template to keep the response of row 5, 'Yes', or to strip .* got 'YES<end>\\n'. Use a"
    )
    with pytest.raises(ValueError, match=message):
        render(folder, CHAT.replace("m.content", "m.content | upper"), "Yes")


def test_tokens_before_a_trimmed_response_have_read_nothing_and_the_first_all_that_was_stripped(make, tmp_path, folder):
    data = make(tokenizer=str(folder / "bpe400"), template="chat", **single(tmp_path, " \n z "))
    _, ids, ends = only(data)
    assert data.tokenizer.convert_ids_to_tokens(ids)[0] == "z"
    assert ends[0] == 4
    assert set(ends[1:]) == {-1}


# --- sample ids and vocabularies ---


def ids_of(data):
    """Sample id → texts, of all splits."""
    found = {}
    data = ready(data)
    for name, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        for batch in loader:
            for row, number in zip(batch["rows"].tolist(), batch["sample_ids"].tolist(), strict=True):
                found[number] = data.pairs.splits[name][row][:2]
    assert data.batch_size == 1  # else a last batch of training is left out
    for batch in data.train_dataloader():
        found[batch["sample_ids"].item()] = data.pairs.splits["train"][batch["rows"].item()][:2]
    return found


def test_sample_ids_are_of_the_content(make, folder):
    first = ids_of(make(batch_size=1))
    assert set(first.values()) == set(PAIRS)
    assert len(first) == 60
    assert all(0 <= number < 2**63 for number in first)
    text = repr((None, [], *PAIRS[3])).encode()
    assert first[int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1] == PAIRS[3]
    others = [{"seed": 1, "test_fraction": 0.4}, {"tokenizer": str(folder / "bpe400"), "template": "chat"}]
    for other in (*others, {"template": "{prompt} {response}", "sources": ["words"], "max_length": 60}):
        assert ids_of(make(batch_size=1, **other)) == first
    changed = [{"num_shots": 1}, {"num_shots": 2}, {"num_shots": 1, "seed": 2}]
    seen = set(first)
    for other in (*changed, {"template": "chat", "system_prompt": "s"}):
        new = ids_of(make(batch_size=1, **other))
        assert len(new) == 60
        assert not seen & set(new)
        seen |= set(new)


def test_tokenizer_ids_tell_vocabularies_apart(make, folder):
    """The formula is shared with the models' side, which may not import this one."""
    [batch, *_] = batches(make(["bpe300", "bpe400", "words"]))
    found = {name: view["tokenizer_id"].item() for name, view in batch["sources"].items()}
    assert batch["tokenizer_id"] == found["bpe300"]
    assert len(set(found.values())) == 3
    assert batch["tokenizer_id"].dtype == torch.long
    for name, number in found.items():
        tokenizer = load_tokenizer(folder / name)
        tokens = {i: token for token, i in tokenizer.get_vocab().items()}
        text = "\n".join(f"{i} {tokens[i]}" for i in range(len(tokens)))
        assert number == tokenizer_id(tokenizer) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2


# --- storage ---


def test_responses_are_cut_in_each_tokenizer(make):
    whole = batches(make(["bpe400"], batch_size=100, predict_split="all"))[0]
    cut = batches(make(["bpe400"], batch_size=100, max_length=18, predict_split="all"))[0]
    shorter = []
    for one, other in ((cut, whole), (cut["sources"]["bpe400"], whole["sources"]["bpe400"])):
        lengths = other["attention_mask"].sum(1).clamp(max=18)
        assert torch.equal(one["attention_mask"].sum(1), lengths)
        assert one["input_ids"].shape[1] == 18
        for row, length in enumerate(lengths):
            for name in ("input_ids", "labels", "response_ends"):
                assert torch.equal(one[name][row, :length], other[name][row, :length])
        shorter.append(int((other["attention_mask"].sum(1) > 18).sum()))
    assert shorter[0] > shorter[1] > 0


def test_pair_is_dropped_for_all_if_it_is_too_long_for_one(make, tmp_path):
    """A byte a token is much for the first tokenizer; the words of the other are few."""
    (tmp_path / "bytes").mkdir()
    train_bpe(["x"], 257, tmp_path / "bytes")
    pairs = [("Say number 1", "Hello world"), ("Say number 1 " * 3, "Hello"), ("Say", "number")]
    source = write_jsonl(tmp_path / "long.jsonl", pairs)
    options = {
        "source": source,
        "template": "{prompt}{response}",
        "val_fraction": 0,
        "test_fraction": 0,
        "batch_size": 1,
    }
    other = {"source_tokenizers": {"bytes": str(tmp_path / "bytes")}}
    for kwargs in (other, {"tokenizer": str(tmp_path / "bytes"), "sources": ["bpe400"]}):
        data = ready(make(max_length=30, **kwargs, **options))
        found = [(batch["rows"].item(), list(batch["sources"])) for batch in data.train_dataloader()]
        assert sorted(row for row, _ in found) == [0, 2]
        assert read_sizes(data._directory, InstructionSize)["train"].dropped == 1
    ready(make(max_length=30, **options))  # it has room in the other one
    data = make(max_length=30, **other, **{**options, "source": single_test_set(tmp_path, pairs)})
    with pytest.warns(UserWarning, match="Of the 3 examples of the split 'test', 1 are left out"):
        data.prepare_data()
    with pytest.raises(ValueError, match=r"to have at most 9 tokens of `source_tokenizers\['bytes'\]`, but got 12"):
        make(max_length=10, **other, **{**options, "source": str(tmp_path / "set")}).prepare_data()


def single_test_set(tmp_path, pairs):
    """A folder for `load_dataset` whose test split is too long."""
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", pairs[:1])
    write_jsonl(tmp_path / "set" / "test.jsonl", pairs)
    return str(tmp_path / "set")


@pytest.mark.parametrize("own", [True, False])
def test_response_without_tokens_is_named(make, tmp_path, own):
    """A BPE without an unknown token says nothing of letters that it has not."""
    save(Tokenizer(models.BPE({"<eos>": 0, "<unk>": 1, "p": 2, " ": 3}, [])), tmp_path / "silent")
    settings = {"template": "{prompt} {response}", **single(tmp_path, "xyz", "p")}
    name = "`tokenizer`" if own else r"`source_tokenizers\['s'\]`"
    path = str(tmp_path / "silent")
    chosen = {"tokenizer": path} if own else {"source_tokenizers": {"s": path}}
    with pytest.raises(
        ValueError, match=f"Expected the response of line 1 of .* to give tokens, but {name} gives none"
    ):
        make(**chosen, **settings).prepare_data()


def test_sources_are_part_of_the_fingerprint(make, folder):
    chat = str(folder / "bpe400")
    prints = {
        make(**kwargs).fingerprint
        for kwargs in (
            {},
            {"sources": ["bpe400"]},
            {"source_tokenizers": {"other": str(folder / "bpe400")}},
            {"source_tokenizers": {"bpe400": str(folder / "bpe300")}},
            {"sources": ["bpe400"], "templates": {"bpe400": "chat"}},
            {"sources": ["bpe400"], "templates": {"bpe400": "chat"}, "system_prompt": "s"},
            {"source_tokenizers": {"bpe400": {"tokenizer": chat, "template": "chat", "system_prompt": "t"}}},
            {"sources": ["bpe400", "words"]},
            {"predict_split": "all"},
        )
    }
    assert len(prints) == 9
    one, other = (make(sources).fingerprint for sources in (["bpe400", "words"], ["words", "bpe400"]))
    assert one == other


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"source_tokenizers": {"x": {"tokenizer": "x", "chat": True}}},
            r"Expected `source_tokenizers\['x'\]` to have keys of \['tokenizer', 'template', 'system_prompt'\], but",
        ),
        ({"source_tokenizers": {"x": {"template": "chat"}}}, r"and to give \['tokenizer'\], but got \['template'\]"),
        ({"source": {"subset": "x"}}, r"Expected `source` to have keys of .* and to give \['path'\], but got"),
        ({"sources": ["words"], "templates": {"words": "{prompt}"}}, "Expected `template` to be 'chat', or to hold"),
        (
            {"source_tokenizers": {"x": {"tokenizer": "x", "system_prompt": "s"}}},
            r"Expected the `system_prompt` of `source_tokenizers\['x'\]` to be None where its `template` is not 'chat'",
        ),
        ({"sources": ["words"], "system_prompt": "s"}, "Expected `system_prompt` to be None without a `template` of"),
        ({"predict_split": "train"}, "Expected `predict_split` to be 'test' or 'all', but got 'train'."),
    ],
)
def test_argument_that_fits_no_other(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_other_tokenizer_that_does_not_serve_is_named(make, tmp_path):
    message = r"Expected `source_tokenizers\['words'\]` to have a chat template, .* Set its `template` to a text"
    with pytest.raises(ValueError, match=message):
        make(["words"], {"words": "chat"}).prepare_data()
    with pytest.raises(ValueError, match=r"Expected `source_tokenizers\['g'\]` to be a hub id, a local folder, or a"):
        make(source_tokenizers={"g": str(tmp_path / "none.gguf")}).prepare_data()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"Expected `source_tokenizers\['e'\]` to have an end-of-sequence token"):
        make(source_tokenizers={"e": str(tmp_path / "endless")}).prepare_data()


def test_multiple_choice(make, tmp_path):
    """A test batch has all choices and no sources, the others the right choice in all tokenizers."""
    rows = [{"prompt": f"Say {i}", "options": ["no", f"{i}", "é"], "label": i % 3} for i in range(20)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "choices.jsonl"), "choices_column": "options", "answer_column": "label"}
    data = ready(make(["bpe400"], source=source, batch_size=2))
    right = {}
    for batch in data.predict_dataloader():
        for view in (batch, batch["sources"]["bpe400"]):
            for row, number, (_, _, ends) in zip(
                batch["rows"].tolist(), batch["sample_ids"].tolist(), sequences(view), strict=True
            ):
                right[row] = number
                assert max(ends) == len(data.pairs.splits["test"][row].response)
    for batch in data.test_dataloader():
        assert set(batch) == {*BATCH, "rows", "sample_ids", "choices", "correct"}
        assert batch["sample_ids"].tolist() == [right[row] for row in batch["rows"].tolist()]
        assert len(batch["sample_ids"].unique()) * 3 == len(batch["rows"])
        for row, choice, (_, _, ends) in zip(
            batch["rows"].tolist(), batch["choices"].tolist(), sequences(batch), strict=True
        ):
            assert max(ends) == len(data.pairs.splits["test"][row].choices[choice])


# --- predict over all splits ---


class Recorder(LightningModule):
    """Gives the batches back."""

    def predict_step(self, batch, batch_idx):
        return batch


def predict(data):
    return Trainer(**QUIET).predict(Recorder(), datamodule=data) or []


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other)


def test_all_splits_are_predicted_once(make):
    data = make(["words"], predict_split="all", batch_size=7)
    found = predict(data)
    assert [len(batch["rows"]) for batch in found] == [7] * 8 + [4]
    assert [row for batch in found for row in batch["rows"].tolist()] == list(range(60))
    splits = [ready(data).pairs.splits[name] for name in ("train", "val", "test")]
    texts = [example[:2] for split in splits for example in split]
    known = ids_of(make(batch_size=1))
    assert [known[number] for batch in found for number in batch["sample_ids"].tolist()] == texts
    workers = make(["words"], predict_split="all", batch_size=7, num_workers=1)
    assert all(map(same, found, predict(workers)))


def test_resumed_run_makes_the_very_same_batches(make):
    """One sample of a batch that is missing brings all of it back; rows of the other mode mean nothing."""
    data = make(["bpe400"], predict_split="all", batch_size=7)
    whole = predict(data)
    samples = [batch["sample_ids"].tolist() for batch in whole]
    data.finished_rows |= set(range(60))
    assert len(predict(data)) == 9
    data.finished_samples |= {*samples[0], *samples[3][:6], *samples[8]}
    left = predict(data)
    assert len(left) == 7
    assert all(map(same, left, [*whole[1:8]]))
    data.finished_samples |= {number for numbers in samples for number in numbers}
    assert predict(data) == []


def test_finished_samples_mean_nothing_for_the_test_split(make):
    data = make()
    numbers = {number for batch in batches(data) for number in batch["sample_ids"].tolist()}
    data.finished_samples |= numbers
    assert [row for batch in batches(data) for row in batch["rows"].tolist()] == list(range(12))


def test_finished_batches_fill_up_for_the_ranks(make):
    data = make(predict_split="all", batch_size=7)
    whole = [batch["sample_ids"].tolist() for batch in batches(data)]
    data.finished_samples |= {number for numbers in whole[:8] for number in numbers}
    data.trainer = SimpleNamespace(world_size=3)
    assert [batch["sample_ids"].tolist() for batch in data.predict_dataloader()] == [whole[8], whole[0], whole[1]]


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from test_instruction_views import QUIET, InstructionDataModule, Recorder, Trainer

class Writer(Recorder):
    def predict_step(self, batch, batch_idx):
        with open({out!r} + f"/{{self.name}}{{self.global_rank}}", "a") as file:
            file.write(json.dumps([batch["rows"].tolist(), batch["sample_ids"].tolist()]) + "\\n")

if __name__ == "__main__":
    data = InstructionDataModule({source!r}, tokenizer={bpe!r}, source_tokenizers={{"other": {other!r}}}, batch_size=7,
                                 val_fraction=0.1, test_fraction=0.2, cache_dir={out!r} + "/cache", predict_split="all")
    for name in ("first", "second"):
        model = Writer()
        model.name = name
        Trainer(**QUIET, devices=2, strategy="ddp_fork").predict(model, datamodule=data, return_predictions=False)
        lines = [json.loads(line) for rank in "01" for line in open({out!r} + f"/{{name}}{{rank}}")]
        data.finished_samples |= {{number for rows, numbers in lines if rows[0] % 3 for number in numbers}}
"""


@pytest.mark.slow
def test_two_processes_predict_each_batch_once(folder, tmp_path):
    """Two gloo ranks share nine batches; then the three that were not finished, and no batch is another one."""
    settings = {"source": folder / "pairs.jsonl", "bpe": folder / "bpe300", "other": folder / "bpe400", "out": tmp_path}
    run_script(
        tmp_path / "run.py", SCRIPT.format(tests=str(Path(__file__).parent), **{k: str(v) for k, v in settings.items()})
    )

    def rows(name):
        ranks = [(tmp_path / f"{name}{rank}").read_text().splitlines() for rank in (0, 1)]
        return [[json.loads(line)[0] for line in lines] for lines in ranks]

    whole = [list(range(start, min(start + 7, 60))) for start in range(0, 60, 7)]
    first, second = rows("first"), rows("second")
    assert [len(lines) for lines in first] == [5, 4]
    assert sorted(first[0] + first[1]) == whole
    assert [len(lines) for lines in second] == [2, 1]
    assert sorted(second[0] + second[1]) == [batch for batch in whole if batch[0] % 3 == 0]
