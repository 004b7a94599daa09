"""Residual product codes: the fit, the packed mapping, and the losses."""

import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vq_problems import correlated

from lit_logits.contracts import Calibration, OutputLayer
from lit_logits.functional import (
    DenseTarget,
    decode_rows,
    fit_residual_codes,
    metric_matrix,
    pack_bits,
    residual_vq_logits,
    residual_vq_losses,
    scatter_code_logits,
    stage_codes,
    stages_by_rank,
    stages_for_bytes,
    unpack_bits,
    weighted_kmeans,
)
from lit_logits.modules import ResidualVQLogitsHead, VQLogitsHead
from lit_logits.modules.vq_logits.fit import fit_output_layer

residual_module = importlib.import_module("lit_logits.functional.residual_vq")


def make_codes(vocab_size=101, groups=3, codes=7, width=2, max_stages=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    token_stages = torch.randint(1, max_stages + 1, (vocab_size,), generator=generator)
    token_stages[5] = max_stages
    mapping = torch.randint(codes, (int(token_stages.sum()) * groups,), generator=generator)
    codebooks = torch.randn(max_stages, groups, codes, width, dtype=dtype, generator=generator)
    return codebooks, token_stages, mapping


def rows_by_loop(codebooks, token_stages, mapping):
    """Rows from the definition, a token, a stage and a group at a time."""
    groups, width = codebooks.shape[1], codebooks.shape[3]
    rows, position = torch.zeros(len(token_stages), groups * width, dtype=codebooks.dtype), 0
    for stage in range(codebooks.shape[0]):
        for token in range(len(token_stages)):
            if token_stages[token] <= stage:
                continue
            for group in range(groups):
                rows[token, group * width : (group + 1) * width] += codebooks[stage, group, mapping[position]]
                position += 1
    return rows


# --- the mapping ---


@given(st.integers(1, 20), st.lists(st.integers(0, 2**20 - 1), max_size=40))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_value_in_as_few_bytes_as_it_takes(num_bits, values):
    values = torch.tensor([value % 2**num_bits for value in values], dtype=torch.long)
    packed = pack_bits(values, num_bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(len(values) * num_bits / 8)
    assert torch.equal(unpack_bits(packed, num_bits, len(values)).long(), values)


def test_packing_in_chunks_is_packing_as_a_whole(monkeypatch):
    values = torch.randint(2**11, (1003,))
    whole = pack_bits(values, 11)
    monkeypatch.setattr("lit_logits.functional.bit_packing._PACK_CHUNK", 64)
    assert torch.equal(pack_bits(values, 11), whole)
    assert torch.equal(unpack_bits(whole, 11, 1003).long(), values)
    with pytest.raises(ValueError, match="Expected 1380 bytes for 1003 values of 11 bits, but got 1379"):
        unpack_bits(whole[:-1], 11, 1003)


def test_tiers_follow_the_frequency_rank():
    counts = torch.tensor([1.0, 50.0, 3.0, 3.0, 0.0])
    assert stages_by_rank(counts, 2).tolist() == [2, 2, 2, 2, 2]
    assert stages_by_rank(counts, {1: 5, 3: 2, 4: 1}).tolist() == [1, 5, 2, 2, 1]
    for wrong in (0, {}, {2: 1, 5: 3}, {2: 0}):
        with pytest.raises(ValueError, match="num_stages"):
            stages_by_rank(counts, wrong)


def test_a_budget_buys_the_stages_that_are_worth_most():
    """Against all tierings of six tokens: none within the budget has a smaller expected error."""
    weights, options = torch.tensor([40.0, 1.0, 9.0, 9.0, 0.5, 3.0]), {"codebook_size": 4, "num_groups": 2, "width": 2}
    left = 4 ** (-2 / 2)

    def error(stages):
        return sum(float(w) * left**s for w, s in zip(weights, stages, strict=True))

    for budget in (5, 7, 8, 9):
        ours = stages_for_bytes(weights, budget, max_stages=3, **options).tolist()
        affordable = [s for s in itertools.product((1, 2, 3), repeat=6) if math.ceil(sum(s) * 4 / 8) + 2 <= budget]
        assert tuple(ours) in affordable
        assert error(ours) == pytest.approx(min(error(s) for s in affordable))
    with pytest.raises(ValueError, match="Expected a budget of at least 5 bytes for the mapping"):
        stages_for_bytes(weights, 4, max_stages=3, **options)


def test_rows_and_logits_are_those_of_the_definition(monkeypatch):
    codebooks, token_stages, mapping = make_codes()
    rows = rows_by_loop(codebooks, token_stages, mapping)
    stages = stage_codes(token_stages, mapping, 3)
    torch.testing.assert_close(decode_rows(codebooks, stages, 101), rows)
    torch.testing.assert_close(decode_rows(codebooks, stages, 101, 17, 40), rows[17:40])
    hidden, bias = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(101, dtype=torch.float64)
    monkeypatch.setattr(residual_module, "_CHUNK_ELEMENTS", 100)
    torch.testing.assert_close(residual_vq_logits(hidden, codebooks, stages, 101, bias), hidden @ rows.T + bias)


def test_one_stage_of_one_group_is_the_papers_head():
    codebook, mapping = torch.randn(7, 6), torch.randint(7, (31,))
    stages = stage_codes(torch.ones(31, dtype=torch.long), mapping, 1)
    hidden = torch.randn(4, 6)
    expected = scatter_code_logits(hidden @ codebook.T, mapping)
    torch.testing.assert_close(residual_vq_logits(hidden, codebook[None, None], stages, 31), expected)


# --- losses ---


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_target", [True, False])
def test_losses_and_gradients_are_those_of_the_dense_layer(monkeypatch, with_bias, with_target):
    codebooks, token_stages, mapping = make_codes()
    stages = stage_codes(token_stages, mapping, 3)
    hidden = torch.randn(2, 13, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(101, dtype=torch.float64, requires_grad=True) if with_bias else None
    target = DenseTarget(*(torch.randn(*shape, dtype=torch.float64) for shape in ((2, 13, 9), (101, 9), (101,))))
    target = target if with_target else None
    labels = torch.randint(101, (2, 13)).masked_fill(torch.rand(2, 13) < 0.2, -100)
    leaves = [hidden, codebooks.requires_grad_(), *([bias] if bias is not None else [])]
    weights = torch.randn(2, 2, 13, dtype=torch.float64)

    monkeypatch.setattr(residual_module, "_CHUNK_ELEMENTS", 400)  # several chunks of the vocabulary
    losses = residual_vq_losses(hidden, codebooks, stages, labels, token_bias=bias, target=target)
    ours = torch.autograd.grad((losses.cross_entropy * weights[0] + losses.divergence * weights[1]).sum(), leaves)

    logits = hidden @ rows_by_loop(codebooks, token_stages, mapping).T + (0 if bias is None else bias)
    counted = labels != -100
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 13)
    kl = torch.zeros_like(ce)
    if target is not None:
        theirs = (target.hidden @ target.weight.T + target.bias).log_softmax(-1)
        kl = F.kl_div(logits.log_softmax(-1), theirs, log_target=True, reduction="none").sum(-1) * counted
        expected = F.nll_loss(theirs.flatten(0, 1), labels.flatten(), reduction="none").view(2, 13)
        torch.testing.assert_close(losses.target_cross_entropy, expected)
    torch.testing.assert_close(losses.cross_entropy, ce)
    torch.testing.assert_close(losses.divergence, kl)
    dense = torch.autograd.grad((ce * weights[0] + kl * weights[1]).sum(), leaves)
    for one, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(one, other)


def test_divergence_from_itself_is_zero():
    codebooks, token_stages, mapping = make_codes(dtype=torch.float32)
    stages = stage_codes(token_stages, mapping, 3)
    hidden, labels = torch.randn(9, 6), torch.arange(9)
    target = DenseTarget(hidden, decode_rows(codebooks, stages, 101))
    losses = residual_vq_losses(hidden, codebooks, stages, labels, target=target)
    assert losses.divergence.abs().max() < 1e-5
    torch.testing.assert_close(losses.cross_entropy, losses.target_cross_entropy)


def test_nothing_of_the_size_of_the_logits_or_of_the_dense_weight_is_made(monkeypatch):
    """The largest tensor of forward and backward, watched in the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.size = max(self.size, tensor.numel())
            return result

    monkeypatch.setattr(residual_module, "_CHUNK_ELEMENTS", 4096)
    codebooks, token_stages, mapping = make_codes(vocab_size=4001, groups=8, width=4, dtype=torch.float32)
    codebooks.requires_grad_()
    hidden, labels = torch.randn(64, 32, requires_grad=True), torch.randint(4001, (64,))
    target = DenseTarget(torch.randn(64, 32), torch.randn(4001, 32))
    stages = stage_codes(token_stages, mapping, 8)
    with Largest() as largest:
        losses = residual_vq_losses(hidden, codebooks, stages, labels, target=target)
        (losses.cross_entropy + losses.divergence).sum().backward()
    assert largest.size < 3 * 4096 < 4001 * 32  # a chunk, with the codes of its rows


def test_ignored_labels_alone_give_zeros_with_a_graph():
    codebooks, token_stages, mapping = make_codes(dtype=torch.float32)
    hidden = torch.randn(3, 6, requires_grad=True)
    losses = residual_vq_losses(hidden, codebooks, stage_codes(token_stages, mapping, 3), torch.full((3,), -100))
    losses.cross_entropy.sum().backward()
    assert not losses.cross_entropy.any()
    assert not hidden.grad.any()


def test_losses_refuse_what_does_not_fit():
    codebooks, token_stages, mapping = make_codes(dtype=torch.float32)
    stages, hidden = stage_codes(token_stages, mapping, 3), torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"Expected `labels` to have shape \(3,\)"):
        residual_vq_losses(hidden, codebooks, stages, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="101"):
        residual_vq_losses(hidden, codebooks, stages, torch.tensor([0, 1, 101]))
    target = DenseTarget(torch.zeros(3, 6), torch.zeros(100, 6))
    with pytest.raises(ValueError, match=r"Expected a target of hidden states \(3,\) and 101 rows"):
        residual_vq_losses(hidden, codebooks, stages, torch.zeros(3, dtype=torch.long), target=target)


# --- the fit ---


def logit_error(weight, rows, moment, weights):
    delta = (weight - rows).double()
    return float((weights * ((delta @ moment.double()) * delta).sum(1)).sum() / weights.sum())


def fitted_rows(fit, num_groups):
    return decode_rows(fit.codebooks, stage_codes(fit.token_stages, fit.codes, num_groups), len(fit.token_stages))


def test_the_error_that_is_reported_is_the_error():
    weight, moment, counts = correlated()
    metric = metric_matrix(moment, "full", 4)
    fit = fit_residual_codes(
        weight,
        16,
        num_groups=4,
        token_stages=stages_by_rank(counts, {50: 3, 400: 1}),
        token_weights=counts,
        metric=metric,
    )
    assert float(fit.error) == pytest.approx(logit_error(weight, fitted_rows(fit, 4), metric, counts), rel=1e-4)


def test_a_fuller_metric_leaves_less_error_and_so_do_more_stages_and_sweeps():
    weight, moment, counts = correlated()
    ones = torch.ones(400, dtype=torch.long)

    def error(kind="full", stages=ones, **options):
        generator = torch.Generator().manual_seed(0)
        metric = metric_matrix(moment, kind, 4)
        fit = fit_residual_codes(
            weight,
            16,
            num_groups=4,
            token_stages=stages,
            token_weights=counts,
            metric=metric,
            generator=generator,
            **options,
        )
        return logit_error(weight, fitted_rows(fit, 4), moment, counts)

    assert error("full") < 0.8 * error("block") < 0.8 * error("identity")
    assert error("full", num_sweeps=3) < error("full", num_sweeps=0)
    assert error(stages=2 * ones) < 0.5 * error(stages=stages_by_rank(counts, {50: 2, 400: 1})) < 0.5 * error()


def test_more_sweeps_are_an_argument_of_everything_that_fits():
    """The default of 2 could not be changed from outside."""
    weight, moment, counts = correlated()
    options = {"codebook_size": 16, "num_groups": 4, "token_counts": counts, "hidden_second_moment": moment}

    def error(rows):
        return logit_error(weight, rows.detach(), moment, counts.pow(0.75))

    def rng():
        return torch.Generator().manual_seed(0)

    few, many = (fit_output_layer(weight, **options, num_sweeps=n, generator=rng()) for n in (2, 16))
    assert float(many.error) < 0.995 * float(few.error)
    assert torch.equal(fit_output_layer(weight, **options, generator=rng()).codes, few.codes)
    head = VQLogitsHead.from_dense(weight, **options, num_sweeps=16, generator=rng())
    assert error(head.dense_weight()) == pytest.approx(error(fitted_rows(many, 4)), rel=1e-5)
    started = []
    for num_sweeps in (0, 16):
        torch.manual_seed(0)
        own = ResidualVQLogitsHead(16, 400, 16, num_groups=4, num_sweeps=num_sweeps)
        own.start(lambda **_: Calibration(counts, moment), OutputLayer(weight, None))
        started.append(error(own.dense_weight()))
    assert started[1] < 0.95 * started[0]
    with pytest.raises(ValueError, match="Expected `num_sweeps` to be non-negative, but got -1"):
        ResidualVQLogitsHead(16, 400, 16, num_groups=4, num_sweeps=-1)
    with pytest.raises(ValueError, match="Expected `num_sweeps` to be non-negative, but got -1"):
        fit_output_layer(weight, **options, num_sweeps=-1)


def test_error_feedback_is_no_worse_than_fitting_in_the_rotated_space():
    """A head that projects h by the root of H could fit all groups alone; ours needs no projection."""
    weight, moment, counts = correlated()
    metric = metric_matrix(moment, "full", 4)
    root = torch.linalg.cholesky(metric).float()
    options = {"num_groups": 4, "token_stages": torch.ones(400, dtype=torch.long), "token_weights": counts}
    rotated = fit_residual_codes(weight @ root, 16, **options)
    ours = fit_residual_codes(weight, 16, metric=metric, **options)
    assert float(ours.error) < 1.02 * float(rotated.error)


def test_one_group_is_weighted_kmeans():
    weight, moment, counts = correlated()
    fit = fit_residual_codes(
        weight,
        20,
        num_groups=1,
        token_stages=torch.ones(400, dtype=torch.long),
        token_weights=counts.clamp(min=0.5).pow(0.75),
        metric=metric_matrix(moment, "full", 1),
        generator=torch.Generator().manual_seed(0),
    )
    peer = weighted_kmeans(
        weight, 20, token_counts=counts, hidden_second_moment=moment, generator=torch.Generator().manual_seed(0)
    )
    weights = counts.clamp(min=0.5).pow(0.75)
    theirs = logit_error(weight, peer.centroids[peer.assignments], moment, weights)
    assert logit_error(weight, fitted_rows(fit, 1), moment, weights) < 1.05 * theirs


def test_as_many_codes_as_tokens_keep_every_row():
    weight, moment, _ = correlated(vocab_size=12, size=8)
    fit = fit_residual_codes(
        weight, 12, num_groups=2, token_stages=torch.ones(12, dtype=torch.long), metric=metric_matrix(moment, "full", 2)
    )
    torch.testing.assert_close(fitted_rows(fit, 2), weight, atol=1e-4, rtol=1e-4)


def test_a_stage_of_fewer_tokens_than_codes_is_fitted():
    weight, _, _ = correlated(vocab_size=40, size=8)
    stages = torch.ones(40, dtype=torch.long)
    stages[[3, 7, 11]] = 2
    fit = fit_residual_codes(weight, 16, num_groups=2, token_stages=stages)
    torch.testing.assert_close(fitted_rows(fit, 2)[[3, 7, 11]], weight[[3, 7, 11]], atol=1e-4, rtol=1e-4)


def test_the_fit_refuses_what_does_not_fit():
    weight, ones = torch.randn(10, 6), torch.ones(10, dtype=torch.long)
    for options, message in (
        ({"num_groups": 4, "token_stages": ones}, "Expected `num_groups` to divide the hidden size 6, but got 4"),
        ({"num_groups": 2, "token_stages": ones[:9]}, "Expected `token_stages` to hold one number for each of the 10"),
        ({"num_groups": 2, "token_stages": 0 * ones}, "at least one stage"),
        ({"num_groups": 2, "token_stages": ones, "metric": -torch.eye(6)}, "positive definite"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_residual_codes(weight, 4, **options)
    with pytest.raises(ValueError, match=r"Expected `codebook_size` to be in \[1, 10\]"):
        fit_residual_codes(weight, 11, num_groups=2, token_stages=ones)
    with pytest.raises(ValueError, match="'identity', 'diagonal', 'block' or 'full', but got 'half'"):
        metric_matrix(torch.eye(6), "half", 2)
