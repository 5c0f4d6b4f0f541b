"""Time decode attention on packed keys and values against dense attention on this machine.

With --tune, on a Mac's GPU, the choices of its kernels' launches (how many query heads share a
threadgroup, into how many parts the tokens are split) are tried, and the best are saved for this
GPU, where later processes find them. KVQ_TUNING and KVQ_TUNING_FILE override them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from torch_kvq import ops
from torch_kvq.cli.terminal import CommandError, Progress, table
from torch_kvq.codebooks import hadamard_signs
from torch_kvq.formats import KVFormat

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FORMATS = ("int8", "int4", "int4-rot", "tq4", "int8/int4-rot")
#: The last entry of a table serves all rows that the others do not.
ALL_ROWS = 1 << 30
#: What --tune tries, one after the other, each with the best of those before.
THREADGROUPS = (64, 128, 256, 512, 1024)
SPLIT_TOKENS = (64, 128, 256, 512)

#: Rows of a threadgroup or 0 for prefill, threadgroups, tokens of a split, and rows of a matrix
#: threadgroup or 0.
Entry = tuple[int, int, int, int]
#: By rows per KV head.
Table = dict[int, Entry]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help=(__doc__ or "").splitlines()[0],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "mps"), default="auto")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="K[/V]")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds; medians are shown")
    parser.add_argument("--tune", action="store_true", help="find the best launches and save them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    device = args.device
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "mps" and not hasattr(torch.ops.kvq_metal, "tuning"):
        raise CommandError("this build of torch_kvq has no Metal kernels")
    if args.heads % args.kv_heads:
        raise CommandError(f"--heads {args.heads} is no multiple of --kv-heads {args.kv_heads}")
    try:
        for spec in args.formats:
            for fmt in pair(spec):
                fmt.check_head_dim(args.head_dim, "bench")
    except ValueError as error:
        raise CommandError(str(error)) from None
    found: dict[str, Any] = {"device": device}
    if args.tune:
        if device != "mps":
            raise CommandError("--tune is for Apple GPUs; the CPU kernels have nothing to choose")
        found |= tune(args)
    found["rows"] = [row for tokens in args.tokens for row in measure(args, device, tokens)]
    print(json.dumps(found, indent=2) if args.json else describe(args, found))
    return 0


def pair(spec: str) -> tuple[KVFormat, KVFormat]:
    """Formats of K and V: of both where one is named."""
    k, _, v = spec.partition("/")
    return KVFormat.parse(k), KVFormat.parse(v or k)


def random(args: argparse.Namespace, device: str, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape, args.head_dim, generator=torch.Generator().manual_seed(len(shape)))
    return x.to(DTYPES[args.dtype]).to(device)


def time_in_turn(
    calls: dict[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, float]:
    """Median milliseconds of each call, in turn, each waited for."""

    def wait() -> None:
        if device == "mps":
            torch.mps.synchronize()

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            wait()
            begin = time.perf_counter()
            call()
            wait()
            samples[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def packed_call(
    args: argparse.Namespace, device: str, spec: str, query: torch.Tensor, tokens: int
) -> Callable[[], object]:
    """Attention of the query on random packed keys and values."""
    signs = {True: hadamard_signs(args.head_dim).to(device), False: None}
    k, v = pair(spec)
    keys, values = (
        ops.quantize(
            random(args, device, args.batch, args.kv_heads, tokens), fmt, signs=signs[fmt.rotate]
        )
        for fmt in (k, v)
    )
    length = torch.tensor(tokens, device=device)
    return lambda: ops.attention(
        query, keys, values, length, k, v, k_signs=signs[k.rotate], v_signs=signs[v.rotate]
    )


def measure(args: argparse.Namespace, device: str, tokens: int) -> list[dict[str, Any]]:
    """A decode step of every format, and torch's attention on dense keys and values."""
    query = random(args, device, args.batch, args.heads, 1)
    key, value = (random(args, device, args.batch, args.kv_heads, tokens) for _ in range(2))
    folded = query.unflatten(1, (args.kv_heads, -1)).flatten(2, 3)

    def grouped() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def with_rows() -> torch.Tensor:
        return F.scaled_dot_product_attention(folded, key, value)

    calls: dict[str, Callable[[], object]] = {"dense": grouped, "dense folded": with_rows}
    for spec in args.formats:
        calls[spec] = packed_call(args, device, spec, query, tokens)
    times = time_in_turn(calls, device, args.repeats)
    dense = min(times.pop("dense"), times.pop("dense folded"))
    return [
        {"format": spec, "tokens": tokens, "ms": ms, "dense_ms": dense, "ratio": dense / ms}
        for spec, ms in times.items()
    ]


