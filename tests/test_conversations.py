"""Conversations of several turns: what is learned of them, what has been read, and what is refused."""

import json

import pytest
import torch

from lit_logits import GLDFusionModule
from lit_logits.datamodules import InstructionDataModule, PairSource
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.modules import new_causal_lm

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = CHAT.replace("m.content", "m.content | trim").replace("<end>", "[END]")
SYSTEM = [("system", "Be brief.")]
TALK = [("user", "Hi"), ("assistant", "Hello 🙂"), ("user", "And é?"), ("assistant", "日本, é"), ("user", "Bye")]
SHORT = [("user", "One?"), ("assistant", "One and two.")]


def write(path, rows, column="messages"):
    rows = [{column: [{"role": role, "content": content} for role, content in turns]} for turns in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizers of bytes and of more, each with a template of its own."""
    folder = tmp_path_factory.mktemp("conversations")
    for name, size, template in (("bytes", 257, CHAT), ("more", 300, TRIMMING), ("same", 300, CHAT)):
        (folder / name).mkdir()
        train_bpe([f"<user>{turn}<end> <assistant>[END]" for _, turn in (*TALK, *SHORT)] * 3, size, folder / name)
        tokenizer = load_tokenizer(folder / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    return folder


def build(folder, tmp_path, rows, tokenizer="bytes", **kwargs):
    source = PairSource(write(tmp_path / "talks.jsonl", rows), messages_column="messages")
    options = {"template": "chat", "val_fraction": 0, "test_fraction": 0, "batch_size": len(rows)}
    options |= {"predict_split": "all", "cache_dir": str(tmp_path / "cache")}
    data = InstructionDataModule(source, tokenizer=str(folder / tokenizer), **{**options, **kwargs})
    data.prepare_data()
    data.setup()
    return data


def only_batch(data):
    [batch] = data.predict_dataloader()
    return batch


def learned(view, tokenizer, row=0):
    """The texts of the runs of labels."""
    runs, last = [], -2
    for place in (view["labels"][row] != -100).nonzero().flatten().tolist():
        runs += [[]] if place != last + 1 else []
        runs[-1].append(int(view["labels"][row, place]))
        last = place
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("tokenizer", ["bytes", "more"])
def test_the_assistants_turns_are_learned(folder, tmp_path, tokenizer):
    """With what ends them; the rest is what the template makes of the conversation, up to the last of them."""
    data = build(folder, tmp_path, [TALK, SHORT], tokenizer)
    batch, end = only_batch(data), "<end>\n" if tokenizer == "bytes" else "[END]\n"
    for row, talk in enumerate([TALK[:4], SHORT]):
        said = [content + end for role, content in talk if role == "assistant"]
        assert learned(batch, data.tokenizer, row) == said
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert data.tokenizer.decode(ids) == "".join(f"<{role}>{content}{end}" for role, content in talk)


def test_bytes_that_are_read_by_hand(folder, tmp_path):
    """Of `Hello 🙂`, a line break and `日本, é`; a token is a byte. The break is read before the second turn."""
    batch = only_batch(build(folder, tmp_path, [TALK]))
    text = bytes("".join(f"<{role}>{content}<end>\n" for role, content in TALK[:4]), "utf-8")
    expected, base = [-1] * len(text), 0
    for said in ("Hello 🙂", "日本, é"):
        size, start = len(said.encode()), text.index(said.encode())
        for place in range(size + 1):
            expected[start - 1 + place] = base + place
        base += size + 1
    assert batch["response_bytes"][0].tolist() == expected
    characters = batch["response_ends"][0]
    assert characters.max() == len("Hello 🙂\n日本, é")
    assert (characters.diff()[(characters[1:] >= 0) & (characters[:-1] >= 0)] >= 0).all()


def test_a_conversation_of_one_turn_is_a_pair(folder, tmp_path):
    """In every tensor but its number, also where the template trims, and with a system prompt."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": SHORT[0][1], "response": " " + SHORT[1][1]}) + "\n")
    talk = [SHORT[0], ("assistant", " " + SHORT[1][1])]
    for tokenizer in ("bytes", "more"):
        options = {"system_prompt": "Be brief.", "source_tokenizers": {"other": str(folder / "more")}}
        data = build(folder, tmp_path, [talk], tokenizer, **options)
        data_of_pairs = InstructionDataModule(
            str(tmp_path / "pairs.jsonl"),
            tokenizer=str(folder / tokenizer),
            template="chat",
            val_fraction=0,
            test_fraction=0,
            predict_split="all",
            batch_size=1,
            cache_dir=str(tmp_path / "cache"),
            **options,
        )
        data_of_pairs.prepare_data()
        data_of_pairs.setup()
        ours, theirs = only_batch(data), only_batch(data_of_pairs)
        for one, other in ((ours, theirs), (ours["sources"]["other"], theirs["sources"]["other"])):
            names = {"input_ids", "labels", "response_ends", "response_bytes", "attention_mask"}
            assert all(torch.equal(one[name], other[name]) for name in names)
        assert int(ours["sample_ids"]) != int(theirs["sample_ids"])


