"""Fused decoders in the form of a model, and in lm-evaluation-harness, where that is installed."""

import copy
import json
import math
import subprocess
import sys

import lightning as L
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_logits import DynamicFusionDecoder
from lit_logits.datamodules import InstructionDataModule, PairSource
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.harness import register

QUESTIONS = [
    {"q": f"Is {a} more than {b}?", "options": ["yes", f"no, it is not, as {a} is less", "maybe"], "right": a % 3}
    for a in range(5)
    for b in range(4)
]
TASKS = {
    "my_choice": """
output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "my_text": """
output_type: loglikelihood_rolling
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}]
""",
    "my_end": """
output_type: generate_until
doc_to_target: " and so on"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Questions, and three models with one tokenizer."""
    root = tmp_path_factory.mktemp("harness")
    (root / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (root / "words").mkdir()
    train_bpe([row["q"] + " " + row["options"][1] for row in QUESTIONS], 290, root / "words")
    tokenizer = load_tokenizer(root / "words")
    torch.manual_seed(0)

    def llama(hidden):
        sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8 * hidden}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **heads, **ends)
        ).eval()

    base = llama(16)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for name, model in (("large", llama(32)), ("base", base), ("expert", expert)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def make(files, **kwargs):
    return DynamicFusionDecoder(*(str(files / name) for name in ("large", "base")), [str(files / "expert")], **kwargs)


def test_it_looks_like_a_model(files):
    decoder = make(files)
    model, ids = decoder.as_model(), torch.tensor([[3, 4, 5]])
    assert model.config is decoder.fused.large.config
    assert model.device == torch.device("cpu")
    assert model.context == 128  # the base's
    assert torch.equal(model(ids).logits, decoder(ids))
    assert torch.equal(model.generate(ids, max_new_tokens=4), decoder.generate(ids, max_new_tokens=4))


def test_an_end_of_ones_own_holds(files):
    ids = torch.tensor([[3, 4, 5]])
    text = make(files).generate(ids, max_new_tokens=6)[0, 3:].tolist()
    ended = make(files, eos_token_id=text[2]).as_model().generate(ids, max_new_tokens=6)
    assert ended[0, 3:].tolist() == text[: text.index(text[2]) + 1]


def test_a_harness_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ValueError, match="Run `pip install lm_eval`"):
        register()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["distance", "projection"])
def test_its_command_line_finds_what_test_finds(criterion, files, tmp_path):
    pytest.importorskip("lm_eval")
    common = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n" % (
        files / "choice.jsonl"
    )
    for name, text in TASKS.items():
        prompt = '""' if name == "my_text" else '"{{q}}"'
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}doc_to_text: {prompt}\n{text}")
    models = f"pretrained={files / 'large'},base={files / 'base'},experts={files / 'expert'},criterion={criterion}"
    command = [sys.executable, "-m", "lit_logits.harness", "--model", "lit_logits", "--model_args", models]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "3"]
    done = subprocess.run([*command, "--log_samples", "--output_path", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text())["results"]

    decoder = make(files, criterion=criterion)
    source = PairSource(str(files / "choice.jsonl"), prompt_column="q", choices_column="options", answer_column="right")
    words = str(files / "words")
    data = InstructionDataModule(
        source, words, template="{prompt} {response}", test_fraction=1.0, val_fraction=0.0, cache_dir=str(tmp_path)
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (logged,) = trainer.test(decoder, data, verbose=False)
    for name in ("acc", "acc_norm"):
        assert found["my_choice"][f"{name},none"] == pytest.approx(logged[f"test/{name}"], abs=1e-4)

    tokenizer = load_tokenizer(files / "words")
    begin, total = tokenizer.bos_token_id or tokenizer.eos_token_id, 0.0
    for row in QUESTIONS:
        ids = torch.tensor([[begin, *tokenizer(row["q"]).input_ids]])
        total -= float(decoder.score(ids, ids).log_probs.sum())
    num_words = sum(len(str(row["q"]).split()) for row in QUESTIONS)
    assert found["my_text"]["word_perplexity,none"] == pytest.approx(math.exp(total / num_words), rel=1e-4)

    (samples,) = tmp_path.rglob("samples_my_end_*.jsonl")
    written = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    for sample, row in zip(written, QUESTIONS, strict=True):
        ids = tokenizer(row["q"], return_tensors="pt").input_ids
        text = decoder.generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
        expected = tokenizer.decode(text, skip_special_tokens=True).split("\n\n")[0]
        assert sample["filtered_resps"] == [expected]
