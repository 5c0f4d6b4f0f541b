"""The Q4_K kernels on the emulator: exact bytes, right products, no races, nothing outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import KINDS, SENTINEL, assert_bytes, dtype_id, hostile, normal
from tests.test_q4_k import ROUNDING, SUMS, random_blocks, relative_error
from torch_kvq import reference
from torch_kvq.formats import FLOAT_DTYPES

from .. import emulator, toolchain
from .codec_launch import METAL, NAMES, bytes_of, library, structs

MODES = ("fast", "race", "asan")
GEMV_ROWS, FEW_ROWS, FEW, TILE_M, TILE_N, TILE_THREADS = 4, 4, 8, 32, 64, 128
each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)


def test_constants_are_the_header_s() -> None:
    text = (METAL.parent / "csrc" / "shared" / "q4_k.h").read_text()
    for name, value in {
        "GEMV_ROWS": GEMV_ROWS, "FEW_ROWS": FEW_ROWS, "FEW": FEW, "TILE_M": TILE_M,
        "TILE_N": TILE_N, "TILE_THREADS": TILE_THREADS,
    }.items():  # fmt: skip
        assert f"#define KVQ_Q4_K_{name} {value}" in text


def launch_simdgroups(
    kernel: str, dtype: torch.dtype, count: int, buffers: list, *, mode: str, **options: object
) -> None:
    constants = options.pop("constants", {})
    edits = options.pop("edits", ())
    library("q4_k", mode, edits).launch(  # type: ignore[arg-type]
        f"kvq_q4_k_{kernel}_{NAMES[dtype]}",
        (32 * count, 1, 1),
        (32 * min(4, count), 1, 1),
        buffers,
        constants,
        {},
        grid_in_threads=True,
        **options,
    )


def quantize(w: torch.Tensor, **options: object) -> torch.Tensor:
    blocks = torch.full((*w.shape[:-1], w.shape[-1] // 256 * 144), SENTINEL, dtype=torch.uint8)
    count = w.numel() // 256
    launch_simdgroups("quantize", w.dtype, count, [bytes_of(w), bytes_of(blocks)], **options)  # type: ignore[arg-type]
    return blocks


def dequantize(blocks: torch.Tensor, dtype: torch.dtype, **options: object) -> torch.Tensor:
    out = torch.full((*blocks.shape[:-1], blocks.shape[-1] // 144 * 256), torch.nan, dtype=dtype)
    count = blocks.numel() // 144
    launch_simdgroups("dequantize", dtype, count, [bytes_of(blocks), bytes_of(out)], **options)  # type: ignore[arg-type]
    return out


def multiply(
    x: torch.Tensor, blocks: torch.Tensor, *, mode: str, edits=(), **options: object
) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """x [m, k] times the rows of blocks [n, row], a view that may lie in a wider buffer."""
    (m, k), n = x.shape, blocks.shape[0]
    params = np.zeros((), structs()["KvqQ4KParams"])
    params["row_stride"], params["columns"] = blocks.stride(0), k // 256
    params["magic"] = 0x4B000000
    params["m"], params["n"] = m, n
    aligned = blocks.storage_offset() % 16 == 0 and blocks.stride(0) % 16 == 0
    constants = {"kvq_aligned": aligned, "kvq_vectors": m if m <= FEW else 0}
    out = torch.full((m, n), torch.nan, dtype=x.dtype)
    buffers = [bytes_of(x), bytes_of(blocks), bytes_of(out), params]
    if m <= FEW:
        kernel, rows = ("gemv", GEMV_ROWS) if m == 1 else ("few", FEW_ROWS)
        launch_simdgroups(
            kernel, x.dtype, -(-n // rows), buffers, mode=mode, constants=constants, edits=edits,
            **options,
        )  # fmt: skip
        return out
    library("q4_k", mode, edits).launch(
        f"kvq_q4_k_matmul_{NAMES[x.dtype]}",
        (-(-n // TILE_N), -(-m // TILE_M), 1),
        (TILE_THREADS, 1, 1),
        buffers,
        constants,
        {},
        **options,
    )
    return out


def check_product(m: int, n: int, k: int, dtype: torch.dtype, mode: str, **options: object) -> None:
    x, blocks = normal(m, k, dtype=dtype, seed=m), random_blocks(n, k, n)
    expected = x.double() @ reference.q4_k_dequantize(blocks).double().T
    out = multiply(x, blocks, mode=mode, **options)
    assert relative_error(out, expected) <= ROUNDING[dtype] + SUMS


@each_dtype
@each_mode
def test_bytes(mode: str, dtype: torch.dtype) -> None:
    for k in (256, 512):
        w = hostile(1, 1, len(KINDS), k, dtype, seed=k)[0, 0]
        expected = reference.q4_k_quantize(w)
        options = {"mode": mode, "seed": k, "guard_low": k == 512}
        assert_bytes(quantize(w, **options), expected)
        assert_bytes(
            dequantize(expected, dtype, **options), reference.q4_k_dequantize(expected, dtype)
        )


@each_dtype
@each_mode
def test_products(mode: str, dtype: torch.dtype) -> None:
    """Odd rows and columns: a row's last block, a threadgroup's last row, one tile and several."""
    for i, (m, n, k) in enumerate(
        [
            (1, 1, 256),
            (1, 9, 1280),
            (2, 3, 512),
            (5, 6, 256),
            (8, 7, 768),
            (9, 3, 256),
            (41, 67, 256),
        ]
    ):
        check_product(m, n, k, dtype, mode, seed=i, guard_low=i % 2 == 1)


@pytest.mark.parametrize("mode", ["fast", "asan"])
@pytest.mark.parametrize("m", [1, 3, 10])
def test_rows_of_a_wider_buffer(m: int, mode: str) -> None:
    """16-byte steps, and 2-byte ones; the bytes around are not weights."""
    x, blocks = normal(m, 512), random_blocks(6, 512)
    expected = multiply(x, blocks, mode=mode)
    for before, after in ((32, 16), (2, 0), (6, 4)):
        wide = torch.full((6, before + 288 + after), 0xFF, dtype=torch.uint8)
        view = wide[:, before : before + 288]
        view.copy_(blocks)
        assert torch.equal(multiply(x, view, mode=mode), expected)


@pytest.mark.parametrize("m", [1, 4, 12])
def test_fast_math(m: int) -> None:
    """Products do not lean on what a compiler may drop under fast math."""
    edits = (("#pragma METAL fp math_mode(safe)\n", "\n"),)
    check_product(m, 5, 768, torch.float16, "fastmath", edits=edits)


def test_every_barrier_of_the_tiles_is_needed() -> None:
    source = toolchain.flatten(METAL / "q4_k.metal")
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    pieces = source.split(barrier)
    assert len(pieces) == 4
    x, blocks = normal(9, 256), random_blocks(3, 256)
    for i in range(3):
        end = pieces[i].splitlines(keepends=True)[-2:]
        start = pieces[i + 1].splitlines(keepends=True)[:2]
        old, new = "".join(end) + barrier + "".join(start), "".join([*end, *start])
        with pytest.raises(emulator.KernelFault, match=r"RACE|UNINITIALISED"):
            multiply(x, blocks, mode="race", edits=((old, new),))


def test_offsets_beyond_2_31() -> None:
    """A row more than 2**31 bytes from the first; untouched pages take no memory."""
    rows, row = (1 << 31) // 144 + 3, 144
    buffer = torch.empty(rows * row, dtype=torch.uint8)
    far = buffer.as_strided((2, row), ((rows - 1) * row, 1))
    blocks, x = random_blocks(2, 256), normal(1, 256)
    far.copy_(blocks)
    params = np.zeros((), structs()["KvqQ4KParams"])
    params["row_stride"], params["columns"], params["m"], params["n"] = far.stride(0), 1, 1, 2
    params["magic"] = 0x4B000000
    out = torch.full((1, 2), torch.nan)
    buffers = [bytes_of(x), emulator.InPlace(bytes_of(buffer)), bytes_of(out), params]
    constants = {"kvq_aligned": True, "kvq_vectors": 1}
    launch_simdgroups("gemv", torch.float32, 1, buffers, mode="fast", constants=constants)
    expected = x.double() @ reference.q4_k_dequantize(blocks).double().T
    assert relative_error(out, expected) <= SUMS
