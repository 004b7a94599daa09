"""What models do with hidden states and logits, found by running them: scales, caps, causality; and what is refused."""

import copy
import warnings
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from lit_logits import CausalLM, DualHeadKD, DynamicFusionDecoder, GLDFusionModule, VQLogitsLM
from lit_logits.functional.residual_vq import DenseTarget
from lit_logits.modules import (
    DenseLogitsHead,
    LogitSource,
    ResidualVQLogitsHead,
    VQLogitsHead,
    calibrate,
    load_backbone,
)
from lit_logits.modules.language_models.loading import is_plain_causal_lm, new_causal_lm
from lit_logits.modules.language_models.probes import OutputRule, check_causal, probe_causal_lm

V, D = 40, 16
SHAPE = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GQA = {**SHAPE, "num_key_value_heads": 2}
LLAMA = {"model_type": "llama", **GQA}
SCALED = {
    "cohere": {"model_type": "cohere", **GQA, "logit_scale": 0.0625},
    "cohere2": {"model_type": "cohere2", **GQA, "logit_scale": 0.25},
    "granite": {"model_type": "granite", **GQA, "logits_scaling": 6.0},
    "granitemoe": {"model_type": "granitemoe", **GQA, "logits_scaling": 3.0, "num_local_experts": 2},
    "minicpm3": {
        **{"model_type": "minicpm3", **GQA, "q_lora_rank": 8, "kv_lora_rank": 8},
        **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
    },
}
if "minicpm3" not in CONFIG_MAPPING:  # older versions of transformers do not know it
    del SCALED["minicpm3"]
