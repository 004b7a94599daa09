"""What is refused while a logit cache is written: other settings, files of others, and predictions that do not fit."""

import shutil
from pathlib import Path

import pytest
import torch
from logit_caches import (
    IDS,
    VOCAB_SIZES,
    Data,
    Model,
    bytes_of,
    check_same,
    finished_cache,  # noqa: F401  # a fixture
    interrupts,  # noqa: F401  # a fixture
    predict,
    settings_of,
    source_logits,
    whole_runs,  # noqa: F401  # a fixture
)

from lit_logits.callbacks.logit_cache_writer import LogitCacheWriter
from lit_logits.storage.logit_cache import LogitCache, is_logit_cache


@pytest.mark.parametrize("stop_at", [25, None], ids=["stopped", "complete"])
@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"top_k": 5}, {}, r"`top_k` was 4 there and is 5 now\. Pass another `folder`, or delete it"),
        ({"model": "a/b"}, {}, r"`model` was absent there and is 'a/b' now"),
        ({"dtype": "float16"}, {"fingerprint": "xyz"}, r"`data` was 'abc' there and is 'xyz' now, `dtype` was 'float"),
    ],
)
def test_other_settings_are_refused(tmp_path, model, data, message, stop_at):
    """And what is there stays, also that of the source that would fit."""
    try:
        predict(tmp_path, Model(stop_at=stop_at))
    except RuntimeError:
        assert stop_at
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        predict(tmp_path, Model(["other", "base"], **model), Data(**data))
    assert str(error.value).startswith(f"Expected {tmp_path / 'base'} to hold logits of these settings")
    assert bytes_of(tmp_path) == before


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "base").mkdir()
    for name, content in (("notes.txt", "mine"), ("cache.json", "{}"), ("cache.json", "no JSON")):
        (tmp_path / "base" / name).write_text(content)
        before = bytes_of(tmp_path)
        with pytest.raises(ValueError, match=r"to be new or .* but it has \S* and no cache.json of one"):
            predict(tmp_path)
        assert bytes_of(tmp_path) == before
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "base").write_text("mine")
    with pytest.raises(ValueError, match="but it is a file"):
        predict(tmp_path)


def test_another_version_is_refused(cache):
    text = (cache / "cache.json").read_text().replace('"version": 2', '"version": 3')
    (cache / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=r"to be a logit cache of version 2, but got version 3\. Pass another"):
        predict(cache.parent)
    with pytest.raises(ValueError, match=r"to be of a version in \[1, 2\] .* but got version 3"):
        LogitCache(cache)
    assert is_logit_cache(cache)


def test_more_samples_than_a_complete_cache_has(cache, whole):
    """Fingerprints should differ; where they do not, the cache is not to be half of one and half of the other."""
    with pytest.raises(
        ValueError, match="which is complete, to hold all samples of these data, but it has no sample 2"
    ):
        predict(cache.parent, data=Data([*IDS, 2]))
    check_same(cache.parent, whole[1])


def test_no_samples(tmp_path):
    with pytest.raises(ValueError, match=r"to bring samples for the logit cache .* but got none"):
        predict(tmp_path, data=Data([]))


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_logits_that_are_not_finite(tmp_path, value, name):
    """Stop the run before anything of the batch is written, also for the source that is fine."""

    def spoil(prediction):
        logits = prediction["sources"]["other"]
        if 8 in prediction["sample_ids"]:
            row = prediction["sample_ids"].tolist().index(8)
            logits.top_k.log_normalizer[row, logits.mask[row].nonzero()[-1]] = value
        return prediction

    with pytest.raises(ValueError, match=f"logits of source 'other' to be finite, but got {name} in sample 8"):
        predict(tmp_path, Model(["base", "other"], change=spoil))
    assert [len(list((tmp_path / source / "parts").iterdir())) for source in VOCAB_SIZES] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: None, r"a dict of `sample_ids` and `sources`, but got NoneType\."),
        (lambda p: p["sources"], r"but got dict\['base'\]"),
        (lambda p: {**p, "sources": {}}, r"of the sources \['base'\], but got \[\]"),
        (lambda p: {**p, "sample_ids": torch.arange(3)}, r"but got \(2, \d, 4\) and \(2, \d\) for 3 samples"),
        (
            lambda p: {**p, "sources": {"base": source_logits("base", p["sample_ids"].tolist(), 5)}},
            r"padded to \(B, T, 4\) .* but got \(2, \d, 5\)",
        ),
        (
            lambda p: {**p, "sources": {"base": source_logits("other", p["sample_ids"].tolist())}},
            r"tokens of source 'base' to be in \[0, 50\), but got \d+",
        ),
    ],
)
def test_other_returns_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        predict(tmp_path, Model(change=change))
    assert not list(tmp_path.glob("base/parts/*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "Expected Model to have `cache_settings`, the settings of each source by its name, but got none"),
        ({}, "Expected Model to have `cache_settings`, the settings of each source by its name, but got none"),
        ({"a": {"top_k": 1}}, r"of source 'a' to have \['temperature', 'tokenizer_id', 'vocab_size'\]"),
        ({"a/b": settings_of("base")}, "names of folders, but got 'a/b'"),
        ({"a": settings_of("base", dtype="bfloat16")}, r"to be one of \['float32', 'float16'\]"),
        ({"a": settings_of("base", model=Path("x"))}, "plain JSON values as cache settings of 'a'"),
        ({"a": settings_of("base", limit=float("nan"))}, "plain JSON values as cache settings of 'a'"),
    ],
)
def test_other_cache_settings_are_refused(tmp_path, settings, message):
    model = Model()
    model.cache_settings = settings
    with pytest.raises(ValueError, match=message):
        predict(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_settings_of_a_method(tmp_path, whole):
    model = Model()
    names = model.cache_settings
    model.cache_settings = lambda: names
    model.predict_step = lambda batch, batch_idx: {
        "sample_ids": batch,
        "sources": {"base": source_logits("base", batch.tolist())},
    }
    predict(tmp_path, model)
    check_same(tmp_path, whole[1])


def test_shard_tokens_are_positive():
    with pytest.raises(ValueError, match="`shard_tokens` to be positive, but got 0"):
        LogitCacheWriter("x", shard_tokens=0)
