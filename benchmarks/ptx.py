"""The Metal kernels as PTX on an NVIDIA GPU.

    python benchmarks/ptx.py build --jobs 2                # needs clang-19 and ptxas, no GPU
    python benchmarks/ptx.py run --out gpu.json            # needs a GPU, torch and cupy
    python benchmarks/ptx.py sanitize --out gpu.json       # and compute-sanitizer

``run`` checks every kernel against the reference, times ops against torch's attention and against
copies, and counts executed instructions with Nsight Compute; ``--phases`` and ``--op`` choose a
part. Results are added to those that the file has, so that parts may run one after another.
``sanitize`` launches every kernel under memcheck and racecheck. torch_kvq need not be built.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use_without_library() -> None:
    """Makes torch_kvq's plain modules importable where its library is not built."""
    sys.path.insert(0, str(ROOT))
    if "torch_kvq" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("torch_kvq", None, is_package=True)
        spec.submodule_search_locations = [str(ROOT / "torch_kvq")]
        sys.modules["torch_kvq"] = importlib.util.module_from_spec(spec)


#: Head counts per KV head, and (batch, tokens), of the timed decode steps.
REPEATS = (1, 4, 8)
SIZES = ((16, 16384), (1, 131072))
GROUPS = 8
#: Query tokens of a timed step; several with MULTI_QUERY only, unless formats are named.
QUERIES = (1, 4, 8)
MULTI_QUERY = ("int4-g64",)
PHASES = ("checks", "codecs", "q4_k", "attention", "counters")
TOOLS = ("memcheck", "racecheck")
#: Formats of K and V that are timed.
TIMED = ("int8-g64", "int4-g64", "int4-g64-rot", "tq4", "fp8_e4m3-g64", "q8_0", "q4_0")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name in ("build", "run", "sanitize", "launch"):
        command = commands.add_parser(name)
        command.add_argument("--kernels", type=Path, default=ROOT / "build" / "ptx", metavar="DIR")
        command.add_argument(
            "--formats", nargs="+", metavar="F", help="of K and V alike, or K/V; default: all"
        )
        command.add_argument("--dtypes", nargs="+", choices=("float", "half", "bfloat"))
        if name == "build":
            command.add_argument("--jobs", type=int, default=1)
            command.add_argument("--arch", default="sm_90")
            command.add_argument("--no-other-dims", action="store_true", help="D = 128 only")
        else:
            command.add_argument("--op", nargs="+", help="default: all")
            command.add_argument("--repeats", nargs="+", type=int, default=list(REPEATS))
            command.add_argument("--queries", nargs="+", type=int, default=list(QUERIES))
            command.add_argument("--out", type=Path, metavar="JSON")
        if name in ("run", "sanitize"):
            command.add_argument(
                "--jobs", type=int, default=os.cpu_count(), help="processes of small launches"
            )
        if name == "run":
            command.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
        if name == "sanitize":
            command.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
        if name == "launch":
            command.add_argument("what", choices=("counted", "small"))
            command.add_argument("--share", default="0/1", metavar="I/N")
            command.add_argument("--checked", action="store_true")
    return top


def build(args: argparse.Namespace) -> int:
    from benchmarks.gpu import build as builder
    from benchmarks.gpu.catalogue import DTYPES
    from torch_kvq.formats import FLOAT_DTYPES, KVFormat

    pairs = None
    if args.formats:
        split = [(f.partition("/")[0], f.partition("/")[2] or f) for f in args.formats]
        pairs = [(KVFormat.parse(k), KVFormat.parse(v)) for k, v in split]
    dtypes = [DTYPES[d] for d in args.dtypes] if args.dtypes else FLOAT_DTYPES
    units = builder.all_units(pairs, dtypes=dtypes, other_dims=not args.no_other_dims)
    rows = builder.build(units, args.kernels, arch=args.arch, jobs=args.jobs)
    spilling = [row for row in rows if row.get("spilled")]
    wide = [row for row in rows if row["registers"] > 128]
    print(f"{len(rows)} kernels; {len(wide)} use more than 128 registers, {len(spilling)} spill")
    for row in sorted(wide, key=lambda r: -r["registers"])[:20]:
        print(f"{row['registers']:4d} registers, {row['spilled']:4d} B spilled  {row['kernel']}")
    return 0