CAPPED = {
    "gemma2": {"model_type": "gemma2", **GQA, "head_dim": 8, "final_logit_softcapping": 0.2},
    "vaultgemma": {"model_type": "vaultgemma", **GQA, "head_dim": 8},
    "nanochat": {"model_type": "nanochat", **GQA},
    "recurrent_gemma": {
        **{"model_type": "recurrent_gemma", "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "lru_width": D, "head_dim": 8, "logits_soft_cap": 0.5},
    },
    "xlstm": {"model_type": "xlstm", "hidden_size": 32, "num_heads": 2, "num_blocks": 1, "embedding_dim": 32},
}
BIDIRECTIONAL = {
    "bert-generation": {"model_type": "bert-generation", **SHAPE},
    "xlnet": {"model_type": "xlnet", "d_model": D, "n_layer": 1, "n_head": 2, "d_inner": 16},
    "xlm": {"model_type": "xlm", "emb_dim": D, "n_layers": 1, "n_heads": 2},
    "data2vec-text": {"model_type": "data2vec-text", **SHAPE},
    "roberta-prelayernorm": {"model_type": "roberta-prelayernorm", **SHAPE},
    "big_bird": {"model_type": "big_bird", **SHAPE},
    "bert": {"model_type": "bert", **SHAPE},
}
ENCODERS = {
    name: {"model_type": name, "d_model": D, "encoder_layers": 1, "decoder_layers": 1}
    for name in ("bart", "mbart", "plbart")
}
DENSE = partial(DenseLogitsHead, bias=False)
IDS = torch.arange(14).view(2, 7)


def make(config, seed=0, scale=10.0):
    """A model of random weights, whose output rows are large enough for a cap to show."""
    torch.manual_seed(seed)
    model = new_causal_lm(dict(config), V).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


def batch(ids=IDS, **kwargs):
    return {"input_ids": ids, "labels": ids.clone(), **kwargs}


def own_loss(model, ids=IDS):
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def quiet(module):
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


# ---------------------------------------------------------------------- scales and caps


@pytest.mark.parametrize("name", [*SCALED, *CAPPED])
@pytest.mark.parametrize("scale", [1e-4, 10.0])
def test_the_rule_gives_the_models_own_logits_however_small_they_are(name, scale):
    model = make({**SCALED, **CAPPED}[name], scale=scale)
    rule = probe_causal_lm(model)
    assert rule != OutputRule()
    assert (rule.cap is None) == (name in SCALED)
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        logits = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(rule.logits(model.get_output_embeddings(), hidden), logits, rtol=1e-4, atol=1e-6)


def test_plain_models_have_no_rule():
    assert probe_causal_lm(make(LLAMA)) == OutputRule()
    assert is_plain_causal_lm(make(LLAMA))
    assert not is_plain_causal_lm(make(SCALED["granite"]))


@pytest.mark.parametrize("name", [*SCALED, "gemma2", "vaultgemma", "nanochat"])
def test_a_pretrained_model_with_a_scale_or_cap_is_itself_in_every_form(name, tmp_path):
    """Forward, loss, greedy, sampling, generation and both exports against the architecture's own logits."""
    own = make({**SCALED, **CAPPED}[name])
    own.save_pretrained(tmp_path)
    model = quiet(VQLogitsLM(str(tmp_path), V, head=DENSE).eval())
    logits = own(input_ids=IDS).logits
    torch.testing.assert_close(model(IDS), logits)
    torch.testing.assert_close(model.training_step(batch(), 0), own_loss(own))
    assert torch.equal(model.predict_step(batch(), 0)["greedy"], logits.argmax(-1)[:, :-1])
    ours = model.generate(IDS, max_new_tokens=5)
    theirs = own.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(model.to_pretrained("dense")(input_ids=IDS).logits, logits)
    model.save_pretrained(tmp_path / "dense", "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(again(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("name", [*SCALED, *CAPPED])
def test_a_new_model_with_a_scale_or_cap_exports_what_it_trained(name, tmp_path):
    torch.manual_seed(0)
    model = VQLogitsLM(
        dict({**SCALED, **CAPPED}[name]), V, head=partial(VQLogitsHead, codebook_size=8, bias=False)
    ).eval()
    with torch.no_grad():
        model.head.codebook.mul_(50)
    dense = model.to_pretrained("dense")
    torch.testing.assert_close(dense(input_ids=IDS, use_cache=False).logits, model(IDS))
    if name in ("recurrent_gemma", "xlstm"):  # their state is no cache of attention
        return
    model.save_pretrained(tmp_path)
    compact = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(compact(input_ids=IDS).logits, model(IDS))
    torch.testing.assert_close(compact(input_ids=IDS, labels=IDS).loss, own_loss(dense))
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(compact.generate(IDS, **greedy), model.generate(IDS, max_new_tokens=4))


@pytest.mark.parametrize("name", ["granite", "gemma2"])
def test_a_compressed_model_starts_from_and_imitates_the_architectures_logits(name, tmp_path):
    own = make({**SCALED, **CAPPED}[name])
    head = partial(ResidualVQLogitsHead, codebook_size=8, num_groups=2, token_weights="fisher")
    model = VQLogitsLM(copy.deepcopy(own), V, head=head, kd_weight=1.0)
    hidden = model.eval().hidden_states(IDS)
    target = model.original.target(hidden, input_ids=IDS)
    logits = target.hidden @ target.weight.T
    torch.testing.assert_close(logits if target.cap is None else plain_cap(logits, 0.2), own(input_ids=IDS).logits)
    model.save_pretrained(tmp_path)
    compact = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(compact(input_ids=IDS).logits, model(IDS))
    torch.testing.assert_close(model.to_pretrained("dense")(input_ids=IDS).logits, model(IDS), rtol=1e-4, atol=1e-5)
    model.train()
    if name == "gemma2":
        return
    seen = {}
    model.head.start = lambda calibrate, layer, **_: seen.update(c=calibrate(second_moment=True, information=True))
    model.initialize_head([batch()])
    probs = own(input_ids=IDS).logits[:, :-1].flatten(0, 1).softmax(-1)
    torch.testing.assert_close(seen["c"].token_information, (probs * (1 - probs)).mean(0))


def test_a_bias_under_a_scale(monkeypatch):
    """No architecture here has both, so one is made: its layer's bias is multiplied too."""
    own = make(SCALED["cohere"])
    own.lm_head = nn.Linear(D, V)
    own.lm_head.bias.data.normal_()
    parts = load_backbone(own)
    torch.testing.assert_close(parts.output_bias, own.lm_head.bias.detach() * 0.0625)
    model = VQLogitsLM(own, V, head=DenseLogitsHead).eval()
    torch.testing.assert_close(model(IDS), own(input_ids=IDS).logits)


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_a_folder_is_trained_by_the_trainer_and_saved(name, kd_weight, tmp_path):
    make({**SCALED, **CAPPED}[name]).save_pretrained(tmp_path / "own")
    head = partial(ResidualVQLogitsHead, codebook_size=16, num_groups=4)
    model = VQLogitsLM(str(tmp_path / "own"), V, head=head, kd_weight=kd_weight, calibration_batches=1)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=2, default_root_dir=tmp_path, enable_model_summary=False, **options)
    trainer.fit(model, DataLoader([batch(), batch(IDS + 20)], batch_size=None))
    logits = model.eval()(IDS)
    if kd_weight:
        hidden = model.original.models[0](input_ids=IDS).last_hidden_state  # of the folder, before training
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "own").eval()
        torch.testing.assert_close(hidden, own.base_model(input_ids=IDS).last_hidden_state)
    for kind in ("compact", "dense"):
        model.save_pretrained(tmp_path / kind, kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


class PlainHead(nn.Linear):
    """A head of a user, which knows no cap."""

    def loss(self, hidden, labels, *, ignore_index=-100, reduction="mean"):
        return F.cross_entropy(self(hidden).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("config", CAPPED.values(), ids=CAPPED)
def test_heads_without_a_cap_refuse_capped_models(config):
    for backbone in (dict(config), make(config, scale=1e-4)):
        with pytest.raises(ValueError, match=r"a head with `logit_cap`, because the architecture caps its logits at"):
            VQLogitsLM(backbone, V, head=PlainHead)


def test_a_bias_inside_a_cap_is_refused():
    own = make(CAPPED["gemma2"])
    own.lm_head = nn.Linear(D, V)
    with pytest.raises(ValueError, match="an output layer without a bias, because Gemma2ForCausalLM caps"):
        load_backbone(own)


def plain_cap(logits, cap):
    """c · tanh(z / c), as Gemma-2 writes it."""
    return cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["dense", "vq", "residual"])
def test_capped_heads_against_capped_dense_logits(kind, bias):
    """Logits, loss, imitation, greedy, sampling and gradients, against rows, a tanh and then the bias, in float64."""
    torch.manual_seed(0)
    head = {
        "dense": DenseLogitsHead(D, V, bias=bias),
        "vq": VQLogitsHead(D, V, 8, bias=bias),
        "residual": ResidualVQLogitsHead(D, V, 8, num_groups=2, num_stages=2, bias=bias),
    }[kind].double()
    head.logit_cap = 1.5
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    hidden = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (3, 5)).masked_fill(torch.rand(3, 5) < 0.2, -100)

    def by_rows(h):
        logits = plain_cap(h @ head.dense_weight().T, 1.5)
        return logits if head.token_bias is None else logits + head.token_bias

    def gradients(loss):
        return torch.autograd.grad(loss, [hidden, *head.parameters()])

    torch.testing.assert_close(head(hidden), by_rows(hidden))
    expected = F.cross_entropy(by_rows(hidden).flatten(0, 1), labels.flatten())
    loss = head.loss(hidden, labels)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(loss), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(head.greedy(hidden), by_rows(hidden).argmax(-1))
        decoded = head.float()(hidden.detach().float()).double()  # with the look-up, where there is one
        torch.testing.assert_close(decoded, by_rows(hidden.float()).double(), rtol=1e-4, atol=1e-4)
        assert torch.equal(head.greedy(hidden.float()), by_rows(hidden.float()).argmax(-1))
        one = hidden[:1, :1].float()
        draws = head.sample(one.expand(1, 20_000, D), 1.7).flatten().bincount(minlength=V) / 20_000
        torch.testing.assert_close(draws, (by_rows(one) / 1.7).softmax(-1).flatten(), rtol=0, atol=0.015)
    if kind == "dense":
        return
    head.double()
    target = DenseTarget(torch.randn(3, 5, D).double(), torch.randn(V, D).double(), torch.randn(V).double(), cap=2.0)
    found = head.imitation_losses(hidden, labels, target=target)
    theirs = (plain_cap(target.hidden @ target.weight.T, 2.0) + target.bias).log_softmax(-1)
    divergence = (theirs.exp() * (theirs - by_rows(hidden).log_softmax(-1))).sum(-1) * (labels != -100)
    torch.testing.assert_close(found.divergence, divergence)
    ours, theirs = (
        gradients(found.divergence.sum() + found.cross_entropy.sum()),
        gradients(divergence.sum() + F.cross_entropy(by_rows(hidden).flatten(0, 1), labels.flatten(), reduction="sum")),
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_latents_under_a_cap_get_the_gradient_of_dense_rows():
    torch.manual_seed(0)
    head = VQLogitsHead(D, V, 8, mapping="learned").double().train()
    head.logit_cap = 1.5
    with torch.no_grad():
        head.codebook.normal_()
        head.token_bias.normal_()
        head.token_to_code.clamp_(max=6)  # a code without tokens
    hidden, labels = torch.randn(9, D).double(), torch.randint(V, (9,))
    rows = head.dense_weight().detach().clone().requires_grad_()
    logits = plain_cap(hidden @ rows.T, 1.5) + head.token_bias.detach()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), rows)
    (found,) = torch.autograd.grad(head.loss(hidden, labels), head.latents)
    torch.testing.assert_close(found, expected)


