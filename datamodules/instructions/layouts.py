"""From prompt–response pairs to text: templates, chat templates, earlier turns, and where the response stands.

White space between prompt and response belongs to what follows the prompt, where a byte-level BPE wants it:
`"Answer:"`, then `" 42"`.
"""

from collections.abc import Sequence
from string import Formatter
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.instructions.splits import Example

__all__ = [
    "CHAT",
    "MARK",
    "ChatLayout",
    "Layout",
    "Rendered",
    "Span",
    "TemplateLayout",
    "Turn",
    "chat_template_of",
    "check_template",
    "find_response",
    "split_template",
]

CHAT = "chat"
"""The `template` that stands for the tokenizer's own chat template."""

MARK = "\ue000"
"""A response that no template writes by itself; it tells what a chat template puts before the content of a turn."""


class Span(NamedTuple):
    """Where a response stands in the text that holds it.

    Attributes:
        begin: number of characters before it.
        end: number of characters up to its end.
        skipped: characters at its own beginning that the text does not have.
        skipped_bytes: the bytes of these.
    """

    begin: int
    end: int
    skipped: int = 0
    skipped_bytes: int = 0


class Turn(NamedTuple):
    """Where a turn that is to be learned stands in the text that holds it.

    Attributes:
        span: of what is said.
        begin: number of characters before what the assistant writes.
        end: number of characters up to what comes after the turn's end.
        content: what is said, as the data have it.
    """

    span: Span
    begin: int
    end: int
    content: str


class Rendered(NamedTuple):
    """An example as text.

    Attributes:
        prompt: all that comes before the response.
        continuations: what follows it with each of the responses.
        spans: where the responses are in these.
        where: the row's place in its source, for messages.
        turns: of a conversation, the assistant's in its one continuation; else empty.
    """

    prompt: str
    continuations: list[str]
    spans: list[Span]
    where: str = ""
    turns: Sequence[Turn] = ()


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
        ValueError: If it does not hold both once, in this order, and nothing else in braces.

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
            "Expected `template` to be 'chat', or to hold {prompt} and, after it, {response}, once each and nothing "
            f"else in braces, but got {template!r}. Double other braces."
        )
    texts = [""]
    for literal, name, _, _ in pieces:
        texts[-1] += literal
        if name is not None:
            texts.append("")
    before, between, after = texts
    return before, between, after


def check_template(template: str) -> None:
    """Raise unless a template is `"chat"` or can be filled.

    Raises:
        ValueError: If it is neither.
    """
    if template != CHAT:
        split_template(template)


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
        space = text[len(prompt) :]
        texts = [f"{space}{response}{after}" for response in responses]
        spans = [Span(len(space), len(space) + len(response)) for response in responses]
        return Rendered(prompt, texts, spans, example.where)


