"""Compressing a pretrained model: `VQLogitsLM` with residual codes, recovery, and which options fit.

Letters: T sequence, V vocabulary.
"""

import copy
from functools import partial

import pytest
import torch
from compressed_models import CODES, compress, started_model, trained_folder  # noqa: F401  # fixtures by name
from tiny_vq_models import T, V, loader, make_trainer, rows
from transformers import AutoModelForCausalLM

from lit_logits import VQLogitsLM
from lit_logits.modules import DenseLogitsHead, ResidualVQLogitsHead, VQLogitsHead, calibrate, describe_model


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
