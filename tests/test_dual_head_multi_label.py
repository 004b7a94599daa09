"""Labels of several classes a row: the losses, what evaluation measures, and what does not go with them."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import run_script
from sklearn.metrics import average_precision_score, f1_score
from tiny_classifiers import CLASSES, Net, batch_of, fit, make, rows
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig

from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.functional import binary_kl, binary_kl_norm, multi_label_loss
from lit_logits.modules.dual_head_kd.judging import ClassifierMetrics


def many(count=12, seed=38, dtype=torch.float64):
    x = batch_of(rows(count, seed))["pixel_values"]
    labels = torch.randint(2, (count, CLASSES), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x, labels


def evaluated(model, x, y, batch_size=5, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", precision="64-true", **quiet, **kwargs)
    (result,) = trainer.validate(model, DataLoader(list(zip(x, y, strict=True)), batch_size=batch_size), verbose=False)
    return result


def test_the_loss_is_binary_cross_entropy_over_what_is_known():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, -100]])
    known, weights = labels >= 0, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    total, norm = 0.0, 0.0
    for row, column in known.nonzero().tolist():
        target = 0.8 * labels[row, column] + 0.1
        p = torch.sigmoid(logits[row, column])
        total = total - weights[column] * (target * p.log() + (1 - target) * (1 - p).log())
        norm += weights[column]
    loss = multi_label_loss(logits, labels, label_smoothing=0.2, class_weights=weights)
    torch.testing.assert_close(loss, total / norm)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(total / norm, logits)[0])
    assert multi_label_loss(logits, torch.full((4, 3), -100)) == 0
    plain = F.binary_cross_entropy_with_logits(logits[:3], labels[:3].double())
    for dtype in (torch.bool, torch.long, torch.float32):
        torch.testing.assert_close(multi_label_loss(logits[:3], labels[:3].to(dtype)), plain)


@pytest.mark.parametrize("method", ["kd", "single_head", "dual_head"])
def test_rows_of_several_classes_train(method):
    """They were refused: the rows do not sum to 1."""
    model = make(method, multi_label=True).double()
    x, y = many()
    ce, kd = model.losses((x, y))
    output, teacher = model.net({"x": x}), model.teacher({"x": x})
    torch.testing.assert_close(ce, F.binary_cross_entropy_with_logits(output.logits, y))
    loss = binary_kl if method == "kd" else binary_kl_norm
    head = output.logits if output.aux_logits is None else output.aux_logits
    torch.testing.assert_close(kd, loss(head, teacher, temperature=2.0))
    trainer = fit(model, list(zip(x, y, strict=True)), max_steps=2)
    assert trainer.logged_metrics["train/loss"].isfinite()


def test_evaluation_is_that_of_scikit_learn():
    model = make(multi_label=True).double().eval()
    x, y = many(40)
    result = evaluated(model, x, y)
    output = model.net({"x": x})
    scores, truth = output.logits.sigmoid().detach().numpy(), y.numpy()
    expected = {
        "val/loss": F.binary_cross_entropy_with_logits(output.logits, y).item(),
        "val/map": average_precision_score(truth, scores, average="macro"),
        "val/f1": f1_score(truth, scores > 0.5, average="macro"),
        "val/exact_match": np.mean((truth == (scores > 0.5)).all(-1)),
        "val/aux_map": average_precision_score(truth, output.aux_logits.sigmoid().detach().numpy(), average="macro"),
    }
    assert result == pytest.approx(expected, rel=1e-6)


def test_what_is_not_known_is_not_judged():
    model = make(multi_label=True).double().eval()
    x, y = many(20)
    y[::3, 1] = -100
    result = evaluated(model, x, y)
    known = (y != -100).numpy()
    scores, truth = model.net({"x": x}).logits.sigmoid().detach().numpy(), y.numpy()
    columns = [average_precision_score(truth[known[:, c], c], scores[known[:, c], c]) for c in range(CLASSES)]
    assert result["val/map"] == pytest.approx(np.mean(columns), rel=1e-6)
    logits, y = model(x), torch.as_tensor(y)
    each = F.binary_cross_entropy_with_logits(logits, y.clamp(min=0), reduction="none")
    assert result["val/loss"] == pytest.approx(each[torch.as_tensor(known)].mean().item(), rel=1e-6)


def test_a_class_that_no_row_tells_is_left_out():
    """torchmetrics ends in an IndexError, also in Lightning's check of two batches before training."""
    model = make(multi_label=True).double().eval()
    x, y = many(20)
    y[:, 1] = -100
    result = evaluated(model, x, y)
    scores, truth = model.net({"x": x}).logits.sigmoid().detach().numpy(), y.numpy()
    columns = [average_precision_score(truth[:, c], scores[:, c]) for c in (0, 2)]
    assert result["val/map"] == pytest.approx(np.mean(columns), rel=1e-6)
    assert {"val/f1", "val/exact_match", "val/aux_map"} <= result.keys()


def test_predictions_are_the_classes_that_are_more_likely_than_not():
    model = make(multi_label=True).double()
    x, _ = many()
    predicted = model.predict_step({"pixel_values": x}, 0)
    assert torch.equal(predicted["predictions"], model(x).sigmoid() > 0.5)


def test_measures_without_samples_are_nan_and_leave_nothing_behind():
    metrics = ClassifierMetrics(3, multi_label=True)
    assert all(value.isnan() for value in metrics.compute("val").values())
    x = torch.tensor([[4.0, -4.0, 4.0]])
    metrics.update("val", x, (x > 0).float())
    assert metrics.compute("val")["exact_match"] == 1
    assert all(value.isnan() for value in metrics.compute("val").values())


