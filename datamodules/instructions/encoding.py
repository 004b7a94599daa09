"""From text to token ids: where the prompt ends, and how much of the response each token has read.

A prompt's ids are always a prefix of the whole sequence's. The characters that were read up to a token, and the bytes
of these in UTF-8, are the same measure in every tokenizer, so that what two of them make of a response can be laid side
by side. Bytes tell tokens within a character apart, too.
"""

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.instructions.conversations import render_conversation
from lit_logits.datamodules.instructions.layouts import ChatLayout, Layout, Rendered, Span, Turn
from lit_logits.datamodules.instructions.splits import Example
from lit_logits.datamodules.tokenization import token_bytes

__all__ = [
    "BEYOND",
    "Encoded",
    "Encoder",
    "encode_rendered",
    "read_bytes",
    "read_characters",
    "with_whole_offsets",
    "without_prefix",
]

BEYOND = -1
"""The number of read characters where it is undefined: before the prompt's end, within one, after the response."""

Offsets = list[tuple[int, int]]


class Encoded(NamedTuple):
    """An example as token ids.

    Attributes:
        prompt: ids of the prompt.
        responses: ids of what follows it with each of the responses.
        ends: for each of these ids, how many characters of the response have been read after it; −1 after the response
            and within a character.
        byte_ends: the same in bytes, which are counted within a character as well where the tokenizer's tokens are
            bytes.
        counted: of a conversation, for each of these ids whether it is of a turn that is to be learned; else empty,
            because all are.
    """

    prompt: list[int]
    responses: list[list[int]]
    ends: list[list[int]]
    byte_ends: list[list[int]]
    counted: list[list[bool]]


class Read(NamedTuple):
    """How much of a response has been read after each token; −1 where that is undefined.

    Attributes:
        characters: number of characters.
        in_bytes: number of bytes.
        counted: whether the token is of a turn that is to be learned; empty where there are no turns.
    """

    characters: list[int]
    in_bytes: list[int]
    counted: Sequence[bool] = ()


class Encoder:
    """Makes token ids of examples.

    Args:
        layout: makes the texts.
        tokenizer: makes the ids.
        argument: what error messages call the tokenizer.
    """

    def __init__(self, layout: Layout, tokenizer: PreTrainedTokenizerFast, argument: str = "`tokenizer`") -> None:
        self.layout, self.argument = layout, argument
        self.tokenizer = with_whole_offsets(tokenizer)
        self.inner = without_prefix(self.tokenizer)

    def __call__(
        self, examples: Sequence[Example], shots: Sequence[Sequence[Example]], *, all_choices: bool = False
    ) -> list[Encoded]:
        """Encode each example with its response, or with each of its choices; without one, a single empty response.

        Args:
            examples: any number.
            shots: what is put before each of them.
            all_choices: encode all choices of an example that has some.

        Raises:
            ValueError: If a response has no tokens, or the layout cannot render an example; it names the row.
        """
        rendered = []
        for example, before in zip(examples, shots, strict=True):
            if example.messages and isinstance(self.layout, ChatLayout):
                rendered.append(render_conversation(self.layout, example))
                continue
            responses = example.choices if all_choices and example.choices else (example.response,)
            rendered.append(self.layout.render(example, [text for text in responses if text], before))
        encoded = encode_rendered(rendered, self.layout, self.tokenizer, self.argument, inner=self.inner)
        return [one if one.responses else Encoded(one.prompt, [[]], [[]], [[]], []) for one in encoded]


