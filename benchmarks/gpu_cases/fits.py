"""A tiny fit of each method under the Trainer, in three precisions and compiled, beside float32.

Only the inner `nn.Module` is compiled, in place, never the LightningModule.
"""

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.gpu_cases.runner import Case, Group, Round

__all__ = ["METHODS", "group"]

STEPS = 8
WAYS = {
    "32-true": False,
    "bf16-mixed": False,
    "16-mixed": False,
    "32-true, compiled": True,
    "bf16-mixed, compiled": True,
}
_of_float32: dict[str, list[float]] = {}  # what the first way of a method came to


class Sizes(NamedTuple):
    """Of the language models and of their batches."""

    hidden: int
    vocab: int
    length: int
    batch: int


SIZES = {True: Sizes(32, 64, 12, 2), False: Sizes(256, 4096, 128, 8)}


def _llama(sizes: Sizes, seed: int, hidden: int | None = None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    width = hidden or sizes.hidden
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * sizes.length + 64,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _rows(sizes: Sizes, count: int) -> list[dict[str, Tensor]]:
    """Texts with something to learn: the next id is three further, but for a tenth of the places."""
    g = torch.Generator().manual_seed(0)
    starts = torch.randint(3, sizes.vocab, (count, 1), generator=g)
    ids = 3 + (starts + 3 * torch.arange(sizes.length)) % (sizes.vocab - 3)
    noise = torch.rand(ids.shape, generator=g) < 0.1
    ids = torch.where(noise, torch.randint(3, sizes.vocab, ids.shape, generator=g), ids)
    ends = torch.arange(sizes.length).cumsum(0)  # characters read; only GLD asks
    ends[0], ends[-1] = 0, -1
    rows = []
    for row in ids:
        labels = row.clone()
        labels[0] = -100
        rows.append({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels, "response_ends": ends})
    return rows


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _trainer(device: torch.device, precision: Any, folder: str, **settings: Any) -> Any:
    import lightning as L

    for name in ("lightning.pytorch", "lightning.fabric"):  # after the import, which sets the level
        logging.getLogger(name).setLevel(logging.ERROR)
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **settings,
    )


def _fit(module: Any, data: list[Any], batch: int, device: torch.device, precision: Any) -> list[float]:
    """The loss of every step."""
    import lightning as L

    class Losses(L.Callback):
        seen: list[float]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.seen.append(float(outputs["loss"]))

    losses = Losses()
    losses.seen = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(device, precision, folder, max_steps=STEPS, max_epochs=-1, callbacks=[losses])
        trainer.fit(module, DataLoader(cast(Any, data), batch_size=batch))
    return losses.seen


