"""The model at its best validation, as transformers reads it back; in the real Trainer."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import Strategy
from scripts import run_script
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from lit_logits.callbacks import SavePretrained
from lit_logits.callbacks.save_pretrained import _check_whole

V = 12
IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 8, 1, 0]])


def tiny(kind=LlamaForCausalLM, **kwargs):
    size = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    torch.manual_seed(0)
    return kind(LlamaConfig(**{**size, **heads, "bos_token_id": 1, "eos_token_id": 2, **kwargs}))


class LM(LightningModule):
    """Reports the losses that it is told, one a validation, and keeps its logits of that time."""

    def __init__(self, losses=(), model=None, **parts):
        super().__init__()
        self.losses, self.seen = list(losses), []
        for name, part in parts.items():
            self.add_module(name, part)
        self.model = tiny() if model is None else model

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.seen.append(logits(self.model))
            self.log("val/loss", self.losses[len(self.seen) - 1])
        else:
            self.log("val/loss", -100.0)

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.5)


def logits(model):
    was_training = model.training
    with torch.no_grad():
        result = model.eval()(input_ids=IDS).logits
    model.train(was_training)
    return result


def tokenizer():
    words = ["<bos>", "<end>", "<pad>", *(f"word{at}" for at in range(V - 3))]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


class Data(LightningDataModule):
    def __init__(self, with_validation=True, **attributes):
        super().__init__()
        self.with_validation = with_validation
        for name, value in attributes.items():
            setattr(self, name, value)

    def train_dataloader(self):
        return DataLoader(IDS, batch_size=1)

    def val_dataloader(self):
        return DataLoader(IDS, batch_size=2) if self.with_validation else []


def fit(folder, losses=(), model=None, data=None, ckpt_path=None, callbacks=(), callback=None, **kwargs):
    module = model if isinstance(model, LightningModule) else LM(losses, model)
    callback = callback or SavePretrained(None if folder is None else str(folder))
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    settings |= {"enable_model_summary": False, "max_epochs": len(losses) or 1}
    trainer = Trainer(**{**settings, **kwargs}, callbacks=[callback, *callbacks])
    trainer.fit(module, datamodule=data or Data(), ckpt_path=ckpt_path)
    return module, callback, trainer


def check(folder, expected):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    assert not list(folder.parent.glob(f"{folder.name}.*"))
    return loaded


# ---------------------------------------------------------------------- when


def test_averages_that_were_measured_are_what_is_saved(tmp_path):
    """The weights in training were saved under the metric of their averages."""
    folder = tmp_path / "model"
    module, *_ = fit(folder, [3.0, 2.0, 2.5], callbacks=[EMAWeightAveraging(decay=0.5, use_buffers=False)])
    check(folder, module.seen[1])
    last = tmp_path / "last"
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    module, *_ = fit(last, [3.0], data=Data(with_validation=False), callbacks=[average])
    check(last, logits(module.model))  # which the averages are at the end


@pytest.mark.parametrize(
    ("mode", "losses", "best"),
    [("min", [3.0, 2.0, 2.5, 2.0], 1), ("max", [3.0, 4.0, 2.5], 1), ("min", [float("nan"), 3.0, 4.0], 1)],
)
def test_the_best_validation_is_kept(tmp_path, mode, losses, best, caplog):
    """Not the sanity check's, whose weights are none yet, nor the last, nor an equal one that is later."""
    folder = tmp_path / "deep" / "model"
    with caplog.at_level(logging.INFO):
        module, callback, _ = fit(folder, losses, callback=SavePretrained(str(folder), mode=mode))
    check(folder, module.seen[best])
    assert not torch.equal(module.seen[0], module.seen[1])
    assert callback.state_dict() == {"best": losses[best], "saved_in": str(folder)}
    assert f"Saved model: {folder} (val/loss {losses[best]:.4f})" in caplog.text


