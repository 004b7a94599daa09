"""The recipes of fusion from the command line: sources of other tokenizers, cached or not, trained, saved, reloaded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from lit_logits import GLDFusionModule
from lit_logits.cli import LitLogitsCLI
from lit_logits.datamodules import InstructionDataModule
from lit_logits.datamodules.tokenization import load_tokenizer, tokenizer_id, train_bpe
from lit_logits.datamodules.tokenization import tokenizer_id as id_in_batches
from lit_logits.modules import LogitCache, LogitSource, load_source, new_causal_lm

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PAIRS = [
    (f"{a} plus {b}", f"{a} and {b} give {i + j} 🙂 café") for i, a in enumerate(WORDS) for j, b in enumerate(WORDS)
]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Pairs, and three tokenizers of which two have a model with random weights that are not small."""
    folder = tmp_path_factory.mktemp("models")
    rows = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(rows))
    (folder / "others.jsonl").write_text("".join(rows).replace("give", "make"))
    texts = [f"Question: {prompt}\nAnswer: {response}" for prompt, response in PAIRS]
    for name, size in (("pivot", 280), ("wide", 400), ("narrow", 300)):
        (folder / name).mkdir()
        train_bpe(texts, size, folder / name)
        tokenizer = load_tokenizer(folder / name)
        torch.manual_seed(size)
        model = new_causal_lm({"model_type": "llama", "vocab_size": len(tokenizer) + 8, **SHAPE})  # padded
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6 if parameter.ndim == 2 else 1)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["lit-logits"])


def options(models, source="pairs.jsonl", sources=None, batch_size=4):
    views = {name: str(models / name) for name in ("wide", "narrow")}
    return [
        f"--data.init_args.source={models / source}",
        f"--data.init_args.tokenizer={models / 'pivot'}",
        f"--data.init_args.source_tokenizers={json.dumps(views)}",
        f"--data.init_args.batch_size={batch_size}",
        f"--model.init_args.sources={json.dumps(sources or views)}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_progress_bar=false",
    ]


def write_caches(models, *args, folder="caches", **kwargs):
    arguments = ["predict", "--config=cache_logits.yaml", *options(models, **kwargs), "--model.init_args.top_k=8"]
    return LitLogitsCLI([*arguments, f"--trainer.callbacks.init_args.folder={folder}", *args])


def fit(models, *args, steps=3, **kwargs):
    arguments = ["fit", "--config=gld_fusion.yaml", *options(models, **kwargs), f"--trainer.max_steps={steps}"]
    pivot = json.dumps({"model_type": "llama", **SHAPE})
    small = [f"--model.init_args.pivot={pivot}", "--model.init_args.top_k=5", "--trainer.log_every_n_steps=1"]
    return LitLogitsCLI([*arguments, *small, f"--trainer.val_check_interval={steps}", *args])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


CACHED = {"wide": "caches/wide", "narrow": "caches/narrow"}


def test_both_layers_give_a_tokenizer_the_same_number(models):
    numbers = {name: id_in_batches(load_tokenizer(models / name)) for name in ("pivot", "wide", "narrow")}
    assert {name: tokenizer_id(load_tokenizer(models / name)) for name in numbers} == numbers
    assert len(set(numbers.values())) == 3


