"""Tokenizers of models: found, compared, and identified by their vocabulary; the texts of their tokens."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["check_same_tokenizer", "find_tokenizer", "textless_tokens", "token_table", "tokenizer_id"]


_OF_TOKENIZERS = re.compile(r"token|vocab|merges|spiece|spm|bpe|\.model$")


def find_tokenizer(name: str, *, required: bool = False) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside a model: a hub id, a local folder or a `.gguf` file; return None if there is no such.

    Raises:
        ValueError: If it is `required` and cannot be loaded.
    """
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        # transformers 5.3 makes one without tokens of the config alone.
        if path.is_dir() and not any(_OF_TOKENIZERS.search(file.name) for file in path.iterdir()):
            raise FileNotFoundError(f"{path} holds no file of a tokenizer.")
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:  # parsers of damaged files raise errors of any kind
        if required:
            raise ValueError(
                f"Expected `tokenizer` to be a hub id, a local folder or a .gguf file, but got {name!r}: {error}"
            ) from error
        return None


def check_same_tokenizer(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str, other_name: str
) -> None:
    """Raise unless both give every token the same id.

    Raises:
        ValueError: If a token has two ids or one of them lacks it; the error names the first, special tokens first.
    """
    first, second = one.get_vocab(), other.get_vocab()
    if first == second:
        return
    different = [token for token in first.keys() | second.keys() if first.get(token) != second.get(token)]
    special = {*one.all_special_tokens, *other.all_special_tokens}
    token = min(different, key=lambda token: (token not in special, first.get(token, second.get(token)), token))
    kind = "special token" if token in special else "token"
    raise ValueError(
        f"Expected {name} and {other_name} to have one tokenizer, because logits are added id by id, but the {kind}"
        f" {token!r} has id {first.get(token)} in the one and {second.get(token)} in the other ({len(different)}"
        " tokens differ). Use models of one family."
    )


def tokenizer_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a number that identifies the vocabulary, the one that data modules put into batches."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = "\n".join(f"{number} {token}" for token, number in tokens).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1  # 63 bits, to fit an int64 tensor


def token_table(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Return the bytes that each token stands for in a text, in the order of the ids, to compare vocabularies by.

    A space before a word belongs to its token, however a vocabulary writes it (`Ġ`, `▁`, or no `##`). Special tokens
    stand for no text and are None, and so is the fallback of a single byte that has a token of its own too.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = set(textless_tokens(tokenizer).values())
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    fallbacks = set()
    read = _reader(tokenizer)
    for token, number in vocabulary.items():
        if number in special:
            continue
        if number in added:  # is written as it is
            table[number] = token.encode("utf-8", "surrogatepass")
        elif fallback := re.fullmatch("<0x([0-9A-F]{2})>", token):
            table[number] = bytes.fromhex(fallback[1])
            fallbacks.add(number)
        else:
            table[number] = read(token)
    own = {text for number, text in enumerate(table) if number not in fallbacks}
    return [None if number in fallbacks and text in own else text for number, text in enumerate(table)]


def textless_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of special tokens, which stand for no text, by their names."""
    special = {*tokenizer.all_special_ids, *(n for n, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return {token: number for token, number in tokenizer.get_vocab().items() if number in special}


def _reader(tokenizer: Any) -> Callable[[str], bytes]:
    """Return a function that makes bytes of a token's name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in str(backend.decoder):
        numbers = {character: number for number, character in bytes_to_unicode().items()}
        return lambda token: bytes(numbers[character] for character in token)
    if any(token.startswith("##") for token in tokenizer.get_vocab()):
        return lambda token: (token[2:] if token.startswith("##") else f" {token}").encode()
    return lambda token: token.replace("▁", " ").encode("utf-8", "surrogatepass")
