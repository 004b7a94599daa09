"""What DDP sends at every forward: the mapping of a head not, which all ranks have from rank 0 all the same."""

from functools import partial
from pathlib import Path

import pytest
import torch
from scripts import run_script
from tiny_llamas import llama
from tiny_vq_models import make_model
from torch import nn

from lit_logits.modules import HierarchicalVQLogitsHead, ResidualVQLogitsHead, VQLogitsHead
from lit_logits.modules.ddp_buffers import leave_out_of_ddp, settled_buffers

HEADS = {
    "vq": partial(VQLogitsHead, codebook_size=8),
    "learned": partial(VQLogitsHead, codebook_size=8, mapping="learned", reassign_every_n_steps=2),
    "hierarchical": partial(HierarchicalVQLogitsHead, codebook_sizes=(12, 6, 6)),
    "residual": partial(ResidualVQLogitsHead, codebook_size=8, num_groups=2, token_stages=2),
}
SETTLED = {
    "vq": ["head.token_to_code"],
    "learned": ["head.token_to_code"],
    "hierarchical": ["head.token_to_cluster", "head.token_codes"],
    "residual": ["head.packed_codes", "head.packed_stages"],
}

SCRIPT = """
import os
import sys

import torch
from lightning.pytorch import Callback
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

sys.path.insert(0, {tests!r})
from test_ddp_buffers import HEADS, SETTLED
from tiny_vq_models import make_model, make_trainer, rows
from tiny_llamas import llama
from lit_logits.callbacks import CodebookReassign, CodebookReinit

torch.set_num_threads(1)
sent, send = set(), DistributedDataParallel._distributed_broadcast_coalesced


def watched(self, tensors, *args):
    sent.update(name for name, buffer in self.module.named_buffers() if any(buffer is one for one in tensors))
    return send(self, tensors, *args)


class Notes(Callback):
    def __init__(self, case):
        self.case, self.starts = case, []

    def note(self, model):
        self.starts.append([model.get_buffer(name).clone() for name in SETTLED[self.case]])

    def setup(self, trainer, model, stage):
        generator = torch.Generator().manual_seed(trainer.global_rank)
        for name in SETTLED[self.case][:1]:
            old = model.get_buffer(name)
            most = 256 if old.dtype == torch.uint8 else int(old.max()) + 1
            old.copy_(torch.randint(most, old.shape, generator=generator))
        self.note(model)

    def on_train_start(self, trainer, model):
        self.note(model)

    def on_train_end(self, trainer, model):
        self.note(model)
        found = sorted(sent), self.starts, model.state_dict()
        torch.save(found, f"{folder}/{{self.case}}-{{trainer.global_rank}}.pt")


if __name__ == "__main__":
    DistributedDataParallel._distributed_broadcast_coalesced = watched
    for case, head in HEADS.items():
        model = make_model(llama(0, vocab_size=61), head=head)
        model.head_ready.fill_(True)  # as a checkpoint does: no start gives all ranks the same mapping
        changes = [CodebookReinit(every_n_steps=1, min_usage=0.5)] if case != "residual" else []
        changes += [CodebookReassign([2], min_gain=0.0)] if case in ("vq", "hierarchical") else []
        options = {{"devices": 2, "strategy": "ddp_fork", "max_steps": 4, "callbacks": [Notes(case), *changes]}}
        make_trainer({folder!r}, **options).fit(model, DataLoader(rows(32), batch_size=4))
    os._exit(0)  # threads of gloo that outlive the interpreter abort it now and then
"""


@pytest.mark.slow
def test_two_processes_send_no_mapping_and_have_the_same(tmp_path):
    """Each rank begins with a mapping of its own; callbacks change it on the way."""
    run_script(tmp_path / "run.py", SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    for case, names in SETTLED.items():
        (sent, first, state), (_, second, others) = (torch.load(tmp_path / f"{case}-{rank}.pt") for rank in (0, 1))
        assert "head_ready" in sent, case  # DDP sends the small ones still
        assert not set(names) & set(sent), case
        assert not torch.equal(first[0][0], second[0][0]), case
        assert all(map(torch.equal, first[0], first[1])), case
        assert all(map(torch.equal, first[1], second[1])), case
        if case != "residual":
            assert not all(map(torch.equal, first[1], first[2])), case  # it has changed since
        for name in state:
            assert torch.equal(state[name], others[name]), (case, name)


@pytest.mark.parametrize("case", HEADS)
def test_settled_buffers_are_the_mapping(case):
    model = make_model(llama(0, vocab_size=61), head=HEADS[case])
    assert settled_buffers(model) == SETTLED[case]
    large = [name for name, buffer in model.named_buffers() if not buffer.is_floating_point() and buffer.ndim]
    assert set(large) == set(SETTLED[case])  # none is forgotten


def test_marks_of_others_stay():
    model = nn.ModuleDict({"head": VQLogitsHead(4, 10, 2), "own": nn.BatchNorm1d(2)})
    model._ddp_params_and_buffers_to_ignore = ["own.running_mean"]
    for _ in range(2):
        leave_out_of_ddp(model)
        assert model._ddp_params_and_buffers_to_ignore == ["head.token_to_code", "own.running_mean"]


def test_a_head_that_is_reached_by_two_ways_has_two_names():
    head = VQLogitsHead(4, 10, 2)
    assert settled_buffers(nn.ModuleDict({"a": head, "b": head})) == ["a.token_to_code", "b.token_to_code"]
    assert settled_buffers(head) == ["token_to_code"]
