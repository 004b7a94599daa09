"""Top-k logits on disk: written by the real Trainer and read back, also from broken files and in other processes."""

import copy
import json
import logging
import pickle

import pytest
import torch
from logit_caches import (
    IDS,
    VOCAB_SIZES,
    Data,
    Model,
    finished_cache,  # noqa: F401  # a fixture
    interrupts,  # noqa: F401  # a fixture
    predict,
    rows_of,
    sample,
    settings_of,
    source_logits,
    whole_runs,  # noqa: F401  # a fixture
)
from torch.utils.data import DataLoader

from lit_logits.functional.top_k_logits import SourceLogits, TopKLogits
from lit_logits.storage import joining as logit_cache_joining
from lit_logits.storage import writing as logit_cache_writing
from lit_logits.storage.logit_cache import LogitCache, is_logit_cache

# ---------------------------------------------------------------------- one run


def test_what_is_written_is_read(tmp_path, caplog):
    """Bit for bit, and only what counts; two sources at once, with ids of two and of four bytes."""
    with caplog.at_level(logging.INFO):
        predict(tmp_path, Model(["base", "other"]))
    for source in VOCAB_SIZES:
        reader = LogitCache(tmp_path / source)
        order = [12, 40, 1, 33, 12, 3]
        read, expected = reader.read(torch.tensor(order)), source_logits(source, order)
        counts = expected.mask.sum(1)
        assert read.mask.shape == (6, int(counts.max()))
        assert torch.equal(read.mask, torch.arange(int(counts.max())) < counts[:, None])
        for row, (ours, theirs) in enumerate(zip(rows_of(read), rows_of(expected), strict=True)):
            for one, other in zip(ours, theirs, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other), (source, order[row])
        assert (read.top_k.std[~read.mask] == 1).all()
        assert (read.ends[~read.mask] == -1).all()
        assert all((field[~read.mask] == 0).all() for field in read.top_k[:-1])
        shards = [logit_cache_joining.safe_open(path, "pt") for path in sorted((tmp_path / source).glob("shard-*"))]
        assert [sample for shard in shards for sample in shard.get_tensor("sample_ids").tolist()] == sorted(IDS)
        assert {shard.get_tensor("token_ids").dtype for shard in shards} == {
            torch.uint16 if source == "base" else torch.int32
        }
        num_tokens = sum(int(sample(source, sample_id)[1].sum()) for sample_id in IDS)
        assert len(shards) > 2
        assert (len(reader), reader.num_tokens, reader.top_k, reader.temperature) == (9, num_tokens, 4, 1.5)
        assert (reader.vocab_size, reader.tokenizer_id, reader.settings["data"]) == (VOCAB_SIZES[source], 7, "abc")
        assert reader.settings == {**settings_of(source), "data": "abc", "dtype": "float32"}
        assert 12 in reader
        assert torch.tensor(40) in reader
        assert not {0, 2, 41} & {sample_id for sample_id in range(50) if sample_id in reader}
        assert f"{tmp_path / source}, 9 samples, {num_tokens} tokens," in caplog.text


def test_samples_without_positions(tmp_path):
    """Are there, and read as rows that do not count; so does no sample at all."""
    predict(tmp_path)
    reader = LogitCache(tmp_path / "base")
    for ids in ([40, 5], [25], []):
        read = reader.read(torch.tensor(ids, dtype=torch.int64))
        assert read.mask.shape == read.ends.shape == (len(ids), 1)
        assert read.top_k.log_probs.shape == read.top_k.token_ids.shape == (len(ids), 1, 4)
        assert not read.mask.any()
    predict(tmp_path / "none", data=Data([40, 5, 25]))
    assert LogitCache(tmp_path / "none" / "base").read(torch.tensor([5])).mask.tolist() == [[False]]