def encode_rendered(
    rendered: Sequence[Rendered],
    layout: Layout,
    tokenizer: PreTrainedTokenizerFast,
    argument: str = "`tokenizer`",
    *,
    inner: PreTrainedTokenizerFast | None = None,
) -> list[Encoded]:
    """Tokenise rendered examples.

    A continuation's ids are what follows the prompt's ids in the whole text. Where a token would span the boundary, it
    is tokenised by itself. Ids that begin and end a sequence are not put there twice, if a template writes them.

    Args:
        rendered: any number.
        layout: what rendered them.
        tokenizer: with offsets that leave no white space out, see `with_whole_offsets`.
        argument: what error messages call it.
        inner: tokenises a text that others come before, see `without_prefix`; None is the tokenizer itself.

    Raises:
        ValueError: If a response has no tokens; it names the row.
    """
    texts = [text for prompt, rest, *_ in rendered for text in (prompt, *(prompt + end for end in rest))]
    tokens = iter(_tokenize(tokenizer, texts))
    encoded = []
    for text, continuations, spans, where, turns in rendered:
        prompt, _ = next(tokens)
        responses, ends, byte_ends, counted = [], [], [], list[list[bool]]()
        for continuation, span in zip(continuations, spans, strict=True):
            ids, offsets = next(tokens)
            if ids[: len(prompt)] == prompt:
                ids = ids[len(prompt) :]
                offsets = [(start - len(text), end - len(text)) for start, end in offsets[len(prompt) :]]
            else:
                [(ids, offsets)] = _tokenize(inner or tokenizer, [continuation])
            _check_said(offsets, continuation, [turn.span for turn in turns] or [span], where, argument)
            after = [] if ids[-len(layout.after) :] == layout.after else layout.after
            beyond = [BEYOND for _ in after]
            responses.append([*ids, *after])
            pieces = partial(_piece, tokenizer, ids)
            read = (
                read_turns(offsets, pieces, continuation, turns)
                if turns
                else Read(read_characters(offsets, continuation, span), read_bytes(offsets, pieces, continuation, span))
            )
            ends.append([*read.characters, *beyond])
            byte_ends.append([*read.in_bytes, *beyond])
            counted += [list(read.counted)] if turns else []
        before = [] if prompt[: len(layout.before)] == layout.before else layout.before
        encoded.append(Encoded([*before, *prompt], responses, ends, byte_ends, counted))
    return encoded


def _check_said(offsets: Offsets, text: str, spans: Sequence[Span], where: str, argument: str) -> None:
    """Raise for a response, or one of its turns, without tokens."""
    for span in spans:
        if not any(start < span.end and end > span.begin for start, end in offsets):
            raise ValueError(
                f"Expected the response of {where} to give tokens, but {argument} gives none for "
                f"{text[span.begin : span.end]!r}. Correct the row or drop it."
            )


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[tuple[list[int], Offsets]]:
    if not texts:
        return []
    settings: Any = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    tokens = tokenizer(texts, return_offsets_mapping=True, **settings)
    return list(zip(tokens["input_ids"], tokens["offset_mapping"], strict=True))


def _piece(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], place: int) -> bytes | None:
    """Return the bytes of the token at a place."""
    return token_bytes(str(tokenizer.convert_ids_to_tokens(ids[place])))


def read_characters(offsets: Offsets, text: str, span: Span) -> list[int]:
    """Count the characters of a response that have been read after each token.

    A token that ends within a character, which the next one goes on with, gets −1. A character that no token covers,
    which a normalizer dropped or joined with the one before (an accent of its own), has been read with it, unless it is
    white space, which counts with the next token. A token that reaches beyond the response, and all after it, get −1.

    Args:
        offsets: first character of each token and the one after its last.
        text: what was tokenised.
        span: where the response is in it.

    Example:
        >>> read_characters([(0, 3), (3, 4), (3, 4), (5, 7), (7, 8)], " no🙂 ja.", Span(1, 7))
        [2, -1, 3, 6, -1]
    """
    following = [*(start for start, _ in offsets[1:]), len(text)]
    ends = []
    for (_, end), start in zip(offsets, following, strict=True):
        if end > span.end or start < end:
            ends.append(BEYOND)
            continue
        limit = min(start, span.end if end > span.begin else span.begin)
        read = end
        while read < limit and not text[read].isspace():
            read += 1
        ends.append(read - span.begin + span.skipped if read > span.begin else 0)
    return ends


