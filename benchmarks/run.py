"""Benchmarks of the ops against their peers, as ratios taken in one run.

    python benchmarks/run.py --op attention --format int4-g64 --peer torch-folded --tokens 16384
    python benchmarks/run.py --op model --peer dynamic-bf16 --tokens 3500 --format int4
    python benchmarks/run.py --list           # the rows of --all, each as a command
    python benchmarks/run.py --all            # results/cpu.json and results/cpu.png
    python benchmarks/run.py --all codec      # one section of them; the others' results are kept

Ours and the peer take turns in one process, and every result that is timed is checked first. A row
has the medians ``ours_ms`` and ``peer_ms``, ``ratio``, peer by ours: above 1 ours is faster, and
``spread``, the distance of the 10th and 90th percentiles by the median, of the wider of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import q4_k
import torch
from cases import DTYPES, OPS, Case
from steps import linear_row, model_row, step_row
from table import LENGTHS, TABLE, rows_of
from timing import interleaved

import torch_kvq
from torch_kvq import KVFormat

RESULTS = Path(__file__).resolve().parent / "results"
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
PEERS = {
    **{op: peers for op, (_, peers) in OPS.items()},
    "step": ("torch-cat",),
    "linear": ("line",),
    "model": ("dynamic-bf16", "dynamic-fp32", "quanto"),
    **q4_k.PEERS,
}


def checked_format(text: str) -> str:
    """A format's name, as it is; ValueError names what is wrong with it."""
    try:
        KVFormat.parse(text)
    except ValueError as reason:
        raise argparse.ArgumentTypeError(str(reason)) from None
    return text


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--op", choices=PEERS, default="attention")
    kind = {"type": checked_format, "metavar": "FORMAT"}
    made.add_argument(
        "--format", default="int4-g64", help="K's format, and V's unless given", **kind
    )
    made.add_argument("--v-format", **kind)
    made.add_argument("--peer", help="; ".join(f"{op}: {', '.join(p)}" for op, p in PEERS.items()))
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--heads", type=int, default=32)
    made.add_argument("--kv-heads", type=int, default=8)
    made.add_argument("--head-dim", type=int, default=128)
    made.add_argument("--tokens", type=int, default=16384)
    made.add_argument("--queries", type=int, default=1)
    made.add_argument("--rows", type=int, default=4096, help="of q4_k weights, N")
    made.add_argument("--columns", type=int, default=4096, help="of q4_k weights, K")
    made.add_argument("--exact", action="store_true", help="q4_k: multiply x as it is")
    made.add_argument("--ragged", action="store_true", help="rows from half to full length")
    made.add_argument("--model", help="folder of --op model's model (KVQ_TEST_MODEL)")
    made.add_argument("--budget", type=float, default=4.0, help="seconds of timing per row")
    made.add_argument("--json", action="store_true", help="one JSON object per row")
    sections = dict(nargs="*", choices=TABLE, metavar="SECTION")
    made.add_argument("--all", **sections, help=f"rows of the results file: {', '.join(TABLE)}")
    made.add_argument("--list", **sections, help="print those rows as commands")
    made.add_argument("--plot", action="store_true", help="draw the plot of the results file again")
    return made


def use_threads(count: int) -> None:
    """One thread: one core for both sides. MLX computes on a thread of its own, and ours would
    come back from waiting for it on a core whose caches know nothing of it."""
    torch.set_num_threads(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(CORES)} if count == 1 else CORES)


def run_row(args: argparse.Namespace) -> dict:
    """One row: build, check, time."""
    peers = PEERS[args.op]
    args.peer = args.peer or peers[0]
    if args.peer not in peers:
        raise SystemExit(f"--op {args.op} has peers {', '.join(peers)}, not {args.peer!r}")
    use_threads(args.threads)
    if args.op in q4_k.PEERS:
        return q4_k.run_row(args)
    row = {
        name: getattr(args, name)
        for name in (
            "op", "format", "v_format", "peer", "dtype", "threads", "batch", "heads", "kv_heads",
            "head_dim", "tokens", "queries",
        )
    }  # fmt: skip
    row["v_format"] = args.v_format or args.format
    nbytes = 0
    if args.op == "linear":
        return row | linear_row(args, DTYPES[args.dtype], [t for t in LENGTHS if t <= args.tokens])
    if args.op == "model":
        row |= model_row(args)
    elif args.op == "step":
        row |= step_row(args, DTYPES[args.dtype])
    else:
        bench = OPS[args.op][0](Case(args), args.peer)
        nbytes = bench.nbytes
        functions = {"ours": bench.ours, "peer": bench.peer}
        row["times"] = interleaved(functions, budget_s=args.budget)
    times = row.pop("times")
    ours, peer = times["ours"], times["peer"]
    row |= {
        "ours_ms": round(ours.median, 5),
        "peer_ms": round(peer.median, 5),
        "ratio": round(peer.median / ours.median, 3),
        "spread": round(max(ours.spread, peer.spread), 3),
    }
    if nbytes:
        row["ours_gb_s"] = round(nbytes / ours.median / 1e6, 2)
    return row


