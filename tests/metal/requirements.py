"""What the emulator needs on the machine. A missing tool skips a test, or fails it under
KVQ_REQUIRE_ALL=1."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path


def require_all() -> bool:
    """Whether a missing tool is a failure: set in CI."""
    return os.environ.get("KVQ_REQUIRE_ALL", "") not in ("", "0")


@functools.cache
def clang() -> str | None:
    """Path of clang++ 19: KVQ_CLANG, else clang++-19 on the PATH."""
    return os.environ.get("KVQ_CLANG") or shutil.which("clang++-19")


#: How to get ptxas.
PTXAS = "pip install nvidia-cuda-nvcc"


@functools.cache
def ptxas() -> str | None:
    """Path of ptxas, which is optional: on the PATH, of a CUDA toolkit, or of PyPI's package."""
    found = shutil.which("ptxas")
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin/ptxas"))
    packages = [p for folder in sys.path for p in Path(folder).glob("nvidia/*/bin/ptxas")]
    return found or next((str(p) for p in (*toolkits[-1:], *packages)), None)


@functools.cache
def addr2line() -> str | None:
    """Path of addr2line (binutils), which turns code offsets in race reports into lines.
    Optional."""
    return shutil.which("addr2line")


@functools.cache
def _has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return all(f" {name}" in flags for name in ("avx2", "f16c", "fma"))


@functools.cache
def missing_for_emulator() -> str | None:
    """Why the emulator cannot run here, or None."""
    if clang() is None:
        return "clang++-19 is not installed (apt-get install clang-19)"
    machine = platform.machine()
    if machine not in ("x86_64", "aarch64") or platform.system() != "Linux":
        return (
            "the Metal emulator runs on Linux on x86-64 or arm64, "
            f"not on {platform.system()} {machine}"
        )
    if machine == "x86_64" and not _has_avx2():
        return "the Metal emulator needs a CPU with AVX2, F16C and FMA"
    return None


@functools.cache
def libclang() -> str | None:
    """Path of the libclang that belongs to clang++-19, for the rules of the strict check on the
    syntax tree."""
    compiler = clang()
    if compiler is None:
        return None
    library = Path(os.path.realpath(compiler)).parent.parent / "lib"
    found = sorted(library.glob("libclang-19.so*")) + sorted(library.glob("libclang.so*"))
    return str(found[0]) if found else None


@functools.cache
def missing_for_strict_check() -> str | None:
    """Why the strict check cannot run here, or None."""
    if clang() is None:
        return missing_for_emulator()
    debian = Path("/usr/lib/python3/dist-packages/clang/cindex.py")
    if importlib.util.find_spec("clang") is None and not debian.exists():
        return "the Python module clang.cindex is missing (apt-get install python3-clang-19)"
    if libclang() is None:
        return "libclang 19 is missing (apt-get install libclang1-19)"
    return None


def require(reason: str | None) -> None:
    """Skips the running test for `reason`, or fails it where everything is required. None
    passes."""
    if reason is None:
        return
    import pytest

    if require_all():
        pytest.fail(f"KVQ_REQUIRE_ALL is set: {reason}", pytrace=False)
    pytest.skip(reason)
