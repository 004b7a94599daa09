"""What comes from others is data: a recipe, checkpoint, file of weights, cache or GGUF file runs nothing of its author.

Each test lets its file try to make a file `ran`, and looks for the sentence that a user gets instead.
"""

import contextlib
import inspect
import json
import os
import pickle
import struct
import typing
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from jinja2.exceptions import SecurityError
from lightning import LightningModule
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lit_logits
from lit_logits import DualHeadKD, VQLogitsLM
from lit_logits.cli import main
from lit_logits.datamodules import ImageDataModule, InstructionDataModule, TextDataModule, json_lines
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.modules import LogitCache, VQLogitsHead, load_causal_lm, load_weights
from lit_logits.run_folders import best_checkpoint, last_checkpoint
from lit_logits.storage import served
from lit_logits.storage.served import read_answers

MODULES = [getattr(lit_logits, name) for name in lit_logits.__all__]


class Hostile:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not Path("ran").exists()


def spec(path: str) -> dict:
    arguments = {"os.system": {"command": "touch ran"}, "subprocess.Popen": {"args": ["touch", "ran"]}}
    return {"class_path": path, "init_args": arguments.get(path, {})}


PROGRAMS = ["os.system", "subprocess.Popen"]


def free_mappings() -> list[tuple[type[LightningModule], str]]:
    """Every argument of a module that takes a mapping of anything."""
    found = []
    for module in MODULES:
        hints = typing.get_type_hints(module.__init__)
        found += [(module, name) for name in inspect.signature(module).parameters if "typing.Any]" in str(hints[name])]
    return found


def test_all_free_mappings_are_tried():
    names = {name for _, name in free_mappings()}
    assert {"backbone", "model", "student", "pivot", "source_kwargs", "lora", "generation", "model_kwargs"} <= names


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("module", "name"), free_mappings())
def test_a_recipe_runs_nothing(module, name, program, capsys):
    inner = {"model_type": "llama", "x": spec(program), "y": [spec(program)]}
    values = {name: {"one": inner} if name == "source_kwargs" else inner}
    data = {"class_path": "TextDataModule", "init_args": {"bpe_vocab_size": 300}}
    recipe = {"model": {"class_path": module.__name__, "init_args": values}, "data": data}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises((SystemExit, Exception)):
        main(["validate", "--config", "recipe.yaml", "--trainer.logger", "false"])


@pytest.mark.parametrize("place", ["model", "data", "trainer", "seed_everything"])
def test_a_tag_of_yaml_runs_nothing(place, capsys):
    Path("recipe.yaml").write_text(f"{place}: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "recipe.yaml"])
    assert "python/object/apply" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mapping_arrives_as_it_was_written(program, monkeypatch):
    given = {}

    class Keeps(VQLogitsLM):
        def __init__(self, backbone: str | dict[str, typing.Any], vocab_size: int | None = None) -> None:
            given.update(backbone)
            raise KeyboardInterrupt

    monkeypatch.setattr(lit_logits, "Keeps", Keeps, raising=False)
    backbone = {"model_type": "llama", "x": spec(program)}
    recipe = {"class_path": f"{__name__}.Keeps", "init_args": {"backbone": backbone, "vocab_size": 5}}
    monkeypatch.setitem(globals(), "Keeps", Keeps)
    Keeps.__qualname__, Keeps.__module__ = "Keeps", __name__
    with pytest.raises(KeyboardInterrupt):
        main({"subcommand": "validate", "validate": {"model": recipe, "data": {"class_path": "TextDataModule"}}})
    assert given == backbone


@pytest.mark.parametrize(
    "argument",
    [
        ("model.init_args.optimizer", spec("os.system")),
        ("model.init_args.optimizer", "os.system"),
        ("model.init_args.optimizer", {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "."}}),
        ("model.init_args.lr_scheduler", spec("subprocess.Popen")),
        ("trainer.callbacks", [spec("os.system")]),
        ("trainer.profiler", spec("subprocess.Popen")),
        ("data", spec("subprocess.Popen")),
        ("model", spec("os.system")),
    ],
    ids=lambda argument: argument[0],
)
def test_no_argument_takes_a_program(argument, capsys):
    name, value = argument
    recipe = {
        "model": {"class_path": "VQLogitsLM", "init_args": {"backbone": {"model_type": "llama"}}},
        "data": {"class_path": "TextDataModule"},
        "trainer": {},
    }
    *parents, last = name.split(".")
    place = recipe
    for parent in parents:
        place = place[parent]
    place[last] = value
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "recipe.yaml"])
    assert stop.value.code == 2
    assert last in capsys.readouterr().err


