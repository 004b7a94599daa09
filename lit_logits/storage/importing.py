"""A cache of log-probabilities that a server gave: its tokens checked against text and vocabulary, and laid out.

Letters: M positions of a response, k `top_k`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_logits.storage.folders import replace_folder
from lit_logits.storage.joining import join_cache
from lit_logits.storage.logit_cache import describe_cache
from lit_logits.storage.served import ServedAnswer, ServedToken, TokenName
from lit_logits.storage.writing import begin_cache, complete_settings, offsets_of, pack_fields, write_part

__all__ = ["ServedRow", "ServedVocabulary", "read_row", "write_served"]

SAMPLES_A_PART = 256
LEAST = -9999.0
"""What servers write for a probability that is too small for them; an infinity becomes it, too."""


class ServedVocabulary:
    """Finds the ids of tokens by what a server tells of them.

    Args:
        tokens: bytes of each token, None for one that stands for no text.
        names: ids of the tokens without text, by their names.
    """

    def __init__(self, tokens: Sequence[bytes | None], names: Mapping[str, int]) -> None:
        self.tokens, self.names = tokens, names
        numbered = list(enumerate(tokens))
        self._of_bytes = {text: number for number, text in reversed(numbered) if text is not None}

    def find(self, name: TokenName) -> int | None:
        r"""Return the id of a token, or None if it is not known.

        Example:
            >>> vocabulary = ServedVocabulary([None, b"a", b"\xf0"], {"<end>": 0})
            >>> names = [TokenName("<end>"), TokenName("a"), TokenName("?", b"\xf0"), TokenName("token_id:2")]
            >>> [vocabulary.find(name) for name in [*names, TokenName("bytes:\\xf0"), TokenName("b")]]
            [0, 1, 2, 2, 2, None]
        """
        text, raw, number = name
        if text is not None and number is None and (written := re.fullmatch(r"token_id:(\d+)", text)):
            number = int(written[1])
        if number is not None:
            return number if 0 <= number < len(self.tokens) else None
        if text is not None and text in self.names:
            return self.names[text]
        if raw is None and text is not None:
            is_escaped = re.fullmatch(r"bytes:(?:\\x[0-9a-fA-F]{2})+", text)
            raw = bytes.fromhex(text[6:].replace("\\x", "")) if is_escaped else text.encode("utf-8", "surrogatepass")
        return None if raw is None else self._of_bytes.get(raw)


class ServedRow(NamedTuple):
    """A response as a cache holds it.

    Attributes:
        sample_id: number of the sample.
        ends: bytes of the response that are read at each position; −1 after the response.
        label_log_probs: of the tokens that came.
        top: of each position, ids and log-probabilities of the likeliest tokens, descending.
    """

    sample_id: int
    ends: list[int]
    label_log_probs: list[float]
    top: list[list[tuple[int, float]]]


def read_row(answer: ServedAnswer, sample_id: int, response: str, vocabulary: ServedVocabulary) -> ServedRow:
    """Lay an answer out, once its tokens are known to spell the response.

    Before the response, white space may stand, or the prompt if the answer has it; after it, white space and tokens
    without text.

    Args:
        answer: of the server.
        sample_id: number of the sample that it belongs to.
        response: the sample's text.
        vocabulary: of the source.

    Raises:
        ValueError: If a token is not known, tokens spell something else, or values are not log-probabilities.
    """
    numbers = [_known(vocabulary, one.token, answer) for one in answer.tokens]
    pieces = [b"" if number is None else vocabulary.tokens[number] or b"" for number in numbers]
    begin, length, skipped = _find(b"".join(pieces), response, answer)
    reached = list(accumulate(map(len, pieces)))
    first = next(place for place, end in enumerate(reached) if end > begin) if answer.has_prompt else 0
    ends, label_log_probs, top = [], [], []
    is_over = False
    for place in range(first, len(pieces)):
        read = reached[place] - len(pieces[place])  # before this token
        ends.append(-1 if is_over else 0 if read <= begin else read - begin + skipped)
        is_over = is_over or reached[place] > begin + length or read >= begin + length
        label_log_prob, likeliest = _log_probs(answer.tokens[place], numbers[place], vocabulary, answer)
        label_log_probs.append(label_log_prob)
        top.append(likeliest)
    return ServedRow(sample_id, ends, label_log_probs, top)


def _known(vocabulary: ServedVocabulary, name: TokenName, answer: ServedAnswer) -> int | None:
    """Return the id of a token that came; None for the first of a prompt, which some servers do not tell."""
    if name == TokenName() and answer.has_prompt:
        return None
    if (number := vocabulary.find(name)) is None:
        raise ValueError(
            f"Expected the tokens of {answer.where} to be of the tokenizer that is given, but it has none for {name}."
            " Give the source's own, and let the server write bytes or ids (vLLM: `return_tokens_as_token_ids`)."
        )
    return number


def _find(text: bytes, response: str, answer: ServedAnswer) -> tuple[int, int, int]:
    """Return where the response begins in what the tokens spell, its bytes there, and those before it that are not.

    It is there as it is, or without the white space at its ends, which a template may strip.
    """
    leading = len(response) - len(response.lstrip())
    for form, skipped in ((response, 0), (response.strip(), len(response[:leading].encode()))):
        raw = form.encode("utf-8", "surrogatepass")
        begin = text.rfind(raw) if raw else -1
        if begin >= 0 and not text[begin + len(raw) :].strip() and (answer.has_prompt or not text[:begin].strip()):
            return begin, len(raw), skipped
    raise ValueError(
        f"Expected the tokens of {answer.where} to spell the response {response!r}, but they spell"
        f" {text.decode('utf-8', 'replace')!r}. Give the data that were served, and the tokenizer of the source."
    )


def _log_probs(
    served: ServedToken, number: int | None, vocabulary: ServedVocabulary, answer: ServedAnswer
) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of the token that came, and the likeliest tokens, descending."""
    if served.log_prob is None or number is None:
        raise ValueError(
            f"Expected a log-probability of each token of the response in {answer.where}, but one is missing."
        )
    found = dict[int, float]()
    for name, log_prob in served.top:
        if (other := vocabulary.find(name)) is not None:  # what is not known joins the tail
            found.setdefault(other, _checked(log_prob, answer))
    top = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    if sum(math.exp(log_prob) for _, log_prob in top) > 1.05:
        raise ValueError(
            f"Expected natural logarithms of probabilities in {answer.where}, but got a sum above 1: {top}."
        )
    return _checked(served.log_prob, answer), top


