"""What is judged of answers: final answers in texts, as exact match compares them, and the likelihood of choices."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

from torch import Tensor

from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.modules.dynamic_fusion.fused_lm import FusedScores

__all__ = [
    "GSM8K_PATTERN",
    "STOPS",
    "check_pattern",
    "choice_likelihoods",
    "extract_answer",
    "has_labels",
    "of_right_answers",
]

GSM8K_PATTERN = r"####[^\S\n]*(\S[^\n]*)"
"""The rest of the line after `####`, which marks the answers of GSM8K."""

STOPS = ("Question:", "</s>", "<|im_end|>")
"""Where a model begins the next problem, or has ended without noticing; as lm-evaluation-harness has it for GSM8K."""

_MINUS = "-\N{MINUS SIGN}"
_NUMBER = re.compile(
    # A minus is a sign where no number or bracket ends before it. It stands on either side of the currency.
    rf"(?P<sign>(?<![\w.)\]])[{_MINUS}]?[$€£¥]?[{_MINUS}]?)"
    r"(?P<digits>(?<![\d.])(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)?(?:(?<!\d)\.\d+|(?<=\d)(?:\.\d+)?))"
    rf"(?P<exponent>[eE][+{_MINUS}]?\d+)?"
)


def extract_answer(text: str, pattern: str = GSM8K_PATTERN, stops: Sequence[str] = STOPS) -> str | None:
    r"""Return the final answer: the group of the first match of `pattern`, else the last number, else None.

    Of the group the first number counts, of a text without numbers all of it, in lower case. Numbers lose currency
    signs and the commas of thousands, so that `$1,200.00`, `1200` and `1.2e3` are equal.

    Args:
        text: response of a model or of the data.
        pattern: regular expression with one group.
        stops: the text ends before the first of these, unless nothing is left then.

    Example:
        >>> extract_answer("So 48 + 24 = 72.\n#### 72"), extract_answer("That makes -$1,200.50."), extract_answer("no")
        ('72', '-1200.5', None)
    """
    ends = [end for stop in stops if (end := text.find(stop)) > 0 and text[:end].strip()]
    text = text[: min(ends)] if ends else text
    found = re.search(pattern, text)
    if found is None or found.group(1) is None:
        numbers = _numbers(text)
        return numbers[-1] if numbers else None
    answer = found.group(1).strip()
    numbers = _numbers(answer)
    return numbers[0] if numbers else answer.casefold()


def _numbers(text: str) -> list[str]:
    """Return the numbers in a text, written alike."""
    found = []
    for match in _NUMBER.finditer(text):
        sign = "-" if any(minus in match["sign"] for minus in _MINUS) else ""
        digits = match["digits"].replace(",", "") + (match["exponent"] or "").replace(_MINUS[1], "-")
        try:
            value = Decimal(sign + digits).normalize() or Decimal(0)  # not −0
        except InvalidOperation:
            continue
        # An exponent of a thousand digits is no number that anybody means.
        found.append(f"{value:f}" if abs(value.adjusted()) < 100 else str(value))
    return found


def choice_likelihoods(scores: FusedScores, response_ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood (N,) of each choice in nats, and how many characters (N,) it has.

    What a template puts behind a choice, such as the end token, is not part of it.

    Args:
        scores: of N sequences of T tokens.
        response_ends: (N, T) characters of the response that have been read, −1 before and after it.
    """
    ends = response_ends[:, 1:].to(scores.log_probs.device)
    # Up to the last token that ends within the text: one within a character has −1 as well.
    in_text = (ends > 0).flip(1).cumsum(1).flip(1) > 0
    return (scores.log_probs * (in_text & scores.trace.mask)).sum(1), ends.amax(1).clamp(min=1)


def check_pattern(pattern: str) -> None:
    """Raise unless an `answer_pattern` is a regular expression with one group.

    Raises:
        ValueError: If it is not.
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(
            f"Expected `answer_pattern` to be a regular expression, but got {pattern!r}: {error}"
        ) from error
    if groups != 1:
        raise ValueError(f"Expected `answer_pattern` to have one group, the answer, but got {pattern!r} with {groups}.")


def of_right_answers(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with one sequence for each example that counts, the right choice if there are several."""
    right = has_labels(batch)
    if "correct" in batch:
        right &= batch["correct"].bool()
    return {name: value[right] for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}


def has_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which sequences (N,) count; those that fill up the batches of several processes do not."""
    return (batch["labels"] != IGNORE_INDEX).any(1)
