"""Data modules: they know nothing of the methods and meet the models only in the batch dict."""

from typing import TYPE_CHECKING

from lit_logits.lazy import lazy_names

if TYPE_CHECKING:
    from lit_logits.datamodules.images.datamodule import ImageDataModule
    from lit_logits.datamodules.images.sources import ImageSource
    from lit_logits.datamodules.instructions.datamodule import InstructionDataModule
    from lit_logits.datamodules.instructions.sources import PairSource
    from lit_logits.datamodules.instructions.views import SourceTokenizer
    from lit_logits.datamodules.sequences.datamodule import SequenceDataModule
    from lit_logits.datamodules.sequences.sources import SequenceSource
    from lit_logits.datamodules.text.corpus import TextSource
    from lit_logits.datamodules.text.datamodule import TextDataModule
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "lit_logits.datamodules.images.datamodule": "ImageDataModule",
            "lit_logits.datamodules.images.sources": "ImageSource",
            "lit_logits.datamodules.instructions.datamodule": "InstructionDataModule",
            "lit_logits.datamodules.instructions.sources": "PairSource",
            "lit_logits.datamodules.instructions.views": "SourceTokenizer",
            "lit_logits.datamodules.sequences.datamodule": "SequenceDataModule",
            "lit_logits.datamodules.sequences.sources": "SequenceSource",
            "lit_logits.datamodules.text.corpus": "TextSource",
            "lit_logits.datamodules.text.datamodule": "TextDataModule",
        },
    )

__all__ = [
    "ImageDataModule",
    "ImageSource",
    "InstructionDataModule",
    "PairSource",
    "SequenceDataModule",
    "SequenceSource",
    "SourceTokenizer",
    "TextDataModule",
    "TextSource",
]
