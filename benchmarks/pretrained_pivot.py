"""What fusion of pretrained models is measured on: pairs, a pivot that was cut and healed, and caches of its sources.

All of it is made once, in a folder of the benchmark, and used again by the next run with the same settings.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_logits import CausalLM, GLDFusionModule
from lit_logits.callbacks import LogitCacheWriter
from lit_logits.datamodules import InstructionDataModule, TextDataModule
from lit_logits.storage.folders import replace_file

__all__ = ["cosine_with_warmup", "make_data", "make_trainer", "prepare"]

TWIN, OTHER = "twin", "other"
"""The model that the pivot was cut from, whose tokenizer it has, and one of another tokenizer."""


def prepare(args: argparse.Namespace, sources: Sequence[str]) -> InstructionDataModule:
    """Draw the pairs, heal the pivot and write caches, as far as they are not there; return the data, set up."""
    settings = {name: getattr(args, name) for name in PREPARED}  # as JSON has them: lists, numbers, texts
    note = args.folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise ValueError(
            f"Expected `--folder` to hold a pivot of these settings, but {args.folder} was made with others. Name"
            " another folder."
        )
    if not note.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        replace_file(note, lambda path: path.write_text(json.dumps(settings, indent=1)))
    _once(args.folder / "pairs", lambda folder: draw_pairs(args, folder))
    _once(args.folder / "pivot", lambda folder: heal(args, folder))
    if TWIN in sources and args.tune_steps:
        _once(args.folder / "tuned", lambda folder: tune(args, folder))
    for name in sources:  # one at a time, as both would take the memory of both
        _once(args.folder / name, lambda folder: write_cache(args, folder))
    few = args.folder / f"pairs-{args.train_rows}"
    _once(few, lambda folder: draw_few(args, folder))
    data = make_data(args, few)
    data.prepare_data()
    data.setup()
    return data


PREPARED = (
    *("twin", "other", "data", "columns", "drawn_rows", "rows", "max_length", "batch_size", "layers", "top_k"),
    *("heal_steps", "heal_batch", "heal_block", "heal_lr", "state_weight", "tune_steps", "tune_lr", "precision"),
)
"""Arguments that decide what the folder holds."""


def _once(folder: Path, make: Callable[[Path], Any]) -> None:
    """Make a folder, unless a run before this one has finished it."""
    done = folder.with_suffix(".done")
    if done.exists():
        return
    start = time.process_time(), time.perf_counter()
    make(folder)
    took = time.process_time() - start[0], time.perf_counter() - start[1]
    print(f"{folder}: {took[0] / 60:.1f} CPU minutes, {took[1] / 60:.1f} minutes", flush=True)
    done.write_text("")


# ---------------------------------------------------------------------- pairs


def draw_pairs(args: argparse.Namespace, folder: Path) -> None:
    """Write some pairs to train on, to validate and to test with, always the same, and a text of the others."""
    folder.mkdir(exist_ok=True)
    source: Any = {"path": args.data, **dict(zip(("prompt_column", "response_column"), args.columns, strict=True))}
    splits = InstructionDataModule(source if args.data != "python-questions" else args.data).pairs.splits
    mixed = random.Random(0).sample(splits["train"], len(splits["train"]))
    drawn = {"train": mixed[: args.drawn_rows], "validation": splits["val"][: args.rows // 2]}
    drawn["test"] = splits["test"][: args.rows]
    for name, pairs in drawn.items():
        _write_lines(folder / f"{name}.jsonl", [{"prompt": one.prompt, "response": one.response} for one in pairs])
    rest = [{"prompt": one.prompt, "response": one.response} for one in mixed[args.drawn_rows :]]
    _write_lines(
        args.folder / "rest.jsonl",
        [{**one, "text": f"Question: {one['prompt']}\nAnswer: {one['response']}"} for one in rest],
    )


def _write_lines(file: Path, rows: Sequence[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw_few(args: argparse.Namespace, folder: Path) -> None:
    """Copy the drawn pairs with the first ones to train on alone: pivot and caches serve any number of them."""
    shutil.copytree(args.folder / "pairs", folder, dirs_exist_ok=True)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[: args.train_rows]))


def make_data(args: argparse.Namespace, pairs: Path, **kwargs: Any) -> InstructionDataModule:
    """The drawn pairs in the tokens of the pivot and of the other source."""
    return InstructionDataModule(
        str(pairs),
        tokenizer=args.twin,
        source_tokenizers={OTHER: args.other},
        max_length=args.max_length,
        batch_size=args.batch_size,
        cache_dir=str(args.folder / "encoded"),
        **kwargs,
    )


# ---------------------------------------------------------------------- training


def make_trainer(**kwargs: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet, **kwargs)


def cosine_with_warmup(lr: float, steps: int) -> dict[str, Any]:
    """Optimizer and schedule of a run, as arguments of a module."""
    return {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, betas=(0.9, 0.95)),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, steps + 1, pct_start=0.1, cycle_momentum=False
        ),
    }


def heal(args: argparse.Namespace, folder: Path) -> None:
    """Cut the twin, and let what is left learn from the whole of it, on the pairs that were not drawn."""
    L.seed_everything(0, verbose=False)
    data = TextDataModule(
        str(args.folder / "rest.jsonl"),
        tokenizer=args.twin,
        block_size=args.heal_block,
        batch_size=args.heal_batch,
        cache_dir=str(args.folder / "encoded"),
    )
    module = CausalLM(
        args.twin,
        keep_layers=args.layers,
        kd_weight=1.0,
        state_weight=args.state_weight,
        freeze_embeddings=True,
        **cosine_with_warmup(args.heal_lr, args.heal_steps),
    )
    trainer = make_trainer(
        max_steps=args.heal_steps,
        max_epochs=-1,
        precision=args.precision,
        gradient_clip_val=1.0,
        limit_val_batches=4,
        num_sanity_val_steps=0,
        val_check_interval=max(1, args.heal_steps // 2),
        check_val_every_n_epoch=None,
        callbacks=[HealingProgress()],
    )
    trainer.fit(module, data)
    module.save_pretrained(folder, tokenizer=data.tokenizer)


def tune(args: argparse.Namespace, folder: Path) -> None:
    """Fine-tune the whole twin on pairs that were not drawn: a source that knows the task."""
    L.seed_everything(0, verbose=False)
    data = InstructionDataModule(
        str(args.folder / "rest.jsonl"),
        tokenizer=args.twin,
        max_length=args.max_length,
        batch_size=args.batch_size,
        cache_dir=str(args.folder / "encoded"),
    )
    module = CausalLM(args.twin, freeze_embeddings=True, **cosine_with_warmup(args.tune_lr, args.tune_steps))
    options: dict[str, Any] = {"max_steps": args.tune_steps, "max_epochs": -1, "limit_val_batches": 0}
    make_trainer(**options, precision=args.precision, gradient_clip_val=1.0).fit(module, data)
    module.save_pretrained(folder, tokenizer=data.tokenizer)


class HealingProgress(L.Callback):
    """Prints how far the pivot is from the whole model, and the minutes left."""

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Print a line."""
        values = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items() if "val/" in name}
        step = trainer.global_step
        left = (time.perf_counter() - self.began) / step * (trainer.max_steps - step) / 60 if step else float("nan")
        print(f"healing: step {step} of {trainer.max_steps}, {values}, {left:.1f} min left", flush=True)


# ---------------------------------------------------------------------- sources


def write_cache(args: argparse.Namespace, folder: Path) -> None:
    """Write the logits of a source for all pairs."""
    name = folder.name
    path = args.other if name == OTHER else str(args.folder / "tuned") if args.tune_steps else args.twin
    kwargs = {name: {"dtype": "bfloat16"}} if args.precision.startswith("bf16") else None
    module = GLDFusionModule(None, {name: path}, source_kwargs=kwargs, top_k=args.top_k)
    trainer = make_trainer(callbacks=[LogitCacheWriter(str(folder.parent))])
    trainer.predict(module, make_data(args, args.folder / "pairs", predict_split="all"), return_predictions=False)
