"""The on-disk cache: entries are named by a digest of all that shaped them and appear whole or not at all.

An entry is a folder `<cache_dir>/<kind>-<digest>`. It is built under a file lock in a temporary folder beside it and
moved into place by one atomic rename, so an interrupted build leaves nothing that could be mistaken for an entry, and
processes that ask for the same entry at the same time build it once.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["build_once", "default_cache_dir", "digest", "digest_file", "hide_progress"]


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/lit_logits`, or `~/.cache/lit_logits` where that variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit_logits"


def digest(*parts: object) -> str:
    """Return the SHA-256 of the parts' `repr`, as 64 hexadecimal digits.

    Args:
        parts: values whose `repr` is the same in every process: strings, numbers, None and tuples or lists of these.

    Example:
        >>> digest("corpus", 256) == digest("corpus", 256), digest("corpus", 256) == digest("corpus", "256")
        (True, False)
    """
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Make sure that the folder `target` exists, building it if it does not, and return it.

    The next build removes what a killed one has left.

    Args:
        target: folder of the cache entry; its name identifies its content.
        build: writes the entry's files into the folder that it is given. If it raises, no entry appears.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():  # another process built it while this one waited for the lock
            return target
        for stale in target.parent.glob(f"{target.name}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        partial.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would lock a shared cache to one user
        try:
            build(partial)
            partial.replace(target)
        except BaseException:  # an interrupt too must leave nothing behind
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target


def hide_progress() -> bool | None:
    """Return tqdm's `disable`: True but on rank zero, where None shows bars on a terminal only."""
    return True if getattr(rank_zero_only, "rank", 0) else None


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
