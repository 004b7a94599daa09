"""Compressing a pretrained model: `VQLogitsLM` with residual codes, recovery, and what transformers loads afterwards.

Letters: B batch, T sequence, V vocabulary.
"""

import copy
import inspect
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from tiny_vq_models import T, V, loader, make_trainer, pretrained, rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_logits import VQLogitsLM
from lit_logits.callbacks import SavePretrained
from lit_logits.cli import main
from lit_logits.modules import (
    DenseLogitsHead,
    OriginalOutput,
    ResidualVQLogitsHead,
    VQLogitsForCausalLM,
    VQLogitsHead,
    calibrate,
    describe_model,
)

CODES = {"codebook_size": 8, "num_groups": 4, "num_stages": {20: 2, 61: 1}, "bias": False, "calibration_batches": 3}


@pytest.fixture
def folder(tmp_path):
    """A small pretrained model, trained a little, so that its logits say something."""
    path = tmp_path / "original"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=V - 1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(15):
        for batch in loader(32, 16):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(path)
    return str(path)


HEAD_ARGUMENTS = inspect.signature(ResidualVQLogitsHead).parameters.keys()


def compress(folder, seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {**CODES, "kd_weight": 1.0, "optimizer": partial(torch.optim.Adam, lr=0.003), **kwargs}
    if "head" not in settings:
        is_single = (settings["num_groups"], settings["num_stages"]) == (1, 1)
        head, kept = (VQLogitsHead, {"codebook_size", "bias"}) if is_single else (ResidualVQLogitsHead, None)
        own = {name: settings.pop(name) for name in HEAD_ARGUMENTS & settings.keys()}
        settings["head"] = partial(head, **{name: value for name, value in own.items() if not kept or name in kept})
    return VQLogitsLM(folder, **{name: value for name, value in settings.items() if name not in HEAD_ARGUMENTS})


@pytest.fixture
def started(folder):
    """A compressed model as it starts."""
    model = compress(folder)
    model.initialize_head(loader())
    return model.eval()


# --- training ---


def test_recovery_lowers_the_divergence_on_text_it_has_not_seen(folder, tmp_path):
    model, data = compress(folder), loader(32, seed=1)
    model.initialize_head(loader(64))
    trainer = make_trainer(tmp_path, max_epochs=6)
    before = trainer.validate(model, data, verbose=False)[0]
    trainer.fit(model, loader(64))
    after = trainer.validate(model, data, verbose=False)[0]
    assert after["val/kl"] < 0.6 * before["val/kl"]
    assert {"val/loss", "val/ppl", "val/ppl_ratio"} <= after.keys()


def test_fisher_weights_fit_to_what_the_original_is_unsure_about(folder, started):
    """Codes, tiers and metric follow E[p (1 − p)] of the original, whatever occurs; the divergence is lower for it."""
    model = compress(folder, token_weights="fisher")
    model.initialize_head(loader())
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    layer = original.lm_head.weight.detach()
    calibration = calibrate(
        loader(),
        num_batches=CODES["calibration_batches"],
        vocab_size=V,
        device=torch.device("cpu"),
        backbone=original.base_model,
        output_layer=(layer, None),
    )
    information = calibration.token_information
    two = information.topk(20).indices
    assert set((model.head.token_stages() == 2).nonzero().flatten().tolist()) == set(two.tolist())
    assert set(calibration.token_counts.topk(20).indices.tolist()) != set(two.tolist())
    codes = {name: CODES[name] for name in ("codebook_size", "num_groups", "num_stages")}
    expected = VQLogitsHead.from_dense(
        layer,
        token_counts=information,
        count_power=1.0,
        hidden_second_moment=calibration.informed_second_moment,
        generator=torch.Generator().manual_seed(torch.initial_seed() % (1 << 63)),
        **codes,
    )
    torch.testing.assert_close(model.head.dense_weight(), expected.dense_weight())

    def divergence(head):
        ids = torch.stack([row["input_ids"] for row in rows(64, seed=1)])
        with torch.no_grad():
            p, q = (logits.log_softmax(-1) for logits in (original(ids).logits, head(original.base_model(ids)[0])))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(model.head) < divergence(started.head)


def test_validation_compares_with_the_original(folder, started, tmp_path):
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    logged = make_trainer(tmp_path).validate(started, loader(8, seed=1, ragged=True), verbose=False)[0]
    ours = theirs = divergence = count = 0.0
    for row in rows(8, seed=1, ragged=True):
        with torch.no_grad():
            inputs = {name: row[name][None] for name in ("input_ids", "attention_mask")}
            p = original(**inputs).logits[0, :-1].double().log_softmax(-1)
            q = started(**inputs)[0, :-1].double().log_softmax(-1)
        for position, label in enumerate(row["labels"][1:].tolist()):
            if label != -100:
                ours -= float(q[position, label])
                theirs -= float(p[position, label])
                divergence += float((p[position].exp() * (p[position] - q[position])).sum())
                count += 1
    assert logged["val/loss"] == pytest.approx(ours / count, rel=1e-4)
    assert logged["val/kl"] == pytest.approx(divergence / count, rel=1e-4)
    assert logged["val/ppl_ratio"] == pytest.approx(2.718281828 ** ((ours - theirs) / count), rel=1e-4)


def test_the_loss_mixes_divergence_and_cross_entropy(folder, tmp_path):
    model = compress(folder, kd_weight=0.25)
    model.initialize_head(loader())
    trainer = make_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(model, loader())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = 0.25 * logged["train/loss_kd"] + 0.75 * logged["train/loss_ce"]
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_the_original_stays_as_it_was_and_out_of_the_checkpoint(folder, tmp_path):
    model = compress(folder)
    (held,) = model.original._held
    weights, table = copy.deepcopy(held.state_dict()), model.original._rows.weight.clone()
    before = model.backbone.get_input_embeddings().weight.detach().clone()
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    assert not torch.equal(model.backbone.get_input_embeddings().weight, before)
    assert torch.equal(model.original._rows.weight, table)
    for name, tensor in held.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert not held.training
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if name.startswith("original")]
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == sum(p.numel() for p in model.backbone.parameters()) + 2 * 8 * 16


