"""Losses of distillation on one head and on two, several seeds each, on texts of many classes, digits or CIFAR-100.

    python -m benchmarks.dual_head_kd --settings clinc150 clinc150-few banking77 banking77-few --data FOLDER
    python -m benchmarks.dual_head_kd [--settings digits digits-noisy digits-few]      # the embedded digits
    python -m benchmarks.dual_head_kd --settings cifar100 --losses KL "KL, standardised" DKD --weights 1 --seeds 0 \
        --epochs 240 --precision bf16-mixed --num-workers 4 [--images FOLDER]           # on a GPU

A teacher is trained once a setting and seed, by cross-entropy on all rows and clean labels. Every student of a seed
sees the same rows, labels and batches. The weight α of each loss, on one head and on two, is the one with the best
validation accuracy over the seeds of `--choice-seeds`, which are none of those reported; an aligned dual head takes
that of the dual head. Accuracy is that of the test split after the last epoch, mean ± sample standard deviation over
the seeds; `wins` counts the seeds in which a method beats cross-entropy alone. The figures of neural collapse are those
of the test features and of the main head's rows, 0 at the simplex. "Both heads" is one linear layer, w times the main
head and 1 − w times the auxiliary one, whose w is chosen on each run's own validation split.

Each run is a line of a file in `--folder`; what stands there is not done again.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from benchmarks.intents import BagOfBigrams, IntentDataModule
from benchmarks.measure import machine, markdown_table, spread
from lit_logits import DualHeadKD
from lit_logits.callbacks import NeuralCollapseMonitor
from lit_logits.datamodules import ImageDataModule

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the main head in both heads


class Loss(NamedTuple):
    """A distillation loss; `unit` is the weight around which others are tried, by `factors`."""

    arguments: dict[str, Any]
    unit: float = 1.0
    factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


LOSSES = {
    "KL": Loss({"kd_loss": "kl"}),
    "KL, standardised": Loss({"kd_loss": "kl", "standardize": True}, 9.0),
    "DKD": Loss({"kd_loss": "dkd"}),
    "MLKD": Loss({"kd_loss": "mlkd"}, 0.2),  # it is summed over five temperatures
    "BinaryKL": Loss({"kd_loss": "binary_kl", "class_reduction": "mean"}),
    "BinaryKL-Norm": Loss({"kd_loss": "binary_kl_norm", "class_reduction": "mean"}),
    "BinaryKL-Norm, the paper's sum": Loss({"kd_loss": "binary_kl_norm", "class_reduction": "sum"}, factors=(1.0,)),
    "MSE": Loss({"kd_loss": "mse"}),
}
FORMS: dict[str, dict[str, Any]] = {
    "one head": {"method": "single_head"},
    "two heads": {"method": "dual_head"},
    "two heads, aligned": {"method": "dual_head", "grad_align": "backbone"},
}


class Setting(NamedTuple):
    """What is learned from what; `hard` makes the training data of the student hard, not that of the teacher."""

    title: str
    data: Callable[..., Any]
    teacher: Callable[[int], Any]
    student: Callable[[int], Any]
    hard: dict[str, Any]
    lr: float = 0.05
    epochs: int = 40


def _digits(title: str, hard: dict[str, Any]) -> Setting:
    data = partial(ImageDataModule, source="digits", batch_size=64)
    return Setting(title, data, lambda classes: "resnet20", lambda classes: "resnet8", hard)


def _intents(source: str, **hard: int) -> Setting:
    data = partial(IntentDataModule, source, batch_size=128)
    title = f"{source}, {hard['max_train_rows']} rows of each class for the student" if hard else source
    teacher = partial(BagOfBigrams, hidden_size=128, hidden_layer=True)
    return Setting(title, data, teacher, partial(BagOfBigrams, hidden_size=24), hard, 0.06, 40 if hard else 15)


SETTINGS = {
    "digits": _digits("all training digits", {}),
    "digits-noisy": _digits("40 % of the student's labels wrong", {"label_noise": 0.4}),
    "digits-few": _digits("100 digits for the student", {"max_train_samples": 100, "batch_size": 16}),
    "clinc150": _intents("clinc150"),
    "clinc150-few": _intents("clinc150", max_train_rows=20),
    "banking77": _intents("banking77"),
    "banking77-few": _intents("banking77", max_train_rows=20),
    "cifar100": Setting(
        "CIFAR-100",
        partial(ImageDataModule, batch_size=64),
        lambda classes: "resnet32x4",
        lambda classes: "resnet8x4",
        {},
    ),
}


class Run(NamedTuple):
    """What a trained student is; the weight is absolute."""

    setting: str
    seed: int
    loss: str
    form: str
    weight: float


# ---------------------------------------------------------------------- training


class Bench:
    """The runs of a benchmark, each done once and kept as a line of a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.file = args, args.folder / "runs.jsonl"
        args.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        lines = self.file.read_text("utf-8").split("\n")[:-1] if self.file.is_file() else []
        self.file.write_text("".join(f"{line}\n" for line in lines), "utf-8")  # without what a kill left of a line
        self.done = {Run(*line["run"]): line["logged"] for line in map(json.loads, lines)}

    def _check_settings(self) -> None:
        """Refuse a folder whose runs were made otherwise."""
        own = {name: str(getattr(self.args, name)) for name in ("epochs", "precision", "images", "data")}
        file = self.args.folder / "settings.json"
        if not file.is_file():
            file.write_text(json.dumps(own))
        if (theirs := json.loads(file.read_text())) != own:
            raise ValueError(
                f"Expected a folder of runs with {own}, but its own have {theirs}. Pass another `--folder`."
            )

    def logged(self, run: Run) -> dict[str, Any]:
        """What a run measures."""
        if run not in self.done:
            self.done[run] = self.train(run)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": run, "logged": self.done[run]}) + "\n")
            print(*run, self.done[run]["test_accs"], flush=True)
        return self.done[run]

    def data(self, name: str, seed: int, **hard: Any) -> Any:
        """The data of a setting."""
        where: dict[str, Any] = {"folder": self.args.data} if name.startswith(("clinc", "bank")) else {}
        if name == "cifar100":
            where = {"source": self.args.images, "image_size": 32, "num_workers": self.args.num_workers}
        data = SETTINGS[name].data(**where, **hard, seed=seed)
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        return data

    def teacher(self, name: str, seed: int) -> dict[str, Any]:
        """Teacher and its file, as arguments of the module."""
        self.logged(Run(name, seed, "CE", "teacher", 0.0))
        teacher, path = SETTINGS[name].teacher(self.data(name, seed).num_classes), self._teacher_file(name, seed)
        if isinstance(teacher, str):
            return {"teacher": teacher, "teacher_checkpoint": str(path)}
        teacher.load_state_dict(torch.load(path, weights_only=True))
        return {"teacher": teacher}

    def _teacher_file(self, name: str, seed: int) -> Path:
        return self.args.folder / f"{name}-{seed}.pt"

    def fit(self, run: Run) -> tuple[DualHeadKD, Any, L.Trainer]:
        """Train a student, or the teacher; return it, its data and its Trainer."""
        setting, is_teacher = SETTINGS[run.setting], run.form == "teacher"
        data = self.data(run.setting, run.seed, **({} if is_teacher else setting.hard))
        arguments: dict[str, Any] = {"method": "ce"}
        if run.loss != "CE":
            arguments = {**LOSSES[run.loss].arguments, **FORMS[run.form], "kd_factor": run.weight}
            arguments |= self.teacher(run.setting, run.seed)
        L.seed_everything(run.seed, verbose=False)
        epochs = self.args.epochs or setting.epochs
        student = (setting.teacher if is_teacher else setting.student)(data.num_classes)
        model = DualHeadKD(student, num_classes=data.num_classes, **arguments, **_optimisation(setting, data, epochs))
        if isinstance(student, str) and torch.cuda.is_available():  # on a CPU it is slower
            model.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            precision=self.args.precision,
            max_epochs=epochs,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[NeuralCollapseMonitor()],
        )
        trainer.fit(model, datamodule=data)
        return model, data, trainer

    def train(self, run: Run) -> dict[str, Any]:
        """Train a student, or the teacher, and measure it."""
        model, data, trainer = self.fit(run)
        conflict = {k: float(v) for k, v in trainer.callback_metrics.items() if k == "kd/conflict"}
        trainer.test(model, datamodule=data, verbose=False)
        if run.form == "teacher":
            model.export(self._teacher_file(run.setting, run.seed))
        return {
            **{name: float(value) for name, value in trainer.callback_metrics.items()},
            **conflict,
            "val_accs": accuracies(model, data, data.val_dataloader()),
            "test_accs": accuracies(model, data, data.test_dataloader()),
        }


