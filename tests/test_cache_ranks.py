"""Logit caches that several ranks write, of shares that differ: the bytes are those of one process."""

from pathlib import Path

import pytest
import torch
from logit_caches import IDS, Model, bytes_of, check_same, predict, rows_of
from scripts import run_script

from lit_logits.storage.logit_cache import LogitCache

SHARES = {
    "uneven": (IDS[:7], IDS[7:]),
    "one has none": (IDS, []),
    "padded": (IDS[::2], [*IDS[1::2], IDS[0]]),  # as torch's DistributedSampler, which repeats the first
    "both have some": (IDS[:6], IDS[3:]),
}

SCRIPT = """
import sys

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, {tests!r})
from test_cache_ranks import SHARES
from logit_caches import Data, Model, predict


class Shares(Data):
    def __init__(self, shares):
        super().__init__()
        self.shares = shares
        self.allow_zero_length_dataloader_with_multiple_devices = True  # else Lightning refuses a rank without batches

    def predict_dataloader(self):
        return DataLoader(self.shares[self.trainer.global_rank], batch_size=self.batch_size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = {{"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}}
    for case, shares in SHARES.items():
        predict(f"{folder}/{{case}}", Model(["base", "other"]), Shares(shares), **options)
"""


@pytest.mark.slow
def test_shares_of_two_ranks(tmp_path):
    predict(tmp_path / "whole", Model(["base", "other"]))
    whole = bytes_of(tmp_path / "whole")
    run_script(tmp_path / "run.py", SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    ids = torch.tensor(IDS)
    for case in SHARES:
        check_same(tmp_path / case, whole)
        for source in ("base", "other"):
            read, expected = (LogitCache(tmp_path / folder / source).read(ids) for folder in (case, "whole"))
            for ours, theirs in zip(rows_of(read), rows_of(expected), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
