"""`VQLogitsLM` under the real Trainer: training, evaluation, resuming, generation, and two processes.

Letters: B batch, T sequence, V vocabulary.
"""

import copy
import inspect
import math
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_logits.callbacks import CodebookReinit
from lit_logits.modules import DenseLogitsHead, ResidualVQLogitsHead, VQLogitsHead
from lit_logits.modules.optimization import counted_steps
from lit_logits.modules.vq_logits.checks import check_steps
from lit_logits.vq_logits import VQLogitsLM

V, T = 61, 12
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ADAM = partial(torch.optim.Adam, lr=0.01)


def rows(count=16, seed=0, ragged=False):
    """Sequences of a noisy cycle, so that there is something to learn; ragged: padding and ignored labels."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(V, (count, 1), generator=g)
    ids = (starts + 3 * torch.arange(T)) % V
    noise = torch.rand(ids.shape, generator=g) < 0.1
    ids = torch.where(noise, torch.randint(V, ids.shape, generator=g), ids)
    data = []
    for row in ids:
        item = {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)}
        if ragged:
            length = int(torch.randint(3, T + 1, (), generator=g))
            item["attention_mask"][length:] = 0
            item["labels"][length:] = -100
            item["labels"][torch.rand(T, generator=g) < 0.2] = -100
        data.append(item)
    return data


def loader(count=16, batch_size=4, **kwargs):
    return DataLoader(rows(count, **kwargs), batch_size=batch_size)


HEAD_ARGUMENTS = inspect.signature(VQLogitsHead).parameters.keys()


def make_model(backbone=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {"optimizer": ADAM, "calibration_batches": 3, **kwargs}
    if "head" not in settings:
        own = {name: settings.pop(name) for name in HEAD_ARGUMENTS & settings.keys()}
        settings["head"] = partial(VQLogitsHead, **{"codebook_size": 8, "reassign_every_n_steps": 2, **own})
    plain = backbone is None
    return VQLogitsLM(CONFIG if plain else backbone, V if plain else None, **settings)


def make_trainer(tmp_path, **kwargs):
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**settings, **kwargs})


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.values.append(outputs["loss"].item())


# ---------------------------------------------------------------------- training

VARIANTS = [
    ("dense", {"head": DenseLogitsHead}),
    *(
        (f"{m} {u}", {"mapping": m, "codebook_update": u, "init": "frequency"})
        for m, u in product(("fixed", "learned", "reassigned"), ("gradient", "ema"))
    ),
    ("no bias", {"bias": False, "init": "frequency"}),
    ("cooccurrence", {"init": "cooccurrence"}),
    ("random", {"init": "random"}),
]


@pytest.mark.parametrize("kwargs", [kwargs for _, kwargs in VARIANTS], ids=[name for name, _ in VARIANTS])
def test_fit_moves_every_part_and_learns(kwargs, tmp_path):
    model, losses = make_model(**kwargs), Losses()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, max_epochs=12, callbacks=[losses])
    trainer.fit(model, loader(ragged=True), loader(8, seed=1, ragged=True))
    assert all(map(math.isfinite, losses.values))
    assert sum(losses.values[-4:]) < 0.8 * sum(losses.values[:4])
    metrics = trainer.callback_metrics
    assert {"train/loss", "val/loss", "val/ppl"} <= metrics.keys()
    assert ("train/loss_commitment" in metrics) == ("learned" in kwargs.values() or "ema" in kwargs.values())
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert not torch.equal(tensor, before[name]), name
    assert model.head_ready
    assert trainer.global_step == 48


def test_overfits_a_toy(tmp_path):
    """With as many codes as tokens a vector-quantised head is a dense one, and must learn as one."""
    for kwargs in ({"codebook_size": V}, {"head": DenseLogitsHead}):
        losses = Losses()
        model = make_model(optimizer=partial(torch.optim.Adam, lr=0.03), **kwargs)
        make_trainer(tmp_path, max_epochs=60, callbacks=[losses]).fit(model, loader(8, batch_size=8))
        assert losses.values[-1] < 0.3 < losses.values[0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.5},
        {"detect_anomaly": True},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
@pytest.mark.parametrize("mapping", ["fixed", "learned"])
def test_options_of_the_trainer(kwargs, mapping, tmp_path):
    model = make_model(mapping=mapping, codebook_size=20)
    trainer = make_trainer(tmp_path, max_epochs=2, **kwargs)
    trainer.fit(model, loader(ragged=True), loader(8))
    assert trainer.callback_metrics["val/ppl"].isfinite()
    assert trainer.global_step == (4 if "accumulate_grad_batches" in kwargs else 8)
    assert int(model.head.num_updates) == trainer.global_step


def test_accumulation_equals_one_large_batch(tmp_path):
    """Every batch holds as many targets, so a mean of means is the mean."""
    models = []
    for batch_size, accumulate in ((2, 4), (8, 1)):
        models.append(make_model(mapping="learned", optimizer=partial(torch.optim.SGD, lr=0.1), calibration_batches=99))
        trainer = make_trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=2)
        trainer.fit(models[-1], loader(batch_size=batch_size))
    a, b = (model.state_dict() for model in models)
    for name in a:
        if name != "head.token_counts":  # decay once a batch
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "workers",
    [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}],
    ids=["no worker", "worker", "persistent worker"],
)
def test_calibration_does_not_disturb_the_training_data(workers, tmp_path):
    """The first batches are read ahead for calibration; training must still see each batch once, in order."""

    class Seen(Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rows += batch["input_ids"].tolist()

    expected = [row["input_ids"].tolist() for row in rows()]
    seen = Seen()
    make_trainer(tmp_path, callbacks=[seen], max_epochs=2).fit(
        make_model(), DataLoader(rows(), batch_size=4, **workers)
    )
    assert seen.rows == 2 * expected


def test_schedulers(tmp_path):
    decay = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    trainer = make_trainer(tmp_path)
    trainer.fit(make_model(lr_scheduler=decay), loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**4)


def test_labels_outside_the_vocabulary_stop_the_first_batch(tmp_path):
    data = rows()
    data[0]["labels"][3] = V
    with pytest.raises(ValueError, match=r"`labels` to be in \[0, 61\)"):
        make_trainer(tmp_path).fit(make_model(), DataLoader(data, batch_size=4))


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("head", [VQLogitsHead, DenseLogitsHead])
def test_perplexity_is_that_of_a_loop_over_tokens(head, tmp_path):
    model = make_model(head=partial(head, codebook_size=8) if head is VQLogitsHead else head)
    data = rows(13, seed=3, ragged=True)  # the last batch is smaller
    data[4]["labels"][:] = -100  # a row without targets
    batches = DataLoader(data, batch_size=4)
    (logged,) = make_trainer(tmp_path).validate(model, batches, verbose=False)
    (tested,) = make_trainer(tmp_path).test(model, batches, verbose=False)
    total, count = 0.0, 0
    model.eval()
    for row in data:
        with torch.no_grad():
            logits = model(row["input_ids"][None], row["attention_mask"][None])[0]
        for t in range(T - 1):
            label = row["labels"][t + 1].item()
            if label != -100:
                total -= logits[t].double().log_softmax(-1)[label].item()
                count += 1
    for stage, values in (("val", logged), ("test", tested)):
        assert values[f"{stage}/loss"] == pytest.approx(total / count, rel=1e-5)
        assert values[f"{stage}/ppl"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_diverged_model_does_not_look_healthy(tmp_path):
    """`MeanMetric` drops NaN by default: the mean of what is left looked like a result."""
    model, data = make_model(), rows(8)
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[7] = torch.nan
    assert 0 < sum(7 in row["input_ids"] for row in data) < 8
    metrics = make_trainer(tmp_path).validate(model, DataLoader(data, batch_size=4), verbose=False)
    assert math.isnan(metrics[0]["val/loss"])


def test_predictions(tmp_path):
    model = make_model()
    batches = loader(8, ragged=True)
    predictions = make_trainer(tmp_path).predict(model, batches)
    for batch, prediction in zip(batches, predictions, strict=True):
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["attention_mask"])[:, :-1]
        labels = batch["labels"][:, 1:]
        nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        torch.testing.assert_close(prediction["nll"], nll)
        assert torch.equal(prediction["greedy"], logits.argmax(-1))


def test_decoding_after_training_uses_the_trained_bias(tmp_path):
    """`predict` fills the decoding tables; a fit in between must not leave them stale."""
    model = make_model()
    make_trainer(tmp_path).predict(model, loader(8))
    make_trainer(tmp_path, max_epochs=3).fit(model, loader())
    predictions = make_trainer(tmp_path).predict(model, loader(8))
    with torch.no_grad():
        logits = model(next(iter(loader(8)))["input_ids"])[:, :-1]
    assert torch.equal(predictions[0]["greedy"], logits.argmax(-1))


# ---------------------------------------------------------------------- what the Trainer may add


@pytest.mark.parametrize("head", ["fixed", "residual"])
def test_averages_leave_the_mapping_as_it_is_or_are_refused(head, tmp_path):
    """126 of 128 entries of the mapping came out changed: a mean of integers, cut off to an integer."""
    pretrained("untied", tmp_path / "model")
    kwargs = {"head": partial(ResidualVQLogitsHead, codebook_size=8, num_groups=4)} if head == "residual" else {}
    model = make_model(str(tmp_path / "model"), **kwargs)
    names = "head.packed_codes" if head == "residual" else "head.token_to_code, head.num_updates"
    with pytest.raises(ValueError, match=f"Expected EMAWeightAveraging with use_buffers=False.*{names}"):
        make_trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.9)]).fit(model, loader())
    assert not model.head_ready
    codes, averaged = [], EMAWeightAveraging(decay=0.9, use_buffers=False)

    class Codes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            codes.append({name: b.clone() for name, b in pl_module.head.named_buffers() if not b.is_floating_point()})

    trainer = make_trainer(tmp_path, callbacks=[Codes(), averaged], max_epochs=3)
    trainer.fit(model, loader(), loader(4))
    final = dict(model.head.named_buffers())
    for name, buffer in codes[-1].items():
        assert torch.equal(final[name], buffer), name
    assert trainer.callback_metrics["val/ppl"].isfinite()


@pytest.mark.parametrize(
    "kwargs", [{"mapping": "learned"}, {"mapping": "reassigned"}, {"codebook_update": "ema"}], ids=str
)
@pytest.mark.parametrize(
    "callback",
    [lambda: WeightAveraging(use_buffers=False), lambda: StochasticWeightAveraging(swa_lrs=0.1)],
    ids=["averages", "stochastic"],
)
def test_codes_that_move_have_no_average(kwargs, callback, tmp_path):
    with pytest.raises(ValueError, match=r"Expected codes that stay where they are with .*WeightAveraging"):
        make_trainer(tmp_path, callbacks=[callback()]).fit(make_model(**kwargs), loader())


def test_revived_codes_have_no_average(tmp_path):
    averages = WeightAveraging(use_buffers=False)
    with pytest.raises(ValueError, match="Expected `stop_step` to be set with WeightAveraging"):
        make_trainer(tmp_path, callbacks=[CodebookReinit(), averages]).fit(make_model(), loader())
    make_trainer(tmp_path, callbacks=[CodebookReinit(stop_step=1), averages]).fit(make_model(), loader())


def test_a_step_that_the_loss_scaler_leaves_out_moves_no_code(tmp_path):
    """The EMA codebook and the count of steps went on where the optimizer did not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows float16
    model, moved = make_model(codebook_update="ema"), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            count = next(iter(trainer.optimizers[0].state.values()), {"step": 0})["step"]
            moved.append((int(count), int(pl_module.head.num_updates)))

    scaled = MixedPrecision("16-mixed", "cpu", scaler)
    make_trainer(tmp_path, plugins=[scaled], callbacks=[Watch()], max_epochs=40).fit(model, loader())
    assert moved[0] == (0, 0)
    assert moved[-1][0] > 0
    assert all(steps == updates for steps, updates in moved)


