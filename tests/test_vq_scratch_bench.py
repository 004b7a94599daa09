"""The benchmark that trains heads from scratch: every head, its file of results, and the rivals' heads."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from benchmarks import vq_loss, vq_scratch, vq_start
from benchmarks.vq_rivals import AdaptiveSoftmaxHead, LowRankHead, equal_rank
from benchmarks.vq_training import find_texts, split_rows
from lit_logits.contracts import Calibration, OutputHead, OutputLayer, StartingHead

V, D = 60, 16


@pytest.fixture
def text(tmp_path):
    """Two files of text in a folder, and the arguments that read them with a BPE of 300 tokens."""
    words = random.Random(0).choices([f"{a}{b}" for a in "abcdefgh" for b in ("one", "two", "six", "ten")], k=6000)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(" ".join(words[:4000]).replace("aone", "aone\n"))
    (tmp_path / "text" / "b.md").write_text(" ".join(words[4000:]).replace("aone", "aone\n"))
    files = ["--text", str(tmp_path / "text"), "--cache-dir", str(tmp_path / "cache")]
    sizes = ["--vocab-size", "300", "--hidden-size", "16", "--block-size", "16", "--batch-size", "4"]
    return [*files, *sizes, "--share", "0.1"]


@pytest.fixture
def command(text, tmp_path):
    """Two steps of a tiny model."""
    steps = ["--steps", "2", "--evaluate-every", "1", "--val-batches", "2"]
    return [*text, *steps, "--layers", "1", "--out", str(tmp_path / "runs.json")]


def rows_of(printed):
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return {(cells[0].split(" (")[0], cells[1]): cells for cells in lines[2:]}


@pytest.mark.slow
def test_every_head_is_trained_and_what_is_done_is_not_done_again(command, tmp_path, capsys, monkeypatch):
    plot = tmp_path / "runs.png"
    settings = ["--seeds", "0", "1", "--dense-lrs", "1e-3", "5e-3"]
    vq_scratch.main([*command, *settings, "--plot", str(plot)])
    rows = rows_of(capsys.readouterr().out)
    assert [name for name, _ in rows] == ["dense", *(name for name, _ in vq_scratch.HEADS.values())]  # two rates of it
    best = [cells for cells in rows.values() if cells[1].endswith(", best")]
    assert len(best) == 1
    assert best[0][6] == "1.000 ± 0.000"
    assert rows["one level", "0.002"][2] == rows["two levels", "0.002"][2] == "10.00%"  # 30 of 300 rows
    assert plot.read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert len(runs) == 18
    assert [run["settings"]["reassign"] for run in runs[6:8]] == [[1], [1]]  # of two steps
    for run in runs:
        assert [tokens for tokens, _ in run["curve"]] == [64, 128]
        assert 1 < run["test_ppl"] < 1000
        assert run["step_seconds"] > 0

    trained = []
    train = vq_scratch.train
    monkeypatch.setattr(vq_scratch, "train", lambda case, *rest: trained.append(case) or train(case, *rest))
    vq_scratch.main([*command, *settings])
    assert trained == []
    assert rows_of(capsys.readouterr().out) == rows  # those of the file
    vq_scratch.main([*command, "--seeds", "1", "2", "--heads", "two"])
    assert [tuple(case) for case in trained] == [("two", 0.002, 2)]
    assert rows_of(capsys.readouterr().out)["two levels", "0.002"][6] == ""  # no dense head to compare with
    vq_scratch.main([*command, "--seeds", "2", "--heads", "two", "--options", '{"two": {"max_cluster_size": 40}}'])
    assert len(trained) == 2
    assert len(json.loads((tmp_path / "runs.json").read_text())["runs"]) == 20


def test_a_case_is_the_same_run_whatever_runs_before_it(command, tmp_path):
    """Heads share data module and process; neither may carry over what decides the order of the text or a start."""

    def perplexities():
        runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
        return {run["settings"]["head"]: run["test_ppl"] for run in runs}

    vq_scratch.main([*command, "--seeds", "1", "--heads", "one", "low_rank"])
    first = perplexities()
    (tmp_path / "runs.json").unlink()
    vq_scratch.main([*command, "--seeds", "1", "--heads", "low_rank", "one"])
    assert perplexities() == pytest.approx(first)


def test_a_start_is_measured_with_the_real_head(text, capsys, monkeypatch):
    monkeypatch.setattr(vq_start, "in_fresh_process", lambda function, *args: function(*args))
    vq_start.main([*text, "--tokens", "640"])
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][-1].strip("| ").split(" | ")
    assert row[:2] == ["300", "640"]
    assert 0 < int(row[2]) <= 300
    assert 300 < int(row[3].replace(",", "")) <= 2 * 640
    assert row[4] == "12 + 6 × 3"
    assert row[8].endswith(" / 25")


def test_sizes():
    assert split_rows(41) == [11, 5, 5, 5, 5, 5, 5]
    assert split_rows(512) == [128, *[64] * 6]
    assert equal_rank(41, 128, 4096) == 1
    assert equal_rank(2048, 576, 49_152) == 24
    assert abs(24 * (576 + 49_152) / (2048 * 576) - 1) < 0.02


def test_a_folder_is_its_texts(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.txt", "in/a.md", "c.png"):
        (tmp_path / name).write_text("x")
    other = str(tmp_path / "*.txt")
    assert find_texts([str(tmp_path), other]) == [str(tmp_path / "b.txt"), str(tmp_path / "in" / "a.md"), other]


@pytest.mark.parametrize("make", [lambda: LowRankHead(D, V, 3), lambda: AdaptiveSoftmaxHead(D, V, [10, 30])])
def test_rivals_start_as_a_unigram_model_and_their_loss_is_that_of_their_logits(make):
    torch.manual_seed(0)
    head = make()
    assert isinstance(head, OutputHead)
    assert isinstance(head, StartingHead)
    assert not head.prepare(OutputLayer(None, None), torch.nn.Embedding(V, D))
    counts = torch.randint(50, (V,)).float()
    head.start(lambda **_: Calibration(counts, None), OutputLayer(None, None))
    unigram = (counts + 0.5) / (counts + 0.5).sum()
    at_zero = head(torch.zeros(1, D)).softmax(-1)[0]
    if isinstance(head, AdaptiveSoftmaxHead):  # in its groups all tokens are alike
        order = counts.argsort(descending=True, stable=True)
        shares = [unigram[part].mean().expand(len(part)) for part in order[10:].split([20, 30])]
        torch.testing.assert_close(at_zero[order], torch.cat([unigram[order[:10]], *shares]))
    else:
        torch.testing.assert_close(at_zero, unigram)
    hidden, labels = torch.randn(4, 7, D, requires_grad=True), torch.randint(V, (4, 7))
    labels[::2, ::3] = -100
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none").view(4, 7)
    torch.testing.assert_close(head.loss(hidden, labels, reduction="none"), expected)
    torch.testing.assert_close(head.loss(hidden, labels), expected.sum() / (labels != -100).sum())
    (gradient,) = torch.autograd.grad(head.loss(hidden, labels, reduction="sum"), hidden)
    (wanted,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(gradient, wanted)
    nothing = head.loss(hidden, torch.full_like(labels, -100))
    assert float(nothing.detach()) == 0
    nothing.backward()


def test_losses_of_the_same_layer_agree(monkeypatch):
    monkeypatch.setattr(vq_loss, "VOCAB_SIZE", V)
    monkeypatch.setattr(vq_loss, "HIDDEN_SIZE", D)
    cases = [case for case, _ in vq_loss._training_cases([8])]
    assert cases[0] == "dense"
    if vq_loss.CHUNKED not in cases:
        pytest.skip("needs torch >= 2.13")
    hidden, labels = torch.randn(32, D), torch.randint(V, (32,))
    losses = []
    for case in ("dense", vq_loss.CHUNKED):
        torch.manual_seed(0)
        module, loss = vq_loss._make_loss(case, 0)
        value = loss(hidden.clone().requires_grad_(), labels)
        value.backward()
        losses.append((value.detach(), module.weight.grad))
    torch.testing.assert_close(*losses)
