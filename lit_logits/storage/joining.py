"""Join the parts of a cache of top-k logits to its shards.

The finished folder is the same, byte for byte, for any number of kills and processes and any order of the samples.

Letters: S samples and M positions of a file.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from lit_logits.storage.logit_cache import CACHE_FIELDS, OPTIONAL_FIELDS, describe_cache
from lit_logits.storage.writing import find_parts, offsets_of, save_tensors, write_description

__all__ = ["join_cache"]


class _Index(NamedTuple):
    """Where each sample lies, in ascending order of ids: (S,) each, `parts` indexing `files`."""

    sample_ids: Tensor
    parts: Tensor
    starts: Tensor
    lengths: Tensor
    files: list[Path]


def join_cache(folder: Path, shard_tokens: int = 1 << 20) -> dict[str, Any]:
    """Join the parts to shards of about `shard_tokens` positions, and return what `cache.json` says.

    Needs the memory of one shard. The parts are removed last, so that a kill loses nothing; for a complete cache, only
    leftovers are removed.

    Raises:
        ValueError: If there are no parts.
    """
    description = describe_cache(folder) or {}
    if not description.get("complete"):
        index, shards = _index_parts(folder), list[Path]()
        with tqdm(total=int(index.lengths.sum()), desc=f"Joining {folder.name}", disable=None, leave=False) as bar:
            for rows in _shard_rows(index.lengths, shard_tokens):
                shards.append(folder / f"shard-{len(shards):05d}.safetensors")
                save_tensors(_join_rows(index, rows), folder, shards[-1])
                bar.update(int(index.lengths[rows].sum()))
        for path in set(folder.glob("shard-*.safetensors")) - set(shards):
            path.unlink()  # left by a join that was killed and made more shards
        sizes, num_tokens = [path.stat().st_size for path in shards], int(index.lengths.sum())
        description = write_description(
            folder,
            description["settings"],
            complete=True,
            num_samples=len(index.sample_ids),
            num_tokens=num_tokens,
            bytes_per_token=round(sum(sizes) / max(1, num_tokens), 2),
            shards=sizes,
        )
    for name in ("parts", "partial"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    return description


def _index_parts(folder: Path) -> _Index:
    files = find_parts(folder)
    if not files:
        raise ValueError(f"Expected `predict` to bring samples for the logit cache {folder}, but got none.")
    ids, starts, lengths = [], [], []
    for path in files:
        with safe_open(path, framework="pt") as part:
            ids.append(part.get_tensor("sample_ids").clone())
            offsets = part.get_tensor("offsets")
        starts.append(offsets[:-1].clone())
        lengths.append(offsets.diff())
    parts = torch.arange(len(files)).repeat_interleave(torch.tensor([len(part) for part in ids]))
    sample_ids, order = torch.cat(ids).sort(stable=True)
    is_first = sample_ids.diff(prepend=sample_ids[:1] - 1) != 0  # a sample that is in two parts counts once
    order = order[is_first]
    return _Index(sample_ids[is_first], parts[order], torch.cat(starts)[order], torch.cat(lengths)[order], files)


def _shard_rows(lengths: Tensor, shard_tokens: int) -> list[slice]:
    """Return the rows of each shard: as many samples as fit, and at least one."""
    shards, start, tokens = [], 0, 0
    for row, length in enumerate(lengths.tolist()):
        if row > start and tokens + length > shard_tokens:
            shards.append(slice(start, row))
            start, tokens = row, 0
        tokens += length
    return [*shards, slice(start, len(lengths))]


def _join_rows(index: _Index, rows: slice) -> dict[str, Tensor]:
    """Return the tensors of one shard; each part is opened once."""
    offsets, joined = offsets_of(index.lengths[rows]), dict[str, Tensor]()
    places = torch.stack([index.parts[rows], index.starts[rows], offsets[:-1], index.lengths[rows]], 1)
    opened, fields = -1, dict[str, Tensor]()
    for number, start, target, length in places[places[:, 0].argsort(stable=True)].tolist():
        if number != opened:
            with safe_open(index.files[number], framework="pt") as part:
                names = [*CACHE_FIELDS, *sorted(set(OPTIONAL_FIELDS) & set(part.keys()))]
                opened, fields = number, {name: part.get_tensor(name) for name in names}
        for name, tensor in fields.items():
            if name not in joined:
                joined[name] = tensor.new_empty(int(offsets[-1]), *tensor.shape[1:])
            joined[name][target : target + length] = tensor[start : start + length]
    return {"sample_ids": index.sample_ids[rows].clone(), "offsets": offsets, **joined}
