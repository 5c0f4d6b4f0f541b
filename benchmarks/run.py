"""Benchmarks of the ops against their peers, as ratios taken in one run.

    python benchmarks/run.py --op attention --format int4-g64 --peer torch-folded --tokens 16384
    python benchmarks/run.py --all            # results/cpu.json and a plot of attention

Every row checks the result it times. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import q4_k
import torch
import torch.nn.functional as F
from timing import copies, interleaved

import torch_kvq  # registers the ops
from torch_kvq import KVFormat, Packed, ops
from torch_kvq.codebooks import hadamard_signs

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ALL_FORMATS = (
    "int8-g32", "int8-g64", "int4-g64", "int4-g64-rot", "int2-g64", "fp8_e4m3-g64", "q8_0", "q4_0",
    "tq3", "tq4", "tq5", "tq6", "tq8",
)  # fmt: skip


class Case:
    """The operands of one row: random K and V of a layer, dense and packed, in rotation."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.k_format = KVFormat.parse(args.format)
        self.v_format = KVFormat.parse(args.v_format or args.format)
        self.dtype = DTYPES[args.dtype]
        self.shape = (args.batch, args.kv_heads, args.tokens, args.head_dim)
        generator = torch.Generator().manual_seed(0)
        self.key = torch.randn(self.shape, generator=generator).to(self.dtype)
        self.value = torch.randn(self.shape, generator=generator).to(self.dtype)
        self.query = torch.randn(
            args.batch, args.heads, args.queries, args.head_dim, generator=generator
        ).to(self.dtype)

    def packed(self) -> tuple[Packed, Packed]:
        return ops.quantize(self.key, self.k_format), ops.quantize(self.value, self.v_format)

    def length(self) -> torch.Tensor | int:
        if not self.args.ragged:
            return self.args.tokens
        # Rows from half to full length.
        steps = torch.linspace(0.5, 1.0, self.args.batch)
        return (steps * self.args.tokens).long()


def nbytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rotation(tensors: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(t.clone() for t in tensors) for _ in range(copies(nbytes(tensors)))]


def attention_ours(case: Case) -> Callable[[int], torch.Tensor]:
    keys, values = case.packed()
    turns = rotation((*keys, *values))
    length, rotated = case.length(), {}
    for side, fmt in (("k", case.k_format), ("v", case.v_format)):
        if fmt.rotate:
            rotated[f"{side}_signs"] = hadamard_signs(case.args.head_dim)

    def run(turn: int) -> torch.Tensor:
        packed = turns[turn % len(turns)]
        keys, values = Packed(*packed[:3]), Packed(*packed[3:])
        return ops.attention(
            case.query, keys, values, length, case.k_format, case.v_format, **rotated
        )[0]

    return run


def row_mask(case: Case, rows: int) -> torch.Tensor | None:
    """Causal (lower right) and per-row length mask [B, 1, rows, T], None where all is visible."""
    args = case.args
    if args.queries == 1 and not args.ragged:
        return None
    length = torch.as_tensor(case.length()).reshape(-1, 1, 1, 1)
    position = torch.arange(args.tokens)
    query = length - args.queries + torch.arange(args.queries).view(1, 1, -1, 1)
    return (position <= query).repeat(1, 1, rows // args.queries, 1)


def attention_peer(case: Case, peer: str) -> Callable[[int], torch.Tensor]:
    args = case.args
    dtype = torch.float32 if peer == "torch-fp32" else case.dtype
    turns = rotation((case.key.to(dtype), case.value.to(dtype)))
    query = case.query.to(dtype)
    fold = peer == "torch-folded"
    if fold:
        query = query.view(args.batch, args.kv_heads, -1, args.head_dim)
    square = args.queries == args.tokens and not fold and not args.ragged
    mask = None if square else row_mask(case, query.shape[2])

    def run(turn: int) -> torch.Tensor:
        key, value = turns[turn % len(turns)]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=square, enable_gqa=not fold
        )
        return out.view(args.batch, args.heads, args.queries, args.head_dim)

    return run


