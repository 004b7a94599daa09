"""The Triton kernel of residual product codes: where it is chosen, that it computes, and that it compiles for GPUs."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_logits.functional.lookup import device
from lit_logits.modules import ResidualVQLogitsHead

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _fresh():
    device._works.cache_clear()
    yield
    device._works.cache_clear()


def run(*command, **environment):
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def decoding_head():
    torch.manual_seed(0)
    return ResidualVQLogitsHead(8, 50, 4, num_groups=2, token_stages=2).requires_grad_(False).eval()


def test_cpu_keeps_its_own_way(monkeypatch):
    monkeypatch.setattr(device, "_works", lambda _: pytest.fail("the kernel was tried"))
    head, hidden = decoding_head(), torch.randn(3, 8)
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
    assert torch.equal(head.greedy(hidden), (hidden @ head.weight.T).argmax(-1))


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_where_the_kernel_cannot_run_torch_does_and_the_log_says_so_once(fault, monkeypatch, caplog):
    monkeypatch.setattr(device, "_TAKES_CPU", True)
    found = None if fault == "missing" else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(device, "streamed_greedy", fail)
    head, hidden = decoding_head(), torch.randn(3, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
            assert torch.equal(head.greedy(hidden), (hidden @ head.weight.T).argmax(-1))
    [line] = caplog.messages
    assert ("pip install triton" if fault == "missing" else "RuntimeError: no compiler") in line


@needs_triton
@pytest.mark.slow
def test_cases_in_the_interpreter():
    cases = TESTS / "triton_cases.py"
    run("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(cases), TRITON_INTERPRET="1")


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lit_logits.functional.lookup import triton_kernel
from lit_logits.functional.lookup.device import StreamedHead

RESULTS = {
    "_logits_kernel": [{"logits": "*bf16"}, {"logits": "*fp16"}, {"logits": "*fp32"}],
    "_greedy_kernel": [{"highest": "*fp32", "winners": "*i32"}],
}
INPUTS = {"tables": "*fp32", "stream": "*u8", "places": "*i32", "bias": "*bf16", "cap": "fp32", "vocab_size": "i32",
          "num_rows": "i32", "stream_size": "i64"}
for codes, groups, rows, cap in [(256, 512, 1, None), (4096, 80, 8, 30.0), (256, 72, 64, 30.0), (9, 3, 3, None)]:
    places, bias = torch.zeros(2, 1000), torch.zeros(1000)
    head = StreamedHead(torch.zeros(2, groups, codes, 1), torch.zeros(1), places, bias, cap)
    constants = triton_kernel._constants(rows, head)
    for name, results in RESULTS.items():
        for result in results:
            kernel = getattr(triton_kernel, name)
            signature = {arg: {**INPUTS, **result}.get(arg, "constexpr") for arg in kernel.arg_names}
            source = ASTSource(kernel, signature, constants)
            built = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
            assert len(built.asm["cubin"]) > 0
            assert built.metadata.shared < 48 * 1024
            print("built", name)
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_compiles_without_a_gpu(capability, tmp_path):
    # Triton reads the source of kernels from files, and keeps what it builds in the user's cache.
    output = run("-c", COMPILE, capability, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert output.count("built") == 16
