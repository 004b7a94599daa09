"""A step is on the mean over all its tokens, however they are split over micro-batches and ranks."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from scripts import run_script
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_logits import CausalLM, DualHeadKD, VQLogitsLM
from lit_logits.modules import VQLogitsHead

LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
SGD = partial(torch.optim.SGD, lr=1.0)


def make(name):
    torch.manual_seed(0)
    student, teacher = (LlamaForCausalLM(LlamaConfig(**LLAMA)) for _ in range(2))
    if name == "CausalLM":
        return CausalLM(student, optimizer=SGD)
    if name.startswith("VQLogitsLM"):
        head = partial(VQLogitsHead, codebook_size=30)
        model = VQLogitsLM(student, head=head, kd_weight=0.5 * name.endswith("kd"), optimizer=SGD)
        model.initialize_head(DataLoader(list(rows()), batch_size=6))
        return model
    return DualHeadKD(student, teacher, grad_align="all" if name.endswith("aligned") else "none", optimizer=SGD)


def rows():
    """Six texts with 4 to 36 labels, and one with none."""
    g = torch.Generator().manual_seed(1)
    for count in (4, 36, 11, 0, 20, 7):
        ids = torch.randint(0, 40, (40,), generator=g)
        labels = torch.where(torch.arange(40) >= 40 - count, ids, -100)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def fit(model, batch_size, num_rows=6, sampler=None, **kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **kwargs)
    trainer.fit(model, DataLoader(list(rows())[:num_rows], batch_size=batch_size, sampler=sampler))
    return model


def check(model, whole, **tolerance):
    for (name, value), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(value, expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


MODELS = ["CausalLM", "VQLogitsLM", "VQLogitsLM-kd", "DualHeadKD", "DualHeadKD-aligned"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_rows", [6, 5])
def test_micro_batches_of_unequal_tokens_are_one_batch(name, num_rows):
    """The second window of five rows has two of them, which Lightning divides by three."""
    settings = {"gradient_clip_val": 0.3, "num_rows": num_rows}
    whole = fit(make(name).double(), 3, **settings)
    check(fit(make(name).double(), 1, accumulate_grad_batches=3, **settings), whole, rtol=1e-4, atol=1e-7)


class Scaled(MixedPrecision):
    """The loss scaler of float16, without float16."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self):
        return nullcontext()


def test_a_loss_scaler_does_not_matter():
    whole = fit(make("CausalLM"), 3, gradient_clip_val=0.3)
    model = fit(make("CausalLM"), 1, gradient_clip_val=0.3, accumulate_grad_batches=3, plugins=[Scaled()])
    check(model, whole, rtol=1e-4, atol=1e-6)


def test_the_value_of_a_loss_stays_the_mean_of_its_micro_batch():
    model, seen = make("CausalLM"), []
    model.on_train_batch_end = lambda outputs, batch, batch_idx: seen.append(
        (float(outputs["loss"]), float(model.trainer.callback_metrics["train/loss"]))
    )
    fit(model, 1, accumulate_grad_batches=6)
    other = make("CausalLM")
    for (returned, logged), row in zip(seen, rows(), strict=True):
        losses = other._losses({key: value[None] for key, value in row.items()}).ce
        assert logged == pytest.approx(float(losses.sum() / max(1, len(losses))), rel=1e-6)
        assert returned == pytest.approx(logged / 6, rel=1e-6)  # as Lightning divides it


class OwnStep(CausalLM):
    def training_step(self, batch, batch_idx):
        losses = self._losses(batch).ce
        return losses.sum() / max(1, len(losses))


def test_a_step_of_your_own_that_weighs_nothing_is_left_alone():
    """It trains on the mean of means, as Lightning does by itself."""
    torch.manual_seed(0)
    model = fit(OwnStep(LlamaForCausalLM(LlamaConfig(**LLAMA)), optimizer=SGD), 1, accumulate_grad_batches=6)
    other = make("CausalLM")
    losses = [other._losses({key: value[None] for key, value in row.items()}).ce for row in rows()]
    torch.stack([values.sum() / max(1, len(values)) for values in losses]).mean().backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter -= parameter.grad
    check(model, other, rtol=1e-4, atol=1e-6)


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
from scripts import TakeTurns
from test_token_window import MODELS, fit, make

if __name__ == "__main__":
    for name in MODELS:
        model = fit(make(name).double(), 1, sampler=TakeTurns(6), devices=2, strategy="ddp_fork",
                    use_distributed_sampler=False, accumulate_grad_batches=3, gradient_clip_val=0.3)
        if model.global_rank == 0:
            torch.save(model.state_dict(), {folder!r} + "/" + name)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run_script(tmp_path / "run.py", TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    for name in MODELS:
        model = make(name).double()
        model.load_state_dict(torch.load(tmp_path / name))
        check(model, fit(make(name).double(), 6, gradient_clip_val=0.3), rtol=1e-4, atol=1e-7)
