"""`VQLogitsLM` under the real Trainer: what training moves, what evaluation measures, and pretrained starts.

Letters: T sequence, V vocabulary.
"""

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_vq_models import Losses, T, V, loader, make_model, make_trainer, pretrained, rows
from torch.utils.data import DataLoader

from lit_logits.modules import DenseLogitsHead, VQLogitsHead

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


def test_arguments_out_of_range_are_named_at_once():
    for name, value in (("calibration_batches", 0), ("count_power", -1.0), ("commitment_weight", -0.1)):
        with pytest.raises(ValueError, match=f"Expected `{name}` to be"):
            make_model(**{name: value})


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


# ---------------------------------------------------------------------- pretrained


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
