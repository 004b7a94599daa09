"""Accuracy and neural collapse of distillation methods, several seeds each, on the embedded digits or on CIFAR-100.

    python -m benchmarks.dual_head_kd [--settings easy noisy few] [--seeds 0 1 2 3 4] [--epochs 40]
    python -m benchmarks.dual_head_kd --settings cifar100 --epochs 240        # where the data set is on disk

A teacher is trained once a setting by cross-entropy on clean labels. Every student of a seed sees the same split, the
same labels and the same batches. Accuracy is that of the test split after the last epoch, mean ± sample standard
deviation over the seeds; `wins` counts the seeds in which a method beats cross-entropy alone. The figures of neural
collapse are those of the test features and of the main head's rows, 0 at the simplex.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from benchmarks.measure import machine, markdown_table, spread
from lit_logits import DualHeadKD
from lit_logits.callbacks import NeuralCollapseMonitor
from lit_logits.datamodules import ImageDataModule


class Setting(NamedTuple):
    """What is learned from what; `hard` makes the training data of the student hard, not that of the teacher."""

    title: str
    data: dict[str, Any]
    hard: dict[str, Any]
    teacher: str
    student: str
    lr: float = 0.05


SETTINGS = {
    "easy": Setting("all training digits", {"source": "digits"}, {}, "resnet20", "resnet8"),
    "noisy": Setting(
        "40 % of the student's labels wrong", {"source": "digits"}, {"label_noise": 0.4}, "resnet20", "resnet8"
    ),
    "few": Setting(
        "100 digits for the student",
        {"source": "digits"},
        {"max_train_samples": 100, "batch_size": 16},
        "resnet20",
        "resnet8",
    ),
    "cifar100": Setting("CIFAR-100", {"source": "cifar100", "val_fraction": 0.0}, {}, "resnet32x4", "resnet8x4"),
}
METHODS: dict[str, dict[str, Any]] = {
    "CE": {"method": "ce"},
    "KD": {"method": "kd"},
    "single head, BinaryKL": {"method": "single_head", "kd_loss": "binary_kl"},
    "single head, BinaryKL-Norm": {"method": "single_head"},
    "dual head": {"method": "dual_head"},
    "dual head, aligned (backbone)": {"method": "dual_head", "grad_align": "backbone"},
    "dual head, aligned (all)": {"method": "dual_head", "grad_align": "all"},
}


def train(
    setting: Setting, settings: dict[str, Any], seed: int, epochs: int, **hard: Any
) -> tuple[Any, dict[str, float]]:
    """A trained model, and what it logged in a test."""
    L.seed_everything(seed, verbose=False)
    data = ImageDataModule(**{"batch_size": 64, **setting.data, **hard}, seed=seed)
    data.prepare_data()
    data.setup()
    model = DualHeadKD(
        num_classes=data.num_classes,
        **settings,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=setting.lr, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [epochs * 5 // 8, epochs * 6 // 8, epochs * 7 // 8]
        ),
    )
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[NeuralCollapseMonitor()],
    )
    trainer.fit(model, datamodule=data)
    conflict = float(trainer.callback_metrics.get("kd/conflict", float("nan")))
    trainer.test(model, datamodule=data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return model, {**logged, "conflict": conflict}


def _table(name: str, args: argparse.Namespace, folder: Path) -> str:
    setting = SETTINGS[name]
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    teachers = []
    for seed in args.seeds:
        teacher, logged = train(setting, {"method": "ce", "student": setting.teacher}, seed, args.epochs)
        path = folder / f"{name}-{seed}.pt"
        teacher.export(path)
        teachers.append(logged["test/acc"] * 100)
        for method, settings in METHODS.items():
            both = {"student": setting.student, **settings}
            if settings["method"] != "ce":
                both.update(teacher=setting.teacher, teacher_checkpoint=str(path))
            _, logged = train(setting, both, seed, args.epochs, **setting.hard)
            runs[method].append(logged)
            print(name, seed, method, {k: round(v, 4) for k, v in logged.items()}, flush=True)
    header = ["method", "test accuracy, %", "wins", "NC1", "NC2, rows' angles", "NC2, rows' norms", "NC3", "conflict"]
    rows: list[list[object]] = []
    for method, logs in runs.items():
        base = runs["CE"]
        wins = sum(own["test/acc"] > ce["test/acc"] for own, ce in zip(logs, base, strict=True))
        conflict = [log["conflict"] for log in logs]
        rows.append(
            [
                method,
                spread([100 * log["test/acc"] for log in logs], 2),
                "" if method == "CE" else f"{wins} of {len(logs)}",
                spread([log["nc/nc1"] for log in logs]),
                spread([log["nc/nc2"] for log in logs]),
                spread([log["nc/nc2_norm_rows"] for log in logs]),
                spread([log["nc/nc3"] for log in logs]),
                "" if conflict[0] != conflict[0] else spread(conflict, 2),
            ]
        )
    title = f"{setting.title}: {setting.student} from {setting.teacher} ({spread(teachers, 2)} %)"
    return f"{title}\n\n{markdown_table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["easy", "noisy", "few"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        tables = [_table(name, args, Path(folder)) for name in args.settings]
    print(f"\n{args.epochs} epochs, batches of 64 (of the 100 digits 16), seeds {args.seeds};", end=" ")
    print(machine(torch.device("cpu")))
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
