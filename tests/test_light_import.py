"""A process that generates with a saved model reads nothing that only training needs; names come at first use."""

import ast
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lit_logits
from lit_logits import callbacks, datamodules, modules
from lit_logits.modules import VQLogitsConfig, VQLogitsForCausalLM

FACADES = (lit_logits, modules, callbacks, datamodules)
OF_TRAINING = ("lightning", "pytorch_lightning", "matplotlib", "torchmetrics", "datasets", "sklearn", "tensorboard")
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(program):
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "compact"
    text = {"model_type": "llama", "vocab_size": 20, **SIZES}
    VQLogitsForCausalLM(VQLogitsConfig(text, 4, 2)).save_pretrained(path)
    return path


GENERATE = """
import sys, torch
{first}
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
model = {model}
model.generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=2, do_sample=False)
print(type(model).__name__, *sorted({{name.split(".")[0] for name in sys.modules}}))
"""


@pytest.mark.slow
def test_generation_reads_nothing_of_training(folder):
    """It read Lightning, torchmetrics and matplotlib: 446 MB and three times the time. SciPy is transformers' own."""
    loaded = GENERATE.format(first="import lit_logits", model=f"AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    plain = f"LlamaForCausalLM(LlamaConfig(vocab_size=20, **{SIZES}))"
    name, *read = run(loaded).split()
    _, *read_by_transformers = run(GENERATE.format(first="", model=plain)).split()
    assert name == "VQLogitsForCausalLM"
    assert not {"lightning", "matplotlib", "torchmetrics"} & {*read}
    assert not {*OF_TRAINING, "scipy"} & ({*read} - {*read_by_transformers})


def test_the_import_alone_reads_no_model_code():
    read = run("import lit_logits, sys; print(*sys.modules)").split()
    assert not {*OF_TRAINING, "scipy", "transformers.modeling_utils"} & {*read}


@pytest.mark.slow
def test_a_config_registers_the_models_also_where_it_is_unpickled():
    config = pickle.dumps(VQLogitsConfig({"model_type": "llama", "vocab_size": 20, **SIZES}, 4))
    program = f"""
import pickle
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_config(pickle.loads({config!r}))).__name__)
"""
    assert run(program).strip() == "VQLogitsForCausalLM"


# ---------------------------------------------------------------------- facades


def typed_imports(facade):
    """Names that type checkers read, and the module of each."""
    tree = ast.parse(Path(facade.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = (node for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module for node in found for alias in node.names}


def lazy_imports(facade):
    """Names that are imported at run time, and the module of each."""
    tree = ast.parse(Path(facade.__file__).read_text())
    table = next(ast.literal_eval(node) for node in ast.walk(tree) if isinstance(node, ast.Dict))
    return {name: module for module, names in table.items() for name in names.split()}


@pytest.mark.parametrize("facade", FACADES, ids=lambda facade: facade.__name__)
def test_a_facade_says_the_same_to_readers_and_at_run_time(facade):
    assert typed_imports(facade) == lazy_imports(facade)
    assert sorted(facade.__all__) == sorted(lazy_imports(facade))
    assert {*facade.__all__} <= {*dir(facade)}
    for name, module in lazy_imports(facade).items():
        assert getattr(facade, name) is getattr(import_module(module), name)
        assert vars(facade)[name] is getattr(facade, name)  # kept after the first use


@pytest.mark.parametrize("facade", FACADES, ids=lambda facade: facade.__name__)
def test_an_unknown_name_is_an_error_as_of_any_module(facade):
    with pytest.raises(AttributeError, match=f"module '{facade.__name__}' has no attribute 'Missing'"):
        _ = facade.Missing
    with pytest.raises(ImportError, match="cannot import name 'Missing'"):
        exec(f"from {facade.__name__} import Missing")


@pytest.mark.slow
def test_names_and_modules_are_there_in_a_new_process():
    program = """
import lit_logits
print(lit_logits.vq_logits.VQLogitsLM is lit_logits.VQLogitsLM, lit_logits.modules.metrics.TokenMean.__name__)
from lit_logits.callbacks import *
from lit_logits.datamodules import TextDataModule
import pickle
print(SavePretrained.__module__, pickle.loads(pickle.dumps(lit_logits.CausalLM)) is lit_logits.CausalLM)
"""
    expected = "True TokenMean\nlit_logits.callbacks.save_pretrained True\n"
    assert run(program) == expected
