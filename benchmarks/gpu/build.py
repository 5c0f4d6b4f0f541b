"""``build``: .metal files to cubins, and a manifest of the kernels in them."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.metal import requirements, toolchain

from .catalogue import METAL, Unit, attention_units, codec_units

MANIFEST = "manifest.json"
#: Limits of registers, tried in turn: with 128 four threadgroups share a multiprocessor, with the
#: others three, where ptxas, left alone, takes more without need. And the bytes that may spill.
DECODE_REGISTERS = ((128, 4), (160, 4), (168, 32))
MATRIX_REGISTERS = ((160, 4), (168, 32))
#: Libraries whose kernels the host instantiates on demand.
TEMPLATES = {"attention_decode", "attention_matrix", "attention_prefill"}


def all_units(pairs: list | None = None, **attention: object) -> Iterator[Unit]:
    """Every kernel of metal/: those of the .metal files, and a wide choice of attention's."""
    for path in sorted(METAL.glob("*.metal")):
        if path.stem not in TEMPLATES:
            yield from codec_units(path.stem, host_names(path.stem), pairs)
    if pairs is not None:
        attention["pairs"] = pairs
    yield from attention_units(**attention)  # type: ignore[arg-type]


def host_names(library: str) -> list[str]:
    """The kernels that a .metal file instantiates."""
    source = toolchain.flatten(METAL / f"{library}.metal")
    return [instance.host_name for instance in toolchain.kernels(source).instances]


def source_of(unit: Unit) -> str:
    """A unit's Metal source."""
    return toolchain.flatten(METAL / f"{unit.library}.metal") + "\n" + unit.lines


def ptx(unit: Unit, arch: str) -> str:
    """A unit's PTX."""
    only = "|".join(re.escape(str(row["kernel"])) for row in unit.rows)
    return toolchain.compile_ptx(
        source_of(unit), arch, only=f"^({only})$", constants=unit.constants, line_tables=False
    )


def usage(report: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes, stack and shared memory per entry, from ptxas -v."""
    found: dict[str, dict[str, int]] = {}
    entry = properties = ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = match[1]
            found[entry] = {}
        elif match := re.search(r"Function properties for (\w+)", line):
            properties = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            if properties == entry:
                found[entry] |= {"stack": int(match[1]), "spilled": int(match[2])}
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[entry] |= {
                "registers": int(match[1]),
                "threadgroup_bytes": int(shared[1]) if shared else 0,
            }
    return found


def _ptxas(unit: Unit, source: Path, target: Path, arch: str, *options: str) -> str:
    """Assembles a unit; ptxas's report."""
    command = [
        requirements.ptxas(),
        "-v",
        f"-arch={arch}",
        *options,
        str(source),
        "-o",
        str(target),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise toolchain.CompileError(f"{unit.rows[0]['kernel']}: {result.stderr}")
    return result.stderr


def register_limits(unit: Unit) -> tuple[tuple[int, int], ...]:
    """Those that are worth trying: kernels of more rows need more registers than any allows."""
    rows = {row.get("rows") for row in unit.rows}
    if unit.library == "attention_decode" and rows == {1}:
        return DECODE_REGISTERS
    return MATRIX_REGISTERS if unit.library == "attention_matrix" and rows == {8} else ()


def assemble(unit: Unit, out: Path, arch: str) -> list[dict]:
    """Writes the unit's cubin, unless it is there, and returns its rows of the manifest."""
    kernels = " ".join(str(row["kernel"]) for row in unit.rows)
    name = toolchain._digest(
        toolchain._toolchain_id(), source_of(unit), repr(unit.constants), kernels, arch
    )
    cubin, report = out / f"{name}.cubin", out / f"{name}.txt"
    if not (cubin.exists() and report.exists()):
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            source, target = Path(scratch) / "unit.ptx", Path(scratch) / "unit.cubin"
            source.write_text(ptx(unit, arch))
            log = _ptxas(unit, source, target, arch)
            report.write_text(log)
            target.replace(cubin)
            for limit, most in register_limits(unit):
                log = _ptxas(unit, source, target, arch, f"--maxrregcount={limit}")
                if all(kernel["spilled"] <= most for kernel in usage(log).values()):
                    report.write_text(log)
                    target.replace(cubin)
                    break
    found = usage(report.read_text())
    return [
        {**row, "library": unit.library, "cubin": cubin.name, **found[str(row["kernel"])]}
        for row in unit.rows
    ]


def build(units: Iterable[Unit], out: Path, *, arch: str = "sm_90", jobs: int = 1) -> list[dict]:
    """Builds the units into a folder and writes its manifest."""
    missing = requirements.missing_for_emulator()
    if missing or requirements.ptxas() is None:
        raise SystemExit(f"build: {missing or 'no ptxas: ' + requirements.PTXAS}")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    units = list(units)
    # The translation to C++ is Python's work, so that threads would wait for one another.
    with ProcessPoolExecutor(jobs) as pool:
        work = functools.partial(assemble, out=out, arch=arch)
        for number, built in enumerate(pool.map(work, units), 1):
            rows += built
            if sys.stderr.isatty() or number % 25 == 0 or number == len(units):
                print(f"{number}/{len(units)} units, {len(rows)} kernels", file=sys.stderr)
    (out / MANIFEST).write_text(json.dumps({"arch": arch, "kernels": rows}, indent=1))
    used = {row["cubin"] for row in rows}
    for old in out.glob("*.cubin"):
        if old.name not in used:
            old.unlink()
            old.with_suffix(".txt").unlink(missing_ok=True)
    return rows
