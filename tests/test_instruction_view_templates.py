"""Each tokenizer's own template: whose turns it writes, where the response is found, and what does not fit."""

import pytest
from instruction_pairs import CHAT, PLAIN, ready
from instruction_views import (
    TRIMMING,
    batches,
    make_views,  # noqa: F401  # a fixture
    only,
    single,
    views_folder,  # noqa: F401  # a fixture
)
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules import SourceTokenizer
from lit_logits.datamodules.instructions.layouts import ChatLayout
from lit_logits.datamodules.instructions.splits import Example, draw_shots
from lit_logits.datamodules.tokenization import load_tokenizer


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
