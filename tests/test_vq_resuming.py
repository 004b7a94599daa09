"""`VQLogitsLM` that is resumed, loaded or trained in two processes is the one of an uninterrupted run."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scripts import run_script
from tiny_vq_models import assert_same_state, loader, make_model, make_trainer, pretrained

from lit_logits.callbacks import CodebookReinit
from lit_logits.modules import VQLogitsHead
from lit_logits.vq_logits import VQLogitsLM


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_resumed_equals_uninterrupted(update, tmp_path):
    """Parameters and buffers bit by bit, with a learned mapping and revivals on the way."""

    def run(epochs, ckpt=None, folder="none"):
        model = make_model(mapping="learned", codebook_update=update, codebook_size=20)
        reinit = CodebookReinit(every_n_steps=3, min_usage=0.5)
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_epochs=1)
        trainer = make_trainer(tmp_path, max_epochs=epochs, callbacks=[reinit, saver], enable_checkpointing=True)
        trainer.fit(model, loader(20), ckpt_path=ckpt)
        return model, trainer, saver.last_model_path

    whole, trainer, _ = run(4)
    half, _, path = run(2, folder="half")
    assert any(
        not torch.equal(a, b) for a, b in zip(whole.state_dict().values(), half.state_dict().values(), strict=True)
    )
    resumed, again, _ = run(4, path, "resumed")
    assert again.global_step == trainer.global_step == 20
    assert_same_state(whole, resumed)
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, again)]
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_checkpoint_loads_on_its_own(tmp_path):
    model = make_model(mapping="learned")
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = VQLogitsLM.load_from_checkpoint(tmp_path / "model.ckpt")
    assert_same_state(model, loaded)
    assert loaded.head_ready
    ids = next(iter(loader()))["input_ids"]
    torch.testing.assert_close(model.eval()(ids), loaded.eval()(ids))
    with pytest.raises(ValueError, match="`codebook_size` 9, but this one has 8"):
        VQLogitsLM.load_from_checkpoint(tmp_path / "model.ckpt", head=partial(VQLogitsHead, codebook_size=9))


def test_a_finished_head_is_not_started_again(tmp_path):
    model = make_model()
    make_trainer(tmp_path).fit(model, loader())
    codes = model.head.token_to_code.clone()
    model.initialize_head = None  # calling it would raise
    make_trainer(tmp_path).fit(model, loader(seed=5))
    assert torch.equal(model.head.token_to_code, codes)


# ---------------------------------------------------------------------- two processes

SCRIPT = """
import os
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, {tests!r})
from tiny_vq_models import make_model, make_trainer, rows
from lit_logits.callbacks import CodebookFit, CodebookReassign, CodebookReinit
from lit_logits.modules import HierarchicalVQLogitsHead, ResidualVQLogitsHead

torch.set_num_threads(1)
devices, cases, folder = int(sys.argv[1]), eval(sys.argv[2]), sys.argv[3]
rank = int(os.environ.get("LOCAL_RANK", 0))


def batches(data, batch_size):
    sampler = DistributedSampler(data, num_replicas=devices, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=batch_size // devices, sampler=sampler)


for case, kwargs in cases.items():
    residual, hierarchical = kwargs.pop("residual", None), kwargs.pop("hierarchical", None)
    if residual is not None:
        kwargs["head"] = partial(ResidualVQLogitsHead, codebook_size=8, **residual)
    if hierarchical is not None:
        kwargs["head"] = partial(HierarchicalVQLogitsHead, **hierarchical)
    model = make_model(
        {backbone!r},
        calibration_batches=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        **kwargs,
    )
    own_vectors = hierarchical is not None and "own_vectors" in hierarchical
    torch.manual_seed(rank)  # ranks must agree although they are seeded differently
    trainer = make_trainer(
        folder,
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_find_unused_parameters_true" if own_vectors else "ddp",
        max_epochs=2,
        callbacks=[
            *([CodebookFit(at=0.5)] if own_vectors else []),
            *([] if residual is not None else [CodebookReinit(every_n_steps=3, min_usage=0.5)]),
            *([] if hierarchical is None else [CodebookReassign([4], min_gain=0.1)]),
        ],
        use_distributed_sampler=False,
    )
    trainer.fit(model, batches(rows(32), 8), batches(rows(12, seed=1, ragged=True), 4))
    metrics = {{name: value.item() for name, value in trainer.callback_metrics.items()}}
    torch.save((model.state_dict(), metrics), f"{{folder}}/{{case}}-{{devices}}-{{trainer.global_rank}}.pt")
os._exit(0)  # threads of gloo that outlive the interpreter abort it now and then; Lightning leaves the group open
"""


CASES: dict[str, dict] = {
    "learned": {"mapping": "learned", "codebook_size": 20},
    "ema": {"mapping": "learned", "codebook_update": "ema", "codebook_size": 20},
    "reassigned": {"mapping": "reassigned", "codebook_size": 20, "init": "kmeans"},
    "residual": {"residual": {"num_groups": 4, "num_stages": {20: 2, 61: 1}, "bias": True}, "kd_weight": 0.7},
    "fisher": {
        "residual": {"num_groups": 4, "num_stages": {20: 2, 61: 1}, "token_weights": "fisher"},
        "kd_weight": 0.7,
    },
    "hierarchical": {"hierarchical": {"codebook_sizes": (12, 6, 6)}, "kd_weight": 0.3},
    "own_vectors": {"hierarchical": {"codebook_sizes": (12, 6, 6), "num_groups": 2, "own_vectors": True}},
}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Same global batches: calibration, weighted k-means, revivals and the learned mapping agree, and so do ranks."""
    pretrained("untied", tmp_path / "model")
    text = SCRIPT.format(tests=str(Path(__file__).parent), backbone=str(tmp_path / "model"))
    for devices in (1, 2):
        run_script(tmp_path / "train.py", text, str(devices), repr(CASES), str(tmp_path), folder=tmp_path)
    for case in CASES:
        one, first, second = (torch.load(tmp_path / f"{case}-{name}.pt") for name in ("1-0", "2-0", "2-1"))
        for name in one[0]:
            assert torch.equal(first[0][name], second[0][name]), (case, name)
            torch.testing.assert_close(one[0][name], first[0][name], rtol=1e-3, atol=1e-5, msg=f"{case}: {name}")
        names = {
            "vq/reinit",
            "vq/reassigned",
            "vq/reassign_gain",
            "vq/coding_cost",
            "val/loss",
            "val/ppl",
            "val/kl",
            "val/ppl_ratio",
        }
        assert ("vq/coding_cost" in one[1]) == (case == "own_vectors")
        if case == "hierarchical":
            assert one[1]["vq/reassigned"] > 0
        for name in names & one[1].keys():  # the targets of the two ranks differ in number
            assert first[1][name] == second[1][name] == pytest.approx(one[1][name], rel=1e-4), (case, name)