def test_information_under_a_cap_is_that_of_the_logit_before_it():
    own = make(CAPPED["gemma2"])
    hidden = own.base_model(input_ids=IDS).last_hidden_state[:, :-1].flatten(0, 1).detach()
    found = calibrate(
        [batch()],
        num_batches=1,
        vocab_size=V,
        device=torch.device("cpu"),
        backbone=own.base_model,
        output_layer=(own.lm_head.weight.detach(), None),
        logit_cap=0.2,
    )
    expected = torch.zeros(V)
    for h in hidden:  # Fisher information: E over tokens of the squared score, by autograd
        raw = (own.lm_head.weight.detach() @ h).requires_grad_()
        log_probs = plain_cap(raw, 0.2).log_softmax(0)
        for token in range(V):
            (score,) = torch.autograd.grad(log_probs[token], raw, retain_graph=True)
            expected += log_probs[token].exp().detach() * score.square() / len(hidden)
    torch.testing.assert_close(found.token_information, expected, rtol=1e-4, atol=1e-7)


def test_the_cap_that_is_switched_off_is_gone():
    config = {**CAPPED["gemma2"], "final_logit_softcapping": None}
    assert load_backbone(config, vocab_size=V).rule == OutputRule()


def test_other_changes_of_logits_are_refused():
    model = make(LLAMA, scale=1e-4)
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.relu()
        return output

    model.forward = shifted
    with pytest.raises(ValueError, match="but for a factor and a soft cap"):
        CausalLM(model)


