"""The tokenizer: loaded from the hub, a folder or a GGUF file, or a byte-level BPE trained on the training split."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lit_logits.datamodules.caching import build_once

__all__ = ["load_or_train_tokenizer", "load_tokenizer", "text_batches", "token_bytes", "tokenizer_id", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"
TEXTS_A_BATCH = 256
CHARACTERS_A_BATCH = 2**20
"""A batch ends with the text that reaches it: tokenising takes up to three hundred times the characters."""

_Text = TypeVar("_Text")
PAD, BEGIN, SEPARATOR = "<|pad|>", "<|cls|>", "<|sep|>"


def load_tokenizer(name: str | Path, argument: str = "`tokenizer`", *, has_end: bool = True) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer.

    Args:
        name: hub id, local folder, or path of a `.gguf` file.
        argument: what error messages call it.
        has_end: whether it must have an end-of-sequence token, which those of encoders lack.

    Raises:
        ValueError: If the tokenizer cannot be found, is a slow one, or has no end-of-sequence token.
    """
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf":
            if not path.is_file():
                raise FileNotFoundError(f"no such file: {path}")
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else str(name))
    except Exception as error:  # of a damaged file, whatever its parser stumbles over
        raise ValueError(
            f"Expected {argument} to be a hub id, a local folder, or a `.gguf` file, but got {str(name)!r}: {error}"
        ) from error
    return _check(tokenizer, name, argument, has_end)


def load_or_train_tokenizer(
    name: str | None, cache_dir: Path, key: Callable[[], str], train: Callable[[Path], None], *, has_end: bool = True
) -> PreTrainedTokenizerFast:
    """Load a tokenizer, or without a name the BPE of the cache, which the first use in any process trains.

    Args:
        name: hub id, local folder or `.gguf` file; None is the BPE.
        cache_dir: folder of the cache.
        key: returns the digest of all that shapes the BPE; not called with a name, as it may read the source.
        train: writes the BPE into the folder that it is given.
        has_end: see `load_tokenizer`.
    """
    folder = name if name is not None else build_once(cache_dir / f"tokenizer-{key()}", train)
    return load_tokenizer(folder, has_end=has_end)


def train_bpe(documents: Iterable[str], vocab_size: int, directory: Path, *, for_encoders: bool = False) -> None:
    """Train a byte-level BPE and save it for `load_tokenizer`; equal documents give an equal tokenizer.

    Every byte is in the alphabet, so no text is unknown. `<|endoftext|>`, token 0, ends, begins and pads sequences.

    Args:
        documents: the training texts.
        vocab_size: number of tokens, at least those of the bytes and the special ones, 257 or 259. A small corpus may
            give fewer.
        directory: existing folder to write into.
        for_encoders: make `<|pad|>`, token 0, pad sequences, and put `<|cls|>` before and `<|sep|>` after each text,
            as encoders want them, in place of `<|endoftext|>`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, SEPARATOR] if for_encoders else [END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        rank_zero_warn(
            f"Expected the corpus to be large enough for `bpe_vocab_size`={vocab_size}, but it gave "
            f"{tokenizer.get_vocab_size()} tokens."
        )
    options: dict[str, Any] = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    if for_encoders:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {SEPARATOR}",
            pair=f"{BEGIN} $A {SEPARATOR} $B {SEPARATOR}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, SEPARATOR)],
        )
        options = {"pad_token": PAD, "cls_token": BEGIN, "sep_token": SEPARATOR}
        options["model_input_names"] = ["input_ids", "attention_mask"]  # not every encoder takes token types
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(directory)


def text_batches(texts: Iterable[_Text], num_characters: Callable[[_Text], int]) -> Iterator[list[_Text]]:
    """Yield texts, or what holds some, in batches that can be tokenised at once.

    Args:
        texts: in their order; no more is read than the batches that are taken.
        num_characters: returns the size of one.

    Example:
        >>> [len(batch) for batch in text_batches(["a" * 900_000] * 3 + ["b"] * 300, len)]
        [2, 256, 45]
    """
    batch: list[_Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += num_characters(text)
        if len(batch) == TEXTS_A_BATCH or size >= CHARACTERS_A_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_bytes(token: str) -> bytes | None:
    r"""Return the bytes that a token is a name of, in a byte-level vocabulary or as a byte's fallback, or else None.

    Example:
        >>> token_bytes("Ġé"), token_bytes("<0xF0>"), token_bytes("▁a")
        (b' \xe9', b'\xf0', None)
    """
    if fallback := re.fullmatch("<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(fallback[1])
    numbers = [_byte_numbers().get(character) for character in token]
    return None if None in numbers else bytes(number for number in numbers if number is not None)


@cache
def _byte_numbers() -> dict[str, int]:
    """Return the byte of each character of byte-level vocabularies."""
    return {character: number for number, character in bytes_to_unicode().items()}


def tokenizer_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a number of 63 bits for a vocabulary: it is the same where every token has the same id.

    It is what two parts compare that see each other's token ids only, such as a cache of logits and its reader.
    """
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = "\n".join(f"{number} {token}" for token, number in vocab)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def _check(
    tokenizer: PreTrainedTokenizerBase, name: str | Path, argument: str, has_end: bool
) -> PreTrainedTokenizerFast:
    """Return the tokenizer if it can serve; documents are never cut or padded by what its files ask for."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"Expected {argument} to be a fast one, but {str(name)!r} is a {type(tokenizer).__name__} without a "
            "`tokenizer.json`."
        )
    if has_end and tokenizer.eos_token_id is None:
        raise ValueError(
            f"Expected {argument} to have an end-of-sequence token, but {str(name)!r} has none. Set `eos_token` in "
            "its `tokenizer_config.json`."
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
