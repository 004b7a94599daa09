"""Runs that are killed at random moments and resumed, beside the run that was not: is anything lost, doubled, changed?

    python -m benchmarks.kills [--kills 200] [--seed 0] [--methods CausalLM ...] [--folder kills]

Every method trains for seconds by its command line, at accumulation 1 and 3, with validation inside epochs or at their
ends, with the callbacks of its recipe and dropout; `DualHeadKD` with a moving average of its weights. The run is killed
(SIGKILL) at a random moment, gone on with by `--ckpt_path last`, killed again, and after five kills left to end. Then
its weights, the state of its optimizer, the folder of the saved model and the scalars of all its event files are
compared with those of the whole run, bit for bit.

A process is forked from one that has imported the library, so that a kill costs no imports; what it runs from there on
is `lit-logits fit`. Moments are drawn between the first event file and the end. A kill may come before the next
checkpoint, and what was logged behind the last one is logged again by the process that follows: the same step in
another file, which must hold the same value.
"""

import argparse
import json
import os
import random
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmarks.measure import machine, markdown_table
from lit_logits import DualHeadKD
from lit_logits.cli import main as lit_logits
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.modules import new_causal_lm

KILLS_A_CHAIN = 5
NOT_COMPARED = (
    "epoch",
    "kd/grad_cosine",
    "kd/conflict",
)  # the latter two are means over an epoch, see docs/how_to/resuming.md
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.2,
}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}}
SCHEDULE = {
    "class_path": "WarmupStableDecayLR",
    "init_args": {"num_warmup_steps": 5, "num_stable_steps": 0, "num_decay_steps": 40},
}


class Case(NamedTuple):
    """A method with its model, data and callbacks, and the settings of its Trainer."""

    method: str
    accumulate: int
    inside: bool
    recipe: dict[str, Any]


class Outcome(NamedTuple):
    """What became of the chains of a case.

    Attributes:
        kills: how many processes were killed.
        lost: scalars of the whole run that no event file holds.
        doubled: scalars that one file holds twice, or that the whole run does not have.
        differ: what is not bit-equal to the whole run.
    """

    kills: int
    lost: int
    doubled: int
    differ: list[str]


# ---------------------------------------------------------------------- recipes


def cases(folder: Path, methods: list[str]) -> Iterator[Case]:
    """Write what the recipes read, and give the recipes of all settings."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(60)]
    lines = [" ".join(rng.choices(words, k=rng.randint(4, 20))) for _ in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    pairs = [{"prompt": line[:9], "response": line[9:]} for line in lines if len(line) > 20]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = folder / "source"
    if not source.is_dir():
        source.mkdir()
        train_bpe(lines, 300, source)
        torch.manual_seed(0)
        new_causal_lm({**LLAMA, "vocab_size": len(load_tokenizer(source))}).save_pretrained(source)
        DualHeadKD("resnet8", num_classes=10, method="ce").export(folder / "teacher.pt")
    for method, parts in recipes(folder).items():
        for accumulate in (1, 3):
            for inside in (True, False):
                if not methods or method in methods:
                    yield Case(method, accumulate, inside, with_trainer(parts, accumulate, inside))


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """Model, data and callbacks of each method."""
    source, cache = str(folder / "source"), str(folder / "cache")
    text = data("TextDataModule", source=str(folder / "text.jsonl"), block_size=24, batch_size=2, cache_dir=cache)
    text["init_args"] |= {"tokenizer": source, "val_fraction": 0.1}
    pairs = data("InstructionDataModule", source=str(folder / "pairs.jsonl"), tokenizer=source, cache_dir=cache)
    pairs["init_args"] |= {"batch_size": 4, "max_length": 48, "val_fraction": 0.1}
    images = data("ImageDataModule", source="digits", batch_size=32, max_train_samples=1000)
    save = {"class_path": "SavePretrained", "init_args": {"folder": "saved"}}
    reinit = {"class_path": "CodebookReinit", "init_args": {"every_n_steps": 4, "min_usage": 0.3, "stop_step": 30}}
    monitor = {"class_path": "CodebookMonitor", "init_args": {"every_n_steps": 5}}
    collapse = {"class_path": "NeuralCollapseMonitor", "init_args": {"measure_gradients_every_n_steps": 4}}
    average = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9, "use_buffers": False}}
    head = {"class_path": "VQLogitsHead", "init_args": {"codebook_size": 24}}
    trained: dict[str, Any] = {"optimizer": ADAMW, "lr_scheduler": SCHEDULE}
    teacher = {"teacher": "resnet8", "teacher_checkpoint": str(folder / "teacher.pt")}
    student = {"student": "resnet8", "aux_head": "nonlinear", "grad_align": "backbone", **teacher}
    return {
        "CausalLM": recipe("CausalLM", text, [save], model=LLAMA, **trained),
        "VQLogitsLM": recipe("VQLogitsLM", text, [save, reinit, monitor], backbone=LLAMA, head=head, **trained),
        "GLDFusionModule": recipe("GLDFusionModule", pairs, [save], pivot=LLAMA, sources={"one": source}, **trained),
        "DualHeadKD": recipe("DualHeadKD", images, [save, collapse, average], **student, lr_interval="step", **trained),
    }


def data(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


def recipe(method: str, data: dict[str, Any], callbacks: list[dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    model = {"class_path": method, "init_args": arguments}
    return {"seed_everything": 1, "model": model, "data": data, "trainer": {"callbacks": callbacks}}


def with_trainer(parts: dict[str, Any], accumulate: int, inside: bool) -> dict[str, Any]:
    """Add settings of the Trainer: 40 steps, with a validation every seven batches or at the end of epochs."""
    trainer = {
        **parts["trainer"],
        "accelerator": "cpu",
        "max_steps": 40,
        "max_epochs": -1,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        **({"val_check_interval": 7, "check_val_every_n_epoch": None} if inside else {}),
    }
    return {**parts, "trainer": trainer}


# ---------------------------------------------------------------------- processes


def start(folder: Path, arguments: list[str]) -> int:
    """Fork a process that runs the command line in a folder, and return its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir(folder)
        tqdm.set_lock(threading.RLock())  # that of the parent is shared by all: one that was killed may hold it
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.argv = ["lit-logits", *arguments]
        lit_logits()
        status = 0
    except BaseException:  # also SystemExit: none may go on in the parent's code
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def run(folder: Path, *, kill_after: float | None = None) -> bool:
    """Start or go on with the run in a folder; return whether it ended, which one that is killed in time does not.

    Args:
        folder: with the recipe, `run.yaml`.
        kill_after: seconds from its first event file.

    Raises:
        RuntimeError: If it fails.
    """
    resume = ["--ckpt_path=last"] if list(folder.rglob("last.ckpt")) else []
    known = set(folder.rglob("events.out.*"))
    pid = start(folder, ["fit", "--config=run.yaml", *resume])
    begun = None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"The run in {folder} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
            return True
        if begun is None and set(folder.rglob("events.out.*")) - known:
            begun = time.monotonic()
        if None not in (begun, kill_after) and time.monotonic() - begun > kill_after:  # type: ignore[operator]
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.002)


