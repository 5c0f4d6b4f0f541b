"""Q4_K kernels: launched as csrc/mps/q4_k.mm does, checked, the vector product timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from torch_kvq import reference

from .catalogue import DTYPES
from .codecs import nbytes, same_bytes, same_values
from .device import DEVICE, Kernels, time_calls, to_device
from .shares import WHOLE, Share, rows_of
from .structs import constant, make

GEMV_ROWS, FEW_ROWS, TILE_M, TILE_N, TILE_THREADS = (
    constant("q4_k.h", f"KVQ_Q4_K_{name}")
    for name in ("GEMV_ROWS", "FEW_ROWS", "TILE_M", "TILE_N", "TILE_THREADS")
)
#: Relative error that a product may have: of its dtype, and of sums in float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def simdgroups(count: int) -> tuple[tuple, tuple]:
    """Grid and threadgroup of `count` simdgroups; CUDA has whole threadgroups only."""
    together = math.gcd(count, 4)
    return (count // together,), (32 * together,)


def product_call(
    kernels: Kernels, row: dict, x: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor
) -> Callable:
    """out [m, n] = x [m, k] times the rows of blocks [n, k / 256 * 144]."""
    (m, k), n = x.shape, blocks.shape[0]
    params = make("KvqQ4KParams", row_stride=blocks.stride(0), columns=k // 256, m=m, n=n,
                  magic=0x4B000000)  # fmt: skip
    if row["op"] == "q4_k_matmul":
        grid, block = (-(-n // TILE_N), -(-m // TILE_M)), (TILE_THREADS,)
    else:
        each = GEMV_ROWS if row["op"] == "q4_k_gemv" else FEW_ROWS
        grid, block = simdgroups(-(-n // each))
    return kernels.prepare(row, grid, block, [x, blocks, out], params)


def check_row(kernels: Kernels, row: dict, seed: int, checked: bool = True) -> bool:
    """One kernel against the reference, or only launched."""
    dtype, generator = DTYPES[row["dtype"]], torch.Generator().manual_seed(seed)
    n, k = 62, 768
    w = torch.randn(n, k, generator=generator)
    blocks = reference.q4_k_quantize(w.to(dtype))
    count = n * k // 256
    if row["op"] == "q4_k_quantize":
        out = torch.empty_like(blocks, device=DEVICE)
        kernels.prepare(row, *simdgroups(count), [to_device(w.to(dtype)), out], None)()
        return not checked or same_bytes(out, blocks)
    if row["op"] == "q4_k_dequantize":
        values = torch.full((n, k), math.nan, dtype=dtype, device=DEVICE)
        kernels.prepare(row, *simdgroups(count), [to_device(blocks), values], None)()
        return not checked or same_values(values, reference.q4_k_dequantize(blocks, dtype))
    m = {"q4_k_gemv": 1, "q4_k_matmul": 37}.get(row["op"], row["constants"]["kvq_vectors"])
    x = torch.randn(m, k, generator=generator).to(dtype)
    out = torch.full((m, n), math.nan, dtype=dtype, device=DEVICE)
    product_call(kernels, row, to_device(x), to_device(blocks), out)()
    if not checked:
        return True
    expected = x.double() @ reference.q4_k_dequantize(blocks).double().T
    difference = (out.cpu().double() - expected).norm() / expected.norm()
    return bool(difference <= TOLERANCE[dtype])


def small_checks(
    kernels: Kernels, checked: bool = True, share: Share = WHOLE, ops: list[str] | None = None
) -> Iterator[tuple[dict, dict[str, object]]]:
    """A share of the build's Q4_K kernels."""
    for number, row in rows_of(kernels, share, ops):
        if str(row["op"]).startswith("q4_k"):
            yield row, {"ok": check_row(kernels, row, number, checked)}


def gemv_call(kernels: Kernels, row: dict, n: int = 8192, k: int = 8192):  # type: ignore[no-untyped-def]
    """(call, bytes of the blocks) of a large vector product."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    blocks = torch.randint(
        0, 60, (n, k // 256 * 144), dtype=torch.uint8, device=DEVICE, generator=generator
    )
    x = torch.randn(1, k, device=DEVICE, generator=generator).to(DTYPES[row["dtype"]])
    out = torch.empty(1, n, dtype=x.dtype, device=DEVICE)
    return product_call(kernels, row, x, blocks, out), nbytes(blocks)


def measure(kernels: Kernels, read_gbps: float) -> Iterator[dict[str, object]]:
    """The vector product's share of read bandwidth on packed bytes, caches cold; beside it torch's
    fastest reduction of the same bytes, whose launch and tail cost as much."""
    flush = torch.ones(2**26, device=DEVICE)
    for row in kernels.select(op="q4_k_gemv"):
        if row["constants"]["kvq_aligned"] and row["constants"]["kvq_vectors"] == 2:
            call, size = gemv_call(kernels, row)
            floats = call.held[1].view(torch.float32)  # type: ignore[attr-defined]
            reads = {"amax": floats.amax, "sum": floats.sum}
            times = time_calls({"ours": call, **reads}, flush=flush)
            us = times["ours"]
            gbps = size / us / 1e3
            yield {
                **{key: row[key] for key in ("kernel", "op", "dtype", "registers")},
                "shape": [8192, 8192], "us": us, "nbytes": size, "gbps": gbps,
                "of_read": gbps / read_gbps, "torch_read_us": min(times[name] for name in reads),
            }  # fmt: skip
