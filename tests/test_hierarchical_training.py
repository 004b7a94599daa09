"""Two levels of codes with a pretrained backbone: the start from its output layer, imitation, and capped logits."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lit_logits import VQLogitsLM
from lit_logits.contracts import CappedHead, ImitatingHead, OutputLayer
from lit_logits.functional import kmeans_hierarchy, weighted_kmeans_hierarchy
from lit_logits.modules import HierarchicalVQLogitsHead, calibrate
from lit_logits.modules.language_models.loading import new_causal_lm

V, D = 30, 16
SHAPE = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", **SHAPE}
GEMMA = {"model_type": "gemma2", **SHAPE, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
SMALL = partial(HierarchicalVQLogitsHead, codebook_sizes=(5, 4, 4))


def make(config=LLAMA, *, scale=20.0, bias=False):
    """A model whose output layer tells tokens apart."""
    torch.manual_seed(0)
    model = new_causal_lm(dict(config), V).eval()
    if bias:
        model.lm_head = nn.Linear(D, V)
        model.lm_head.bias.data.normal_()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


def rows(num=32, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = (V * torch.rand(num, length, generator=generator) ** 2).long()
    return [{"input_ids": row, "labels": row} for row in ids]


def loader(num=32, seed=0):
    return DataLoader(rows(num, seed=seed), batch_size=4)


def fit(model, tmp_path, **kwargs):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=tmp_path, enable_model_summary=False, **{"max_epochs": 2, **options, **kwargs})
    trainer.fit(model, loader(), loader(8, seed=1))
    return trainer


def divergence(ours, theirs):
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


IDS = torch.stack([row["input_ids"] for row in rows(6, seed=2)])

# ---------------------------------------------------------------------- codes of vectors


def test_a_hierarchy_of_vectors_that_are_one_is_found():
    """Rows that are a cluster plus a code of each of two stages; the largest spread is that of the clusters."""
    torch.manual_seed(0)
    clusters, first, second = 40 * torch.eye(4), torch.tensor([[0.0, 6, 0, 0], [0, -6, 0, 0]]), torch.randn(3, 4)
    second -= second.mean(0)
    owner, one, two = (index.flatten() for index in torch.meshgrid(*map(torch.arange, (4, 2, 3)), indexing="ij"))
    vectors = clusters[owner] + first[one] + second[two]
    found = kmeans_hierarchy(
        *(vectors, (4, 2, 3)),
        weights=torch.ones(24),
        max_cluster_size=6,
        generator=torch.Generator().manual_seed(0),
    )
    codes = found.token_codes + torch.tensor([0, 2])
    rebuilt = found.clusters[found.token_to_cluster] + found.codes[codes].sum(1)
    torch.testing.assert_close(rebuilt, vectors, atol=1e-4, rtol=1e-4)
    for ours, theirs in (
        (found.token_to_cluster, owner),
        (found.token_codes[:, 0], one),
        (found.token_codes[:, 1], two),
    ):
        assert len({*zip(ours.tolist(), theirs.tolist(), strict=True)}) == len(theirs.unique())


def test_the_metric_decides_what_is_near():
    """Tokens differ in two directions, and hidden states vary along one of them: the other costs nothing."""
    weight = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 1.0], [9.0, 1.0]])
    moment = torch.diag(torch.tensor([1e-4, 1.0]))
    found = weighted_kmeans_hierarchy(
        *(weight, (2, 2)), token_counts=torch.ones(4), hidden_second_moment=moment, max_cluster_size=4
    )
    assert found.token_to_cluster[0] == found.token_to_cluster[1] != found.token_to_cluster[2]
    rebuilt = found.clusters[found.token_to_cluster] + found.codes[found.token_codes[:, 0]]
    torch.testing.assert_close(rebuilt, weight, atol=1e-3, rtol=1e-3)  # and back in the space of the rows
    with pytest.raises(ValueError, match="`token_counts` to hold one count for each of the 4 rows"):
        weighted_kmeans_hierarchy(
            *(weight, (2, 2)), token_counts=torch.ones(3), hidden_second_moment=moment, max_cluster_size=4
        )


# ---------------------------------------------------------------------- the start from a pretrained layer


@pytest.mark.parametrize("bias", [False, True])
def test_with_a_cluster_for_each_token_the_head_starts_as_the_original(bias):
    own = make(bias=bias)
    model = VQLogitsLM(copy.deepcopy(own), V, head=partial(HierarchicalVQLogitsHead, codebook_sizes=(V, 2)))
    model.initialize_head(loader())
    assert model.head.init == "weighted_kmeans"
    torch.testing.assert_close(model.eval()(IDS), own(input_ids=IDS).logits.log_softmax(-1), rtol=1e-3, atol=1e-3)
    assert torch.equal(model.head.greedy(model.hidden_states(IDS)), own(input_ids=IDS).logits.argmax(-1))


def test_with_few_codes_it_starts_nearer_to_the_original_than_from_the_text():
    own = make()
    theirs, found = own(input_ids=IDS).logits.log_softmax(-1), {}
    for init in ("weighted_kmeans", "cooccurrence", "random"):
        model = VQLogitsLM(copy.deepcopy(own), V, head=partial(SMALL, init=init))
        torch.manual_seed(0)
        model.initialize_head(loader())
        assert model.head.token_counts.sum() == 32 * 9
        found[init] = float(divergence(model.eval()(IDS), theirs).detach())
    assert found["weighted_kmeans"] < 0.5 * min(found["cooccurrence"], found["random"])


def test_it_trains_from_there(tmp_path):
    model = VQLogitsLM(make(), V, head=SMALL, optimizer=partial(torch.optim.Adam, lr=0.03))
    model.initialize_head(loader())
    ids = torch.stack([row["input_ids"] for row in rows()])

    def loss():
        return model.eval().head.loss(model.hidden_states(ids)[:, :-1], ids[:, 1:]).item()

    before, start = loss(), model.head.clusters.detach().clone()
    model.train()
    fit(model, tmp_path, max_epochs=6)
    assert not torch.equal(model.head.clusters, start)
    assert loss() < math.log(V) < before


def test_what_a_start_lacks_is_said():
    with pytest.raises(ValueError, match=r"a pretrained backbone for init='weighted_kmeans'.* such as 'cooccurrence'"):
        VQLogitsLM(LLAMA, V, head=partial(SMALL, init="weighted_kmeans"))
    with pytest.raises(ValueError, match="`bias=True`, because the pretrained output layer has a bias"):
        VQLogitsLM(make(bias=True), V, head=partial(SMALL, bias=False))
    with pytest.raises(ValueError, match="`count_power` to be non-negative"):
        SMALL(D, V, count_power=-1)
    head = SMALL(D, V, init="weighted_kmeans")
    counted = calibrate([{"input_ids": IDS, "labels": IDS}], num_batches=1, vocab_size=V, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the rows of a pretrained output layer .* for init='weighted_kmeans'"):
        head.start(lambda **_: counted, OutputLayer(None, None))


# ---------------------------------------------------------------------- imitation


@pytest.mark.parametrize("num_trainable_layers", [None, 0])
def test_imitation_is_part_of_the_loss_and_lowers_the_divergence(num_trainable_layers, tmp_path):
    own = make()
    options = {"kd_weight": 0.7, "num_trainable_layers": num_trainable_layers}
    model = VQLogitsLM(copy.deepcopy(own), V, head=SMALL, optimizer=partial(torch.optim.Adam, lr=0.01), **options)
    assert isinstance(model.head, ImitatingHead)
    assert model.head.can_imitate
    model.initialize_head(loader())
    model.log = model.log_dict = lambda *args, **kwargs: None
    labels = IDS[:, 1:]
    theirs = own(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    ours = model.eval()(IDS)[:, :-1]
    expected = 0.7 * divergence(ours, theirs) + 0.3 * F.nll_loss(ours.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model.training_step({"input_ids": IDS, "labels": IDS}, 0), expected)
    del model.log, model.log_dict
    model.train().kd_weight = 1.0  # the text is none of the original's
    trainer = fit(model, tmp_path, max_epochs=6)
    after = divergence(model.eval()(IDS)[:, :-1], theirs)
    assert after < 0.7 * divergence(ours, theirs)
    assert {"val/kl", "val/ppl_ratio", "val/loss"} <= set(trainer.callback_metrics)
    assert 0 < float(trainer.callback_metrics["val/kl"]) < float(divergence(ours, theirs).detach())


def test_imitation_counts_what_it_trains_on():
    model = VQLogitsLM(make(), V, head=SMALL, kd_weight=1.0)
    hidden, before = model.hidden_states(IDS), model.head.token_counts.clone()
    target = model.original.target(hidden, input_ids=IDS)
    model.head.eval().imitation_losses(hidden, IDS, target=target)
    assert torch.equal(model.head.token_counts, before)
    model.head.train().imitation_losses(hidden, IDS, target=target)
    assert torch.equal(model.head.token_counts, IDS.flatten().bincount(minlength=V).float())


# ---------------------------------------------------------------------- capped logits


def test_a_capped_model_caps_both_levels(tmp_path):
    """The config's cap was refused."""
    own = make(GEMMA)
    model = VQLogitsLM(copy.deepcopy(own), V, head=SMALL, kd_weight=0.5, optimizer=partial(torch.optim.Adam, lr=0.01))
    assert isinstance(model.head, CappedHead)
    assert model.head.logit_cap == 2.0
    fit(model, tmp_path, max_epochs=2)
    head = model.eval().head
    with torch.no_grad():
        head.clusters.mul_(30), head.codes.mul_(30)  # so that the cap shows
        hidden = model.hidden_states(IDS)
        outer = 2.0 * torch.tanh(hidden @ head.clusters.T / 2.0) + head.cluster_bias
        outer[..., torch.bincount(head.token_to_cluster, minlength=5) == 0] = -torch.inf
        codes = head.codes[head.token_codes + torch.tensor([0, 4])].sum(1)
        inner = 2.0 * torch.tanh(hidden @ codes.T / 2.0) + head.token_bias
        expected = torch.empty(6, 10, V)
        for cluster, log_prob in enumerate(outer.log_softmax(-1).unbind(-1)):
            own_tokens = head.token_to_cluster == cluster
            expected[..., own_tokens] = log_prob.unsqueeze(-1) + inner[..., own_tokens].log_softmax(-1)
        torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
        assert (inner - head.token_bias).abs().max() > 1.5
        assert torch.equal(head.greedy(hidden), expected.argmax(-1))
        assert torch.equal(head.top_k(hidden, 3).token_ids, expected.topk(3).indices)
        nll = F.nll_loss(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        torch.testing.assert_close(head.loss(hidden[:, :-1], IDS[:, 1:]), nll)
        for temperature in (1.0, 0.7):
            draws = head.sample(hidden[0, 0].expand(20_000, D), temperature).bincount(minlength=V) / 20_000
            share = (expected[0, 0] / temperature).softmax(-1)
            torch.testing.assert_close(draws, share, rtol=0, atol=0.015)
        target = model.original.target(hidden, input_ids=IDS)
        found = head.imitation_losses(hidden, IDS, target=target)
    theirs = own(input_ids=IDS).logits.log_softmax(-1)
    torch.testing.assert_close(found.divergence.mean(), divergence(expected, theirs), rtol=1e-3, atol=1e-4)
    text = model.generate(IDS[:, :4], max_new_tokens=3)
    assert torch.equal(text[:, 4:5], model(text[:, :4])[:, -1:].argmax(-1))