@pytest.mark.parametrize("case", ["no monitor", "no validation", "not a number"])
def test_without_a_best_the_last_is_kept(tmp_path, case, caplog):
    losses, callback = [float("nan")] * 2 if case == "not a number" else [1.0, 2.0], SavePretrained(None)
    if case == "no monitor":
        callback = SavePretrained(None, monitor=None)
    with caplog.at_level(logging.INFO):
        module, _, _ = fit(
            None, losses, data=Data(case != "no validation"), callback=callback, default_root_dir=tmp_path
        )
    check(tmp_path / "pretrained", logits(module.model))
    assert f"Saved model: {tmp_path}/pretrained\n" in caplog.text


def test_nothing_is_written_by_a_dry_run_or_by_validate(tmp_path):
    fit(tmp_path / "a", [1.0], fast_dev_run=True)
    _, callback, trainer = fit(tmp_path / "b", [1.0])
    shutil.rmtree(tmp_path / "b")
    trainer.validate(LM([0.5]), datamodule=Data(), verbose=False)
    assert callback.best == 1.0
    assert not list(tmp_path.iterdir())


class Checkpoint(Callback):
    """A checkpoint after each epoch, as the trainer makes them."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("new_folder", [False, True], ids=["same folder", "new run folder"])
def test_a_resumed_run_keeps_the_best(tmp_path, new_folder, caplog):
    old = tmp_path / "old"
    module, _, _ = fit(old, [3.0, 2.0], callbacks=[Checkpoint(tmp_path)])
    best, (new, ckpt) = module.seen[1], (tmp_path / "new" if new_folder else old, tmp_path / "1.ckpt")
    with caplog.at_level(logging.INFO):
        fit(new, [2.5, 2.4], max_epochs=4, ckpt_path=ckpt)
    check(old, best)
    assert f"Saved model: {old} (val/loss 2.0000)" in caplog.text
    assert new == old or not new.exists()
    module, callback, _ = fit(new, [2.5, 1.5], max_epochs=4, ckpt_path=ckpt)
    check(new, module.seen[1])
    assert callback.state_dict() == {"best": 1.5, "saved_in": str(new)}
    shutil.rmtree(old)  # a best whose model is gone does not count
    module, callback, _ = fit(new, [2.5, 2.6], max_epochs=4, ckpt_path=ckpt)
    assert callback.best == 2.5
    check(new, module.seen[0])


def test_a_best_of_another_metric_does_not_count(tmp_path):
    fit(tmp_path / "old", [3.0], callbacks=[Checkpoint(tmp_path)])
    callback = SavePretrained(str(tmp_path / "new"), mode="max")
    fit(None, [1.0], max_epochs=2, ckpt_path=tmp_path / "0.ckpt", callback=callback)
    assert callback.best == 1.0


# ---------------------------------------------------------------------- what


def test_tokenizer_and_its_ids(tmp_path):
    """The model's own <end>, 2, never came in the texts; the begin, which the tokenizer has not, stays."""
    model = tiny()
    fit(tmp_path / "model", [1.0], model, Data(tokenizer=tokenizer()))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded("word1 word2")["input_ids"] == tokenizer()("word1 word2")["input_ids"] == [4, 5]
    for kind in (AutoConfig, GenerationConfig):
        config = kind.from_pretrained(tmp_path / "model")
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 1, 2), kind
    assert AutoConfig.from_pretrained(tmp_path / "model").architectures == ["LlamaForCausalLM"]
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (2, 2)  # in training nothing changes


def test_several_ends_stay_if_the_tokenizer_has_one_of_them(tmp_path):
    """As of chat models, whose turns and texts end differently."""
    for ends, expected in (([1, 7], [1, 7]), ([6, 7], 1)):
        model = tiny()
        model.generation_config.eos_token_id = ends
        fit(tmp_path / "model", [1.0], model, Data(tokenizer=tokenizer()))
        assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == expected


class Turns(Data):
    """Batches of dicts, whose labels end as they are told."""

    end: list[int]

    def train_dataloader(self):
        rows = [{"input_ids": torch.tensor([3, 4, *self.end]), "labels": torch.tensor([-100, 4, *self.end])}] * 2
        return DataLoader(rows, batch_size=1)

    def val_dataloader(self):
        return DataLoader(IDS, batch_size=2)


