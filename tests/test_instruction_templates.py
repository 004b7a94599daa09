"""Templates, chat templates and shots: where a prompt is cut, what a conversation holds, and what does not fit."""

import re

import pytest
from instruction_pairs import (
    CHAT,
    PAIRS,
    make_data,  # noqa: F401  # a fixture
    pairs_folder,  # noqa: F401  # a fixture
    prompts_of,
    ready,
    texts_of,
)

from lit_logits.datamodules.instructions.layouts import ChatLayout, TemplateLayout, split_template
from lit_logits.datamodules.instructions.splits import Example, draw_shots
from lit_logits.datamodules.tokenization import load_tokenizer


@pytest.mark.parametrize(
    ("template", "shot", "prompt", "response"),
    [
        ("{prompt}{response}", "{s}t", "p", "r"),
        ("{{x}} {prompt}\n\n### {response} ###\n", "{x} {s}\n\n### t ###\n", "{x} p\n\n###", " r ###\n"),
        ("{prompt} \n {response}{{response}}", "{s} \n t{response}", "p", " \n r{response}"),
    ],
)
def test_template_is_cut_before_the_white_space(template, shot, prompt, response):
    """Double braces are braces, and those of the data are text."""
    layout = object.__new__(TemplateLayout)
    layout.pieces = split_template(template)
    for shots, before in (([], ""), ([Example("{s}", "t")], f"{shot}\n\n")):
        rendered = layout.render(Example("p", "r"), ["r"], shots)
        assert rendered[:2] == (before + prompt, [response])
        begin, end, skipped, _ = rendered.spans[0]
        assert (response[begin:end], response[:begin].strip(), skipped) == ("r", "", 0)


@pytest.mark.parametrize(
    "template", ["", "{prompt}", "{response} {prompt}", "{prompt} {response} {x}", "{prompt!r} {response}", "{", "{}"]
)
def test_template_that_is_none(make, template):
    with pytest.raises(ValueError, match="Expected `template` to"):
        make(template=template)


def test_chat_template_by_hand(make):
    data = ready(make(template="chat", system_prompt="Add."))
    responses = dict(PAIRS)
    for prompt, response in texts_of(data.test_dataloader(), data.tokenizer):
        question = re.fullmatch("<system>Add.<end>\n<user>(.*)<end>\n<assistant>", prompt).group(1)
        assert response == f"{responses[question]}<end>\n"


def test_whole_conversation_is_what_the_template_makes(make):
    data = ready(make(template="chat"))
    [batch, *_] = data.predict_dataloader()
    example = data.pairs.splits["test"][0]
    messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
    ids = data.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == ids


@pytest.mark.parametrize("response", ["r", "<thin ice", "<think>\nno"])
def test_chat_template_whose_prompt_is_not_in_the_conversation(folder, response):
    """As DeepSeek-R1's: the prompt for generation opens a thought that the conversation lacks; even if a response
    begins like the rest of it, all of that is the response.
    """
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = CHAT.replace("<assistant>", "<assistant><think>\n")
    layout = ChatLayout(tokenizer)
    for number in range(2):
        rendered = layout.render(Example(f"p{number}", response, where="row 5"), [response], [])
        assert rendered.prompt == f"<user>p{number}<end>\n<assistant>"
        assert rendered.continuations == [f"{response}<end>\n"]
        assert rendered.spans[0][:2] == (0, len(response))


def test_chat_template_that_does_not_fit(folder):
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content if m == messages[-1] }}")
    with pytest.raises(ValueError, match=r"Expected the chat template to begin a conversation with its prompt.*row 5"):
        ChatLayout(tokenizer).render(Example("p", "r", where="row 5"), ["r"], [])
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ValueError, match=r"take turns of \['system', 'user'\], but got for row 5: no system"):
        ChatLayout(tokenizer, "s").render(Example("p", "r", where="row 5"), ["r"], [])


def test_tokenizer_without_chat_template(folder, make, tmp_path):
    with pytest.raises(ValueError, match="Expected `tokenizer` to name one with a chat template, but got None"):
        make(tokenizer=None, template="chat")
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"Expected `tokenizer` to have a chat template, but '.*plain' has none"):
        make(tokenizer=str(tmp_path / "plain"), template="chat").prepare_data()


def test_shots_are_the_same_training_pairs_for_every_row(make):
    data = ready(make(num_shots=2))
    train = {f"Question: {row.prompt}\nAnswer: {row.response}" for row in data.pairs.splits["train"]}
    heads = set()
    for prompt in prompts_of(data.test_dataloader(), data.tokenizer):
        *shots, last = prompt.split("\n\n")
        assert len(shots) == 2
        assert set(shots) <= train
        assert last not in {shot[: len(last)] for shot in shots}
        heads.add(tuple(shots))
    assert len(heads) == 1
    others = ready(make(num_shots=2, seed=1))
    assert prompts_of(others.test_dataloader(), data.tokenizer)[0].split("\n\n")[:2] != [*heads.pop()]


def test_row_is_never_its_own_shot(make):
    """Three training prompts are drawn for two shots: the third stands in where the row is one of the two."""
    data = ready(make(num_shots=2, batch_size=1))
    drawn = draw_shots(data.pairs.splits["train"], 2, 42)
    stood_in = 0
    for prompt in prompts_of(data.train_dataloader(), data.tokenizer):
        *shots, last = [part.removeprefix("Question: ").partition("\nAnswer:")[0] for part in prompt.split("\n\n")]
        assert shots == [shot.prompt for shot in drawn if shot.prompt != last][:2]
        stood_in += drawn[2].prompt in shots
    assert stood_in == 2


def test_shots_of_a_chat_are_earlier_turns(make):
    data = ready(make(num_shots=1, template="chat"))
    shot = draw_shots(data.pairs.splits["train"], 1, 42)[0]
    for prompt in prompts_of(data.test_dataloader(), data.tokenizer):
        assert prompt.startswith(f"<user>{shot.prompt}<end>\n<assistant>{shot.response}<end>\n<user>")


def test_more_shots_than_pairs(make):
    with pytest.raises(ValueError, match=r"Expected `num_shots` to be below .* prompts, 80, but got 80. Lower it"):
        make(num_shots=80).prepare_data()