def show(row: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    if row["op"] in q4_k.PEERS:
        q4_k.show(row)
        return
    formats = row["format"] + ("" if row["format"] == row["v_format"] else f"/{row['v_format']}")
    shape = f"B={row['batch']} H={row['heads']}/{row['kv_heads']} D={row['head_dim']}"
    rest = "".join(
        f", {name} {row[name]}"
        for name in ("ours_gb_s", "growth_step_ms", "attention_share", "peer_attention_share")
        if name in row
    )
    print(
        f"{row['op']} {formats} vs {row['peer']}, {shape} T={row['tokens']} L={row['queries']}, "
        f"{row['threads']} threads: {row['ours_ms']:.4g} vs {row['peer_ms']:.4g} ms, ratio "
        f"{row['ratio']:.2f} (spread {row['spread']:.0%}){rest}",
        flush=True,
    )


def command(changes: dict) -> str:
    parts = ["python benchmarks/run.py"]
    for name, value in changes.items():
        option = "--" + name.replace("_", "-")
        parts.append(option if value is True else f"{option} {value}")
    return " ".join(parts)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")


def commit() -> str:
    """What is checked out, with a + where the library's sources differ from it."""
    git = ["git", "-C", str(RESULTS.parents[1])]
    head = [*git, "rev-parse", "--short=10", "HEAD"]
    found = subprocess.run(head, capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "csrc", "torch_kvq"])
    return "unknown" if found.returncode else found.stdout.strip() + "+" * changed.returncode


def run_all(args: argparse.Namespace) -> None:
    """Run the table's rows and put them into the results file in place of their last results."""
    path = RESULTS / "cpu.json"
    results = json.loads(path.read_text())["rows"] if path.exists() else []
    defaults = vars(parser().parse_args([]))
    for section, changes in rows_of(args.all or list(TABLE)):
        given = {**defaults, "budget": args.budget, "model": args.model, **changes}
        try:
            row = {"section": section, **run_row(argparse.Namespace(**given))}
        except (SystemExit, ImportError, OSError) as reason:  # a peer that is not installed
            print(f"left out: {command(changes)}: {reason}", file=sys.stderr, flush=True)
            continue
        row |= {"commit": commit(), "command": command(changes)}
        show(row, args.json)
        results = [r for r in results if r["command"] != row["command"]] + [row]
        machine = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "torch_kvq": torch_kvq.__version__,
            "capability": torch_kvq._C.cpu_isa(),
        }
        lines = ",\n".join(json.dumps(r) for r in results)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(f'{{"machine": {json.dumps(machine)}, "rows": [\n{lines}\n]}}\n')
    plot(results)


def plot(rows: list[dict]) -> None:
    """Time of one layer's decode step against T, log-log: our formats and the dense peers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [r for r in rows if r["section"] == "lengths"]
    if not chosen:
        return
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in chosen:
        if row["peer"] == "torch-folded":
            ours = curves.setdefault(("kvq", row["format"]), [])
            ours.append((row["tokens"], row["ours_ms"]))
        if row["format"] == "int4-g64":
            peer = curves.setdefault(("peer", row["peer"]), [])
            peer.append((row["tokens"], row["peer_ms"]))
    names = {
        "torch-folded": "torch bf16 SDPA, heads folded",
        "torch-gqa": "torch bf16 SDPA, enable_gqa",
        "torch-fp32": "torch fp32 SDPA, enable_gqa",
    }
    figure, axes = plt.subplots(figsize=(7.5, 5))
    for (side, name), points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        style = {"marker": "o"} if side == "kvq" else {"marker": "s", "linestyle": "--"}
        label = f"torch_kvq {name}" if side == "kvq" else names[name]
        axes.loglog(x, y, markersize=4, label=label, **style)
    axes.set_xticks(LENGTHS, [f"{t // 1024}k" for t in LENGTHS], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="tokens in the cache", ylabel="ms, one decode step of one layer, 1 thread")
    axes.set_title("32 query heads, 8 KV heads, head size 128", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "cpu.png", dpi=100)


def main() -> None:
    args = parser().parse_args()
    if args.list is not None:
        for _, changes in rows_of(args.list or list(TABLE)):
            print(command(changes))
    elif args.plot:
        plot(json.loads((RESULTS / "cpu.json").read_text())["rows"])
    elif args.all is not None:
        run_all(args)
    else:
        show(run_row(args), args.json)


if __name__ == "__main__":
    main()
