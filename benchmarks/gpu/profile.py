"""Executed instructions by Nsight Compute, which runs this script again and sees every launch."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "ptx.py"
INSTRUCTIONS = "smsp__inst_executed.sum"
METRICS = (
    INSTRUCTIONS,
    "gpu__time_duration.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram__bytes.sum",
)


def tool(name: str) -> str | None:
    """Path of ncu or compute-sanitizer."""
    found = shutil.which(name)
    places = [p for root in ("/usr/local", "/opt/nvidia") for p in Path(root).glob(f"*/**/{name}")]
    return found or next((str(p) for p in places if p.is_file()), None)


def counters(arguments: Sequence[str]) -> list[dict[str, float]]:
    """The metrics of every kernel of ours that `ptx.py ARGUMENTS` launches, in order."""
    ncu = tool("ncu")
    if ncu is None:
        raise RuntimeError("ncu (Nsight Compute) is not installed")
    command = [
        ncu, "--clock-control", "none", "--cache-control", "none", "--csv", "--print-units", "base",
        "--metrics", ",".join(METRICS), "--kernel-name", "regex:^kvq_",
        sys.executable, str(SCRIPT), *arguments,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"ncu: {result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return parse_counters(result.stdout)


def parse_counters(output: str) -> list[dict[str, float]]:
    """ncu's CSV: one line per kernel and metric."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, float]] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        metrics = found.setdefault(line["ID"], {"kernel": line["Kernel Name"].partition("(")[0]})
        metrics[line["Metric Name"]] = float(line["Metric Value"].replace(",", ""))
    return list(found.values())
