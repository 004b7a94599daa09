"""`VQLogitsHead` and the dense baseline: training, state, decoding tables, revived codes, and what is refused.

Letters: D hidden size, V vocabulary, K codes.
"""

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from vq_problems import D, K, V, dense_loss, problem

from lit_logits.functional import ppl_floor, scatter_code_logits, vq_cross_entropy
from lit_logits.modules import DenseLogitsHead, VQLogitsHead

# ---------------------------------------------------------------------- the head

COMBINATIONS = list(product(["fixed", "learned", "reassigned"], ["gradient", "ema"]))


def make_head(mapping="fixed", codebook_update="gradient", seed=0, **kwargs):
    torch.manual_seed(seed)
    defaults = {"reassign_every_n_steps": 2, "decay": 0.9, "usage_decay": 0.9}
    head = VQLogitsHead(D, V, K, mapping=mapping, codebook_update=codebook_update, **{**defaults, **kwargs})
    table = torch.nn.Embedding(V + 2, D)
    head.bind_token_table(table)
    return head, table


def train_head(head, steps, optimizer=None, start=0):
    optimizer = optimizer or torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=0.05)
    for step in range(start, start + steps):
        hidden, _, _, labels, _ = problem(100 + step, dtype=torch.float32)
        optimizer.zero_grad()
        (head.loss(hidden, labels) + 0.25 * head.commitment_loss()).backward()
        optimizer.step()
        head.after_step()
    return optimizer


@pytest.mark.parametrize(("mapping", "update"), COMBINATIONS)
def test_head_trains_and_agrees_with_its_own_token_logits(mapping, update):
    head, _ = make_head(mapping, update)
    before = copy.deepcopy(head.state_dict())
    train_head(head, 6)
    after = head.state_dict()
    assert not torch.equal(before["codebook"], after["codebook"])
    assert torch.equal(before["token_to_code"], after["token_to_code"]) == (mapping == "fixed")
    hidden, _, _, labels, _ = problem(13, dtype=torch.float32)
    dense = dense_loss(hidden, head.dense_weight(), labels, head.token_bias)
    for mode in (head.train(), head.eval()):
        torch.testing.assert_close(mode.loss(hidden, labels), dense)
    torch.testing.assert_close(head(hidden), F.linear(hidden, head.dense_weight(), head.token_bias))
    assert torch.equal(head.greedy(hidden), head(hidden).argmax(-1))


@pytest.mark.parametrize(("mapping", "update"), COMBINATIONS)
def test_head_resumes_from_its_state(mapping, update):
    whole, _ = make_head(mapping, update)
    optimizer = train_head(whole, 3)
    resumed, _ = make_head(mapping, update)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    other = torch.optim.Adam([p for p in resumed.parameters() if p.requires_grad], lr=0.05)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_head(whole, 3, optimizer, start=3)
    train_head(resumed, 3, other, start=3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_running_counts_against_a_loop():
    head, _ = make_head()
    expected = [0.0] * V
    for seed in range(3):
        hidden, _, _, labels, _ = problem(seed, dtype=torch.float32, ignore_index=-7)
        head.loss(hidden, labels, ignore_index=-7)
        expected = [0.9 * count + (labels == v).sum().item() for v, count in enumerate(expected)]
    torch.testing.assert_close(head.token_counts, torch.tensor(expected))
    head.eval().loss(hidden, labels, ignore_index=-7)
    torch.testing.assert_close(head.token_counts, torch.tensor(expected))


def test_ema_codebook_against_a_loop():
    head, _ = make_head("fixed", "ema")
    codes = head.token_to_code.tolist()
    mass = [float(codes.count(k)) for k in range(K)]
    sums = [head.codebook[k].detach().clone() * mass[k] for k in range(K)]
    for _ in range(4):
        with torch.no_grad():
            head.latents.add_(torch.randn_like(head.latents))
        head.after_step()
        for k in range(K):
            mine = [head.latents[v].detach() for v in range(V) if codes[v] == k]
            mass[k] = 0.9 * mass[k] + 0.1 * len(mine)
            sums[k] = 0.9 * sums[k] + 0.1 * sum(mine)
            torch.testing.assert_close(head.codebook[k].detach(), sums[k] / mass[k])
    assert not head.codebook.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["cast", "default", "loaded", "assigned"])