# ---- tuning


def parse_table(text: str) -> Table:
    """The text of torch.ops.kvq_metal.tuning()."""
    found: Table = {}
    for line in text.splitlines():
        rows, _, choices = line.partition(":")
        tile, threadgroups, tokens, matrix = map(int, choices.split(","))
        found[int(rows)] = tile, threadgroups, tokens, matrix
    return found


def format_table(entries: Table) -> str:
    return "".join(f"{rows}:{','.join(map(str, entry))}\n" for rows, entry in entries.items())


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """Finds the best entry for each number of rows, saves the table and leaves it in force."""
    metal = torch.ops.kvq_metal
    entries = parse_table(metal.tuning())
    tried: list[dict[str, Any]] = []
    with Progress(len(entries)) as progress:
        for rows in entries:
            progress.stage(f"{rows} rows" if rows < ALL_ROWS else "prefill")
            entries[rows] = best_entry(args, rows, entries[rows], tried)
            progress.advance()
    metal.set_tuning(format_table(entries))
    path = Path(metal.tuning_file())
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(f"# {metal.device_name()}\n{format_table(entries)}")
    scratch.replace(path)
    return {"tuning": format_table(entries), "file": str(path), "tried": tried}


def best_entry(
    args: argparse.Namespace, rows: int, start: Entry, tried: list[dict[str, Any]]
) -> Entry:
    """Tries kernels and their rows, then numbers of threadgroups, then lengths of splits."""
    served = min(rows, 32)
    queries = max(1, served // 8)
    query = random(args, "mps", args.batch, args.kv_heads * (served // queries), queries)
    calls = [packed_call(args, "mps", args.formats[0], query, tokens) for tokens in args.tokens]

    def seconds(entry: Entry) -> float:
        torch.ops.kvq_metal.set_tuning(format_table({rows: entry}))
        times = time_in_turn({str(i): call for i, call in enumerate(calls)}, "mps", args.repeats)
        # Every length counts alike, in proportion.
        score = statistics.geometric_mean(times.values())
        tried.append({"rows": rows, "entry": entry, "ms": score})
        return score

    def fastest(candidates: Iterable[Entry]) -> Entry:
        return min(dict.fromkeys(candidates), key=seconds)

    tile, threadgroups, tokens, _ = start
    tiles = [(n, 0) for n in (1, 2, 4, 8) if n <= served] + ([(0, 0)] if served >= 8 else [])
    tiles += [(tile, n) for n in (8, 16) if n <= max(8, served)]
    tile, _, _, matrix = fastest((n, threadgroups, tokens, m) for n, m in tiles)
    _, threadgroups, _, _ = fastest((tile, n, tokens, matrix) for n in THREADGROUPS)
    return fastest((tile, threadgroups, n, matrix) for n in SPLIT_TOKENS)


def describe(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"One decode step on {found['device']}: {args.heads} query heads, {args.kv_heads} KV "
        f"heads, head size {args.head_dim}, batch {args.batch}, {args.dtype}",
        table(
            ("format of K/V", "tokens", "ms", "dense ms", "times faster"),
            [
                (
                    row["format"],
                    str(row["tokens"]),
                    f"{row['ms']:.3f}",
                    f"{row['dense_ms']:.3f}",
                    f"{row['ratio']:.2f}",
                )
                for row in found["rows"]
            ],
        ),
    ]
    if "file" in found:
        lines.insert(0, f"Saved to {found['file']}:\n{found['tuning']}")
    return "\n".join(lines)
