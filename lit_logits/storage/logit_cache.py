"""The top-k logits of one source model on disk: the format, and `LogitCache`, which reads them.

A cache is a folder. Its `cache.json` holds the format's version, the settings of the source, whether the cache is
complete, its size, and the bytes of each shard. Where the tokenizer of the source was known, `tokens.json` holds the
bytes of each token as a text of Latin-1, null for one that stands for no text. The shards of a complete cache,
`shard-00000.safetensors`, …, hold the samples in ascending order of their ids; each sample has its positions that
count, one after the other:

    sample_ids (S,) int64      offsets (S + 1,) int64: positions offsets[s] to offsets[s + 1] are of sample s
    ends (M,) int32            token_ids (M, k) uint16, or int32 where the vocabulary has more than 65,536 tokens
    log_probs (M, k) float32 or float16                tail (M,) float32
    log_normalizer, mean, std (M,) float32; missing where log-probabilities are all that is known of the source
    label_log_probs (M,) like log_probs, of the token that came, at τ = 1; may be missing
    boundary_log_probs (M,) like log_probs, of a token that begins a word or ends the text, at τ = 1; may be missing

In version 1 positions within a character and after the response are missing, `ends` counts characters instead of bytes,
and there are neither `label_log_probs`, `boundary_log_probs` nor `tokens.json`.

Letters: B samples of a batch, T positions, k `top_k`; S samples and M positions of a file.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_logits.functional.top_k_logits import SourceLogits, TopKLogits

__all__ = [
    "CACHE_FIELDS",
    "CACHE_FORMAT",
    "CACHE_VERSION",
    "LABEL_FIELDS",
    "OPTIONAL_FIELDS",
    "TOKENS_FILE",
    "LogitCache",
    "describe_cache",
    "is_logit_cache",
]

CACHE_FORMAT = "lit_logits.logit_cache"
CACHE_VERSION = 2
READABLE_VERSIONS = (1, 2)
CACHE_FIELDS = ("ends", "token_ids", "log_probs", "tail")  # a row a position
SCALE_FIELDS = ("log_normalizer", "mean", "std")
LABEL_FIELDS = ("label_log_probs", "boundary_log_probs")
OPTIONAL_FIELDS = (*LABEL_FIELDS, *SCALE_FIELDS)
TOKENS_FILE = "tokens.json"

_NEUTRAL = {"ends": -1, "std": 1}  # what padding holds, where not 0


def is_logit_cache(path: str | Path) -> bool:
    """Return whether `path` is a folder with a `cache.json` of this format, of any version, complete or not."""
    try:
        return describe_cache(Path(path).expanduser()) is not None
    except OSError:
        return False


class LogitCache:
    """Read the top-k logits of one source by the ids of their samples, from shards that are mapped into memory.

    Opening reads only ids and offsets. A reader can be pickled, copied and forked; each copy maps the shards itself.

    Args:
        folder: of one source, as `LogitCacheWriter` leaves it.

    Attributes:
        settings: settings of the source, as they were written; `data` is the fingerprint of the data.
        top_k: k, as stored.
        temperature: τ of the stored log-probabilities.
        tokenizer_id: digest of the source's vocabulary.
        layout_id: `layout_id` of the batches that the source has read, or None if it is not known.
        vocab_size: size of the source's vocabulary.
        counts_bytes: whether ends count bytes, or else, in version 1, characters.
        has_label_log_probs: whether the log-probabilities of the tokens that came are there.
        has_boundary_log_probs: whether the log-probabilities of a new word are there.
        has_scale: whether normalisers and moments are there, of which logits can be made again.
        sample_ids: (S,) int64, ascending, of all shards.
        num_samples: S.
        num_tokens: positions of all samples.

    Raises:
        ValueError: If the folder is not a cache, or one of another version, or incomplete, or if a shard is not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        description = _describe_complete(self.folder)
        try:
            self.settings: dict[str, Any] = dict(description["settings"])
            self.top_k = int(self.settings["top_k"])
            self.temperature = float(self.settings["temperature"])
            self.tokenizer_id: Any = self.settings["tokenizer_id"]
            # In version 1 it depended on `max_length`, too.
            self.layout_id: Any = self.settings.get("layout_id") if description["version"] > 1 else None
            self.vocab_size = int(self.settings["vocab_size"])
            self.num_samples, self.num_tokens = int(description["num_samples"]), int(description["num_tokens"])
            sizes = [int(size) for size in description["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            wrong = f"misses or misspells {error}"
            raise _torn(self.folder, self.folder / "cache.json", wrong) from error
        self.counts_bytes = description["version"] > 1
        self._files = [self.folder / f"shard-{index:05d}.safetensors" for index in range(len(sizes))]
        self._maps: dict[int, dict[str, Tensor]] = {}
        self._process = os.getpid()
        ids, offsets, optional = zip(*map(self._check, self._files, sizes), strict=True)
        self._fields = (*CACHE_FIELDS, *(name for name in OPTIONAL_FIELDS if all(name in found for found in optional)))
        self.has_label_log_probs = "label_log_probs" in self._fields
        self.has_boundary_log_probs = "boundary_log_probs" in self._fields
        self.has_scale = set(SCALE_FIELDS) <= set(self._fields)
        self.sample_ids = torch.cat(ids)
        self._starts = torch.cat([offset[:-1] for offset in offsets])
        self._lengths = torch.cat([offset.diff() for offset in offsets])
        self._shards = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(part) for part in ids]))
        found = len(self.sample_ids), int(self._lengths.sum())
        if found != (self.num_samples, self.num_tokens) or not (self.sample_ids.diff() > 0).all():
            raise _torn(self.folder, self.folder, f"its shards hold {found[0]} samples of {found[1]} positions")

    @cached_property
    def tokens(self) -> list[bytes | None] | None:
        """Bytes of each token of the source, None for one that stands for no text; None if they are not there.

        Raises:
            ValueError: If the file of them is not whole.
        """
        path = self.folder / TOKENS_FILE
        if not path.is_file():
            return None
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
            return [None if text is None else text.encode("latin-1") for text in texts]
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise _torn(self.folder, path, str(error)) from error

    def __len__(self) -> int:
        return self.num_samples

    def __contains__(self, sample_id: int) -> bool:
        at = int(torch.searchsorted(self.sample_ids, int(sample_id)))
        return at < len(self) and int(self.sample_ids[at]) == int(sample_id)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(
        self, sample_ids: Tensor, *, top_k: int | None = None, device: torch.device | str | None = None
    ) -> SourceLogits:
        """Return the logits of a batch: the positions of each sample that count, without gaps, and padding after them.

        Padding has the mask False, ends of −1, a `std` of 1, and zeros elsewhere. Floats are float32; from a
        float32 cache they are what was written, bit for bit. Without `has_scale`, normalisers and moments are NaN.

        Args:
            sample_ids: (B,) in any order.
            top_k: number of columns to read; the tail takes the probabilities of the others. None reads all.
            device: device of the result; None is the CPU.

        Returns:
            Logits with the T of the longest sample, at least 1; a sample without positions is a row of padding.

        Raises:
            ValueError: If a sample is not there, or `top_k` is not in [1, k].
        """
        k = self.top_k if top_k is None else top_k
        if not 1 <= k <= self.top_k:
            raise ValueError(f"Expected `top_k` to be in [1, {self.top_k}], as stored in {self.folder}, but got {k}.")
        rows = self._find(sample_ids)
        places = torch.stack([self._shards[rows], self._starts[rows], self._lengths[rows]], 1).tolist()
        fields = {name: self._gather(name, places) for name in self._fields}
        ends, token_ids = fields["ends"].long(), fields["token_ids"].long()
        mask = torch.arange(ends.shape[1]) < self._lengths[rows, None]
        log_probs, tail = fields["log_probs"].float(), fields["tail"]
        if k < self.top_k:
            cut, log_probs, token_ids = log_probs[..., k:], log_probs[..., :k].contiguous(), token_ids[..., :k]
            if fields["log_probs"].dtype == torch.float32:
                tail = (1 - log_probs.exp().sum(-1)).clamp_(min=0)  # as `top_k_logits` makes it, to the bit
            else:
                tail = tail.add_(cut.exp().sum(-1)).clamp_(max=1)
            tail = tail.masked_fill_(~mask, 0)
        rest = (fields[name] if self.has_scale else _unknown(name, mask) for name in SCALE_FIELDS)
        top = TopKLogits(*(tensor.to(device).contiguous() for tensor in (log_probs, token_ids, tail, *rest)))
        labelled = [fields[name].float().to(device) if name in fields else None for name in LABEL_FIELDS]
        return SourceLogits(top, mask.to(device), ends.to(device), *labelled)

    def _find(self, sample_ids: Tensor) -> Tensor:
        """Return the rows of the samples among those of all shards."""
        wanted = sample_ids.to("cpu", torch.int64)
        rows = torch.searchsorted(self.sample_ids, wanted).clamp_(max=len(self) - 1)
        missing = wanted[self.sample_ids[rows] != wanted]
        if len(missing):
            raise ValueError(
                f"Expected the cache {self.folder} to hold sample {missing[0]}, but it was written for other data (data"
                f" fingerprint {self.settings.get('data')!r}; {len(self)} samples). Run `predict` again for these data."
            )
        return rows

    def _gather(self, name: str, places: list[list[int]]) -> Tensor:
        """Return a field (B, T, ...); `places` are shard, start and length of each sample."""
        slices = [self._map(shard)[name][start : start + length] for shard, start, length in places]
        one = self._map(0)[name][:0].new_zeros(1, *self._map(0)[name].shape[1:])  # so that B or T may be 0
        return pad_sequence([*slices, one], batch_first=True, padding_value=_NEUTRAL.get(name, 0))[:-1]

    def _map(self, shard: int) -> dict[str, Tensor]:
        """Return the fields of a shard, mapped into memory: the disk is read where they are used."""
        if self._process != os.getpid():
            self._process, self._maps = os.getpid(), {}
        if shard not in self._maps:
            try:
                with safe_open(self._files[shard], framework="pt") as file:
                    self._maps[shard] = {name: file.get_tensor(name) for name in self._fields}
            except (OSError, SafetensorError) as error:
                raise _torn(self.folder, self._files[shard], str(error)) from error
        return self._maps[shard]

    def _check(self, path: Path, size: int) -> tuple[Tensor, Tensor, set[str]]:
        """Return `sample_ids`, `offsets` and the optional fields of a shard, once its sizes are checked."""
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise _torn(self.folder, path, f"has {found} instead of {size} bytes")
        try:
            with safe_open(path, framework="pt") as file:
                ids, offsets = file.get_tensor("sample_ids").clone(), file.get_tensor("offsets").clone()
                optional = set(OPTIONAL_FIELDS) & set(file.keys())
                shapes = {name: file.get_slice(name).get_shape() for name in (*CACHE_FIELDS, *sorted(optional))}
        except (OSError, SafetensorError) as error:
            raise _torn(self.folder, path, str(error)) from error
        rising = offsets.ndim == ids.ndim == 1 and len(offsets) == len(ids) + 1 and bool((offsets.diff() >= 0).all())
        length = int(offsets[-1]) if rising and int(offsets[0]) == 0 else -1
        wide = ("token_ids", "log_probs")
        if any(shape != ([length, self.top_k] if name in wide else [length]) for name, shape in shapes.items()):
            raise _torn(self.folder, path, f"its tensors are of shapes {shapes}")
        return ids, offsets, optional


