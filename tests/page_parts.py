"""Small files and names that stand in for a reader's own, for the code and the commands of pages.

Only those are made that the code mentions. `my/` holds a reader's data and models.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers import LlamaConfig as Config

from lit_logits.datamodules.tokenization import train_bpe

__all__ = ["write_parts"]

TEXT = "Every line of this text is read once, and the quick brown fox jumps over lazy dogs of number"


def write_parts(folder: Path, code: str) -> dict[str, Any]:
    """Write the files that `code` mentions into a folder, and return the names that it takes as given."""
    for name, write in FILES.items():
        if name in code:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    torch.manual_seed(0)
    made = {name: make() for name, make in NAMES.items() if name in code}
    return {**made, **({"moment": torch.eye(64)} if "moment" in code else {})}


def _texts() -> list[str]:
    words = TEXT.split()
    return [" ".join(words[(3 * n + k) % len(words)] for k in range(24)) + f" {n}." for n in range(200)]


def _pairs(path: Path) -> None:
    rows = [{"prompt": f"Say {text[:20]}", "response": text} for text in _texts()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _documents(path: Path) -> None:
    for number, text in enumerate(_texts()[:20]):
        (path.parent / f"{number}.txt").write_text("\n\n".join([text, *_texts()]))


def _rows(path: Path) -> None:
    lines = [f'"{text}",{"even" if number % 2 == 0 else "odd"}' for number, text in enumerate(_texts())]
    path.write_text("\n".join(["text,label", *lines]))


def _images(path: Path) -> None:
    for label, shade in {"dark": 40, "light": 200}.items():
        (path / label).mkdir(parents=True)
        for number in range(40):
            Image.new("RGB", (32, 32), (shade, shade, number)).save(path / label / f"{number}.png")


def _model(hidden: int, vocab_size: int = 320) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        train_bpe(_texts(), vocab_size, path)
        sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
        tokens = {"vocab_size": len(AutoTokenizer.from_pretrained(path)), "max_position_embeddings": 512}
        torch.manual_seed(hidden)
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        LlamaForCausalLM(Config(**sizes, **tokens, **special, num_attention_heads=2)).save_pretrained(path)

    return write


def _my_module(path: Path) -> None:
    path.write_text("from lit_logits import VQLogitsLM\n\n\nclass MyLM(VQLogitsLM):\n    pass\n")


def _my_heads(path: Path) -> None:
    path.write_text((Path(__file__).parent / "my_heads.py").read_text())


FILES: dict[str, Callable[[Path], None]] = {
    "my/pairs.jsonl": _pairs,
    "my/*.txt": _documents,
    "my.csv": _rows,
    "my/folder": _images,
    "my/images": _images,
    "my/large-model": _model(32),
    "my/small-base": _model(16),
    "my/small-expert": _model(16),
    "my/pivot": _model(16),
    "my/big-model": _model(32, 400),
    "my_package": lambda path: _my_module(path.with_suffix(".py")),
    "my_heads": lambda path: _my_heads(path.with_suffix(".py")),
}


def _classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 2))


NAMES: dict[str, Callable[[], Any]] = {
    "my_student": _classifier,
    "my_teacher": _classifier,
    "hidden": lambda: torch.randn(8, 576),
    "labels": lambda: torch.randint(0, 1000, (8,)),
    "weight": lambda: torch.randn(1000, 64),
    "counts": lambda: torch.ones(1000),
}
