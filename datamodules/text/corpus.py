"""A source of documents together with the rule that splits it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from datasets import IterableDataset

from lit_logits.datamodules.caching import digest
from lit_logits.datamodules.sources import Source, fingerprint_source, iter_column, read_source, stream_source
from lit_logits.datamodules.splitting import bucket_of, carve_splits

__all__ = ["Corpus", "TextSource"]


@dataclass(frozen=True)
class TextSource:
    """Where documents come from.

    Args:
        path: `"python-docs"` (the standard library's documentation, about 2 MB), files or globs of `.txt`, `.md`,
            `.jsonl` or `.parquet`, or a Hugging Face data set or local folder for `datasets.load_dataset`.
        subset: configuration of a Hugging Face data set, such as `"wikitext-103-raw-v1"`.
        text_column: name of the text in `.jsonl`, `.parquet` and data sets.
    """

    path: Source
    subset: str | None = None
    text_column: str = "text"


class Corpus:
    """The documents of a source, split. Nothing is read before it is asked for.

    A data set's own validation and test splits are used where they exist. The others are carved from its training
    split: of a stream, by a hash of each document's text, since nobody knows what is still to come; else by characters.

    Args:
        source: where the documents come from.
        streaming: read the source piece by piece and never as a whole.
        fractions: share of the corpus for `"val"` and `"test"`, in [0, 1).
        seed: of the split.
    """

    def __init__(
        self,
        source: TextSource,
        *,
        streaming: bool,
        fractions: dict[str, float],
        seed: int,
    ) -> None:
        self.path, self.subset, self.text_column = source.path, source.subset, source.text_column
        self.streaming = streaming
        self.fractions = fractions
        self.seed = seed
        self._documents: Mapping[str, Sequence[str]] | None = None

    @cached_property
    def key(self) -> str:
        """Digest of all that decides which documents are in which split."""
        source = fingerprint_source(self.path, self.subset, self.text_column, streaming=self.streaming)
        return digest(source, self.text_column, self.streaming, sorted(self.fractions.items()), self.seed)

    @cached_property
    def streams(self) -> dict[str, IterableDataset]:
        """The open streams: training, and what other splits the data set has."""
        return stream_source(self.path, self.subset, self.text_column)

    @property
    def held_out(self) -> dict[str, float]:
        """Shares of the training stream's documents that make up the splits that the data set lacks."""
        return {name: share for name, share in self.fractions.items() if name not in self.streams}

    @property
    def splits(self) -> list[str]:
        """Names of the splits that are not switched off."""
        if self.streaming:
            return ["train", *(name for name, share in self.fractions.items() if share or name in self.streams)]
        return [name for name, documents in self._read().items() if documents]

    def documents(self, split: str) -> Iterable[str]:
        """Return the documents of a split: a list, or a generator if the corpus is a stream."""
        return self._read_stream(split) if self.streaming else self._read()[split]

    def forget(self) -> None:
        """Give the memory of the documents back; they are read again if need be."""
        self._documents = None

    def _read(self) -> Mapping[str, Sequence[str]]:
        if self._documents is None:
            own = read_source(self.path, self.subset, self.text_column)
            missing = {name: share for name, share in self.fractions.items() if name not in own}
            self._documents = {**own, **carve_splits(own["train"], missing, self.seed)}
        return self._documents

    def _read_stream(self, split: str) -> Iterator[str]:
        own = split != "train" and split in self.streams
        for text in iter_column(self.streams[split if own else "train"], self.text_column):
            if text and not text.isspace() and (own or bucket_of(text, self.held_out, self.seed) == split):
                yield text
