"""What every test here runs under."""

import os

import pytest
import torch


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
