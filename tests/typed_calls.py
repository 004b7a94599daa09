"""Calls that docstrings and README show, for mypy: `make lint` checks them against the types that the package ships."""

from functools import partial

from torch import nn
from transformers import PreTrainedModel

from lit_logits import CausalLM, DynamicFusionDecoder, GLDFusionModule, VQLogitsLM
from lit_logits.contracts import (
    DescribesItself,
    ExportsPretrained,
    HasCacheSettings,
    HasClassNames,
    HasFingerprint,
    HasFinishedRows,
    HasFinishedSamples,
    HasLayoutIds,
    HasPredictionSettings,
    HasTokenizer,
)
from lit_logits.datamodules import (
    ImageDataModule,
    ImageSource,
    InstructionDataModule,
    PairSource,
    SourceTokenizer,
    TextDataModule,
    TextSource,
)
from lit_logits.modules import DenseLogitsHead, ResidualVQLogitsHead, VQLogitsHead


class OwnHead(nn.Module):
    """A head of a user's."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int = 3) -> None:
        super().__init__()


def make(model: PreTrainedModel) -> None:
    """Never run."""
    VQLogitsLM(model, head=partial(VQLogitsHead, codebook_size=8))
    VQLogitsLM("folder", head=DenseLogitsHead)
    VQLogitsLM({"model_type": "llama"}, 5, head=partial(ResidualVQLogitsHead, codebook_size=8, num_groups=2))
    VQLogitsLM(model, head=OwnHead)
    VQLogitsLM(model, head=lambda hidden_size, vocab_size: OwnHead(hidden_size, vocab_size))
    CausalLM(model)
    others = {"big": "my/big-model"}
    InstructionDataModule(["a.jsonl"], source_tokenizers=others)
    InstructionDataModule(
        PairSource("gsm8k", "main"), source_tokenizers={"big": SourceTokenizer("x", "chat"), "b": "x"}
    )
    TextDataModule(TextSource(["a.txt", "b.txt"], text_column="body"))
    ImageDataModule(ImageSource("my/folder", label_column="fine"))
    GLDFusionModule(model, {"big": model})
    GLDFusionModule("pivot", {"big": "source", "cached": "folder"})
    DynamicFusionDecoder(model, model, [model, "expert"])


def serve(
    tokens: HasTokenizer,
    data: HasFingerprint,
    rows: HasFinishedRows,
    samples: HasFinishedSamples,
    layouts: HasLayoutIds,
    classes: HasClassNames,
) -> None:
    """Stands for the callbacks, which read these contracts from data modules."""


def watch(decoder: HasPredictionSettings, fusion: HasCacheSettings, compressed: ExportsPretrained) -> None:
    """Stands for the callbacks, which read these contracts from LightningModules."""


def fulfil(text: TextDataModule, pairs: InstructionDataModule, images: ImageDataModule) -> None:
    """Never run."""
    serve(text, pairs, pairs, pairs, pairs, images)
    serve(pairs, pairs, pairs, pairs, pairs, images)


def fulfil_too(decoder: DynamicFusionDecoder, fusion: GLDFusionModule, compressed: VQLogitsLM) -> None:
    """Never run."""
    watch(decoder, fusion, compressed)
    described: list[DescribesItself] = [fusion, compressed]
    assert described