def read_bytes(offsets: Offsets, piece: Callable[[int], bytes | None], text: str, span: Span) -> list[int]:
    """Count the bytes of a response, in UTF-8, that have been read after each token.

    It is `read_characters` in bytes, but for a token that ends within a character: it has read as many bytes more as it
    has itself, if these are the next ones of the text. Else it gets −1.

    Args:
        offsets: first character of each token and the one after its last.
        piece: returns the bytes of the token at a place, or None; asked for tokens that end within a character only.
        text: what was tokenised.
        span: where the response is in it.

    Example:
        >>> halves = ["é".encode()[:1], "é".encode()[1:]]
        >>> read_bytes([(0, 1), (1, 2), (1, 2)], lambda place: halves[place - 1], "né", Span(0, 2))
        [1, 2, 3]
    """
    raw = text.encode("utf-8", "surrogatepass")
    before = [0, *accumulate(len(character.encode("utf-8", "surrogatepass")) for character in text)]
    first = before[span.begin]
    following = [*(start for start, _ in offsets[1:]), len(text)]
    ends, read = [], 0  # the latter of the whole text
    for place, ((start, end), count) in enumerate(zip(offsets, read_characters(offsets, text, span), strict=True)):
        if following[place] < end:  # within a character
            read, part = max(read, before[start]), piece(place)
            if part is None or end > span.end or not raw.startswith(part, read):
                ends.append(BEYOND)
                continue
            read += len(part)
            ends.append(read - first + span.skipped_bytes if read > first else 0)
        else:
            read = before[end]
            at = span.begin + count - span.skipped
            ends.append(before[at] - first + span.skipped_bytes if count > 0 else count)
    return ends


def read_turns(offsets: Offsets, piece: Callable[[int], bytes | None], text: str, turns: Sequence[Turn]) -> Read:
    """Count what has been read of the assistant's turns, as of one response with a line break between them.

    The token before a turn has read all turns before it and the line break, so that its place is not that of the last
    token of the turn before. Other tokens outside of turns get −1.

    Args:
        offsets: see `read_characters`.
        piece: see `read_bytes`.
        text: what was tokenised.
        turns: of the assistant, in it.
    """
    ends, byte_ends = [BEYOND] * len(offsets), [BEYOND] * len(offsets)
    counted = [False] * len(offsets)
    base = byte_base = 0
    for turn in turns:
        inside = [place for place, (start, end) in enumerate(offsets) if start < turn.end and end > turn.begin]
        part = slice(inside[0], inside[-1] + 1)
        characters = read_characters(offsets[part], text, turn.span)
        in_bytes = read_bytes(offsets[part], partial(_piece_after, piece, inside[0]), text, turn.span)
        if base and not counted[inside[0] - 1]:
            ends[inside[0] - 1], byte_ends[inside[0] - 1] = base, byte_base
        ends[part] = [base + read if read >= 0 else BEYOND for read in characters]
        byte_ends[part] = [byte_base + read if read >= 0 else BEYOND for read in in_bytes]
        counted[part] = [True] * len(characters)
        base += len(turn.content) + 1
        byte_base += len(turn.content.encode("utf-8", "surrogatepass")) + 1
    return Read(ends, byte_ends, counted)


def _piece_after(piece: Callable[[int], bytes | None], first: int, place: int) -> bytes | None:
    """Return the bytes of the token at a place that is counted from the first one."""
    return piece(first + place)


def with_whole_offsets(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a copy whose tokens' offsets span their white space; its ids without special tokens are the same.

    A post-processor adds special tokens, and that of a byte-level BPE cuts white space off the offsets.
    """
    whole = copy.deepcopy(tokenizer)
    backend: Any = whole.backend_tokenizer
    backend.post_processor = None
    return whole


def without_prefix(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a copy that puts no space before a text that has none, as for a text that others come before.

    Vocabularies of SentencePiece write a space as `▁`, and one before the first word.
    """
    inner = copy.deepcopy(tokenizer)
    backend: Any = inner.backend_tokenizer
    for name in ("normalizer", "pre_tokenizer"):
        if (part := getattr(backend, name)) is not None:
            settings = json.loads(part.__getstate__())
            part.__setstate__(json.dumps(_without_prefix(settings)).encode())
            setattr(backend, name, part)
    return inner


def _without_prefix(settings: Any) -> Any:
    """Return the settings of a part of a tokenizer with nothing that puts a space before a text."""
    if isinstance(settings, list):
        return [_without_prefix(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    if settings.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    changed = {name: _without_prefix(value) for name, value in settings.items()}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**changed, **{name: value for name, value in never.items() if name in changed}}
