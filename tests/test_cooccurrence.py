"""Start from co-occurrence: counts against loops, PPMI and SVD against numpy on small vocabularies, and `fit`."""

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from scripts import run_script
from torch.utils.data import DataLoader

from lit_logits import VQLogitsLM
from lit_logits.functional import (
    PairCounts,
    context_vectors,
    cooccurrence_assignment,
    count_pairs,
    frequency_assignment,
    merge_pairs,
    positive_pmi,
)
from lit_logits.modules import VQLogitsHead
from lit_logits.modules.vq_logits.calibration import count_text

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2}


def as_dict(pairs, vocab_size):
    keys = [(key // vocab_size, key % vocab_size) for key in pairs.keys.tolist()]
    assert keys == sorted(set(keys))
    return dict(zip(keys, pairs.counts.tolist(), strict=True))


def text(num_rows=64, length=12, seed=0):
    """Two kinds of words, each in two spellings that follow the same words: 0/1 after 2/3, and 2/3 after 0/1."""
    generator = torch.Generator().manual_seed(seed)
    kind = (torch.arange(length) + torch.arange(num_rows).unsqueeze(1)) % 2
    return 2 * kind + torch.randint(2, (num_rows, length), generator=generator)


# ---------------------------------------------------------------------- counts


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_pairs_are_those_of_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, (3, 7), generator=generator)
    labels = ids.masked_fill(torch.rand(3, 7, generator=generator) < 0.3, -100)
    expected: Counter = Counter()
    for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
        for t, target in enumerate(targets):
            for distance, weight in ((1, 1.0), (2, 0.5)):
                if target != -100 and t >= distance:
                    expected[target, row[t - distance]] += weight
    assert as_dict(count_pairs(ids, labels, 6), 6) == expected
    halves = [count_pairs(ids[:1], labels[:1], 6), count_pairs(ids[1:], labels[1:], 6)]
    assert as_dict(merge_pairs(halves), 6) == expected


def test_text_is_read_once_and_no_further_than_asked():
    rows = text()
    batches = [{"input_ids": rows[i : i + 8], "labels": rows[i : i + 8]} for i in range(0, 64, 8)]
    whole = count_text(batches, num_tokens=10**9, vocab_size=4, device=torch.device("cpu"))
    assert as_dict(whole.pairs, 4) == as_dict(count_pairs(rows, rows, 4), 4)
    assert torch.equal(whole.token_counts, torch.bincount(rows[:, 1:].flatten(), minlength=4).float())
    part = count_text(iter(batches), num_tokens=100, vocab_size=4, device=torch.device("cpu"))
    assert as_dict(part.pairs, 4) == as_dict(count_pairs(rows[:16], rows[:16], 4), 4)
    with pytest.raises(ValueError, match="batches with targets, but none of their labels counts"):
        count_text([], num_tokens=9, vocab_size=4, device=torch.device("cpu"))


TWO_RANKS = """
import os, sys
import torch
import torch.distributed as dist
from lit_logits.modules.vq_logits.calibration import count_text


def count(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = torch.load(f"{folder}/rows.pt")
    rows = rows[:40] if rank == 0 else rows[40:]  # unequal parts, and so other numbers of different pairs
    batches = [{"input_ids": part, "labels": part} for part in rows.split(8)]
    found = count_text(batches, num_tokens=10**9, vocab_size=50, device=torch.device("cpu"))
    torch.save((found.token_counts, *found.pairs), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that ends


if __name__ == "__main__":
    torch.multiprocessing.start_processes(count, (sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_two_processes_count_what_one_does(tmp_path):
    rows = torch.randint(50, (56, 12), generator=torch.Generator().manual_seed(0))
    torch.save(rows, tmp_path / "rows.pt")
    run_script(tmp_path / "run.py", TWO_RANKS, str(tmp_path))
    expected = count_text(
        [{"input_ids": rows, "labels": rows}], num_tokens=1, vocab_size=50, device=torch.device("cpu")
    )
    for rank in range(2):
        counts, keys, pairs = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(counts, expected.token_counts)
        assert torch.equal(keys, expected.pairs.keys)
        assert torch.equal(pairs, expected.pairs.counts)


# ---------------------------------------------------------------------- vectors


def dense_ppmi(pairs, vocab_size, power):
    counts = np.zeros((vocab_size, vocab_size))
    for (token, context), count in as_dict(pairs, vocab_size).items():
        counts[token, context] = count
    smoothed = counts.sum(0) ** power / (counts.sum(0) ** power).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(counts / counts.sum(1, keepdims=True) / smoothed)
    return np.where(counts > 0, np.maximum(information, 0), 0)


@pytest.mark.parametrize("power", [0.75, 1.0])
def test_information_and_vectors_are_those_of_numpy(power):
    ids = torch.randint(30, (40, 25), generator=torch.Generator().manual_seed(1)) // 2 * 2  # odd tokens never occur
    pairs = count_pairs(ids, ids, 30)
    expected = dense_ppmi(pairs, 30, power)
    matrix = positive_pmi(pairs, 30, power=power)
    np.testing.assert_allclose(matrix.toarray(), expected, rtol=1e-5, atol=1e-6)
    assert matrix.nnz == (expected > 0).sum()
    vectors = context_vectors(pairs, 30, 8, power=power).double().numpy()
    left, values, _ = np.linalg.svd(expected)
    reference = left[:, :8] * np.sqrt(values[:8])
    np.testing.assert_allclose(vectors @ vectors.T, reference @ reference.T, atol=2e-3)
    np.testing.assert_allclose(vectors[1::2], 0, atol=1e-5)


def test_vectors_are_the_same_every_time_and_no_longer_than_the_vocabulary():
    ids = text()
    pairs = count_pairs(ids, ids, 4)
    assert torch.equal(context_vectors(pairs, 4), context_vectors(pairs, 4))
    assert context_vectors(pairs, 4).shape == (4, 4)


def test_nothing_counted_is_at_the_origin():
    none = PairCounts(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert not context_vectors(none, 9, 3).any()
    assert cooccurrence_assignment(none, torch.zeros(9), 3).shape == (9,)


def test_tokens_of_like_contexts_share_a_code():
    ids = text()
    counts = torch.bincount(ids.flatten(), minlength=4).float()
    codes = cooccurrence_assignment(count_pairs(ids, ids, 4), counts, 2, generator=torch.Generator().manual_seed(0))
    assert codes[0] == codes[1] != codes[2] == codes[3]


# ---------------------------------------------------------------------- in training


def fit(tmp_path, head, rows, **kwargs):
    torch.manual_seed(0)
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=8)
    model = VQLogitsLM(LLAMA, 4, head=head)
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=1, default_root_dir=tmp_path, **settings, **kwargs).fit(model, loader)
    return model


def test_a_new_model_starts_so_by_itself(tmp_path):
    model = fit(tmp_path, partial(VQLogitsHead, codebook_size=2), text())
    assert model.head.init == "cooccurrence"
    codes = model.head.token_to_code.tolist()
    assert codes[0] == codes[1] != codes[2] == codes[3]
    assert float(model.head.token_counts.sum()) > 0


def test_it_reads_no_more_than_it_may():
    rows = text()
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=8)
    for limit, read in ((1, 8), (100, 16), (10**9, 64)):  # whole batches of 96 tokens
        model = VQLogitsLM(LLAMA, 4, head=partial(VQLogitsHead, codebook_size=2, start_tokens=limit))
        model.initialize_head(loader)
        assert torch.equal(model.head.token_counts, torch.bincount(rows[:read, 1:].flatten(), minlength=4).float())


def test_an_argument_out_of_range():
    with pytest.raises(ValueError, match="`start_tokens` to be at least 1, but got 0"):
        VQLogitsHead(4, 8, 2, start_tokens=0)
    with pytest.raises(ValueError, match="`init` to be one of 'random', 'frequency', 'cooccurrence'"):
        VQLogitsLM(LLAMA, 8, head=partial(VQLogitsHead, codebook_size=2, init="brown"))


def test_codes_of_contexts_let_a_model_learn_what_runs_of_frequency_cannot():
    """A bound that needs no training: code bigrams tell the next kind of word, frequency runs do not."""
    ids = text(256, 16)
    ids = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(5)) < 0.3, ids // 2 * 2, ids)
    counts = torch.bincount(ids.flatten(), minlength=4).float()

    def entropy(codes):
        table = torch.zeros(4, 2).index_put_((ids[:, :-1].flatten(), codes[ids[:, 1:]].flatten()), torch.ones(()), True)
        probs = table / table.sum(1, keepdim=True)
        return float(-(table / table.sum() * probs.clamp(min=1e-30).log()).sum())

    codes = cooccurrence_assignment(count_pairs(ids, ids, 4), counts, 2, generator=torch.Generator().manual_seed(0))
    assert entropy(codes) < 1e-6
    assert entropy(frequency_assignment(counts, 2)) > 0.5 * math.log(2)
