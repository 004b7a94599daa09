"""Write a cache of top-k logits that is not complete yet: its settings, and a part for each batch.

Parts lie in `parts/` and have the format of shards, see `logit_cache`. Files are made in `partial/`, flushed to disk
and moved into place, so that a kill leaves only whole files there; the next run removes what is left in `partial/`.

Letters: B samples of a batch, T positions, k `top_k`; S samples and M positions of a file.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_logits.functional.top_k_logits import SourceLogits
from lit_logits.storage.folders import replace_file
from lit_logits.storage.logit_cache import (
    CACHE_FORMAT,
    CACHE_VERSION,
    LABEL_FIELDS,
    TOKENS_FILE,
    LogitCache,
    describe_cache,
)
from lit_logits.storage.settings import differing_settings

__all__ = [
    "begin_cache",
    "check_cache",
    "complete_settings",
    "find_finished",
    "find_parts",
    "offsets_of",
    "pack_fields",
    "pack_logits",
    "reopen_cache",
    "save_tensors",
    "write_description",
    "write_part",
]

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


# ---------------------------------------------------------------------- settings


def complete_settings(source: str, settings: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """Return settings as `cache.json` keeps them: plain JSON, with a `dtype`, and the fingerprint as `data`.

    Raises:
        ValueError: If a setting that reading needs is missing, or a value is not allowed.
    """
    needed = ("temperature", "tokenizer_id", "top_k", "vocab_size")
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(f"Expected the cache settings of source {source!r} to have {missing}, but got {settings}.")
    if Path(source).name != source or source == "..":
        raise ValueError(f"Expected names of sources that can be names of folders, but got {source!r}.")
    if settings.get("dtype", "float32") not in _DTYPES:
        raise ValueError(f"Expected the `dtype` of source {source!r} to be one of {list(_DTYPES)}, but got {settings}.")
    try:
        return json.loads(json.dumps({"dtype": "float32", **settings, "data": data}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected plain JSON values as cache settings of {source!r}, but got {error}.") from error


def check_cache(folder: Path, settings: Mapping[str, Any], *, extends: bool = False) -> str | None:
    """Return why `folder` cannot take logits of these settings, or None if it is new or a cache of them.

    With `extends` it may have been written for other data, whose samples have other ids.
    """
    advice = "Pass another `folder`, or delete it."
    description = describe_cache(folder)
    if description is None:
        strangers = sorted({path.name for path in folder.iterdir()} - {"partial"}) if folder.is_dir() else []
        if folder.exists() and (strangers or not folder.is_dir()):
            found = f"it has {strangers[0]} and no cache.json of one" if strangers else "it is a file"
            return f"Expected {folder} to be new or the logit cache of an earlier run, but {found}. {advice}"
        return None
    if description.get("version") != CACHE_VERSION:
        return (
            f"Expected {folder} to be a logit cache of version {CACHE_VERSION}, but got version"
            f" {description.get('version')}. {advice}"
        )
    there = {**description["settings"], "data": settings["data"]} if extends else description["settings"]
    if differing := differing_settings(there, settings):
        return f"Expected {folder} to hold logits of these settings, but {', '.join(differing)}. {advice}"
    try:
        if description["complete"]:
            LogitCache(folder)
    except ValueError as error:
        return str(error)
    return None


def begin_cache(folder: Path, settings: Mapping[str, Any], tokens: Sequence[bytes | None] | None = None) -> None:
    """Make a cache without samples unless there is a cache, and remove what a kill left half done.

    Args:
        folder: of the cache.
        settings: as `complete_settings` returns them.
        tokens: bytes of each token of the source, None for one that stands for no text; None if they are not known.
    """
    if (folder / "partial").is_dir():
        shutil.rmtree(folder / "partial")
    description = describe_cache(folder)
    if description is None or not description["complete"]:
        if description is None or description["settings"] != settings:
            write_description(folder, settings, complete=False)
        _take_apart(folder)
    if tokens is not None and not (folder / TOKENS_FILE).is_file():
        texts = [None if token is None else token.decode("latin-1") for token in tokens]
        _write_text(folder, TOKENS_FILE, json.dumps(texts, separators=(",", ":")) + "\n")


def reopen_cache(folder: Path, settings: Mapping[str, Any]) -> None:
    """Let a complete cache take more samples: it is not complete any more, and its shards are parts."""
    write_description(folder, settings, complete=False)
    _take_apart(folder)


def _take_apart(folder: Path) -> None:
    """Make parts of the shards of a cache that is not complete, which it had before, or which a killed join left."""
    for shard in sorted(folder.glob("shard-*.safetensors")):
        (folder / "parts").mkdir(exist_ok=True)
        with safe_open(shard, framework="pt") as opened:
            ids = opened.get_tensor("sample_ids")
        os.replace(shard, _part_of(folder, ids))


def find_finished(folder: Path) -> list[int]:
    """Return the ids of the samples on disk; remove parts that a failing disk has torn, to be written again."""
    description = describe_cache(folder)
    if description and description["complete"]:
        return LogitCache(folder).sample_ids.tolist()
    found: dict[int, None] = {}
    for path in find_parts(folder):
        try:
            with safe_open(path, framework="pt") as part:
                found.update(dict.fromkeys(part.get_tensor("sample_ids").tolist()))
        except SafetensorError:
            path.unlink()
    return list(found)


# ---------------------------------------------------------------------- parts


def pack_logits(
    source: str, logits: SourceLogits, sample_ids: Tensor, rows: Sequence[int], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors of a part: the positions that count of `rows` of the batch, in their order, on the CPU.

    Raises:
        ValueError: If shapes or tokens do not fit the settings, or logits are not finite.
    """
    size, top_k = settings["vocab_size"], settings["top_k"]
    shape, wide = logits.mask.shape, logits.top_k.log_probs.shape
    if shape[:1] != sample_ids.shape or wide != (*shape, top_k) or logits.top_k.token_ids.shape != wide:
        raise ValueError(
            f"Expected the logits of source {source!r} to be padded to (B, T, {top_k}) and their mask to (B, T), but"
            f" got {tuple(wide)} and {tuple(shape)} for {len(sample_ids)} samples."
        )
    index = torch.tensor(rows, device=logits.mask.device)
    mask = logits.mask[index]
    given = {**logits.top_k._asdict(), "ends": logits.ends}
    given |= {name: values for name in LABEL_FIELDS if (values := getattr(logits, name)) is not None}
    fields = {name: values[index][mask].detach().cpu() for name, values in given.items()}
    lengths, ids = mask.sum(1).cpu(), sample_ids.detach().cpu()[index.cpu()]
    if not (finite := fields["log_normalizer"].isfinite()).all():
        at = int((~finite).nonzero()[0])
        value = "NaN" if fields["log_normalizer"][at].isnan() else "infinity"
        sample = int(ids.repeat_interleave(lengths)[at])
        raise ValueError(f"Expected the logits of source {source!r} to be finite, but got {value} in sample {sample}.")
    tokens = fields["token_ids"]
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(f"Expected tokens of source {source!r} to be in [0, {size}), but got {int(tokens.max())}.")
    return {"sample_ids": ids.long(), "offsets": offsets_of(lengths), **pack_fields(fields, settings)}


