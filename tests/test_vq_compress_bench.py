"""The benchmarks of compression: the table of `vq_compress` and the rivals in it, and whole models that generate.

Letters: V vocabulary, d hidden size.
"""

import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import vq_compress, vq_generate
from benchmarks.quantised_rows import gptq, low_rank, rivals, round_to_nearest
from lit_logits.contracts import Calibration
from lit_logits.modules import VQLogitsForCausalLM
from lit_logits.modules.vq_logits.embedding import CodedEmbedding

V, D = 40, 128


@pytest.fixture
def moment():
    """E[h hᵀ] of hidden states whose coordinates vary together, some far more than others."""
    torch.manual_seed(0)
    hidden = torch.randn(1000, D) @ torch.randn(D, D) * torch.linspace(0.1, 3, D)
    return hidden.T @ hidden / len(hidden)


def error(rows, weight, moment):
    left = (rows - weight).double()
    return float(((left @ moment.double()) * left).sum())


def gptq_by_hand(weight, moment, bits, group):
    """Row by row and number by number; what is left is solved for anew, without a factor of the inverse."""
    metric = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(len(moment))
    rows = torch.empty_like(weight, dtype=torch.float64)
    for row, left in zip(rows, weight.double().clone(), strict=True):
        for j in range(len(left)):
            if j % group == 0:
                low = left[j : j + group].min()
                step = (left[j : j + group].max() - low) / (2**bits - 1)
            row[j] = low + step * ((left[j] - low) / step).round().clamp(0, 2**bits - 1)
            # The numbers behind j that make the error smallest, given that of j.
            behind = torch.linalg.solve(metric[j + 1 :, j + 1 :], metric[j + 1 :, j]) * (left[j] - row[j])
            left[j + 1 :] += behind
    return rows.float()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_the_published_algorithm(moment, bits):
    weight = torch.randn(V, D)
    ours, expected = gptq(weight, moment, bits, group=32), gptq_by_hand(weight, moment, bits, 32)
    assert (ours - expected).abs().gt(1e-3).float().mean() < 0.01  # a number in the middle may be rounded either way
    assert error(ours, weight, moment) == pytest.approx(error(expected, weight, moment), rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_errs_less_than_rounding(moment, bits, seed):
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(seed))
    ours, nearest = gptq(weight, moment, bits), round_to_nearest(weight, bits)
    assert error(ours, weight, moment) < 0.9 * error(nearest, weight, moment)
    for part in ours.unflatten(1, (-1, 64)).flatten(0, 1):
        assert len(part.unique()) <= 2**bits


def test_gptq_is_rounding_where_coordinates_do_not_vary_together():
    weight = torch.randn(V, D)
    torch.testing.assert_close(gptq(weight, torch.eye(D), 3), round_to_nearest(weight, 3))


def test_rounding_is_off_by_half_a_step_at_most():
    weight = torch.randn(V, D)
    parts, rounded = (rows.unflatten(1, (-1, 64)) for rows in (weight, round_to_nearest(weight, 2)))
    step = (parts.amax(-1, keepdim=True) - parts.amin(-1, keepdim=True)) / 3
    assert ((parts - rounded).abs() <= step / 2 + 1e-6).all()
    assert (parts - rounded).abs().max() > 0.3 * step.min()


def test_low_rank_is_the_best_of_its_rank(moment):
    """In the metric, and of all counted alike: the singular values that are left out are the error."""
    weight, rank = torch.randn(V, D), 10
    rows = low_rank(weight, moment, torch.ones(V), rank)
    assert torch.linalg.matrix_rank(rows) == rank
    singular = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(moment.double()))
    assert error(rows, weight, moment) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-3)


def test_all_rivals_are_named_with_what_they_cost(moment):
    found = list(rivals(torch.randn(V, D), Calibration(torch.ones(V), moment)))
    assert [rival.label.split(",")[0] for rival in found] == ["round to nearest", "GPTQ"] * 3 + ["low rank"] * 2
    assert [rival.bytes for rival in found] == [4.5 / 16] * 2 + [3.5 / 16] * 2 + [2.5 / 16] * 2 + [0.135, 0.25]
    with pytest.raises(ValueError, match="second moment"):
        next(rivals(torch.randn(V, D), Calibration(torch.ones(V), None)))


# --- the table ---