@pytest.mark.slow
def test_fused_across_tokenizers_saved_and_used_by_plain_transformers(models):
    run = fit(models)
    [folder] = Path("runs/gld_fusion").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    names = {f"train/{part}/{name}" for part in ("loss_uld", "loss_gld", "aligned") for name in ("wide", "narrow")}
    assert names | {"train/loss_ce", "val/ppl", "gw/ratio/wide", "gw/exact/narrow"} <= set(events.Tags()["scalars"])
    assert {"gw/scatter", "gw/graph/wide"} <= set(events.Tags()["images"])
    assert {f"samples/{number}/text_summary" for number in range(4)} <= set(events.Tags()["tensors"])
    aligned = [event.value for event in events.Scalars("train/aligned/wide")]
    assert all(0.2 < share < 1 for share in aligned)
    program = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; import sys\n"
        "m, t = M.from_pretrained('models/fused'), T.from_pretrained('models/fused')\n"
        "assert 'lit_logits' not in sys.modules and type(m).__name__ == 'LlamaForCausalLM'\n"
        "ids = m.generate(**t('Question: one plus', return_tensors='pt'), max_new_tokens=5, do_sample=False)\n"
        "print(ids[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    prompt = AutoTokenizer.from_pretrained("models/fused")("Question: one plus", return_tensors="pt")
    own = run.model.pivot.eval().generate(**prompt, max_new_tokens=5, do_sample=False)
    assert json.loads(done.stdout) == own[0].tolist()


