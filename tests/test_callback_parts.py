"""What several callbacks share: look-ups, work for all ranks on one, checks of arguments."""

import warnings
from types import SimpleNamespace

import pytest

from lit_logits.callbacks.parts import check_at_least, data_tokenizer, on_rank_zero, tell_finished


def test_the_tokenizer_is_that_of_the_data_module():
    assert data_tokenizer(SimpleNamespace(datamodule=SimpleNamespace(tokenizer="words"))) == "words"
    for without in (SimpleNamespace(datamodule=SimpleNamespace()), SimpleNamespace(datamodule=None), SimpleNamespace()):
        assert data_tokenizer(without) is None


def run_on_ranks(function, count=2):
    """What each of `count` ranks gets, an exception included; rank zero broadcasts to those after it."""
    sent, outcomes = [], []

    def broadcast(value):
        sent.append(value)
        return sent[0]

    for rank in range(count):
        strategy = SimpleNamespace(broadcast=broadcast)
        trainer = SimpleNamespace(is_global_zero=rank == 0, world_size=count, strategy=strategy)
        try:
            outcomes.append(on_rank_zero(trainer, function))
        except Exception as error:
            outcomes.append(error)
    return outcomes


def test_rank_zero_works_for_all():
    calls = []
    assert run_on_ranks(lambda: calls.append(1) or len(calls), count=3) == [1, 1, 1]
    assert calls == [1]


def test_all_ranks_raise_what_rank_zero_raises():
    """They wait at the next collective for ever if it alone stops, as at a full disk."""

    def full():
        raise OSError(28, "No space left on device")

    assert [str(error) for error in run_on_ranks(full)] == ["OSError: [Errno 28] No space left on device"] * 2
    assert [type(error) for error in run_on_ranks(full)] == [RuntimeError] * 2
    assert [type(error) for error in run_on_ranks(full, count=1)] == [OSError]
    assert [str(error) for error in run_on_ranks(lambda: int("x"))] == [
        "invalid literal for int() with base 10: 'x'"
    ] * 2


def test_a_set_of_finished_rows_is_replaced():
    finished = {7, 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_finished(finished, [1, 2], "unused")
        tell_finished(None, [], "unused")
    assert finished == {1, 2}
    with pytest.warns(UserWarning, match="predicted again"):
        tell_finished(None, [1], "predicted again")


def test_the_first_argument_below_the_minimum_is_named():
    check_at_least(0, num_texts=0)
    with pytest.raises(ValueError, match=r"^Expected `b` to be at least 2, but got 1\.$"):
        check_at_least(2, a=2, b=1, c=0)
