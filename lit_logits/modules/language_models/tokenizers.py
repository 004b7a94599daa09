"""Tokenizers of models: found, compared, and identified by their vocabulary."""

import hashlib
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

__all__ = ["check_same_tokenizer", "find_tokenizer", "tokenizer_id"]


def find_tokenizer(name: str, *, required: bool = False) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside a model: a hub id, a local folder or a `.gguf` file; return None if there is no such.

    Raises:
        ValueError: If it is `required` and cannot be loaded.
    """
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
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