def _optimisation(setting: Setting, data: Any, epochs: int) -> dict[str, Any]:
    """AdamW and one cycle for texts, SGD in steps for images."""
    if data.__class__ is IntentDataModule:
        steps = epochs * len(data.train_dataloader())
        return {
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=setting.lr, weight_decay=0.1),
            "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
                optimizer, setting.lr, total_steps=steps, pct_start=0.1
            ),
            "lr_interval": "step",
        }
    return {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=setting.lr, momentum=0.9, weight_decay=5e-4),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [epochs * 5 // 8, epochs * 6 // 8, epochs * 7 // 8]
        ),
    }


@torch.no_grad()
def accuracies(model: DualHeadKD, data: Any, batches: Any) -> list[float]:
    """Accuracy, in percent, of the main head's logits plus those of the auxiliary one, by the shares of `SHARES`."""
    hits, count = torch.zeros(len(SHARES)), 0
    model.eval()
    for batch in batches:
        named = batch if isinstance(batch, dict) else dict(zip(("features", "labels"), batch, strict=True))
        inputs = dict(data.on_after_batch_transfer(named, 0))
        labels = inputs.pop("labels")
        output = model.net(inputs)
        aux = output.logits if output.aux_logits is None else output.aux_logits
        for index, share in enumerate(SHARES):
            hits[index] += (share * output.logits + (1 - share) * aux).argmax(-1).eq(labels).sum()
        count += len(labels)
    return [100 * float(hit) / count for hit in hits]


