"""What the benchmarks that train VQ heads share: a small backbone, its training from the start, and its perplexity."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch

from lit_logits import VQLogitsLM
from lit_logits.callbacks import CodebookReinit
from lit_logits.datamodules import TextDataModule
from lit_logits.functional import unigram_bias
from lit_logits.modules.vq_logits.parts import HeadFactory

__all__ = ["BACKBONE", "LR", "fit", "make_model", "make_trainer", "revival", "test_ppl", "unigram_ppl"]

BACKBONE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LR = 2e-3


def make_model(
    head: HeadFactory,
    data: TextDataModule,
    *,
    steps: int,
    lr: float = LR,
    backbone: str | Mapping[str, Any] = BACKBONE,
    **options: Any,
) -> VQLogitsLM:
    """A model that is trained for so many steps, its rate up for three tenths of them and then down to 0."""
    return VQLogitsLM(
        backbone if isinstance(backbone, str) else dict(backbone),
        data.vocab_size,
        head=head,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1),
        **options,
    )


def make_trainer(**options: Any) -> L.Trainer:
    """A Trainer that prints and writes nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="auto", enable_model_summary=False, **quiet, **options)


def fit(
    model: VQLogitsLM, data: TextDataModule, steps: int, callbacks: Sequence[L.Callback] = (), **options: Any
) -> None:
    make_trainer(max_steps=steps, gradient_clip_val=1.0, callbacks=list(callbacks), **options).fit(model, data)


def revival(steps: int) -> CodebookReinit:
    """Dead codes are revived until three quarters of the training are over."""
    return CodebookReinit(every_n_steps=50, min_usage=0.01, stop_step=steps * 3 // 4)


def test_ppl(model: VQLogitsLM, data: TextDataModule, **options: Any) -> float:
    return make_trainer(**options).test(model, data, verbose=False)[0]["test/ppl"]


def unigram_ppl(data: TextDataModule) -> float:
    """Test perplexity of the training split's token frequencies, one half added to each count."""
    counts = torch.zeros(data.vocab_size)
    for batch in data.train_dataloader():
        counts += torch.bincount(batch["labels"].flatten(), minlength=data.vocab_size)
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in data.test_dataloader()])
    return float((-unigram_bias(counts)[labels].mean()).exp())
