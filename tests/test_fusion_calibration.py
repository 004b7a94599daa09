"""Calibration of fusion: every candidate beside a model of those settings."""

from functools import partial

import pytest
import tiny_llamas
import torch
from tiny_llamas import moved

from lit_logits.functional import fuse_logits, fused_log_probs
from lit_logits.modules import FusedCausalLM
from lit_logits.modules.dynamic_fusion.calibration import FusionCalibration, FusionCandidate

VOCAB = 40


llama = partial(tiny_llamas.llama, initializer_range=0.4, max_position_embeddings=32)

BASE = llama(1)
MODELS = llama(0, hidden=32), BASE, [moved(BASE, 2, 0.2), moved(BASE, 3, 0.2)]
IDS = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(4))
MASK = torch.tensor([[1] * 9, [0] * 2 + [1] * 7, [1] * 6 + [0] * 3])
LABELS = IDS.masked_fill((MASK == 0) | (torch.arange(9) < 4), -100)
SETTINGS = [
    {},
    {"criterion": "prompt", "scale": 0.9},
    {"mode": "joint", "bounds": (0.1, 0.8)},
    {"min_entropy": 1.5},
    {"routing": "text"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_candidates_are_what_models_of_their_settings_say(settings):
    fused = FusedCausalLM(*MODELS, chunk_size=4, **settings)
    calibration = FusionCalibration(fused, [0.0, 0.5, 1.0, 1.7])
    for part in (slice(0, 2), slice(2, 3)):
        calibration.update(fused, IDS[part], LABELS[part], MASK[part])
    ratings = calibration.compute()
    assert len(ratings) == len({rating.candidate for rating in ratings})
    seen = {rating.candidate.criterion for rating in ratings}
    expected = {None, "distance", "projection", "equal", "uncertain", "prompt"}
    assert seen == expected - ({"prompt"} if {"min_entropy", "routing"} & set(settings) else set())
    for (criterion, scale, static), nll, alpha in ratings:
        own = {"criterion": criterion, "scale": scale} if static is None else {"static_alpha": static}
        scores = FusedCausalLM(*MODELS, **{**settings, **own}).score(IDS, LABELS, MASK)
        kept = scores.trace.mask
        assert nll == pytest.approx(-float(scores.log_probs[kept].mean()), abs=2e-5)
        assert alpha == pytest.approx(float(scores.trace.alpha.sum(0)[kept].mean()), abs=2e-4)
    first = ratings[0].candidate
    assert first[:2] == (settings.get("criterion", "distance"), settings.get("scale", 1.0))
    calibration.reset()
    calibration.update(fused, IDS[:1], LABELS[:1])
    assert calibration.compute()[0].nll != pytest.approx(ratings[0].nll)


def test_fixed_weights_of_the_model_are_a_candidate_of_their_own():
    fused = FusedCausalLM(*MODELS, static_alpha=[0.3, 0.0])
    calibration = FusionCalibration(fused, [1.0])
    calibration.update(fused, IDS, LABELS, MASK)
    first = calibration.compute()[0]
    assert first.candidate.static_alpha == (0.3, 0.0)
    scores = fused.score(IDS, LABELS, MASK)
    assert first.nll == pytest.approx(-float(scores.log_probs[scores.trace.mask].mean()), abs=1e-5)


def test_models_read_a_batch_once_however_many_candidates_there_are():
    fused, counts = FusedCausalLM(*MODELS), [0] * 4
    for index, model in enumerate(fused.models):

        def count(*_, index=index):
            counts[index] += 1

        model.register_forward_hook(count)
    calibration = FusionCalibration(fused, [0.0, 0.5, 1.0])
    calibration.update(fused, IDS, LABELS, MASK)
    for model in fused.models:
        model._forward_hooks.clear()
    assert len(calibration.candidates) > 8
    assert counts == [1] * 4


@pytest.mark.parametrize("grid", [[], [-1.0], [float("inf")]])
def test_a_grid_that_cannot_be_is_refused(grid):
    with pytest.raises(ValueError, match="Expected `scale_grid` to hold finite numbers"):
        FusionCalibration(FusedCausalLM(*MODELS), grid)


def test_texts_are_refused_as_scores_refuse_them():
    fused = FusedCausalLM(*MODELS)
    calibration = FusionCalibration(fused, [0.5])
    with pytest.raises(ValueError, match=r"Expected `labels` of the shape of `input_ids`, \(3, 9\), but got \(3, 8\)"):
        calibration.update(fused, IDS, LABELS[:, 1:], MASK)
    with pytest.raises(ValueError, match=r"Expected `labels` to be in \[0, 40\) or -100"):
        calibration.update(fused, IDS, LABELS.clamp(min=VOCAB), MASK)


def test_a_model_that_emits_nan_is_named_with_fixed_weights_too():
    broken = llama(5)
    broken.lm_head.weight.data.fill_(float("nan"))
    fused = FusedCausalLM(*MODELS[:2], [MODELS[2][0], broken], expert_names=["good", "bad"])
    calibration = FusionCalibration(fused, [1.0], [FusionCandidate(None, static_alpha=(1.0, 0.0))])
    with pytest.raises(ValueError, match="Expected the expert 'bad' to emit logits that are finite"):
        calibration.update(fused, IDS, LABELS, MASK)


def test_candidates_that_are_given_are_the_only_ones():
    fused = FusedCausalLM(*MODELS)
    chosen = [FusionCandidate("equal", 0.5), FusionCandidate(None, static_alpha=(1.0, 0.0))]
    some, every = FusionCalibration(fused, [0.5, 1.0], [*chosen, chosen[0]]), FusionCalibration(fused, [0.5, 1.0])
    for calibration in (some, every):
        calibration.update(fused, IDS, LABELS, MASK)
    first, second = some.compute()
    assert [first.candidate, second.candidate] == chosen
    assert first in every.compute()
    scores = FusedCausalLM(*MODELS, static_alpha=[1.0, 0.0]).score(IDS, LABELS, MASK)
    assert second.nll == pytest.approx(-float(scores.log_probs[scores.trace.mask].mean()), abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_those_of_fused_logits_also_of_tokens_that_a_model_rules_out(dtype):
    generator = torch.Generator().manual_seed(0)
    large, base = torch.randn(2, 6, 12, generator=generator).to(dtype)
    experts = torch.randn(3, 6, 12, generator=generator).to(dtype)
    large[0, 0] = base[1, 1] = base[2, 2] = experts[0, 2, 2] = experts[1, 3, 3] = experts[2, 4, 4] = -torch.inf
    labels = torch.tensor([1, 1, 2, 3, 4, 0])
    weights = [
        torch.zeros(3, 6),
        torch.rand(3, 6, generator=generator),
        torch.tensor([0.0, 2.0, 0.0])[:, None].expand(3, 6),
    ]
    found = fused_log_probs(large, base, experts, labels, weights)
    for alpha, log_probs in zip(weights, found, strict=True):
        expected = fuse_logits(large, base, experts, alpha).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected)
    with pytest.raises(ValueError, match=r"Expected `alpha` of shape \(3, 6\), but got \(3, 1\)"):
        fused_log_probs(large, base, experts, labels, [torch.ones(3, 1)])
    assert found[1, 3] == -torch.inf
    assert found.isfinite().sum() == found.numel() - 3


def test_candidates_that_choose_an_expert_themselves_are_refused_where_texts_do():
    fused = FusedCausalLM(*MODELS, routing="text")
    with pytest.raises(ValueError, match="Expected candidates without the criterion 'prompt' with routing='text'"):
        FusionCalibration(fused, [1.0], [FusionCandidate("prompt")])
