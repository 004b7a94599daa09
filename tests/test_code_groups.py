"""Two levels of codes in groups of dimensions: the same head with more codes to a token.

Letters: d hidden size, V vocabulary, G groups, S stages.
"""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_logits import VQLogitsLM
from lit_logits.functional import (
    DenseTarget,
    HierarchicalCodes,
    cluster_layout,
    hierarchical_cross_entropy,
    hierarchical_log_probs,
    hierarchical_losses,
    hierarchical_top_k,
)
from lit_logits.functional.hierarchical_vq import gather_codes, spread_codes
from lit_logits.modules import HierarchicalVQLogitsHead, PackedHierarchicalVQLogitsHead

V, D, G, SIZES = 60, 12, 3, (8, 6, 5)
LLAMA = {"model_type": "llama", "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2}


def make_head(num_groups=G, std=1.0):
    torch.manual_seed(0)
    head = HierarchicalVQLogitsHead(D, V, SIZES, num_groups=num_groups).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=std)
    codes = torch.stack([torch.randint(size, (V,)) for size in head.stage_sizes], 1)
    head.set_codes(torch.randint(SIZES[0], (V,)), codes)
    head.token_counts.copy_(torch.rand(V) * 100)
    return head


def spread(head):
    """The same codes as one group: the oracle."""
    codes = spread_codes(head.codes, head.num_groups)
    return head.tensors()._replace(codes=codes, num_groups=1)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_groups_are_codes_of_all_dimensions_that_are_zero_outside(cap):
    head = make_head()
    head.logit_cap = cap
    hidden, labels = torch.randn(9, D, dtype=torch.float64), torch.randint(V, (9,))
    target = DenseTarget(torch.randn(9, 4, dtype=torch.float64), torch.randn(V, 4, dtype=torch.float64))
    for compute in (
        lambda codes: hierarchical_cross_entropy(hidden, codes, labels, reduction="none"),
        lambda codes: hierarchical_log_probs(hidden, codes).gather(1, labels.unsqueeze(1)).squeeze(1),
        lambda codes: hierarchical_losses(hidden, codes, labels, target=target).divergence,
    ):
        values = [compute(codes) for codes in (head.tensors(), spread(head))]
        torch.testing.assert_close(*values)
        gradients = [torch.autograd.grad(value.sum(), head.codes)[0] for value in values]
        torch.testing.assert_close(*gradients)
    found, expected = (hierarchical_top_k(hidden, codes, 5) for codes in (head.tensors(), spread(head)))
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(head(hidden).exp().sum(-1), torch.ones(9, dtype=torch.float64))


def test_spread_codes_come_back():
    codes = torch.randn(11, D)
    assert torch.equal(gather_codes(spread_codes(codes, G), G), codes)


def test_groups_with_the_same_codes_are_one_group():
    one, several = make_head(1), make_head(G)
    several.load_state_dict({**one.state_dict(), "token_codes": several.token_codes})
    several.set_codes(one.token_to_cluster, one.token_codes)  # of the stages alone, for all groups
    hidden = torch.randn(5, D, dtype=torch.float64)
    torch.testing.assert_close(several(hidden), one(hidden))


def test_each_group_gets_codes_of_its_own():
    """Tokens whose codes were exchanged in one group get them back, from text that the right codes make."""
    head = make_head(std=0.3).float()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20_000, D, generator=generator)
    labels = head.sample(hidden, generator=generator)
    right, best = head.token_codes.clone(), float(head.loss(hidden, labels))
    wrong = right.clone()
    wrong[::5, 2] = (right[::5, 2] + 1) % SIZES[1]  # the first stage of the second group
    head.set_codes(None, wrong)
    before = float(head.loss(hidden, labels))
    for _ in range(3):
        head.reassign([(hidden, labels)])
    assert float(head.loss(hidden, labels)) - best < 0.2 * (before - best)
    groups = head.token_codes.view(V, G, 2)
    assert (groups[:, 0] != groups[:, 1]).any()


def test_dead_codes_of_a_group_are_revived():
    head = make_head()
    codes = head.token_codes.clone()
    codes[codes[:, 3] == 1, 3] = 0  # the second stage of the second group loses a code
    head.set_codes(None, codes)
    hidden = torch.randn(7, D, dtype=torch.float64)
    before = head(hidden)
    assert [len(dead) for dead in head.dead_stage_codes()] == [0, 0, 0, 1, 0, 0]
    assert head.revive_dead().num_revived == 1
    assert not any(len(dead) for dead in head.dead_stage_codes())
    torch.testing.assert_close(head(hidden), before)  # both halves of a code have its vector


def test_a_saved_model_is_the_one_in_training(tmp_path):
    torch.manual_seed(0)
    model = VQLogitsLM(LLAMA, V, head=partial(HierarchicalVQLogitsHead, codebook_sizes=SIZES, num_groups=G)).eval()
    model.head.load_state_dict({name: value.float() for name, value in make_head().state_dict().items()}, strict=False)
    model.head.set_codes(None, make_head().token_codes)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.randint(V, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(ids))
    assert loaded.config.num_groups == G


def test_bytes_are_those_of_the_packed_codes():
    head = make_head().float()
    packed = PackedHierarchicalVQLogitsHead(head)
    floats = sum(parameter.numel() for parameter in packed.parameters())
    assert head.footprint().bytes == 4 * floats + packed.packed_codes.numel()
    assert head.footprint().parameters == floats == make_head(1).footprint().parameters


def test_groups_must_divide_the_hidden_size():
    with pytest.raises(ValueError, match="`num_groups` to divide the hidden size 12, but got 5"):
        HierarchicalVQLogitsHead(D, V, SIZES, num_groups=5)


def test_one_group_is_the_default():
    layout = cluster_layout(torch.zeros(2, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long), 1, [1])
    assert HierarchicalCodes(torch.zeros(1, 2), torch.zeros(1, 2), layout, torch.zeros(1)).num_groups == 1