def test_a_frozen_backbone_serves_as_the_original(folder, tmp_path):
    model = compress(folder, num_trainable_layers=0, optimizer=partial(torch.optim.Adam, lr=0.01))
    before = copy.deepcopy(model.backbone.state_dict())
    codes = None
    trainer = make_trainer(tmp_path, max_epochs=3)
    model.initialize_head(loader(64))
    codes = model.head.codebook.detach().clone()
    start = trainer.validate(model, loader(), verbose=False)[0]["val/kl"]
    trainer.fit(model, loader(64))
    assert trainer.validate(model, loader(), verbose=False)[0]["val/kl"] < start
    assert not torch.equal(model.head.codebook, codes)
    assert not model.original._held
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_last_layers_are_trained_and_the_others_shared_with_the_original(folder, tmp_path):
    model = compress(folder, num_trainable_layers=1)
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layers", "norm"}
    assert {name.split(".")[1] for name in trained if name.startswith("layers")} == {"1"}
    (held,) = model.original._held
    before = copy.deepcopy(model.backbone.state_dict())
    make_trainer(tmp_path).fit(model, loader())
    theirs = dict(held.named_parameters())
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
        assert (theirs[name] is parameter) == (name not in trained)
        assert torch.equal(theirs[name], before[name])


def test_what_is_shared_with_the_original_runs_once(folder):
    model = compress(folder, num_trainable_layers=1)
    model.initialize_head(loader())
    (held,) = model.original._held
    with torch.no_grad():  # the last layers differ, as after some training
        for parameter in model.backbone.layers[1].parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    runs = []
    for layers in (model.backbone.layers, held.layers):
        for layer in layers:
            layer.mlp.register_forward_hook(lambda module, *_: runs.append(module))
    batch = next(iter(loader()))
    once, _ = model._losses(batch, model.original)
    layers = [*model.backbone.layers, *held.layers]
    assert [layers.index(next(layer for layer in layers if layer.mlp is run)) for run in runs] == [0, 1, 3]
    model.original.num_shared_layers = 0
    twice, _ = model._losses(batch, model.original)
    assert len(runs) == 3 + 4
    for one, other in zip(once, twice, strict=True):
        assert torch.equal(one, other)
    assert once.divergence.max() > 1e-3


def test_the_layers_of_the_original_run_where_the_models_run_failed(folder):
    model = compress(folder, num_trainable_layers=1)
    with pytest.raises(IndexError), model.original.sharing_layers(model.backbone):
        model.hidden_states(torch.tensor([[V + 1]]))
    ids = torch.randint(V, (2, T))
    with model.original.sharing_layers(model.backbone):  # nothing has run, so nothing is gone on from
        hidden = model.original.target(torch.zeros(0), input_ids=ids).hidden
    torch.testing.assert_close(hidden, model.hidden_states(ids).detach())
    with model.original.sharing_layers(model.backbone):
        model.hidden_states(ids)
    other = torch.randint(V, (2, T))  # what has run before is forgotten
    hidden = model.original.target(torch.zeros(0), input_ids=other).hidden
    torch.testing.assert_close(hidden, model.hidden_states(other).detach())


