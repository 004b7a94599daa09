"""From documents to blocks: tokenise, end each document with the eos token, join, and cut into blocks of T tokens.

The tail of a split that is shorter than a block is dropped.
"""

from collections.abc import Iterable, Sized
from pathlib import Path
from typing import NamedTuple

from datasets import Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.caching import hide_progress
from lit_logits.datamodules.prepared import write_sizes
from lit_logits.datamodules.tokenization import text_batches

__all__ = ["SplitSize", "pack", "write_blocks", "write_splits"]


class SplitSize(NamedTuple):
    """The size of a split.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, with the eos tokens and the dropped tail.
        blocks: number of blocks.
    """

    documents: int
    tokens: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.documents:,} documents, {self.tokens:,} tokens, {self.blocks:,} blocks"


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return the token ids of each document, with the eos token at the end and no other special token added."""
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, block_size: int) -> list[list[int]]:
    """Return the blocks of `block_size` tokens of the joined documents, without the tail."""
    tokens = [token for batch in text_batches(documents, len) for ids in tokenize(batch, tokenizer) for token in ids]
    return [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]


def write_blocks(
    file: Path,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    *,
    max_blocks: int | None = None,
) -> SplitSize:
    """Tokenise and pack documents into an Arrow file, a batch of documents at a time.

    Args:
        file: the Arrow file to write.
        documents: the texts; read no further than `max_blocks` needs.
        tokenizer: makes the tokens.
        block_size: T, tokens in a block.
        max_blocks: stop at this many blocks; None for all.
    """
    features = Features({"input_ids": Sequence(Value("int32"), length=block_size)})
    total = len(documents) if isinstance(documents, Sized) else None
    bar = tqdm(total=total, desc=f"Tokenising {file.stem}", unit="doc", disable=hide_progress(), leave=False)
    num_documents = num_tokens = num_blocks = 0
    rest: list[int] = []
    # Without the names that this version of datasets gives to its types, which an older one cannot read.
    with ArrowWriter(features=features, path=str(file), with_metadata=False) as writer, bar:
        for batch in text_batches(documents, len):
            for ids in tokenize(batch, tokenizer):
                rest += ids
                num_tokens += len(ids)
            cut = len(rest) // block_size
            if max_blocks is not None:
                cut = min(cut, max_blocks - num_blocks)
            if cut:
                writer.write_batch({"input_ids": [rest[i * block_size : (i + 1) * block_size] for i in range(cut)]})
            rest = rest[cut * block_size :]
            num_blocks += cut
            num_documents += len(batch)
            bar.update(len(batch))
            if num_blocks == max_blocks:
                break
        writer.finalize()
    return SplitSize(num_documents, num_tokens, num_blocks)


# The arguments are those of `write_blocks`, which does the work; this one names the splits and refuses an empty one.
def write_splits(
    directory: Path,
    splits: dict[str, Iterable[str]],
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    max_blocks: int | None = None,
) -> None:
    """Write each split's blocks and, last, `sizes.json`.

    Args:
        directory: existing folder to write into.
        splits: the documents of each split.
        tokenizer: makes the tokens.
        block_size: T, tokens in a block.
        max_blocks: stop each split at this many blocks; None for all.

    Raises:
        ValueError: If a split holds less than a block.
    """
    sizes = {
        name: write_blocks(directory / f"{name}.arrow", documents, tokenizer, block_size, max_blocks=max_blocks)
        for name, documents in splits.items()
    }
    if any(size.blocks == 0 for size in sizes.values()):
        held = ", ".join(f"{name} {size.tokens}" for name, size in sizes.items())
        raise ValueError(
            f"Expected `block_size` to be at most the number of tokens in each split ({held}), but got {block_size}. "
            "Lower `block_size`, or raise the split's fraction or set it to 0."
        )
    write_sizes(directory, sizes)