def test_float16(tmp_path):
    """Halves the log-probabilities alone."""
    predict(tmp_path, Model(dtype="float16"))
    read = LogitCache(tmp_path / "base").read(torch.tensor(IDS))
    assert read.top_k.log_probs.dtype == torch.float32
    for ours, theirs in zip(rows_of(read), rows_of(source_logits("base", IDS)), strict=True):
        torch.testing.assert_close(ours[0], theirs[0], atol=2e-3, rtol=1e-3)
        assert all(torch.equal(one, other) for one, other in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float16", 2e-3)])
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_fewer_columns(tmp_path, top_k, dtype, atol):
    """Those of a top-k of fewer; no probability is lost."""
    predict(tmp_path, Model(dtype=dtype))
    read = LogitCache(tmp_path / "base").read(torch.tensor(IDS), top_k=top_k)
    torch.testing.assert_close(
        (read.top_k.log_probs.exp().sum(-1) + read.top_k.tail)[read.mask],
        torch.ones(int(read.mask.sum())),
        atol=atol,
        rtol=0,
    )
    for ours, theirs in zip(rows_of(read), rows_of(source_logits("base", IDS, top_k)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-3)
    assert (read.top_k.tail[~read.mask] == 0).all()
    assert read.top_k.log_probs.is_contiguous()


def test_bytes_a_token(tmp_path):
    """At k = 32 and 262,144 tokens, as `cache.json` says and as the files are."""
    generator = torch.Generator().manual_seed(0)
    settings = {"top_k": 32, "vocab_size": 262_144, "dtype": "float32"}
    floats = [torch.randn(8, 150, generator=generator) for _ in range(4)]
    log_probs = torch.randn(8, 150, 32, generator=generator)
    token_ids = torch.randint(262_144, (8, 150, 32), generator=generator)
    logits = SourceLogits(
        TopKLogits(log_probs, token_ids, *floats), torch.rand(8, 150) < 0.9, torch.ones(8, 150).long()
    )
    folder = tmp_path / "base"
    logit_cache_writing.begin_cache(folder, settings)
    part = logit_cache_writing.pack_logits("base", logits, torch.arange(8), range(8), settings)
    logit_cache_writing.write_part(folder, part)
    description = logit_cache_joining.join_cache(folder)
    size = sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert description["num_tokens"] == int(logits.mask.sum())
    assert description["bytes_per_token"] == round(size / description["num_tokens"], 2) <= 300
    assert json.loads((folder / "cache.json").read_text()) == description


def test_files_are_as_readable_as_others(cache):
    """A cache that several users share; safetensors would leave its files to one."""
    assert len({path.stat().st_mode for path in cache.iterdir()}) == 1


def test_a_cache_of_version_1_is_read_and_not_written_to(cache):
    """It has neither log-probabilities of labels nor tokens, and its ends count characters."""
    new = LogitCache(cache)
    text = (cache / "cache.json").read_text().replace('"version": 2', '"version": 1')
    (cache / "cache.json").write_text(text)
    old = LogitCache(cache)
    assert (new.counts_bytes, old.counts_bytes, old.has_label_log_probs, old.tokens) == (True, False, False, None)
    one, other = (reader.read(torch.tensor(IDS)) for reader in (new, old))
    assert other.label_log_probs is None
    assert not new.has_boundary_log_probs
    assert one.boundary_log_probs is other.boundary_log_probs is None
    for mine, theirs in zip((*one.top_k, one.mask, one.ends), (*other.top_k, other.mask, other.ends), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=r"to be a logit cache of version 2, but got version 1\. Pass another"):
        predict(cache.parent)


def with_labels(prediction):
    """Each position's label has a log-probability that tells where it is, and so has a boundary."""
    sources = prediction["sources"]
    return {
        **prediction,
        "sources": {
            name: logits._replace(
                label_log_probs=-logits.ends.float() - 0.125, boundary_log_probs=-logits.ends.float() - 0.25
            )
            for name, logits in sources.items()
        },
    }


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 0), ("float16", 0.5)])
def test_log_probabilities_of_the_tokens_that_came(tmp_path, dtype, atol):
    """Written beside the others, across kills, in two or four bytes."""
    with pytest.raises(RuntimeError, match="killed"):
        predict(tmp_path, Model(change=with_labels, stop_at=12, dtype=dtype))
    predict(tmp_path, Model(change=with_labels, dtype=dtype))
    reader = LogitCache(tmp_path / "base")
    assert reader.has_label_log_probs
    assert reader.has_boundary_log_probs
    read = reader.read(torch.tensor(IDS))
    for values, less in ((read.label_log_probs, 0.125), (read.boundary_log_probs, 0.25)):
        torch.testing.assert_close(values, torch.where(read.mask, -read.ends.float() - less, 0.0), atol=atol, rtol=0)
    [shard, *_] = [logit_cache_joining.safe_open(path, "pt") for path in sorted((tmp_path / "base").glob("shard-*"))]
    for name in ("label_log_probs", "boundary_log_probs"):
        assert shard.get_tensor(name).dtype == getattr(torch, dtype)


