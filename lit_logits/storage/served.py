"""Log-probabilities as servers of language models give them, read from files in any of their forms.

A line of a `.jsonl` and a row of a `.parquet` file are one answer, beside what it belongs to: `sample_id`, or `prompt`
and `response`. The answer is the row itself or, as in batch files of OpenAI, `response` or `response.body`; `custom_id`
is the sample's id there. Its log-probabilities are any of these:

* `choices[0].logprobs.content`, of chat completions: `token`, `bytes`, `logprob`, `top_logprobs` of each position;
* `choices[0].logprobs.tokens`, `token_logprobs` and `top_logprobs`, of completions, also with the prompt (`echo`);
* `prompt_logprobs` of vLLM, of the answer or of its choice, by token ids, with `prompt_token_ids` if they are there;
* `outputs[0].logprobs` of vLLM without a server, by token ids.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["MAX_LINE_BYTES", "ServedAnswer", "ServedToken", "TokenName", "parse_answer", "read_answers"]

MAX_LINE_BYTES = 2**24
"""Longer lines are refused before they fill the memory."""


class TokenName(NamedTuple):
    """What a server tells of a token.

    Attributes:
        text: of the token, or None.
        raw: its bytes, or None.
        number: its id, or None.
    """

    text: str | None = None
    raw: bytes | None = None
    number: int | None = None


class ServedToken(NamedTuple):
    """A token that came, and what else might have come.

    Attributes:
        token: that came.
        log_prob: its log-probability in nats, or None where it is not told, as of the first token.
        top: the likeliest tokens, each with its log-probability.
    """

    token: TokenName
    log_prob: float | None
    top: list[tuple[TokenName, float]]


class ServedAnswer(NamedTuple):
    """What a server gave for a sample.

    Attributes:
        where: place of the row, for messages.
        sample_id: number of the sample, or None if texts tell which it is.
        prompt: text of the row, or None.
        response: text of the row or of the answer, or None.
        model: name of the model, or empty.
        tokens: with their log-probabilities.
        has_prompt: whether the tokens begin with those of the prompt.
    """

    where: str
    sample_id: int | None
    prompt: str | None
    response: str | None
    model: str
    tokens: list[ServedToken]
    has_prompt: bool


def read_answers(files: Sequence[str | Path]) -> Iterator[ServedAnswer]:
    """Read the answers of files, one after another.

    Raises:
        ValueError: If a file is of another kind, or a row is no answer with log-probabilities; it names the row.
    """
    for file in files:
        readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
        if (reader := readers.get(Path(file).suffix)) is None:
            raise ValueError(f"Expected served log-probabilities in files of {list(readers)}, but got {str(file)!r}.")
        for row, where in reader(Path(file)):
            yield parse_answer(row, where)


def parse_answer(row: Mapping[str, Any], where: str = "the answer") -> ServedAnswer:
    """Make an answer of a row.

    Raises:
        ValueError: If it holds no log-probabilities in one of the forms of the module.

    Example:
        >>> content = [{"token": "2", "logprob": -0.5, "top_logprobs": [{"token": "2", "logprob": -0.5}]}]
        >>> row = {"sample_id": 7, "choices": [{"logprobs": {"content": content}}]}
        >>> answer = parse_answer(row)
        >>> answer.sample_id, answer.tokens[0].log_prob, answer.has_prompt
        (7, -0.5, False)
    """
    given = row.get("response")
    body = given.get("body") or given if isinstance(given, Mapping) else row
    try:
        choices = _plain(body.get("choices") or body.get("outputs") or [{}])
        if len(choices) != 1:
            raise ValueError(f"{len(choices)} choices")
        [choice] = choices
        tokens, has_prompt = _tokens(body, choice)
        message = choice.get("message") or {}
        answered = message.get("content") if message else choice.get("text")
        number = row.get("sample_id", row.get("custom_id"))
        return ServedAnswer(
            where,
            None if number is None else int(number),
            row.get("prompt"),
            given if isinstance(given, str) else answered,
            str(body.get("model") or row.get("model") or ""),
            tokens,
            has_prompt,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected {where} to hold one answer with log-probabilities as OpenAI's or vLLM's servers give them, but"
            f" got {error!r} from {sorted(body)}. Ask for `logprobs` and `top_logprobs`, or `prompt_logprobs`."
        ) from error


def _tokens(body: Mapping[str, Any], choice: Mapping[str, Any]) -> tuple[list[ServedToken], bool]:
    """Return the tokens of an answer, and whether the prompt's are among them."""
    for place in (body, choice):
        if prompt := _plain(place.get("prompt_logprobs")):
            return _of_ids(prompt, _plain(place.get("prompt_token_ids") or body.get("prompt_token_ids"))), True
    logprobs = _plain(choice["logprobs"])
    if isinstance(logprobs, list):
        return _of_ids(logprobs, _plain(choice.get("token_ids"))), False
    if content := logprobs.get("content"):
        return [_of_chat(entry) for entry in content], False
    columns = [_plain(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs")]
    tokens = [
        ServedToken(TokenName(text), log_prob, [(TokenName(name), value) for name, value in _pairs(top)])
        for text, log_prob, top in zip(*columns, strict=True)
    ]
    return tokens, tokens[0].log_prob is None


def _of_chat(entry: Mapping[str, Any]) -> ServedToken:
    def name(one: Mapping[str, Any]) -> TokenName:
        return TokenName(one["token"], None if one.get("bytes") is None else bytes(one["bytes"]))

    top = [(name(one), one["logprob"]) for one in entry.get("top_logprobs") or []]
    return ServedToken(name(entry), entry["logprob"], top)


def _of_ids(entries: Sequence[Any], numbers: Sequence[int] | None) -> list[ServedToken]:
    """Read what vLLM maps token ids to; of each position the token that came is the first, if no list names it."""
    tokens = []
    for place, entry in enumerate(entries):
        listed = {int(key): value for key, value in _pairs(entry)}
        number = numbers[place] if numbers else next(iter(listed), None)
        # The token that came is there, too, if it is none of the likeliest; its rank tells.
        likeliest = {key: value for key, value in listed.items() if (value.get("rank") or 0) <= len(listed)}
        top = [(TokenName(value.get("decoded_token"), None, key), value["logprob"]) for key, value in likeliest.items()]
        log_prob = listed[number]["logprob"] if number is not None and listed else None
        tokens.append(ServedToken(TokenName(number=number), log_prob, top))
    return tokens


def _pairs(mapping: Any) -> Iterable[tuple[Any, Any]]:
    """Return the items of a mapping as JSON or Arrow gives it, without those that Arrow fills up with None."""
    items = mapping.items() if isinstance(mapping, Mapping) else mapping or []
    return [(key, value) for key, value in items if value is not None]


def _plain(value: Any) -> Any:
    """Return a value; columns of Parquet may hold it as text."""
    return json.loads(value) if isinstance(value, str) else value


def _read_jsonl(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with file.open("rb") as lines:  # as json_lines.py of the data modules, which this layer may not import
        for number in count(1):
            line, where = lines.readline(MAX_LINE_BYTES + 1), f"line {number} of {file}"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"Expected a JSON object of at most {MAX_LINE_BYTES:,} bytes in {where}, but it is longer. Write"
                    " one answer a line."
                )
            if not line:
                return
            if line.strip():
                yield _parse(line, where), where


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected a JSON object in {where}, but got: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"Expected a JSON object in {where}, but got {type(row).__name__}.")
    return row


def _read_parquet(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    from pyarrow.parquet import ParquetFile  # late: it takes long to import, and most caches need none

    with ParquetFile(file) as opened:
        number = 0
        for batch in opened.iter_batches(256):
            for row in batch.to_pylist():
                yield row, f"row {number} of {file}"
                number += 1
