"""What the start from co-occurrence takes at a large vocabulary: counting pairs of tokens, then clusters and codes.

    python -m benchmarks.vq_start [--text FILE_OR_FOLDER ...] [--vocab-size 131072 | --tokenizer FOLDER_OR_GGUF]
        [--tokens 10000000] [--share 0.01 | --codes 328 163 163]

The text should be real: synthetic text by Zipf's law has no contexts, and fewer pairs. A BPE of the size asked for is
trained on it; a text that is too short gives a smaller one, and V says which. Tokens are those that were there to read,
`--tokens` at most. Seconds are of one start; memory is the peak above what the process held with the text open, in a
process of its own.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.measure import in_fresh_process, machine, markdown_table, measure
from benchmarks.vq_training import add_text_arguments, open_text, split_rows
from lit_logits.contracts import Calibration, OutputLayer
from lit_logits.modules import HierarchicalVQLogitsHead
from lit_logits.modules.vq_logits.calibration import calibrator


class Started(NamedTuple):
    """What a start came to."""

    vocab_size: int
    codebook_sizes: list[int]
    tokens: int
    distinct: int
    pairs: int
    count_seconds: float
    hierarchy_seconds: float
    peak_bytes: int
    largest_cluster: int


def start(args: argparse.Namespace) -> Started:
    """Start a head of the text once."""
    torch.manual_seed(0)
    data = open_text(args)
    vocab_size, device = data.vocab_size, torch.device("cpu")
    sizes = args.codes or split_rows(round(args.share * vocab_size))
    head = HierarchicalVQLogitsHead(args.hidden_size, vocab_size, sizes, start_tokens=args.tokens)
    loader = data.train_dataloader()
    read = calibrator(
        loader, nn.Identity(), OutputLayer(None, None), num_batches=1, vocab_size=vocab_size, device=device
    )
    found: dict[str, Any] = {}

    def timed_read(**kwargs: Any) -> Calibration:
        began = time.perf_counter()
        found["calibration"] = read(**kwargs)
        found["seconds"] = time.perf_counter() - began
        return found["calibration"]

    def step() -> None:
        began = time.perf_counter()
        head.start(timed_read, OutputLayer(None, None))
        found["all seconds"] = time.perf_counter() - began

    peak = measure(step, repeats=0, device=device).peak_bytes
    calibration: Calibration = found["calibration"]
    assert calibration.pairs is not None
    return Started(
        vocab_size,
        sizes,
        min(args.tokens, len(loader) * args.batch_size * args.block_size),
        int((calibration.token_counts > 0).sum()),
        len(calibration.pairs.keys),
        found["seconds"],
        found["all seconds"] - found["seconds"],
        peak,
        int(head.token_to_cluster.bincount().max()),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser, vocab_size=131_072, block_size=256, batch_size=16)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--share", type=float, default=0.01, help="codes in all, of the vocabulary")
    parser.add_argument("--codes", type=int, nargs="+", help="clusters and stages")
    parser.add_argument("--hidden-size", type=int, default=128)
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    open_text(args)  # here, so that the process that is measured finds it in the cache
    found = in_fresh_process(start, args)
    clusters, *stages = found.codebook_sizes
    row = [
        f"{found.vocab_size:,}",
        f"{found.tokens:,}",
        f"{found.distinct:,}",
        f"{found.pairs:,}",
        f"{clusters} + {f'{len(stages)} × {stages[0]}' if len(set(stages)) == 1 else ' + '.join(map(str, stages))}",
        f"{found.count_seconds:.1f}",
        f"{found.hierarchy_seconds:.1f}",
        f"{found.peak_bytes / 2**20:.0f}",
        f"{found.largest_cluster:,} / {found.vocab_size / clusters:,.0f}",
    ]
    header = ["V", "tokens read", "different tokens", "different pairs", "clusters + stages", "s, pairs", "s, codes"]
    print(markdown_table([*header, "peak MiB", "largest / mean cluster"], [row]))
    print(f"\n{machine(torch.device('cpu'))}")


if __name__ == "__main__":
    main()