@pytest.mark.slow
def test_training_from_caches_is_training_with_the_sources(models):
    """Bit for bit where batches are padded alike, as those of one example are; else up to rounding."""
    write_caches(models, batch_size=1)
    run = fit(models, batch_size=1)
    online, logged = weights(run), run.trainer.logged_metrics
    run = fit(models, batch_size=1, sources=CACHED)
    assert torch.equal(online, weights(run))
    assert {name: float(value) for name, value in logged.items() if name.startswith("train")} == {
        name: float(value) for name, value in run.trainer.logged_metrics.items() if name.startswith("train")
    }
    online = weights(fit(models, batch_size=4))
    torch.testing.assert_close(online, weights(fit(models, batch_size=4, sources=CACHED)), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_every_term_from_caches_is_that_of_the_sources(models):
    """The tokenizers of pivot and sources are found: the pivot's in the data module, the sources' beside the models."""
    terms = {"matched": 1.0, "chunk": {"wide": 2.0}, "uld": 0.5, "gld": 0.1}
    more = [f"--model.init_args.terms={json.dumps(terms)}", "--model.init_args.source_routing=nll"]
    more += ["--model.init_args.kl_kind=jsd", "--model.init_args.unmatched=pieces", "--model.init_args.nodes=matched"]
    write_caches(models, batch_size=1)
    run = fit(models, *more, batch_size=1)
    online, logged = weights(run), run.trainer.logged_metrics
    names = {f"train/{part}/{name}" for part in ("loss_matched", "matched", "share") for name in CACHED}
    names |= {f"val/loss_matched/{name}" for name in CACHED}
    assert names | {"train/loss_chunk/wide"} <= set(logged)
    assert "train/loss_chunk/narrow" not in logged
    assert sum(float(logged[f"train/matched/{name}"]) for name in CACHED) > 0.001
    run = fit(models, *more, batch_size=1, sources=CACHED)
    assert torch.equal(online, weights(run))
    assert {name: float(value) for name, value in logged.items() if name.startswith("train")} == {
        name: float(value) for name, value in run.trainer.logged_metrics.items() if name.startswith("train")
    }


@pytest.mark.slow
def test_debiased_chunks_from_caches_are_those_of_the_sources(models):
    """Written with `chunk_debias`, whatever γ; caches that were written without are refused, and not added to."""
    more = ["--model.init_args.terms={chunk: 1.0}", "--model.init_args.chunk_debias=0.02"]
    write_caches(models, "--model.init_args.chunk_debias=0.5", batch_size=50)
    run = fit(models, *more)
    online, logged = weights(run), run.trainer.logged_metrics
    assert 0 < float(logged["train/chunks/wide"]) <= 1
    run = fit(models, *more, sources=CACHED)
    torch.testing.assert_close(online, weights(run), atol=1e-4, rtol=1e-4)
    assert float(logged["train/chunks/wide"]) == float(run.trainer.logged_metrics["train/chunks/wide"])
    write_caches(models, folder="plain", batch_size=50)
    with pytest.raises(ValueError, match="`boundary` was absent there and is True now"):
        write_caches(models, "--model.init_args.chunk_debias=0.1", folder="plain")
    with pytest.raises(ValueError, match=r"cache of 'wide' to hold the log-probabilities of a new word, .* Write it"):
        fit(models, *more, sources={name: f"plain/{name}" for name in CACHED})


def test_kl_to_a_source_of_the_pivots_tokenizer_with_a_warm_up(models):
    """From the command line; `wide` is given in the pivot's own tokens, and is cached with those."""
    ramp = {"class_path": "lit_logits.modules.LinearRamp", "init_args": {"start": 0.1, "end": 0.5, "steps": 10}}
    more = ["--data.init_args.source_tokenizers=null", f"--data.init_args.tokenizer={models / 'wide'}"]
    more += ["--model.init_args.terms={kl: 1.0, chunk: 1.0}", f"--model.init_args.kd_weight={json.dumps(ramp)}"]
    run = fit(models, *more, sources={"wide": str(models / "wide")})
    logged = run.trainer.logged_metrics
    assert {"train/loss_kl", "train/loss_chunk"} <= set(logged)
    assert float(logged["train/aligned"]) == 1
    taught = float(logged["train/loss_kl"] + logged["train/loss_chunk"])
    kd = 0.1 + 0.4 * 2 / 10  # of the third step
    expected = (1 - kd) * float(logged["train/loss_ce"]) + kd * taught
    assert float(logged["train/loss"]) == pytest.approx(expected, rel=1e-5)


def test_every_sample_is_cached_once_in_few_bytes(models):
    write_caches(models)
    data = InstructionDataModule(
        str(models / "pairs.jsonl"), tokenizer=str(models / "pivot"), predict_split="all", batch_size=4
    )
    data.prepare_data()
    data.setup()
    ids = torch.cat([batch["sample_ids"] for batch in data.predict_dataloader()])
    for name in CACHED:
        cache = LogitCache(f"caches/{name}")
        assert sorted(ids.tolist()) == cache.sample_ids.tolist()
        assert len(cache) == len(PAIRS)
        assert cache.settings["model"] == str(models / name)
        assert {path.suffix for path in Path("caches", name).iterdir()} == {".json", ".safetensors"}


def test_a_cache_of_more_logits_is_the_source_itself_to_the_bit(models):
    """The cache holds eight a position and five are asked for; the tail too is made of those five."""
    write_caches(models, batch_size=1)
    views = {"wide": str(models / "wide")}
    data = InstructionDataModule(
        str(models / "pairs.jsonl"), tokenizer=str(models / "pivot"), source_tokenizers=views, batch_size=1
    )
    data.prepare_data()
    data.setup()
    source, cache = load_source(views["wide"], "wide"), LogitCache("caches/wide")
    for batch in data.val_dataloader():
        online, cached = source(batch, 5), cache.read(batch["sample_ids"], top_k=5)
        assert torch.equal(online.mask, cached.mask)
        assert torch.equal(online.ends, cached.ends)
        for one, other in zip(online.top_k, cached.top_k, strict=True):
            assert torch.equal(one[online.mask], other[online.mask])


def test_a_cache_that_was_killed_ends_in_the_same_bytes(models, monkeypatch):
    """By an exception at several batches; the run after it makes the rest, in the same batches."""
    write_caches(models, folder="whole")
    original, calls = GLDFusionModule.predict_step, []

    def failing(self, batch, batch_idx):
        calls.append(batch["sample_ids"].tolist())
        if len(calls) in (3, 10):
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(GLDFusionModule, "predict_step", failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            write_caches(models, folder="killed")
        assert not json.loads(Path("killed/wide/cache.json").read_text())["complete"]
        with pytest.raises(ValueError, match="to be complete"):
            LogitCache("killed/wide")
    write_caches(models, folder="killed")
    assert contents("killed") == contents("whole")
    assert len(calls) == 25 + 2  # of 25 batches two were begun twice


@pytest.mark.nightly
@pytest.mark.slow
def test_a_cache_on_two_processes_and_after_a_real_kill(models):
    write_caches(models, folder="whole")
    arguments = ["predict", "--config=cache_logits.yaml", *options(models), "--model.init_args.top_k=8"]
    arguments += ["--trainer.callbacks.init_args.folder=killed", "--trainer.devices=2", "--trainer.strategy=ddp"]
    Path("run.py").write_text("from lit_logits.cli import main\nif __name__ == '__main__':\n    main()\n")
    command = [sys.executable, "-W", "ignore", "run.py", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while process.poll() is None and not list(Path("killed").glob("wide/parts/*")) and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents("killed") == contents("whole")


@pytest.mark.slow
def test_foreign_and_stale_caches_are_refused(models):
    write_caches(models)
    with pytest.raises(ValueError, match="was written for other data"):
        fit(models, source="others.jsonl", sources=CACHED)
    views = json.dumps({"wide": str(models / "narrow"), "narrow": str(models / "wide")})
    for layout in (f"--data.init_args.source_tokenizers={views}", "--data.init_args.template={prompt} => {response}"):
        with pytest.raises(ValueError, match="are of another tokenizer or template"):
            fit(models, layout, sources=CACHED)
    with pytest.raises(ValueError, match="the folder of one logit cache as source 'wide'"):
        fit(models, sources={"wide": "caches"})
    with pytest.raises(ValueError, match="to hold `top_k`=9 logits a position, but it holds 8"):
        fit(models, "--model.init_args.top_k=9", sources=CACHED)
    with pytest.raises(ValueError, match=r"at temperature 2\.0, but it was written at 1\.0"):
        fit(models, "--model.init_args.temperature=2", sources=CACHED)
    with pytest.raises(ValueError, match="`max_length` was 256 there and is 40 now"):
        write_caches(models, "--data.init_args.max_length=40")
    with pytest.raises(ValueError, match="`top_k` was 8"):
        write_caches(models, "--model.init_args.top_k=3")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(models / "wide")
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained("changed")
    load_tokenizer(models / "wide").save_pretrained("changed")
    with pytest.raises(ValueError, match="`model_digest` was"):
        write_caches(models, sources={"wide": "changed", "narrow": str(models / "narrow")})


@pytest.mark.slow
def test_training_from_caches_needs_no_tokenizers_of_the_sources(models):
    """Whose tokens are in the cache: the weights are the same, bit for bit, as where the data name them."""
    write_caches(models, batch_size=1)
    terms = ["--model.init_args.terms={matched: 1.0, chunk: 1.0, uld: 0.5, gld: 0.01}"]
    named = fit(models, *terms, batch_size=1, sources=CACHED)
    unnamed = fit(models, *terms, "--data.init_args.source_tokenizers=null", batch_size=1, sources=CACHED)
    assert torch.equal(weights(named), weights(unnamed))
    with pytest.raises(ValueError, match="source 'wide' to have the pivot's tokenizer"):
        fit(models, "--model.init_args.terms={kl: 1}", "--data.init_args.source_tokenizers=null", sources=CACHED)


@pytest.mark.slow
def test_a_cache_serves_a_smaller_max_length(models):
    """As one that was written with it, bit for bit; responses are cut in all tokenizers."""
    write_caches(models, batch_size=1)
    short = "--data.init_args.max_length=24"
    write_caches(models, short, folder="short", batch_size=1)
    sizes = [LogitCache(f"{folder}/narrow").num_tokens for folder in ("caches", "short")]
    assert sizes[1] < sizes[0]
    terms = ["--model.init_args.terms={matched: 1.0, chunk: 1.0, uld: 0.5, gld: 0.01}"]
    own = fit(models, short, *terms, batch_size=1, sources={"wide": "short/wide", "narrow": "short/narrow"})
    cut = fit(models, short, *terms, batch_size=1, sources=CACHED)
    assert torch.equal(weights(own), weights(cut))
    with pytest.raises(ValueError, match=r"reach as far as the batch, but of a response of .* Lower `max_length`"):
        fit(models, sources={"wide": "short/wide", "narrow": "short/narrow"})


@pytest.mark.slow
def test_samples_that_a_cache_lacks_are_told_before_the_first_step(models):
    """Of all training samples, not at the batch that holds one."""
    rows = (models / "pairs.jsonl").read_text().splitlines(keepends=True)
    (models / "some.jsonl").write_text("".join(rows[:60]))
    write_caches(models, source="some.jsonl")
    message = r"cache of 'wide', caches/wide, to hold all 90 training samples, but .* lacks 3\d of them.* Run `predict`"
    with pytest.raises(ValueError, match=message):
        fit(models, sources=CACHED)
    before = set(LogitCache("caches/wide").sample_ids.tolist())
    write_caches(models)  # adds what is missing
    after = LogitCache("caches/wide").sample_ids.tolist()
    assert len(after) == len(PAIRS)
    assert before < set(after)
    fit(models, sources=CACHED)


def test_a_device_map_pins_a_source(models):
    """And loaded models stay where they are, unless that is the CPU, from which they follow the batches."""
    assert load_source(str(models / "wide"), "wide", {"device_map": "cpu"}).pinned
    assert not load_source(str(models / "wide"), "wide").pinned
    assert LogitSource(AutoModelForCausalLM.from_pretrained(models / "wide").to("meta")).pinned


def test_a_source_whose_tokenizer_the_data_do_not_name(models):
    arguments = [arg for arg in options(models) if "source_tokenizers" not in arg]
    views = json.dumps({"wide": str(models / "narrow"), "narrow": str(models / "narrow")})
    for given in ({}, {"--data.init_args.source_tokenizers": views}):
        extra = [f"{key}={value}" for key, value in given.items()] or ["--data.init_args.source_tokenizers=null"]
        with pytest.raises(ValueError, match=r"source_tokenizers: \{wide: "):
            LitLogitsCLI(["fit", "--config=gld_fusion.yaml", *arguments, *extra, "--trainer.max_steps=1"])


def test_a_source_without_a_fast_tokenizer(models, monkeypatch):
    original = AutoTokenizer.from_pretrained
    slow = lambda name, **kwargs: ByT5Tokenizer() if "wide" in str(name) else original(name, **kwargs)  # noqa: E731
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", slow)
    with pytest.raises(ValueError, match=r"`source_tokenizers\['wide'\]` to be a fast one"):
        fit(models)


def test_chinese_text_is_aligned_at_every_position(models, tmp_path):
    """The pivot's own tokenizer: 63 of 112 positions were used. Two of bytes meet within characters, too."""
    rows = [json.dumps({"prompt": f"one {i}", "response": f"日本語 🙂 {i} café"}) + "\n" for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    views = {"narrow": str(models / "narrow")}
    shared = {"source_tokenizers": views, "batch_size": 4, "val_fraction": 0, "test_fraction": 0}
    data = InstructionDataModule(str(tmp_path / "pairs.jsonl"), tokenizer=str(models / "wide"), **shared)
    data.prepare_data()
    data.setup()
    fusion = GLDFusionModule(str(models / "wide"), {"same": str(models / "wide"), **views}, data.vocab_size, top_k=4)
    for batch in data.train_dataloader():
        losses = fusion.losses(batch)
        assert float(losses.sources["same"].aligned) == 1
        own, other = (
            [set(ends[ends >= 0].tolist()) for ends in view["response_bytes"]]
            for view in (batch, batch["sources"]["narrow"])
        )
        shared_places = sum(len(one & two) for one, two in zip(own, other, strict=True))
        expected = shared_places / int((batch["labels"] != -100).sum())
        assert float(losses.sources["narrow"].aligned) == pytest.approx(expected)
        assert expected > 0.9
