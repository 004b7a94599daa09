"""Prompts and responses for causal language models: to fine-tune on, to score, and to generate from.

Letters: B is `batch_size`, T the longest sequence of a batch, C the number of choices. A batch is transformers' dict
`input_ids`, `attention_mask` and `labels` (the same ids, unshifted; −100 on prompts and padding), LongTensors of shape
(B, T) that are padded on the right, and `rows` (B,), the numbers of the examples in their split.
"""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.caching import build_once, default_cache_dir, digest
from lit_logits.datamodules.checks import check_at_least
from lit_logits.datamodules.instruction_encoding import (
    ChatLayout,
    Encoder,
    Layout,
    TemplateLayout,
    chat_template_of,
    split_template,
)
from lit_logits.datamodules.instruction_sources import Columns, InstructionSource
from lit_logits.datamodules.instruction_splits import draw_shots
from lit_logits.datamodules.instruction_storage import (
    collate_examples,
    read_examples,
    read_instruction_sizes,
    write_instructions,
)
from lit_logits.datamodules.loaders import block_loader
from lit_logits.datamodules.resuming import ResumePoint
from lit_logits.datamodules.splitting import check_fractions
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe

__all__ = ["InstructionDataModule"]

FORMAT_VERSION = 1
"""Part of every cache entry's name: raise it when the same arguments are to give other token ids."""


