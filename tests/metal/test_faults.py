"""The emulator must see every planted fault in the builds that can see it, and let clean kernels
pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import emulator, toolchain

SOURCE = toolchain.flatten(Path(__file__).parent / "samples" / "faults.metal")
ALL = ("fast", "race", "asan", "fastmath")
TRACED = ("race", "asan")
RACE = ("race",)
ASAN = ("asan",)

# kernel: (builds that must see it, what the message must hold)
FAULTS = {
    "write_past_end": (ALL, "OUT OF BOUNDS"),
    "write_far_past_end": (ALL, "OUT OF BOUNDS"),
    "read_past_end": (ALL, "OUT OF BOUNDS"),
    "read_before_start": (TRACED, "OUT OF BOUNDS"),
    "write_before_start": (ALL, "OUT OF BOUNDS"),
    "vector_past_end": (ALL, "OUT OF BOUNDS"),
    "past_threadgroup_array": (ALL, "OUT OF BOUNDS|index outside an array"),
    "past_threadgroup_argument": (ALL, "OUT OF BOUNDS"),
    "past_stack_array": (ASAN, "OUT OF BOUNDS|index outside an array"),
    "past_constant_array": (ASAN, "OUT OF BOUNDS|index outside an array"),
    "endless_stack": (ALL, "stack is full"),
    "missing_barrier": (RACE, "RACE between simdgroups"),
    "missing_barrier_in_loop": (RACE, "RACE between simdgroups"),
    "wrong_flags": (RACE, "RACE between simdgroups"),
    "wrong_flags_device": (RACE, "RACE between simdgroups"),
    "simd_sum_is_no_fence": (RACE, "RACE inside a simdgroup"),
    "simdgroup_barrier_is_too_small": (RACE, "RACE between simdgroups|UNINITIALISED"),
    "two_threadgroups": (RACE, "RACE between threadgroups"),
    "vector_race": (RACE, "RACE between simdgroups|UNINITIALISED"),
    "byte_race": (RACE, "RACE"),
    "struct_race": (RACE, "RACE between simdgroups|UNINITIALISED"),
    "atomic_against_plain": (RACE, "RACE"),
    "uninitialised": (RACE, "UNINITIALISED"),
    "write_to_const": (ALL, "read-only"),
    "misaligned": (ASAN, "misaligned"),
    "too_much_threadgroup_memory": (ALL, "TOO MUCH threadgroup memory"),
    "shift_too_far": (ASAN, "shift"),
    "divide_by_zero": (ASAN, "division"),
    "signed_overflow": (ASAN, "overflow"),
    "half_at_barrier": (ALL, "DIVERGENCE"),
    "two_barriers": (ALL, "DIVERGENCE"),
    "return_before_barrier": (ALL, "DIVERGENCE"),
    "loop_of_barriers": (ALL, "DIVERGENCE"),
    "simd_sum_in_branch": (ALL, "DIVERGENCE"),
    "return_before_simd_sum": (ALL, "DIVERGENCE"),
    "different_simd_functions": (ALL, "DIVERGENCE"),
    "barrier_against_simd_sum": (ALL, "DIVERGENCE"),
    "unset_constant": (ALL, "UNSET function constant flag"),
}
CONTROLS = sorted(name for name in toolchain.kernels(SOURCE).kernels if name.startswith("ok_"))


def run(mode: str, kernel: str, **options: object) -> np.ndarray:
    library = emulator.load(SOURCE, mode)
    x = np.linspace(1, 2, 128, dtype=np.float32)
    y = np.zeros(128, np.float32)
    memory = {p["index"]: 512 for p in library.parameters(kernel) if p["kind"] == "threadgroup"}
    if kernel == "too_much_threadgroup_memory":
        memory = {0: 4096}
    grid = 2 if kernel == "two_threadgroups" else 1
    library.launch(kernel, grid, 128, {0: x, 1: y}, threadgroup_memory=memory, **options)
    return y


@pytest.mark.parametrize(
    ("kernel", "mode"), [(k, m) for k, (modes, _) in FAULTS.items() for m in modes]
)
def test_fault_is_caught(kernel: str, mode: str) -> None:
    with pytest.raises(emulator.KernelFault, match=FAULTS[kernel][1]):
        run(mode, kernel)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("kernel", CONTROLS)
def test_control_passes(kernel: str, mode: str, seed: int) -> None:
    assert np.isfinite(run(mode, kernel, seed=seed)).all()


def test_table_is_complete() -> None:
    assert set(toolchain.kernels(SOURCE).kernels) == set(FAULTS) | set(CONTROLS)


@pytest.mark.parametrize("mode", ALL)
def test_guard_below(mode: str) -> None:
    with pytest.raises(emulator.KernelFault, match="OUT OF BOUNDS"):
        run(mode, "read_before_start", guard_low=True)


def test_lockstep_may_be_allowed() -> None:
    run("race", "simd_sum_is_no_fence", allow_lockstep=True)
    with pytest.raises(emulator.KernelFault, match="RACE between simdgroups"):
        run("race", "missing_barrier", allow_lockstep=True)


@pytest.mark.parametrize("mode", ALL)
def test_partial_simd_may_be_allowed(mode: str) -> None:
    x = np.linspace(1, 2, 128, dtype=np.float32).reshape(4, 32)
    y = run(mode, "simd_sum_in_branch", partial_simd=True).reshape(4, 32)
    np.testing.assert_allclose(
        y[:, 1::2], np.repeat(x[:, 1::2].sum(1, keepdims=True), 16, 1), rtol=1e-6
    )
    assert (y[:, ::2] == 0).all()
    y = run(mode, "return_before_simd_sum", partial_simd=True)
    np.testing.assert_allclose(y[0], np.delete(x[0], 3).sum(), rtol=1e-6)
    y = run(mode, "different_simd_functions", partial_simd=True).reshape(4, 32)
    np.testing.assert_allclose(y[:, 0], x[:, ::2].max(1), rtol=1e-6)


def test_fault_names_kernel_thread_and_line() -> None:
    with pytest.raises(emulator.KernelFault) as caught:
        run("race", "write_past_end")
    message = str(caught.value)
    assert (
        "kernel write_past_end" in message and "thread 127" in message and "buffer(1) y" in message
    )
    assert "faults.metal:" in message or "pc 0x" in message


def test_library_survives_faults() -> None:
    """A fault leaves fibers behind in the middle of a kernel; later launches must not notice."""
    for _ in range(3):
        for kernel in ("half_at_barrier", "simd_sum_in_branch", "write_past_end"):
            with pytest.raises(emulator.KernelFault):
                run("fast", kernel)
        assert run("fast", "ok_reduce")[0] == pytest.approx(192.0)


def test_unset_constant_is_found_before_the_launch() -> None:
    library = emulator.load(SOURCE, "fast")
    assert library.uses("unset_constant") == ["flag"]
    with pytest.raises(emulator.LaunchRefused, match="flag"):
        library.check_constants("unset_constant", {})
    library.check_constants("unset_constant", {0: True})
    assert run("fast", "unset_constant", constants={"flag": True})[3] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buffers": {0: np.zeros(128, np.float32)}}, r"buffer\(1\) y is not bound"),
        ({"threadgroup": 2048}, "limit is 1024"),
        ({"threadgroup": 0}, "no threads"),
        ({"kernel": "past_threadgroup_argument"}, r"threadgroup\(0\) s has no length"),
        ({"kernel": "past_threadgroup_argument", "threadgroup_memory": {0: 24}}, "multiple of 16"),
        (
            {"kernel": "past_threadgroup_argument", "threadgroup_memory": {0: 32784}},
            "limit is 32768",
        ),
    ],
)
def test_bad_request_is_refused(change: dict, message: str) -> None:
    request = {"kernel": "ok_reduce", "grid": 1, "threadgroup": 128}
    request["buffers"] = {0: np.zeros(128, np.float32), 1: np.zeros(128, np.float32)}
    with pytest.raises(emulator.LaunchRefused, match=message):
        emulator.load(SOURCE, "fast").launch(**{**request, **change})