def check_attention(case: Case, out: torch.Tensor) -> None:
    keys, values = case.packed()
    key, value = ops.dequantize(keys, case.k_format), ops.dequantize(values, case.v_format)
    expected = F.scaled_dot_product_attention(
        case.query.float(), key, value, attn_mask=row_mask(case, case.args.queries), enable_gqa=True
    )
    error = (out.float() - expected).norm() / expected.norm()
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[case.dtype]
    assert error < tolerance, f"attention is wrong: relative error {error:.2e}"


def bench_attention(case: Case, peer: str) -> tuple[Callable, Callable]:
    ours = attention_ours(case)
    if case.args.queries * case.args.tokens <= 2**25:
        check_attention(case, ours(0))
    return ours, attention_peer(case, peer)


def bench_append(case: Case, peer: str) -> tuple[Callable, Callable]:
    """One token's K and V into their slots, against one index_copy_ of as many dense values."""
    keys, values = case.packed()
    new = case.key[:, :, :1].contiguous(), case.value[:, :, :1].contiguous()
    dense = case.key.clone()
    index = torch.tensor([case.args.tokens // 2])
    k, v = case.k_format, case.v_format
    signs = hadamard_signs(case.args.head_dim)

    def ours(turn: int) -> None:
        ops.append_(
            keys, values, *new, case.args.tokens // 2, k, v,
            k_signs=signs if k.rotate else None, v_signs=signs if v.rotate else None,
        )  # fmt: skip

    def theirs(turn: int) -> None:
        dense.index_copy_(2, index, new[0])

    before = keys.codes.clone()
    ours(0)
    assert (keys.codes != before).any(3).sum() <= keys.codes[:, :, 0].numel()
    return ours, theirs


def bench_quantize(case: Case, peer: str) -> tuple[Callable, Callable]:
    turns = rotation((case.key, case.value))

    def ours(turn: int) -> Packed:
        key, value = turns[turn % len(turns)]
        ops.quantize(key, case.k_format)
        return ops.quantize(value, case.v_format)

    return ours, quantize_peer(case, peer)


def quantize_peer(case: Case, peer: str) -> Callable[[int], object]:
    if peer == "mlx":
        import mlx.core as mx

        arrays = [mx.array(t.float().numpy()) for t in (case.key, case.value)]
        fmt = case.k_format

        def run(turn: int) -> None:
            packed = [mx.quantize(a, group_size=fmt.group_size, bits=fmt.bits) for a in arrays]
            mx.eval(*packed)

        return run
    if peer == "gguf":
        from gguf import GGMLQuantizationType, quants

        rows = [t.float().reshape(-1, case.args.head_dim).numpy() for t in (case.key, case.value)]
        kind = GGMLQuantizationType[case.k_format.name.upper()]
        return lambda turn: [quants.quantize(r, kind) for r in rows]
    sources = rotation((case.key, case.value))
    target = torch.empty_like(case.key)
    return lambda turn: [target.copy_(t) for t in sources[turn % len(sources)]]


def bench_dequantize(case: Case, peer: str) -> tuple[Callable, Callable]:
    keys, _ = case.packed()
    turns = rotation(tuple(keys))
    dense = ops.dequantize(keys, case.k_format, dtype=case.dtype)
    sources, targets = rotation((dense,)), rotation((dense,))

    def ours(turn: int) -> torch.Tensor:
        return ops.dequantize(Packed(*turns[turn % len(turns)]), case.k_format, dtype=case.dtype)

    def theirs(turn: int) -> None:
        targets[turn % len(targets)][0].copy_(sources[turn % len(sources)][0])

    assert torch.equal(ours(0), dense)
    return ours, theirs


def bench_dense_to_dense(case: Case, peer: str) -> tuple[Callable, Callable]:
    """qdq and hadamard: K in, as much out; against a copy."""
    turns, target = rotation((case.key,)), torch.empty_like(case.key)
    signs = hadamard_signs(case.args.head_dim)

    def ours(turn: int) -> torch.Tensor:
        (key,) = turns[turn % len(turns)]
        return (
            ops.hadamard(key, signs) if case.args.op == "hadamard" else ops.qdq(key, case.k_format)
        )

    result = ours(0)
    assert result.shape == case.key.shape and not result.isnan().any()
    return ours, lambda turn: target.copy_(turns[turn % len(turns)][0])


def bench_update(case: Case, peer: str) -> tuple[Callable, Callable]:
    """One token into a dense cache, against index_copy_."""
    cache, dense, new = case.key.clone(), case.key.clone(), case.value[:, :, :1].contiguous()
    slot = case.args.tokens // 2
    index = torch.tensor([slot])

    def ours(turn: int) -> None:
        ops.kv_cache_update_(cache, new, slot)

    def theirs(turn: int) -> None:
        dense.index_copy_(2, index, new)

    ours(0), theirs(0)
    assert torch.equal(cache, dense)
    return ours, theirs


def bench_mlx_native(case: Case, peer: str) -> tuple[Callable, Callable]:
    """4-bit rows of mlx-native's layout to float32, against a copy of as many floats."""
    generator = torch.Generator().manual_seed(0)
    row = (*case.shape[:3], case.args.head_dim // 2)
    codes = torch.randint(0, 256, row, generator=generator, dtype=torch.uint8)
    turns = rotation((codes, torch.ones(*case.shape[:3], max(1, case.args.head_dim // 256))))
    source = torch.zeros(case.shape)
    target = torch.empty_like(source)

    def ours(turn: int) -> torch.Tensor:
        return ops.mlx_native_dequantize(*turns[turn % len(turns)], 4)

    assert ours(0).shape == source.shape
    return ours, lambda turn: target.copy_(source)


OPS = {
    "attention": (bench_attention, ("torch-folded", "torch-gqa", "torch-fp32")),
    "append": (bench_append, ("index-copy",)),
    "quantize": (bench_quantize, ("memcpy", "mlx", "gguf")),
    "dequantize": (bench_dequantize, ("memcpy",)),
    "qdq": (bench_dense_to_dense, ("memcpy",)),
    "hadamard": (bench_dense_to_dense, ("memcpy",)),
    "kv_cache_update": (bench_update, ("index-copy",)),
    "mlx_native_dequantize": (bench_mlx_native, ("memcpy",)),
}


def run_row(args: argparse.Namespace) -> dict:
    """One row: build, check, time."""
    torch.set_num_threads(args.threads)
    peers = q4_k.PEERS[args.op] if args.op in q4_k.PEERS else OPS[args.op][1]
    if args.peer not in peers:
        raise SystemExit(f"--op {args.op} has peers {', '.join(peers)}, not {args.peer!r}")
    if args.op in q4_k.PEERS:
        return q4_k.run_row(args)
    bench, _ = OPS[args.op]
    case = Case(args)
    ours, peer = bench(case, args.peer)
    times = interleaved({"ours": ours, "peer": peer}, budget_s=args.budget)
    return {
        "op": args.op, "format": str(case.k_format), "v_format": str(case.v_format),
        "peer": args.peer, "dtype": args.dtype, "threads": args.threads, "batch": args.batch,
        "heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim,
        "tokens": args.tokens, "queries": args.queries,
        "ours_ms": round(times["ours"].median, 5), "peer_ms": round(times["peer"].median, 5),
        "ratio": round(times["peer"].median / times["ours"].median, 3),
        "spread": round(max(times["ours"].spread, times["peer"].spread), 3),
    }  # fmt: skip


def show(row: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    if row["op"] in q4_k.PEERS:
        q4_k.show(row)
        return
    formats = row["format"] + ("" if row["format"] == row["v_format"] else f"/{row['v_format']}")
    print(
        f"{row['op']:10} {formats:16} vs {row['peer']:12} T={row['tokens']:<7} "
        f"L={row['queries']:<5} {row['threads']} threads: ours {row['ours_ms']:9.3f} ms, peer "
        f"{row['peer_ms']:9.3f} ms, ratio {row['ratio']:6.2f} (spread {row['spread']:.0%})",
        flush=True,
    )


def all_rows(base: argparse.Namespace) -> list[argparse.Namespace]:
    def row(**changes: object) -> argparse.Namespace:
        return argparse.Namespace(**{**vars(base), **changes})

    rows = []
    for threads in (1, 2):
        rows += [row(op="attention", format=f, threads=threads) for f in ALL_FORMATS]
        rows += [
            row(op="attention", format="int4-g64", peer=p, threads=threads)
            for p in ("torch-gqa", "torch-fp32")
        ]
        rows += [
            row(op="attention", format="int4-g64", tokens=t, threads=threads)
            for t in (1024, 4096, 65536)
        ]
        rows += [
            row(op="attention", format="int4-g64", queries=q, threads=threads) for q in (4, 16)
        ]
    rows += [
        row(op="attention", format="int8-g64", v_format="int4-g64"),
        row(op="attention", format="int4-g64", kv_heads=32),
        row(op="attention", format="int4-g64", head_dim=64),
        row(op="attention", format="int4-g64", head_dim=256),
        row(op="attention", format="int4-g64", batch=4, tokens=4096, ragged=True),
        row(
            op="attention", format="int4-g64", queries=2048, tokens=2048, peer="torch-fp32",
            dtype="float32",
        ),
        row(op="append", format="int4-g64", peer="index-copy", tokens=4096),
        row(op="quantize", format="int4-g64", peer="mlx", tokens=512),
        row(op="quantize", format="q4_0", peer="gguf", tokens=512),
        row(op="quantize", format="int4-g64", peer="memcpy", tokens=512),
    ]  # fmt: skip
    rows += [
        row(op="dequantize", format=f, peer="memcpy", tokens=4096)
        for f in ("int8-g64", "int4-g64", "q8_0", "q4_0", "fp8_e4m3-g64", "tq4")
    ]
    for threads in (1, 2):
        rows += [
            row(op="q4_k_gemv", peer=peer, threads=threads, exact=exact)
            for peer in ("torch-bf16", "torch-fp32")
            for exact in (False, True)
        ]
    return rows


def plot(rows: list[dict]) -> None:
    """Time of one decode step against tokens, log-log."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    chosen = [r for r in rows if r["op"] == "attention" and r["queries"] == 1 and r["batch"] == 1]
    chosen = [r for r in chosen if r["threads"] == 1 and r["format"] == "int4-g64"]
    chosen = [r for r in chosen if (r["kv_heads"], r["head_dim"]) == (8, 128)]
    for key, label in (("ours_ms", "torch_kvq int4-g64"), ("peer_ms", "torch bf16 SDPA, folded")):
        points = sorted((r["tokens"], r[key]) for r in chosen if r["peer"] == "torch-folded")
        axes.loglog(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="tokens in the cache", ylabel="ms per decode step of one layer, 1 thread")
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "attention.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=(*OPS, *q4_k.PEERS), default="attention")
    parser.add_argument("--format", default="int4-g64", help="K's format, and V's unless given")
    parser.add_argument("--v-format", default=None)
    parser.add_argument("--peer", default="torch-folded")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4096, help="of q4_k weights, N")
    parser.add_argument("--columns", type=int, default=4096, help="of q4_k weights, K")
    parser.add_argument("--exact", action="store_true", help="q4_k: multiply x as it is")
    parser.add_argument("--ragged", action="store_true", help="rows of different lengths")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing per row")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--all", action="store_true", help="every row of the results file")
    args = parser.parse_args()
    if not args.all:
        show(run_row(args), args.json)
        return
    rows = []
    for row in all_rows(args):
        rows.append(run_row(row))
        show(rows[-1], args.json)
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "torch_kvq": torch_kvq.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    (RESULTS / "cpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    plot(rows)


if __name__ == "__main__":
    main()
