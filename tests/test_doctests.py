"""The examples in docstrings run, under the names that the package has when it is installed."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import lit_logits
from lit_logits import callbacks, datamodules

MODULES = sorted(  # an editable install maps the last two into the package, where walking the first does not meet them
    {
        module.name
        for package in (lit_logits, callbacks, datamodules)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    }
)


def test_folders_at_the_top_of_the_tree_are_among_them():
    assert {"lit_logits.callbacks.codebook_reinit", "lit_logits.datamodules.text.datamodule"} <= set(MODULES)


OPTIONAL = {"lit_logits.functional.lookup.triton_kernel": "triton"}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    assert doctest.testmod(import_module(name)).failed == 0
