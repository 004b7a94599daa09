"""Requests in 150 and 77 classes, as bags of hashed words and bigrams, with a model that is small beside its classes.

The files are those of CLINC150 (`clinc150.jsonl`: `split`, `text`, `label`) and Banking77 (`banking77-train.csv` and
`banking77-test.csv`: `text`, `category`).
"""

import csv
import json
import re
import zlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

BUCKETS = 4096
MAX_LENGTH = 64
Rows = list[tuple[str, str]]


class BagOfBigrams(nn.Module):
    """The mean of the vectors of a text's words and bigrams, and a linear layer, perhaps with one hidden layer.

    Args:
        num_classes: C.
        hidden_size: d of the vectors, and of the features.
        hidden_layer: add Linear · ReLU · Dropout between both.
    """

    def __init__(self, num_classes: int, hidden_size: int, *, hidden_layer: bool = False) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(BUCKETS, hidden_size, mode="mean", padding_idx=0)
        layer = [nn.Dropout(0.3), nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Dropout(0.3)]
        self.hidden = nn.Sequential(*(layer if hidden_layer else []))
        self.classifier = nn.Linear(hidden_size, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C) of bags (B, T), which 0 fills up."""
        logits: Tensor = self.classifier(self.hidden(self.embedding(features)))
        return logits


class IntentDataModule(L.LightningDataModule):
    """Batches `(bags, labels)` of one of the two sets.

    Args:
        source: `clinc150` or `banking77`.
        folder: where its files are.
        batch_size: rows a batch.
        seed: of the order, and of the tenth of Banking77's training rows that validates.
        max_train_rows: of each class, for the student's part; None takes all.
    """

    def __init__(
        self, source: str, folder: Path, *, batch_size: int = 64, seed: int = 0, max_train_rows: int | None = None
    ) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        train, validation, test = _clinc150(folder) if source == "clinc150" else _banking77(folder, seed)
        self.class_names = sorted({label for _, label in train})
        if max_train_rows is not None:
            train = _first_of_each_class(train, max_train_rows)
        self.train, self.validation, self.test = (self._encoded(rows) for rows in (train, validation, test))

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def _encoded(self, rows: Rows) -> TensorDataset:
        bags = [_bag(text) for text, _ in rows]
        padded = torch.tensor([bag + [0] * (MAX_LENGTH - len(bag)) for bag in bags])
        return TensorDataset(padded, torch.tensor([self.class_names.index(label) for _, label in rows]))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in a new order every epoch."""
        order = RandomSampler(self.train, generator=torch.Generator().manual_seed(self.seed))
        return self._loader(self.train, order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches in order."""
        return self._loader(self.validation, SequentialSampler(self.validation))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches in order."""
        return self._loader(self.test, SequentialSampler(self.test))

    def _loader(self, rows: TensorDataset, order: RandomSampler | SequentialSampler) -> DataLoader[Any]:
        batches = BatchSampler(order, self.batch_size, drop_last=False)
        return DataLoader[Any](rows, sampler=batches, batch_size=None)  # a batch is one look-up


def _clinc150(folder: Path) -> tuple[Rows, ...]:
    splits: dict[str, Rows] = {"train": [], "validation": [], "test": []}
    for line in (folder / "clinc150.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        splits["validation" if row["split"].startswith("val") else row["split"]].append((row["text"], row["label"]))
    return tuple(splits.values())


def _banking77(folder: Path, seed: int) -> tuple[Rows, ...]:
    def read(name: str) -> Rows:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            return [(row["text"], row["category"]) for row in csv.DictReader(file)]

    rows = read("banking77-train.csv")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = len(rows) // 10
    return [rows[i] for i in order[cut:]], [rows[i] for i in order[:cut]], read("banking77-test.csv")


def _first_of_each_class(rows: Rows, count: int) -> Rows:
    seen: dict[str, int] = {}
    kept = []
    for text, label in rows:
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= count:
            kept.append((text, label))
    return kept


def _bag(text: str) -> list[int]:
    words = re.findall(r"[a-z']+|\d", text.lower())
    features = words + [f"{one} {other}" for one, other in zip(["", *words], words, strict=False)]
    return [1 + zlib.crc32(feature.encode()) % (BUCKETS - 1) for feature in features[:MAX_LENGTH]]