class TurnLM(LM):
    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss


def turn_tokenizer():
    made = tokenizer()
    made.add_tokens(["<turn>"], special_tokens=True)
    return made


@pytest.mark.parametrize(
    ("end", "own", "expected"),
    [
        ([12, 5], 2, 12),  # the template's <turn> and a word, as its new line; the tokenizer's <end> was never trained
        ([12, 5], 12, 12),  # what the model had was right
        ([12, 5], [12, 3], [12, 3]),
        ([12, 1], 2, 1),  # the tokenizer's own comes last
        ([1, 5], 2, 1),
    ],
)
def test_the_end_is_the_one_that_labels_hold(tmp_path, end, own, expected):
    """A chat template's end once gave way to the tokenizer's, and generated texts did not end."""
    model = tiny(vocab_size=V + 1, eos_token_id=own)
    fit(tmp_path / "model", model=TurnLM([1.0], model), data=Turns(tokenizer=turn_tokenizer(), end=end))
    for kind in (AutoConfig, GenerationConfig):
        assert kind.from_pretrained(tmp_path / "model").eos_token_id == expected, kind


def test_labels_without_an_end_are_told(tmp_path):
    with pytest.warns(UserWarning, match="Expected labels to hold a token that ends a text"):
        fit(tmp_path / "model", model=TurnLM([1.0], tiny()), data=Turns(tokenizer=tokenizer(), end=[5, 6]))
    assert AutoConfig.from_pretrained(tmp_path / "model").eos_token_id == 1


def test_without_a_tokenizer_ids_stay(tmp_path):
    fit(tmp_path / "model", [1.0], data=Data(tokenizer=SimpleNamespace(eos_token_id=9)))
    assert AutoConfig.from_pretrained(tmp_path / "model").eos_token_id == 2


def test_tied_weights(tmp_path):
    module, _, _ = fit(tmp_path / "model", [1.0], tiny(tie_word_embeddings=True))
    loaded = check(tmp_path / "model", module.seen[0])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_trained_model_is_saved_and_not_its_teacher(tmp_path):
    teacher = tiny(hidden_size=4).requires_grad_(False)
    module, _, _ = fit(tmp_path / "model", model=LM([1.0], teacher=teacher))
    check(tmp_path / "model", module.seen[0])


def test_a_classifier_is_a_model_too(tmp_path):
    class Classifier(LM):
        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch[:, 0] % 2).loss

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

    module, _, _ = fit(tmp_path, model=Classifier(model=tiny(LlamaForSequenceClassification, pad_token_id=0)))
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.score.weight, module.model.score.weight)