def test_a_system_turn_of_its_own_takes_the_place_of_the_system_prompt(folder, tmp_path):
    data = build(folder, tmp_path, [[*SYSTEM, *TALK], SHORT], system_prompt="Be long.")
    texts = [data.tokenizer.decode(ids) for ids in only_batch(data)["input_ids"]]
    assert texts[0].startswith("<system>Be brief.<end>\n<user>Hi")
    assert texts[1].startswith("<system>Be long.<end>\n<user>One?")


def test_turns_are_aligned_across_tokenizers_and_templates(folder, tmp_path):
    """Equal places have read the same text of the same turn; a model of another tokenizer teaches all turns."""
    talk = [("user", "Hi"), ("assistant", "One and two. "), ("user", "And"), ("assistant", "two and one 🙂"), *SHORT]
    data = build(folder, tmp_path, [talk], source_tokenizers={"other": str(folder / "more")})
    batch = only_batch(data)
    view = batch["sources"]["other"]
    whole = "One and two. \ntwo and one 🙂\nOne and two.".encode()
    for tokens, tokenizer in ((batch, data.tokenizer), (view, load_tokenizer(folder / "more"))):
        places = tokens["response_bytes"][0]
        assert (places[places >= 0].diff() > 0).all()  # no two positions are one place
        labels = tokens["labels"][0]
        for place in range(1, len(places)):
            if labels[place] != -100 and places[place] > 0:
                piece = tokenizer.convert_ids_to_tokens(int(labels[place]))
                size = len(piece)  # in both, a character of a name is a byte
                raw = whole[int(places[place]) - size : int(places[place])]
                assert len(raw) == size
    own, other = (set(tokens["response_bytes"][0].tolist()) - {-1} for tokens in (batch, view))
    assert {0, 14, 14 + 16} <= own & other  # the beginnings of turns, of which the first is stripped in one of them
    tokenizers = {"pivot": data.tokenizer, "other": load_tokenizer(folder / "more")}
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape["num_attention_heads"] = 2
    models = {name: new_causal_lm({**shape, "vocab_size": len(one)}) for name, one in tokenizers.items()}
    fusion = GLDFusionModule(models["pivot"], {"other": models["other"]}, terms={"chunk": 1.0, "uld": 1.0}, top_k=4)
    losses = fusion.losses(batch)
    counts = int((batch["labels"] != -100).sum())
    labelled = {
        int(end)
        for end, label in zip(batch["response_bytes"][0, :-1], batch["labels"][0, 1:], strict=True)
        if label != -100
    }
    assert float(losses.sources["other"].aligned) == pytest.approx(len((labelled & other) - {-1}) / counts)
    assert losses.terms["other"]["chunk"].isfinite().all()


def test_a_conversation_that_is_too_long_is_cut_at_its_end(folder, tmp_path):
    data = build(folder, tmp_path, [TALK], max_length=41)
    assert learned(only_batch(data), data.tokenizer) == ["Hello 🙂<end>\n"]
    with pytest.raises(ValueError, match=r"the prompt of row 0 .* to have at most 19 tokens, but got 25"):
        build(folder, tmp_path, [TALK], max_length=20)


TEMPLATES = {
    "ends the last turn alone": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        ["Hello 🙂", "日本, é<end>"],
    ),
    "asks to think": (
        CHAT.replace("add_generation_prompt %}<assistant>", "add_generation_prompt %}<assistant><think>\n"),
        ["Hello 🙂<end>\n", "日本, é<end>\n"],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_other_kinds(folder, tmp_path, name):
    template, expected = TEMPLATES[name]
    tokenizer = load_tokenizer(folder / "bytes")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "other")
    data = build(tmp_path, tmp_path, [TALK], "other")
    assert learned(only_batch(data), data.tokenizer) == expected


def test_a_template_that_changes_turns_before_the_last_is_refused(folder, tmp_path):
    """As those do that drop what was thought."""
    tokenizer = load_tokenizer(folder / "bytes")
    tokenizer.chat_template = CHAT.replace("m.content", "(m.content if loop.last else 'x')")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"to write turn 2 of line 1 of .*, 'Hello 🙂', as it is or stripped, and alike"
    ):
        build(tmp_path, tmp_path, [TALK], "other")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hi"}, "a list of turns with a `role` and a `content` that are texts in line 1"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "a list of turns"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "turns of the role 'assistant' with text in line 1"),
        ({"talk": []}, r"`messages_column` to be one of \['talk'\], but got 'messages'"),
    ],
)
def test_rows_that_are_no_conversations(folder, tmp_path, row, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    source = PairSource(str(tmp_path / "x.jsonl"), messages_column="messages")
    data = InstructionDataModule(source, str(folder / "bytes"), template="chat", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        data.prepare_data()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"template": "{prompt}{response}"},
        {"num_shots": 1},
        {"source_tokenizers": {"a": {"tokenizer": "b", "template": "{prompt}{response}"}}},
    ],
)
def test_conversations_ask_for_chat_templates(kwargs):
    source = PairSource("x.jsonl", messages_column="messages")
    with pytest.raises(ValueError, match="`template: chat`, of the sources too, and `num_shots` to be 0"):
        InstructionDataModule(source, "bytes", **{"template": "chat", **kwargs})
    with pytest.raises(ValueError, match="`choices_column` to be None beside a `messages_column`"):
        PairSource("x.jsonl", choices_column="c", answer_column="a", messages_column="messages")