def test_tokens_are_written_once_and_read(tmp_path):
    tokens = [b"a", None, " \u3042".encode(), b"\xf0\x9f", b"\n"]

    class WithTokens(Model):
        @property
        def cache_tokens(self):
            return {"base": tokens, "other": None}

    predict(tmp_path, WithTokens(["base", "other"]))
    assert LogitCache(tmp_path / "base").tokens == tokens
    assert LogitCache(tmp_path / "other").tokens is None
    before = (tmp_path / "base" / "tokens.json").stat().st_mtime_ns
    predict(tmp_path, WithTokens(["base", "other"]))
    assert (tmp_path / "base" / "tokens.json").stat().st_mtime_ns == before
    (tmp_path / "base" / "tokens.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokens\.json to be whole"):
        _ = LogitCache(tmp_path / "base").tokens


# ---------------------------------------------------------------------- what is refused at reading


def test_what_is_a_cache(cache, tmp_path):
    assert is_logit_cache(cache)
    assert is_logit_cache(str(cache))
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path, tmp_path / "file", tmp_path / "absent", "org/model"):
        assert not is_logit_cache(path)
        with pytest.raises(ValueError, match=r"a folder of cached logits with a cache.json, but .* has none"):
            LogitCache(path)


def test_broken_shards(cache):
    """Are found at opening."""
    shard = cache / "shard-00001.safetensors"
    content, other = shard.read_bytes(), (cache / "shard-00002.safetensors").read_bytes()
    broken = [b"", content[:-1], content[:50], content + b"x", b"\xff" * len(content), other]
    for torn in broken:
        shard.write_bytes(torn)
        with pytest.raises(ValueError, match=r"shard-00001.* to be whole, but .* run the predict command again"):
            LogitCache(cache)
    with pytest.raises(ValueError, match="to be whole"):
        predict(cache.parent)
    shard.unlink()
    with pytest.raises(ValueError, match="but has no such file"):
        LogitCache(cache)


def test_shards_that_were_swapped(cache):
    description = json.loads((cache / "cache.json").read_text())
    first, second = (cache / f"shard-0000{index}.safetensors" for index in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    description["shards"][:2] = description["shards"][1::-1]
    (cache / "cache.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="to be whole, but its shards hold 9 samples"):
        LogitCache(cache)


def test_a_sample_that_is_not_there(cache):
    message = (
        f"Expected the cache {cache} to hold sample 2, but it was written for other data (data fingerprint 'abc'; 9"
        " samples). Run `predict` again for these data."
    )
    with pytest.raises(ValueError, match="other data") as error:
        LogitCache(cache).read(torch.tensor([3, 2, 999]))
    assert str(error.value) == message
    with pytest.raises(ValueError, match="to hold sample 999"):
        LogitCache(cache).read(torch.tensor([999]))


@pytest.mark.parametrize("top_k", [0, 5])
def test_columns_that_are_not_there(cache, top_k):
    with pytest.raises(ValueError, match=rf"`top_k` to be in \[1, 4\], as stored in .*, but got {top_k}"):
        LogitCache(cache).read(torch.tensor([3]), top_k=top_k)


# ---------------------------------------------------------------------- readers elsewhere


def test_copies_and_workers_read_the_same(cache):
    """Pickled, copied, and in workers that were forked after the shards were mapped."""
    reader = LogitCache(cache)
    ids = torch.tensor([33, 12, 1])
    expected = reader.read(ids)
    assert len(pickle.dumps(reader)) < 5000
    for other in (pickle.loads(pickle.dumps(reader)), copy.deepcopy(reader), copy.copy(reader)):
        torch.testing.assert_close(other.read(ids), expected, rtol=0, atol=0)
    workers = DataLoader(
        [ids] * 2, batch_size=None, num_workers=2, collate_fn=reader.read, multiprocessing_context="fork"
    )
    for read in workers:
        torch.testing.assert_close(SourceLogits(TopKLogits(*read[0]), *read[1:]), expected, rtol=0, atol=0)


def test_what_is_read_is_a_copy(cache):
    """Changing it in place changes no later read."""
    reader = LogitCache(cache)
    first = reader.read(torch.tensor([3]))
    expected = copy.deepcopy(first)
    for tensor in (*first.top_k, first.mask, first.ends):
        tensor.zero_()
    torch.testing.assert_close(reader.read(torch.tensor([3])), expected, rtol=0, atol=0)