def test_layers_that_read_more_than_the_one_before_are_not_shared(folder, monkeypatch):
    """As those of models that share keys and values among layers."""
    layer_class = type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0])
    forward, kept = layer_class.forward, []

    def remembers(layer, hidden, **kwargs):
        if layer.self_attn.layer_idx == 0:
            kept.append(hidden)
            return forward(layer, hidden, **kwargs)
        return forward(layer, hidden + kept.pop(), **kwargs)

    assert compress(folder, num_trainable_layers=1).original.num_shared_layers == 1
    monkeypatch.setattr(layer_class, "forward", remembers)
    assert compress(folder, num_trainable_layers=1).original.num_shared_layers == 0


def test_what_is_frozen_drops_nothing(tmp_path):
    pretrained("gpt2", tmp_path / "dropout")
    model = compress(str(tmp_path / "dropout"), num_trainable_layers=1).train()
    assert model.backbone.drop.p > 0
    assert not model.backbone.drop.training
    *first, last = model.backbone.h
    assert last.mlp.dropout.training
    assert not any(layer.mlp.dropout.training for layer in first)
    assert model.original.num_shared_layers == len(first) > 0
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "dropout").requires_grad_(False)
    assert not compress(by_hand).train().backbone.drop.training


@pytest.mark.parametrize("layers", [0, 1])
def test_the_original_is_the_original_after_a_checkpoint_of_other_trained_layers(folder, tmp_path, layers):
    """What is frozen now was trained then; it was shared with the original, which the checkpoint overwrote."""
    trained = compress(folder, optimizer=partial(torch.optim.Adam, lr=0.05))
    trainer = make_trainer(tmp_path)
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    model = VQLogitsLM.load_from_checkpoint(tmp_path / "all.ckpt", num_trainable_layers=layers)
    ids = torch.randint(V, (2, T))
    with model.original.sharing_layers(model.backbone):
        target = model.original.target(model.hidden_states(ids), input_ids=ids)
    logits = target.hidden @ target.weight.T
    torch.testing.assert_close(logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach())
    assert not torch.allclose(model.hidden_states(ids), target.hidden)


def test_a_head_is_started_once(started):
    with pytest.raises(ValueError, match="Expected the rows of the pretrained output layer, but they were freed"):
        started.initialize_head(loader())


def test_the_papers_head_recovers_by_divergence_too(folder, tmp_path):
    model = compress(folder, num_groups=1, num_stages=1, codebook_size=20, bias=True)
    model.initialize_head(loader(64))
    trainer = make_trainer(tmp_path, max_epochs=4)
    before = trainer.validate(model, loader(), verbose=False)[0]["val/kl"]
    trainer.fit(model, loader(64))
    assert trainer.validate(model, loader(), verbose=False)[0]["val/kl"] < 0.9 * before
    assert model.head.token_counts.any()