# ---------------------------------------------------------------------- choice and tables


def _weights(args: argparse.Namespace, loss: str) -> list[float]:
    return args.weights or [factor * LOSSES[loss].unit for factor in LOSSES[loss].factors]


def chosen_weight(bench: Bench, name: str, loss: str, form: str) -> float:
    """The weight of the best validation accuracy of the main head."""
    weights = _weights(bench.args, loss)
    if len(weights) == 1:
        return weights[0]
    form = form.removesuffix(", aligned")

    def accuracy(weight: float) -> float:
        runs = [bench.logged(Run(name, seed, loss, form, weight)) for seed in bench.args.choice_seeds]
        return statistics.fmean(run["val_accs"][-1] for run in runs)

    return max(weights, key=accuracy)


def _both_heads(logged: dict[str, Any]) -> float:
    best = max(range(len(SHARES)), key=lambda index: logged["val_accs"][index])
    return float(logged["test_accs"][best])


def _rows(bench: Bench, name: str) -> Iterator[list[object]]:
    seeds = bench.args.seeds
    base = [bench.logged(Run(name, seed, "CE", "one head", 0.0)) for seed in seeds]
    yield _row("CE", "", "", base, base)
    for loss in bench.args.losses:
        for form in FORMS:
            weight = chosen_weight(bench, name, loss, form)
            logs = [bench.logged(Run(name, seed, loss, form, weight)) for seed in seeds]
            yield _row(loss, form, f"{weight:.3g}", logs, base)


def _row(loss: str, form: str, weight: str, logs: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[object]:
    accs = [log["test_accs"][-1] for log in logs]
    wins = sum(own > ce["test_accs"][-1] for own, ce in zip(accs, base, strict=True))
    conflict = [log["kd/conflict"] for log in logs if "kd/conflict" in log]
    return [
        loss,
        form,
        weight,
        spread(accs, 2),
        "" if loss == "CE" else f"{wins} of {len(logs)}",
        spread([_both_heads(log) for log in logs], 2) if form.startswith("two") else "",
        *(spread([log[figure] for log in logs], 2) for figure in ("nc/nc1", "nc/nc2", "nc/nc2_norm_rows", "nc/nc3")),
        spread(conflict, 2) if conflict else "",
    ]


def _table(bench: Bench, name: str) -> str:
    header = ["loss", "form", "α", "test accuracy, %", "wins", "both heads"]
    header += ["NC1", "NC2, rows' angles", "NC2, rows' norms", "NC3", "conflict"]
    rows = list(_rows(bench, name))
    teachers = [bench.logged(Run(name, seed, "CE", "teacher", 0.0))["test_accs"][-1] for seed in bench.args.seeds]
    epochs = bench.args.epochs or SETTINGS[name].epochs
    title = f"{SETTINGS[name].title}; {epochs} epochs; the teacher has {spread(teachers, 2)} %"
    return f"{title}\n\n{markdown_table(header, rows)}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    digits = [name for name in SETTINGS if name.startswith("digits")]
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=digits)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--weights", nargs="+", type=float, help="α to choose from; default 0.1 to 30 times a unit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--choice-seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--epochs", type=int, help="default 40, of whole texts 15")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with the files of CLINC150 and Banking77")
    parser.add_argument("--images", default="cifar100", help="for the setting cifar100: on the hub, or a folder")
    parser.add_argument("--num-workers", type=int, default=0, help="that read its images")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed on a GPU")
    parser.add_argument("--folder", type=Path, default=Path("dual_head_kd"), help="where runs and teachers are kept")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench = Bench(args)
    tables = [_table(bench, name) for name in args.settings]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\nSeeds {args.seeds}, weights chosen on {args.choice_seeds}; {machine(device)}")
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
