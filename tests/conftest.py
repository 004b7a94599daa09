"""What every test here runs under, and what several files share."""

import logging
import os

import pytest
import torch

pytest.register_assert_rewrite("instruction_views", "logit_caches")  # helpers whose asserts tell what they compared


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: threads that wait for each other would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_environment():
    """What Lightning leaves in the environment, such as a global seed, would reach the processes of later tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _same_talk():
    """Benchmarks silence Lightning, and what later tests read from the log would not be there."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory):
    """One decoded copy of the digits for all tests that are not about the cache."""
    from lit_logits.datamodules import ImageDataModule

    folder = tmp_path_factory.mktemp("digits")
    ImageDataModule(cache_dir=str(folder)).prepare_data()
    return str(folder)
