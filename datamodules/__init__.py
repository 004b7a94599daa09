"""Data modules: they know nothing of the methods and meet the models only in the batch dict."""

from lit_logits.datamodules.images.datamodule import ImageDataModule
from lit_logits.datamodules.instructions.datamodule import InstructionDataModule
from lit_logits.datamodules.text.datamodule import TextDataModule

__all__ = ["ImageDataModule", "InstructionDataModule", "TextDataModule"]
