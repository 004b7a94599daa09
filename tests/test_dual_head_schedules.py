"""The weight of distillation as a function of the step, and mixed images."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_classifiers import CLASSES, fit, make, rows
from torch import nn
from torch.utils.data import DataLoader

from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.functional.mixing import mix_labels
from lit_logits.modules import LinearRamp, new_causal_lm
from lit_logits.modules.dual_head_kd.mixing import BatchMixer


class Watched(DualHeadKD):
    """Notes the terms and the loss of every step."""

    seen: list

    def training_step(self, batch, batch_idx):
        ce, kd = self.losses(batch)
        self.aligner.reset()
        loss = super().training_step(batch, batch_idx)
        self.seen.append((ce.detach(), kd.detach(), loss.detach()))
        return loss


@pytest.mark.parametrize("grad_align", ["none", "backbone"])
def test_the_weight_of_distillation_follows_its_schedule(grad_align):
    """The first step of DKD's warm-up has no distillation; with alignment there is then nothing to align."""
    model = make(kind=Watched, kd_loss="dkd", kd_factor=LinearRamp(0.0, 3.0, steps=2), grad_align=grad_align)
    model.seen = []
    trainer = fit(model, rows(36), max_steps=3)
    for (ce, kd, loss), factor in zip(model.seen, (0.0, 1.5, 3.0), strict=True):
        torch.testing.assert_close(loss, ce + factor * kd)
    assert trainer.logged_metrics["train/kd_factor"] == 3.0


def test_a_schedule_is_no_part_of_a_checkpoint(tmp_path):
    model = make(kd_factor=lambda step: 0.5 * step)
    fit(model, rows()).save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert "kd_factor" not in saved
    assert saved["ce_weight"] == 1.0


def test_a_weight_below_zero_is_refused_at_its_step():
    with pytest.raises(ValueError, match="`kd_factor` to be non-negative, but got -1"):
        make(kd_factor=LinearRamp(-1.0, 1.0, steps=2))
    with pytest.raises(ValueError, match="`kd_factor` to be non-negative, but got -1"):
        fit(make(kd_factor=LinearRamp(1.0, -1.0, steps=1)), rows(24), max_steps=2)


def test_a_recipe_names_the_schedule_by_its_class():
    parser = ArgumentParser()
    parser.add_subclass_arguments(DualHeadKD, "model")
    ramp = {"class_path": "lit_logits.modules.LinearRamp", "init_args": {"start": 0.0, "end": 4.0, "steps": 10}}
    made = {"student": "resnet8", "num_classes": 3, "method": "ce", "kd_factor": ramp}
    config = parser.parse_object({"model": {"class_path": "lit_logits.DualHeadKD", "init_args": made}})
    assert parser.instantiate(config).model.kd_factor(5) == 2.0


# --- mixed images ---


def pictures(count=8, classes=CLASSES):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    return {"pixel_values": images, "labels": torch.randint(classes, (count,), generator=generator)}


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.fc = nn.Flatten(), nn.Linear(108, CLASSES)

    def forward(self, x):
        return self.fc(self.flat(x))


def test_mixup_is_a_line_between_two_images_and_their_labels():
    batch = pictures()
    mixed = BatchMixer(mixup_alpha=1.0)(batch, CLASSES, place=(0, 3, 0))
    hard = F.one_hot(batch["labels"], CLASSES).float()
    shares = set()
    for image, label in zip(mixed["pixel_values"], mixed["labels"], strict=True):
        # Of the two that it is made of, least squares finds the shares.
        basis = batch["pixel_values"].flatten(1).T
        shares_found = torch.linalg.lstsq(basis, image.flatten().unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(basis @ shares_found, image.flatten())
        assert int((shares_found.abs() > 1e-6).sum()) <= 2
        torch.testing.assert_close(label, (shares_found.float().unsqueeze(1) * hard).sum(0), atol=1e-5, rtol=0)
        shares |= {round(float(share), 4) for share in shares_found if 1e-6 < abs(share) < 1 - 1e-6}
    assert len(shares) == 2  # λ and 1 − λ, of the whole batch
    assert sum(shares) == pytest.approx(1, abs=1e-3)


def test_cutmix_pastes_a_box_and_labels_go_by_its_area():
    batch = pictures()
    mixed = BatchMixer(cutmix_alpha=1.0)(batch, CLASSES, place=(0, 1, 0))
    own = (mixed["pixel_values"] == batch["pixel_values"]).all(1)
    moved = ~own.flatten(1).all(1)
    assert moved.any()
    box = ~own[moved][0]
    rows_, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
    assert int(box.sum()) == len(rows_) * len(columns)  # a rectangle
    share = 1 - float(box.double().mean())
    for image, label, hard, pasted in zip(
        mixed["pixel_values"], mixed["labels"], F.one_hot(batch["labels"], CLASSES), moved.tolist(), strict=True
    ):
        other = hard.float()
        if pasted:
            same = (batch["pixel_values"] == image)[:, :, box].flatten(1).all(1)
            other = F.one_hot(batch["labels"][same], CLASSES)[0].float()
        torch.testing.assert_close(label, share * hard.float() + (1 - share) * other)


def test_what_is_drawn_depends_on_the_place_alone():
    mixer, batch = BatchMixer(0.4, 1.0, seed=1), pictures()
    again = BatchMixer(0.4, 1.0, seed=1)
    for place in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]:
        torch.testing.assert_close(
            mixer(batch, CLASSES, place=place), again(batch, CLASSES, place=place), rtol=0, atol=0
        )
    drawn = [mixer._draw(8, (0, number, 0)) for number in range(8)] + [BatchMixer(0.4, 1.0, seed=2)._draw(8, (0, 0, 0))]
    assert len({draws.share for draws in drawn}) == 9
    assert {draws.cuts for draws in drawn} == {True, False}


