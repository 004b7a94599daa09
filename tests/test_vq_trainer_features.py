"""`VQLogitsLM` with what the Trainer may add: averages of weights, loss scalers, tuners, and limits of steps."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from tiny_vq_models import assert_same_state, loader, make_model, make_trainer, pretrained

from lit_logits.callbacks import CodebookReinit
from lit_logits.modules import ResidualVQLogitsHead, VQLogitsHead
from lit_logits.modules.optimization import counted_steps
from lit_logits.modules.vq_logits.checks import check_steps


@pytest.mark.parametrize("head", ["fixed", "residual"])
def test_averages_leave_the_mapping_as_it_is_or_are_refused(head, tmp_path):
    """126 of 128 entries of the mapping came out changed: a mean of integers, cut off to an integer."""
    pretrained("untied", tmp_path / "model")
    kwargs = {"head": partial(ResidualVQLogitsHead, codebook_size=8, num_groups=4)} if head == "residual" else {}
    model = make_model(str(tmp_path / "model"), **kwargs)
    names = "head.packed_codes" if head == "residual" else "head.token_to_code, head.num_updates"
    with pytest.raises(ValueError, match=f"Expected EMAWeightAveraging with use_buffers=False.*{names}"):
        make_trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.9)]).fit(model, loader())
    assert not model.head_ready
    codes, averaged = [], EMAWeightAveraging(decay=0.9, use_buffers=False)

    class Codes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            codes.append({name: b.clone() for name, b in pl_module.head.named_buffers() if not b.is_floating_point()})

    trainer = make_trainer(tmp_path, callbacks=[Codes(), averaged], max_epochs=3)
    trainer.fit(model, loader(), loader(4))
    final = dict(model.head.named_buffers())
    for name, buffer in codes[-1].items():
        assert torch.equal(final[name], buffer), name
    assert trainer.callback_metrics["val/ppl"].isfinite()


@pytest.mark.parametrize(
    "kwargs", [{"mapping": "learned"}, {"mapping": "reassigned"}, {"codebook_update": "ema"}], ids=str
)
@pytest.mark.parametrize(
    "callback",
    [lambda: WeightAveraging(use_buffers=False), lambda: StochasticWeightAveraging(swa_lrs=0.1)],
    ids=["averages", "stochastic"],
)
def test_codes_that_move_have_no_average(kwargs, callback, tmp_path):
    with pytest.raises(ValueError, match=r"Expected codes that stay where they are with .*WeightAveraging"):
        make_trainer(tmp_path, callbacks=[callback()]).fit(make_model(**kwargs), loader())


def test_revived_codes_have_no_average(tmp_path):
    averages = WeightAveraging(use_buffers=False)
    with pytest.raises(ValueError, match="Expected `stop_step` to be set with WeightAveraging"):
        make_trainer(tmp_path, callbacks=[CodebookReinit(), averages]).fit(make_model(), loader())
    make_trainer(tmp_path, callbacks=[CodebookReinit(stop_step=1), averages]).fit(make_model(), loader())


def test_a_step_that_the_loss_scaler_leaves_out_moves_no_code(tmp_path):
    """The EMA codebook and the count of steps went on where the optimizer did not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows float16
    model, moved = make_model(codebook_update="ema"), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            count = next(iter(trainer.optimizers[0].state.values()), {"step": 0})["step"]
            moved.append((int(count), int(pl_module.head.num_updates)))

    scaled = MixedPrecision("16-mixed", "cpu", scaler)
    make_trainer(tmp_path, plugins=[scaled], callbacks=[Watch()], max_epochs=40).fit(model, loader())
    assert moved[0] == (0, 0)
    assert moved[-1][0] > 0
    assert all(steps == updates for steps, updates in moved)


class OldOptimizer:
    """Steps, and knows no hooks."""

    def step(self):
        return None


def test_steps_of_an_optimizer_that_is_not_torchs_count():
    with counted_steps(OldOptimizer()) as steps:
        pass
    assert steps.taken == 1


@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_a_fused_optimizer_tells_its_overflow_itself(overflow):
    """The scaler calls it even then, with `found_inf`."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer: Any = torch.optim.SGD([parameter], lr=0.1, fused=True)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(overflow), torch.tensor(1.0)
    with counted_steps(optimizer) as steps:
        optimizer.step()
    assert steps.taken == 1 - overflow
    assert (parameter.item() == 1) == bool(overflow)


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("head", [VQLogitsHead, ResidualVQLogitsHead])
def test_a_search_for_the_learning_rate_comes_before_the_fit(head, kind, tmp_path):
    """It trains a little, which freed the pretrained rows, and goes back: the fit then had no rows to start from."""
    pretrained(kind, tmp_path / "model")

    def fitted(search):
        options = {"codebook_size": 8} | ({"num_groups": 4} if head is ResidualVQLogitsHead else {})
        model = make_model(str(tmp_path / "model"), head=partial(head, **options), kd_weight=0.5)
        trainer = make_trainer(tmp_path, max_steps=4, max_epochs=-1)
        if search:
            Tuner(trainer).lr_find(model, loader(), num_training=5, update_attr=False, min_lr=0.01)
            assert not model.head_ready
        torch.manual_seed(0)
        trainer.fit(model, loader())
        assert model.head_ready
        assert model._output_layer == (None, None)
        return model

    assert_same_state(fitted(True), fitted(False))


class Batches(LightningDataModule):
    def __init__(self, batch_size=2):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(4)


def test_a_search_for_the_batch_size_comes_before_the_fit(tmp_path):
    pretrained("untied", tmp_path / "model")
    model, data = make_model(str(tmp_path / "model")), Batches()
    trainer = make_trainer(tmp_path, max_steps=4, max_epochs=-1)
    Tuner(trainer).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=1)
    assert not model.head_ready
    trainer.fit(model, data)
    assert model.head_ready


@pytest.mark.parametrize("mapping", ["learned", "reassigned", "fixed"])
@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"max_epochs": 1}, 4),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": -1, "max_steps": 4}, 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"max_epochs": 2}, 8),
    ],
    ids=str,
)
def test_a_mapping_that_is_never_renewed_is_told(mapping, limits, left, tmp_path, recwarn):
    """With fewer steps than `reassign_every_n_steps` it was a fixed one, and nothing said so."""
    model = make_model(mapping=mapping, reassign_every_n_steps=8)
    make_trainer(tmp_path, **limits).fit(model, loader())
    told = [str(w.message) for w in recwarn if "Expected at least 8 training steps" in str(w.message)]
    assert len(told) == (mapping != "fixed" and left < 8)
    assert all(f"but this run has {left}:" in text for text in told)
    assert int(model.head.num_updates) == left


def test_steps_before_count_towards_the_next_renewal():
    head = VQLogitsHead(4, 9, 3, mapping="reassigned", reassign_every_n_steps=10)
    head.num_updates.fill_(25)
    assert check_steps(head, 5) is None
    assert "at least 5 training steps" in check_steps(head, 4)
    assert check_steps(head, None) is None