def _checked(log_prob: Any, answer: ServedAnswer) -> float:
    value = math.nan if log_prob is None else float(log_prob)
    if math.isnan(value) or value > 1e-3:
        raise ValueError(f"Expected log-probabilities of at most 0 in {answer.where}, but got {log_prob}.")
    return min(0.0, max(LEAST, value))


def write_served(
    rows: Callable[[], Iterable[ServedRow]],
    folder: Path,
    settings: Mapping[str, Any],
    vocabulary: ServedVocabulary,
    *,
    top_k: int | None = None,
    shard_tokens: int = 1 << 20,
) -> dict[str, Any]:
    """Write a cache of served rows as a whole, in place of an earlier one, and return what `cache.json` says.

    Args:
        rows: gives them, and again at another call; the first row of a sample counts.
        folder: of the cache.
        settings: of the source.
        vocabulary: of the source.
        top_k: k; None is the least number of tokens that a position has.
        shard_tokens: approximate number of positions in a file.

    Raises:
        ValueError: If the folder holds something else, there are no rows, or one has fewer than k tokens.
    """
    is_served = bool((describe_cache(folder) or {}).get("settings", {}).get("served"))
    if folder.exists() and not is_served and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"Expected {folder} to be new or a cache of served log-probabilities, but it holds something else. Pass"
            " another `folder`."
        )
    k = min((len(top) for row in rows() for top in row.top), default=0) if top_k is None else top_k
    if k < 1:
        raise ValueError("Expected served files with the likeliest tokens of each position, but got none for some.")
    given = {**settings, "served": True, "temperature": 1.0, "top_k": k, "vocab_size": len(vocabulary.tokens)}
    complete = complete_settings(folder.name, given, None)

    def write(partial: Path) -> None:
        begin_cache(partial, complete, vocabulary.tokens)
        left = _first_of_each(rows())
        while part := list(islice(left, SAMPLES_A_PART)):
            write_part(partial, _pack(part, k, complete))
        join_cache(partial, shard_tokens)

    replace_folder(folder, write)
    return describe_cache(folder) or {}


def _first_of_each(rows: Iterable[ServedRow]) -> Iterator[ServedRow]:
    seen = set[int]()
    for row in rows:
        if row.sample_id not in seen:
            seen.add(row.sample_id)
            yield row


def _pack(rows: Sequence[ServedRow], top_k: int, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a part."""
    for row in rows:
        if (least := min(map(len, row.top))) < top_k:
            raise ValueError(
                f"Expected at least `top_k`={top_k} tokens at each position, but sample {row.sample_id} has one with"
                f" {least} that the tokenizer knows. Lower `top_k`, or leave it out."
            )
    kept = [top[:top_k] for row in rows for top in row.top]
    log_probs = torch.tensor([[value for _, value in top] for top in kept], dtype=torch.float64)
    fields = {
        "ends": torch.tensor([end for row in rows for end in row.ends]),
        "token_ids": torch.tensor([[number for number, _ in top] for top in kept]),
        "log_probs": log_probs,
        "tail": (1 - log_probs.exp().sum(-1)).clamp_(min=0),
        "label_log_probs": torch.tensor([value for row in rows for value in row.label_log_probs]),
    }
    offsets = offsets_of(torch.tensor([len(row.ends) for row in rows]))
    return {
        "sample_ids": torch.tensor([row.sample_id for row in rows]),
        "offsets": offsets,
        **pack_fields(fields, settings),
    }
