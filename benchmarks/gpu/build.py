"""``build``: .metal files to cubins, and a manifest of the kernels in them."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from tests.metal import requirements, toolchain
from torch_kvq.formats import FLOAT_DTYPES

from .catalogue import DTYPE_NAMES, METAL, Unit, attention_units, codec_units

MANIFEST = "manifest.json"
#: Limits of registers, and the bytes that may spill under each. A kernel gets the first that holds:
#: ptxas, left alone, takes more than it needs, and fewer let more threadgroups share a
#: multiprocessor, of decode with 128 four, with the others three.
DECODE_REGISTERS = ((128, 4), (160, 4), (168, 32))
MATRIX_REGISTERS = ((160, 4), (168, 32))
CODEC_REGISTERS = ((64, 0), (72, 0), (80, 0), (96, 0))
#: Left alone, ptxas moves the vector product's loads to their uses to save registers.
Q4_K_REGISTERS = ((128, 0),)
CODECS = {"affine", "append", "dense", "fp8", "gguf", "hadamard", "turboquant"}
#: For all but attention: LLVM takes vector loads whose elements are used one by one apart, which
#: ptxas cannot join again and Apple's GPUs would load whole.
WHOLE_LOADS = ("-mllvm", "-disable-vector-combine")
#: Libraries whose kernels the host instantiates on demand.
TEMPLATES = {"attention_decode", "attention_matrix", "attention_prefill"}


def all_units(
    pairs: list | None = None,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    other_dims: bool = True,
) -> Iterator[Unit]:
    """Every kernel of metal/: those of the .metal files, and a wide choice of attention's; or of
    some pairs of formats, of some dtypes, of D = 128 only."""
    formats = {str(f).removesuffix("-rot") for pair in pairs or () for f in pair}
    names = {DTYPE_NAMES[dtype] for dtype in dtypes}
    for path in sorted(METAL.glob("*.metal")):
        if path.stem in TEMPLATES:
            continue
        for unit in codec_units(path.stem, host_names(path.stem), pairs):
            if not other_dims and (unit.constants or {}).get("kvq_head_dim", 128) != 128:
                continue
            unit.rows = [
                row
                for row in unit.rows
                if row["dtype"] in names
                and (pairs is None or row.get("format", "q4_k") in formats | {"q4_k"})
            ]
            if unit.rows:
                yield unit
    chosen = {} if pairs is None else {"pairs": pairs}
    yield from attention_units(**chosen, dtypes=dtypes, other_dims=other_dims)  # type: ignore[arg-type]


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
    with mock.patch.object(toolchain, "_PTX_FLAGS", [*toolchain._PTX_FLAGS, *extra_flags(unit)]):
        return toolchain.compile_ptx(
            source_of(unit), arch, only=f"^({only})$", constants=unit.constants, line_tables=False
        )


def extra_flags(unit: Unit) -> tuple[str, ...]:
    return () if unit.library.startswith("attention") else WHOLE_LOADS


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
    """Those that are worth trying: attention of more rows needs more registers than any allows."""
    rows = {row.get("rows") for row in unit.rows}
    if unit.library in CODECS:
        return CODEC_REGISTERS
    if unit.library == "q4_k":
        return Q4_K_REGISTERS
    if unit.library == "attention_decode" and rows == {1}:
        return DECODE_REGISTERS
    return MATRIX_REGISTERS if unit.library == "attention_matrix" and rows == {8} else ()


def assemble(unit: Unit, out: Path, arch: str) -> list[dict]:
    """Writes the unit's cubin, unless it is there, and returns its rows of the manifest."""
    kernels = " ".join(str(row["kernel"]) for row in unit.rows)
    limits = register_limits(unit)
    name = toolchain._digest(
        toolchain._toolchain_id(),
        source_of(unit),
        repr(unit.constants),
        kernels,
        arch,
        repr((limits, extra_flags(unit))),
    )
    report = out / f"{name}.json"
    found: dict[str, dict] = json.loads(report.read_text()) if report.exists() else {}
    if not (found and all((out / usage["cubin"]).exists() for usage in found.values())):
        found = {}
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            source, target = Path(scratch) / "unit.ptx", Path(scratch) / "unit.cubin"
            source.write_text(ptx(unit, arch))
            missing = [str(row["kernel"]) for row in unit.rows]
            for limit, most in (*limits, (0, 0)):
                options = [f"--entry={','.join(missing)}"]
                options += [f"--maxrregcount={limit}"] if limit else []
                log = usage(_ptxas(unit, source, target, arch, *options))
                cubin = f"{name}-{limit}.cubin"
                fitting = {k: log[k] for k in missing if not limit or log[k]["spilled"] <= most}
                if fitting:
                    target.replace(out / cubin)
                found |= {k: {**v, "cubin": cubin} for k, v in fitting.items()}
                missing = [k for k in missing if k not in fitting]
                if not missing:
                    break
        report.write_text(json.dumps(found))
    return [{**row, "library": unit.library, **found[str(row["kernel"])]} for row in unit.rows]


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
    return rows
