"""Values of what Metal sources use, in every build."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from . import emulator, toolchain

SOURCE = toolchain.flatten(Path(__file__).parent / "samples" / "features.metal")
MODES = ("fast", "race", "asan", "fastmath")
X = np.linspace(0.1, 0.9, 64, dtype=np.float32)
T = np.arange(64)
GROUPS = X.reshape(2, 32)


def lanes(f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Applies f to each simdgroup of X."""
    return np.concatenate([np.broadcast_to(f(g), 32) for g in GROUPS])


def swizzles() -> np.ndarray:
    return 3 * 1000 + 2 * 100 + (2 + 10) + (3 + 20) + 0 * X


def conversions() -> np.ndarray:
    return np.trunc(X * 4 - 2) + np.int8(-5) + 252


def comparisons() -> np.ndarray:
    any_, all_ = 1, 0
    return any_ + 2 * all_ + 4 + 8 + 16 - 2 + 0 * X


def half_and_bfloat() -> np.ndarray:
    def bfloat(v: np.ndarray) -> np.ndarray:
        bits = v.astype(np.float32).view(np.uint32)
        return (
            ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        )

    h = X.astype(np.float16) * np.float16(2.5) + np.float16(1)
    b = bfloat(bfloat(bfloat(X) * 3) + bfloat(h.astype(np.float32)))
    return h.astype(np.float32) + b


def integers() -> np.ndarray:
    u = X.view(np.uint32)
    bits = np.array([bin(v).count("1") for v in u])
    ctz = np.array([(v & -v).bit_length() - 1 for v in (int(v) | 1 for v in u)])
    clz = 32 - np.array([int(v).bit_length() for v in u])
    return bits + clz + ctz + (u >> 23) + (u >> 24) + 192 + (u >> 31) + abs(T - 32) + 48 + 255 + 7


def mathematics() -> np.ndarray:
    v = X.astype(np.float64)
    tanh, smooth = np.tanh(v), v * v * (3 - 2 * v)
    total = (
        np.exp(v)
        + np.exp2(v)
        + np.log(v)
        + np.sqrt(v)
        + 1 / np.sqrt(v)
        + np.sin(v)
        + np.cos(v)
        + tanh
        + v**2
    )
    total += (
        v * v
        + v
        + np.clip(v, 0.25, 0.5)
        + v
        + (1 - v) * 0.5
        + np.rint(X * np.float32(10))
        + v
        + 1
        + np.exp(v)
    )
    return total + np.log2(v) + np.maximum(v, 0.2) + v * 8 + (v >= 0.5) + smooth


def simd_shuffles() -> np.ndarray:
    def one(g: np.ndarray) -> np.ndarray:
        lane = np.arange(32)
        down = np.where(lane + 3 > 31, g, g[(lane + 3) % 32])
        up = np.where(lane < 2, g, g[lane - 2])
        fill = np.where(lane + 4 > 31, 0.5, g[(lane + 4) % 32])
        total = g[::-1] + 2 * g[lane ^ 5] + 4 * down + 8 * up + 16 * g[7] + 32 * g[(lane + 9) % 32]
        return total + 64 * g[0] + 128 * fill

    return lanes(one)


def simd_votes() -> np.ndarray:
    thirds = 11
    return thirds + 1 + 100 * (T >= 32) + 1000 * (T < 32) + 10000 * (T % 32 == 0)


def quads() -> np.ndarray:
    q = X.reshape(16, 4)
    before = np.cumsum(q, 1) - q
    total = (
        q.sum(1, keepdims=True) + q.max(1, keepdims=True) + q[:, 2:3] + q[:, [1, 0, 3, 2]] + before
    )
    return total.reshape(64) + (T < 16)


def packed3() -> np.ndarray:
    p = X[:63].reshape(21, 3)
    return np.append((p * 2 + p[:, :1]).reshape(63), 0)


def matrices() -> np.ndarray:
    m = np.zeros((64, 4, 4), np.float32)  # columns
    m[:, range(4), range(4)] = 2
    m[:, 1] = X[:, None]
    m[:, 2, 3] = 5
    v = np.einsum("tcr,c->tr", m, np.array([1, 2, 3, 4], np.float32))
    return v.sum(1) + 5


