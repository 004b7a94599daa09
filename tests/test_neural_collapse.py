"""Neural-collapse figures against NumPy loops from the definitions, and the callback that logs them."""

import math

import numpy as np
import pytest
import torch

from lit_logits.functional.neural_collapse import ClassMoments, class_moments, cosine_matrix, neural_collapse


def data(classes=4, dim=6, sizes=(5, 9, 7, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    centres = 2 * torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    features = centres[labels] + torch.randn(len(labels), dim, generator=generator, dtype=torch.float64)
    return features, labels, torch.randn(classes, dim, generator=generator, dtype=torch.float64)


def oracle(features, labels, weight):
    """The definitions, sample by sample, with NumPy's pseudo-inverse."""
    h, y, w = features.numpy(), labels.numpy(), weight.numpy()
    num_classes, dim = w.shape
    means = [np.mean([x for x, c in zip(h, y, strict=True) if c == k], axis=0) for k in range(num_classes)]
    centre = sum(means) / num_classes
    within, between = np.zeros((dim, dim)), np.zeros((dim, dim))
    for x, c in zip(h, y, strict=True):
        within += np.outer(x - means[c], x - means[c]) / len(h)
    for mean in means:
        between += np.outer(mean - centre, mean - centre) / num_classes
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / num_classes
    centred = np.stack([mean - centre for mean in means])

    def spread(rows):
        lengths = [math.sqrt(sum(x * x)) for x in rows]
        return np.std(lengths) / np.mean(lengths)

    def angles(rows):
        gaps = []
        for i in range(num_classes):
            for j in range(num_classes):
                if i != j:
                    cos = rows[i] @ rows[j] / math.sqrt((rows[i] @ rows[i]) * (rows[j] @ rows[j]))
                    gaps.append(abs(cos + 1 / (num_classes - 1)))
        return sum(gaps) / len(gaps)

    nc3 = np.sum((w / np.linalg.norm(w) - centred / np.linalg.norm(centred)) ** 2)
    return nc1, spread(centred), spread(w), angles(centred), angles(w), nc3


def test_figures_are_the_definitions():
    features, labels, weight = data()
    values = neural_collapse(class_moments(features, labels, 4), weight)
    np.testing.assert_allclose([value.item() for value in values], oracle(features, labels, weight), rtol=1e-9)


def test_moments_of_batches_add():
    features, labels, weight = data()
    parts = [class_moments(features[i : i + 6], labels[i : i + 6], 4) for i in range(0, len(labels), 6)]
    total = ClassMoments(*(sum(tensors) for tensors in zip(*parts, strict=True)))
    whole = neural_collapse(class_moments(features, labels, 4), weight)
    for a, b in zip(neural_collapse(total, weight), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_a_turned_and_scaled_simplex_is_zero_everywhere(num_classes):
    simplex = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    turn = torch.linalg.qr(torch.randn(8, num_classes, dtype=torch.float64, generator=torch.manual_seed(0)))[0].T
    features = (3 * simplex @ turn + 1.5).repeat(4, 1)
    labels = torch.arange(num_classes).repeat(4)
    values = neural_collapse(class_moments(features, labels, num_classes), 0.2 * simplex @ turn)
    assert max(abs(value.item()) for value in values) < 1e-9


def test_a_dead_backbone_does_not_look_perfect():
    """Features that are the same for every class: nothing lies between the classes, whatever lies within."""
    labels = torch.arange(4).repeat(5)
    for features in (torch.zeros(20, 6), torch.full((20, 6), 3.7)):
        assert neural_collapse(class_moments(features, labels, 4), torch.ones(4, 6)).nc1 == math.inf


def test_two_classes_that_merge_raise_the_first_figure_steadily():
    values = []
    for gap in (1.0, 1e-2, 1e-4, 1e-6, 1e-8):
        features, labels, weight = data()
        features[labels == 3] += features[labels == 2].mean(0) - features[labels == 3].mean(0) + gap
        values.append(neural_collapse(class_moments(features, labels, 4), weight).nc1.item())
    assert values == sorted(values)


def test_a_large_common_offset_gives_no_negative_figure():
    simplex = (torch.eye(4, 6, dtype=torch.float64) + 1e6).repeat(5, 1)
    assert 0 <= neural_collapse(class_moments(simplex, torch.arange(4).repeat(5), 4), torch.eye(4, 6)).nc1 < 1e-3


def test_rows_that_crowd_together_are_seen():
    """A collapsed head: all rows nearly one direction."""
    features, labels, weight = data()
    crowded = torch.ones(4, 6, dtype=torch.float64) + 0.01 * weight
    values = neural_collapse(class_moments(features, labels, 4), crowded)
    assert values.nc2_angle_rows == pytest.approx(1 + 1 / 3, abs=1e-2)
    assert cosine_matrix(crowded).min() > 0.99


def test_nothing_of_a_class_is_left_out_of_the_figures():
    """Class 3 never occurs, one label is ignored: as if neither were there."""
    features, labels, weight = data(sizes=(5, 9, 7, 0))
    marked = torch.cat([labels, torch.tensor([-100])])
    more = torch.cat([features, torch.full((1, 6), 100.0, dtype=torch.float64)])
    values = neural_collapse(class_moments(more, marked, 4), weight)
    np.testing.assert_allclose([v.item() for v in values], oracle(features, labels, weight[:3]), rtol=1e-9)


def test_a_single_class_has_no_figures():
    values = neural_collapse(class_moments(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), 2), torch.ones(2, 2))
    assert all(value.isnan() for value in values)


def test_another_head_is_named():
    with pytest.raises(ValueError, match=r"shape \(4, 6\), a row a class, but got \(4, 5\)"):
        neural_collapse(class_moments(*data()[:2], 4), torch.zeros(4, 5))
