"""What data modules, LightningModules and models may offer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "ContinuesPrompts",
    "DescribesItself",
    "ExportsPretrained",
    "GivesHiddenStates",
    "HasCacheSettings",
    "HasCacheTokens",
    "HasClassNames",
    "HasFingerprint",
    "HasFinishedRows",
    "HasFinishedSamples",
    "HasFixedViews",
    "HasLayoutIds",
    "HasMaxLength",
    "HasPredictionSettings",
    "HasSampleIds",
    "HasSampleTexts",
    "HasTokenizer",
    "WritesFolder",
]


class HasTokenizer(Protocol):
    """A data module, or a LightningModule, that knows the tokenizer of its tokens."""

    @property
    def tokenizer(self) -> Any:
        """Return a tokenizer of transformers, or None."""
        ...


class HasFingerprint(Protocol):
    """A data module that can tell its data from others."""

    @property
    def fingerprint(self) -> str:
        """Return a digest that changes with the rows, or the order of the rows, that `predict` gives."""
        ...


class HasFixedViews(Protocol):
    """A data module whose training samples come in the same views (augmentations) again.

    Its training batches have `sample_ids` (B,), a number from 0 on for each view of each sample.
    """

    @property
    def views_fingerprint(self) -> str | None:
        """Return a digest that changes with what `sample_ids` stand for; None if views are new in each epoch."""
        ...


class HasClassNames(Protocol):
    """A data module of a classification task."""

    @property
    def class_names(self) -> Sequence[str]:
        """Return the name of each class, in the order of the labels."""
        ...


class HasFinishedRows(Protocol):
    """A data module whose `predict_dataloader` can leave out rows that an earlier run has predicted."""

    @property
    def finished_rows(self) -> set[int]:
        """Return the set to fill with the numbers of those rows, before `predict_dataloader` is called."""
        ...


class HasFinishedSamples(Protocol):
    """A data module whose `predict_dataloader` can leave out samples that an earlier run has predicted."""

    @property
    def finished_samples(self) -> set[int]:
        """Return the set to fill with the `sample_ids` of those samples, before `predict_dataloader` is called."""
        ...


class HasSampleIds(Protocol):
    """A data module that numbers samples by their content: the same sample has the same id in all data."""

    def sample_ids(self, stage: str) -> Sequence[int]:
        """Return the ids of the samples of `train`, `val`, `test` or `predict`, after `setup`."""
        ...


class HasSampleTexts(Protocol):
    """A data module of prompts and responses."""

    def sample_texts(self) -> Iterable[tuple[int, str, str]]:
        """Return id, prompt and response of each sample of all splits."""
        ...


class HasLayoutIds(Protocol):
    """A data module that gives the same text in several tokenizers."""

    @property
    def layout_ids(self) -> Mapping[str, int]:
        """Return the `layout_id` of the batch's own tokens under "", and that of each further source by its name."""
        ...


class HasMaxLength(Protocol):
    """A data module that cuts its samples."""

    @property
    def max_length(self) -> int:
        """Return how many tokens a sample may have."""
        ...


class HasPredictionSettings(Protocol):
    """A LightningModule that tells which of its settings decide what `predict_step` returns."""

    @property
    def prediction_settings(self) -> Mapping[str, Any]:
        """Return the settings by name."""
        ...


class HasCacheSettings(Protocol):
    """A LightningModule whose `predict_step` returns top-k logits for a `LogitCacheWriter`."""

    @property
    def cache_settings(self) -> Mapping[str, Mapping[str, Any]] | Callable[[], Mapping[str, Mapping[str, Any]]]:
        """Return the settings of each source by its name, or a function that does."""
        ...


class HasCacheTokens(Protocol):
    """A LightningModule that knows what the token ids of its `predict_step` mean."""

    @property
    def cache_tokens(self) -> Mapping[str, Sequence[bytes | None] | None]:
        """Return for each source by its name the bytes of each token, None for one that stands for no text."""
        ...


class DescribesItself(Protocol):
    """A LightningModule that tells, for the card of its model, what it does to it."""

    @property
    def card_text(self) -> str:
        """Return sentences: the method, what it started from or learned from, and sizes."""
        ...


@runtime_checkable
class ExportsPretrained(Protocol):
    """A LightningModule that makes a model of transformers of itself."""

    def to_pretrained(self, head: Any) -> Any:
        """Return the model, with the form of head that is asked for."""
        ...


@runtime_checkable
class WritesFolder(Protocol):
    """A LightningModule that writes a model that is not of transformers."""

    def write_folder(
        self,
        folder: Path,
        *,
        class_names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Make the folder, with a config.json."""
        ...


@runtime_checkable
class GivesHiddenStates(Protocol):
    """A LightningModule that gives what its head reads."""

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return hidden states (B, T, d) of token ids (B, T)."""
        ...


@runtime_checkable
class ContinuesPrompts(Protocol):
    """A LightningModule that generates by itself."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Return prompts (B, T), each with at most `max_new_tokens` likeliest tokens behind it."""
        ...