class OldOptimizer:
    """Steps, and knows no hooks."""

    def step(self):
        return None


def test_steps_of_an_optimizer_that_is_not_torchs_count():
    with counted_steps(OldOptimizer()) as steps:
        pass
    assert steps.taken == 1


@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_a_fused_optimizer_tells_its_overflow_itself(overflow):
    """The scaler calls it even then, with `found_inf`."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer: Any = torch.optim.SGD([parameter], lr=0.1, fused=True)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(overflow), torch.tensor(1.0)
    with counted_steps(optimizer) as steps:
        optimizer.step()
    assert steps.taken == 1 - overflow
    assert (parameter.item() == 1) == bool(overflow)


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("head", [VQLogitsHead, ResidualVQLogitsHead])
def test_a_search_for_the_learning_rate_comes_before_the_fit(head, kind, tmp_path):
    """It trains a little, which freed the pretrained rows, and goes back: the fit then had no rows to start from."""
    pretrained(kind, tmp_path / "model")

    def fitted(search):
        options = {"codebook_size": 8} | ({"num_groups": 4} if head is ResidualVQLogitsHead else {})
        model = make_model(str(tmp_path / "model"), head=partial(head, **options), kd_weight=0.5)
        trainer = make_trainer(tmp_path, max_steps=4, max_epochs=-1)
        if search:
            Tuner(trainer).lr_find(model, loader(), num_training=5, update_attr=False, min_lr=0.01)
            assert not model.head_ready
        torch.manual_seed(0)
        trainer.fit(model, loader())
        assert model.head_ready
        assert model._output_layer == (None, None)
        return model

    assert_same_state(fitted(True), fitted(False))


class Batches(LightningDataModule):
    def __init__(self, batch_size=2):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(4)


def test_a_search_for_the_batch_size_comes_before_the_fit(tmp_path):
    pretrained("untied", tmp_path / "model")
    model, data = make_model(str(tmp_path / "model")), Batches()
    trainer = make_trainer(tmp_path, max_steps=4, max_epochs=-1)
    Tuner(trainer).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=1)
    assert not model.head_ready
    trainer.fit(model, data)
    assert model.head_ready


@pytest.mark.parametrize("mapping", ["learned", "reassigned", "fixed"])
@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"max_epochs": 1}, 4),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": -1, "max_steps": 4}, 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"max_epochs": 2}, 8),
    ],
    ids=str,
)
def test_a_mapping_that_is_never_renewed_is_told(mapping, limits, left, tmp_path, recwarn):
    """With fewer steps than `reassign_every_n_steps` it was a fixed one, and nothing said so."""
    model = make_model(mapping=mapping, reassign_every_n_steps=8)
    make_trainer(tmp_path, **limits).fit(model, loader())
    told = [str(w.message) for w in recwarn if "Expected at least 8 training steps" in str(w.message)]
    assert len(told) == (mapping != "fixed" and left < 8)
    assert all(f"but this run has {left}:" in text for text in told)
    assert int(model.head.num_updates) == left


def test_steps_before_count_towards_the_next_renewal():
    head = VQLogitsHead(4, 9, 3, mapping="reassigned", reassign_every_n_steps=10)
    head.num_updates.fill_(25)
    assert check_steps(head, 5) is None
    assert "at least 5 training steps" in check_steps(head, 4)
    assert check_steps(head, None) is None


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_resumed_equals_uninterrupted(update, tmp_path):
    """Parameters and buffers bit by bit, with a learned mapping and revivals on the way."""

    def run(epochs, ckpt=None, folder="none"):
        model = make_model(mapping="learned", codebook_update=update, codebook_size=20)
        reinit = CodebookReinit(every_n_steps=3, min_usage=0.5)
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_epochs=1)
        trainer = make_trainer(tmp_path, max_epochs=epochs, callbacks=[reinit, saver], enable_checkpointing=True)
        trainer.fit(model, loader(20), ckpt_path=ckpt)
        return model, trainer, saver.last_model_path

    whole, trainer, _ = run(4)
    half, _, path = run(2, folder="half")
    assert any(
        not torch.equal(a, b) for a, b in zip(whole.state_dict().values(), half.state_dict().values(), strict=True)
    )
    resumed, again, _ = run(4, path, "resumed")
    assert again.global_step == trainer.global_step == 20
    assert_same_state(whole, resumed)
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, again)]
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_checkpoint_loads_on_its_own(tmp_path):
    model = make_model(mapping="learned")
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = VQLogitsLM.load_from_checkpoint(tmp_path / "model.ckpt")
    assert_same_state(model, loaded)
    assert loaded.head_ready
    ids = next(iter(loader()))["input_ids"]
    torch.testing.assert_close(model.eval()(ids), loaded.eval()(ids))
    with pytest.raises(ValueError, match="`codebook_size` 9, but this one has 8"):
        VQLogitsLM.load_from_checkpoint(tmp_path / "model.ckpt", head=partial(VQLogitsHead, codebook_size=9))


def test_a_finished_head_is_not_started_again(tmp_path):
    model = make_model()
    make_trainer(tmp_path).fit(model, loader())
    codes = model.head.token_to_code.clone()
    model.initialize_head = None  # calling it would raise
    make_trainer(tmp_path).fit(model, loader(seed=5))
    assert torch.equal(model.head.token_to_code, codes)


# ---------------------------------------------------------------------- pretrained


def pretrained(kind, path):
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, **ids))
    else:
        config = {name: value for name, value in CONFIG.items() if name != "model_type"}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=kind == "tied", **config, **ids))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("kind", ["untied", "tied", "gpt2"])
@pytest.mark.parametrize("init", ["kmeans", "weighted_kmeans"])
def test_fit_from_a_pretrained_folder(kind, init, tmp_path, caplog):
    original = pretrained(kind, tmp_path / "model")
    with caplog.at_level("INFO"):
        model = make_model(str(tmp_path / "model"), init=init, mapping="learned", codebook_size=V - 1)
    assert ("the tie is broken" in caplog.text) == (kind != "untied")
    trainer = make_trainer(tmp_path, max_epochs=2)
    weight = original.get_output_embeddings().weight.detach()

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):  # before the module's own hook
            self.table = pl_module.backbone.get_input_embeddings().weight.detach().clone()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                self.latents = pl_module.head.latents.detach().clone()
                self.rows = pl_module.head.dense_weight().detach().clone()

    start = AtStart()
    trainer.callbacks.append(start)
    with caplog.at_level("INFO"):
        trainer.fit(model, loader(), loader(8))
    torch.testing.assert_close(start.latents, weight)
    close = (start.rows - weight).square().sum(1) < 0.1
    assert close.sum() >= V - 4  # one code short: all but a few rows are kept
    assert "Output head:" in caplog.text
    if kind != "untied":  # the input table was not overwritten by the head, and both train on their own
        torch.testing.assert_close(start.table, weight)
    assert trainer.callback_metrics["val/ppl"].isfinite()
    assert model._output_layer == (None, None)


def test_dense_keeps_the_pretrained_logits(tmp_path):
    original = pretrained("tied", tmp_path).eval()
    model = make_model(str(tmp_path), head=DenseLogitsHead).eval()
    ids = next(iter(loader()))["input_ids"]
    torch.testing.assert_close(model(ids), original(ids).logits)
    assert model.head_ready
    model.initialize_head(loader())  # token counts would be added to a layer that knows them already
    torch.testing.assert_close(model(ids), original(ids).logits)


def test_k_means_needs_a_pretrained_model():
    with pytest.raises(ValueError, match="pretrained backbone for init='kmeans'"):
        make_model(init="kmeans")


# ---------------------------------------------------------------------- generation


@pytest.fixture(params=["llama", "gpt2"])
def generator_model(request, tmp_path):
    """A model whose logits differ clearly, so that greedy decoding has no near ties."""
    backbone = None if request.param == "llama" else str(tmp_path)
    if backbone:
        pretrained("gpt2", tmp_path)
    model = make_model(backbone, codebook_size=20, init="random").eval()
    with torch.no_grad():
        model.head.codebook.normal_()
        model.head.token_bias.normal_()
        for parameter in model.backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def by_hand(model, ids, steps):
    """Full logits of the whole sequence for each new token: no cache, no tables."""
    for _ in range(steps):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def test_generation_with_a_cache_equals_a_loop_over_full_logits(generator_model):
    prompts = torch.stack([row["input_ids"][:5] for row in rows(6)])
    generated = generator_model.generate(prompts, max_new_tokens=9)
    assert torch.equal(generated, by_hand(generator_model, prompts, 9))
    assert generated[:, 5:].unique().numel() > 3  # not a constant
    assert torch.equal(generator_model.generate(prompts, max_new_tokens=0), prompts)


def test_left_padded_prompts_equal_one_by_one(generator_model):
    prompts = [row["input_ids"][:n] for row, n in zip(rows(4), (2, 7, 5, 1), strict=True)]
    ids, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, 7 - len(prompt) :], mask[i, 7 - len(prompt) :] = prompt, 1
    together = generator_model.generate(ids, mask, max_new_tokens=8)
    for i, prompt in enumerate(prompts):
        assert torch.equal(together[i, 7:], by_hand(generator_model, prompt[None], 8)[0, len(prompt) :])


def test_generation_is_without_dropout_and_restores_the_mode():
    model = make_model(backbone={"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.9})
    ids = torch.arange(6).view(2, 3)
    texts = [model.train().generate(ids, max_new_tokens=8) for _ in range(4)]
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert model.training


def test_generation_stops_when_all_texts_have_ended(generator_model):
    ids = torch.arange(8).view(2, 4)
    free = generator_model.generate(ids, max_new_tokens=12)
    eos = int(free[0, 6])
    ended = generator_model.generate(ids, max_new_tokens=12, eos_token_id=eos)
    lengths = []
    for row, full in zip(ended.tolist(), free.tolist(), strict=True):
        new, wanted = row[4:], full[4:]
        stop = wanted.index(eos) + 1 if eos in wanted else len(wanted)
        lengths.append(stop)
        assert new[: min(stop, len(new))] == wanted[: min(stop, len(new))]
        assert set(new[stop:]) <= {eos}
    assert ended.shape[1] == 4 + max(lengths)


def test_arguments_out_of_range_are_named_at_once():
    for name, value in (("calibration_batches", 0), ("count_power", -1.0), ("commitment_weight", -0.1)):
        with pytest.raises(ValueError, match=f"Expected `{name}` to be"):
            make_model(**{name: value})


def test_sampled_generation_follows_the_generator(generator_model):
    prompts = torch.stack([row["input_ids"][:5] for row in rows(6)])
    texts = [
        generator_model.generate(
            prompts, max_new_tokens=9, temperature=1.0, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


# ---------------------------------------------------------------------- two processes

SCRIPT = """
import os
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, {tests!r})
from test_vq_training import make_model, make_trainer, rows
from lit_logits.callbacks import CodebookFit, CodebookReassign, CodebookReinit
from lit_logits.modules import HierarchicalVQLogitsHead, ResidualVQLogitsHead