def test_resumed_equals_uninterrupted(folder, tmp_path):
    whole = compress(folder)
    make_trainer(tmp_path, max_epochs=2).fit(whole, loader())
    half = compress(folder)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(half, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = compress(folder, seed=1)
    make_trainer(tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_byte_budget_chooses_tiers_that_a_checkpoint_brings_back(folder, tmp_path):
    options = {"num_stages": 2, "byte_budget": 0.33}
    model = compress(folder, **options)
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    assert len(model.head.token_stages().unique()) > 1
    size = copy.deepcopy(model.head).bfloat16().footprint()
    assert 0.31 < size.bytes / size.dense_bytes <= 0.33
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = VQLogitsLM.load_from_checkpoint(tmp_path / "last.ckpt")
    ids = torch.arange(T)[None]
    torch.testing.assert_close(loaded.eval()(ids), model.eval()(ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_weight": 1.5}, r"Expected `kd_weight` to be in \[0, 1\], but got 1.5"),
        ({"num_groups": 5}, "Expected `num_groups` to divide the hidden size 16, but got 5. Groups .* good size: 2."),
        ({"head": partial(VQLogitsHead, codebook_size=8, mapping="learned")}, r"without latents .*got VQLogitsHead"),
        ({"num_trainable_layers": 3}, r"Expected `num_trainable_layers` to be in \[0, 2\], the layers of LlamaModel"),
        (
            {"head": partial(DenseLogitsHead, bias=False)},
            "can imitate the original with `kd_weight`.*got DenseLogitsHead",
        ),
        ({"token_weights": "entropy"}, "Expected `token_weights` to be 'counts' or 'fisher', but got 'entropy'"),
        ({"head": "vq"}, "Expected `head` to be called with .* but got 'vq'. Version 0.1"),
        (
            {"head": lambda d, v: torch.nn.Linear(d, v)},
            r"Expected `head` to make an `nn.Module` with `loss.*got Linear",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(folder, options, message):
    with pytest.raises(ValueError, match=message):
        compress(folder, **options)


@pytest.mark.parametrize(
    ("head", "argument"),
    [
        (DenseLogitsHead, "codebook_size"),
        (DenseLogitsHead, "mapping"),
        (VQLogitsHead, "num_groups"),
        (VQLogitsHead, "byte_budget"),
        (ResidualVQLogitsHead, "mapping"),
        (ResidualVQLogitsHead, "init"),
    ],
)
def test_an_argument_of_another_head_cannot_be_given(folder, head, argument):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        VQLogitsLM(folder, head=partial(head, **{argument: 1}))


def test_imitation_and_residual_codes_need_a_pretrained_model():
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    with pytest.raises(ValueError, match="Expected a pretrained backbone for `kd_weight`"):
        VQLogitsLM(config, V, kd_weight=0.5, head=partial(VQLogitsHead, codebook_size=8))
    with pytest.raises(ValueError, match="Expected a pretrained backbone for residual product codes"):
        VQLogitsLM(config, V, head=partial(ResidualVQLogitsHead, codebook_size=8, num_groups=4))


def test_the_original_moves_with_the_module():
    original = OriginalOutput(torch.zeros(5, 3), torch.zeros(5), torch.nn.Linear(2, 2)).to(torch.float64)
    assert original._rows.weight.dtype == original._rows.bias.dtype == original._held[0].weight.dtype == torch.float64


@pytest.mark.parametrize("tied", [True, False])
def test_the_report_counts_the_whole_model_before_and_after(folder, tied):
    model = compress(folder)
    model.initialize_head(loader())
    text = describe_model(model.backbone, model.head, tied=tied)
    original = AutoModelForCausalLM.from_pretrained(folder)
    before = sum(parameter.numel() for parameter in original.parameters()) + (0 if tied else V * 16)
    after = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.to_pretrained().state_dict().values())
    assert f"{before:,} parameters, {4 * before / 1e6:,.1f} MB" in text
    assert f"{after:,} parameters, {stored / 1e6:,.1f} MB" in text
    assert ("tied" in text) == tied


# --- export ---


@pytest.mark.parametrize("head", ["compact", "dense"])
def test_a_saved_model_gives_the_logits_of_training(started, tmp_path, head):
    started.save_pretrained(tmp_path / "saved", head=head)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.randint(V, (3, T))
    torch.testing.assert_close(loaded(ids).logits, started(ids), rtol=1e-5, atol=1e-5)
    assert type(loaded) is (VQLogitsForCausalLM if head == "compact" else LlamaForCausalLM)
    assert loaded(ids, logits_to_keep=1).logits.shape == (3, 1, V)
    loss = loaded(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(started(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_papers_head_is_saved_too(folder, tmp_path):
    model = compress(folder, num_groups=1, num_stages=1, codebook_size=20, bias=True)
    model.initialize_head(loader())
    model.eval().save_pretrained(tmp_path / "saved")
    ids = torch.randint(V, (3, T))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids))
    with pytest.raises(ValueError, match="Expected a head without a token bias"):
        model.save_pretrained(tmp_path / "dense", head="dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("head", ["compact", "dense"])
@pytest.mark.parametrize("sampled", [False, True])
def test_generation_left_padded_and_batched_equals_one_by_one(started, head, sampled):
    model = started.to_pretrained(head)
    long, short = torch.randint(1, V - 1, (1, 9)), torch.randint(1, V - 1, (1, 4))
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": sampled, **({"top_k": 1} if sampled else {})}
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    alone = [
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :] for ids in (long, short)
    ]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours[: len(theirs)].tolist() == theirs.tolist()
    uncached = model.generate(long, attention_mask=torch.ones_like(long), use_cache=False, **options)[0, 9:]
    assert uncached.tolist() == alone[0].tolist()
    if not sampled:
        assert together[0].tolist() == started.generate(long, max_new_tokens=6)[0, 9:].tolist()[: len(together[0])]


@pytest.mark.slow
def test_a_compact_folder_loads_in_a_new_process_and_generates(started, tmp_path):
    started.save_pretrained(tmp_path / "saved", tokenizer=tokenizer())
    script = (
        "import lit_logits\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('saved')\n"
        "ids = AutoTokenizer.from_pretrained('saved')('w3 w6 w9', return_tensors='pt').input_ids\n"
        "print(model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    prompt = torch.tensor([[3, 6, 9]])
    expected = started.to_pretrained().generate(prompt, max_new_tokens=4, do_sample=False)[0].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{V - 1}", pad_token="w0")


def test_a_saved_model_can_be_saved_again_and_in_half_precision(started, tmp_path):
    started.save_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert first.dtype == torch.bfloat16
    assert started.head.codebook.dtype == torch.float32
    first.save_pretrained(tmp_path / "second")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    ids = torch.randint(V, (2, T))
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert (first(ids).logits - started(ids)).abs().max() < 0.2


def test_a_cut_off_or_foreign_folder_is_refused(started, tmp_path):
    from safetensors.torch import load_file, save_file

    started.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="Expected the weights of a compressed model, but reading them failed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["head.packed_stages"] = torch.zeros_like(tensors["head.packed_stages"])
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the mapping is cut off or another head's"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tensors = load_file(weights)
    tensors["head.packed_codes"] = tensors["head.packed_codes"][:-3].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Expected weights of the sizes that the folder's config names"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_folder_without_its_head_is_refused(started, tmp_path):
    from safetensors.torch import load_file, save_file

    started.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(weights)
    for name in ("head.packed_codes", "head.codebook"):
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(rest, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"Expected the folder to hold the compressed head, but \['{name}'\]"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_loaded_model_is_tuned_with_accumulation(started, tmp_path):
    """With transformers' Trainer, whose accumulation takes a model with `**kwargs` for one that divides by itself."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows(8)]
    started.save_pretrained(tmp_path / "compact")
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "compact"), arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The one step reads all rows.
    ids, labels = (torch.stack([torch.as_tensor(row[name]) for row in data]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        mean = torch.nn.functional.cross_entropy(started(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # transformers 5.3 divides the sum by the labels of all positions, of which the first has no prediction.
    shifts = "shift" in inspect.getsource(Trainer._get_num_items_in_batch)
    expected = float(mean) if shifts else float(mean) * labels[:, 1:].numel() / labels.numel()
    assert losses == pytest.approx([expected], rel=1e-3)


def test_a_loaded_model_answers_as_transformers_own(started):
    model = started.to_pretrained()
    ids = torch.randint(V, (2, T))
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    assert (model.config.vocab_size, model.config.hidden_size) == (V, 16)
    assert model.resize_token_embeddings() is model.resize_token_embeddings(V) is model.get_input_embeddings()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mask = torch.ones_like(ids)
    beams = [started.to_pretrained(h).generate(ids, attention_mask=mask, **options) for h in ("compact", "dense")]
    assert torch.equal(*beams)


def test_exporting_in_the_middle_of_training_leaves_the_modes(started, tmp_path):
    started.train()
    started.save_pretrained(tmp_path / "saved")
    assert all(module.training for module in (started, started.backbone, started.head))


def test_a_compact_head_cannot_be_resized(started):
    model = started.to_pretrained()
    with pytest.raises(ValueError, match="Expected the vocabulary that the output head was compressed for"):
        model.resize_token_embeddings(V + 3)
    assert started.to_pretrained("dense").get_output_embeddings().weight.shape == (V, 16)


def test_nothing_half_written_is_left(started, tmp_path, monkeypatch):
    started.save_pretrained(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    monkeypatch.setattr(VQLogitsForCausalLM, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        started.save_pretrained(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if "saved" in path.name] == ["saved"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'thesis\.txt'"):
        started.save_pretrained(tmp_path / "other")


def test_a_model_without_an_output_layer_and_a_dense_head_are_refused(folder):
    from transformers import AutoModel

    with pytest.raises(ValueError, match="output layer"):
        compress(AutoModel.from_pretrained(folder))
    dense = VQLogitsLM(folder, head=partial(DenseLogitsHead, bias=False))
    with pytest.raises(ValueError, match=r"for head='compact', .*but got DenseLogitsHead\. Use head='dense'"):
        dense.to_pretrained()
    ids = torch.randint(V, (2, T))
    torch.testing.assert_close(dense.to_pretrained("dense")(ids).logits, dense.eval()(ids))
    with pytest.raises(ValueError, match="'compact' or 'dense', but got 'gguf'"):
        compress(folder).to_pretrained("gguf")


def test_an_untied_model_with_a_bias_of_its_own_is_compressed(tmp_path):
    """GPT-2 has no bias in its output layer, but its base model is called otherwise."""
    pretrained("gpt2", tmp_path / "original")
    model = compress(str(tmp_path / "original"))
    model.initialize_head(loader())
    ids = torch.randint(V, (2, T))
    for head in ("compact", "dense"):
        model.eval().save_pretrained(tmp_path / head, head=head)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / head)
        torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=1e-5, atol=1e-5)


# --- the callback and the command line ---


class Snapshots(Callback):
    """Moves the codebooks by so much before each validation, and keeps the model as it is then, with its KL."""

    def __init__(self, noise):
        self.noise, self.taken = noise, []

    def on_train_start(self, trainer, pl_module):
        self.start = pl_module.head.codebook.detach().clone()
        self.direction = torch.randn(self.start.shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def on_validation_start(self, trainer, pl_module):
        pl_module.head.codebook.copy_(self.start + self.noise[len(self.taken)] * self.direction)

    def on_validation_end(self, trainer, pl_module):
        kl = float(trainer.callback_metrics["val/kl"])
        self.taken.append((kl, copy.deepcopy(pl_module.to_pretrained("dense"))))


@pytest.mark.parametrize("head", ["compact", "dense"])
def test_the_best_compressed_model_is_saved(folder, tmp_path, head):
    """The best comes in the middle, whatever the processor's arithmetic makes of training: the rate is 0."""
    model, snapshots = compress(folder, optimizer=partial(torch.optim.SGD, lr=0.0)), Snapshots([0.2, 0.0, 0.4, 0.8])
    callback = SavePretrained(str(tmp_path / "best"), monitor="val/kl", head=head)
    trainer = make_trainer(tmp_path, max_epochs=4, num_sanity_val_steps=0, callbacks=[callback, snapshots])
    trainer.fit(model, loader(), loader(8, seed=1))
    losses = [kl for kl, _ in snapshots.taken]
    assert sorted(range(4), key=losses.__getitem__) == [1, 0, 2, 3]
    best = snapshots.taken[1][1]
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "best"), torch.randint(V, (2, T))
    torch.testing.assert_close(loaded(ids).logits, best(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_saved_is_refused_before_any_training(folder, tmp_path):
    model = compress(folder, bias=True)
    trainer = make_trainer(tmp_path, callbacks=[SavePretrained(str(tmp_path / "best"), head="dense")])
    with pytest.raises(ValueError, match="Expected a head without a token bias"):
        trainer.fit(model, loader(), loader())
    assert trainer.global_step == 0
    assert model.backbone.training


@pytest.mark.slow
def test_the_recipe_compresses_a_model_from_the_command_line(tmp_path, monkeypatch):
    """The recipe that ships, with a small model, text and steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from lit_logits.datamodules import TextDataModule

    data = TextDataModule("python-docs", bpe_vocab_size=300)
    data.prepare_data()
    data.tokenizer.save_pretrained("model")
    config = LlamaConfig(
        vocab_size=data.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained("model")
    options = {
        "model.init_args.backbone": "model",
        "data.init_args.tokenizer": "model",
        "data.init_args.block_size": 32,
        "model.init_args.head.init_args.num_groups": 4,
        "model.init_args.head.init_args.codebook_size": 32,
        "model.init_args.calibration_batches": 4,
        "model.init_args.num_trainable_layers": 1,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 2,
        "trainer.accelerator": "cpu",
    }
    main(["fit", "--config", "vq_compress.yaml", *(f"--{name}={value}" for name, value in options.items())])
    loaded = AutoModelForCausalLM.from_pretrained("models/smollm2_compact")
    assert isinstance(loaded.head, ResidualVQLogitsHead)
    assert loaded.config.num_groups == 4
    ids = data.tokenizer("The following", return_tensors="pt").input_ids
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    assert yaml.safe_load(next((tmp_path / "runs").rglob("config.yaml")).read_text())
