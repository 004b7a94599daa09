"""Models that accelerate spreads: all on the CPU, by name or by itself, and a layer that stays on disk."""

import pytest
import torch
from tiny_llamas import llama, moved
from tiny_vq_models import make_trainer

from lit_logits import DynamicFusionDecoder, GLDFusionModule
from lit_logits.modules.gld_fusion.sources import load_source

LAYERS = 2
SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
SPLIT |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS = {"one": {"": "cpu"}, "auto": "auto", "split": SPLIT}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A large and a small model, and a descendant of the small one."""
    folder = tmp_path_factory.mktemp("models")
    small = llama(1, num_hidden_layers=LAYERS)
    models = {"large": llama(0, hidden=32, num_hidden_layers=LAYERS), "base": small, "expert": moved(small, 2)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture(params=MAPS)
def kwargs(request, tmp_path):
    """What `from_pretrained` gets."""
    return {"device_map": MAPS[request.param], "offload_folder": str(tmp_path / "offload")}


def batch():
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def losses_with(source, kwargs, tmp_path):
    """What one step of training with a source logs."""
    model = GLDFusionModule(llama(3), {"a": source}, source_kwargs={"a": kwargs}, kd_weight=0.5)
    rows = [{name: value[0] for name, value in batch().items()}]
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(model, torch.utils.data.DataLoader(rows, batch_size=1))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_sources_of_fusion(folders, kwargs, tmp_path):
    source = load_source(folders["large"], "a", kwargs)
    assert source.pinned
    assert any(p.is_meta for p in source.model.parameters()) == (kwargs["device_map"] is SPLIT)  # the layer on disk
    expected = losses_with(folders["large"], {}, tmp_path)
    assert losses_with(folders["large"], kwargs, tmp_path) == pytest.approx(expected, rel=1e-5)
    assert expected["train/loss_uld"] > 0


def test_large_model_and_experts(folders, kwargs):
    parts = folders["large"], folders["base"], [folders["expert"]]
    plain = DynamicFusionDecoder(*parts)
    spread = DynamicFusionDecoder(*parts, model_kwargs=kwargs, small_kwargs=kwargs)
    data = batch()
    with torch.no_grad():
        expected = plain(data["input_ids"], data["attention_mask"])
        torch.testing.assert_close(spread(data["input_ids"], data["attention_mask"]), expected, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(spread.generate(data["input_ids"], **options), plain.generate(data["input_ids"], **options))
