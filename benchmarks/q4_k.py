"""Rows of run.py for the Q4_K ops: weights [N, K] by --rows and --columns, --queries vectors x.

python benchmarks/run.py --op q4_k_gemv --peer torch-bf16 --threads 1 --json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import ROTATION_BYTES, copies, interleaved

from torch_kvq import ops

PRODUCTS = ("torch-bf16", "torch-fp32", "ggml")
PEERS = {
    "q4_k_gemv": PRODUCTS,
    "q4_k_matmul": PRODUCTS,
    "q4_k_quantize": ("memcpy",),
    "q4_k_dequantize": ("memcpy",),
}
#: Between two timed calls: the threads of one OpenMP runtime go to sleep before another's start.
PAUSE_S = 0.005


def rotation(t: torch.Tensor) -> list[torch.Tensor]:
    return [t.clone() for _ in range(copies(t.numel() * t.element_size()))]


def product(args: argparse.Namespace) -> tuple[Callable, Callable, torch.Tensor]:
    """Ours, the peer's, and the packed weights."""
    generator = torch.Generator().manual_seed(0)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(args.dtype, torch.float32)
    m = 1 if args.op == "q4_k_gemv" else args.queries
    w = torch.randn(args.rows, args.columns, generator=generator)
    x = torch.randn(m, args.columns, generator=generator).to(dtype)
    blocks = ops.q4_k_quantize(w)
    dense = ops.q4_k_dequantize(blocks)
    packed = rotation(blocks)
    multiply = ops.q4_k_gemv if m == 1 else ops.q4_k_matmul

    def ours(turn: int) -> torch.Tensor:
        return multiply(x, packed[turn % len(packed)], exact=args.exact)

    if args.peer == "ggml":
        import ggml

        peer = ggml.products(x, packed, args.threads)
    else:
        peer_dtype = torch.bfloat16 if args.peer == "torch-bf16" else torch.float32
        weights, values = rotation(dense.to(peer_dtype)), x.to(peer_dtype)

        def peer(turn: int) -> torch.Tensor:
            return F.linear(values, weights[turn % len(weights)])

    exact = x.double() @ dense.double().T
    for name, out in {"ours": ours(0), args.peer: peer(0)}.items():
        error = (out.double().view_as(exact) - exact).norm() / exact.norm()
        assert error < 0.01, f"{name} is wrong: relative error {error:.2e}"
    return ours, peer, blocks


def codec(args: argparse.Namespace) -> tuple[Callable, Callable, torch.Tensor]:
    """Ours, and a copy of as many float32 values; the packed weights."""
    w = torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(0))
    blocks, target = ops.q4_k_quantize(w), torch.empty_like(w)
    assert (ops.q4_k_dequantize(blocks) - w).norm() < 0.08 * w.norm()
    if args.op == "q4_k_quantize":
        ours: Callable = lambda turn: ops.q4_k_quantize(w)  # noqa: E731
    else:
        ours = lambda turn: ops.q4_k_dequantize(blocks)  # noqa: E731
    return ours, lambda turn: target.copy_(w), blocks


def run_row(args: argparse.Namespace) -> dict:
    """One row: build, check, time; the share of the read bandwidth counts packed bytes."""
    ours, peer, blocks = (product if args.peer in PRODUCTS else codec)(args)
    large = torch.ones(ROTATION_BYTES // 8, dtype=torch.float32)
    functions = {"ours": ours, "peer": peer, "read": lambda turn: large.sum()}
    times = interleaved(functions, budget_s=args.budget, pause_s=PAUSE_S)
    ms = {name: timing.median for name, timing in times.items()}
    rate = {"ours": blocks.numel() / ms["ours"] / 1e6, "read": large.numel() * 4 / ms["read"] / 1e6}
    return {
        "op": args.op, "format": "q4_k" + ("-exact" if args.exact else ""), "peer": args.peer,
        "dtype": args.dtype, "threads": args.threads, "rows": args.rows, "columns": args.columns,
        "queries": 1 if args.op == "q4_k_gemv" else args.queries,
        "ours_ms": round(ms["ours"], 5), "peer_ms": round(ms["peer"], 5),
        "ratio": round(ms["peer"] / ms["ours"], 3),
        "spread": round(max(times["ours"].spread, times["peer"].spread), 3),
        "packed_gb_s": round(rate["ours"], 2), "read_gb_s": round(rate["read"], 2),
        "of_read": round(rate["ours"] / rate["read"], 3),
    }  # fmt: skip


def show(row: dict) -> None:
    print(
        f"{row['op']:10} {row['format']:12} vs {row['peer']:10} {row['rows']}x{row['columns']} "
        f"M={row['queries']} {row['threads']} threads: ours {row['ours_ms']:.3f} ms, peer "
        f"{row['peer_ms']:.3f} ms, ratio {row['ratio']:.2f} (spread {row['spread']:.0%}), "
        f"{row['packed_gb_s']:.1f} GB/s, {row['of_read']:.0%} of the read bandwidth",
        flush=True,
    )