@pytest.mark.parametrize("program", ["os.system", "lit_logits.CausalLM"])
@pytest.mark.parametrize("data", ["TextDataModule", "ImageDataModule", "InstructionDataModule"])
def test_a_source_of_rows_is_data(data, program, capsys):
    arguments = [{"source": spec(program)}, {"source": {"path": spec(program)}}]
    if data == "InstructionDataModule":
        arguments += [{"source_tokenizers": {"a": other}} for other in (spec(program), {"tokenizer": spec(program)})]
    for given in arguments:
        recipe = {"model": {"class_path": "CausalLM", "init_args": {"model": "x"}}}
        recipe["data"] = {"class_path": data, "init_args": given}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", "recipe.yaml", "--trainer.logger", "false"])
        assert stop.value.code == 2  # refused as it is read
        assert next(iter(given)) in capsys.readouterr().err


# --- checkpoints and weights ---


def small_model() -> VQLogitsLM:
    backbone = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return VQLogitsLM(
        {**backbone, "num_attention_heads": 1}, vocab_size=300, head=partial(VQLogitsHead, codebook_size=4)
    )


def checkpoint(**more) -> dict:
    model = small_model()
    parts = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    return {**parts, "pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 0, "loops": {}, **more}


def test_a_checkpoint_runs_nothing_when_it_is_loaded():
    torch.save(checkpoint(callbacks=Hostile()), "hostile.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        VQLogitsLM.load_from_checkpoint("hostile.ckpt")


def test_a_checkpoint_runs_nothing_from_the_command_line():
    torch.save(checkpoint(callbacks=Hostile()), "hostile.ckpt")
    backbone = json.dumps(dict(small_model().hparams)["backbone"])
    model = [
        "--model",
        "VQLogitsLM",
        f"--model.backbone={backbone}",
        "--model.head=VQLogitsHead",
        "--model.head.codebook_size=4",
    ]
    data = ["--data", "TextDataModule", "--data.bpe_vocab_size", "300"]
    options = ["--trainer.logger", "false", "--ckpt_path", "hostile.ckpt"]
    with pytest.raises(SystemExit, match=r"run code of its author\. If you trust it, add `--weights_only false`"):
        main(["test", *model, *data, *options])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("names_class", [False, True])
@pytest.mark.parametrize("instantiator", ["lightning.pytorch.cli.instantiate_module", "os.system"])
def test_hyper_parameters_of_a_checkpoint_run_nothing(program, instantiator, names_class):
    """They hold no code, but Lightning hands them to the parser of recipes."""
    saved = checkpoint()
    if names_class:
        saved["hyper_parameters"]["_class_path"] = "lit_logits.VQLogitsLM"
    backbone = {"model_type": "llama", "x": spec(program)}
    saved["hyper_parameters"].update(_instantiator=instantiator, backbone=backbone)
    torch.save(saved, "hostile.ckpt")
    with pytest.raises((SystemExit, Exception)):
        VQLogitsLM.load_from_checkpoint("hostile.ckpt")


def test_weights_of_a_teacher_run_nothing():
    torch.save({"state_dict": {"weight": torch.ones(1)}, "more": Hostile()}, "teacher.pt")
    with pytest.raises(ValueError, match="loading it would run code of its author"):
        load_weights(torch.nn.Linear(1, 1), "teacher.pt")


def test_the_search_for_the_last_checkpoint_runs_nothing(tmp_path):
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(checkpoint(callbacks=Hostile()), folder / "last.ckpt")
    for find in (last_checkpoint, best_checkpoint):
        with contextlib.suppress(pickle.UnpicklingError):
            find(tmp_path / "runs")


# --- folders of models ---


def save_tiny(folder: Path) -> dict:
    config = LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.state_dict()


def test_pickled_weights_of_a_model_run_nothing(tmp_path):
    weights = save_tiny(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({**weights, "more": Hostile()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
        load_causal_lm(str(tmp_path / "model"))


def test_code_beside_a_model_is_not_run(tmp_path, monkeypatch):
    """Not even if somebody is there to be asked."""
    save_tiny(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text("import os\nos.system('touch ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_causal_lm(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "code",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}{{ m.__init__.__globals__ }}{% endfor %}",
    ],
)
def test_a_chat_template_runs_nothing(tmp_path, code):
    rows = [{"prompt": f"What is {n}?", "response": f"a number {n}"} for n in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_bpe([row["prompt"] for row in rows], 300, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = code
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = InstructionDataModule("pairs.jsonl", tokenizer=str(tmp_path / "tokenizer"), template="chat", cache_dir=".")
    with pytest.raises((ValueError, SecurityError)):
        data.prepare_data()


@pytest.mark.parametrize("name", ["teacher.safetensors", "teacher.bin"])
def test_a_teacher_runs_nothing_whatever_its_file_is_called(name):
    Path(name).write_bytes(pickle.dumps(Hostile()))
    nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match=f"Expected .*{name}"):
        DualHeadKD(*nets, num_classes=2, teacher_checkpoint=name)


def test_the_folder_of_a_student_runs_nothing():
    DualHeadKD("resnet8", num_classes=10, method="ce").write_folder(Path("student"))
    files = {name: Path("student", name).read_bytes() for name in ("student.pt", "config.json")}
    sentences = {"student.pt": "loading it would run code of its author", "config.json": "to tell `model` and"}
    for name, content in files.items():
        torch.save({"x": Hostile()}, Path("student", name))
        with pytest.raises(ValueError, match=f"Expected .*{sentences[name]}"):
            DualHeadKD("student", num_classes=10, method="ce")
        Path("student", name).write_bytes(content)
    assert DualHeadKD("student", num_classes=10, method="ce").net.num_classes == 10


# --- rows ---


def arrow_type_of_a_pickle(texts: list[str]) -> pa.Table:
    """A column whose type is named by a pickle, which pyarrow once loaded (CVE-2023-47248)."""
    named = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Hostile())}
    fields = [pa.field(name, pa.string(), metadata=named) for name in ("text", "prompt", "response")]
    return pa.table([pa.array(texts)] * 3, schema=pa.schema(fields))


def test_rows_run_nothing(tmp_path):
    """A pickle in place of a text, in JSON Lines and in Parquet; the sentence names the file."""
    (tmp_path / "rows.jsonl").write_bytes(pickle.dumps(Hostile()))
    Dataset.from_dict({"text": [pickle.dumps(Hostile())] * 4}).to_parquet(tmp_path / "rows.parquet")
    for file in ("rows.jsonl", "rows.parquet"):
        expected = r"Expected a JSON object in line 1 of .*rows\.jsonl" if file == "rows.jsonl" else "Expected "
        with pytest.raises(ValueError, match=expected):
            TextDataModule(str(tmp_path / file), bpe_vocab_size=300, cache_dir=str(tmp_path)).prepare_data()


def test_pairs_run_nothing(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(pickle.dumps(Hostile()))
    pq.write_table(pa.table({"prompt": [pickle.dumps(Hostile())], "response": ["a"]}), tmp_path / "rows.parquet")
    for file, expected in (("rows.jsonl", "a JSON object in line 1 of"), ("rows.parquet", "strings, but got bytes")):
        with pytest.raises(ValueError, match=expected):
            InstructionDataModule(str(tmp_path / file), bpe_vocab_size=300, cache_dir=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("data", [TextDataModule, InstructionDataModule])
def test_a_type_that_is_named_by_a_pickle_is_none(tmp_path, data):
    pq.write_table(arrow_type_of_a_pickle([f"a text of {n} and {n + 1}" for n in range(90)]), "rows.parquet")
    sizes = {"block_size": 8} if data is TextDataModule else {}
    made = data("rows.parquet", bpe_vocab_size=300, cache_dir=str(tmp_path), **sizes)
    with contextlib.suppress(ValueError, DatasetGenerationError):
        made.prepare_data()
        made.setup()
        next(iter(made.val_dataloader()))


def test_served_answers_run_nothing():
    Path("rows.jsonl").write_bytes(pickle.dumps(Hostile()))
    pq.write_table(arrow_type_of_a_pickle(["a"]), "rows.parquet")
    pq.write_table(pa.table({"sample_id": [1], "choices": [pickle.dumps(Hostile())]}), "pickles.parquet")
    for file in ("rows.jsonl", "rows.parquet", "pickles.parquet"):
        with pytest.raises(ValueError, match=rf"Expected .*(line 1|row 0) of {file}"):
            list(read_answers([file]))


@pytest.mark.parametrize("read", ["text", "pairs", "answers"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"text": "' + b"a" * 5000 + b'"}'], ids=["deep", "long"])
def test_a_line_that_would_fill_the_memory_is_refused(read, content, monkeypatch):
    """The sentence names the file and the line; of a line of 120 MB no more is read than the limit."""
    for module in (json_lines, served):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 4096 if content.endswith(b"}") else 2**20)
    Path("rows.jsonl").write_bytes(b"\n" + content)
    readers = {
        "text": lambda: TextDataModule("rows.jsonl", bpe_vocab_size=300, cache_dir=".").prepare_data(),
        "pairs": lambda: InstructionDataModule("rows.jsonl", bpe_vocab_size=300, cache_dir=".").prepare_data(),
        "answers": lambda: list(read_answers(["rows.jsonl"])),
    }
    with pytest.raises(ValueError, match=r"Expected a JSON object (of at most 4,096 bytes )?in line 2 of rows\.jsonl"):
        readers[read]()


def test_a_folder_of_images_runs_nothing(tmp_path):
    """Neither a pickle that is called an image, nor the script that data sets once had."""
    for kind in ("a", "b"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "images" / kind / f"{number}.png").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "images" / "images.py").write_text("import os\nos.system('touch ran')\n")
    data = ImageDataModule("images", cache_dir=tmp_path, val_fraction=0.5)
    data.prepare_data()
    data.setup()
    with pytest.raises(ValueError, match=r"Expected .*\.png to be an image, but it cannot be read"):
        next(iter(data.val_dataloader()))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_data_set_runs_nothing(tmp_path, name):
    Dataset.from_dict({"image": ["a"], "label": [0]}).save_to_disk("images")
    Path("images", name).write_bytes(pickle.dumps(Hostile()))
    for file in Path("images").glob("*.arrow"):
        file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises((ValueError, OSError)):
        ImageDataModule("images", cache_dir=tmp_path).prepare_data()


# --- caches ---


@pytest.mark.parametrize("kind", ["blocks", "pairs"])
@pytest.mark.parametrize("suffix", [".arrow", ".json"])
def test_a_cache_of_prepared_rows_runs_nothing(tmp_path, kind, suffix):
    rows = [{"text": f"What is {n}?", "prompt": f"What is {n}?", "response": f"a number {n}"} for n in range(90)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make():
        if kind == "blocks":
            return TextDataModule("rows.jsonl", bpe_vocab_size=300, block_size=8, cache_dir="cache")
        return InstructionDataModule("rows.jsonl", bpe_vocab_size=300, cache_dir="cache")

    make().prepare_data()
    written = [file for file in Path("cache").rglob(f"*{suffix}") if file.is_file()]
    assert written
    for file in written:
        file.write_bytes(pickle.dumps(Hostile()))

    def read():
        data = make()
        data.prepare_data()
        data.setup()

    with pytest.raises((ValueError, OSError)):
        read()


@pytest.mark.parametrize("name", ["cache.json", "tokens.json"])
def test_descriptions_of_a_cache_may_be_as_deep_as_they_like(tmp_path, name):
    folder = write_cache(tmp_path / "cache")
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"Expected .*(cache\.json|tokens\.json)"):
        assert LogitCache(folder).tokens


def write_cache(folder: Path, **changes) -> Path:
    folder.mkdir()
    rows = {name: torch.zeros(3) for name in ("tail", "log_normalizer", "mean", "std")}
    tensors = {"sample_ids": torch.tensor([1, 2]), "offsets": torch.tensor([0, 1, 3])}
    tensors |= {"ends": torch.zeros(3, dtype=torch.int32), "token_ids": torch.zeros(3, 2, dtype=torch.int32)}
    save_file({**tensors, **rows, "log_probs": torch.zeros(3, 2)}, folder / "shard-00000.safetensors")
    settings = {"top_k": 2, "temperature": 1.0, "tokenizer_id": 0, "vocab_size": 9}
    size = (folder / "shard-00000.safetensors").stat().st_size
    description = {"format": "lit_logits.logit_cache", "version": 1, "complete": True, "settings": settings}
    description |= {"num_samples": 2, "num_tokens": 3, "shards": [size], **changes}
    (folder / "cache.json").write_text(json.dumps(description))
    return folder


def test_a_logit_cache_runs_nothing(tmp_path):
    assert len(LogitCache(write_cache(tmp_path / "whole"))) == 2
    folder = write_cache(tmp_path / "hostile")
    data = pickle.dumps(Hostile())
    (folder / "shard-00000.safetensors").write_bytes(data)
    description = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({**description, "shards": [len(data)]}))
    with pytest.raises(ValueError, match=r"Expected .*shard-00000\.safetensors to be whole"):
        LogitCache(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {}},
        {"settings": None},
        {"settings": {"top_k": "many", "temperature": 1, "tokenizer_id": 0, "vocab_size": 9}},
        {"shards": 7},
        {"shards": ["../../other"]},
        {"num_tokens": None},
    ],
)
def test_a_logit_cache_whose_description_is_made_up_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"Expected .*cache\.json to be whole, but misses or misspells"):
        LogitCache(write_cache(tmp_path / "cache", **changes))


def test_an_image_cache_runs_nothing(tmp_path):
    data = ImageDataModule("digits", cache_dir=tmp_path)
    data.prepare_data()
    for file in tmp_path.rglob("*.npy"):
        with open(file, "wb") as stream:
            np.lib.format.write_array(stream, np.array([Hostile()], dtype=object), allow_pickle=True)
    data = ImageDataModule("digits", cache_dir=tmp_path)
    data.prepare_data()
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.setup("fit")  # reads the labels


# --- GGUF ---

HEADER = b"GGUF" + struct.pack("<I", 3)
GGUF = {
    "pickle": pickle.dumps(Hostile()),
    "empty": b"",
    "magic alone": b"GGUF",
    "version": b"GGUF" + struct.pack("<IQQ", 99, 1, 1),
    "counts": HEADER + struct.pack("<QQ", 2**60, 2**60),
    "long string": HEADER + struct.pack("<QQQ", 0, 1, 2**62) + b"abc",
    "large tensor": HEADER + struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 2**61, 0, 2**61),
    "long array": HEADER + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**50),
    "nothing": HEADER + struct.pack("<QQ", 0, 0),
}


@pytest.mark.parametrize("kind", GGUF)
def test_a_gguf_file_runs_nothing(kind):
    pytest.importorskip("gguf")
    Path("model.gguf").write_bytes(GGUF[kind])
    with pytest.raises(ValueError, match=r"Expected 'model\.gguf' to be the GGUF file of a language model"):
        load_causal_lm("model.gguf")
    with pytest.raises(ValueError, match=r"Expected `tokenizer` to be .*got 'model\.gguf'"):
        TextDataModule(tokenizer="model.gguf").prepare_data()


def test_a_gguf_file_that_is_not_there_is_no_damaged_one():
    with pytest.raises(ValueError, match="there is no such file"):
        load_causal_lm("folder/model.gguf")