@pytest.fixture
def command(tmp_path):
    """A small model of 300 words with a tokenizer, some text, and the arguments that name them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that it is not unsure about everything
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(tmp_path / "model")
    lines = [" ".join(f"w{i}" for i in random.Random(seed).choices(range(300), k=20)) for seed in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    sizes = ["--block", "16", "--calibration-blocks", "8", "--test-blocks", "4", "--layers", "1"]
    return ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), *sizes]


def tables_of(printed):
    """Titles and rows of each table."""
    tables = []
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[0] == "|"]
    for cells, after in zip(lines, [*lines[1:], [""]], strict=True):
        if after[0] == "---":
            tables.append((cells, []))
        elif cells[0] != "---":
            tables[-1][1].append(cells)
    return tables


def test_every_row_is_compared_with_the_original(command, tmp_path, capsys):
    vq_compress.main([*command, "--rows", "two", "--minutes", "0.02"])
    ((titles, lines),) = tables_of(capsys.readouterr().out)
    rows = {cells[0]: cells for cells in lines}
    assert titles[4:10] == ["as initialised", "KL", "top-1", "recovered", "KL", "top-1"]
    assert len(rows) == 9
    assert all(len(row) == len(titles) and all(row[4:7]) for row in rows.values())
    assert all(rows["two stages"][:11])
    # By hand: 2 bits, on the text behind the last line end of the first 88 %.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    text = (tmp_path / "text.txt").read_text()
    words = [int(word[1:]) for word in text[text.rfind("\n", 0, int(len(text) * 0.88)) :].split()]
    ids = torch.tensor(words[: len(words) // 16 * 16]).view(-1, 16)[:4]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[:, :-1]
        p = model.lm_head(hidden).double().log_softmax(-1)
        q = (hidden @ round_to_nearest(model.lm_head.weight, 2).T).double().log_softmax(-1)
    labels = ids[:, 1:, None]
    ratio = (p.gather(-1, labels) - q.gather(-1, labels)).mean().exp()
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    _, _, _, _, found_ratio, found_kl, found_agreement, *_ = rows["round to nearest, 2 bit, groups of 64"]
    assert float(found_ratio) == pytest.approx(float(ratio), rel=2e-3)
    assert float(found_kl) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-3)
    assert found_agreement == f"{float(agreement):.1%}"
    assert 0 < float(agreement) < 1


# --- whole models ---


def test_all_models_generate_as_many_tokens_in_all_ways(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vq_generate, "in_fresh_process", lambda function, *args: function(*args))  # seconds each
    _, path, *text = command[:4]
    sizes = ["--new-tokens", "3", "--prompt-tokens", "4", "--batch", "1", "3", "--threads", "1", "--repeats", "2"]
    arguments = ["--models", path, *text, "--folder", str(tmp_path / "saved"), *sizes, "--calibration-blocks", "2"]
    arguments += ["--compress", "head", "both"]
    threads = torch.get_num_threads()
    try:
        vq_generate.main(arguments)
    finally:
        torch.set_num_threads(threads)
    (_, speeds), (_, memories) = tables_of(capsys.readouterr().out)
    kinds = "compact", "compact, both"
    ways = [f"model, {head}, {dtype}" for dtype in ("float32", "bfloat16") for head in ("original", *kinds)]
    assert [row[0] for row in memories] == ways
    assert [row[:3] for row in speeds] == [[way, batch, "1"] for batch in ("1", "3") for way in ways]
    assert [row[5] for row in speeds if row[0] == ways[0]] == ["1.00×"] * 2
    assert [row[6] for row in speeds if row[0] in (ways[0], ways[3])] == ["1.00×"] * 4
    saved = tmp_path / "saved" / "model"
    compact = AutoModelForCausalLM.from_pretrained(saved / "compact-bfloat16")
    assert isinstance(compact, VQLogitsForCausalLM)
    assert compact.head.codebook.dtype == torch.bfloat16
    assert isinstance(compact.get_input_embeddings(), torch.nn.Embedding)
    both = AutoModelForCausalLM.from_pretrained(saved / "compact-both-float32")
    assert isinstance(both.get_input_embeddings(), CodedEmbedding)
    original = AutoModelForCausalLM.from_pretrained(saved / "original-float32")
    assert torch.equal(original.lm_head.weight, AutoModelForCausalLM.from_pretrained(path).lm_head.weight)
    shutil.rmtree(saved / "original-float32")  # as a run that was killed leaves it: the others are kept, this is made
    (saved / "original-float32.part").mkdir()
    written = (saved / "compact-bfloat16" / "config.json").stat().st_mtime_ns
    vq_generate.save_ways(path, saved, None, 2, ["both", "head"])  # what is there is not made again
    assert (saved / "compact-bfloat16" / "config.json").stat().st_mtime_ns == written
    again = AutoModelForCausalLM.from_pretrained(saved / "original-float32")
    assert torch.equal(again.lm_head.weight, original.lm_head.weight)
