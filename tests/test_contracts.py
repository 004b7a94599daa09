"""The contracts between callbacks and what they serve: ours fulfil them, and so does a user's smallest data module."""

import json
from functools import cached_property
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_logits import DualHeadKD, DynamicFusionDecoder, GLDFusionModule, VQLogitsLM, contracts
from lit_logits.callbacks import JsonLinesWriter
from lit_logits.callbacks.parts import data_tokenizer
from lit_logits.contracts import lacks, offers
from lit_logits.datamodules import ImageDataModule, InstructionDataModule, TextDataModule

CONTRACTS = [name for name in contracts.__all__ if name.startswith(("Has", "Exports", "Writes"))]


@pytest.mark.parametrize(
    ("kind", "offered"),
    [
        (TextDataModule, {"HasTokenizer"}),
        (ImageDataModule, {"HasClassNames", "HasFixedViews"}),
        (GLDFusionModule, {"HasCacheSettings", "HasCacheTokens"}),
        (DynamicFusionDecoder, {"HasPredictionSettings"}),  # a tokenizer is an attribute that `__init__` sets
        (VQLogitsLM, {"ExportsPretrained"}),
        (DualHeadKD, {"WritesFolder"}),
    ],
)
def test_ours_offer_what_they_are_asked_for(kind, offered):
    assert {name for name in CONTRACTS if offers(kind, getattr(contracts, name))} == offered


def test_instructions_offer_what_both_writers_ask_for():
    data = InstructionDataModule("rows.jsonl")
    names = {name for name in CONTRACTS if offers(data, getattr(contracts, name))}
    own = {"HasTokenizer", "HasFingerprint", "HasLayoutIds", "HasMaxLength", "HasSampleIds", "HasSampleTexts"}
    assert names == {*own, "HasFinishedRows", "HasFinishedSamples"}


class Costly(L.LightningDataModule):
    """Counts how often its tokenizer is made."""

    def __init__(self):
        super().__init__()
        self.made = 0

    @cached_property
    def tokenizer(self):
        self.made += 1
        return "words"

    @property
    def class_names(self):
        raise RuntimeError("the data set is read here")


def made(data: Any) -> int:
    return data.made


def test_asking_runs_no_property():
    data: Any = Costly()
    assert offers(data, contracts.HasTokenizer)
    assert offers(data, contracts.HasClassNames)
    assert not offers(data, contracts.HasFingerprint)
    assert made(data) == 0
    trainer: Any = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.datamodule = data
    assert data_tokenizer(trainer) == "words"
    assert made(data) == 1


def test_a_part_that_passes_attributes_on_offers_them():
    class Around:
        def __getattr__(self, name):
            return getattr(Costly(), name)

    assert offers(Around(), contracts.HasTokenizer)
    assert not offers(Around(), contracts.HasFingerprint)


def test_a_contract_that_extends_another_asks_for_both():
    class Named(contracts.HasTokenizer, contracts.HasClassNames):
        pass

    assert offers(Costly(), Named)
    assert lacks(None, Named, "for the test") == (
        "Expected a data module to have `class_names` and `tokenizer`, for the test, but got none."
    )


class Answers(L.LightningModule):
    def predict_step(self, batch, batch_idx):
        return [{"row": row} for row in batch.tolist()]


class Smallest(L.LightningDataModule):
    """A user's, with no base of ours."""

    def predict_dataloader(self):
        return DataLoader(torch.arange(4), batch_size=2)


class Resumable(Smallest):
    def __init__(self):
        super().__init__()
        self.finished_rows = set()

    def predict_dataloader(self):
        return DataLoader([row for row in range(4) if row not in self.finished_rows], batch_size=2)


def predict(folder, data):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[JsonLinesWriter(str(folder))],
    )
    trainer.predict(Answers(), datamodule=data, return_predictions=False)
    return [json.loads(line)["row"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_the_smallest_data_module_is_served_and_told_what_it_could_offer(tmp_path):
    assert predict(tmp_path, Smallest()) == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match="Expected Smallest to have `finished_rows`, a set of the rows to leave out"):
        assert predict(tmp_path, Smallest()) == [0, 1, 2, 3]


def test_one_more_attribute_makes_it_resumable(tmp_path):
    predict(tmp_path, Smallest())
    data = Resumable()
    assert predict(tmp_path, data) == [0, 1, 2, 3]
    assert data.finished_rows == {0, 1, 2, 3}