def matrix_multiply() -> np.ndarray:
    a = X.astype(np.float16).astype(np.float32).reshape(8, 8)
    return (a @ a.T + 1).reshape(64)


def simd_reductions() -> np.ndarray:
    base = lanes(lambda g: g.sum() + g.max() + g.min()) + 2.0**32 * 1e-9
    return base + np.where(T < 32, 31, 63) + np.where(T < 32, 0, 32)


def half(v: np.ndarray) -> np.ndarray:
    return v.astype(np.float16).astype(np.float32)


ANSWERS: dict[str, Callable[[], np.ndarray]] = {
    "swizzles": swizzles,
    "constructors": lambda: (X + 2) * 2 + 1 + X + 2 + 3 + 3 + X + 10 + 4,
    "conversions": conversions,
    "comparisons": comparisons,
    "templated_vectors": lambda: 4 * half(X) + 4 * half(X),
    "packed3": packed3,
    "matrices": matrices,
    "half_and_bfloat": half_and_bfloat,
    "integers": integers,
    "mathematics": mathematics,
    "limits": lambda: X,
    "constants": lambda: (T & 3) + 0.5 + np.where(T & 1, 5, 2) + X,
    "overloads_on_space": lambda: 4321.0 + 0 * X,
    "array_references": lambda: X + 4 * X + 3,
    "threadgroup_arguments": lambda: X[::-1] + half(X)[T ^ 1],
    "templated_threadgroup_half_2": lambda: half(X)[T ^ 1] + 2 + 3,
    "simd_reductions": simd_reductions,
    "simd_shuffles": simd_shuffles,
    "simd_scans": lambda: lanes(lambda g: np.cumsum(g) + 100 * (np.cumsum(g) - g) + 1),
    "simd_votes": simd_votes,
    "simd_vectors": lambda: lanes(lambda g: g.sum() + 96) + half(X)[T ^ 1],
    "quads": quads,
    "matrix_multiply": matrix_multiply,
    "function_argument_float": lambda: 2 * X,
    "in_namespace_float": lambda: 3 * X,
}
MEMORY = {"threadgroup_arguments": {0: 256, 1: 512}, "matrix_multiply": {0: 128}}


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ANSWERS)
def test_value(kernel: str, mode: str, seed: int) -> None:
    y = np.zeros(64, np.float32)
    threads = 32 if kernel == "matrix_multiply" else 64
    library = emulator.load(SOURCE, mode)
    library.launch(
        kernel, 64 // threads, threads, [X, y], threadgroup_memory=MEMORY.get(kernel), seed=seed
    )
    np.testing.assert_allclose(y, ANSWERS[kernel](), rtol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_struct_copies(mode: str) -> None:
    block = np.dtype([("scale", np.float16), ("codes", np.uint8, 16)])
    blocks = np.zeros(64, block)
    blocks["scale"], blocks["codes"] = 0.5, np.arange(64 * 16).reshape(64, 16) % 100
    other = np.zeros(1, block)
    other["codes"] = 7
    y, before = np.zeros(64, np.float32), blocks.copy()
    emulator.load(SOURCE, mode).launch("struct_copies", 1, 64, [X, y, blocks, other])
    codes = before["codes"].astype(np.float32)
    np.testing.assert_allclose(y, 0.5 * (codes[:, 1] + 7) + 0.5 * codes[:, 2] + X, rtol=1e-6)
    assert (blocks["codes"][:, 1] == before["codes"][:, 1] + 7).all()


@pytest.mark.parametrize("mode", MODES)
def test_atomics(mode: str) -> None:
    counts, total, y = np.zeros(8, np.uint32), np.zeros(1, np.float32), np.zeros(64, np.float32)
    emulator.load(SOURCE, mode).launch("atomics", 2, 32, [X, y, counts, total], seed=3)
    assert counts[:4].tolist() == [T[k::4].sum() for k in range(4)] and counts[4] == 63
    assert counts[5] == counts[6] + 1
    assert total[0] == pytest.approx(X.sum(), rel=1e-5)
    assert (y == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_function_constants(mode: str) -> None:
    library = emulator.load(SOURCE, mode)
    assert library.function_constants == {0: ("has_bias", "bool"), 7: ("scale", "int")}
    assert library.uses("function_constants") == ["has_bias", "scale"]
    bias, y = np.full(64, 5, np.float32), np.zeros(64, np.float32)
    library.launch("function_constants", 2, 32, [X, y, bias], {0: True, 7: 2})
    np.testing.assert_allclose(y, 2 * X + 5)
    library.launch("function_constants", 2, 32, [X, y], {"has_bias": False})
    np.testing.assert_allclose(y, 3 * X)
    with pytest.raises(emulator.LaunchRefused, match=r"buffer\(2\) bias is not bound"):
        library.launch("function_constants", 2, 32, [X, y], {"has_bias": True})
    with pytest.raises(emulator.KernelFault, match="UNSET function constant has_bias"):
        library.launch("function_constants", 2, 32, [X, y])


@pytest.mark.parametrize("mode", MODES)
def test_grid_in_threads(mode: str) -> None:
    """The last threadgroups of an axis are smaller."""
    width, height = 21, 5
    y = np.zeros(height * width, np.float32)
    emulator.load(SOURCE, mode).launch(
        "positions", (width, height), (8, 4), [X[:1], y], grid_in_threads=True
    )
    py, px = np.mgrid[:height, :width]
    gx, gy = px // 8, py // 4
    size_x, size_y = np.where(gx == 2, 5, 8), np.where(gy == 1, 1, 4)
    index = (px % 8) + size_x * (py % 4)
    simdgroups = (size_x * size_y + 31) // 32
    want = (
        X[0]
        + gx
        + 10 * gy
        + 100 * size_x
        + 1000 * 3
        + 10000 * index
        + (index // 32 + simdgroups) * 0.25
    )
    np.testing.assert_allclose(y.reshape(height, width), want + (py % 4) * 0.0625, rtol=1e-6)


def test_unnumbered_buffers_and_offsets() -> None:
    library = emulator.load(SOURCE, "fast")
    y = np.zeros(80, np.float32)
    library.launch("unnumbered", 1, 64, [X, emulator.Offset(y, 64), np.array([1, 9], np.uint32)])
    np.testing.assert_allclose(y, np.concatenate([np.zeros(16), X + 9]), rtol=1e-6)
    names = [
        (p["name"], p["index"], p["elem_size"], p["is_read_only"])
        for p in library.parameters("unnumbered")
    ]
    assert names == [("x", 0, 4, 1), ("y", 1, 4, 0), ("add", 2, 8, 1)]


def test_buffers_may_overlap() -> None:
    """The same memory bound twice is one memory."""
    data = np.concatenate([X, np.zeros(64, np.float32)])
    emulator.load(SOURCE, "race").launch("limits", 1, 64, [data, data[64:]])
    np.testing.assert_array_equal(data[64:], X)


def test_in_place_buffer() -> None:
    """A buffer of more than 2^32 bytes, of which only the touched pages exist."""
    huge = np.zeros((1 << 32) // 4 + 4096, np.float32)
    end = huge[-64:]
    emulator.load(SOURCE, "fast").launch(
        "limits", 1, 64, [X, emulator.Offset(emulator.InPlace(huge), huge.nbytes - 256)]
    )
    np.testing.assert_array_equal(end, X)


def test_max_threads() -> None:
    library = emulator.load(SOURCE, "fast")
    assert library.max_threads("templated_threadgroup_half_2") == 64
    assert library.max_threads("swizzles") == 1024
    with pytest.raises(emulator.LaunchRefused, match="its limit is 64"):
        library.launch("templated_threadgroup_half_2", 1, 96, [X, X.copy()])


def test_static_threadgroup_bytes() -> None:
    library = emulator.load(SOURCE, "fast")
    library.launch("templated_threadgroup_half_2", 1, 64, [X, np.zeros(64, np.float32)])
    assert (
        library.static_threadgroup_bytes("templated_threadgroup_half_2") == 64 * 4 + 4 * 4 + 64 * 2
    )


def test_fastmath_flushes_denormals_during_a_launch_only() -> None:
    tiny = np.full(64, 1e-40, np.float32)
    y = np.ones(64, np.float32)
    emulator.load(SOURCE, "fastmath").launch("in_namespace_float", 1, 64, [tiny, y])
    assert (y == 0).all()
    assert tiny[0] * np.float32(1) != 0 and math.isfinite(tiny[0])
    emulator.load(SOURCE, "fast").launch("in_namespace_float", 1, 64, [tiny, y])
    assert (y != 0).all()
