"""Every kernel once on small shapes, by several processes at a time, each with its share;
under compute-sanitizer, or not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .profile import SCRIPT, tool

#: (index, count): the kernels whose number is index modulo count.
Share = tuple[int, int]
WHOLE: Share = (0, 1)


def is_in(number: int, share: Share) -> bool:
    return number % share[1] == share[0]


def rows_of(kernels, share: Share, ops: list[str] | None) -> Iterator[tuple[int, dict]]:  # type: ignore[no-untyped-def]
    """A share of the build's rows, or of those of some ops, with their numbers."""
    for number, row in enumerate(kernels.rows):
        if is_in(number, share) and (not ops or row["op"] in ops):
            yield number, row


def small(kernels, share: Share, checked: bool, ops: list[str] | None) -> Iterator[dict]:  # type: ignore[no-untyped-def]
    """Launches a share of the kernels; a row of results each."""
    from . import attention, codecs, q4_k

    for module in (attention, codecs, q4_k):
        for row, result in module.small_checks(kernels, checked, share, ops):
            named = {"kernel": row["kernel"], "constants": row["constants"]}
            yield {**named, **result} if checked else named


def run_share(
    folder: Path, share: Share, checked: bool, ops: list[str] | None, under: list[str]
) -> dict[str, object]:
    """One process: its rows, its output and how it ended."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        command = [*under, sys.executable, str(SCRIPT), "launch", "small"]
        command += ["--kernels", str(folder), "--share", f"{share[0]}/{share[1]}"]
        command += ["--out", str(out), *(["--checked"] if checked else [])]
        command += ["--op", *ops] if ops else []
        # Threads of one process would wait for those of the others.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if under:
            # Every tensor is an allocation of its own, whose end memcheck knows.
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        rows = json.loads(out.read_text()) if out.exists() else None
    return {"code": result.returncode, "rows": rows, "output": result.stdout + result.stderr}


def run_shares(
    folder: Path, jobs: int, checked: bool, ops: list[str] | None, under: list[str]
) -> list[dict]:
    with ThreadPoolExecutor(jobs) as pool:
        shares = [(index, jobs) for index in range(jobs)]
        return list(pool.map(lambda s: run_share(folder, s, checked, ops, under), shares))


def check(folder: Path, jobs: int, ops: list[str] | None) -> dict[str, object]:
    """Every kernel of the build against the reference."""
    begin = time.perf_counter()
    rows, wrong = [], []
    for share in run_shares(folder, jobs, True, ops, []):
        if share["rows"] is None:
            wrong.append({"failed": str(share["output"])[-4000:]})
            continue
        rows += share["rows"]
    wrong += [row for row in rows if not row["ok"]]
    seconds = time.perf_counter() - begin
    return {"kernels": len(rows), "wrong": wrong, "seconds": seconds, "rows": rows}


def problems(output: str) -> dict[str, int]:
    """Errors and hazards by kernel, from compute-sanitizer's report."""
    found: dict[str, int] = {}
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    total = sum(int(a or b) for a, b in summaries)
    for line in output.splitlines():
        if match := re.search(r"^=========.*\bat (kvq_\w+)", line):
            found[match[1]] = found.get(match[1], 0) + 1
    if total and not found:
        found["unknown"] = total
    return found


def sanitize(folder: Path, name: str, jobs: int, ops: list[str] | None) -> dict[str, object]:
    """memcheck or racecheck over every kernel of the build."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        raise RuntimeError("compute-sanitizer is not installed")
    under = [sanitizer, "--tool", name, "--error-exitcode", "9", "--print-limit", "50"]
    under += ["--kernel-regex", "kns=kvq_"]
    begin = time.perf_counter()
    launched: list[str] = []
    found: dict[str, int] = {}
    failed = []
    for share in run_shares(folder, jobs, False, ops, under):
        output = str(share["output"])
        if share["rows"] is not None:
            launched += [row["kernel"] for row in share["rows"]]
        for kernel, count in problems(output).items():
            found[kernel] = found.get(kernel, 0) + count
        if share["code"] or share["rows"] is None or "SUMMARY" not in output:
            failed.append(output[-4000:])
    return {
        "tool": name, "kernels": len(launched), "names": sorted(set(launched)), "problems": found,
        "clean": not failed and not found and bool(launched), "failed": failed,
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip
