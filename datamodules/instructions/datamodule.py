"""Prompts and responses for causal language models: to fine-tune on, to score, and to generate from.

Letters: B is `batch_size`, T the longest sequence of a batch, C the number of choices. A batch is transformers' dict
`input_ids`, `attention_mask` and `labels` (the same ids, unshifted; −100 on prompts and padding), LongTensors of shape
(B, T) that are padded on the right, and `rows` (B,), the numbers of the examples in their split.

What a teacher with another tokenizer, or a cache of its logits, needs to find its place is there, too:

* `sample_ids` (B,), 63 bits of a digest of the example's texts and those of its shots: the same in every split, order,
  tokenizer and template;
* `response_ends` (B, T), how many characters of the response have been read after each token: 0 at the prompt's last
  one, −1 before it, on padding, where a token ends within a character, and where it reaches beyond the response or
  comes after it. It never falls where it is not −1, and equal numbers in two tokenizers are the same place in the
  text. White space that a template strips at the response's beginning counts as read, and at its end never is;
* `response_bytes` (B, T), the same in bytes of UTF-8. Tokens that end within a character have a number, too, if the
  tokenizer's tokens are bytes (byte-level BPE, byte fallback), and are the same place in two such tokenizers;
* `tokenizer_id`, a scalar of 63 bits: a digest of the vocabulary of `input_ids`;
* `layout_id`, another: a digest of all that makes ids of an example, tokenizer and template. Two of one layout have the
  same ids, as far as `max_length` lets both reach;
* with `source_tokenizers`, `sources`: name → `input_ids`, `attention_mask`, `labels`, `response_ends`,
  `response_bytes` (B, T'), `tokenizer_id` and `layout_id` of the same B examples in that tokenizer's tokens, padded to
  their own longest T';
* with a `teacher_column`, `teachers`, B names of models to learn from.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import tokenizers
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.caching import build_once, default_cache_dir, digest
from lit_logits.datamodules.checks import as_part, check_at_least
from lit_logits.datamodules.instructions.batches import FixedBatches, collate_examples, collate_fixed_batch
from lit_logits.datamodules.instructions.layouts import CHAT, check_template, split_template
from lit_logits.datamodules.instructions.sources import PairSource, PairSplits
from lit_logits.datamodules.instructions.splits import Example, draw_shots, sample_id, shots_before
from lit_logits.datamodules.instructions.storage import InstructionSize, sequence_lengths, write_instructions
from lit_logits.datamodules.instructions.views import (
    InstructionEncoder,
    InstructionView,
    SourceTokenizer,
    complete_sources,
    load_sources,
)
from lit_logits.datamodules.loaders import block_loader
from lit_logits.datamodules.prepared import open_splits
from lit_logits.datamodules.resuming import ResumePoint, Resumes
from lit_logits.datamodules.splitting import check_fractions
from lit_logits.datamodules.tokenization import load_or_train_tokenizer, train_bpe

__all__ = ["InstructionDataModule"]

FORMAT_VERSION = 5
"""Part of every cache entry's name: raise it when the same arguments are to give other token ids."""

PredictSplit = Literal["test", "all"]


class InstructionDataModule(Resumes, LightningDataModule):
    r"""Prompt–response pairs, encoded once and cached on disk.

    Pairs are split into training, validation and test so that equal prompts never meet across splits, nor equal
    responses of more than five words. A response ends with the eos token, or with what the chat template puts after it.
    A response that is too long is cut at its end; a pair whose prompt leaves no room for any, in any of the tokenizers,
    is dropped, with a warning outside of the training split. Training resumes in the middle of an epoch with the next
    unseen batch.

    Batches are those of the module's description; with `source_tokenizers` they hold the same pairs in the tokens of
    other models, too, to distil from these.

    Of conversations (a source with a `messages_column`) the assistant's turns are learned, all of them: `labels` hold
    them with what the template ends them with. The bytes that are read are those of its turns, a line break between
    them.

    Multiple choice (a source with a `choices_column`): training, validation and predict see the right choice as the
    response. A test batch holds the C sequences of each of its B examples, `rows` once for each of them, and also
    `choices`, numbers of the choices, and `correct`, 1 for the right ones, but leaves `sources` out.

    The rows of the test split are what `predict` gives, in order, without those in `finished_rows`. With
    `predict_split="all"` it is the training, validation and test split, one after another, `rows` counted through, in
    batches of B consecutive examples that are the same in every run: those all of whose samples are in
    `finished_samples` are left out, and ranks are dealt whole batches.

    Args:
        source: where the pairs come from: a `PairSource` (in a recipe, a mapping `{path: ..., prompt_column: ...}`), or
            its `path` alone, such as `"python-questions"`, `"my/*.jsonl"` or the name of a data set.
        tokenizer: hub id, local folder or `.gguf` file; None trains a byte-level BPE on the training split.
        bpe_vocab_size: tokens of that BPE, at least 257.
        template: a text with `{prompt}` and, after it, `{response}`; or `"chat"`, the tokenizer's chat template: the
            prompt is the user's turn, the response the assistant's.
        system_prompt: a system turn before all others; in chat templates only.
        source_tokenizers: name of your choice → another tokenizer that batches are given in, too: a `SourceTokenizer`
            (in a recipe, a mapping `{tokenizer: ..., template: ...}`), or its hub id, local folder or `.gguf` file
            alone. What it leaves open is as for the data module's own tokenizer.
        num_shots: training pairs, drawn once for all, that are put before each prompt: as filled templates with an
            empty line after each, or as earlier turns. A pair is never its own shot.
        max_length: tokens that a sequence may have, at least 2, in each of the tokenizers.
        batch_size: B, examples a batch on each rank.
        val_fraction: share of the pairs held out for validation, in [0, 1). Unused where the data set has a validation
            split of its own; 0 switches validation off.
        test_fraction: the same for test and predict; 1 takes a whole held-out file, with `val_fraction=0`.
        max_train_rows: keep the first of the training split only; the other splits stay.
        max_test_rows: keep the first of the test split only.
        group_by_length: make training batches of examples of like lengths, which need less padding; see
            `lit_logits.datamodules.loaders.LengthSampler`.
        predict_split: what `predict` gives: the `"test"` split, or `"all"` of them.
        num_workers: processes that load batches.
        seed: of the split, the shots and the training order.
        cache_dir: folder of the cache; None is `$XDG_CACHE_HOME/lit_logits` or `~/.cache/lit_logits`.

    Attributes:
        finished_rows: rows of the test split that `predict` is to leave out, because they are done. Filled before the
            loader is made; unused with `predict_split="all"`.
        finished_samples: the same as sample ids, for `predict_split="all"` only.

    Raises:
        ValueError: If an argument is out of range or goes without one that it needs; from `vocab_size`, `tokenizer` or
            `prepare_data`, if the source cannot be read, a row is not as it should be, a tokenizer has no chat
            template or a template that changes responses, or all prompts of a split are too long.
    """

    def __init__(
        self,
        # With `Path`, jsonargparse does not read a file of that name as part of a recipe. It is last for the dumps.
        source: str | list[str] | PairSource | Path = "python-questions",
        tokenizer: str | None = None,
        bpe_vocab_size: int = 4096,
        template: str = "Question: {prompt}\nAnswer: {response}",
        system_prompt: str | None = None,
        source_tokenizers: Mapping[str, str | SourceTokenizer] | None = None,
        num_shots: int = 0,
        max_length: int = 512,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        max_train_rows: int | None = None,
        max_test_rows: int | None = None,
        group_by_length: bool = False,
        predict_split: PredictSplit = "test",
        num_workers: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_at_least(257, bpe_vocab_size=bpe_vocab_size)
        check_at_least(2, max_length=max_length)
        check_at_least(1, batch_size=batch_size, max_test_rows=1 if max_test_rows is None else max_test_rows)
        check_at_least(1, max_train_rows=1 if max_train_rows is None else max_train_rows)
        check_at_least(0, num_shots=num_shots, num_workers=num_workers)
        fractions = {"val": val_fraction, "test": test_fraction}
        check_fractions(fractions, may_be_all=True)
        pairs = as_part("source", source, PairSource)
        if predict_split not in get_args(PredictSplit):
            raise ValueError(f"Expected `predict_split` to be 'test' or 'all', but got {predict_split!r}.")
        check_template(template)
        self.source_tokenizers = complete_sources(source_tokenizers or {}, template, system_prompt)
        templates = [template, *(given.template for given in self.source_tokenizers.values())]
        _check_companions(pairs, tokenizer, templates, system_prompt, num_shots)
        limits = {"max_train_rows": max_train_rows, "max_test_rows": max_test_rows}
        self.pairs = PairSplits(pairs, fractions=fractions, **limits, seed=seed)
        self.tokenizer_name = tokenizer
        self.bpe_vocab_size = bpe_vocab_size
        self.template, self.system_prompt = template, system_prompt
        self.num_shots, self.max_length = num_shots, max_length
        self.batch_size, self.num_workers = batch_size, num_workers
        self.group_by_length, self.predict_split, self.seed = group_by_length, predict_split, seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.finished_rows: set[int] = set()
        self.finished_samples: set[int] = set()
        self._examples: dict[str, Dataset] = {}
        self._resume = ResumePoint("examples")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; the first use in any process trains the BPE."""
        return load_or_train_tokenizer(self.tokenizer_name, self.cache_dir, self._bpe_key, self._train_tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with added and special ones."""
        return len(self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up sequences: the tokenizer's, or else its eos token."""
        return self._own.pad_token_id

    @property
    def fingerprint(self) -> str:
        """Digest of all that shaped the rows of `predict`: what was written for another one is not theirs."""
        key = self._directory.name.rpartition("-")[2]
        return key if self.predict_split == "test" else digest(key, self.predict_split)

    @property
    def layout_ids(self) -> dict[str, int]:
        """The `layout_id` of batches, under "", and of each of `source_tokenizers`."""
        views = {"": self._own, **self._sources}
        return {name: view.vocabulary.layout_id for name, view in views.items()}

    def sample_ids(self, stage: str) -> list[int]:
        """Return the ids of the samples of `train`, `val`, `test` or `predict`, after `setup`.

        They are numbers of their content, the same in all data.
        """
        predicted = ("train", "val", "test") if self.predict_split == "all" else ("test",)
        names = predicted if stage == "predict" else (stage,)
        splits = [self._examples[name] for name in names if name in self._examples]
        return [number for rows in splits for number in rows.with_format("numpy")["sample_id"][:].tolist()]

    def sample_texts(self) -> Iterator[tuple[int, str, str]]:
        """Yield id, prompt and response of each sample of all splits, to serve them to a model elsewhere."""
        shots = self._draw_shots()
        for example in chain.from_iterable(self.pairs.splits.values()):
            number = sample_id(example, shots_before(example, shots), self.system_prompt)
            yield number, example.prompt, example.response

    def prepare_data(self) -> None:
        """Write the encoded pairs of all splits to the cache, if they are not there."""
        build_once(self._directory, self._write)
        self.pairs.forget()

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` wrote.

        Raises:
            RuntimeError: If it has not run.
        """
        self._examples = self._examples or open_splits(self._directory, InstructionSize)

    # Lightning's hooks read alike in all data modules; what they do is in `loaders`, `resuming` and `prepared`.

    def train_dataloader(self) -> Any:
        """Return the shuffled training batches, from the checkpoint's position on if one is restored."""
        if self.pairs.source.prompts_only:
            raise ValueError(
                "Expected a source with responses to train on, but got one of prompts only, which are for `predict`."
                " Set `response_column`."
            )
        return self._resume.apply(self._loader("train"), self.trainer)

    def val_dataloader(self) -> Any:
        """Return all validation batches in order; an empty list if validation is switched off."""
        return self._loader("val") if "val" in self._examples else []

    def test_dataloader(self) -> Any:
        """Return all test batches in order, with all choices; an empty list if the test split is switched off."""
        return self._loader("test") if "test" in self._examples else []

    def predict_dataloader(self) -> Any:
        """Return what is to be predicted, in order, with the right responses, without what is finished.

        It is the test examples that are not in `finished_rows`, or with `predict_split="all"` the batches of all splits
        without those whose samples are all in `finished_samples`. Where fewer are left than there are processes,
        finished ones make up the number.
        """
        # Lightning makes this loader again and wants to find `batch_size` among the keywords.
        if self.predict_split == "all":
            splits = [self._examples[name] for name in ("train", "val", "test") if name in self._examples]
            batches = FixedBatches(splits, self.batch_size, self.finished_samples, at_least=self._world_size)
            collate = partial(collate_fixed_batch, **self._vocabularies)
            return DataLoader(batches, batch_size=1, collate_fn=collate, **self._loading)
        if "test" not in self._examples:
            return []
        rows = self._examples["test"]
        numbers = rows.with_format("numpy")["row"][:].tolist()  # with gaps where examples were dropped
        left = [place for place, number in enumerate(numbers) if number not in self.finished_rows]
        if left:  # Lightning's sampler wants a row for each rank; what is done already fills up
            done = [place for place, number in enumerate(numbers) if number in self.finished_rows]
            left += done[: max(0, self._world_size - len(left))]
        collate = partial(collate_examples, **self._vocabularies)
        return DataLoader(rows.select(left), batch_size=self.batch_size, collate_fn=collate, **self._loading)

    @cached_property
    def _directory(self) -> Path:
        """The cache entry that holds the encoded pairs."""
        sources = sorted((name, view.key) for name, view in self._sources.items())
        views = self._own.key, sources, self.system_prompt, self.num_shots, self.max_length
        return self.cache_dir / f"instructions-{digest(FORMAT_VERSION, self.pairs.key, views)}"

    @cached_property
    def _own(self) -> InstructionView:
        """The tokenizer with its layout."""
        return InstructionView(self.tokenizer, self.template, system_prompt=self.system_prompt)

    @cached_property
    def _sources(self) -> dict[str, InstructionView]:
        """The other tokenizers with their layouts."""
        return load_sources(self.source_tokenizers)

    @property
    def _vocabularies(self) -> dict[str, Any]:
        """The arguments of a collate function that say what batches hold of the tokenizers."""
        sources = {name: view.vocabulary for name, view in self._sources.items()}
        return {"vocabulary": self._own.vocabulary, "sources": sources}

    def _bpe_key(self) -> str:
        return digest(FORMAT_VERSION, self.pairs.key, self.template, self.bpe_vocab_size, tokenizers.__version__)

    def _train_tokenizer(self, directory: Path) -> None:
        before, between, after = split_template(self.template)
        train = self.pairs.splits["train"]
        texts = (f"{before}{example.prompt}{between}{example.response}{after}" for example in train)
        train_bpe(texts, self.bpe_vocab_size, directory)

    def _write(self, directory: Path) -> None:
        encoder = InstructionEncoder(self._own, self._sources, self._draw_shots())
        write_instructions(directory, self.pairs.splits, encoder, self.max_length)

    def _draw_shots(self) -> list[Example]:
        return draw_shots(self.pairs.splits.get("train", []), self.num_shots, self.seed)

    def _loader(self, split: str) -> Any:
        all_choices = split == "test" and self.pairs.source.choices_column is not None
        examples = self._examples.get(split, [])
        groups = split == "train" and self.group_by_length
        return block_loader(
            examples,
            self.batch_size,
            self.trainer,
            self.seed,
            train=split == "train",
            collate_fn=partial(collate_examples, **self._vocabularies, all_choices=all_choices),
            lengths=sequence_lengths(examples) if groups else None,
            items="examples",
            advice="Lower `batch_size` or the fractions that are held out, or raise `max_length`.",
            **self._loading,
        )

    def _order(self) -> dict[str, Any]:
        order = {"data": self._directory.name, "batch_size": self.batch_size, "world_size": self._world_size}
        return {**order, "group_by_length": True} if self.group_by_length else order


def _check_companions(
    source: PairSource,
    tokenizer: str | None,
    templates: Sequence[str | None],
    system_prompt: str | None,
    num_shots: int,
) -> None:
    """Raise unless every argument has those that it needs; the first template is the data module's."""
    if templates[0] == CHAT and tokenizer is None:
        raise ValueError(
            "Expected `tokenizer` to name one with a chat template, but got None. Set `template` to a text with "
            "{prompt} and {response}."
        )
    if system_prompt is not None and CHAT not in templates:
        raise ValueError(
            f"Expected `system_prompt` to be None without a `template` of 'chat', but got {system_prompt!r}. Put it "
            "into `template`."
        )
    if source.messages_column is not None and (num_shots or any(template != CHAT for template in templates)):
        raise ValueError(
            "Expected `template: chat`, of the sources too, and `num_shots` to be 0 where a `messages_column` is set, "
            f"but got {list(templates)} and {num_shots}."
        )
    if source.prompts_only and (tokenizer is None or num_shots):
        raise ValueError(
            "Expected `tokenizer` to be set and `num_shots` to be 0 where `response_column` is None, because there is "
            f"no training split, but got {tokenizer!r} and {num_shots}."
        )
