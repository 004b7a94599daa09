"""Language models taken apart, calibration batches counted, and heads started from both: tiny models on disk."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_logits.contracts import OutputLayer
from lit_logits.functional import code_log_mass, ppl_floor
from lit_logits.modules import Calibration, DenseLogitsHead, VQLogitsHead, calibrate, describe_head, load_backbone
from lit_logits.modules.language_models.inspect import digest_model
from lit_logits.modules.language_models.loading import load_causal_lm, new_causal_lm
from lit_logits.modules.vq_logits.describe import describe_untying
from lit_logits.modules.vq_logits.start import choose_init

V, D, T = 61, 16, 9


def llama(tied, vocab_size=V, **kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        **kwargs,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
    return model


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def batches(count=3, rows=4, seed=0, vocab_size=V):
    """Ragged rows: padding at the end, and a fifth of the labels ignored."""
    g = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(vocab_size, (rows, T), generator=g)
        mask = (torch.arange(T) < torch.randint(4, T + 1, (rows, 1), generator=g)).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[torch.rand(labels.shape, generator=g) < 0.2] = -100
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


# ---------------------------------------------------------------------- backbones


@pytest.mark.parametrize("kind", ["untied llama", "tied llama", "gpt2"])
def test_hidden_states_times_the_output_layer_are_the_models_own_logits(kind, tmp_path):
    model = gpt2() if kind == "gpt2" else llama(tied=kind.startswith("tied"))
    model.save_pretrained(tmp_path)
    parts = load_backbone(str(tmp_path))
    parts.model.eval()
    assert parts.tied == (kind != "untied llama")
    assert (parts.hidden_size, parts.vocab_size, parts.output_bias) == (D, V, None)
    batch = batches(1)[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = F.linear(parts.model(**inputs).last_hidden_state, parts.output_weight)
        torch.testing.assert_close(logits, model(**inputs).logits)
    assert not parts.output_weight.requires_grad
    assert not any("lm_head" in name for name in parts.model.state_dict())


def test_weights_saved_in_bfloat16_load_in_float32(tmp_path):
    llama(tied=False).bfloat16().save_pretrained(tmp_path)
    parts = load_backbone(str(tmp_path))
    assert {p.dtype for p in parts.model.parameters()} == {parts.output_weight.dtype} == {torch.float32}


def test_a_config_takes_the_vocabulary_of_the_tokenizer():
    parts = load_backbone({"model_type": "gpt2", "n_embd": D, "n_layer": 1, "n_head": 2}, vocab_size=V)
    assert (parts.hidden_size, parts.vocab_size, parts.tied, parts.output_weight) == (D, V, False, None)
    assert parts.model.get_input_embeddings().weight.shape == (V, D)


@pytest.mark.parametrize(
    ("backbone", "vocab_size", "message"),
    [
        ({"hidden_size": 8}, V, r"the key `model_type`.*got the keys \['hidden_size'\]"),
        ({"model_type": "gpt2", "vocab_size": 7}, V, "to be the tokenizer's 61, but got 7"),
        ({"model_type": "lama"}, V, "`model_type` of transformers, but got 'lama'. Did you mean 'llama'"),
        ({"model_type": "llama", "num_hiden_layers": 5}, V, "'num_hiden_layers'. Did you mean 'num_hidden_layers'"),
        ({"model_type": "bert"}, V, "causal language model .*, but got 'bert', whose tokens see those that follow"),
        ({"model_type": "t5"}, V, "causal language model .*, but got 't5'"),
        ("no/such/folder/anywhere", V, "the model to be a hub id, a local folder"),
    ],
)
def test_backbones_that_do_not_fit_raise(backbone, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(backbone, vocab_size=vocab_size)


def test_pretrained_vocabulary_may_be_padded_but_not_too_small():
    assert load_backbone(llama(tied=False), vocab_size=V - 4).vocab_size == V
    with pytest.raises(ValueError, match=r"at least 62 tokens.*has 61 rows"):
        load_backbone(llama(tied=False), vocab_size=V + 1)


def test_models_without_an_output_layer_are_refused():
    with pytest.raises(ValueError, match="has none"):
        load_backbone(llama(tied=False).base_model)


# ---------------------------------------------------------------------- calibration


def test_calibration_against_loops():
    model, data = llama(tied=False).base_model, batches(5)
    model.train()
    result = calibrate(iter(data), num_batches=3, vocab_size=V, device=torch.device("cpu"), backbone=model)
    assert model.training
    model.eval()
    counts, moment = torch.zeros(V), torch.zeros(D, D)
    for batch in data[:3]:
        with torch.no_grad():
            hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        for row in range(4):
            for t in range(T - 1):
                target = batch["labels"][row, t + 1].item()
                if target != -100:
                    counts[target] += 1
                    moment += torch.outer(hidden[row, t], hidden[row, t])
    assert torch.equal(result.token_counts, counts)
    torch.testing.assert_close(result.hidden_second_moment, moment / counts.sum())


@pytest.mark.parametrize("with_bias", [False, True])
def test_information_of_logits_against_softmax_by_autograd(with_bias, monkeypatch):
    """E[p (1 − p)] is the diagonal of the Hessian of log Z; it does not depend on how positions are cut."""
    model, data = llama(tied=False), batches(3)
    weight, bias = model.lm_head.weight.detach() * 20, torch.randn(V) if with_bias else None
    settings = {"num_batches": 3, "vocab_size": V, "device": torch.device("cpu"), "backbone": model.base_model}
    result = calibrate(data, output_layer=(weight, bias), **settings)
    tokens, moment, total = torch.zeros(V).double(), torch.zeros(D, D).double(), 0
    for batch in data:
        with torch.no_grad():
            hidden = model.eval().base_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        for h in hidden[:, :-1][batch["labels"][:, 1:] != -100].double():
            logits = weight.double() @ h + (0 if bias is None else bias)
            variances = torch.autograd.functional.hessian(lambda z: z.logsumexp(0), logits).diagonal()
            tokens += variances
            moment += variances.sum() * torch.outer(h, h)
            total += 1
    torch.testing.assert_close(result.token_information.double(), tokens / total, rtol=1e-4, atol=1e-6)
    informed = (moment / tokens.sum()).float()
    torch.testing.assert_close(result.informed_second_moment, informed, rtol=1e-4, atol=3e-5)
    assert not torch.allclose(result.informed_second_moment, result.hidden_second_moment, rtol=1e-2)
    monkeypatch.setattr(importlib.import_module("lit_logits.modules.vq_logits.calibration"), "_CHUNK_ELEMENTS", 3 * V)
    for ours, cut in zip(result, calibrate(data, output_layer=(weight, bias), **settings), strict=True):
        torch.testing.assert_close(cut, ours, rtol=1e-4, atol=3e-5)
    plain = calibrate(data, **settings)
    assert plain[2:] == (None, None, None)
    assert torch.equal(plain.hidden_second_moment, result.hidden_second_moment)


def test_calibration_reads_no_more_than_it_uses_and_needs_targets():
    data = iter(batches(5))
    result = calibrate(data, num_batches=2, vocab_size=V, device=torch.device("cpu"))
    assert result.hidden_second_moment is None
    assert len(list(data)) == 3
    ignored = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches(2)]
    with pytest.raises(ValueError, match="none of their labels counts"):
        calibrate(ignored, num_batches=2, vocab_size=V, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        calibrate(batches(1), num_batches=2, vocab_size=5, device=torch.device("cpu"))


# ---------------------------------------------------------------------- the start of a head


def calibration(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(500, D, generator=g)
    return Calibration((500 / torch.arange(1, V + 1)).floor(), hidden.T @ hidden / 500)


def start(head, init, data, output_weight=None, output_bias=None):
    head.init = init
    head.start(lambda **_: data, OutputLayer(output_weight, output_bias))


def test_frequency_start_is_the_unigram_model():
    head, data = VQLogitsHead(D, V, 8), calibration()
    start(head, "frequency", data)
    with torch.no_grad():
        head.codebook.zero_()
    unigram = (data.token_counts + 0.5) / (data.token_counts + 0.5).sum()
    torch.testing.assert_close(head(torch.zeros(D)).softmax(-1).detach(), unigram)
    assert head.token_to_code[0] == 0
    assert torch.equal(head.token_counts, data.token_counts)


@pytest.mark.parametrize("init", ["kmeans", "weighted_kmeans"])
@pytest.mark.parametrize("mapping", ["fixed", "learned"])
def test_k_means_start(init, mapping):
    torch.manual_seed(0)
    head, data, weight = VQLogitsHead(D, V, 8, mapping=mapping), calibration(), torch.randn(V, D)
    start(head, init, data, output_weight=weight)
    assert head.token_to_code.unique().numel() == 8
    # The bias only splits each code among its tokens: the mass of a code is that of its size.
    sizes = head.token_to_code.bincount(minlength=8).float()
    torch.testing.assert_close(code_log_mass(head.token_to_code, 8, head.token_bias).exp(), sizes)
    share = (data.token_counts + 0.5) / (data.token_counts + 0.5)[head.token_to_code == head.token_to_code[0]].sum()
    torch.testing.assert_close(head.token_bias[0].exp() / sizes[head.token_to_code[0]], share[0])
    if mapping == "learned":
        assert torch.equal(head.latents, weight)
    if init == "kmeans":
        means = [weight[head.token_to_code == k].mean(0) for k in range(8)]
        torch.testing.assert_close(head.codebook.detach(), torch.stack(means))
    floor = ppl_floor(data.token_counts, head.token_to_code, 8, head.token_bias.detach())
    torch.testing.assert_close(head.ppl_floor(), floor)
    assert f"perplexity {floor.item():.2f}" in describe_head(head)


def test_as_many_codes_as_tokens_is_the_pretrained_layer_again():
    torch.manual_seed(0)
    weight, hidden = torch.randn(V, D), torch.randn(7, D)
    head = VQLogitsHead(D, V, V, bias=False)
    start(head, "weighted_kmeans", calibration(), output_weight=weight)
    torch.testing.assert_close(head(hidden), hidden @ weight.T, rtol=1e-3, atol=1e-3)


def test_the_seed_decides_the_start():
    weight, books = torch.randn(V, D), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        head = VQLogitsHead(D, V, 8)
        start(head, "kmeans", calibration(), output_weight=weight)
        books.append(head.codebook.detach().clone())
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_a_pretrained_bias_is_added():
    torch.manual_seed(0)
    bias, weight, heads = torch.randn(V), torch.randn(V, D), []
    for given in (None, bias):
        torch.manual_seed(0)
        heads.append(VQLogitsHead(D, V, 8))
        start(heads[-1], "kmeans", calibration(), output_weight=weight, output_bias=given)
    torch.testing.assert_close((heads[1].token_bias - heads[0].token_bias).detach(), bias)


def test_dense_start():
    head = DenseLogitsHead(D, V)
    weight = torch.randn(V, D)
    head.copy_output_layer(weight, None)
    assert torch.equal(head.weight, weight)
    head.start(lambda **_: calibration(), OutputLayer(None, None))
    counts = calibration().token_counts + 0.5
    torch.testing.assert_close(head.token_bias.exp().detach(), counts / counts.sum())
    with pytest.raises(ValueError, match="pretrained output layer has a bias"):
        DenseLogitsHead(D, V, bias=False).copy_output_layer(weight, torch.zeros(V))


def test_choice_of_start():
    assert choose_init(None, pretrained=True) == "weighted_kmeans"
    assert choose_init(None, pretrained=False) == "cooccurrence"
    with pytest.raises(ValueError, match=r"`init` to be one of 'random'.*got 'zeros'"):
        choose_init("zeros", pretrained=True)
    for init in ("kmeans", "weighted_kmeans"):
        assert choose_init(init, pretrained=True) == init
        with pytest.raises(ValueError, match=r"pretrained backbone for init='.*kmeans'"):
            choose_init(init, pretrained=False)
    head = VQLogitsHead(D, V, 8)
    with pytest.raises(ValueError, match="rows of a pretrained output layer for init='kmeans'"):
        start(head, "kmeans", calibration())
    no_moment = calibration()._replace(hidden_second_moment=None)
    with pytest.raises(ValueError, match="second moment for init='weighted_kmeans'"):
        start(head, "weighted_kmeans", no_moment, output_weight=torch.randn(V, D))


def test_untying_is_accounted_for(tmp_path):
    llama(tied=True).save_pretrained(tmp_path)
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    parts, head = load_backbone(str(tmp_path)), VQLogitsHead(D, V, 8)
    text = describe_untying(parts, head)
    added = 8 * D + V
    for number in (V * D, added, whole, whole + added, whole + V * D):
        assert f"{number:,}" in text


def test_weighted_start_loses_less_than_plain_k_means():
    """On hidden states and counts of the calibration, KL to the dense layer's distribution, before any training."""
    torch.manual_seed(0)
    scales = torch.logspace(0.5, -1.5, D)
    hidden, weight = torch.randn(2000, D) * scales, torch.randn(V, D)
    targets = torch.multinomial((hidden @ weight.T).softmax(-1), 1).squeeze(1)
    data = Calibration(targets.bincount(minlength=V).float(), hidden.T @ hidden / 2000)
    losses = {}
    for init in ("kmeans", "weighted_kmeans"):
        head = VQLogitsHead(D, V, 16)
        start(head, init, data, output_weight=weight)
        losses[init] = head.eval().loss(hidden, targets).item()
    dense = F.cross_entropy(hidden @ weight.T, targets).item()
    assert dense < losses["weighted_kmeans"] < losses["kmeans"]


