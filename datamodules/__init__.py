"""Data modules: they know nothing of the methods and meet the models only in the batch dict."""

from lit_logits.datamodules.images import ImageDataModule
from lit_logits.datamodules.instructions import InstructionDataModule
from lit_logits.datamodules.text import TextDataModule

__all__ = ["ImageDataModule", "InstructionDataModule", "TextDataModule"]