def attention_cases(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    """(format, repeat, queries) of the timed attention rows."""
    for fmt in args.formats or TIMED:
        for repeat in args.repeats:
            for queries in args.queries:
                if queries == 1 or args.formats or fmt in MULTI_QUERY:
                    yield fmt, repeat, queries


def run_attention(kernels, args: argparse.Namespace) -> list[dict]:  # type: ignore[no-untyped-def]
    """Times attention against torch's best."""
    import torch

    from benchmarks.gpu import attention
    from benchmarks.gpu.catalogue import DTYPES

    dtype = DTYPES[(args.dtypes or ["half"])[0]]
    rows, dense = [], {}
    for batch, tokens in SIZES:
        for fmt, repeat, queries in attention_cases(args):
            shape = attention.Shape(batch, GROUPS * repeat, GROUPS, queries, tokens)
            named = {
                "op": "attention", "format": fmt, "dtype": str(dtype)[6:], "batch": batch,
                "tokens": tokens, "heads_per_kv_head": repeat, "queries": queries,
            }  # fmt: skip
            try:
                key = batch, tokens, repeat, queries
                if key not in dense:
                    dense[key] = attention.best_dense(shape)
                k, _, v = fmt.partition("/")
                ours = attention.measure(kernels, attention.Case(k, v or k, dtype, shape))
                ratio = dense[key]["us"] / ours["us"]
                rows.append({**named, **ours, "dense": dense[key], "ratio": ratio})
                print(
                    f"{fmt:14s} B={batch:<3d} T={tokens:<7d} H/G={repeat} L={queries}: "
                    f"{ours['us']:7.1f} us, {ours['gbps']:5.0f} GB/s, dense {dense[key]['us']:7.1f}"
                    f" us ({dense[key]['by']}), {ratio:5.2f}x, splits {ours['splits']}, "
                    f"{ours['registers']} registers, {'ok' if ours['ok'] else 'WRONG'}",
                    flush=True,
                )
            except Exception:
                rows.append({**named, "ok": False, "failed": traceback.format_exc()})
                print(f"{fmt} B={batch} T={tokens} H/G={repeat} L={queries}: failed", flush=True)
                traceback.print_exc()
            torch.cuda.empty_cache()
    return rows


def is_timed(row: dict, args: argparse.Namespace) -> bool:
    """Whether a codec kernel is among those that are timed: one group size, plain or rotated."""
    if row["dtype"] not in (args.dtypes or ["half"]) or row["op"].startswith(("attention", "q4_k")):
        return False
    if not row["constants"].get("kvq_wide", 1) or row["constants"].get("kvq_head_dim", 128) != 128:
        return False
    if row["op"] == "mlx_native_dequantize" or (args.op and row["op"] not in args.op):
        return False
    if row["op"] == "hadamard":
        return row["constants"]["kvq_signs"] == 1
    if row["op"] == "append":
        return "g32" not in row["k"] and "g128" not in row["k"]
    turbo = row["format"].startswith("tq")
    plain = row["constants"]["kvq_rotate"] == turbo and not row["constants"]["kvq_centre"]
    rotated = row["constants"]["kvq_rotate"] and not row["constants"]["kvq_centre"]
    wanted = plain or (rotated and row["format"] == "int4-g64")
    return wanted and row["format"].partition("-")[2] in ("", "g64")


def run_codecs(kernels, args: argparse.Namespace) -> list[dict]:  # type: ignore[no-untyped-def]
    """Times the kernels of packed rows against copies."""
    from benchmarks.gpu import codecs

    timed = [row for row in kernels.rows if is_timed(row, args)]
    found = []
    for batch, tokens in ((16, 512), (64, 512), (16, 16384)):
        try:
            for result in codecs.measure(kernels, timed, batch, tokens):
                found.append(result)
                rotated = any(v for k, v in result["constants"].items() if k.endswith("rotate"))
                print(
                    f"{result['op']:10s} {result['format']:22s} {'rotated' if rotated else '':7s} "
                    f"B={batch:<3d} L={tokens:<6d} {result['us']:7.1f} us {result['gbps']:5.0f} "
                    f"GB/s {100 * result['of_copy']:4.0f} % of copy, "
                    f"{result['registers']} registers",
                    flush=True,
                )
        except Exception:
            traceback.print_exc()
    return found


def launch(args: argparse.Namespace) -> int:
    """What ncu and compute-sanitizer run, and each process of the checks."""
    import torch

    from benchmarks.gpu import attention, codecs, q4_k, shares
    from benchmarks.gpu.catalogue import DTYPES
    from benchmarks.gpu.device import Kernels

    kernels = Kernels(args.kernels)
    launched = []
    if args.what == "small":
        index, _, count = args.share.partition("/")
        share = int(index), int(count)
        launched += shares.small(kernels, share, args.checked, args.op)
    else:
        dtype = DTYPES[(args.dtypes or ["half"])[0]]
        for row in kernels.rows:
            if is_timed(row, args):
                call, size = codecs.timed_call(kernels, row, 16, 512, GROUPS, 128)
                call()
                launched.append(
                    {"kernel": row["kernel"], "op": row["op"], "nbytes": size,
                     "format": codecs.format_of(row),
                     "constants": row["constants"], "registers": row["registers"]}
                )  # fmt: skip
        for row in kernels.select(op="q4_k_gemv", dtype="half"):
            if not args.op or "q4_k_gemv" in args.op:
                call, size = q4_k.gemv_call(kernels, row)
                call()
                launched.append(
                    {"kernel": row["kernel"], "op": row["op"], "nbytes": size, "format": "q4_k",
                     "constants": row["constants"], "registers": row["registers"]}
                )  # fmt: skip
        for fmt, repeat, queries in attention_cases(args):
            if args.op and "attention" not in args.op:
                break
            shape = attention.Shape(2, GROUPS * repeat, GROUPS, queries, 16384)
            k, _, v = fmt.partition("/")
            case = attention.Case(k, v or k, dtype, shape)
            for row in attention.candidates(kernels, case).values():
                attention.Attention(kernels, row, case, 1)()
                launched.append(
                    {"kernel": row["kernel"], "op": "attention", "nbytes": case.nbytes,
                     "format": fmt,
                     "heads_per_kv_head": repeat, "queries": queries,
                     "registers": row["registers"]}
                )  # fmt: skip
    torch.cuda.synchronize()
    print(f"launched {len(launched)} kernels")
    if args.out:
        args.out.write_text(json.dumps(launched))
    return 0


def count_instructions(args: argparse.Namespace) -> list[dict]:
    """Instructions a packed byte of every kernel that `launch counted` launches."""
    from benchmarks.gpu import profile

    listing = args.kernels.parent / "counted.json"
    arguments = ["launch", "counted", "--kernels", str(args.kernels), "--out", str(listing)]
    arguments += ["--repeats", *map(str, args.repeats), "--queries", *map(str, args.queries)]
    for name in ("formats", "dtypes", "op"):
        if getattr(args, name):
            arguments += [f"--{name}", *getattr(args, name)]
    measured = profile.counters(arguments)
    launched = json.loads(listing.read_text())
    if [m["kernel"] for m in measured] != [row["kernel"] for row in launched]:
        raise RuntimeError("ncu saw other kernels than were launched")
    for row, metrics in zip(launched, measured, strict=True):
        row["counters"] = {k: v for k, v in metrics.items() if k != "kernel"}
        row["instructions_per_byte"] = 32 * metrics[profile.INSTRUCTIONS] / row["nbytes"]
        counters = row["counters"]
        print(
            f"{row['op']} {row['format']:14s} H/G={row.get('heads_per_kv_head', '-')} "
            f"L={row.get('queries', '-')}: "
            f"{row['instructions_per_byte']:5.1f} instructions/byte, "
            f"{counters[profile.METRICS[1]] / 1e3:7.1f} us, warps "
            f"{counters[profile.METRICS[2]]:3.0f} %, issue {counters[profile.METRICS[3]]:3.0f} %, "
            f"{row['registers']} registers  {row['kernel']}",
            flush=True,
        )
    return launched


def run_checks(args: argparse.Namespace, table: dict[str, dict]) -> dict:
    """Every kernel of the build against the reference; adds to the kernels' table."""
    from benchmarks.gpu import shares

    found = shares.check(args.kernels, args.jobs, args.op)
    for row in found.pop("rows"):  # type: ignore[attr-defined]
        mine = table.setdefault(row["kernel"], {})
        mine["checks"] = mine.get("checks", 0) + 1
        mine["ok"] = mine.get("ok", True) and row["ok"]
        for each in row.get("checks", []):
            for name in ("error", "dense_error"):
                mine[name] = max(mine.get(name, 0.0), each[name])
    print(f"{found['kernels']} kernels checked in {found['seconds']:.0f} s", flush=True)
    for each in found["wrong"][:20]:  # type: ignore[index]
        print("WRONG", each, flush=True)
    return found


def read(path: Path | None) -> dict:
    """Results so far."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def run(args: argparse.Namespace) -> int:
    from benchmarks.gpu.device import Kernels, bandwidth, machine

    kernels = Kernels(args.kernels)
    started = time.perf_counter()
    found = read(args.out)
    seconds = found.setdefault("seconds", {})

    def finish(phase: str) -> None:
        nonlocal started
        seconds[phase] = time.perf_counter() - started
        started = time.perf_counter()
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))

    found |= {"machine": machine(), "bandwidth": bandwidth()}
    table = found.setdefault("kernels", {})
    for name, usage in registers(kernels.rows).items():
        table.setdefault(name, {}).update(usage)
    print(json.dumps({name: found[name] for name in ("machine", "bandwidth")}), flush=True)
    finish("bandwidth")
    if "checks" in args.phases:
        for row in table.values():
            row.pop("checks", None)
        found["checks"] = run_checks(args, table)
        finish("checks")
    if "codecs" in args.phases and (not args.op or set(args.op) - {"attention", "q4_k_gemv"}):
        found["codecs"] = run_codecs(kernels, args)
        finish("codecs")
    if "q4_k" in args.phases and (not args.op or "q4_k_gemv" in args.op):
        from benchmarks.gpu import q4_k

        found["q4_k"] = list(q4_k.measure(kernels, found["bandwidth"]["read_gbps"]))
        finish("q4_k")
    if "attention" in args.phases and (not args.op or "attention" in args.op):
        found["attention"] = run_attention(kernels, args)
        finish("attention")
    if "counters" in args.phases:
        try:
            found["instructions"] = count_instructions(args)
        except Exception:
            found["instructions_failed"] = traceback.format_exc()
            traceback.print_exc()
        finish("counters")
    print(summary(found))
    return 1 if found.get("checks", {}).get("wrong") else 0


def registers(rows: list[dict]) -> dict[str, dict]:
    """ptxas's figures of every kernel; the largest where function constants make several."""
    found: dict[str, dict] = {}
    for row in rows:
        names = ("registers", "spilled", "threadgroup_bytes")
        most = found.setdefault(row["kernel"], dict.fromkeys(names, 0))
        for name in names:
            most[name] = max(most[name], row.get(name, 0))
    return found


def summary(found: dict) -> str:
    """Tables of what was timed, with what is asked and instructions a packed byte."""
    from benchmarks.gpu import bars

    counted: dict[tuple, float] = {}
    for row in found.get("instructions", []):
        shape = row.get("heads_per_kv_head"), row.get("queries"), str(row.get("constants"))
        counted[(row["format"], row["kernel"], *shape)] = row["instructions_per_byte"]

    def per_byte(row: dict, *shape: object) -> str:
        value = counted.get((row["format"], row["kernel"], *shape))
        return "-" if value is None else f"{value:.1f}"

    lines = ["op         format                 B      L  of copy  bar         instructions/byte"]
    for row in found.get("codecs", []):
        bar = bars.CODECS.get(row["op"]) if not row["format"].startswith("none") else None
        rotated = any(v for k, v in row["constants"].items() if k.endswith("rotate"))
        lines.append(
            f"{row['op']:10s} {row['format']:13s} {'rotated' if rotated else '':7s}"
            f"{row['batch']:3d} {row['tokens']:6d} "
            f"{row['of_copy']:8.2f}  {bars.verdict(row['of_copy'], bar):12s}"
            f"{per_byte(row, None, None, str(row['constants'])):>6s}"
        )
    for row in found.get("q4_k", []):
        lines.append(
            f"{row['op']} {row['dtype']} {row['shape']}: {row['us']:.1f} us, "
            f"{row['of_read']:.2f} of read, bar {bars.verdict(row['of_read'], bars.Q4_K)}"
        )
    lines.append(
        "format          B      T  H/G  L  times dense  bar        by table  instructions/byte  bar"
    )
    for row in found.get("attention", []):
        if "us" not in row:
            continue
        repeat, queries = row["heads_per_kv_head"], row["queries"]
        count = per_byte(row, repeat, queries, "None")
        bar = bars.INSTRUCTIONS.get((row["format"], repeat)) if queries == 1 else None
        most = "-" if count == "-" else bars.verdict(float(count), bar, at_most=True)
        # What the built-in tuning table's choice gives.
        table = row["ratio"] * row["us"] / row.get("table_us", math.nan)
        lines.append(
            f"{row['format']:14s} {row['batch']:2d} {row['tokens']:6d} {repeat:4d} {queries:2d} "
            f"{row['ratio']:12.2f}  {bars.verdict(row['ratio'], bars.attention(row)):10s} "
            f"{table:8.2f}  {count:>17s}  {most:9s} {row['registers']:4d} registers"
        )
    checks = found.get("checks")
    if checks:
        lines.append(f"{checks['kernels']} kernels checked, {len(checks['wrong'])} wrong")
    return "\n".join(lines)


def sanitize(args: argparse.Namespace) -> int:
    from benchmarks.gpu import shares

    found = read(args.out)
    results = found.setdefault("sanitizer", {})
    table = found.setdefault("kernels", {})
    for name in args.tools:
        result = shares.sanitize(args.kernels, name, args.jobs, args.op)
        for kernel in result.pop("names"):  # type: ignore[attr-defined]
            table.setdefault(kernel, {})[name] = result["problems"].get(kernel, 0)  # type: ignore[attr-defined]
        results[name] = result
        print(
            f"{name}: {result['kernels']} kernels, {result['problems'] or 'no problems'}, "
            f"{'clean' if result['clean'] else 'NOT CLEAN'}, {result['seconds']:.0f} s",
            flush=True,
        )
        for output in result["failed"]:  # type: ignore[attr-defined]
            print(output)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))
    return 0 if all(results[name]["clean"] for name in args.tools) else 1


def main() -> int:
    use_without_library()
    args = parser().parse_args()
    return {"build": build, "run": run, "sanitize": sanitize, "launch": launch}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
