"""Texts of a language model after each validation, as TensorBoard reads them back."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_logits import CausalLM, GLDFusionModule, VQLogitsLM
from lit_logits.callbacks import SampleTextLogger
from lit_logits.modules import DenseLogitsHead, new_causal_lm

V = 20
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": V}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 12}
MODULES = {
    "CausalLM": lambda: CausalLM(LLAMA),
    "GLDFusionModule": lambda: GLDFusionModule(LLAMA, {"big": new_causal_lm(LLAMA)}, top_k=4),
    "VQLogitsLM": lambda: VQLogitsLM(new_causal_lm(LLAMA), head=lambda d, v: DenseLogitsHead(d, v, bias=False)),
}


def make(name):
    torch.manual_seed(0)
    model = MODULES[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, a model repeats itself
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    return model


def make_tokenizer():
    words = {f"w{number}": number for number in range(V - 1)} | {"</s>": V - 1}
    word_level = Tokenizer(models.WordLevel(words, unk_token="w0"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="</s>")


def make_row(seed, prompt):
    ids = torch.randint(0, V - 1, (8,), generator=torch.Generator().manual_seed(seed))
    labels = ids.masked_fill(torch.arange(8) < prompt, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Data(LightningDataModule):
    """Two pairs with prompts of three tokens, and a running text."""

    def __init__(self, tokenizer=None):
        super().__init__()
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def loader(self):
        return DataLoader([make_row(0, 3), make_row(1, 3), make_row(2, 0)], batch_size=2)

    train_dataloader = val_dataloader = loader


def fit(tmp_path, model, data, *callbacks, logger=None, **kwargs):
    logger = logger or TensorBoardLogger(tmp_path, name="run", version="")
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    settings = {"max_steps": 2, "val_check_interval": 1, "log_every_n_steps": 1, **quiet, **kwargs}
    Trainer(accelerator="cpu", logger=logger, callbacks=list(callbacks), **settings).fit(model, datamodule=data)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def read(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def greedy(model, ids, count, end):
    """By whole forward passes."""
    found = list(ids)
    for _ in range(count):
        found.append(int(model(torch.tensor([found]))[0, -1].argmax()))
        if found[-1] == end:
            break
    return found[len(ids) :]


@pytest.mark.parametrize("name", MODULES)
def test_texts_in_the_event_file_are_what_the_model_writes(name, tmp_path):
    model, tokenizer = make(name), make_tokenizer()
    fit(tmp_path, model, Data(tokenizer), SampleTextLogger(num_prompts=3, max_new_tokens=5, prompt_tokens=4))
    texts = read(tmp_path / "run")
    assert {f"samples/{number}/text_summary" for number in range(3)} == set(texts)
    model.eval()
    for number, prompt in enumerate([3, 3, 4]):
        (first, _), (last, text) = texts[f"samples/{number}/text_summary"]  # none of the sanity check
        assert (first, last) == (1, 2)
        ids = make_row(number, 0)["input_ids"].tolist()
        parts = (ids[:prompt], greedy(model, ids[:prompt], 5, V - 1), ids[prompt:])
        titles = ("prompt", "written", "in the data")
        expected = [f"**{title}**\n\n    {tokenizer.decode(part)}" for title, part in zip(titles, parts, strict=True)]
        assert text.strip() == "\n\n".join(expected)


def test_texts_of_a_validation_on_a_checkpoint_stand_at_its_step(tmp_path):
    """They stood at step 0."""
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    saving = ModelCheckpoint(tmp_path, filename="last")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data, model = Data(make_tokenizer()), make("CausalLM")
    Trainer(max_steps=2, logger=False, callbacks=[saving], **quiet).fit(model, datamodule=data)
    validating = Trainer(logger=logger, callbacks=[SampleTextLogger(num_prompts=1, max_new_tokens=2)], **quiet)
    validating.validate(make("CausalLM"), datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert [step for step, _ in read(tmp_path / "run")["samples/0/text_summary"]] == [2]


def test_training_is_the_same_to_the_bit(tmp_path):
    """Dropout is off while it writes, and on again after."""
    options = {"attention_dropout": 0.5}
    weights = []
    for number, callbacks in enumerate([[], [SampleTextLogger(max_new_tokens=2)]]):
        torch.manual_seed(0)
        model = CausalLM({**LLAMA, **options})
        weights.append(fit(tmp_path / str(number), model, Data(make_tokenizer()), *callbacks))
        assert all(part.training for part in model.model.modules())
    assert torch.equal(*weights)


def test_averages_write_where_validations_measure_them(tmp_path):
    """Averages that stay as they were after the first step write the same after the second."""

    def texts(folder, *callbacks):
        torch.manual_seed(0)
        model = CausalLM(LLAMA, optimizer=partial(torch.optim.SGD, lr=30.0))
        fit(folder, model, Data(make_tokenizer()), SampleTextLogger(max_new_tokens=4), *callbacks)
        first, second = read(folder / "run")["samples/0/text_summary"]
        return first[1], second[1]

    alone, averaged = texts(tmp_path / "alone"), texts(tmp_path / "averaged", EMAWeightAveraging(decay=1.0))
    assert alone[0] == averaged[0] == averaged[1] != alone[1]


def test_prompts_are_cut_in_front_to_the_context(tmp_path):
    model = make("CausalLM")
    model.model.config.max_position_embeddings = 6
    fit(tmp_path, model, Data(make_tokenizer()), SampleTextLogger(num_prompts=1, max_new_tokens=4), max_steps=1)
    [(_, text)] = read(tmp_path / "run")["samples/0/text_summary"]
    ids = make_row(0, 3)["input_ids"].tolist()[:3]
    written = text.split("**written**")[1].split("**in the data**")[0].strip()
    assert written == make_tokenizer().decode(greedy(model.eval(), ids[-2:], 4, V - 1))


def test_wrong_choices_and_padding_are_no_prompts(tmp_path):
    class Choices(Data):
        def loader(self):
            row = make_row(0, 3)
            row["attention_mask"] = (torch.arange(8) > 0).long()
            rows = [{**make_row(1, 3), "correct": torch.tensor(0)}, {**row, "correct": torch.tensor(1)}]
            return DataLoader(rows, batch_size=2)

        train_dataloader = val_dataloader = loader

    fit(tmp_path, make("CausalLM"), Choices(make_tokenizer()), SampleTextLogger(max_new_tokens=1), max_steps=1)
    texts = read(tmp_path / "run")
    assert list(texts) == ["samples/0/text_summary"]
    ids = make_row(0, 3)["input_ids"][1:3].tolist()
    assert texts["samples/0/text_summary"][0][1].startswith(f"**prompt**\n\n    {make_tokenizer().decode(ids)}\n")


class NoLM(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["input_ids"].float()).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("model", "has_tokenizer", "match"),
    [(NoLM, True, "no language model in NoLM"), (lambda: make("CausalLM"), False, "no `tokenizer` of a data module")],
)
def test_where_there_is_nothing_to_serve_a_warning_tells(tmp_path, model, has_tokenizer, match):
    with pytest.warns(UserWarning, match=f"SampleTextLogger found {match}"):
        fit(tmp_path, model(), Data(make_tokenizer() if has_tokenizer else None), SampleTextLogger())
    assert read(tmp_path / "run") == {}


def test_other_loggers_get_nothing_and_cost_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(SampleTextLogger, "_continue", None)  # any call would fail
    fit(tmp_path, make("CausalLM"), Data(make_tokenizer()), SampleTextLogger(), logger=CSVLogger(tmp_path))


@pytest.mark.parametrize("name", ["num_prompts", "max_new_tokens", "prompt_tokens"])
def test_arguments(name):
    with pytest.raises(ValueError, match=f"`{name}` to be at least 1, but got 0"):
        SampleTextLogger(**{name: 0})