@pytest.mark.parametrize("kd_loss", ["kl", "dkd", "mlkd"])
def test_losses_over_classes_that_exclude_each_other_are_refused(kd_loss):
    with pytest.raises(ValueError, match=f"for multi_label=True, but got '{kd_loss}', whose probabilities sum to 1"):
        DualHeadKD(Net(), Net(), multi_label=True, kd_loss=kd_loss)


def test_labels_that_do_not_fit_are_named():
    x, y = many()
    model = make(multi_label=True).double()
    with pytest.raises(ValueError, match=r"of shape \(B, 3\) for multi_label=True, .* but got \(12,\)"):
        model.losses((x, y[:, 0]))
    with pytest.raises(ValueError, match=r"in \[0, 1\] or -100 \(not known\), but got 2"):
        model.losses((x, 2 * y))
    with pytest.raises(ValueError, match="several classes a row need `multi_label=True`"):
        make().double().losses((x, torch.ones_like(y)))


def test_a_student_without_an_auxiliary_head_is_judged_by_its_own():
    model = DualHeadKD(nn.Linear(6, CLASSES), method="ce", multi_label=True).double()
    assert set(evaluated(model, *many())) == {"val/loss", "val/map", "val/f1", "val/exact_match"}


def test_what_was_reset_in_inference_mode_takes_in_values_outside_of_it():
    metrics, x = ClassifierMetrics(3, multi_label=True), torch.tensor([[4.0, -4.0, 4.0]])
    for mode in (True, False):
        with torch.inference_mode(mode):
            metrics.update("val", x.clone(), (x > 0).float())
            assert metrics.compute("val")["exact_match"] == 1


# --- of one class a row ---


def test_the_five_likeliest_and_the_calibration_error_are_over_all_samples():
    torch.manual_seed(0)
    metrics, classes, count = ClassifierMetrics(8, has_aux_head=True), 8, 60
    logits, aux = 3 * torch.randn(count, classes), torch.randn(count, classes)
    labels = torch.randint(classes, (count,))
    labels[::7] = -100
    for part in torch.arange(count).split(7):
        metrics.update("val", logits[part], labels[part], aux[part])
    values = metrics.compute("val")
    bins = [[] for _ in range(15)]
    top = []
    for row, label in zip(logits[labels >= 0], labels[labels >= 0].tolist(), strict=True):
        confidence, predicted = row.softmax(-1).max(-1)
        bins[min(14, int(float(confidence) * 15))].append((float(confidence), predicted == label))
        top.append(label in row.argsort(descending=True)[:5].tolist())
    ece = sum(abs(sum(c for c, _ in part) - sum(float(hit) for _, hit in part)) for part in bins) / len(top)
    assert values["ece"] == pytest.approx(ece, abs=1e-6)
    assert values["acc_top5"] == pytest.approx(np.mean(top))
    assert values["aux_acc"] == pytest.approx((aux.argmax(-1) == labels)[labels >= 0].float().mean().item())
    soft = F.one_hot(labels.clamp(min=0), classes) * (labels >= 0).unsqueeze(-1).float()
    metrics.update("val", logits, soft, aux)
    torch.testing.assert_close(metrics.compute("val"), values)  # rows of zeros have no label


def test_a_diverged_model_is_not_calibrated():
    metrics = ClassifierMetrics(3)
    metrics.update("val", torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
    assert metrics.compute("val")["ece"].isnan()


def test_a_saved_student_of_transformers_says_that_its_classes_do_not_exclude_each_other(tmp_path):
    bert = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    model = DualHeadKD(bert | {"num_hidden_layers": 1}, num_classes=3, method="ce", multi_label=True)
    model.export(tmp_path / "student")
    assert AutoConfig.from_pretrained(tmp_path / "student").problem_type == "multi_label_classification"
    loss = model.losses({"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.eye(3)[:2]}).ce
    assert loss.isfinite()


# --- two processes ---

SCRIPT = """
import torch, lightning as L
from torch.utils.data import DataLoader
from lit_logits.dual_head_kd import DualHeadKD

class Rows(torch.utils.data.IterableDataset):
    def __init__(self, multi_label, skip):
        self.multi_label, self.skip = multi_label, skip

    def __iter__(self):
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if ranks > 1 else 0
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(9, 6, generator=generator)
        y = torch.randint(2, (9, 7), generator=generator) if self.multi_label else torch.arange(9) % 7
        for i in range(9):
            if ranks == 1 or (rank == 0 if self.skip else i % ranks == rank):
                yield {"pixel_values": x[i], "labels": y[i]}

if __name__ == "__main__":
    for multi_label in (False, True):
        for skip in (False, True):
            torch.manual_seed(0)
            model = DualHeadKD(torch.nn.Linear(6, 7), torch.nn.Linear(6, 7), multi_label=multi_label)
            found = {}
            for devices in (1, 2):
                quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
                trainer = L.Trainer(devices=devices, strategy="ddp_fork" if devices > 1 else "auto",
                                    accelerator="cpu", **quiet)
                (found[devices],) = trainer.validate(model, DataLoader(Rows(multi_label, skip), batch_size=3),
                                                     verbose=False)
            assert found[1].keys() == found[2].keys()
            for name, value in found[1].items():
                assert abs(value - found[2][name]) < 1e-6, (name, value, found[2][name])
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does_also_if_one_has_no_sample(tmp_path):
    run_script(tmp_path / "run.py", SCRIPT)
