"""Final answers in texts, as exact match compares them."""

import re
from decimal import Decimal, InvalidOperation

__all__ = ["GSM8K_PATTERN", "extract_answer"]

GSM8K_PATTERN = r"####[^\S\n]*(\S[^\n]*)"
"""The rest of the line after `####`, which marks the answers of GSM8K."""

_NUMBER = re.compile(r"(?<![\d.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def extract_answer(text: str, pattern: str = GSM8K_PATTERN) -> str | None:
    r"""Return the final answer: the group of the first match of `pattern`, else the last number, else None.

    Numbers lose currency signs and commas, so that `$1,200.00` and `1200` are equal; other answers lose case and
    surrounding space.

    Args:
        text: response of a model or of the data.
        pattern: regular expression with one group.

    Example:
        >>> extract_answer("So 48 + 24 = 72.\n#### 72"), extract_answer("That makes $1,200.50."), extract_answer("no")
        ('72', '1200.5', None)
    """
    found = re.search(pattern, text)
    if found is None or found.group(1) is None:
        numbers = _NUMBER.findall(text)
        return _number(numbers[-1]) if numbers else None
    answer = found.group(1).strip()
    numbers = _NUMBER.findall(answer)
    return _number(numbers[0]) if len(numbers) == 1 else answer.casefold()


def _number(text: str) -> str:
    try:
        value = Decimal(text.replace(",", "").rstrip("."))
    except InvalidOperation:
        return text
    return f"{value.normalize():f}"
