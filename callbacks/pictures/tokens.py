"""Tokens as text for pictures."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from matplotlib.font_manager import findfont, get_font

__all__ = ["FONT", "token_texts", "visible_token"]


_PARTIAL = "\N{REPLACEMENT CHARACTER}"


# The coloured text; a length is in inches. The font comes with matplotlib.
FONT = "DejaVu Sans Mono"


def token_texts(token_ids: Sequence[int], tokenizer: Any = None) -> list[str]:
    """Return what each token adds to the text, in printable characters; ⏎ and a line feed end a line.

    Where several tokens make one character, the last gives the character and the others `·`. Ids that the tokenizer
    does not know are shown as numbers, and so are all without a tokenizer. Characters that the font lacks are □.

    Example:
        >>> token_texts([3, 4])
        [' 3', ' 4']
    """
    if tokenizer is None:
        return [f" {token_id}" for token_id in token_ids]
    pieces, done = [], ""
    for count, token_id in enumerate(token_ids, start=1):
        # Decode the whole text so far: some tokenizers write a token differently at the start of a text.
        text = tokenizer.decode(token_ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        added = text[len(done) :] if text.startswith(done) else tokenizer.decode([token_id])
        pieces.append("".join(map(_visible, added.strip(_PARTIAL))) or ("·" if added else f"⟨{token_id}⟩"))
        done = text.rstrip(_PARTIAL)
    return pieces


def visible_token(text: str) -> str:
    r"""Return a token on its own, with visible white space.

    Example:
        >>> visible_token(" the"), visible_token("\n")
        ('·the', '⏎')
    """
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return shown if shown.isprintable() and shown else ascii(shown)[1:-1] or "(empty)"


def _visible(character: str) -> str:
    shown = {"\n": "⏎\n", "\t": "⇥"}.get(character, character)
    if not shown[0].isprintable():
        return ascii(character)[1:-1]
    return shown if ord(shown[0]) in _glyphs() else "□"


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())
