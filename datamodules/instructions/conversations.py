"""Conversations of several turns, of which the assistant's are to be learned: read, and rendered as text."""

from typing import Any

from lit_logits.datamodules.instructions.layouts import (
    MARK,
    ChatLayout,
    Rendered,
    Turn,
    find_response,
)
from lit_logits.datamodules.instructions.splits import Example

__all__ = ["Messages", "read_messages", "render_conversation", "texts_of"]

Messages = tuple[tuple[str, str], ...]
"""Role and content of each turn."""

ASSISTANT = "assistant"


def read_messages(value: Any, where: str) -> Messages:
    """Return the turns of a row up to the last one of the assistant.

    Raises:
        ValueError: If it is no list of turns with texts, or none is the assistant's; it names the row.

    Example:
        >>> turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
        >>> read_messages([{"role": role, "content": content} for role, content in turns], "row 0")
        (('user', 'Hi'), ('assistant', 'Hello'))
    """
    turns = value if isinstance(value, list) else []
    given = [(turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None) for turn in turns]
    texts = [(role, content) for role, content in given if isinstance(role, str) and isinstance(content, str)]
    if not texts or len(texts) < len(given):
        raise ValueError(
            f"Expected a list of turns with a `role` and a `content` that are texts in {where}, but got {value!r}."
            " Convert it or drop the row."
        )
    own = [number for number, (role, _) in enumerate(texts) if role == ASSISTANT]
    if not own or not all(texts[number][1].strip() for number in own):
        raise ValueError(
            f"Expected turns of the role {ASSISTANT!r} with text in {where}, but got {value!r}. Drop the row."
        )
    return tuple(texts[: own[-1] + 1])


def texts_of(messages: Messages) -> tuple[str, str]:
    r"""Return as one text what comes before the assistant's first turn, and as another all that it says.

    Example:
        >>> texts_of((("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye")))
        ('Hi', 'Hello\nBye')
    """
    first = next(number for number, (role, _) in enumerate(messages) if role == ASSISTANT)
    prompt = "\n".join(content for _, content in messages[:first])
    return prompt, "\n".join(content for role, content in messages if role == ASSISTANT)


def render_conversation(layout: ChatLayout, example: Example) -> Rendered:
    """Return a conversation: what comes before the assistant's first turn, all that follows, and where its turns are.

    A turn begins after the template's prompt for it, and ends before what comes after it: what closes it is a part of
    it. A system prompt of the layout comes first, unless the conversation has one of its own.

    Raises:
        ValueError: If the template refuses the conversation, or writes a turn in another way where others follow it.
    """
    system = [] if example.messages[0][0] == "system" else layout.system
    messages = [*system, *({"role": role, "content": content} for role, content in example.messages)]
    whole = layout.apply(messages, example, add_generation_prompt=False)
    own = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    turns = [_find_turn(layout, example, messages, number, whole) for number in own]
    start = turns[0].begin
    return Rendered(
        whole[:start], [whole[start:]], [turns[0].span], example.where, [_moved(one, start) for one in turns]
    )


def _find_turn(layout: ChatLayout, example: Example, messages: list[dict[str, str]], number: int, whole: str) -> Turn:
    """Return where one of the messages stands in the whole conversation."""
    before, message = messages[:number], messages[number]
    prompt = layout.apply(before, example, add_generation_prompt=True)
    marked = layout.apply([*before, {**message, "content": MARK}], example, add_generation_prompt=False)
    until = layout.apply(messages[: number + 1], example, add_generation_prompt=False)
    opening = marked.partition(MARK)[0]
    span = find_response(whole, message["content"], len(opening)) if whole.startswith(opening) else None
    if span is None or whole[len(opening) : span.begin].strip():
        raise ValueError(
            f"Expected the chat template to write turn {number + 1} of {example.where}, {message['content']!r}, as it "
            f"is or stripped, and alike whatever follows it, but got {whole!r}. {layout.advice}"
        )
    # Where the prompt for generation is not in the conversation (DeepSeek-R1's), the turn begins with what is said;
    # where the last turn alone is closed, those before it end with that.
    begin = len(prompt if opening.startswith(prompt) else opening)
    return Turn(span, begin, len(until) if whole.startswith(until) else span.end, message["content"])


def _moved(turn: Turn, start: int) -> Turn:
    """Return a turn as it stands in the text from a place on."""
    span = turn.span._replace(begin=turn.span.begin - start, end=turn.span.end - start)
    return Turn(span, turn.begin - start, turn.end - start, turn.content)
