"""FSDP on two processes of the CPU: it equals one process, or is refused in a sentence at the start.

Lightning's FSDPStrategy asks for a GPU, so a subclass gives torch's FSDP the CPU for a device.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import run_script
from tiny_llamas import llama
from tiny_vq_models import make_model, make_trainer
from torch import nn

from lit_logits import CausalLM, DualHeadKD, GLDFusionModule, VQLogitsLM
from lit_logits.callbacks import CodebookReassign, CodebookReinit
from lit_logits.modules import DenseLogitsHead, HierarchicalVQLogitsHead, ResidualVQLogitsHead, VQLogitsHead
from lit_logits.modules.sharding import check_whole_weights, shards_weights

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def texts(count=16, seed=0):
    """Rows of which a fifth of the labels is ignored, so that ranks have different numbers of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (count, 8), generator=generator)
    labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.8, -100)
    rows = zip(ids, labels, strict=True)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label} for row, label in rows]


def vectors(count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, generator=generator), index % 3) for index in range(count)]


def vq(head, **options):
    """A model whose head has started, as FSDP needs it."""
    model = VQLogitsLM(llama(0, num_hidden_layers=2), head=head, optimizer=SGD, calibration_batches=2, **options)
    model.initialize_head(torch.utils.data.DataLoader(texts(), batch_size=8))
    return model


def fusion():
    return GLDFusionModule(llama(0, num_hidden_layers=2), {"wide": llama(3, hidden=32)}, optimizer=SGD, kd_weight=0.5)


def student():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return DualHeadKD(net, nn.Linear(6, 3), optimizer=SGD)


CASES = {
    "causal lm": lambda: CausalLM(llama(0, num_hidden_layers=2), optimizer=SGD),
    "tied": lambda: CausalLM(llama(0, num_hidden_layers=2, tie_word_embeddings=True), optimizer=SGD),
    "gld": fusion,
    "kd": student,
    "dense": lambda: vq(DenseLogitsHead),
    "vq": lambda: vq(partial(VQLogitsHead, codebook_size=8)),
    "two levels": lambda: vq(partial(HierarchicalVQLogitsHead, codebook_sizes=(8, 4))),
    "residual": lambda: vq(partial(ResidualVQLogitsHead, codebook_size=8, num_groups=4), kd_weight=0.5),
}

SCRIPT = """
import os
import sys
import traceback

import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

sys.path.insert(0, {tests!r})
from test_sharding import CASES, texts, vectors
from tiny_vq_models import make_trainer

torch.set_num_threads(1)


class OnCPU(FSDPStrategy):
    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def loader(data, size, rank, devices):
    sampler = DistributedSampler(data, num_replicas=devices, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=size // devices, sampler=sampler)


def fit(case, model, rank, devices):
    data = vectors if case == "kd" else texts
    strategy = OnCPU(auto_wrap_policy={{LlamaDecoderLayer}}, process_group_backend="gloo") if devices == 2 else "auto"
    trainer = make_trainer({folder!r}, devices=devices, strategy=strategy, max_steps=2, use_distributed_sampler=False)
    trainer.fit(model, loader(data(16), 8, rank, devices), loader(data(8, 1), 4, rank, devices))
    if devices == 2:
        assert any(isinstance(part, FullyShardedDataParallel) for part in trainer.strategy.model.modules())
        pieces = sum(parameter.numel() for parameter in trainer.strategy.model.parameters())
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, writeback=False):
            weights = {{name: p.detach().clone() for name, p in model.named_parameters()}}
        assert pieces < 0.6 * sum(weight.numel() for weight in weights.values())
        weights = {{name.replace("_fsdp_wrapped_module.", ""): weight for name, weight in weights.items()}}
    else:
        weights = {{name: p.detach() for name, p in model.named_parameters()}}
    metrics = {{name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}}
    torch.save((weights, metrics), f"{folder}/{{case}}-{{devices}}-{{rank}}.pt")


def work(rank, models, port):
    os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}}
    os.environ |= {{"NODE_RANK": "0", "WORLD_SIZE": "2"}}
    try:
        for case, model in models.items():
            fit(case, model, rank, 2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # threads of gloo that outlive the interpreter abort it now and then


if __name__ == "__main__":
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    # Made here, so that the heads start before there are processes, as users start them before `fit`.
    models = {{case: make() for case, make in CASES.items()}}
    mp.start_processes(work, args=(models, str(find_free_network_port())), nprocs=2, start_method="fork")
    for case, model in models.items():
        fit(case, model, 0, 1)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Weights after two steps, and the validation after them, for every method that FSDP trains."""
    run_script(tmp_path / "run.py", SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    for case in CASES:
        names = ("1-0", "2-0", "2-1")
        (one, metrics), (first, found), (second, others) = (
            torch.load(tmp_path / f"{case}-{name}.pt") for name in names
        )
        assert one.keys() == first.keys() == second.keys(), case
        for name in one:
            assert torch.equal(first[name], second[name]), (case, name)
            torch.testing.assert_close(first[name], one[name], rtol=1e-4, atol=1e-6, msg=f"{case}: {name}")
        assert metrics, case
        for name, value in metrics.items():
            assert found[name].item() == others[name].item() == pytest.approx(value.item(), rel=1e-4), (case, name)


# ---------------------------------------------------------------------- refused


class FSDPStrategy:
    """As `OnCPU` and Lightning's own are known: by the name of a class that they derive from."""


class Mine(FSDPStrategy):
    pass


class ModelParallelStrategy:
    pass


def test_strategies_are_known_by_name():
    assert shards_weights(FSDPStrategy())
    assert shards_weights(Mine())
    assert shards_weights(ModelParallelStrategy())
    assert not shards_weights(object())
    check_whole_weights(object(), "anything")


def start(model, strategy):
    model._trainer = SimpleNamespace(strategy=strategy, callbacks=[])
    model.on_fit_start()


def test_a_head_that_is_to_read_data_between_steps():
    """K-means took the pieces of the output layer for the whole, and raised `'weight' must be 2-D`."""
    model = make_model(llama(0))
    with pytest.raises(ValueError, match=r"Expected a head that has started, but got .* and FSDPStrategy, .*Call"):
        start(model, FSDPStrategy())
    start(model, object())
    model.head_ready.fill_(True)
    start(model, FSDPStrategy())


@pytest.mark.parametrize("options", [{"mapping": "learned"}, {"codebook_update": "ema"}, {"mapping": "reassigned"}])
def test_codes_that_move_by_other_things_than_gradients(options):
    model = make_model(llama(0), **options)
    model.head_ready.fill_(True)
    with pytest.raises(ValueError, match=r"mapping='fixed' and codebook_update='gradient' with Mine, .* Use DDP"):
        start(model, Mine())


@pytest.mark.parametrize("callback", [CodebookReinit(), CodebookReassign([1])])
def test_callbacks_that_change_codes(callback, tmp_path):
    trainer = make_trainer(tmp_path)
    name = type(callback).__name__
    with pytest.raises(ValueError, match=rf"Expected whole parameters with {name}, .* but got FSDPStrategy"):
        callback.on_fit_start(SimpleNamespace(strategy=FSDPStrategy(), callbacks=[]), make_model())
    callback.on_fit_start(trainer, make_model())