class InstructionDataModule(LightningDataModule):
    r"""Prompt–response pairs, encoded once and cached on disk.

    Pairs are split into training, validation and test so that equal prompts never meet across splits, nor equal
    responses of more than five words. A response ends with the eos token, or with what the chat template puts after it.
    A response that is too long is cut at its end; a training pair whose prompt leaves no room for any is dropped.
    Training resumes in the middle of an epoch with the next unseen batch.

    Multiple choice (`choices_column`): training, validation and predict see the right choice as the response. A test
    batch holds the C sequences of each of its B examples, `rows` once for each of them, and also `choices`, numbers
    of the choices, and `correct`, 1 for the right ones.

    The rows of the test split are what `predict` gives, in order, without those in `finished_rows`.

    Args:
        source: `"python-questions"` (about 14,000 questions on the standard library, answered by its sources), files or
            globs of `.jsonl` or `.parquet`, or a Hugging Face data set or local folder for `datasets.load_dataset`.
        subset: configuration of a Hugging Face data set, such as `"main"`.
        prompt_column: name of the prompts.
        response_column: name of the responses; None reads prompts only, which are all in the test split.
        choices_column: name of the lists of choices; `response_column` is unused then.
        answer_column: name of the right choices, or of their numbers from 0.
        tokenizer: hub id, local folder or `.gguf` file; None trains a byte-level BPE on the training split.
        bpe_vocab_size: tokens of that BPE, at least 257.
        template: a text with `{prompt}` and, after it, `{response}`.
        chat_template: use the tokenizer's chat template instead: the prompt is the user's turn, the response the
            assistant's.
        system_prompt: with `chat_template`, a system turn before all others.
        num_shots: training pairs, drawn once for all, that are put before each prompt: as filled templates with an
            empty line after each, or as earlier turns. A pair is never its own shot.
        max_length: tokens that a sequence may have, at least 2.
        batch_size: B, examples a batch on each rank.
        val_fraction: share of the pairs held out for validation, in [0, 1). Unused where the data set has a validation
            split of its own; 0 switches validation off.
        test_fraction: the same for test and predict.
        max_test_rows: keep the first of the test split only.
        num_workers: processes that load batches.
        seed: of the split, the shots and the training order.
        cache_dir: folder of the cache; None is `$XDG_CACHE_HOME/lit_logits` or `~/.cache/lit_logits`.

    Attributes:
        finished_rows: rows of the test split that `predict` is to leave out, because they are done. Filled before the
            loader is made.

    Raises:
        ValueError: If an argument is out of range or goes without one that it needs; from `vocab_size`, `tokenizer` or
            `prepare_data`, if the source cannot be read, a row is not as it should be, the tokenizer has no chat
            template, or a prompt for evaluation is too long.
    """

    def __init__(
        self,
        source: str | list[str] = "python-questions",
        subset: str | None = None,
        prompt_column: str = "prompt",
        response_column: str | None = "response",
        choices_column: str | None = None,
        answer_column: str | None = None,
        tokenizer: str | None = None,
        bpe_vocab_size: int = 4096,
        template: str = "Question: {prompt}\nAnswer: {response}",
        chat_template: bool = False,
        system_prompt: str | None = None,
        num_shots: int = 0,
        max_length: int = 512,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        max_test_rows: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_at_least(257, bpe_vocab_size=bpe_vocab_size)
        check_at_least(2, max_length=max_length)
        check_at_least(1, batch_size=batch_size, max_test_rows=1 if max_test_rows is None else max_test_rows)
        check_at_least(0, num_shots=num_shots, num_workers=num_workers)
        fractions = {"val": val_fraction, "test": test_fraction}
        check_fractions(fractions)
        split_template(template)
        columns = Columns(prompt_column, response_column, choices_column, answer_column)
        _check_companions(columns, tokenizer, chat_template, system_prompt, num_shots)
        self.pairs = InstructionSource(
            source, subset, columns, fractions=fractions, max_test_rows=max_test_rows, seed=seed
        )
        self.tokenizer_name = tokenizer
        self.bpe_vocab_size = bpe_vocab_size
        self.template, self.chat_template, self.system_prompt = template, chat_template, system_prompt
        self.num_shots, self.max_length = num_shots, max_length
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed = seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.finished_rows: set[int] = set()
        self._examples: dict[str, Dataset] = {}
        self._resume = ResumePoint("examples")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; the first use in any process trains it if there is none to load."""
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        key = digest(FORMAT_VERSION, self.pairs.key, self.template, self.bpe_vocab_size, tokenizers.__version__)
        return load_tokenizer(build_once(self.cache_dir / f"tokenizer-{key}", self._train_tokenizer))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with added and special ones."""
        return len(self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up sequences: the tokenizer's, or else its eos token."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @property
    def fingerprint(self) -> str:
        """Digest of all that shaped the encoded test rows: what was written for another one is not theirs."""
        return self._directory.name.rpartition("-")[2]

    def prepare_data(self) -> None:
        """Write the encoded pairs of all splits to the cache, if they are not there."""
        build_once(self._directory, self._write)
        self.pairs.forget()

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` wrote.

        Raises:
            RuntimeError: If there is nothing.
        """
        if self._examples:
            return
        if not self._directory.is_dir():
            raise RuntimeError(f"Expected `prepare_data` to have written {self._directory}, but it is not there.")
        sizes = read_instruction_sizes(self._directory)
        self._examples = {name: read_examples(self._directory / f"{name}.arrow") for name in sizes}
        rank_zero_info("; ".join(f"{name}: {size}" for name, size in sizes.items()))

    def train_dataloader(self) -> Any:
        """Return the shuffled training batches, from the checkpoint's position on if one is restored."""
        return self._resume.apply(self._loader("train"), self.trainer)

    def val_dataloader(self) -> Any:
        """Return all validation batches in order; an empty list if validation is switched off."""
        return self._loader("val") if "val" in self._examples else []

    def test_dataloader(self) -> Any:
        """Return all test batches in order, with all choices; an empty list if the test split is switched off."""
        return self._loader("test") if "test" in self._examples else []

    def predict_dataloader(self) -> Any:
        """Return the test examples that are not in `finished_rows`, in order, with the right responses.

        Where fewer are left than there are processes, finished ones make up the number.
        """
        if "test" not in self._examples:
            return []
        rows = self._examples["test"]
        left = [row for row in range(len(rows)) if row not in self.finished_rows]
        if left:  # Lightning's sampler wants a row for each rank; what is done already fills up
            left += sorted(self.finished_rows)[: max(0, (self.trainer.world_size if self.trainer else 1) - len(left))]
        collate = partial(collate_examples, pad_token_id=self.pad_token_id)
        # Lightning makes this loader anew and wants to find `batch_size` among the keywords.
        return DataLoader(rows.select(left), batch_size=self.batch_size, collate_fn=collate, **self._loading)

    def state_dict(self) -> dict[str, Any]:
        """Return the training loader's position and what gives it a meaning."""
        return self._resume.state_dict(self.trainer, self._order())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved position for the training loader."""
        self._resume.load_state_dict(state_dict, self.trainer, self._order())

    @cached_property
    def _directory(self) -> Path:
        """The cache entry that holds the encoded pairs."""
        tokenizer = self.tokenizer.backend_tokenizer.to_str(), sorted(self.tokenizer.special_tokens_map.items())
        chat = (chat_template_of(self.tokenizer), self.system_prompt) if self.chat_template else None
        layout = chat or self.template, self.num_shots, self.max_length
        return self.cache_dir / f"instructions-{digest(FORMAT_VERSION, self.pairs.key, tokenizer, layout)}"

    @property
    def _loading(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}

    def _train_tokenizer(self, directory: Path) -> None:
        before, between, after = split_template(self.template)
        train = self.pairs.splits["train"]
        texts = (f"{before}{example.prompt}{between}{example.response}{after}" for example in train)
        train_bpe(texts, self.bpe_vocab_size, directory)

    def _write(self, directory: Path) -> None:
        layout: Layout = TemplateLayout(self.template, self.tokenizer)
        if self.chat_template:
            layout = ChatLayout(self.tokenizer, self.system_prompt)
        shots = draw_shots(self.pairs.splits.get("train", []), self.num_shots, self.seed)
        encoder = Encoder(layout, self.tokenizer, shots)
        write_instructions(directory, self.pairs.splits, encoder, self.max_length)

    def _loader(self, split: str) -> Any:
        all_choices = split == "test" and self.pairs.columns.choices is not None
        return block_loader(
            self._examples.get(split, []),
            self.batch_size,
            self.trainer,
            self.seed,
            train=split == "train",
            collate_fn=partial(collate_examples, pad_token_id=self.pad_token_id, all_choices=all_choices),
            items="examples",
            advice="Lower `batch_size` or the fractions that are held out, or raise `max_length`.",
            **self._loading,
        )

    def _order(self) -> dict[str, Any]:
        """Return what, besides the position, decides which batch comes next."""
        world_size = self.trainer.world_size if self.trainer else 1
        return {"data": self._directory.name, "batch_size": self.batch_size, "world_size": world_size}


def _check_companions(
    columns: Columns, tokenizer: str | None, chat_template: bool, system_prompt: str | None, num_shots: int
) -> None:
    """Raise unless every argument has those that it needs."""
    if chat_template and tokenizer is None:
        raise ValueError(
            "Expected `tokenizer` to name one with a chat template, but got None. Set `chat_template=False` to use "
            "`template`."
        )
    if system_prompt is not None and not chat_template:
        raise ValueError(
            f"Expected `system_prompt` to be None without `chat_template`, but got {system_prompt!r}. Put it into "
            "`template`."
        )
    if columns.prompts_only and (tokenizer is None or num_shots):
        raise ValueError(
            "Expected `tokenizer` to be set and `num_shots` to be 0 where `response_column` is None, because there is "
            f"no training split, but got {tokenizer!r} and {num_shots}."
        )