def pack_fields(fields: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return fields in the types of a cache of these settings."""
    ids = torch.uint16 if settings["vocab_size"] <= 1 << 16 else torch.int32
    dtypes = {"ends": torch.int32, "token_ids": ids}
    dtypes |= dict.fromkeys(("log_probs", *LABEL_FIELDS), _DTYPES[settings["dtype"]])
    return {name: tensor.to(dtypes.get(name, torch.float32)).contiguous() for name, tensor in fields.items()}


def write_part(folder: Path, part: dict[str, Tensor]) -> None:
    """Write a part to disk, under a name that follows from its samples, so that a repetition replaces it."""
    save_tensors(part, folder, _part_of(folder, part["sample_ids"]))


def _part_of(folder: Path, sample_ids: Tensor) -> Path:
    """Return the place of a part with these samples."""
    ids = json.dumps(sorted(sample_ids.tolist()))
    return folder / "parts" / f"{hashlib.sha256(ids.encode()).hexdigest()[:32]}.safetensors"


# ---------------------------------------------------------------------- files


def find_parts(folder: Path) -> list[Path]:
    """Return whole parts, in an order that does not depend on the file system."""
    return sorted((folder / "parts").glob("*.safetensors"))


def offsets_of(lengths: Tensor) -> Tensor:
    """Return the offsets (S + 1,), from 0, of samples with lengths (S,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()


def write_description(folder: Path, settings: Mapping[str, Any], **state: Any) -> dict[str, Any]:
    """Replace `cache.json`, and return what it says."""
    description = {"format": CACHE_FORMAT, "version": CACHE_VERSION, "settings": dict(settings), **state}
    _write_text(folder, "cache.json", json.dumps(description, indent=2, sort_keys=True) + "\n")
    return description


def _write_text(folder: Path, name: str, text: str) -> None:
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    replace_file(
        folder / name, lambda partial: partial.write_text(text, encoding="utf-8"), partial=folder / "partial" / name
    )


def save_tensors(tensors: dict[str, Tensor], folder: Path, target: Path) -> None:
    """Write a file of `folder` to disk as `target`."""
    for path in (folder / "partial", target.parent):
        path.mkdir(exist_ok=True)
    mode = (folder / "cache.json").stat().st_mode

    def write(partial: Path) -> None:
        save_file(tensors, partial)
        partial.chmod(mode)  # safetensors' 0600 would lock a shared cache to one user

    replace_file(target, write, partial=folder / "partial" / f"{secrets.token_hex(8)}.safetensors")
