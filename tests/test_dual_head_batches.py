"""Batches of every loader, soft labels, losses by argument, and logits that are changed behind the head."""

from collections import OrderedDict

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from tiny_classifiers import CLASSES, Net, batch_of, fit, make, rows
from torch import nn
from torch.utils.data import DataLoader

from lit_logits.callbacks import NeuralCollapseMonitor
from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.functional import dkd_loss, kd_kl_divergence, label_loss, logit_loss, standardize_logits
from lit_logits.modules.dual_head_kd.teacher import load_weights


def pairs(**kwargs):
    return [(row["pixel_values"], row["labels"]) for row in rows(**kwargs)]


def same_weights(left, right):
    for name, value in left.net.state_dict().items():
        torch.testing.assert_close(value, right.net.state_dict()[name], rtol=0, atol=0)


# --- the form of a batch ---


def test_pairs_of_a_loader_train_as_mappings_do():
    """`(x, y)`, which torchvision's data sets give, failed with "list indices must be integers"."""
    by_pair, by_name = make(), make()
    trainer = fit(by_pair, pairs(), max_steps=2)
    fit(by_name, rows(), max_steps=2)
    same_weights(by_pair, by_name)
    (judged,) = trainer.validate(by_pair, DataLoader(pairs(), batch_size=5), verbose=False)
    (expected,) = trainer.validate(by_name, DataLoader(rows(), batch_size=5), verbose=False)
    assert judged == expected
    (first, *_) = trainer.predict(by_pair, DataLoader(pairs(), batch_size=5))
    torch.testing.assert_close(first["logits"], by_pair(batch_of(rows())["pixel_values"][:5]))


def test_the_monitor_of_collapse_reads_pairs(tmp_path):
    model = make()
    validated = {"num_sanity_val_steps": 0, "max_epochs": 1, "max_steps": -1, "default_root_dir": tmp_path}
    trainer = L.Trainer(
        callbacks=[NeuralCollapseMonitor()],
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **validated,
    )
    trainer.fit(model, DataLoader(pairs(), batch_size=6), DataLoader(pairs(), batch_size=6))
    assert trainer.callback_metrics["nc/nc1"] > 0


def test_inputs_beside_those_of_the_forward_are_left_out():
    """Row numbers were passed on to the student: TypeError, unexpected keyword."""

    class Named(Net):
        def forward(self, pixel_values):
            return super().forward(pixel_values)

    batch = batch_of(rows())
    for student in (Net(), Named()):
        model = DualHeadKD(student, Named()).double()
        torch.testing.assert_close(model.losses({**batch, "rows": torch.arange(12)}), model.losses(batch))
    with pytest.raises(TypeError, match=r"an input that Net takes, \['x'\], but got \['image', 'rows'\]"):
        make().losses({"image": batch["pixel_values"], "rows": torch.arange(12), "labels": batch["labels"]})


def test_without_labels_the_teacher_alone_teaches():
    """It was a KeyError; the weights of the main head stay as they are then."""
    model = make(method="dual_head").double()
    batch = batch_of(rows())
    ce, kd = model.losses({"pixel_values": batch["pixel_values"]})
    assert ce == 0
    torch.testing.assert_close(kd, model.losses(batch).kd)
    before = model.student.fc.weight.clone()
    trainer = fit(model, [x for x, _ in pairs()])
    assert torch.equal(model.student.fc.weight, before)
    trainer.validate(model, DataLoader([x for x, _ in pairs()], batch_size=5), verbose=False)
    for needing in (make(method="ce"), make(kd_loss="dkd")):
        with pytest.raises(ValueError, match=r"Expected batches with `labels` for method='.*', but got"):
            needing.double().losses((batch["pixel_values"],))


def test_batches_of_other_forms_are_named():
    x, y = batch_of(rows()).values()
    with pytest.raises(ValueError, match="Rename 'label'"):
        make().losses({"pixel_values": x, "label": y})
    with pytest.raises(TypeError, match=r"list of \['Tensor', 'Tensor', 'Tensor'\]. Let `collate_fn`"):
        make().losses([x, y, y])
    with pytest.raises(TypeError, match=r"but got str of \[\]"):
        make().losses("rows")