def prepare(folder: Path, recipe: dict[str, Any]) -> Path:
    """Make an empty folder with the recipe."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    return folder


# ---------------------------------------------------------------------- comparison


def scalars(folder: Path) -> list[Counter[tuple[str, int, float]]]:
    """How often each (name, step, value) stands in each run of a folder, oldest first."""
    found = []
    for version in sorted(folder.glob("runs/*/version_*"), key=lambda path: int(path.name.removeprefix("version_"))):
        events = EventAccumulator(str(version), size_guidance={"scalars": 0}).Reload()
        names = [name for name in events.Tags()["scalars"] if name not in NOT_COMPARED]
        found.append(Counter((name, event.step, event.value) for name in names for event in events.Scalars(name)))
    return found


def checkpoint(folder: Path) -> dict[str, Any]:
    """The newest one of a folder."""
    path = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    return torch.load(path, weights_only=True)


def equal(one: Any, other: Any) -> bool:
    """Whether two states hold the same numbers, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def compare(chain: Path, whole: Path) -> tuple[int, int, list[str]]:
    """Scalars lost and doubled by a chain of runs, and what differs from the whole run at the end."""
    runs, (expected,) = scalars(chain), scalars(whole)
    found = {key for counts in runs for key in counts}
    lost = len(expected.keys() - found)
    doubled = len(found - expected.keys()) + sum(n > 1 for counts in runs for n in counts.values())
    ours, theirs = checkpoint(chain), checkpoint(whole)
    parts = {"weights": "state_dict", "optimizer": "optimizer_states", "schedule": "lr_schedulers"}
    parts["averages"] = "averaging_state"  # whose weights are those of the state_dict, if there are any
    differ = [name for name, key in parts.items() if not equal(ours.get(key), theirs.get(key))]
    saved = [sorted(folder.glob("saved/*.safetensors")) for folder in (chain, whole)]
    if not equal(*([load_file(path) for path in paths] for paths in saved)):
        differ.append("saved model")
    return lost, doubled, differ


# ---------------------------------------------------------------------- the table


def judge(case: Case, folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Run a case whole, and then killed so often, in chains that end."""
    whole = prepare(folder / "whole", case.recipe)
    begun = time.monotonic()
    run(whole)
    seconds = time.monotonic() - begun
    done = lost = doubled = 0
    differ: set[str] = set()
    while done < kills:
        chain = prepare(folder / "chain", case.recipe)
        killed, ended = 0, False
        while not ended:
            may_kill = killed < KILLS_A_CHAIN and done + killed < kills
            ended = run(chain, kill_after=rng.uniform(0, seconds) if may_kill else None)
            killed += not ended
        found = compare(chain, whole)
        done, lost, doubled = done + killed, lost + found[0], doubled + found[1]
        differ |= set(found[2])
        if any(found):
            shutil.copytree(chain, folder / f"chain_{done}")  # to look at
    return Outcome(done, lost, doubled, sorted(differ))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of all cases together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=[], help="default all")
    parser.add_argument("--folder", type=Path, default=Path("kills"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the arithmetic of many does not repeat
    args.folder.mkdir(parents=True, exist_ok=True)
    todo = list(cases(args.folder.resolve(), args.methods))
    rows: list[list[Any]] = []
    for index, case in enumerate(todo):
        share = (args.kills + index) // len(todo)  # which add up
        name = f"{case.method}-{case.accumulate}-{'inside' if case.inside else 'end'}"
        outcome = judge(case, args.folder.resolve() / name, share, random.Random(f"{args.seed} {name}"))
        where = "inside epochs" if case.inside else "at their ends"
        same = ", ".join(f"{part} differs" for part in outcome.differ) or "yes"
        rows.append([case.method, case.accumulate, where, outcome.kills, outcome.lost, outcome.doubled, same])
        print(name, outcome, flush=True)
    header = ["method", "accumulation", "validation", "kills", "lost", "doubled", "equal"]
    print(markdown_table(header, rows))
    print(f"\n{sum(row[3] for row in rows)} kills; {machine(torch.device('cpu'))}")


if __name__ == "__main__":
    main()