def test_running_counts_and_sums_stay_float32(dtype, way):
    """In bfloat16 counts stopped at 256, which gave shares that were off by 38 %, and the EMA codebook failed."""
    whole, _ = make_head("fixed", "ema", decay=0.99, usage_decay=0.999)
    torch.set_default_dtype(dtype if way == "default" else torch.float32)
    try:
        head, _ = make_head("fixed", "ema", decay=0.99, usage_decay=0.999)
    finally:
        torch.set_default_dtype(torch.float32)
    head.load_state_dict(whole.state_dict())
    if way != "default":
        head.to(dtype)
    if way in ("loaded", "assigned"):
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in whole.state_dict().items()}
        head.load_state_dict(state, assign=way == "assigned")
    assert {name: b.dtype for name, b in head.named_buffers() if b.is_floating_point()} == dict.fromkeys(
        ("token_counts", "ema_sums", "ema_mass"), torch.float32
    )
    assert head.codebook.dtype == dtype
    for seed in range(30):
        hidden, _, _, labels, _ = problem(seed, dtype=torch.float32)
        for one in (whole, head):
            one.loss(hidden.to(one.codebook.dtype), labels)
            one.after_step()
    torch.testing.assert_close(head.token_counts, whole.token_counts)
    torch.testing.assert_close(head.usage(), whole.usage())
    torch.testing.assert_close(head.codebook.float(), whole.codebook, rtol=0.02, atol=1e-3)


def test_an_ema_codebook_in_float64():
    head, _ = make_head("fixed", "ema")
    head.double().after_step()
    assert head.ema_sums.dtype == head.codebook.dtype == torch.float64


def test_ema_forgets_a_revived_code():
    """Vector, sum and mass go together: an old running mean would pull the revived code back."""
    head, _ = make_head("fixed", "ema")
    head.set_codes(token_to_code=torch.arange(V) % (K - 1))  # the last code owns nothing
    train_head(head, 1)
    head.revive(head.dead_codes(), generator=torch.Generator().manual_seed(0))
    before = head.codebook.detach().clone()
    head.after_step()  # latents have not moved, so codes at the mean of their latents stay
    torch.testing.assert_close(head.codebook[K - 1].detach(), before[K - 1])


def test_learned_mapping_is_the_brute_force_nearest_code():
    head, _ = make_head("learned")
    with torch.no_grad():
        head.latents.normal_()
        head.codebook.normal_()
    head.after_step()
    before = head.token_to_code.clone()
    head.after_step()  # the second of two
    nearest = torch.cdist(head.latents.double(), head.codebook.double()).argmin(dim=1)
    assert torch.equal(head.token_to_code, nearest)
    assert not torch.equal(before, nearest)


def test_reassigned_mapping_is_one_step_of_k_means_on_the_table():
    head, table = make_head("reassigned")
    codes, rows = head.token_to_code.clone(), table.weight.detach()[:V]
    means = torch.stack([rows[codes == k].mean(0) for k in range(K)])
    head.after_step()
    assert torch.equal(head.token_to_code, codes)
    head.after_step()
    assert torch.equal(head.token_to_code, torch.cdist(rows, means).argmin(dim=1))
    assert not any("weight" in name for name in head.state_dict())  # the table stays its owner's
    lonely = VQLogitsHead(D, V, K, mapping="reassigned", reassign_every_n_steps=1)
    with pytest.raises(ValueError, match="bind_token_table"):
        lonely.after_step()


