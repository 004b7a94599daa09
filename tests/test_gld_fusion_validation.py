"""What a validation logs of the sources: the terms of training, as far as the sources are at hand."""

import lightning as L
import pytest
import torch
from test_gld_fusion_module import PIVOT_SIZE, make, make_batch, make_model
from test_gld_fusion_terms import TERMS, make_with_terms
from torch.utils.data import DataLoader

from lit_logits import GLDFusionModule
from lit_logits.modules import LinearRamp

NAMES = {f"val/loss_{term}/{name}" for term in ("uld", "chunk") for name in ("near", "far")}
NAMES |= {"val/loss_kl/near", "val/loss_matched/far"}


def loader():
    return DataLoader(range(4), batch_size=3, collate_fn=make_batch)  # of three samples and of one


def quiet_trainer(tmp_path, **kwargs):
    quick = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **quick, **kwargs)


@pytest.fixture
def told(monkeypatch):
    found = []
    monkeypatch.setattr("lit_logits.gld_fusion.rank_zero_info", found.append)
    return found


def test_terms_are_means_over_samples(tmp_path, told):
    """Those of one batch of all, as training computes them; no routing is needed, though training has one."""
    module = make_with_terms(source_routing="column", source_weights=None)
    logged = quiet_trainer(tmp_path).validate(module, loader(), verbose=False)[0]
    assert set(logged) == NAMES | {"val/loss", "val/ppl"}
    losses = make_with_terms().losses(make_batch())
    for name, terms in losses.terms.items():
        for term, values in terms.items():
            assert logged[f"val/loss_{term}/{name}"] == pytest.approx(values.mean().item(), rel=1e-4), term
    assert not told
    tested = quiet_trainer(tmp_path).test(module, loader(), verbose=False)[0]
    assert set(tested) == {"test/loss", "test/ppl"}
    assert tested["test/loss"] == logged["val/loss"]


def test_one_source_goes_without_its_name_and_the_loss_is_that_without_sources(tmp_path):
    sources = {"near": make_model(1, PIVOT_SIZE)}
    with_terms, without = (
        GLDFusionModule(make_model(0, PIVOT_SIZE), sources, top_k=4, validate_terms=wanted) for wanted in (True, False)
    )
    logged, plain = (quiet_trainer(tmp_path).validate(one, loader(), verbose=False)[0] for one in (with_terms, without))
    assert set(logged) == {"val/loss", "val/ppl", "val/loss_uld", "val/loss_gld"}
    assert set(plain) == {"val/loss", "val/ppl"}
    assert plain["val/loss"] == pytest.approx(logged["val/loss"], rel=1e-6)


def test_a_batch_that_a_source_does_not_know_is_left_out_and_told_once(tmp_path, told):
    """As where a cache holds the rows of training alone."""
    module = make_with_terms()
    original = module.sources["far"].forward

    def forward(batch, *args):
        if 3 in batch["sample_ids"]:
            raise ValueError("Expected the cache to hold sample 3.")
        return original(batch, *args)

    module.sources["far"].forward = forward
    for _ in range(2):
        logged = quiet_trainer(tmp_path).validate(module, loader(), verbose=False)[0]
    assert set(logged) == NAMES | {"val/loss", "val/ppl"}
    values = make_with_terms().losses(make_batch([0, 1, 2])).terms["far"]["matched"]
    assert logged["val/loss_matched/far"] == pytest.approx(values.mean().item(), rel=1e-4)
    [sentence] = told
    assert sentence.startswith("val/loss_* of source 'far' leave out what it cannot be compared in. Expected the cache")


def test_sources_that_are_not_loaded_stay_so(tmp_path, told):
    make_model(1, PIVOT_SIZE).save_pretrained(tmp_path / "source")
    module = GLDFusionModule(make_model(0, PIVOT_SIZE), {"near": str(tmp_path / "source")}, top_k=4)
    logged = quiet_trainer(tmp_path).validate(module, loader(), verbose=False)[0]
    assert set(logged) == {"val/loss", "val/ppl"}
    assert "loaded to train and to predict alone" in told[0]
    quiet_trainer(tmp_path, max_steps=1).fit(module, loader(), loader())
    assert {"val/loss_uld", "val/loss_gld"} <= set(quiet_trainer(tmp_path).validate(module, loader(), verbose=False)[0])


def test_terms_that_weigh_nothing_yet_are_not_logged(tmp_path):
    """λ rises from 0: the sanity check and the first validation run no source."""
    seen = []

    class Watched(GLDFusionModule):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            seen.append((self.global_step, sorted(key for key in self.trainer.callback_metrics if "val/loss_" in key)))

    module = Watched(
        make_model(0, PIVOT_SIZE),
        {"near": make_model(1, PIVOT_SIZE)},
        kd_weight=LinearRamp(0.0, 0.5, steps=2, after=1),
        terms={"kl": 1.0},
        top_k=4,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    quiet_trainer(tmp_path, max_steps=2, val_check_interval=1).fit(module, loader(), loader())
    assert seen == [(0, []), (1, []), (2, ["val/loss_kl"])]


def test_supervised_fine_tuning_validates_without_sources(tmp_path):
    module = make(kd_weight=0.0, terms=TERMS)
    for source in module.sources.values():
        source.forward = None  # any call would fail
    assert set(quiet_trainer(tmp_path).validate(module, loader(), verbose=False)[0]) == {"val/loss", "val/ppl"}
