"""What the benchmarks of VQ heads from scratch share: text, sizes of codes, a small backbone and its training."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_logits import VQLogitsLM
from lit_logits.callbacks import CodebookReinit
from lit_logits.datamodules import TextDataModule
from lit_logits.datamodules.sources import SUFFIXES
from lit_logits.functional import unigram_bias
from lit_logits.modules.vq_logits.parts import HeadFactory

__all__ = [
    "BACKBONE",
    "LR",
    "add_text_arguments",
    "fit",
    "make_model",
    "make_trainer",
    "open_text",
    "revival",
    "split_rows",
    "test_ppl",
    "unigram_ppl",
]

BACKBONE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LR = 2e-3


# ---------------------------------------------------------------------- text


def add_text_arguments(parser: argparse.ArgumentParser, *, vocab_size: int, block_size: int, batch_size: int) -> None:
    parser.add_argument("--text", nargs="+", help="files, globs and folders; default the Python documentation")
    parser.add_argument("--vocab-size", type=int, default=vocab_size, help="of a BPE trained on the training split")
    parser.add_argument("--tokenizer", help="folder or .gguf file, instead of a BPE")
    parser.add_argument("--cache-dir", help="of the blocks and the BPE")
    parser.add_argument("--block-size", type=int, default=block_size)
    parser.add_argument("--batch-size", type=int, default=batch_size)


def open_text(args: argparse.Namespace) -> TextDataModule:
    """The text in blocks, split, in the cache and open."""
    data = TextDataModule(
        find_texts(args.text) if args.text else "python-docs",
        tokenizer=args.tokenizer,
        bpe_vocab_size=args.vocab_size,
        block_size=args.block_size,
        batch_size=args.batch_size,
        cache_dir=args.cache_dir,
    )
    data.prepare_data()
    data.setup()
    return data


def find_texts(paths: Sequence[str]) -> list[str]:
    """The paths, and in place of a folder the files in it."""
    found: list[str] = []
    for path in paths:
        inside = sorted(file for file in Path(path).rglob("*") if file.suffix in SUFFIXES and file.is_file())
        found += map(str, inside) if Path(path).is_dir() else [path]
    return found


# ---------------------------------------------------------------------- heads


def split_rows(rows: int) -> list[int]:
    """A quarter of the rows as clusters, the rest in six stages: what did best in vq_ablation."""
    return [rows - 6 * (rows // 8), *[rows // 8] * 6]


# ---------------------------------------------------------------------- training


def make_model(
    head: HeadFactory,
    data: TextDataModule,
    *,
    steps: int,
    lr: float = LR,
    backbone: str | Mapping[str, Any] = BACKBONE,
    **options: Any,
) -> VQLogitsLM:
    """A model that is trained for so many steps, its rate up for three tenths of them and then down to 0."""
    return VQLogitsLM(
        backbone if isinstance(backbone, str) else dict(backbone),
        data.vocab_size,
        head=head,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1),
        **options,
    )


def make_trainer(**options: Any) -> L.Trainer:
    """A Trainer that prints and writes nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="auto", enable_model_summary=False, **quiet, **options)


def fit(
    model: VQLogitsLM, data: TextDataModule, steps: int, callbacks: Sequence[L.Callback] = (), **options: Any
) -> None:
    make_trainer(max_steps=steps, gradient_clip_val=1.0, callbacks=list(callbacks), **options).fit(model, data)


def revival(steps: int) -> CodebookReinit:
    """Dead codes are revived until three quarters of the training are over."""
    return CodebookReinit(every_n_steps=50, min_usage=0.01, stop_step=steps * 3 // 4)


def test_ppl(model: VQLogitsLM, data: TextDataModule, **options: Any) -> float:
    return make_trainer(**options).test(model, data, verbose=False)[0]["test/ppl"]


def unigram_ppl(data: TextDataModule) -> float:
    """Test perplexity of the training split's token frequencies, one half added to each count."""
    counts = torch.zeros(data.vocab_size)
    for batch in data.train_dataloader():
        counts += torch.bincount(batch["labels"].flatten(), minlength=data.vocab_size)
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in data.test_dataloader()])
    return float((-unigram_bias(counts)[labels].mean()).exp())
