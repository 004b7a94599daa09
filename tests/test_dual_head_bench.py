"""The benchmark of distillation losses: weights are chosen on validation, and no run is done twice."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from benchmarks import dual_head_kd, head_pictures
from benchmarks.dual_head_kd import SETTINGS, Bench, Run

CLASSES = ["cheese", "music", "trains"]


@pytest.fixture
def requests(tmp_path):
    """A folder with the files of CLINC150 and Banking77, of three classes."""
    rng = random.Random(0)

    def rows(count):
        return [
            (f"{rng.choice('abcdef')} {rng.choice(['', label])} {rng.choice('abcdef')}", label)
            for label in CLASSES * count
        ]

    lines = [
        {"split": split, "text": text, "label": label} for split in ("train", "val", "test") for text, label in rows(20)
    ]
    (tmp_path / "clinc150.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("train", "test"):
        table = "".join(f'"{text}",{label}\n' for text, label in rows(20))
        (tmp_path / f"banking77-{name}.csv").write_text("text,category\n" + table)
    return tmp_path


def run(*arguments):
    dual_head_kd.main([*map(str, arguments), "--epochs", "1", "--choice-seeds", "7"])


@pytest.mark.parametrize("setting", ["clinc150", "banking77-few"])
def test_a_table_has_a_row_for_each_loss_and_form(setting, requests, capsys):
    arguments = ["--settings", setting, "--data", requests, "--folder", requests / "out", "--seeds", 0, 1]
    run(*arguments, "--losses", "KL", "BinaryKL-Norm, the paper's sum")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in table[3:]] == ["one head", "two heads", "two heads, aligned"] * 2
    lines = (requests / "out" / "runs.jsonl").read_text()
    run(*arguments, "--losses", "KL", "BinaryKL-Norm, the paper's sum")
    assert (requests / "out" / "runs.jsonl").read_text() == lines  # nothing was done again
    with (requests / "out" / "runs.jsonl").open("a") as file:
        file.write('{"run": ["cut')  # by a kill
    run(*arguments, "--losses", "KL", "BinaryKL-Norm, the paper's sum")
    assert (requests / "out" / "runs.jsonl").read_text() == lines
    with pytest.raises(
        ValueError, match=r"Expected a folder of runs with .*'bf16-mixed'.* but its own have .*'32-true'"
    ):
        run(*arguments, "--precision", "bf16-mixed")


def test_three_heads_are_drawn_side_by_side(requests, capsys):
    arguments = ["--picture", requests / "heads.png", "--settings", "banking77-few", "--data", requests]
    arguments += ["--folder", requests / "out", "--epochs", 4]
    head_pictures.main([str(argument) for argument in arguments])
    titles = ["labels alone", "one head for both", "two heads"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(titles))]
    found = [line.rsplit(" ", 2) for line in told]
    assert [title for title, *_ in found] == titles
    assert all(0 <= float(accuracy) <= 1 for _, accuracy, _ in found)
    gaps = [gap for *_, gap in found]
    assert float(gaps[0]) != pytest.approx(float(gaps[1]), rel=1e-3)
    assert Image.open(requests / "heads.png").size == (960, 336)


def test_the_weight_is_that_of_the_best_validation(monkeypatch, tmp_path):
    accuracies = {0.1: 50.0, 0.3: 70.0, 1.0: 60.0, 3.0: 10.0, 10.0: 20.0, 30.0: 0.0}
    asked = []

    class Known(Bench):
        def __init__(self):
            self.args = dual_head_kd.argparse.Namespace(weights=None, choice_seeds=[7, 8])

        def logged(self, run):
            asked.append(run)
            return {"val_accs": [0.0, accuracies[run.weight]], "test_accs": [0.0, 99.0 * (run.weight == 10.0)]}

    assert dual_head_kd.chosen_weight(Known(), "digits", "KL", "two heads, aligned") == 0.3
    assert {run.form for run in asked} == {"two heads"}
    assert {run.seed for run in asked} == {7, 8}
    assert isinstance(asked[0], Run)


def test_images_of_a_folder_stand_for_cifar100(tmp_path, capsys, monkeypatch):
    small = SETTINGS["cifar100"]._replace(teacher=lambda classes: "resnet8", student=lambda classes: "resnet8")
    monkeypatch.setitem(SETTINGS, "cifar100", small)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in CLASSES:
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(30):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    arguments = ["--settings", "cifar100", "--images", tmp_path / "images", "--folder", tmp_path / "out", "--seeds", 0]
    run(*arguments, "--losses", "DKD", "--weights", 1)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["CE", "DKD", "DKD", "DKD"]
