"""The Metal kernels as PTX on an NVIDIA GPU.

    python benchmarks/ptx.py build --kernels build/ptx     # needs clang-19 and ptxas, no GPU
    python benchmarks/ptx.py run --kernels build/ptx       # needs a GPU, torch and cupy
    python benchmarks/ptx.py sanitize --kernels build/ptx  # and compute-sanitizer

``run`` checks every kernel against the reference, times ops against torch's attention and against
copies, and counts executed instructions with Nsight Compute. torch_kvq need not be built.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
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
        if name == "run":
            command.add_argument("--no-checks", action="store_true", help="time only")
            command.add_argument("--no-counters", action="store_true", help="without ncu")
        if name == "launch":
            command.add_argument("what", choices=("counted", "small"))
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
    if not row["constants"].get("kvq_wide", 1):
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
    """What ncu and compute-sanitizer run."""
    import torch

    from benchmarks.gpu import attention, codecs, q4_k
    from benchmarks.gpu.catalogue import DTYPES
    from benchmarks.gpu.device import Kernels

    kernels = Kernels(args.kernels)
    launched = []
    if args.what == "small":
        launched += [row["kernel"] for row, _ in attention.small_checks(kernels, checked=False)]
        for module in (codecs, q4_k):
            launched += [row["kernel"] for row, _ in module.small_checks(kernels)]
    else:
        dtype = DTYPES[(args.dtypes or ["half"])[0]]
        for row in kernels.rows:
            if is_timed(row, args):
                call, size = codecs.timed_call(kernels, row, 16, 512, GROUPS, 128)
                call()
                launched.append(
                    {"kernel": row["kernel"], "op": row["op"], "nbytes": size,
                     "format": row.get("format") or row.get("k", ""),
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


def run_checks(kernels, args: argparse.Namespace) -> dict:  # type: ignore[no-untyped-def]
    """Every kernel of the build against the reference."""
    from benchmarks.gpu import attention, codecs, q4_k

    checks = {}
    for name, module in (("attention", attention), ("codecs", codecs), ("q4_k", q4_k)):
        begin = time.perf_counter()
        results, wrong = [], []
        try:
            for row, result in module.small_checks(kernels):
                results.append(result)
                if not result["ok"]:
                    wrong.append({"kernel": row["kernel"], "constants": row["constants"], **result})
        except Exception:
            wrong.append({"failed": traceback.format_exc()})
            traceback.print_exc()
        checks[name] = {"kernels": len(results), "wrong": wrong}
        seconds = time.perf_counter() - begin
        print(f"{name}: {len(results)} kernels checked in {seconds:.0f} s", flush=True)
        for each in wrong[:20]:
            print("WRONG", each, flush=True)
    return checks


def run(args: argparse.Namespace) -> int:
    from benchmarks.gpu.device import Kernels, bandwidth, machine

    kernels = Kernels(args.kernels)
    started = time.perf_counter()
    found: dict = {"machine": machine(), "bandwidth": bandwidth()}
    print(json.dumps(found), flush=True)
    if not args.no_checks:
        found["checks"] = run_checks(kernels, args)
    if not args.op or set(args.op) - {"attention"}:
        found["codecs"] = run_codecs(kernels, args)
    if not args.op or "q4_k_gemv" in args.op:
        from benchmarks.gpu import q4_k

        found["q4_k"] = list(q4_k.measure(kernels, found["bandwidth"]["read_gbps"]))
        for result in found["q4_k"]:
            share = 100 * result["of_read"]
            print(f"{result['kernel']} {result['us']:7.1f} us {share:4.0f} % of read", flush=True)
    wanted = set(args.op or ("attention",))
    if "attention" in wanted:
        found["attention"] = run_attention(kernels, args)
    if not args.no_counters:
        try:
            found["instructions"] = count_instructions(args)
        except Exception:
            found["instructions_failed"] = traceback.format_exc()
            traceback.print_exc()
    found["registers"] = registers(kernels.rows)
    found["seconds"] = time.perf_counter() - started
    print(summary(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    checks = found.get("checks", {}).values()
    return 1 if any(check["wrong"] for check in checks) else 0


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
    """Attention as one table: times faster than torch's best, and instructions a packed byte."""
    counted = {
        (row["format"], row["heads_per_kv_head"], row["queries"], row["kernel"]): row
        for row in found.get("instructions", [])
        if row["op"] == "attention"
    }
    lines = ["format          B      T  H/G  L   times dense  instructions/byte  registers"]
    for row in found.get("attention", []):
        if "us" not in row:
            continue
        key = row["format"], row["heads_per_kv_head"], row["queries"], row["kernel"]
        per_byte = counted.get(key, {}).get("instructions_per_byte")
        lines.append(
            f"{row['format']:14s} {row['batch']:2d} {row['tokens']:6d} "
            f"{row['heads_per_kv_head']:4d} {row['queries']:2d} {row['ratio']:13.2f} "
            f"{per_byte if per_byte is None else round(per_byte, 1)!s:>18} {row['registers']:10d}"
        )
    return "\n".join(lines)


def sanitize(args: argparse.Namespace) -> int:
    from benchmarks.gpu import profile

    results = [
        profile.sanitize(name, ["launch", "small", "--kernels", str(args.kernels)])
        for name in ("memcheck", "racecheck")
    ]
    for result in results:
        print(f"{result['tool']}: {result['kernels']} kernels, {result['errors']} errors")
        if not result["clean"]:
            print(result["output"])
    if args.out:
        found = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps({**found, "sanitizer": results}, indent=1))
    return 0 if all(r["clean"] for r in results) else 1


def main() -> int:
    use_without_library()
    args = parser().parse_args()
    return {"build": build, "run": run, "sanitize": sanitize, "launch": launch}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
