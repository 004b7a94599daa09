"""One way to write a model: `save_pretrained` of the modules with a language model, whole or not at all."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lit_logits import CausalLM, DualHeadKD, GLDFusionModule, VQLogitsLM
from lit_logits.modules import DenseLogitsHead, new_causal_lm
from lit_logits.storage.folders import replace_file

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
LLAMA["num_attention_heads"] = 2
MODULES = {
    "CausalLM": lambda: CausalLM(LLAMA),
    "DualHeadKD": lambda: DualHeadKD(new_causal_lm(LLAMA), method="ce"),
    "GLDFusionModule": lambda: GLDFusionModule(LLAMA, {"big": new_causal_lm(LLAMA)}),
    "VQLogitsLM": lambda: VQLogitsLM(new_causal_lm(LLAMA), head=lambda d, v: DenseLogitsHead(d, v, bias=False)),
}


def save(module, folder, **kwargs):
    if isinstance(module, DualHeadKD):
        return module.export(folder, **kwargs)
    return module.save_pretrained(folder, **({"head": "dense"} if isinstance(module, VQLogitsLM) else {}), **kwargs)


def logits_of(module, ids):
    output = module.eval()(ids)
    return output.logits if isinstance(module, DualHeadKD) else output


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


@pytest.mark.parametrize("name", MODULES)
def test_a_folder_is_written_whole_with_the_tokenizer_and_replaced(name, tmp_path, tokenizer):
    module, folder = MODULES[name](), tmp_path / "new" / "model"
    for _ in range(2):  # the second one replaces the first
        save(module, folder, tokenizer=tokenizer)
        loaded, ids = AutoModelForCausalLM.from_pretrained(folder), torch.arange(6)[None]
        torch.testing.assert_close(loaded(ids).logits, logits_of(module, ids), rtol=1e-5, atol=1e-6)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
        with torch.no_grad():
            next(module.parameters()).add_(0.1)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", MODULES)
def test_a_folder_of_something_else_is_refused_and_left_alone(name, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"new, empty or a saved model, but .* holds 'thesis\.txt'"):
        save(MODULES[name](), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", MODULES)
def test_what_fails_leaves_the_old_folder(name, tmp_path, tokenizer, monkeypatch):
    module, folder = MODULES[name](), tmp_path / "model"
    save(module, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save(module, folder, tokenizer=tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "weights.pt"
    student = DualHeadKD(torch.nn.Linear(3, 2), method="ce")
    assert student.export(target) == target.resolve()
    before = target.read_bytes()

    def fail(path):
        path.write_bytes(before[:10])
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(target, fail)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    student.export(tmp_path / "new" / "weights.pt")  # with the folder it needs
    assert torch.load(tmp_path / "new" / "weights.pt", weights_only=True).keys() == {"weight", "bias"}


# ---------------------------------------------------------------------- the token that ends a text


class Turns(LightningDataModule):
    """Texts that end by the template's <turn>, and a tokenizer whose own end is never seen."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def train_dataloader(self):
        ids = torch.tensor([0, 1, 4, 1])
        row = {"input_ids": ids, "attention_mask": ids >= 0, "labels": torch.tensor([-100, 1, 4, 1])}
        return DataLoader([row] * 4, batch_size=2)


@pytest.mark.parametrize("name", ["VQLogitsLM", "CausalLM", "GLDFusionModule"])
@pytest.mark.parametrize("has_data_module", [True, False])
def test_a_module_writes_the_end_that_its_texts_had(name, has_data_module, tmp_path, tokenizer):
    """Only `SavePretrained` once knew it. Without training it is the tokenizer's own."""
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(["</s>", "<turn>"]) == [3, 4]
    module, data = MODULES[name](), Turns(tokenizer)
    save(module, tmp_path / "before", tokenizer=tokenizer)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, **quiet)
    trainer.fit(module, **({"datamodule": data} if has_data_module else {"train_dataloaders": data.train_dataloader()}))
    save(module, tmp_path / "after", **({} if has_data_module else {"tokenizer": tokenizer}))
    for folder, end in (("before", 3), ("after", 4)):
        for kind in (AutoConfig, GenerationConfig):
            assert kind.from_pretrained(tmp_path / folder).eos_token_id == end, kind
