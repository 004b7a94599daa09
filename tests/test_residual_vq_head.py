"""`ResidualVQLogitsHead`: its methods against its dense rows, budgets, state dicts and the fit from a dense layer."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from vq_problems import correlated

from lit_logits.modules import ResidualVQLogitsHead, VQLogitsHead
from lit_logits.modules.vq_logits.fit import fit_output_layer

residual_module = importlib.import_module("lit_logits.functional.residual_vq")


@pytest.fixture
def head():
    weight, moment, counts = correlated()
    return VQLogitsHead.from_dense(
        weight,
        codebook_size=16,
        num_groups=4,
        num_stages={50: 3, 400: 1},
        token_counts=counts,
        hidden_second_moment=moment,
        bias=torch.randn(400),
    )


def test_the_head_is_its_dense_weight_in_every_method(head):
    hidden, labels = torch.randn(2, 9, 16), torch.randint(400, (2, 9))
    labels[0, 0] = -100
    logits = hidden @ head.dense_weight().T + head.token_bias
    torch.testing.assert_close(head(hidden), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(head.loss(hidden, labels), expected)
    assert torch.equal(head.greedy(hidden), logits.argmax(-1))
    drawn = head.sample(hidden[:1, :1].expand(1, 4000, 16), generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten(), minlength=400) / 4000
    assert (shares - logits[0, 0].softmax(-1)).abs().max() < 0.04
    with pytest.raises(ValueError, match="temperature"):
        head.sample(hidden, temperature=0)


def test_from_dense_keeps_the_bias_and_comes_near_the_layer():
    weight, moment, counts = correlated()
    hidden = torch.randn(200, 16) @ torch.linalg.cholesky(moment + 1e-4 * torch.eye(16)).T
    bias = torch.randn(400)
    options = {
        "codebook_size": 64,
        "num_groups": 8,
        "token_counts": counts,
        "hidden_second_moment": moment,
        "bias": bias,
    }
    head = VQLogitsHead.from_dense(weight, num_stages=3, **options)
    exact = F.linear(hidden, weight, bias)
    assert (head(hidden) - exact).std() < 0.05 * exact.std()
    assert torch.equal(head.token_bias, bias)


def test_one_group_and_one_stage_give_the_papers_head():
    weight, moment, counts = correlated()
    head = VQLogitsHead.from_dense(
        weight, codebook_size=64, num_groups=1, token_counts=counts, hidden_second_moment=moment
    )
    assert type(head) is VQLogitsHead
    assert head.token_bias is not None
    assert head(torch.randn(3, 16)).shape == (3, 400)
    assert VQLogitsHead.from_dense(weight, codebook_size=64, num_groups=1).token_bias is None


def test_a_byte_budget_is_kept_and_used():
    weight, moment, counts = correlated()
    for budget in (0.4, 0.5, 0.6):
        head = VQLogitsHead.from_dense(
            weight,
            codebook_size=16,
            num_groups=8,
            num_stages=4,
            byte_budget=budget,
            token_counts=counts,
            hidden_second_moment=moment,
        ).bfloat16()
        size = head.footprint()
        assert budget - 0.03 < size.bytes / size.dense_bytes <= budget
    with pytest.raises(ValueError, match="Expected a budget of at least"):
        VQLogitsHead.from_dense(weight, codebook_size=16, num_groups=8, num_stages=4, byte_budget=0.15)
    with pytest.raises(ValueError, match=r"share in \(0, 1\], but got 12"):
        VQLogitsHead.from_dense(weight, codebook_size=16, num_groups=8, num_stages=4, byte_budget=12)


def test_smoothing_spreads_a_share_of_the_weights_evenly():
    weight, moment, counts = correlated()
    shared = {
        "codebook_size": 16,
        "num_groups": 4,
        "byte_budget": 0.4,
        "hidden_second_moment": moment,
        "count_power": 1.0,
    }
    fit = partial(fit_output_layer, weight, **shared)
    smooth = fit(token_counts=counts, smoothing=0.3, generator=torch.Generator().manual_seed(0))
    mixed = 0.7 * counts.clamp(min=float(counts[counts > 0].min()) / 2)
    mixed = mixed + 0.3 / 0.7 * mixed.mean()
    by_hand = fit(token_counts=mixed, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(smooth.token_stages, by_hand.token_stages)
    assert float(smooth.error) == pytest.approx(float(by_hand.error), rel=0.02)  # rounding may move a code
    unsmoothed = fit(token_counts=counts, generator=torch.Generator().manual_seed(0)).token_stages
    even = fit(token_counts=counts, smoothing=1.0, generator=torch.Generator().manual_seed(0)).token_stages
    rare = counts.argsort()[:200]
    found = [int(stages[rare].sum()) for stages in (unsmoothed, smooth.token_stages, even)]
    assert found[0] < found[1] < found[2]
    assert even.max() - even.min() <= 1
    head = VQLogitsHead.from_dense(weight, token_counts=counts, smoothing=0.3, **shared)
    sizes = [int((smooth.token_stages > stage).sum()) for stage in range(int(smooth.token_stages.max()))]
    assert [len(stage.codes) for stage in head.stages()] == sizes
    for make in (partial(fit_output_layer, weight), partial(ResidualVQLogitsHead, 16, 400)):
        with pytest.raises(ValueError, match=r"Expected `smoothing` to be a share in \[0, 1\], but got 1.5"):
            make(codebook_size=16, num_groups=4, smoothing=1.5)


def test_the_footprint_is_what_a_saved_head_takes(head):
    stored = sum(tensor.numel() * tensor.element_size() for tensor in head.state_dict().values())
    size = head.footprint()
    assert size.bytes == stored
    assert size.parameters == 3 * 16 * 16 + 400
    assert head.packed_codes.numel() == (400 + 50 + 50) * 4 * 4 // 8
    assert head.packed_stages.numel() == 400 * 2 // 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_counts": torch.ones(399)}, "Expected `token_counts` to hold one count for each of the 400 rows"),
        ({"token_counts": torch.full((400,), torch.nan)}, "token_counts"),
        ({"token_counts": -torch.ones(400)}, "Expected `token_counts` to be non-negative, but the least is -1"),
        ({"hidden_second_moment": -torch.eye(16)}, "positive definite"),
        ({"num_stages": {"50": 2, "400": 1}}, "to be integers"),
        ({"hidden_second_moment": torch.eye(15)}, r"Expected `hidden_second_moment` to be \(16, 16\)"),
        ({"hidden_second_moment": torch.full((16, 16), torch.inf)}, "hidden_second_moment"),
        ({"num_groups": 5}, "Expected `num_groups` to divide the hidden size 16, but got 5"),
        ({"codebook_size": 401}, r"Expected `codebook_size` to be in \[1, 400\]"),
    ],
)
def test_from_dense_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        VQLogitsHead.from_dense(torch.randn(400, 16), **{"codebook_size": 16, "num_groups": 4, **options})


def test_a_state_dict_brings_its_own_tiers(head):
    other = ResidualVQLogitsHead(16, 400, 16, num_groups=4, token_stages=3, bias=True)
    other.load_state_dict(head.state_dict())
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(other(hidden), head(hidden))
    with pytest.raises(ValueError, match=r"Expected a checkpoint with codebooks \(stages, groups, codes, width\)"):
        ResidualVQLogitsHead(16, 400, 16, num_groups=8, token_stages=3, bias=True).load_state_dict(head.state_dict())


def test_damaged_codes_are_refused(head):
    head.packed_codes = head.packed_codes[:-1].clone()
    with pytest.raises(ValueError, match="the mapping is cut off or another head's"):
        head(torch.randn(1, 16))
    foreign = ResidualVQLogitsHead(16, 400, 9, num_groups=4)
    foreign.packed_codes.fill_(255)
    with pytest.raises(ValueError, match=r"Expected codes in \[0, 9\), but the largest is 15"):
        foreign(torch.randn(1, 16))


def test_codes_that_do_not_fit_are_refused_before_any_is_written(head):
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    ones = torch.ones(400, dtype=torch.long)
    for codes, stages in ((torch.full((1600,), 16), ones), (torch.zeros(1599), ones), (torch.zeros(1600), 0 * ones)):
        with pytest.raises(ValueError, match="Expected"):
            head.set_codes(torch.zeros(3, 4, 16, 4), codes.long(), stages)
    with pytest.raises(ValueError, match="codebook"):
        head.set_codes(torch.full((3, 4, 16, 4), torch.nan), torch.zeros(1600, dtype=torch.long), ones)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_unpacked_codes_are_renewed_when_they_change(head):
    hidden = torch.randn(2, 16)
    before = head(hidden)
    codes = torch.zeros(1600, dtype=torch.long)
    head.set_codes(head.codebook.detach().clone(), codes, torch.ones(400, dtype=torch.long))
    rows = head.codebook[0, :, 0].flatten().expand(400, 16)
    torch.testing.assert_close(head(hidden), hidden @ rows.T + head.token_bias)
    assert not torch.allclose(head(hidden), before)


def test_decoding_looks_up_what_training_multiplies(head):
    hidden, many = torch.randn(2, 3, 16), torch.randn(300, 16)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), hidden @ head.dense_weight().T + head.token_bias)
        torch.testing.assert_close(head(many), many @ head.dense_weight().T + head.token_bias)
        for _ in range(2):  # tables follow what an optimizer writes in place
            head.codebook.mul_(1.5)
            head.token_bias.add_(torch.randn(400))
            logits = hidden @ head.dense_weight().T + head.token_bias
            torch.testing.assert_close(head(hidden), logits)
            assert torch.equal(head.greedy(hidden), logits.argmax(-1))
        half = head.bfloat16()
        assert half(hidden.bfloat16()).dtype == torch.bfloat16
    assert head(hidden.bfloat16()).requires_grad


def test_a_stage_that_nobody_owns_is_left_out_in_decoding():
    head = ResidualVQLogitsHead(16, 40, 8, num_groups=4, token_stages=1, num_stages=3)
    hidden = torch.randn(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), hidden @ head.dense_weight().T)


def test_a_bias_that_is_trained_alone_gets_its_gradient(head):
    head.codebook.requires_grad_(False)
    head(torch.randn(2, 16)).sum().backward()
    assert (head.token_bias.grad == 2).all()


def test_a_parameter_is_fitted_without_a_graph():
    weight, moment, counts = correlated()
    weight = torch.nn.Parameter(weight)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        VQLogitsHead.from_dense(
            weight,
            codebook_size=16,
            num_groups=4,
            token_counts=counts,
            hidden_second_moment=moment,
            bias=torch.nn.Parameter(torch.zeros(400)),
        )
    assert not kept


@pytest.mark.parametrize("groups", [1, 4])
def test_a_head_of_half_precision_has_it_in_all_its_ways(groups):
    weight, moment, counts = correlated()
    head = VQLogitsHead.from_dense(
        weight.bfloat16(), codebook_size=16, num_groups=groups, token_counts=counts, hidden_second_moment=moment
    )
    assert head.codebook.dtype == torch.bfloat16
    hidden = torch.randn(300, 16).bfloat16()
    expected = hidden.float() @ head.dense_weight().float().T
    expected = expected if head.token_bias is None else expected + head.token_bias.float()
    for few in (hidden[:3], hidden):
        torch.testing.assert_close(head(few).float(), expected[: len(few)], rtol=0.05, atol=0.2)
        with torch.no_grad():
            torch.testing.assert_close(head(few).float(), expected[: len(few)], rtol=0.05, atol=0.2)
        assert head.greedy(few).shape == (len(few),)


def test_greedy_of_many_rows_goes_through_the_vocabulary_in_chunks(head, monkeypatch):
    monkeypatch.setattr(residual_module, "_CHUNK_ELEMENTS", 500)
    hidden = torch.randn(300, 16)
    logits = hidden @ head.dense_weight().T + head.token_bias
    assert torch.equal(head.greedy(hidden), logits.argmax(-1))
    with torch.no_grad():
        head.codebook.zero_()
        head.token_bias.zero_()
    assert not head.greedy(hidden).any()  # all alike: the lowest id


def test_codes_set_twice_are_those_of_the_second_time(head):
    """The addresses of buffers that are gone are given out again."""
    ones, codebook, hidden = torch.ones(400, dtype=torch.long), head.codebook.detach().clone(), torch.randn(2, 16)
    for code in range(8):
        for _ in range(2):
            head.set_codes(codebook, torch.full((1600,), code), ones)
        rows = codebook[0, :, code].flatten().expand(400, 16)
        torch.testing.assert_close(head(hidden), hidden @ rows.T + head.token_bias)


def test_a_budget_alone_buys_stages():
    weight, _, counts = correlated()
    head = VQLogitsHead.from_dense(weight, codebook_size=16, num_groups=8, byte_budget=0.5, token_counts=counts)
    assert 1 < head.num_stages <= 5
    with pytest.raises(ValueError, match="chooses the tiers"):
        VQLogitsHead.from_dense(weight, codebook_size=16, num_groups=8, byte_budget=0.5, num_stages={10: 2, 400: 1})


def test_a_head_is_made_under_a_meta_device_and_copied():
    with torch.device("meta"):
        assert ResidualVQLogitsHead(8, 40, 8, num_groups=2, token_stages=2).packed_codes.is_meta
