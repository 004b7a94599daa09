"""Saved folders in the programs that people use, each as its own process runs it.

Letters: V vocabulary.
"""

import json
import math
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_logits import VQLogitsLM
from lit_logits.datamodules.tokenization import train_bpe
from lit_logits.modules import HierarchicalVQLogitsHead, ResidualVQLogitsHead, VQLogitsHead

V = 320
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog's owner can't believe it.",
    "Every token of the text is read once;   spaces and numbers such as 1234 are tokens too.",
]
HEADS = {
    "one level": partial(VQLogitsHead, codebook_size=16, bias=False),
    "residual": partial(ResidualVQLogitsHead, codebook_size=16, num_groups=4, num_stages={40: 3, V: 1}, bias=False),
    "two levels": partial(HierarchicalVQLogitsHead, codebook_sizes=(8, 16)),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=HEADS)
def saved(request, tmp_path_factory):
    """A compressed model, and its folders by form."""
    place = tmp_path_factory.mktemp("models")
    (place / "original").mkdir()
    train_bpe(TEXTS * 4, V, place / "original")
    tokenizer = AutoTokenizer.from_pretrained(place / "original")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "max_position_embeddings": 256}
    config = LlamaConfig(**sizes, **special, **rotary, num_attention_heads=4, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(place / "original")
    model = VQLogitsLM(str(place / "original"), head=HEADS[request.param])
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    model.initialize_head([{**batch, "labels": batch.input_ids}])
    forms = ["compact"] if request.param == "two levels" else ["compact", "dense"]
    for form in forms:
        model.save_pretrained(place / form, form, tokenizer=tokenizer)
    return model.eval(), {form: place / form for form in forms}


def run(*command, cwd):
    """Run a program of another process, without a network and without `import lit_logits`."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    variables = {**os.environ, **offline}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------------- lm-evaluation-harness

TASKS = {
    "my_text": """
task: my_text
dataset_path: json
dataset_kwargs: {data_files: {test: text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "my_choice": """
task: my_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
""",
    "my_end": """
task: my_end
dataset_path: json
dataset_kwargs: {data_files: {test: text.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: " and so on"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
CHOICES = ["of course", "never", "1234 tokens"]


def write_tasks(folder, place="."):
    """Write the tasks and their documents into a folder, which the tasks call `place`."""
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("test: ", f"test: {place}/"))
    rows: dict[str, Any] = {"text": [{"text": text} for text in TEXTS]}
    rows["choice"] = [{"text": text, "choices": CHOICES, "label": 1} for text in TEXTS]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def nll_of(model, ids, num_context=1):
    """Return the negative log-likelihood in nats of the tokens behind the context, by this library's own test loop."""
    labels = torch.tensor([[-100] * num_context + ids[num_context:]])
    batch = {"input_ids": torch.tensor([ids]), "labels": labels}
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.test(model, DataLoader([batch], batch_size=None), verbose=False)
    return found["test/loss"] * (len(ids) - num_context)


def answers(folder, task):
    """Return what the model answered to each document of a task."""
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [row["filtered_resps"] for row in rows]


def test_lm_evaluation_harness(saved, tmp_path):
    """Likelihoods of texts and of choices, and greedy texts, are those of this library."""
    pytest.importorskip("lm_eval")
    model, folders = saved
    write_tasks(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folders["compact"])
    total = sum(nll_of(model, [tokenizer.bos_token_id, *tokenizer(text).input_ids]) for text in TEXTS)
    num_words, num_bytes = sum(len(t.split()) for t in TEXTS), sum(len(t.encode()) for t in TEXTS)
    choices = [
        [-nll_of(model, tokenizer(f"{text} {choice}").input_ids, len(tokenizer(text).input_ids)) for choice in CHOICES]
        for text in TEXTS
    ]
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    ends = [model.generate(ids, max_new_tokens=8, eos_token_id=0)[0, ids.shape[1] :] for ids in prompts]
    for form, folder in folders.items():
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--include_path", ".", "--tasks", ",".join(TASKS)]
        command += [
            "--model_args",
            f"pretrained={folder},trust_remote_code=True",
            "--device",
            "cpu",
            "--batch_size",
            "2",
        ]
        run(*command, "--log_samples", "--output_path", form, cwd=tmp_path)
        (written,) = (tmp_path / form).rglob("results_*.json")
        results = json.loads(written.read_text())["results"]["my_text"]
        assert results["word_perplexity,none"] == pytest.approx(math.exp(total / num_words), rel=1e-4)
        assert results["byte_perplexity,none"] == pytest.approx(math.exp(total / num_bytes), rel=1e-4)
        found = [[float(likelihood) for likelihood, _ in row] for row in answers(tmp_path / form, "my_choice")]
        assert found == [pytest.approx(row, abs=1e-3) for row in choices]
        assert answers(tmp_path / form, "my_end") == [[tokenizer.decode(x, skip_special_tokens=True)] for x in ends]


def test_lm_evaluation_harness_from_python(saved, tmp_path, no_network):
    """A model in memory, as it is after training."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, folders = saved
    write_tasks(tmp_path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folders["compact"])
    evaluated = lm_eval.simple_evaluate(
        HFLM(model.to_pretrained(), tokenizer=tokenizer, device="cpu"),
        tasks=["my_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    total = sum(nll_of(model, [tokenizer.bos_token_id, *tokenizer(text).input_ids]) for text in TEXTS)
    num_words = sum(len(text.split()) for text in TEXTS)
    found = evaluated["results"]["my_text"]["word_perplexity,none"]
    assert found == pytest.approx(math.exp(total / num_words), rel=1e-4)


# ---------------------------------------------------------------------- version 4 of transformers

VERSION_4 = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
words = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save([model(**words(text, return_tensors="pt")).logits.detach() for text in sys.argv[2:]], "logits.pt")
"""


def test_version_4_of_transformers(saved, tmp_path):
    """TRANSFORMERS_4 names a Python that has it."""
    if "TRANSFORMERS_4" not in os.environ:
        pytest.skip("TRANSFORMERS_4 names no Python")
    _, folders = saved
    if "dense" not in folders:
        pytest.skip("two levels have no dense form")
    run(os.environ["TRANSFORMERS_4"], "-c", VERSION_4, str(folders["dense"]), *TEXTS, cwd=tmp_path)
    model, words = (kind.from_pretrained(folders["dense"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for text, logits in zip(TEXTS, torch.load(tmp_path / "logits.pt"), strict=True):
        torch.testing.assert_close(model(**words(text, return_tensors="pt")).logits.detach(), logits)


# ---------------------------------------------------------------------- llama.cpp

# The converter knows tokenizers by the tokens of a text, and none that was trained just now. Ours cuts texts into words
# as GPT-2's does.
CONVERT = """
import sys
sys.path.insert(0, {llama_cpp!r})
import conversion.base, convert_hf_to_gguf
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""


def test_llama_cpp(saved, tmp_path):
    """It reads a text as the same tokens and gives each token the same likelihood as transformers does, step by step.

    LLAMA_CPP names a checkout of llama.cpp, which has the converter.
    """
    runtime = pytest.importorskip("xllamacpp")
    _, folders = saved
    if "dense" not in folders:
        pytest.skip("two levels have no dense form")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    path = tmp_path / "model.gguf"
    program = CONVERT.format(llama_cpp=os.environ["LLAMA_CPP"])
    run(sys.executable, "-c", program, str(folders["dense"]), "--outtype", "f32", "--outfile", str(path), cwd=tmp_path)
    parameters = runtime.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.cpuparams.n_threads = str(path), 256, 1
    server = runtime.Server(parameters)
    tokenizer = AutoTokenizer.from_pretrained(folders["dense"])
    model = AutoModelForCausalLM.from_pretrained(folders["compact"])
    for text in TEXTS:
        prompt, ids = text, tokenizer(text).input_ids
        for _ in range(4):
            request = {"prompt": prompt, "max_tokens": 1, "logprobs": V, "grammar": "root ::= [a-z ]+"}
            answer = server.handle_completions(request)  # of bytes that are no letter it tells nothing
            assert answer["usage"]["prompt_tokens"] == len(ids)
            told = {row["id"]: row["logprob"] for row in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            found = torch.tensor([told[at] for at in range(len(expected))])
            torch.testing.assert_close(found, expected, atol=0.03, rtol=0)  # it computes attention in float16
            prompt = ids = [*ids, int(expected.argmax())]
