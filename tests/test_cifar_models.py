"""The models for small images: sizes as published, and the forward pass of the tables' block structure."""

import pytest
import torch
from torch import nn

from lit_logits.modules.dual_head_kd.classifiers import MODEL_ZOO, find_classifier
from lit_logits.modules.zoo.resnet import CifarResNet

# Parameters with 100 classes, counted in the code that the tables of the field come from (arXiv 1910.10699).
PUBLISHED = {
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}


def test_the_zoo_has_the_models_of_the_tables():
    assert set(MODEL_ZOO) == set(PUBLISHED)
    assert set(PUBLISHED) <= MODEL_ZOO.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    with torch.device("meta"):
        model = MODEL_ZOO[name](num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size", [8, 32, 64])
def test_forward_and_features(name, size):
    """Any image of 8 pixels and more; the found layer's input is the feature, and every parameter gets a gradient."""
    torch.manual_seed(0)
    model = MODEL_ZOO[name](num_classes=7)
    layer = model.get_submodule(find_classifier(model))
    seen = []
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    logits = model(torch.randn(3, 3, size, size))
    features, outputs = seen[0]
    assert logits.shape == (3, 7)
    assert torch.equal(logits, outputs)
    assert features.shape == (3, layer.in_features)
    assert isinstance(layer, nn.Linear)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("depth", [7, 10, 2])
def test_depths_that_do_not_exist_are_named(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2, such as 8, 20 or 56, but got {depth}"):
        CifarResNet(depth)
