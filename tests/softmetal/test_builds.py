"""The product's ops through the software device with its kernels in other builds of the emulator:
the tests of the ops themselves, each build in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from . import python_environment
from .build import ROOT

#: Attention of one and of many queries within twice the error of dense attention, and more of it.
SOME = (
    "test_attention_numbers.py::test_error_is_at_most_twice_sdpa_error[1-int4-g64-rot-float16]",
    "test_attention_numbers.py::test_error_is_at_most_twice_sdpa_error[1-int8-g32-float32]",
    "test_attention_numbers.py::test_error_is_at_most_twice_sdpa_error[64-int8-g32-float32]",
    "test_attention_numbers.py::test_error_is_at_most_twice_sdpa_error[64-tq3-bfloat16]",
    "test_attention.py::test_rows_that_see_nothing[3-float32]",
    "test_kv_cache_update.py",
)
#: Codecs byte for byte, decoded values exact, and attention of every layout.
MORE = (
    "test_attention_numbers.py::test_error_is_at_most_twice_sdpa_error",
    "test_attention.py::test_softcap",
    "test_affine.py",
    "test_fp8.py",
    "test_gguf.py",
    "test_turboquant.py",
)


def run(mode: str, tests: tuple[str, ...], *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "mps"]
    done = subprocess.run(
        [*command, *options, *(str(ROOT / "tests" / test) for test in tests)],
        env=python_environment(KVQ_SOFTMETAL_MODE=mode, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("mode", ["fastmath", pytest.param("race", marks=pytest.mark.slow)])
def test_some_ops(soft: None, mode: str) -> None:
    run(mode, SOME, "--slow")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fastmath", "asan"])
def test_codecs_and_attention(soft: None, mode: str) -> None:
    run(mode, MORE)
