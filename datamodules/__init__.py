"""Data modules: they know nothing of the methods and meet the models only in the batch dict."""

from lit_logits.datamodules.images.datamodule import ImageDataModule
from lit_logits.datamodules.images.sources import ImageSource
from lit_logits.datamodules.instructions.datamodule import InstructionDataModule
from lit_logits.datamodules.instructions.sources import PairSource
from lit_logits.datamodules.instructions.views import SourceTokenizer
from lit_logits.datamodules.text.corpus import TextSource
from lit_logits.datamodules.text.datamodule import TextDataModule

__all__ = [
    "ImageDataModule",
    "ImageSource",
    "InstructionDataModule",
    "PairSource",
    "SourceTokenizer",
    "TextDataModule",
    "TextSource",
]
