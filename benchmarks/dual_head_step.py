"""Training step of a ResNet-20 student: cross-entropy alone, KD, dual head, dual head with aligned gradients.

    python -m benchmarks.dual_head_step [--device cuda] [--student resnet20] [--teacher resnet56] [--repeats 40]

Cases take turns, step by step, so that a slow moment of the machine meets all of them; a time is the median of its
steps, a ratio that of the ratios to the `ce` step of the same turn, with its quartiles. The teacher's forward pass is
timed on its own and taken off in the last column, where what is left is the method. FLOPs are torch's count. Memory is
the peak above parameters and batch, each case in a process of its own.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Measurement, in_fresh_process, machine, markdown_table, measure
from lit_logits import DualHeadKD
from lit_logits.functional import binary_kl_norm
from lit_logits.modules import AuxiliaryHead

CASES: dict[str, dict[str, str]] = {
    "ce": {"method": "ce"},
    "kd": {"method": "kd"},
    "dual head": {"method": "dual_head"},
    "dual head, nonlinear": {"method": "dual_head", "aux_head": "nonlinear"},
    "dual head, aligned": {"method": "dual_head", "grad_align": "backbone"},
}


def make_step(case: str, args: argparse.Namespace) -> Callable[[], None]:
    """A step of the case: forward, backward, alignment and SGD, as the LightningModule's hooks do it."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = DualHeadKD(
        args.student,
        None if case == "ce" else _teacher(args),
        num_classes=args.classes,
        **CASES[case],  # type: ignore[arg-type]
    ).to(device)
    model.train()
    batch = {
        "pixel_values": torch.randn(args.batch_size, 3, 32, 32, device=device),
        "labels": torch.randint(args.classes, (args.batch_size,), device=device),
    }
    return distillation_step(model, batch)


def distillation_step(model: DualHeadKD, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward, backward, alignment and SGD, as the LightningModule's hooks do it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        ce, kd = model.losses(batch)
        loss = ce if kd is None else ce + kd
        if model.aligner.is_active and kd is not None:
            model.aligner.collect(loss, parameters)
            model.aligner.join(parameters, model.net.head_parameters())
        else:
            loss.backward()
        optimizer.step()

    return step


def teacher_forward(args: argparse.Namespace) -> Callable[[], None]:
    """The part of a step that any distillation pays and cross-entropy does not."""
    device = torch.device(args.device)
    teacher = _teacher(args).to(device).eval()
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)

    def step() -> None:
        with torch.no_grad():
            teacher(images)

    return step


def head_alone(args: argparse.Namespace) -> Callable[[], None]:
    """What the auxiliary head adds to a step: its forward pass and loss, and their gradients."""
    device = torch.device(args.device)
    features = torch.randn(args.batch_size, 64, device=device, requires_grad=True)
    teacher_logits = torch.randn(args.batch_size, args.classes, device=device)
    head = AuxiliaryHead(64, args.classes).to(device)

    def step() -> None:
        binary_kl_norm(head(features), teacher_logits, temperature=2.0).backward()

    return step


def memory(case: str, args: argparse.Namespace) -> Measurement:
    return measure(make_step(case, args), repeats=1, device=torch.device(args.device))


def flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def take_turns(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every repetition of every step, one of each after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 3):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 3:  # the first ones warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _teacher(args: argparse.Namespace) -> torch.nn.Module:
    from lit_logits.modules import load_classifier

    return load_classifier(args.teacher, args.classes)


def _ratio(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    device = torch.device(args.device)
    steps = {case: make_step(case, args) for case in CASES}
    alone = {"teacher": teacher_forward(args), "head": head_alone(args)}
    seconds = take_turns({**steps, **alone}, args.repeats, device)
    counted = {case: flops(step) for case, step in steps.items()}
    teacher_flops = flops(teacher_forward(args))
    peaks = {case: in_fresh_process(memory, case, args).peak_bytes for case in CASES}
    rows: list[list[object]] = []
    for case in CASES:
        own = 0 if case == "ce" else 1
        pairs = list(zip(seconds[case], seconds["ce"], seconds["teacher"], strict=True))
        rows.append(
            [
                case,
                f"{statistics.median(seconds[case]) * 1e3:.1f}",
                _ratio([a / b for a, b, _ in pairs]),
                _ratio([(a - own * t) / b for a, b, t in pairs]),
                f"{(counted[case] - own * teacher_flops) / counted['ce']:.4f}",
                f"{peaks[case] / 2**20:.0f}",
                f"{peaks[case] / peaks['ce']:.2f}",
            ]
        )
    print(f"{args.student} from {args.teacher}, {args.classes} classes, batch {args.batch_size}, 32 × 32, float32;")
    print(f"{args.repeats} turns; {machine(device)}\n")
    header = ["step", "ms", "of ce", "of ce, teacher off", "FLOPs of ce, teacher off", "peak MiB", "peak of ce"]
    print(markdown_table(header, rows))
    head, ce = statistics.median(seconds["head"]), statistics.median(seconds["ce"])
    print(f"\nAuxiliary head and its loss alone, forward and backward: {head * 1e3:.2f} ms, {head / ce:.2%} of ce.")


if __name__ == "__main__":
    main()