def test_unknown_labels_stay_unknown():
    batch = pictures()
    batch["labels"][:4] = -100
    mixed = BatchMixer(1.0)(batch, CLASSES, place=(0, 0, 0))["labels"]
    order = BatchMixer(1.0)._draw(8, (0, 0, 0)).order
    for row, (label, other) in enumerate(zip(mixed, order, strict=True)):
        assert label.sum() == pytest.approx(0 if min(row, other) < 4 else 1)
    model = DualHeadKD(Conv(), Conv()).double()
    soft = {"pixel_values": batch["pixel_values"], "labels": mixed}
    known = mixed.sum(-1) > 0
    logits = model(batch["pixel_values"])
    torch.testing.assert_close(model.losses(soft).ce, F.cross_entropy(logits[known], mixed[known].double()))
    many = torch.tensor([[1.0, -100.0], [0.0, 0.0]])
    found = mix_labels(many, torch.tensor([1, 0]), 0.75, multi_label=True)
    assert found.tolist() == [[0.75, -100.0], [0.25, -100.0]]


class Seen(Conv):
    """Notes the images that it is shown."""

    def __init__(self):
        super().__init__()
        self.images = []

    def forward(self, x):
        self.images.append(x.detach())
        return super().forward(x)


def test_the_teacher_sees_the_mixed_images_and_evaluation_none():
    student, teacher = Seen(), Seen()
    model = DualHeadKD(student, teacher, mixup_alpha=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    batch = pictures()
    data = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    trainer = fit(model, data, batch_size=8, sampler=range(8))
    expected = BatchMixer(1.0)(batch, CLASSES, place=(0, 0, 0))["pixel_values"]
    torch.testing.assert_close(student.images[-1], expected)
    torch.testing.assert_close(teacher.images[-1], expected)
    trainer.validate(model, DataLoader(data, batch_size=8), verbose=False)
    torch.testing.assert_close(student.images[-1], batch["pixel_values"])


def test_a_run_that_resumes_within_an_epoch_draws_what_the_whole_one_draws(tmp_path):
    batch = pictures(32)
    data = [{name: value[i] for name, value in batch.items()} for i in range(32)]

    def run(skip=0, **kwargs):
        torch.manual_seed(0)
        model = DualHeadKD(
            Conv(), Conv(), mixup_alpha=0.5, cutmix_alpha=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        ).double()
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = L.Trainer(max_steps=4, accelerator="cpu", precision="64-true", callbacks=[saving], **quiet)
        trainer.fit(model, StatefulLoader(data, skip), **kwargs)
        return model

    whole = run()
    resumed = run(skip=2, ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(resumed.student.fc.weight, whole.student.fc.weight)


class StatefulLoader:
    """Batches of 4 in order, from a position on in its first epoch."""

    def __init__(self, data, skip):
        self.data, self.skip = data, skip

    def __len__(self):
        return len(self.data) // 4

    def __iter__(self):
        start, self.skip = self.skip, 0
        for i in range(start, len(self)):
            part = self.data[4 * i : 4 * i + 4]
            yield {name: torch.stack([row[name] for row in part]) for name in part[0]}


def test_mixing_is_refused_where_it_cannot_be():
    tokens = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"Expected images of floats to mix, but got .*torch.int64"):
        BatchMixer(1.0)(tokens, 2, place=(0, 0, 0))
    flat = {"pixel_values": torch.zeros(2, 4), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"images \(B, channels, H, W\) for `cutmix_alpha`, but got \(2, 4\)"):
        BatchMixer(0.0, 1.0)(flat, 2, place=(0, 0, 0))
    with pytest.raises(ValueError, match="`mix_seed` to be non-negative, but got -1"):
        make(mixup_alpha=1.0, mix_seed=-1)
    with pytest.raises(ValueError, match="`cutmix_alpha` to be non-negative, but got -1"):
        make(cutmix_alpha=-1.0)
    with pytest.raises(ValueError, match="to be 0 for kd_loss='dkd', which needs one class a sample"):
        make(mixup_alpha=1.0, kd_loss="dkd")
    llama = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 2, "vocab_size": 20}
    with pytest.raises(ValueError, match="to be 0 for a causal language model, whose tokens cannot be mixed"):
        DualHeadKD(llama, new_causal_lm(llama), mixup_alpha=1.0)
