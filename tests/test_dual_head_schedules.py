"""The weight of distillation as a function of the step, and mixed images."""

import pytest
import torch
from jsonargparse import ArgumentParser
from test_dual_head_training import fit, make, rows

from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.modules import LinearRamp


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