def _vq_logits(device: torch.device, precision: Any, ready: Any, sizes: Sizes) -> list[float]:
    from lit_logits import VQLogitsLM
    from lit_logits.modules import VQLogitsHead

    head = functools.partial(VQLogitsHead, codebook_size=sizes.vocab // 4)
    module = VQLogitsLM(_llama(sizes, 0), head=head, calibration_batches=1, optimizer=_optimizer)
    ready(module.backbone)
    return _fit(module, _rows(sizes, sizes.batch * STEPS), sizes.batch, device, precision)


def _two_levels(device: torch.device, precision: Any, ready: Any, sizes: Sizes) -> list[float]:
    from lit_logits import VQLogitsLM
    from lit_logits.modules import HierarchicalVQLogitsHead

    codes = max(8, int(sizes.vocab**0.5))
    head = functools.partial(HierarchicalVQLogitsHead, codebook_sizes=(codes, 2 * codes))
    module = VQLogitsLM(_llama(sizes, 0), head=head, calibration_batches=1, optimizer=_optimizer)
    ready(module.backbone)
    return _fit(module, _rows(sizes, sizes.batch * STEPS), sizes.batch, device, precision)


def _dual_head_kd(device: torch.device, precision: Any, ready: Any, sizes: Sizes) -> list[float]:
    from lit_logits import DualHeadKD
    from lit_logits.modules import load_classifier

    torch.manual_seed(0)
    student, teacher = ("resnet8", "resnet20") if sizes.batch < 8 else ("resnet8x4", "resnet32x4")
    frozen = load_classifier(teacher, 10)
    module = DualHeadKD(student, frozen, num_classes=10, grad_align="backbone", optimizer=_optimizer)
    ready(module.net)
    g, count = torch.Generator().manual_seed(0), 4 * sizes.batch
    images = torch.randn(count * STEPS, 3, 32, 32, generator=g)
    labels = torch.randint(10, (len(images),), generator=g)
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    return _fit(module, data, count, device, precision)


def _gld_fusion(device: torch.device, precision: Any, ready: Any, sizes: Sizes) -> list[float]:
    from lit_logits import GLDFusionModule

    module = GLDFusionModule(
        _llama(sizes, 0), {"source": _llama(sizes, 1, 2 * sizes.hidden)}, gld_weight=0.1, optimizer=_optimizer
    )
    ready(cast(Any, module.pivot).base_model)  # what the loss calls; the output layer is applied apart
    return _fit(module, _rows(sizes, sizes.batch * STEPS), sizes.batch, device, precision)


def _dynamic_fusion(device: torch.device, precision: Any, ready: Any, sizes: Sizes) -> list[float]:
    """Perplexity of texts and of what greedy decoding continues: the method trains nothing."""
    from lit_logits import DynamicFusionDecoder

    base = _llama(sizes, 1)
    expert = _llama(sizes, 1)
    with torch.no_grad():
        for seed, parameter in enumerate(expert.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    module = DynamicFusionDecoder(_llama(sizes, 0, 2 * sizes.hidden), base, [expert], eos_token_id=2)
    ready(module.fused.large)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(device, precision, folder)
        data = DataLoader(cast(Any, _rows(sizes, 2 * sizes.batch)), batch_size=sizes.batch)
        (logged,) = trainer.test(module, data, verbose=False)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    prompts = torch.stack([row["input_ids"][:4] for row in _rows(sizes, sizes.batch)]).to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        texts = module.to(device).generate(prompts, max_new_tokens=8, do_sample=False, pad_token_id=0)
        scores = module.score(texts, texts)
    return [float(logged["test/loss"]), float(-scores.log_probs[scores.trace.mask].mean())]


METHODS: dict[str, Callable[..., list[float]]] = {
    "VQLogitsLM, VQLogitsHead": _vq_logits,
    "VQLogitsLM, two levels": _two_levels,
    "DualHeadKD, aligned": _dual_head_kd,
    "DynamicFusionDecoder, score and generate": _dynamic_fusion,
    "GLDFusionModule": _gld_fusion,
}


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _run(method: str, way: str, small: bool, device: torch.device) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    compiled, precision = WAYS[way], way.removesuffix(", compiled")

    def ready(inner: nn.Module) -> None:
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            inner.compile(backend="inductor" if device.type == "cuda" else "aot_eager")

    with _seeded():
        losses = METHODS[method](device, precision, ready, SIZES[small])
    if not losses:
        raise RuntimeError("no step was made")
    num_graphs = int(counters["stats"]["unique_graphs"]) if compiled else 0
    if compiled and not num_graphs:
        raise RuntimeError("the step called nothing that was compiled")
    if way == "32-true":
        _of_float32[method] = losses
    result: dict[str, Any] = {"first loss": losses[0], "last loss": losses[-1]}
    if compiled:
        result["graphs"] = num_graphs
    if method in _of_float32:
        result["last loss, float32"] = _of_float32[method][-1]
        result["difference"] = losses[-1] - _of_float32[method][-1]
    return result


def _prepare(method: str, way: str, small: bool, device: torch.device) -> Callable[[], dict[str, Any]]:
    return functools.partial(_run, method, way, small, device)


def group(small: bool) -> Group:
    """The group of fits; compiled ones come last, as they take longest."""
    rounds = []
    for label, ways in (
        ("eager", [way for way in WAYS if not WAYS[way]]),
        ("compiled", [way for way in WAYS if WAYS[way]]),
    ):
        cases = [
            Case(
                f"{method}, {way}",
                functools.partial(_prepare, method, way, small),
                seconds=12.0 if label == "compiled" else 4.0,
                timed=False,
            )
            for method in METHODS
            for way in ways
        ]
        rounds.append(Round(f"{label}, {STEPS} steps", cases))
    return Group("fits", "Tiny fits: the loss in each precision beside float32", 5, rounds, release=_of_float32.clear)