class ChatLayout:
    """The tokenizer's own chat template: prompts are the user's turns, responses the assistant's, shots earlier turns.

    Special tokens are those that the template writes. A template may strip white space from a turn. Where the prompt
    for generation is not in the whole conversation (DeepSeek-R1's ends with `<think>`), it ends where both part.

    Args:
        tokenizer: with a chat template.
        system_prompt: text of a system turn before all others.
        advice: last sentence of error messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        system_prompt: str | None = None,
        advice: str = "Use another `template`.",
    ) -> None:
        self.tokenizer, self.advice = tokenizer, advice
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        self.before: list[int] = []
        self.after: list[int] = []
        self._opening: str | None = None  # what stands between the prompt and a response
        self._has_prompt = True  # whether a whole conversation begins with its prompt for generation

    def render(self, example: Example, responses: Sequence[str], shots: Sequence[Example]) -> Rendered:
        """Return the conversation up to the assistant's turn, and that turn with each of the responses.

        Raises:
            ValueError: If the template refuses the conversation, does not begin it with the prompt, or changes a
                response by more than stripping it.
        """
        turns = [turn for shot in shots for turn in (_turn("user", shot.prompt), _turn("assistant", shot.response))]
        messages = [*self.system, *turns, _turn("user", example.prompt)]
        prompt = self.apply(messages, example, add_generation_prompt=True)

        def complete(response: str) -> str:
            return self.apply([*messages, _turn("assistant", response)], example, add_generation_prompt=False)

        if responses and self._opening is None:
            self._has_prompt = complete(MARK).startswith(prompt)
        if responses and not self._has_prompt:
            # Only up to the mark, as a response may happen to begin like the rest of the prompt.
            shared = _common_beginning(prompt, complete(MARK).partition(MARK)[0])
            prompt = shared if example.prompt.strip() in shared else prompt

        def continue_with(response: str) -> str:
            whole = complete(response)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"Expected the chat template to begin a conversation with its prompt, but got {prompt!r} and "
                    f"{whole!r} for {example.where}. {self.advice}"
                )
            return whole[len(prompt) :]

        continuations = [continue_with(response) for response in responses]
        if self._opening is None and responses:
            before, mark, _ = continue_with(MARK).partition(MARK)
            self._opening = before if mark else ""
        spans = [self._find(*pair, example) for pair in zip(continuations, responses, strict=True)]
        return Rendered(prompt, continuations, spans, example.where)

    def _find(self, continuation: str, response: str, example: Example) -> Span:
        """Return where the response is, as it is or stripped. It comes after the opening, whose words it may repeat."""
        opening = self._opening or ""
        start = len(opening) if continuation.startswith(opening) else 0
        if (span := find_response(continuation, response, start)) is not None:
            return span
        raise ValueError(
            f"Expected the chat template to keep the response of {example.where}, {response!r}, or to strip white "
            f"space only, but got {continuation!r}. {self.advice}"
        )

    def apply(self, messages: list[dict[str, str]], example: Example, *, add_generation_prompt: bool) -> str:
        """Return a conversation as the template writes it.

        Raises:
            ValueError: If the template refuses it, or writes a token that begins or ends texts beside one of the texts.
        """
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise ValueError(
                f"Expected the chat template to take turns of {roles}, but got for {example.where}: {error}"
            ) from error
        marks = {self.tokenizer.bos_token, self.tokenizer.eos_token} - {None}
        doubled = [mark for mark in marks if len(marks) == 2 and mark * 2 in text]  # if one is both, two may meet
        if doubled:
            raise ValueError(
                f"Expected {doubled[0]!r} once at a place, but the chat template writes it and so do the texts of"
                f" {example.where}. Take it out of the data."
            )
        return text


def find_response(text: str, response: str, start: int = 0) -> Span | None:
    """Return where a response stands in a text, from a place on, as it is or stripped; None if it is not there.

    Example:
        >>> find_response("<a> yes<b>", " yes ", 3), find_response("no", "yes")
        (Span(begin=4, end=7, skipped=1, skipped_bytes=1), None)
    """
    space = response[: len(response) - len(response.lstrip())]
    forms = (response, (0, 0)), (response.strip(), (len(space), len(space.encode())))
    for form, skipped in forms:
        if text.startswith(form, start):
            return Span(start, start + len(form), *skipped)
    for form, skipped in forms:  # a template that strips some white space only
        if (begin := text.find(form, start)) >= 0:
            return Span(begin, begin + len(form), *skipped)
    return None


def chat_template_of(
    tokenizer: PreTrainedTokenizerFast,
    argument: str = "`tokenizer`",
    advice: str = "Use another `template`.",
) -> str:
    """Return the tokenizer's chat template.

    Args:
        tokenizer: any.
        argument: what error messages call it.
        advice: their last sentence.

    Raises:
        ValueError: If it has none.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"Expected {argument} to have a chat template, but {tokenizer.name_or_path!r} has none. {advice}"
        ) from error


def _common_beginning(one: str, other: str) -> str:
    length = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[: min(len(one), len(other)) if length is None else length]


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
