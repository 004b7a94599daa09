"""`DynamicFusionDecoder` through the Trainer and the command line: predict, test, choices, exact match, resuming."""

import copy
import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from lit_logits import CausalLM, DynamicFusionDecoder
from lit_logits.callbacks import FusionCalibrationWriter, FusionWeightLogger, JsonLinesWriter
from lit_logits.cli import LitLogitsCLI
from lit_logits.datamodules import InstructionDataModule, PairSource
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.functional import fuse_logits, fusion_weights
from lit_logits.modules import split_prompts
from lit_logits.modules.dynamic_fusion.answers import extract_answer

ROWS = [
    {"prompt": f"What is {a} plus {b}?", "response": f"{a} and {b} make {a + b}.\n#### {a + b}"}
    for a in range(8)
    for b in range(5)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data file, a tokenizer and four models on disk."""
    root = tmp_path_factory.mktemp("fusion")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "tokenizer").mkdir()
    train_bpe([f"Question: {row['prompt']}\nAnswer: {row['response']}" for row in ROWS], 300, root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    torch.manual_seed(0)

    def save(model, name):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)

    def llama(hidden):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    base = llama(16)
    save(llama(32), "large")
    save(base, "base")
    for name in ("one", "two"):
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        save(expert, name)
    return root


def make(files, **kwargs):
    names = (str(files / name) for name in ("one", "two"))
    return DynamicFusionDecoder(str(files / "large"), str(files / "base"), list(names), **kwargs)


def data(files, **kwargs):
    settings = {"tokenizer": str(files / "tokenizer"), "batch_size": 3, "max_length": 128, "test_fraction": 0.3}
    return InstructionDataModule(str(files / "pairs.jsonl"), cache_dir=str(files / "cache"), **settings | kwargs)


def trainer(tmp_path, **kwargs):
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False, **kwargs)


def rows_of_test_split(module):
    """Prompt and response of the test split, in order, as text."""
    module.prepare_data()
    module.setup()
    rows = []
    for batch in module.test_dataloader():
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            rows.append((ids[mask.bool() & (labels == -100)], ids[mask.bool() & (labels != -100)]))
    return rows


def test_predict_writes_a_line_for_each_prompt(files, tmp_path):
    decoder, module = make(files, generation={"max_new_tokens": 10}), data(files)
    writer = JsonLinesWriter(str(tmp_path / "out"))
    trainer(tmp_path, callbacks=[writer]).predict(decoder, module, return_predictions=False)
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    rows, tokenizer = rows_of_test_split(module), load_tokenizer(files / "tokenizer")
    assert [record["row"] for record in records] == list(range(len(rows)))
    for record, (prompt, response) in zip(records, rows, strict=True):
        assert record["prompt"] == tokenizer.decode(prompt)
        assert record["reference"] == tokenizer.decode(response, skip_special_tokens=True)
        output = decoder.generate(prompt.unsqueeze(0), max_new_tokens=10, return_dict_in_generate=True)
        alone = output.sequences[0, len(prompt) :]
        assert record["text"] == tokenizer.decode(alone, skip_special_tokens=True)
        assert list(record["alpha"]) == ["one", "two"]
        lengths = {len(record["tokens"]), *map(len, record["alpha"].values()), len(record["kl_forward"])}
        assert lengths == {len(alone)}
        torch.testing.assert_close(
            torch.tensor(list(record["alpha"].values())), output.trace.alpha[:, 0].cpu(), atol=2e-3, rtol=0
        )


@pytest.mark.parametrize("copies", [1, 2])
def test_records_tell_what_each_model_would_have_said(files, tmp_path, copies):
    generation = {"max_new_tokens": 5, "do_sample": copies > 1, "num_return_sequences": copies}
    decoder = make(files, generation=generation, trace_logits=True)
    [batch, *_] = trainer(tmp_path).predict(decoder, data(files, max_test_rows=3))
    prompts = [prompt for prompt, _ in rows_of_test_split(data(files, max_test_rows=3))]
    for prompt, record in zip(prompts, batch, strict=True):
        for sample in record.get("samples", [record]):
            tops, tokens = sample["top_tokens"], sample["tokens"]
            assert list(tops) == ["large", "base", "one", "two"]
            ids = torch.tensor([[*prompt.tolist(), *decoder.tokenizer.convert_tokens_to_ids(tokens)]])
            for model, found in zip(decoder.fused.models, tops.values(), strict=True):
                expected = model(ids[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1).topk(5)
                assert found["ids"] == expected.indices.tolist()
                torch.testing.assert_close(torch.tensor(found["log_probs"]), expected.values, atol=2e-4, rtol=0)
                assert found["tokens"][0] == decoder.tokenizer.convert_ids_to_tokens(found["ids"][0])
    plain = make(files, generation=generation)
    assert "top_tokens" not in json.dumps(trainer(tmp_path).predict(plain, data(files, max_test_rows=3)))


def test_a_killed_predict_goes_on(files, tmp_path, monkeypatch):
    module, folder = data(files), str(tmp_path / "out")
    whole = str(tmp_path / "whole")
    trainer(tmp_path, callbacks=[JsonLinesWriter(whole)]).predict(
        make(files, generation={"max_new_tokens": 6}), data(files), return_predictions=False
    )
    decoder = make(files, generation={"max_new_tokens": 6})
    step = decoder.predict_step

    def die(batch, batch_idx):
        if batch_idx == 2:
            raise KeyboardInterrupt
        return step(batch, batch_idx)

    monkeypatch.setattr(decoder, "predict_step", die)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, callbacks=[JsonLinesWriter(folder)]).predict(decoder, module, return_predictions=False)
    assert sum(len(p.read_text().splitlines()) for p in Path(folder).glob("part-*.jsonl")) == 6
    decoder = make(files, generation={"max_new_tokens": 6})
    seen = []
    plain = decoder.predict_step

    def watch(batch, batch_idx):
        seen.extend(batch["rows"].tolist())
        return plain(batch, batch_idx)

    monkeypatch.setattr(decoder, "predict_step", watch)
    trainer(tmp_path, callbacks=[JsonLinesWriter(folder)]).predict(decoder, data(files), return_predictions=False)
    expected = [json.loads(line) for line in Path(whole, "predictions.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in Path(folder, "predictions.jsonl").read_text().splitlines()]
    assert seen == list(range(6, len(expected)))
    assert [(r["row"], r["text"]) for r in found] == [(r["row"], r["text"]) for r in expected]


def test_predictions_of_other_weights_are_refused(files, tmp_path):
    """The same paths are not the same models."""
    folder, generation = str(tmp_path / "out"), {"max_new_tokens": 2}
    trainer(tmp_path, callbacks=[JsonLinesWriter(folder)]).predict(make(files, generation=generation), data(files))
    changed = make(files, generation=generation)
    with torch.no_grad():
        changed.fused.experts[1].lm_head.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"`model.experts\[1\]` was '[0-9a-f]{16}' there and is"):
        trainer(tmp_path, callbacks=[JsonLinesWriter(folder)]).predict(changed, data(files))
    same = make(files, generation=generation, exact_match=True)  # changes no text
    trainer(tmp_path, callbacks=[JsonLinesWriter(folder)]).predict(same, data(files))


def test_perplexity_is_of_the_responses_under_the_fused_distribution(files, tmp_path):
    module, decoder = data(files), make(files)
    logged = trainer(tmp_path).test(decoder, module, verbose=False)[0]
    total, count, alphas = 0.0, 0, []
    large, base, *experts = decoder.fused.models
    for prompt, response in rows_of_test_split(module):
        text = torch.cat([prompt, response]).unsqueeze(0)
        at = slice(len(prompt) - 1, text.shape[1] - 1)
        a, b = (model(text).logits[0, at] for model in (large, base))
        e = torch.stack([model(text).logits[0, at] for model in experts])
        alpha = fusion_weights(a, b, e).alpha
        log_probs = fuse_logits(a, b, e, alpha).log_softmax(-1)
        total -= float(log_probs.gather(1, response.unsqueeze(1)).sum())
        count += len(response)
        alphas.append(alpha.sum(0))
    assert logged["test/loss"] == pytest.approx(total / count, rel=1e-3)
    assert logged["test/ppl"] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-3)
    assert logged["fusion/alpha"] == pytest.approx(float(torch.cat(alphas).mean()), abs=2e-3)
    assert logged["fusion/kl_forward"] > 0
    static = trainer(tmp_path).test(make(files, static_alpha=0.0), data(files), verbose=False)[0]
    assert static["fusion/kl_forward"] == 0
    assert static["test/loss"] != pytest.approx(logged["test/loss"], rel=1e-4)


def test_exact_match_compares_final_answers(files, tmp_path, monkeypatch):
    """Every second text ends in the right number, written otherwise; the rest gives a wrong one."""
    module, decoder = data(files), make(files, exact_match=True, generation={"max_new_tokens": 4})
    tokenizer, rows = decoder.tokenizer, rows_of_test_split(module)
    real = decoder._sample
    given = iter(range(len(rows)))

    def sample(trace, index):
        number = next(given)
        answer = extract_answer(tokenizer.decode(rows[number][1], skip_special_tokens=True))
        return real(trace, index) | {"text": f"It is {answer}.0" if number % 2 == 0 else f"#### {int(answer) + 1}"}

    monkeypatch.setattr(decoder, "_sample", sample)
    logged = trainer(tmp_path).test(decoder, module, verbose=False)[0]
    assert logged["test/exact_match"] == pytest.approx(-(-len(rows) // 2) / len(rows))


def test_choices_are_judged_by_the_likelihood_of_their_text(files, tmp_path):
    questions = [
        {"q": f"Is {a} more than {b}?", "options": ["yes", f"no, it is not, as {a} is less", "maybe"], "right": a % 3}
        for a in range(6)
        for b in range(3)
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    module = InstructionDataModule(
        PairSource(str(tmp_path / "choices.jsonl"), prompt_column="q", choices_column="options", answer_column="right"),
        tokenizer=str(files / "tokenizer"),
        batch_size=2,
        test_fraction=0.5,
        max_length=128,
        cache_dir=str(tmp_path / "cache"),
    )
    decoder = make(files)
    logged = trainer(tmp_path).test(decoder, module, verbose=False)[0]
    options = {(row["q"], text) for row in questions for text in row["options"]}  # type: ignore[attr-defined]
    right, right_norm, total, count = [], [], 0.0, 0
    for batch in module.test_dataloader():
        sums, norms = [], []
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            scores = decoder.score(ids[None, mask.bool()], labels[None, mask.bool()])
            text = decoder.tokenizer.decode(labels[labels >= 0][:-1])  # without the end token
            assert any(text.strip() == option for _, option in options)
            sums.append(float(scores.log_probs[scores.trace.mask][:-1].sum()))
            norms.append(sums[-1] / len(text.strip()))
            if batch["correct"][len(sums) - 1]:
                total, count = total - float(scores.log_probs.sum()), count + int(scores.trace.mask.sum())
        for row in batch["rows"].unique():
            own = [i for i in range(len(sums)) if batch["rows"][i] == row]
            assert len(own) == 3
            right.append(int(batch["correct"][max(own, key=sums.__getitem__)]))
            right_norm.append(int(batch["correct"][max(own, key=norms.__getitem__)]))
    assert right != right_norm
    assert logged["test/acc_norm"] == pytest.approx(sum(right_norm) / len(right_norm))
    assert logged["test/acc"] == pytest.approx(sum(right) / len(right))
    rated = trainer(tmp_path).validate(decoder, module.test_dataloader(), verbose=False)[0]
    assert rated["val/loss"] == pytest.approx(logged["test/loss"], rel=1e-5)  # of the right answers alone
    assert logged["test/loss"] == pytest.approx(total / count, rel=1e-3)


def test_prompts_are_split_off_and_padded_on_the_left():
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5])
    labels = torch.tensor([[-100, -100, -100, 4, 5], [-100, 7, 8, -100, -100], [-100] * 5])
    prompts, kept = split_prompts({"input_ids": ids, "attention_mask": mask, "labels": labels}, pad=0)
    assert prompts.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 6], [9, 8, 7, 6, 5]]
    assert kept.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1] * 5]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 1,234", "1234"),
        ("...\n#### $5.50\nmore 7", "5.5"),
        ("first 3, then 4.", "4"),
        ("#### -3", "-3"),
        ("#### Blue ", "blue"),
        ("it is in the range 5-10", "10"),
        ("$.50 each", "0.5"),
        ("#### \nfoo 5", "5"),
        ("nothing", None),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### 3, 4 and 5", "3"),
        ("#### 3,4", "3"),
        ("#### 18 dollars for 2 hours", "18"),
        ("#### 1.2e3", "1200"),
        ("#### 5e-1", "0.5"),
        ("#### -0", "0"),
        ("#### 72.", "72"),
        ("10 - 3 = 7", "7"),
        ("10-3", "3"),
        ("#### 1e999999", "1E+999999"),
        ("#### 18\n#### 20", "18"),
        ("That is 12.\nQuestion: How many are 99?", "12"),
        ("#### 12<|im_end|>\n#### 13", "12"),
        ("Question: none, but 3", "3"),
    ],
)
def test_final_answers(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "#### 72",
        "so\n#### 1,234",
        "#### -3",
        "#### 5.50",
        "#### 18 dollars",
        "#### 18\n\nQuestion: next\n#### 20",
        "#### 12.",
        "It is 5.",
        "first 3, then 4",
        "She has $18 left.",
        "2 + 2 = 4.\n\nQuestion: 3 + 3?\nAnswer: 6",
    ],
)
def test_answers_are_those_of_the_harness(text):
    """The patterns and rules of its GSM8K task, strict where `####` is there and flexible elsewhere."""
    text = text.split("Question:")[0]
    strict = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    flexible = [a or b for a, b in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)]
    found = re.sub(r"\.$", "", re.sub(r",|\$", "", strict[0] if strict else flexible[-1]))
    assert float(extract_answer(text)) == float(found)


def test_choices_that_would_be_cut_are_refused(files, tmp_path):
    options = ["no", "because it is so and not otherwise, as all of us know"]
    rows = [{"q": f"Why {number}?", "options": options, "right": 0} for number in range(8)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PairSource(
        str(tmp_path / "choices.jsonl"), prompt_column="q", choices_column="options", answer_column="right"
    )
    settings = {"tokenizer": str(files / "tokenizer"), "test_fraction": 0.5, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"Expected all choices of row \d+ .* to fit into 24 tokens, .* but got \d+\."):
        InstructionDataModule(source, max_length=24, **settings).prepare_data()


def test_stop_strings_use_the_tokenizer_of_the_models(files, tmp_path):
    """A recipe cannot give one to `generate`, which asks for it."""
    module = data(files, max_test_rows=4)
    plain = trainer(tmp_path).predict(make(files, generation={"max_new_tokens": 12}), module)
    texts = [record["text"] for batch in plain for record in batch]
    stop = texts[0][2]
    generation = {"max_new_tokens": 12, "stop_strings": [stop]}
    stopped = trainer(tmp_path).predict(make(files, generation=generation), data(files, max_test_rows=4))
    for text, record in zip(texts, (record for batch in stopped for record in batch), strict=True):
        assert text.startswith(record["text"])
        assert stop not in record["text"][:-1] or record["text"].count(stop) == 1
    assert len(stopped[0][0]["tokens"]) < len(plain[0][0]["tokens"])


def test_several_samples_of_a_prompt_are_one_record(files, tmp_path):
    generation = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3, "temperature": 1.5}
    decoder = make(files, generation=generation)
    L.seed_everything(1)
    batches = trainer(tmp_path).predict(decoder, data(files))
    record = batches[0][0]
    assert len(record["samples"]) == 3
    assert len({sample["text"] for sample in record["samples"]}) > 1
    assert "text" not in record


def test_data_of_another_tokenizer_is_refused(files, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    train_bpe([row["prompt"] for row in ROWS], 280, tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="the models and the data to have one tokenizer"):
        trainer(tmp_path).test(make(files), data(files, tokenizer=str(tmp_path / "tokenizer")))


def test_fit_says_that_there_is_nothing_to_train(files, tmp_path):
    with pytest.raises(ValueError, match="trains nothing, but got `fit`"):
        trainer(tmp_path, max_steps=1).fit(make(files), data(files))


def test_validate_writes_the_settings_that_the_validation_split_likes_best(files, tmp_path):
    module, decoder = data(files, val_fraction=0.2), make(files, scale_grid=[0.0, 0.5, 1.0])
    writer = FusionCalibrationWriter(str(tmp_path / "found" / "calibrated.yaml"))
    logged = trainer(tmp_path, callbacks=[writer]).validate(decoder, module, verbose=False)[0]
    text = (tmp_path / "found" / "calibrated.yaml").read_text()
    recipe = yaml.safe_load(text)["model"]
    assert recipe["class_path"] == "lit_logits.dynamic_fusion.DynamicFusionDecoder"
    found = {}
    grid = [
        {"criterion": name, "scale": x}
        for name in ("distance", "projection", "equal", "uncertain", "prompt")
        for x in (0.5, 1.0)
    ]
    for settings in [*grid, *({"static_alpha": [x, x]} for x in (0.0, 0.5, 1.0))]:
        other, total, count = make(files, **settings), 0.0, 0
        for batch in module.val_dataloader():
            scores = other.score(batch["input_ids"], batch["labels"], batch["attention_mask"])
            total, count = total - float(scores.log_probs.sum()), count + int(scores.trace.mask.sum())
        found[json.dumps(settings)] = total / count
    own = found[json.dumps({"criterion": "distance", "scale": 1.0})]
    assert logged["val/loss"] == pytest.approx(own, rel=1e-4)
    best = json.loads(min(found, key=found.get))
    assert recipe["init_args"] == best | ({} if "static_alpha" in best else {"static_alpha": None})
    assert min(found.values()) < own
    assert f"{torch.tensor(min(found.values())).exp():.3f}" in text


def test_calibration_without_a_validation_split_is_told(files, tmp_path):
    writer = FusionCalibrationWriter(str(tmp_path / "calibrated.yaml"))
    with pytest.warns(UserWarning, match="wrote nothing, as the data has no validation split"):
        trainer(tmp_path, callbacks=[writer]).validate(make(files), data(files, val_fraction=0.0), verbose=False)
    assert not (tmp_path / "calibrated.yaml").exists()


def test_calibration_wants_experts_and_a_part(files, tmp_path):
    alone = DynamicFusionDecoder(str(files / "large"))
    with pytest.raises(ValueError, match="Expected `experts`, whose weights `validate` chooses, but got none"):
        trainer(tmp_path).validate(alone, data(files), verbose=False)
    writer = FusionCalibrationWriter()
    with pytest.raises(ValueError, match="Expected a model with a `FusionCalibration`"):
        trainer(tmp_path, callbacks=[writer]).validate(CausalLM(str(files / "base")), data(files), verbose=False)


@pytest.mark.slow
def test_a_calibrated_recipe_is_given_after_the_recipe(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {"model": str(files / "large"), "base": str(files / "base"), "experts": [str(files / "one")]}
    source = {"source": str(files / "pairs.jsonl"), "tokenizer": str(files / "tokenizer")}
    mine = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {"class_path": "DynamicFusionDecoder", "init_args": models | {"exact_match": False}},
        "data": {
            "class_path": "InstructionDataModule",
            "init_args": source | {"val_fraction": 0.2, "test_fraction": 0.2, "cache_dir": str(files / "cache")},
        },
    }
    Path("mine.yaml").write_text(yaml.safe_dump(mine))
    configs = ["--config", "dynamic_fusion.yaml", "--config", "mine.yaml"]
    LitLogitsCLI(["validate", *configs])
    [file] = Path("runs/mine").glob("*/calibrated.yaml")
    chosen = yaml.safe_load(file.read_text())["model"]["init_args"]
    fused = LitLogitsCLI(["test", *configs, "--config", str(file)]).model.fused
    if chosen["static_alpha"] is not None:
        assert fused.static_alpha == chosen["static_alpha"]
    else:
        assert (fused.criterion, fused.scale) == (chosen["criterion"], chosen["scale"])
    assert fused.expert_names == ["one"]


@pytest.mark.slow
def test_from_the_command_line_with_event_files(files, tmp_path, monkeypatch):
    """The shipped recipe on these models: predict twice, then test."""
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((Path(__file__).parents[1] / "configs" / "dynamic_fusion.yaml").read_text())
    recipe["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    recipe["model"]["init_args"] |= {
        "model": str(files / "large"),
        "base": str(files / "base"),
        "experts": [str(files / "one"), [str(files / "one"), str(files / "two")]],
        "generation": {"max_new_tokens": 5},
    }
    recipe["data"]["init_args"] |= {
        "source": str(files / "pairs.jsonl"),
        "tokenizer": str(files / "tokenizer"),
        "cache_dir": str(files / "cache"),
        "max_length": 128,
        "test_fraction": 0.3,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    LitLogitsCLI(["predict", "--config", "mine.yaml"])
    file = tmp_path / "predictions" / "dynamic_fusion" / "predictions.jsonl"
    first = file.read_text()
    records = [json.loads(line) for line in first.splitlines()]
    assert len(records) == 12
    assert list(records[0]["alpha"]) == ["one", "one+two"]
    LitLogitsCLI(["predict", "--config", "mine.yaml"])
    assert file.read_text() == first
    assert list((tmp_path / "runs" / "mine").glob("version_*/events.out.tfevents.*"))
    cli = LitLogitsCLI(["test", "--config", "mine.yaml", "--model.init_args.solver", "grid"])
    assert any(isinstance(callback, FusionWeightLogger) for callback in cli.trainer.callbacks)  # type: ignore[attr-defined]
    assert cli.trainer.callback_metrics["test/ppl"] > 1