@pytest.mark.parametrize("change", ["step", "load", "set_codes", "mapping", "data", "deepcopy", "inference"])
def test_decoding_tables_are_never_stale(change):
    """A table kept from before an update would decode yesterday's model.

    `data`: some optimizers write through `parameter.data` or a raw pointer, which no version counter sees;
    `after_step` follows every optimizer step and must drop the tables.
    """
    head, _ = make_head("fixed" if change == "data" else "learned", reassign_every_n_steps=1)
    hidden = problem(14, dtype=torch.float32, n=200)[0].detach()
    with torch.inference_mode(change == "inference"):
        first, _ = head.greedy(hidden), head.sample(hidden)
    other, _ = make_head("learned", seed=1)
    train_head(other, 3)
    if change in ("step", "inference"):
        train_head(head, 4)
    elif change == "load":
        head.load_state_dict(other.state_dict())
    elif change == "set_codes":
        head.set_codes(token_bias=torch.randn(V))
    elif change == "mapping":
        with torch.no_grad():
            head.latents.normal_()
        head.after_step()
    elif change == "data":
        head.token_bias.data.normal_()
        head.after_step()
    else:
        head = copy.deepcopy(head)
        with torch.no_grad():
            head.token_bias.normal_()
    logits = head(hidden)
    assert not torch.equal(first, logits.argmax(-1))
    assert torch.equal(head.greedy(hidden), logits.argmax(-1))
    samples = head.sample(hidden[:1].expand(20_000, D), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.bincount(minlength=V) / 20_000, logits[0].softmax(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("min_usage", [0.0, 0.3])
def test_revival_keeps_what_living_codes_say(latent, min_usage):
    head, _ = make_head("learned" if latent else "fixed")
    counts = torch.full((V,), 4.0)
    mapping = torch.arange(V) % (K - 1)
    counts[mapping == 2] = 0.01  # rarely used, but not empty
    head.set_codes(torch.randn(K, D), mapping, token_counts=counts)
    dead = head.dead_codes(min_usage)
    assert dead.tolist() == ([K - 1] if min_usage == 0 else [2, K - 1])
    hidden = problem(15, dtype=torch.float32)[0].detach()
    before, stays = head(hidden), ~torch.isin(mapping, dead)
    changed = head.revive(dead, generator=torch.Generator().manual_seed(0))
    assert head.dead_codes().numel() == 0
    assert set(dead.tolist()) <= set(changed.tolist())
    if not latent:  # halved by mass; by vectors a light half may be the one that lowers the distortion most
        assert head.dead_codes(min_usage).numel() == 0
        torch.testing.assert_close(head(hidden)[:, stays], before[:, stays])  # rows of a product may differ in a bit
        assert changed.tolist() == dead.tolist()
    else:  # vectors sit at the mean of their tokens' latents, which is what keeps the tokens
        for code in changed.tolist():
            own = head.latents[head.token_to_code == code].detach()
            torch.testing.assert_close(head.codebook[code].detach(), own.mean(0))


def test_a_checkpoint_of_another_size_is_refused_in_words():
    head, _ = make_head()
    for other, what in ((VQLogitsHead(D, V + 1, K), "vocab_size"), (VQLogitsHead(D, V, K + 1), "codebook_size")):
        model = torch.nn.ModuleDict({"head": head})
        state = {f"head.{name}": tensor for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=rf"`{what}` {getattr(head, what)}, but this one has"):
            model.load_state_dict(state)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"codebook_size": 0}, "`codebook_size` to be in"),
        ({"codebook_size": V + 1}, "`codebook_size` to be in"),
        ({"mapping": "free"}, "`mapping` to be 'fixed', 'learned' or 'reassigned', but got 'free'"),
        ({"codebook_update": "sgd"}, "`codebook_update` to be"),
        ({"decay": 1.0}, "`decay` to be in"),
        ({"usage_decay": -0.1}, "`usage_decay` to be in"),
        ({"reassign_every_n_steps": 0}, "`reassign_every_n_steps` to be at least 1"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VQLogitsHead(D, V, **{"codebook_size": K, **kwargs})


def test_set_codes_writes_all_or_nothing():
    head, _ = make_head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    mapping = torch.zeros(V, dtype=torch.long)
    for wrong in ({"token_bias": torch.zeros(3)}, {"codebook": torch.full((K, D), math.nan)}):
        with pytest.raises(ValueError, match=r"Expected `(token_bias|codebook)` to"):
            head.set_codes(**{"codebook": torch.ones(K, D), **wrong}, token_to_code=mapping)
        assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    with pytest.raises(ValueError, match="integer codes"):
        head.set_codes(token_to_code=torch.ones(V, dtype=torch.bool))


def test_a_mapping_out_of_range_is_named_everywhere():
    hidden, codebook, labels = torch.zeros(2, D), torch.zeros(K, D), torch.zeros(2, dtype=torch.long)
    mapping = torch.zeros(V, dtype=torch.long)
    mapping[3] = K
    message = rf"codes in \[0, {K}\), but token 3 maps to {K}"
    for function in (
        lambda: vq_cross_entropy(hidden, codebook, mapping, labels),
        lambda: scatter_code_logits(hidden @ codebook.T, mapping),
        lambda: ppl_floor(torch.ones(V), mapping, K),
    ):
        with pytest.raises(ValueError, match=message):
            function()
    head, _ = make_head()
    with pytest.raises(ValueError, match=message):
        head.load_state_dict({**head.state_dict(), "token_to_code": mapping})


def test_set_codes_checks_what_it_gets():
    head, _ = make_head()
    with pytest.raises(ValueError, match="`codebook` to have shape"):
        head.set_codes(torch.zeros(K, D + 1))
    with pytest.raises(ValueError, match="codes in"):
        head.set_codes(token_to_code=torch.full((V,), K))
    with pytest.raises(ValueError, match="at least 23 rows"):
        head.bind_token_table(torch.nn.Embedding(V - 1, D))


def test_head_on_the_meta_device():
    """Large models are built there first; asking for the autocast of `meta` raised."""
    with torch.device("meta"):
        head = VQLogitsHead(D, V, K)
        assert head(torch.zeros(2, D)).shape == (2, V)


# ---------------------------------------------------------------------- the dense baseline


def test_dense_head_has_the_same_methods_with_the_same_meaning():
    torch.manual_seed(0)
    dense, vq = DenseLogitsHead(D, V), VQLogitsHead(D, V, V)
    with torch.no_grad():
        vq.codebook.normal_()
        vq.token_bias.normal_()
        dense.copy_output_layer(vq.dense_weight(), vq.token_bias)
    hidden, _, _, labels, _ = problem(16, dtype=torch.float32, n=36)
    hidden, labels = hidden.view(4, 9, D), labels.view(4, 9)
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            dense.loss(hidden, labels, reduction=reduction), vq.loss(hidden, labels, reduction=reduction)
        )
    assert torch.equal(dense.greedy(hidden), vq.greedy(hidden))
    assert dense.sample(hidden).shape == vq.sample(hidden).shape == (4, 9)
    assert dense.loss(hidden, torch.full_like(labels, -100)).item() == 0
    assert dense.footprint() == (V * D + V, 4 * (V * D + V), V * D, 4 * V * D)


@pytest.mark.parametrize("head", [DenseLogitsHead(D, V), VQLogitsHead(D, V, K)], ids=["dense", "vq"])
def test_both_heads_take_one_hidden_state_and_refuse_a_negative_temperature(head):
    assert head.sample(torch.randn(D)).shape == ()
    assert head.loss(torch.randn(D), torch.tensor(3)).isfinite()
    with pytest.raises(ValueError, match="temperature"):
        head.sample(torch.randn(2, D), temperature=-1.0)


def test_a_dense_checkpoint_of_another_vocabulary_is_refused_in_words():
    with pytest.raises(ValueError, match=f"with `vocab_size` {V}, but this one has {V + 1}. Use the tokenizer"):
        DenseLogitsHead(D, V).load_state_dict(DenseLogitsHead(D, V + 1).state_dict())