# ---------------------------------------------------------------------- digests and settings of what is loaded


def tiny_causal_lm(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return new_causal_lm({"model_type": "llama", "vocab_size": 64, **sizes, **kwargs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_sees_every_value_of_a_model(dtype):
    """It strode over one column of a table: a teacher whose other columns had changed was taken for the same."""
    model = tiny_causal_lm().to(dtype)
    digest = digest_model(model)
    assert digest == digest_model(copy.deepcopy(model))
    table = model.get_input_embeddings().weight
    for place in ((0, 1), (17, 15), (63, 3)):
        with torch.no_grad():
            kept = table[place].clone()
            table[place] += 0.5
        assert digest_model(model) != digest
        with torch.no_grad():
            table[place] = kept
    with torch.no_grad():
        table[[3, 5]] = table[[5, 3]]  # rows that change their places
    assert digest_model(model) != digest


def test_a_digest_does_not_depend_on_threads():
    model, threads = tiny_causal_lm(vocab_size=5000), torch.get_num_threads()
    digest = digest_model(model)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert digest_model(model) == digest
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"dtpye": "bfloat16"}, "but got 'dtpye'. Did you mean 'dtype'?"),
        ({"device_mapp": "cpu"}, "but got 'device_mapp'. Did you mean 'device_map'?"),
        (
            {"dtype": "bflaot16"},
            "Expected `dtype` to be the name of one of torch, such as bfloat16, but got 'bflaot16'",
        ),
        ({"attn_implementation": "flush"}, "Expected settings with which `from_pretrained` can load .*'flush'}: "),
        ({"quantization_config": {"load_in_4bits": True}}, "Expected settings with which `from_pretrained` can load"),
    ],
)
def test_settings_of_from_pretrained_that_are_misspelt(tmp_path, kwargs, match):
    tiny_causal_lm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=match):
        load_causal_lm(str(tmp_path), **kwargs)
