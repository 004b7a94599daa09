"""From prompt–response pairs to token ids: templates, earlier turns, and where the prompt ends.

A prompt's ids are always a prefix of the whole sequence's. White space between prompt and response belongs to the
response, where a byte-level BPE wants it: `"Answer:"`, then `" 42"`.
"""

from collections.abc import Sequence
from string import Formatter
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.instruction_splits import Example

__all__ = [
    "ChatLayout",
    "Encoded",
    "Encoder",
    "Layout",
    "Rendered",
    "TemplateLayout",
    "chat_template_of",
    "encode_rendered",
    "split_template",
]


class Rendered(NamedTuple):
    """An example as text: the prompt, and what follows it with each of the responses."""

    prompt: str
    continuations: list[str]


class Encoded(NamedTuple):
    """An example as token ids: the prompt, and what follows it with each of the responses."""

    prompt: list[int]
    responses: list[list[int]]


class Layout(Protocol):
    """Makes one text of shots, prompt and response.

    Attributes:
        before: ids that start every sequence.
        after: ids that end every response.
    """

    before: list[int]
    after: list[int]

    def render(self, example: Example, responses: Sequence[str], shots: Sequence[Example]) -> Rendered:
        """Return the example as text, after the shots, with each of the responses."""


def split_template(template: str) -> tuple[str, str, str]:
    r"""Return what a template puts before `{prompt}`, between `{prompt}` and `{response}`, and after `{response}`.

    Raises:
        ValueError: Unless it holds both once, in this order, and nothing else in braces.

    Example:
        >>> split_template("Question: {prompt}\nAnswer: {response}")
        ('Question: ', '\nAnswer: ', '')
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"Expected `template` to be a format string, but got {template!r}: {error}") from error
    if [field[1:] for field in pieces if field[1] is not None] != [("prompt", "", None), ("response", "", None)]:
        raise ValueError(
            "Expected `template` to hold {prompt} and, after it, {response}, once each and nothing else in braces, but "
            f"got {template!r}. Double other braces."
        )
    texts = [""]
    for literal, name, _, _ in pieces:
        texts[-1] += literal
        if name is not None:
            texts.append("")
    before, between, after = texts
    return before, between, after


class TemplateLayout:
    """Fills a template; shots are filled templates before it, with an empty line between.

    A begin-of-sequence token is put where the tokenizer puts one, and the eos token after the response.

    Args:
        template: holds `{prompt}` and, after it, `{response}`.
        tokenizer: tells the ids that begin and end a sequence.
    """

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.pieces = split_template(template)
        self.before = _begin(tokenizer)
        self.after = [tokenizer.eos_token_id]

    def render(self, example: Example, responses: Sequence[str], shots: Sequence[Example]) -> Rendered:
        """Return the example as text, after the shots, with each of the responses."""
        before, between, after = self.pieces
        filled = [f"{before}{shot.prompt}{between}{shot.response}{after}" for shot in shots]
        text = "\n\n".join([*filled, f"{before}{example.prompt}{between}"])
        prompt = text.rstrip()
        return Rendered(prompt, [f"{text[len(prompt) :]}{response}{after}" for response in responses])


class ChatLayout:
    """The tokenizer's own chat template: prompts are the user's turns, responses the assistant's, shots earlier turns.

    Special tokens are those that the template writes.

    Args:
        tokenizer: with a chat template.
        system_prompt: text of a system turn before all others.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, system_prompt: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        self.before: list[int] = []
        self.after: list[int] = []

    def render(self, example: Example, responses: Sequence[str], shots: Sequence[Example]) -> Rendered:
        """Return the conversation up to the assistant's turn, and that turn with each of the responses.

        Raises:
            ValueError: If the template refuses the conversation, or does not begin it with the prompt.
        """
        turns = [turn for shot in shots for turn in (_turn("user", shot.prompt), _turn("assistant", shot.response))]
        messages = [*self.system, *turns, _turn("user", example.prompt)]
        prompt = self._apply(messages, example, add_generation_prompt=True)
        continuations = []
        for response in responses:
            whole = self._apply([*messages, _turn("assistant", response)], example, add_generation_prompt=False)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"Expected the chat template to begin a conversation with its prompt, but got {prompt!r} and "
                    f"{whole!r} for {example.where}. Use a `template` with `chat_template=False`."
                )
            continuations.append(whole[len(prompt) :])
        return Rendered(prompt, continuations)

    def _apply(self, messages: list[dict[str, str]], example: Example, *, add_generation_prompt: bool) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise ValueError(
                f"Expected the chat template to take turns of {roles}, but got for {example.where}: {error}"
            ) from error
        return text


class Encoder:
    """Makes token ids of examples.

    Args:
        layout: makes the texts.
        tokenizer: makes the ids.
        shots: what `draw_shots` drew.
    """

    def __init__(self, layout: Layout, tokenizer: PreTrainedTokenizerFast, shots: Sequence[Example] = ()) -> None:
        self.layout, self.tokenizer, self.shots = layout, tokenizer, shots

    def __call__(self, examples: Sequence[Example], *, all_choices: bool = False) -> list[Encoded]:
        """Encode each example with its response, or with each of its choices; without one, a single empty response."""
        rendered = []
        for example in examples:
            shots = [shot for shot in self.shots if shot.prompt != example.prompt][: max(len(self.shots) - 1, 0)]
            responses = example.choices if all_choices and example.choices else (example.response,)
            rendered.append(self.layout.render(example, [text for text in responses if text], shots))
        encoded = encode_rendered(rendered, self.layout, self.tokenizer)
        return [Encoded(prompt, responses or [[]]) for prompt, responses in encoded]


def encode_rendered(rendered: Sequence[Rendered], layout: Layout, tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Tokenise rendered examples.

    A continuation's ids are what follows the prompt's ids in the whole text. Where a token would span the boundary, it
    is tokenised by itself.
    """

    def tokenize(texts: list[str]) -> list[list[int]]:
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return ids["input_ids"] if texts else []

    texts = [text for prompt, rest in rendered for text in (prompt, *(prompt + end for end in rest))]
    ids = iter(tokenize(texts))
    encoded = []
    for _, rest in rendered:
        prompt = next(ids)
        responses = []
        for end in rest:
            whole = next(ids)
            tokens = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenize([end])[0]
            responses.append([*tokens, *layout.after])
        encoded.append(Encoded([*layout.before, *prompt], responses))
    return encoded


def chat_template_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the tokenizer's chat template.

    Raises:
        ValueError: If it has none.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"Expected `tokenizer` to have a chat template, but {tokenizer.name_or_path!r} has none. Set "
            "`chat_template=False` to use `template`."
        ) from error


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _begin(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that the tokenizer puts before plain text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []
