"""The benchmark that fuses pretrained models: cut, healed, cached, chosen and repeated, with tiny ones."""

import json

import pytest
import torch

from benchmarks import gld_fusion_pretrained as bench
from lit_logits.datamodules.tokenization import train_bpe
from lit_logits.modules import load_causal_lm, new_causal_lm

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": 0, "tie_word_embeddings": True}


@pytest.fixture
def command(tmp_path):
    """Sums as pairs, two models of different tokenizers, and steps that take no time."""
    rows = [{"question": f"{a} plus {b}?", "answer": f"It is\n#### {a + b}"} for a in range(15) for b in range(15)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    torch.manual_seed(0)
    for name, size in {"twin": 300, "other": 280}.items():
        (tmp_path / name).mkdir()
        train_bpe(texts, size, tmp_path / name)
        new_causal_lm({**LLAMA, "vocab_size": size}).save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / path) for name, path in {"twin": "twin", "other": "other", "folder": "run"}.items()}
    paths |= {"data": str(tmp_path / "sums.jsonl"), "out": str(tmp_path / "runs.json")}
    numbers = {"drawn-rows": 16, "rows": 8, "max-length": 24, "batch-size": 4, "top-k": 5, "steps": 2, "answers": 2}
    numbers |= {"tune-steps": 2, "heal-steps": 2, "heal-batch": 2, "heal-block": 16}
    options = [part for name, value in {**paths, **numbers}.items() for part in (f"--{name}", str(value))]
    return [*options, "--layers", "0", "3", "--seeds", "0", "1"]


def test_the_pivot_is_cut_and_every_way_is_chosen_and_repeated(command, tmp_path, capsys, monkeypatch):
    ways = ["--ways", "KL, twin", "routed", "--lrs", "1e-3", "1e-2", "--kd-weights", "0.3", "0.6"]
    bench.main([*command, *ways])
    printed = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    rows = {cells[0]: cells for cells in lines[2:]}
    assert list(rows) == ["SFT", "SFT + KL, twin", "SFT + all three, both routed"]
    assert lines[0][3:7] == ["ratio to SFT", "agreement twin", "agreement other", "exact match"]
    assert rows["SFT"][3] == "1.000 ± 0.000"
    assert load_causal_lm(str(tmp_path / "run" / "pivot")).config.num_hidden_layers == 2
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert len(runs) == 2 + 2 * 2 + 3  # rates, shares, and the second seed
    assert {run["settings"]["lr"] for run in runs[2:]} == {runs[-1]["settings"]["lr"]}
    for way, cells in rows.items():
        own = [run for run in runs if f"SFT + {run['settings']['way']}".endswith(way)]
        tried = [run for run in own if run["settings"]["seed"] == 0]
        best = min(tried, key=lambda run: run["val_ppl"])["settings"]
        assert own[-1]["settings"]["kd_weight"] == best["kd_weight"] == float(cells[1])
    routed = runs[-1]["shares"]
    assert sum(routed.values()) == pytest.approx(1)
    assert all(run["tokens_a_second"] > 0 and 0 <= run["agree other"] <= 1 for run in runs)

    monkeypatch.setattr(bench, "train", None)  # what is done is not done again
    bench.main([*command, *ways])
    assert printed.endswith(capsys.readouterr().out)
    with pytest.raises(ValueError, match="Name another folder"):
        bench.main([*command, "--layers", "0"])


def test_perplexity_and_answers_are_those_of_the_texts(command):
    """The oracle reads each text alone, without a batch."""
    args = bench.parse([*command, "--ways", "none"])
    data = bench.prepare(args, [])
    shared = bench.Bench(args, data, {}, {})
    module = bench.make_module(shared, bench.Case("SFT", 1e-3, 0.0, 0))
    assert not module.pivot.get_input_embeddings().weight.requires_grad
    total = count = 0
    for batch in data.test_dataloader():
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            ids = ids[: 1 + max(place for place, label in enumerate(labels) if label != -100)]
            log_probs = module(torch.tensor([ids]))[0].log_softmax(-1)
            places = [place for place, label in enumerate(labels) if label != -100]
            total -= sum(float(log_probs[place - 1, ids[place]].detach()) for place in places)
            count += len(places)
    found = bench.evaluate(shared, module, data.test_dataloader())
    assert found == {"ppl": pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-4)}
    written = []
    module.pivot.generate = lambda prompts, **_: (
        written.append(prompts)
        or torch.cat([prompts, torch.tensor(data.tokenizer([" #### 3"] * len(prompts)).input_ids)], 1)
    )
    sums = [json.loads(line)["response"] for line in (args.folder / "pairs" / "test.jsonl").read_text().splitlines()]
    rights = sum(one.endswith("#### 3") for one in sums[:4])  # a batch has more than the two that are asked for
    assert bench.answer(shared, module) == rights / 4
    assert len(written) == 1