def test_weights_that_a_strategy_gathers(tmp_path, monkeypatch):
    """FSDP's come from the strategy, by names without its wrapper; all ranks are to ask."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    def gathered(self):
        state = {name: value + 1 for name, value in self.lightning_module.state_dict().items()}
        return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in state.items()}

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self._fsdp_wrapped_module = model

        def forward(self, **kwargs):
            return self._fsdp_wrapped_module(**kwargs)

    monkeypatch.setattr(SingleDeviceStrategy, "lightning_module_state_dict", gathered, raising=False)
    module, _, _ = fit(tmp_path, [1.0], Wrapper(tiny()))
    loaded, own = AutoModelForCausalLM.from_pretrained(tmp_path), module.model._fsdp_wrapped_module
    for name, value in own.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value + 1, msg=name)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("holder", ["folder", "file"])
def test_other_folders_are_left_alone(tmp_path, holder):
    path = tmp_path / "model"
    if holder == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    else:
        path.write_text("mine")
    with pytest.raises(
        ValueError, match=r"`folder` to be new, empty or a saved model, but .*model (holds 'notes|is a f)"
    ):
        fit(path, [1.0])
    assert (path if path.is_file() else path / "notes.txt").read_text() == "mine"


def test_saved_models_and_empty_folders_are_replaced(tmp_path):
    for _ in range(2):
        module, _, _ = fit(tmp_path, [1.0], tiny(hidden_size=4))
        check(tmp_path, module.seen[0])
        (tmp_path / "model-00001-of-00002.safetensors").write_text("of a larger one")
    module, _, _ = fit(tmp_path, [1.0])
    check(tmp_path, module.seen[0])
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()


def test_a_model_without_its_output_layer_is_refused(tmp_path):
    class Headless(LM):
        def __init__(self):
            super().__init__(model=tiny(LlamaModel))

    with pytest.raises(ValueError, match="Expected Headless to hold a model of transformers with its output layer"):
        fit(tmp_path, model=Headless())


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="Expected `mode` to be 'min' or 'max', but got 'best'"):
        SavePretrained(mode="best")
    callback = SavePretrained(str(tmp_path), monitor="val/lose")
    with pytest.raises(ValueError, match=r"Expected `monitor` to be one of the logged \['val/loss'\], but got 'val/lo"):
        fit(tmp_path, [1.0], callback=callback)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["_state_dict_type", "_save_distributed_checkpoint", "zero_stage_3"])
def test_weights_in_pieces_are_refused(name):
    strategy = SimpleNamespace(**{name: "sharded"})
    with pytest.raises(ValueError, match="Expected a strategy that gathers whole weights, but got SimpleNamespace"):
        _check_whole(strategy)
    _check_whole(SimpleNamespace(_state_dict_type="full", _save_distributed_checkpoint=False, zero_stage_3=False))


def test_lightning_names_what_is_refused():
    """The attributes are private: this fails when they are renamed."""
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    assert FSDPStrategy(state_dict_type="sharded")._state_dict_type == "sharded"
    assert ModelParallelStrategy()._save_distributed_checkpoint is True
    assert isinstance(DeepSpeedStrategy.zero_stage_3, property)
    gathering = (FSDPStrategy, ModelParallelStrategy)
    assert all(kind.lightning_module_state_dict is not Strategy.lightning_module_state_dict for kind in gathering)


# ---------------------------------------------------------------------- kills


@pytest.mark.parametrize("at", ["save_pretrained", "rename"])
def test_a_save_that_fails_leaves_the_old_folder(tmp_path, at, monkeypatch):
    """Midway, or between the two renames, after which the next run brings the folder back."""
    folder = tmp_path / "model"
    module, _, _ = fit(folder, [1.0], callbacks=[Checkpoint(tmp_path)])
    best = module.seen[0]
    if at == "save_pretrained":

        def broken(self, path, **kwargs):
            path.mkdir(parents=True)
            (path / "config.json").write_text("{")
            raise OSError("disk full")

        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", broken)
    else:
        rename = Path.rename

        def broken(self, target):
            if self.name == "model.partial":
                raise OSError("disk full")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="disk full"):
        fit(folder, [0.5], max_epochs=2, ckpt_path=tmp_path / "0.ckpt")
    if at == "save_pretrained":
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), best)
    else:
        assert not folder.exists()
    monkeypatch.undo()
    _, callback, _ = fit(folder, [1.5], max_epochs=2, ckpt_path=tmp_path / "0.ckpt")
    assert callback.best == 1.0
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), best)
    module, _, _ = fit(folder, [0.5], max_epochs=2, ckpt_path=tmp_path / "0.ckpt")
    check(folder, module.seen[0])


SCRIPT = """
import sys, torch, warnings
sys.path.insert(0, {tests!r})
from test_save_pretrained import LM, fit

class Parted(LM):  # ranks that do not agree on the loss
    def validation_step(self, batch, batch_idx):
        self.losses = [[3.0, 2.0, 2.5], [1.0, 2.0, 0.5]][self.global_rank]
        super().validation_step(batch, batch_idx)
        torch.save(self.seen, f"{folder}/seen-{{self.trainer.global_rank}}.pt")

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*sync_dist.*")
    fit({folder!r} + "/model", model=Parted(), devices=2, strategy="ddp_fork", max_epochs=3)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Rank zero decides and writes."""
    run_script(tmp_path / "run.py", SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    seen = torch.load(tmp_path / "seen-0.pt")
    check(tmp_path / "model", seen[1])
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"