@pytest.mark.parametrize("kind", ["parameter", "forward"])
def test_output_layers_that_do_more_are_refused(kind):
    """Another head would not do it: dory scales the logits of each token."""

    class Louder(nn.Linear):
        def __init__(self):
            super().__init__(D, V, bias=False)
            self.scale = nn.Parameter(torch.full((V,), 2.0)) if kind == "parameter" else 2.0

        def forward(self, hidden):
            return super().forward(hidden) * self.scale

    model = make(LLAMA)
    model.lm_head = Louder()
    why = r"has the parameters \['scale'\]" if kind == "parameter" else "makes other values of them"
    with pytest.raises(ValueError, match=f"but the Louder of LlamaForCausalLM {why}"):
        VQLogitsLM(model, V, head=DENSE)
    model.lm_head.__class__ = type("Plain", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x)})
    if kind == "forward":
        assert CausalLM(model).output_rule == OutputRule()


@pytest.mark.parametrize("name", ["gemma2", *(name for name in ("cohere", "granite", "minicpm3") if name in SCALED)])
def test_losses_of_the_other_methods_are_those_of_the_architecture(name):
    config = {**SCALED, **CAPPED}[name]
    own = make(config)
    expected = own_loss(own)
    rows = batch(attention_mask=torch.ones_like(IDS))
    torch.testing.assert_close(quiet(CausalLM(copy.deepcopy(own)).eval()).training_step(rows, 0), expected)
    fusion = GLDFusionModule(copy.deepcopy(own), {"other": make(config, seed=1)}, V).eval()
    torch.testing.assert_close(fusion.losses(rows).ce, expected)
    kd = DualHeadKD(copy.deepcopy(own), make(config, seed=1), method="kd", kd_loss="kl", temperature=1.0).eval()
    losses = kd.losses(rows)
    torch.testing.assert_close(losses.ce, expected)
    logits, others = (m(input_ids=IDS).logits[:, :-1].log_softmax(-1) for m in (own, kd.teacher.model))
    divergence = (others.exp() * (others - logits)).sum(-1).mean()
    torch.testing.assert_close(losses.kd, divergence)


