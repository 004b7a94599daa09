"""The benchmark of whole models, on a tiny one."""

import lightning as L
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import vq_tables
from lit_logits.modules import load_causal_lm


class Steps(L.Callback):
    """Ends a recovery after thirty steps."""

    def __init__(self, duration):
        self.duration = duration

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 30


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    """A tied model and text for it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1200, tie_word_embeddings=True, **sizes))
    with torch.no_grad():  # logits that differ
        model.model.embed_tokens.weight.mul_(20)
    model.save_pretrained(tmp_path)
    text = torch.randint(1200, (24, 20))
    monkeypatch.setattr(vq_tables, "read_blocks", lambda *given: (text[:20], text[20:]))
    return ["--model", str(tmp_path), "--layers", "1", "--precision", "32"]


def run(capsys, *arguments):
    """The cells of each row."""
    vq_tables.main(arguments)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]


def test_bytes_and_costs_of_each_row_stand_in_a_table(arguments, monkeypatch, capsys):
    monkeypatch.setattr(vq_tables, "Timer", Steps)  # not as many steps as the machine takes in a time
    rows = ["head", "both", "both_head_metric"]
    head, both, head_metric = run(capsys, *arguments, "--rows", *rows, "--minutes", "0.02")
    assert both[0] == "both, two stages"
    weights = sum(p.numel() for p in load_causal_lm(arguments[1]).parameters()) * 2
    codes = 2 * 256 * 16 * 2 + 2 * 1200 * 2  # two stages: codebooks in bf16, and a byte for each group of 8 dimensions
    assert both[3] == head_metric[3] == f"{(weights - 1200 * 16 * 2 + codes) / weights:.1%}"
    assert head[3] == f"{(weights + codes) / weights:.1%}"
    assert float(head[6]) < float(both[6])  # one error more
    assert float(both[9]) < float(both[6])  # recovered


def test_statistics_are_read_once_and_steps_are_counted(arguments, monkeypatch, tmp_path, capsys):
    arguments += ["--rows", "both", "--steps", "20", "--statistics", str(tmp_path / "kept.pt"), "--others", "other.txt"]
    first = run(capsys, *arguments)
    monkeypatch.setattr(vq_tables, "read_statistics", None)
    second = run(capsys, *arguments)
    assert first[0][5:11] == second[0][5:11]
    assert first[0][11].startswith("20 in")
    assert float(first[0][9]) < float(first[0][6])
    assert len(first[0][12].split(", ")) == 3  # of the other text
    with pytest.raises(SystemExit, match=r"Expected statistics of .*'block': 64"):
        vq_tables.main([*arguments, "--block", "64"])