torch.set_num_threads(1)
devices, cases, folder = int(sys.argv[1]), eval(sys.argv[2]), sys.argv[3]
rank = int(os.environ.get("LOCAL_RANK", 0))


def batches(data, batch_size):
    sampler = DistributedSampler(data, num_replicas=devices, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=batch_size // devices, sampler=sampler)


for case, kwargs in cases.items():
    residual, hierarchical = kwargs.pop("residual", None), kwargs.pop("hierarchical", None)
    if residual is not None:
        kwargs["head"] = partial(ResidualVQLogitsHead, codebook_size=8, **residual)
    if hierarchical is not None:
        kwargs["head"] = partial(HierarchicalVQLogitsHead, **hierarchical)
    model = make_model(
        {backbone!r},
        calibration_batches=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        **kwargs,
    )
    own_vectors = hierarchical is not None and "own_vectors" in hierarchical
    torch.manual_seed(rank)  # ranks must agree although they are seeded differently
    trainer = make_trainer(
        folder,
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_find_unused_parameters_true" if own_vectors else "ddp",
        max_epochs=2,
        callbacks=[
            *([CodebookFit(at=0.5)] if own_vectors else []),
            *([] if residual is not None else [CodebookReinit(every_n_steps=3, min_usage=0.5)]),
            *([] if hierarchical is None else [CodebookReassign([4], min_gain=0.1)]),
        ],
        use_distributed_sampler=False,
    )
    trainer.fit(model, batches(rows(32), 8), batches(rows(12, seed=1, ragged=True), 4))
    metrics = {{name: value.item() for name, value in trainer.callback_metrics.items()}}
    torch.save((model.state_dict(), metrics), f"{{folder}}/{{case}}-{{devices}}-{{trainer.global_rank}}.pt")
os._exit(0)  # threads of gloo that outlive the interpreter abort it now and then; Lightning leaves the group open
"""


CASES: dict[str, dict] = {
    "learned": {"mapping": "learned", "codebook_size": 20},
    "ema": {"mapping": "learned", "codebook_update": "ema", "codebook_size": 20},
    "reassigned": {"mapping": "reassigned", "codebook_size": 20, "init": "kmeans"},
    "residual": {"residual": {"num_groups": 4, "num_stages": {20: 2, 61: 1}, "bias": True}, "kd_weight": 0.7},
    "fisher": {
        "residual": {"num_groups": 4, "num_stages": {20: 2, 61: 1}, "token_weights": "fisher"},
        "kd_weight": 0.7,
    },
    "hierarchical": {"hierarchical": {"codebook_sizes": (12, 6, 6)}, "kd_weight": 0.3},
    "own_vectors": {"hierarchical": {"codebook_sizes": (12, 6, 6), "num_groups": 2, "own_vectors": True}},
}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Same global batches: calibration, weighted k-means, revivals and the learned mapping agree, and so do ranks."""
    pretrained("untied", tmp_path / "model")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), backbone=str(tmp_path / "model")))
    for devices in (1, 2):
        command = [sys.executable, str(script), str(devices), repr(CASES), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        one, first, second = (torch.load(tmp_path / f"{case}-{name}.pt") for name in ("1-0", "2-0", "2-1"))
        for name in one[0]:
            assert torch.equal(first[0][name], second[0][name]), (case, name)
            torch.testing.assert_close(one[0][name], first[0][name], rtol=1e-3, atol=1e-5, msg=f"{case}: {name}")
        names = {
            "vq/reinit",
            "vq/reassigned",
            "vq/reassign_gain",
            "vq/coding_cost",
            "val/loss",
            "val/ppl",
            "val/kl",
            "val/ppl_ratio",
        }
        assert ("vq/coding_cost" in one[1]) == (case == "own_vectors")
        if case == "hierarchical":
            assert one[1]["vq/reassigned"] > 0
        for name in names & one[1].keys():  # the targets of the two ranks differ in number
            assert first[1][name] == second[1][name] == pytest.approx(one[1][name], rel=1e-4), (case, name)
