"""Models that are held out of training."""

import copy
from functools import partial

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lit_logits import CausalLM, DualHeadKD, DynamicFusionDecoder, GLDFusionModule, VQLogitsLM
from lit_logits.modules import ResidualVQLogitsHead, VQLogitsHead
from lit_logits.modules.language_models.frozen import FrozenModels, input_device
from lit_logits.modules.language_models.loading import new_causal_lm
from lit_logits.modules.metrics import StageMeans

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
LLAMA |= {"num_attention_heads": 2}


class Spread(nn.Linear):
    """As accelerate leaves a model that it has spread over devices."""

    hf_device_map = {"": "cpu"}  # noqa: RUF012


def test_held_models_are_in_nothing_that_is_trained_or_saved():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    holder = nn.ModuleDict({"held": FrozenModels(model), "own": nn.Linear(2, 2)})
    assert [name for name, _ in holder.named_parameters()] == ["own.weight", "own.bias"]
    assert list(holder.state_dict()) == ["own.weight", "own.bias"]
    holder.train()
    assert not model.training
    assert not model[1].training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("keep_dtype", [True, False])
def test_held_models_follow_to_devices_and_unless_told_otherwise_to_dtypes(keep_dtype):
    holder = FrozenModels(nn.Linear(2, 2), nn.Linear(2, 2), keep_dtype=keep_dtype).half()
    expected = torch.float32 if keep_dtype else torch.float16
    assert [model.weight.dtype for model in holder.models] == [expected] * 2
    holder.to("meta")
    assert [model.weight.device.type for model in holder.models] == ["meta"] * 2


@pytest.mark.parametrize("keep_dtype", [True, False])
def test_what_stands_elsewhere_stays_there(keep_dtype):
    spread, elsewhere, here = Spread(2, 2), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)
    holder = FrozenModels(spread, elsewhere, here, keep_dtype=keep_dtype)
    holder.to("meta")
    assert [input_device(model).type for model in holder.models] == ["cpu", "meta", "meta"]
    pinned = FrozenModels(nn.Linear(2, 2), keep_dtype=keep_dtype, pinned=True).to("meta")
    assert input_device(pinned.models[0]).type == "cpu"


def test_a_copy_shares_the_models_until_it_goes_elsewhere():
    holder = FrozenModels(nn.Linear(2, 2))
    first, second = copy.deepcopy(holder), copy.deepcopy([holder])[0]
    assert first.to("cpu").models[0] is second.models[0] is holder.models[0]
    first.half()
    assert [held.models[0].weight.dtype for held in (first, second, holder)] == [torch.float16, *[torch.float32] * 2]
    assert torch.equal(first.models[0].weight, holder.models[0].weight.half())
    first.float()  # its own by now
    assert first.models[0] is not holder.models[0]


def test_callbacks_that_average_weights_copy_no_teacher():
    """A large teacher was in memory twice."""
    student = DualHeadKD(nn.Linear(4, 3), nn.Linear(4, 3), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = [{"pixel_values": torch.randn(4), "labels": torch.tensor(1)}] * 4
    averaging = EMAWeightAveraging()
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, callbacks=[averaging], **quiet)
    shared = []
    student.on_train_batch_start = lambda *_: shared.append(averaging._average_model.module.teacher.model)
    trainer.fit(student, DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
    assert shared == [student.teacher.model] * 2


def test_a_model_without_tensors_is_nowhere():
    assert input_device(nn.ReLU()) is None
    FrozenModels(nn.ReLU()).to("meta")


def test_every_method_holds_its_frozen_models_in_the_same_way():
    model = new_causal_lm(LLAMA)
    student = DualHeadKD(nn.Linear(4, 3), nn.Linear(4, 3))
    fused = DynamicFusionDecoder(model, copy.deepcopy(model), [copy.deepcopy(model)])
    fusion = GLDFusionModule(copy.deepcopy(model), {"source": copy.deepcopy(model)})
    held = [student.teacher, fused.fused, fusion.sources["source"]]
    assert all(isinstance(part, FrozenModels) for part in held)


def test_means_that_were_reset_without_gradients_take_in_values_with_them():
    """`validate` and then `fit`: what inference mode has made cannot be changed in place outside of it."""
    means = StageMeans("nll")
    with torch.inference_mode():
        means.update("val", nll=torch.ones(2))
        assert means.compute("val")["nll"] == 1
    means.update("val", nll=torch.tensor([2.0, 4.0]))
    assert means.compute("val")["nll"] == 3


@pytest.mark.parametrize("method", [CausalLM, partial(VQLogitsLM, head=partial(VQLogitsHead, codebook_size=4))])
def test_validate_before_fit(method, tmp_path):
    ids = torch.arange(12).repeat(4, 1)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(**settings, enable_progress_bar=False, default_root_dir=tmp_path)
    model, loader = method({**LLAMA}, 20), DataLoader(rows, batch_size=2)
    trainer.validate(model, loader, verbose=False)
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["val/loss"].isfinite()
    trainer.validate(model, loader, verbose=False)
    trainer.fit(model, loader, loader)


def test_nothing_held_is_a_buffer():
    """DDP sends buffers in every forward, evaluation too: a rank without batches then kept the others waiting."""
    student = DualHeadKD(nn.Linear(4, 3), nn.Linear(4, 3))
    assert list(student.named_buffers()) == []
    head = partial(ResidualVQLogitsHead, codebook_size=4, num_groups=2)
    model = VQLogitsLM(new_causal_lm({**LLAMA}), head=head, kd_weight=0.5)
    assert not [name for name, _ in model.named_buffers() if name.startswith("original")]
    target = model.original.to(torch.float64).target(torch.zeros(0), input_ids=torch.zeros(1, 2, dtype=torch.long))
    assert target.weight.dtype == target.hidden.dtype == torch.float64
