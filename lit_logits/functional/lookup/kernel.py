"""vq_lookup.cpp, built by the machine's compiler at first use and kept in the user's cache."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PackedHead", "head_struct", "lookup_kernel"]

EIGHT = 8
"""Rows that are looked up together, as in vq_lookup.cpp; groups are filled up to a multiple."""

_OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", *_OPENMP]


class PackedHead(NamedTuple):
    """Input of vq_lookup.cpp.

    A block is 2,048 tokens. The codes of a stage that a block owns are a tile, stored group after group.

    Attributes:
        codebooks: (S, G, d/G, K) float32.
        codes: (Σ_s n_s · slots + 64,) uint8, or int16 where K > 256; slots: G filled up to a multiple of 8.
        places: (Σ_s n_s,) int16, where a tile's tokens stand in their block.
        starts: (S, blocks + 1) int64, where the tiles start, in tokens.
        token_bias: (V,) float32.
    """

    codebooks: Tensor
    codes: Tensor
    places: Tensor
    starts: Tensor
    token_bias: Tensor


class _Head(ctypes.Structure):
    """`Head` of vq_lookup.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("vocab_size", "num_stages", "num_groups", "num_slots")),
        *((name, ctypes.c_int64) for name in ("width", "codebook_size", "num_threads")),
        *((name, ctypes.c_void_p) for name in PackedHead._fields),
    )


def head_struct(packed: PackedHead) -> ctypes.Structure:
    """Return a head in the form that vq_lookup.cpp takes; it points into `packed`, which must outlive it."""
    num_stages, num_groups, width, codebook_size = packed.codebooks.shape
    sizes = (packed.token_bias.shape[0], num_stages, num_groups, num_groups + -num_groups % EIGHT)
    return _Head(*sizes, width, codebook_size, torch.get_num_threads(), *(tensor.data_ptr() for tensor in packed))


@functools.cache
def lookup_kernel() -> ctypes.CDLL | None:
    """Compile and load vq_lookup.cpp; return None with a warning if that fails."""
    try:
        library = ctypes.CDLL(str(_compile()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        warnings.warn(
            "Expected a C++ compiler that builds vq_lookup.cpp, but got the error below. Tokens are looked up in torch,"
            " which takes several times as long. Install g++ or clang (`apt-get install g++`, or on a Mac"
            f" `xcode-select --install`), or name a compiler in the environment variable CXX.\n{reason}",
            stacklevel=4,
        )
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.lookup_logits.argtypes = [ctypes.POINTER(_Head), integer, integer, pointer, pointer, pointer]
    if hasattr(library, "lookup_greedy"):
        library.lookup_greedy.argtypes = [ctypes.POINTER(_Head), integer, pointer, pointer, pointer, pointer]
    return library


def _compile() -> Path:
    """Build vq_lookup.cpp for this processor, unless the user's cache holds it already."""
    source = Path(__file__).with_name("vq_lookup.cpp")
    command = [*shlex.split(os.environ.get("CXX") or "c++"), *_FLAGS]
    # A home may be shared by machines. The macros that a compiler predefines tell its version and the processor.
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(f"{command}{macros}{source.read_text()}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_logits"
    # The name ends with the digest of what the file holds: to load one that is cut off would kill the process.
    for found in folder.glob(f"vq_lookup-{key}-*.so"):
        if found.stem.endswith(_digest(found)):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed at the end: other processes may do the same
        built = Path(scratch) / "vq_lookup.so"
        _run([*command, str(source), "-o", str(built)])
        return built.replace(folder / f"vq_lookup-{key}-{_digest(built)}.so")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