# --- labels ---


def test_soft_labels_are_learned_and_judged():
    x, _ = batch_of(rows()).values()
    soft = torch.randn(12, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    model = make().double()
    torch.testing.assert_close(model.losses((x, soft)).ce, F.cross_entropy(model(x), soft))
    trainer = fit(model, list(zip(x, soft, strict=True)))
    (result,) = trainer.validate(model, DataLoader(list(zip(x, soft, strict=True)), batch_size=5), verbose=False)
    assert result["val/loss"] == pytest.approx(F.cross_entropy(model(x), soft).item(), rel=1e-6)
    assert result["val/acc"] == pytest.approx((model(x).argmax(-1) == soft.argmax(-1)).double().mean().item())


def test_labels_of_several_classes_are_refused_in_words():
    x, _ = batch_of(rows()).values()
    many = torch.ones(12, CLASSES)
    with pytest.raises(ValueError, match=r"sum to 1 over 3 classes, but a row sums to 3. Labels of several classes"):
        make().losses((x, many))
    with pytest.raises(ValueError, match=r"of shape \(B,\), but got \(12, 3\). Pass the number of a class"):
        make().losses((x, many.long()))
    with pytest.raises(ValueError, match=r"Expected soft `labels` of shape \(B, 3\), but got \(12, 4\)"):
        make().losses((x, torch.full((12, 4), 0.25)))


# --- losses by argument ---


@pytest.mark.parametrize("method", ["single_head", "dual_head"])
def test_losses_of_the_field_go_on_either_head(method):
    x, y = batch_of(rows()).values()

    def terms(**kwargs):
        model = make(method, **kwargs).double()
        output = model.net({"x": x})
        head = output.logits if output.aux_logits is None else output.aux_logits
        return model.losses((x, y)), output.logits, head, model.teacher({"x": x})

    (_, kd), _, head, teacher = terms(kd_loss="dkd", dkd_alpha=0.5, dkd_beta=2.0)
    torch.testing.assert_close(kd, dkd_loss(head, teacher, y, alpha=0.5, beta=2.0, temperature=4.0))
    (_, kd), _, head, teacher = terms(kd_loss="kl", standardize=True)
    scores = standardize_logits(head), standardize_logits(teacher)
    torch.testing.assert_close(kd, kd_kl_divergence(*scores, temperature=2.0))
    (_, kd), _, head, teacher = terms(kd_loss="mlkd")
    torch.testing.assert_close(kd, logit_loss(head, teacher, kind="mlkd", temperature=4.0))
    (_, kd), _, head, teacher = terms(class_reduction="mean")
    torch.testing.assert_close(kd, logit_loss(head, teacher, kind="binary_kl_norm", temperature=2.0) / CLASSES)
    (ce, _), logits, *_ = terms(label_smoothing=0.2, class_weights=[0.5, 1.0, 2.0])
    weights = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(ce, label_loss(logits, y, label_smoothing=0.2, class_weights=weights))


def test_arguments_that_do_not_go_together_are_named():
    for kwargs, match in (
        ({"class_reduction": "max"}, "`class_reduction` to be 'sum' or 'mean', but got 'max'"),
        ({"class_reduction": "mean", "kd_loss": "kl"}, "but got 'mean' for 'kl'"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` to be in \[0, 1\), but got 1"),
        ({"class_weights": [1.0, 2.0]}, r"`class_weights` to be 3 non-negative numbers.*\(2\)"),
        ({"dkd_beta": -1.0}, "`dkd_beta` to be non-negative, but got -1"),
    ):
        with pytest.raises(ValueError, match=match):
            DualHeadKD(Net(), Net(), **kwargs)


# --- logits that are changed behind the head ---


class Softmaxed(Net):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class FeaturesFirst(Net):
    def __init__(self):
        super().__init__(width=CLASSES)

    def forward(self, x):
        features = self.body(x)
        return features, self.fc(features)


class TwoViews(Net):
    def forward(self, x):
        return (super().forward(x) + super().forward(-x)) / 2


class InPlace(Net):
    def forward(self, x):
        return super().forward(x).mul_(2.0)


class MeanInEvaluation(Net):
    """As distilled DeiT: one of two heads in training, the mean of both in evaluation."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(8, CLASSES)

    def forward(self, x):
        features = self.body(x)
        logits = self.fc(features)
        return logits if self.training else (logits + self.second(features)) / 2


class LearnedScale(Net):
    """A scale of 1 changes nothing until the first step."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("kind", [Softmaxed, FeaturesFirst, TwoViews, InPlace])
def test_logits_that_are_changed_behind_the_head_are_refused(kind):
    """Training was silently on something else: on features, or on probabilities of probabilities."""
    with pytest.raises(ValueError, match=f"Expected {kind.__name__} to return what its layer `fc` gives"):
        DualHeadKD(kind(), Net(), classifier="fc").double().losses(tuple(batch_of(rows()).values()))


def test_a_head_that_is_changed_in_evaluation_alone_is_refused():
    model = DualHeadKD(MeanInEvaluation(), Net(), classifier="fc").double()
    assert model.losses(batch_of(rows())).ce > 0
    with pytest.raises(ValueError, match="Expected MeanInEvaluation to return what its layer `fc` gives"):
        model.eval().validation_step(batch_of(rows()), 0)


def test_a_learned_scale_is_refused_when_it_has_moved():
    with pytest.raises(ValueError, match="Expected LearnedScale to return what its layer `fc` gives"):
        fit(DualHeadKD(LearnedScale(), Net()), rows(24), max_steps=2)


def test_the_same_logits_in_another_dtype_are_accepted():
    class Widened(Net):
        def forward(self, x):
            return super().forward(x).float()

    model = DualHeadKD(Widened(), Net()).bfloat16()
    x, y = batch_of(rows()).values()
    assert model.losses((x.bfloat16(), y)).ce.isfinite()


def test_a_teacher_of_probabilities_is_refused():
    with pytest.raises(ValueError, match="Expected logits of the teacher Softmaxed, but got probabilities"):
        DualHeadKD(Net(), Softmaxed()).double().losses(batch_of(rows()))


# --- versions of modules ---


class Versioned(Net):
    """Like torchvision's MNASNet, which refuses weights that do not tell their version."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_exports_and_checkpoints_keep_the_versions_of_modules(tmp_path):
    model = DualHeadKD(Versioned(), method="ce")
    model.export(tmp_path / "student.pt")
    exported = torch.load(tmp_path / "student.pt", weights_only=True)
    Versioned().load_state_dict(exported)
    trainer = fit(model, rows())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.save(OrderedDict(exported), tmp_path / "plain.pt")  # what forgets its versions is taken for the present one
    for file in ("student.pt", "last.ckpt", "plain.pt"):
        student = Versioned()
        load_weights(student, tmp_path / file)
        expected = exported if file != "last.ckpt" else model.student.state_dict()
        torch.testing.assert_close(student.fc.weight, expected["fc.weight"].to(torch.float32))


@pytest.mark.parametrize(
    ("arguments", "factor"),
    [
        ({}, 10 / 150),
        ({"kd_loss": "binary_kl", "method": "single_head"}, 10 / 150),
        ({"class_reduction": "mean"}, 10.0),
        ({"kd_loss": "kl"}, 1.0),
        ({"method": "kd"}, 1.0),
        ({"kd_factor": 0.3}, 0.3),
    ],
)
def test_the_default_weight_does_not_grow_with_the_number_of_classes(arguments, factor):
    model = DualHeadKD(nn.Linear(4, 150), nn.Linear(4, 150), **arguments)
    assert model.kd_factor == pytest.approx(factor)
    assert DualHeadKD(nn.Linear(4, 10), nn.Linear(4, 10)).kd_factor == 1.0  # the paper's