def describe_cache(folder: Path) -> dict[str, Any] | None:
    """Return what `cache.json` says, or None if the folder has none of this format."""
    file = folder / "cache.json"
    try:
        description = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (ValueError, RecursionError):
        return None
    return description if isinstance(description, dict) and description.get("format") == CACHE_FORMAT else None


def _describe_complete(folder: Path) -> dict[str, Any]:
    description = describe_cache(folder)
    if description is None:
        raise ValueError(f"Expected a folder of cached logits with a cache.json, but {folder} has none.")
    if description.get("version") not in READABLE_VERSIONS:
        raise ValueError(
            f"Expected {folder} to be of a version in {list(READABLE_VERSIONS)} of the format of cached logits, but got"
            f" version {description.get('version')}. Delete it and run the predict command again."
        )
    if not description.get("complete"):
        raise ValueError(
            f"Expected the cache {folder} to be complete, but it was stopped before its end: run the predict command"
            " again, which goes on from there."
        )
    return description


def _unknown(name: str, mask: Tensor) -> Tensor:
    """Return NaN at the positions (B, T) that count, and what padding holds elsewhere."""
    return torch.where(mask, torch.nan, float(_NEUTRAL.get(name, 0)))


def _torn(folder: Path, path: Path, found: str) -> ValueError:
    return ValueError(f"Expected {path} to be whole, but {found}. Delete {folder} and run the predict command again.")
