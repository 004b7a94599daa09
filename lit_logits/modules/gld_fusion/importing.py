"""Log-probabilities of a source that runs elsewhere, behind a server, made a cache for `GLDFusionModule`."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from lit_logits.contracts import HasSampleTexts, lacks, offers
from lit_logits.modules.language_models.tokenizers import find_tokenizer, textless_tokens, token_table, tokenizer_id
from lit_logits.storage.importing import ServedRow, ServedVocabulary, read_row, write_served
from lit_logits.storage.logit_cache import LogitCache
from lit_logits.storage.served import ServedAnswer, read_answers

__all__ = ["import_log_probs"]

Texts = dict[int, tuple[str, str]]


def import_log_probs(
    files: str | Sequence[str],
    folder: str | Path,
    tokenizer: str | PreTrainedTokenizerBase,
    data: HasSampleTexts,
    *,
    top_k: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    shard_tokens: int = 1 << 20,
) -> LogitCache:
    """Make a cache of log-probabilities that OpenAI's or vLLM's servers gave; the forms are those of `storage.served`.

    Each answer belongs to a sample of the data, by its `sample_id` or by its `prompt` and `response`. Its tokens must
    spell the response. Log-probabilities are those of temperature 1. What is not among the k likeliest is the tail,
    1 − Σ p. Normalisers and moments of the logits are not known, so that a source from such a cache serves all terms
    but those that standardise logits or compare them as they are: `graph_values` and `uld_values` are to be `softmax`.

    Everything is checked before the folder changes; a cache that was imported before is replaced as a whole.

    Args:
        files: paths or globs of `.jsonl` and `.parquet`.
        folder: of the cache.
        tokenizer: of the source: hub id, local folder, `.gguf` file, or the tokenizer itself.
        data: data module of the samples.
        top_k: k; None is the least number of tokens that a position has.
        dtype: of the log-probabilities.
        shard_tokens: approximate number of positions in a file.

    Returns:
        The cache. Samples without an answer are not in it, which training tells at its start.

    Raises:
        ValueError: If an answer is of no sample, its tokens are not of the tokenizer or spell something else, or
            values are no log-probabilities; it names the row.
    """
    if not offers(data, HasSampleTexts):
        raise ValueError(lacks(data, HasSampleTexts, "the texts of samples, to which answers belong"))
    given = find_tokenizer(tokenizer, required=True) if isinstance(tokenizer, str) else tokenizer
    found = cast(PreTrainedTokenizerBase, given)
    vocabulary = ServedVocabulary(token_table(found), textless_tokens(found))
    paths, texts = _find_files(files), {number: (prompt, response) for number, prompt, response in data.sample_texts()}
    numbers = {pair: number for number, pair in texts.items()}
    model = next((answer.model for answer in read_answers(paths)), "")

    def rows() -> Iterator[ServedRow]:
        for answer in read_answers(paths):
            number = _sample_of(answer, texts, numbers)
            yield read_row(answer, number, texts[number][1], vocabulary)

    settings = {"model": model, "tokenizer_id": tokenizer_id(found), "dtype": dtype}
    place = Path(folder).expanduser()
    write_served(rows, place, settings, vocabulary, top_k=top_k, shard_tokens=shard_tokens)
    return LogitCache(place)


def _find_files(files: str | Sequence[str]) -> list[str]:
    """Return the files of paths and globs.

    Raises:
        ValueError: If one names nothing.
    """
    paths = []
    for pattern in [files] if isinstance(files, str) else files:
        whole = str(Path(pattern).expanduser())
        matches = [whole] if Path(whole).is_file() else sorted(glob.glob(whole, recursive=True))
        if not matches:
            raise ValueError(f"Expected `files` to be files or globs, but nothing matches {pattern!r}.")
        paths += matches
    return paths


def _sample_of(answer: ServedAnswer, texts: Texts, numbers: dict[tuple[str, str], int]) -> int:
    """Return the id of the sample that an answer belongs to."""
    if answer.sample_id is not None:
        if answer.sample_id in texts:
            return answer.sample_id
        given = f"`sample_id` {answer.sample_id}"
    elif answer.prompt is None or answer.response is None:
        given = "neither a `sample_id` nor `prompt` and `response`"
    else:
        number = numbers.get((answer.prompt, answer.response))
        if number is not None:
            return number
        given = f"the prompt {answer.prompt!r} with the response {answer.response!r}"
    raise ValueError(
        f"Expected {answer.where} to belong to a sample of the data ({len(texts)} samples), but got {given}. Give the"
        " data that were served: `sample_texts()` of the data module lists ids, prompts and responses."
    )