# ---------------------------------------------------------------------- models that see the future


@pytest.mark.parametrize("config", [*BIDIRECTIONAL.values(), *ENCODERS.values()], ids=[*BIDIRECTIONAL, *ENCODERS])
@pytest.mark.parametrize("method", [VQLogitsLM, CausalLM, partial(GLDFusionModule, kd_weight=0.0)])
def test_configs_that_see_the_future_are_refused(config, method):
    with pytest.raises(ValueError, match=r"^Expected .*(causal|output layer)"):
        method(dict(config), vocab_size=V)


@pytest.mark.parametrize("name", ["bert-generation", "xlnet", "xlm"])
def test_objects_that_see_the_future_are_refused_everywhere(name):
    make_one = partial(make, BIDIRECTIONAL[name], scale=1.0)
    advice = {"xlnet": "", "xlm": "Set `causal: true`", "bert-generation": "Set `is_decoder: true`"}[name]
    message = f"hidden states depend on the tokens that follow.*{advice}"
    for refuse in (
        lambda: VQLogitsLM(make_one()),
        lambda: CausalLM(make_one()),
        lambda: GLDFusionModule(make_one(), {"s": make(LLAMA)}),
        lambda: GLDFusionModule(make(LLAMA), {"s": make_one()}),
        lambda: LogitSource(make_one()),
        lambda: DualHeadKD(make_one(), method="ce"),
        lambda: DynamicFusionDecoder(make_one()),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_a_decoder_of_that_kind_is_taken():
    assert load_backbone({**BIDIRECTIONAL["bert-generation"], "is_decoder": True}, vocab_size=V).rule == OutputRule()
    assert load_backbone({**BIDIRECTIONAL["xlm"], "causal": True}, vocab_size=V).rule == OutputRule()


def test_encoder_decoders_are_refused_in_words():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=D, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for refuse in (VQLogitsLM, CausalLM, DynamicFusionDecoder, partial(GLDFusionModule, kd_weight=0.0)):
        with pytest.raises(ValueError, match="has an encoder"):
            refuse(t5)


CAUSAL = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", "n_embd": D, "n_layer": 1, "n_head": 2},
    "mamba": {"model_type": "mamba", "hidden_size": D, "num_hidden_layers": 1, "state_size": 4},
    "rwkv": {"model_type": "rwkv", "hidden_size": D, "num_hidden_layers": 7, "attention_hidden_size": D},
    "mixtral": {"model_type": "mixtral", **GQA, "num_local_experts": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_probe_leaves_the_model_as_it_was(name, dtype):
    if name == "mixtral" and dtype == torch.float64:
        pytest.skip("torch has no product of groups in float64")
    torch.manual_seed(0)
    model = new_causal_lm(CAUSAL[name], V).to(dtype).train()
    model.get_input_embeddings().eval()  # one part in another mode than the rest
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    state = torch.get_rng_state()
    assert probe_causal_lm(model) == OutputRule()
    check_causal(model, "it")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.dtype == before[key].dtype


def test_models_on_meta_and_on_a_device_map(tmp_path):
    with torch.device("meta"):
        assert probe_causal_lm(new_causal_lm(LLAMA, V)) == OutputRule()
        with pytest.raises(ValueError, match=r"on `meta`, and its logits_scaling=6\.0"):
            probe_causal_lm(new_causal_lm(SCALED["granite"], V))
    pytest.importorskip("accelerate")
    make(SCALED["granite"]).save_pretrained(tmp_path)
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert probe_causal_lm(spread).logit_scale == pytest.approx(1 / 6, rel=1e-6)


def test_the_seed_of_a_new_model_does_not_depend_on_the_probe():
    from transformers import AutoModel

    from lit_logits.modules.language_models.loading import make_config

    torch.manual_seed(0)
    plain = AutoModel.from_config(make_config({**LLAMA, "vocab_size": V}))
    after = torch.rand(1)
    torch.manual_seed(0)
    ours = load_backbone(LLAMA, vocab_size=V).model
    assert torch.equal(torch.rand(1), after)
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------- what else training needs


@pytest.mark.parametrize("method", [VQLogitsLM, CausalLM, partial(GLDFusionModule, kd_weight=0.0)])
def test_losses_of_routers_are_refused(method):
    config = {**CAUSAL["mixtral"], "output_router_logits": True}
    for model in (config, make(config)):
        with pytest.raises(ValueError, match="Expected `output_router_logits: false`, but 'mixtral' sets it"):
            method(model, vocab_size=V)


@pytest.mark.parametrize("method", [partial(VQLogitsLM, head=DENSE), CausalLM, partial(GLDFusionModule, kd_weight=0.0)])
def test_packed_sequences_do_not_see_each_other(method):
    """Two texts in one row, told apart by position ids, have the loss that they have alone."""
    torch.manual_seed(0)
    model = quiet(method(make(LLAMA), vocab_size=V).eval())
    one, two = torch.randint(V, (1, 5)), torch.randint(V, (1, 6))
    packed = torch.cat([one, two], 1)
    labels = packed.clone()
    labels[0, 5] = -100
    positions = torch.cat([torch.arange(5), torch.arange(6)]).unsqueeze(0)
    rows = {"input_ids": packed, "labels": labels, "position_ids": positions}
    alone = [model.training_step(batch(text), 0) for text in (one, two)]
    torch.testing.assert_close(model.training_step(rows, 0), (4 * alone[0] + 5 * alone[1]) / 9)
    if hasattr(model, "hidden_states"):
        torch.testing.assert_close(model(packed, position_ids=positions)[:, 5:], model(two))


def test_a_mask_of_ones_does_not_mix_packed_sequences():
    model = make(LLAMA)
    one, two = torch.randint(V, (1, 5)), torch.randint(V, (1, 6))
    positions = torch.cat([torch.arange(5), torch.arange(6)]).unsqueeze(0)
    packed = torch.cat([one, two], 1)
    for method in (partial(VQLogitsLM, head=DENSE), CausalLM):
        module = quiet(method(copy.deepcopy(model)).eval())
        torch.testing.assert_close(module(packed, torch.ones_like(packed), positions)[:, 5:], module(two))


def test_models_that_would_mix_packed_sequences_say_so():
    positions = torch.cat([torch.arange(3), torch.arange(4)]).expand(2, -1)
    for name in ("mamba", "llama"):
        module = quiet(CausalLM(make(CAUSAL[name])).eval())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            module.training_step(batch(position_ids=positions), 0)
        assert any("packed into a row" in str(one.message) for one in told) == (name == "mamba")


def test_models_without_position_ids_go_without():
    rows = batch(position_ids=torch.arange(7).expand(2, -1))
    for method in (partial(VQLogitsLM, head=DENSE), CausalLM):
        assert quiet(method(make(CAUSAL["mamba"])).eval()).training_step(rows, 0).isfinite()


@pytest.mark.parametrize("method", [partial(VQLogitsLM, head=DENSE), CausalLM, DynamicFusionDecoder])
def test_a_config_with_several_end_tokens(method):
    """As Llama 3 has; the probe put the list into a set."""
    model = new_causal_lm({**LLAMA, "eos_token_id": [1, 2, V + 7]}, V)
    assert model.config.eos_token_id == [1, 2]  # those of the vocabulary
    method(model)
    if method is not DynamicFusionDecoder:
        method({**LLAMA, "eos_token_id": [1, 2]}, V)


def test_the_vocabulary_of_a_nested_text_config():
    text = {name: value for name, value in GQA.items()}
    config = {"model_type": "gemma3", "text_config": {**text, "head_dim": 8}}
    module = VQLogitsLM(config, V, head=DENSE)
    assert module.vocab_size == module.backbone.config.text_config.vocab_size == V
    with pytest.raises(ValueError, match=f"to be the tokenizer's {V}, but got 9"):
        VQLogitsLM({"model_type": "gemma3", "text_config": {**text, "vocab_size": 9}}, V, head=DENSE)
    with pytest.raises(ValueError, match=r"but got 'llava'\. That of its text is 'llama'"):
        VQLogitsLM({"model_type": "llava"}, V, head=DENSE)


def test_settings_that_make_no_model_are_told():
    with pytest.raises(ValueError, match="Expected settings that make a model, but those of 'reformer' do not"):
        VQLogitsLM({"model_type": "reformer", "hidden_size": 32}, V, head=DENSE)


def test_several_end_tokens():
    model = VQLogitsLM(make(LLAMA), V, head=DENSE)
    free = model.generate(IDS, max_new_tokens=6)
    ends = [int(free[0, 8]), int(free[1, 9])]
    found = model.generate(IDS, max_new_tokens=6, eos_token_id=ends)
    for row, text in zip(found.tolist(), free.tolist(), strict=True):
        stop = next(i for i in range(7, 13) if text[i] in ends)
        assert row[: stop + 1] == text[: stop + 1]
        assert set(row[stop + 1 :]) <= {ends[0]}
    assert torch.equal(model.generate(IDS, max_new_tokens=6, eos_token_id=[]), free)


def test_predictions_without_labels():
    model = VQLogitsLM(make(LLAMA), V, head=DENSE).eval()
    found = model.predict_step({"input_ids": IDS}, 0)
    assert found.keys() == {"greedy"}
    assert torch.equal(found["greedy"], model.predict_step(batch(), 0)["greedy"])


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(name, value):
    model = make(LLAMA)
    with torch.no_grad():
        model.get_parameter(name)[V // 2 % 16, 3] = value
    for method in (VQLogitsLM, CausalLM):
        with pytest.raises(ValueError, match=f"Expected finite weights, but `{name}` of LlamaForCausalLM"):
            method(model)


def test_wrappers_of_peft_are_refused_in_words():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(LLAMA), peft.LoraConfig(target_modules=["q_proj"]))
    for method in (VQLogitsLM, CausalLM, partial(GLDFusionModule, kd_weight=0.0)):
        with pytest.raises(ValueError, match=r"PeftModel is peft's wrapper around one\. Pass `model\.merge"):
            method(model)
    with pytest.raises(ValueError, match="a backbone without adapters, but LlamaForCausalLM has some"):
        VQLogitsLM(model.get_base_model(), head=DENSE)
    VQLogitsLM(model.merge_and_unload(), head=DENSE)
    with pytest.raises(ValueError, match="a model of transformers, but got Linear"):
        CausalLM(nn.Linear(2, 2))
