"""Small students and teachers of three classes, rows for them, and one step of `DualHeadKD` written out."""

import copy

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.functional.dual_head_kd import logit_loss

__all__ = ["CLASSES", "Net", "batch_of", "check", "fit", "make", "oracle", "rows"]

CLASSES = 3


class Net(nn.Module):
    """A classifier in one file, with a layer that nothing else knows."""

    def __init__(self, width=8, classes=CLASSES, norm=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Tanh())
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.body(x))


def rows(count=12, seed=38):
    """Samples with labels by lot; with this seed all gradients of the tests here are in conflict."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def make(method="dual_head", seed=0, norm=False, optimizer=None, kind=DualHeadKD, **kwargs):
    torch.manual_seed(seed)
    student, teacher = Net(norm=norm), Net(width=16, norm=norm)
    with torch.no_grad():
        teacher.fc.weight.mul_(6)
    sgd = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    return kind(student, teacher, method=method, optimizer=sgd, **kwargs)


def fit(model, data, batch_size=12, sampler=None, **kwargs):
    defaults = {"max_steps": 1, "precision": "64-true", "accelerator": "cpu", "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**{**defaults, **quiet, **kwargs})
    trainer.fit(model, DataLoader(data, batch_size=batch_size, sampler=sampler))
    return trainer


def oracle(model, batch, mode, *, clip=None, lr=0.5):
    """One SGD step with explicit losses, two plain backward passes over one flat vector, and the formula."""
    student = copy.deepcopy(model.net).double()
    teacher = copy.deepcopy(model.teacher.model).double()
    x, y = batch["pixel_values"], batch["labels"]
    z1 = student.student(x)
    features = student.student.body(x)
    z2 = z1 if student.aux_head is None else student.aux_head(features)
    ce = model.ce_weight * F.cross_entropy(z1, y)
    kd = model.kd_factor * logit_loss(z2, teacher(x), kind=model.kd_loss, temperature=model.temperature)
    parameters = dict(student.named_parameters())

    def flat(loss):
        grads = torch.autograd.grad(loss, parameters.values(), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True)]

    g1, g2 = flat(ce), flat(kd)
    inside = [mode == "all" or "body" in name for name in parameters]
    dot = sum((a * b).sum() for a, b, use in zip(g1, g2, inside, strict=True) if use)
    norm = sum((a * a).sum() for a, use in zip(g1, inside, strict=True) if use)
    if mode != "none" and dot < 0:
        g2 = [b - dot / norm * a if use else b for a, b, use in zip(g1, g2, inside, strict=True)]
    total = [a + b for a, b in zip(g1, g2, strict=True)]
    if clip is not None:
        length = torch.sqrt(sum((g * g).sum() for g in total))
        total = [g * min(1.0, clip / (length + 1e-6)) for g in total]
    step = {name: p.detach() - lr * g for (name, p), g in zip(parameters.items(), total, strict=True)}
    return step, dot.item()


def batch_of(data):
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def check(model, expected, **tolerance):
    own = dict(model.net.named_parameters())
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name].detach(), value, **{"rtol": 1e-12, "atol": 1e-13, **tolerance})
