"""`VQLogitsLM(head=...)`: heads of this library and of a user, from Python, from a recipe, and from a checkpoint.

Letters: T sequence, V vocabulary.
"""

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from my_heads import LowRankHead
from tiny_vq_models import ADAM, CONFIG, T, V, loader, make_trainer, rows

from lit_logits import VQLogitsLM
from lit_logits.cli import main
from lit_logits.contracts import (
    DecodingHead,
    ExportableHead,
    ImitatingHead,
    LearningHead,
    OutputHead,
    SizedHead,
    StartingHead,
)
from lit_logits.modules import DenseLogitsHead, HierarchicalVQLogitsHead, ResidualVQLogitsHead, VQLogitsHead

HEADS = {
    "vq": partial(VQLogitsHead, codebook_size=8, mapping="learned"),
    "dense": DenseLogitsHead,
    "own": partial(LowRankHead, rank=3),
    "lambda": lambda hidden_size, vocab_size: LowRankHead(hidden_size, vocab_size, 5),
}


def make(head, **kwargs):
    torch.manual_seed(0)
    return VQLogitsLM(CONFIG, V, head=head, calibration_batches=2, optimizer=ADAM, **kwargs)


@pytest.mark.parametrize("name", HEADS)
def test_any_head_trains_is_tested_predicts_and_generates(name, tmp_path):
    model, trainer = make(HEADS[name]), make_trainer(tmp_path, max_epochs=4)
    before = make_trainer(tmp_path).test(model, loader(seed=1), verbose=False)[0]["test/loss"]
    trainer.fit(model, loader(64))
    after = trainer.test(model, loader(seed=1), verbose=False)[0]
    assert after["test/loss"] < 0.9 * before
    ids = torch.randint(V, (2, 5))
    text, logits = model.generate(ids, max_new_tokens=6), model.eval()
    for end in range(5, 11):
        assert torch.equal(text[:, end], logits(text[:, :end])[:, -1].argmax(-1))
    drawn = model.generate(ids, max_new_tokens=6, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == text.shape
    batch = {name: torch.stack([row[name] for row in rows(2)]) for name in ("input_ids", "labels")}
    predicted = model.predict_step(batch, 0)
    assert torch.equal(predicted["greedy"], logits(batch["input_ids"])[:, :-1].argmax(-1))
    assert predicted["nll"].shape == (2, T - 1)


@pytest.mark.parametrize("name", HEADS)
def test_a_checkpoint_loads_on_its_own_or_asks_for_the_head(name, tmp_path):
    model, trainer = make(HEADS[name]), make_trainer(tmp_path)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    own = name in ("own", "lambda")
    if own:
        with pytest.raises(ValueError, match="Expected `head`, but the checkpoint does not tell it"):
            VQLogitsLM.load_from_checkpoint(tmp_path / "model.ckpt")
    given = {"head": HEADS[name]} if own else {}
    loaded = VQLogitsLM.load_from_checkpoint(tmp_path / "model.ckpt", **given)
    ids = torch.randint(V, (2, T))
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))
    assert type(loaded.head) is type(model.head)


def test_a_recipe_names_a_users_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = {"class_path": "my_heads.LowRankHead", "init_args": {"rank": 3}}
    arguments = {"backbone": CONFIG, "head": head, "calibration_batches": 1}
    data = {
        "class_path": "TextDataModule",
        "init_args": {"source": "text.txt", "bpe_vocab_size": 260, "block_size": 16},
    }
    Path("text.txt").write_text("\n\n".join(f"This is sentence {i} of the text." for i in range(200)))
    data["init_args"] |= {"cache_dir": str(tmp_path), "block_size": 16}
    trainer = {"max_steps": 2, "accelerator": "cpu", "limit_val_batches": 1, "enable_progress_bar": False}
    recipe = {"model": {"class_path": "VQLogitsLM", "init_args": arguments}, "data": data, "trainer": trainer}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(["fit", "--config", "recipe.yaml"])
    checkpoint = next(Path("runs").rglob("last.ckpt"))
    main(["test", "--config", "recipe.yaml", "--ckpt_path", str(checkpoint), "--trainer.logger", "false"])
    config = yaml.safe_load(next(Path("runs").rglob("config.yaml")).read_text())
    assert config["model"]["init_args"]["head"]["class_path"] == "my_heads.LowRankHead"
    loaded = VQLogitsLM.load_from_checkpoint(checkpoint)
    assert isinstance(loaded.head, LowRankHead)
    assert loaded.head.down.out_features == 3


@pytest.mark.parametrize("old", ["codebook_size", "mapping", "num_stages", "byte_budget"])
def test_a_recipe_of_version_0_1_is_told_the_new_form(old, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "VQLogitsLM", f"--model.{old}", "2", "--data", "TextDataModule"])
    error = capsys.readouterr().err
    assert f"`{old}`" in error
    head = "VQLogitsHead" if old in ("codebook_size", "mapping") else "ResidualVQLogitsHead"
    assert f"head: {{class_path: {head}, init_args: {{{old}: ...}}}}" in error


@pytest.mark.parametrize("name", ["dense", "vq"])
def test_a_head_by_its_old_name_is_told_the_new_form(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = {"backbone": CONFIG, "head": name}
    recipe = {"model": {"class_path": "VQLogitsLM", "init_args": arguments}, "data": {"class_path": "TextDataModule"}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "recipe.yaml"])
    assert "Since version 0.2 `head` is a class: `DenseLogitsHead`" in capsys.readouterr().err


def test_the_old_name_of_a_factor_is_told_the_new_one(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "DualHeadKD", "--model.kd_weight", "2", "--data", "ImageDataModule"])
    assert "Since version 0.2 it is `kd_factor`" in capsys.readouterr().err


def test_a_checkpoint_of_version_0_1_is_told_the_new_form(tmp_path):
    model = make(HEADS["vq"])
    saved = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.6", "hyper_parameters": {}}
    saved["hyper_parameters"] = {"backbone": CONFIG, "vocab_size": V, "head": "vq", "codebook_size": 8}
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"but got 'vq'\. Version 0\.1 took a name"):
        VQLogitsLM.load_from_checkpoint(tmp_path / "old.ckpt")


def test_which_contracts_the_heads_keep():
    made = {
        head: head(8, 20, **kwargs) for head, kwargs in ((VQLogitsHead, {"codebook_size": 4}), (DenseLogitsHead, {}))
    }
    vq, dense, residual = *made.values(), ResidualVQLogitsHead(8, 20, 4, num_groups=2)
    for head in (vq, dense, residual):
        assert all(
            isinstance(head, kind) for kind in (OutputHead, DecodingHead, ExportableHead, SizedHead, StartingHead)
        )
    assert isinstance(vq, LearningHead)
    assert isinstance(vq, ImitatingHead)
    assert isinstance(residual, ImitatingHead)
    assert (vq.can_imitate, residual.can_imitate) == (True, True)
    assert not isinstance(dense, ImitatingHead | LearningHead)
    two_levels = HierarchicalVQLogitsHead(8, 20, (4, 3))
    assert all(isinstance(two_levels, kind) for kind in (OutputHead, DecodingHead, SizedHead, StartingHead))
    assert not isinstance(two_levels, ExportableHead)
    own = LowRankHead(8, 20)
    assert isinstance(own, OutputHead)
    assert not isinstance(own, DecodingHead | ExportableHead | SizedHead | StartingHead | LearningHead | ImitatingHead)


def test_the_module_takes_ten_arguments_at_most():
    assert len(inspect.signature(VQLogitsLM).parameters) <= 10
