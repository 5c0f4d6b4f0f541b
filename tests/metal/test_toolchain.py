"""Flattening, the cache, the command line, the C ABI, and PTX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from . import emulator, requirements, toolchain

SAMPLES = Path(__file__).parent / "samples"
SCRIPT = Path(__file__).parent / "toolchain.py"
SMALL = """#include <metal_stdlib>
using namespace metal;
kernel void twice(device float* y [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  y[t] *= 2.0f;
}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "include" / "deep").mkdir(parents=True)
    (tmp_path / "include" / "deep" / "a.h").write_text(
        "#pragma once\n#include <deep/b.h>\nconstant uint A = B + 1;\n"
    )
    (tmp_path / "include" / "deep" / "b.h").write_text("#pragma once\nconstant uint B = 1;\n")
    (tmp_path / "near.h").write_text("constant uint C = A + B;\n")
    (tmp_path / "k.metal").write_text(
        '#include <metal_stdlib>\n#include <deep/a.h>\n#include <deep/b.h>\n#include "near.h"\n'
        "using namespace metal;\nkernel void k(device uint* y [[buffer(0)]]) {\n  y[0] = C;\n}\n"
    )
    return tmp_path


def test_flatten_gives_one_source(tree: Path) -> None:
    source = toolchain.flatten(tree / "k.metal", [tree / "include"])
    assert source.count("constant uint B = 1;") == 1
    assert "deep/" not in source and "#include <metal_stdlib>" in source and str(tree) not in source
    y = np.zeros(1, np.uint32)
    emulator.load(source).launch("k", 1, 1, [y])
    assert y[0] == 3


def test_messages_have_lines_of_the_files(tree: Path) -> None:
    (tree / "near.h").write_text("constant uint C = A + unknown;\n")
    with pytest.raises(toolchain.CompileError, match=r"near\.h:1:.*unknown"):
        toolchain.compile_library(toolchain.flatten(tree / "k.metal", [tree / "include"]))


def test_cache_is_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQ_EMU_CACHE", str(tmp_path))
    first = toolchain.compile_library(SMALL)
    written = first.stat().st_mtime_ns
    assert toolchain.compile_library(SMALL) == first and first.stat().st_mtime_ns == written
    others = {toolchain.compile_library(SMALL + "\n"), toolchain.compile_library(SMALL, "race")}
    others.add(toolchain.compile_library(SMALL, defines={"X": "1"}))
    assert first not in others and len(others) == 3 and first.is_relative_to(tmp_path)


def test_macros_and_selection() -> None:
    source = (SAMPLES / "attention.metal").read_text()
    assert emulator.load(source, only="half").kernels == ["attention_half"]
    text = SMALL.replace("2.0f", "FACTOR")
    y = np.ones(4, np.float32)
    emulator.load(text, defines={"FACTOR": "5.0f"}).launch("twice", 1, 4, [y])
    assert (y == 5).all()


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        toolchain.compile_library(SMALL, "slow")


def script(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], input=text, capture_output=True, text=True
    )


def test_command_line(tmp_path: Path) -> None:
    """What the software Metal device runs: from any folder, given one source."""
    (tmp_path / "s.metal").write_text(SMALL)
    out = tmp_path / "s.so"
    result = script(
        "compile", "--mode", "fast", "--source", str(tmp_path / "s.metal"), "--out", str(out)
    )
    assert result.returncode == 0, result.stderr
    library = emulator.Library(out)
    assert library.kernels == ["twice"] and library.mode == "fast"
    assert script("list", "--source", "-", text=SMALL).stdout.split() == ["twice"]
    assert script("check", "--source", "-", text=SMALL).returncode == 0
    broken = script(
        "compile", "--source", "-", "--out", str(out), text=SMALL.replace("y[t]", "z[t]")
    )
    assert broken.returncode == 1 and "use of undeclared identifier 'z'" in broken.stderr


def test_header_is_c(tmp_path: Path) -> None:
    """emu.h is used from Objective-C++ and must stay C."""
    (tmp_path / "a.c").write_text(
        '#include "emu.h"\nint main(void) { return sizeof(emu_launch) == 0; }\n'
    )
    command = [
        requirements.clang().replace("clang++", "clang"),
        "-std=c11",
        "-Wall",
        "-Werror",
        "-fsyntax-only",
    ]
    subprocess.run([*command, "-I", str(SCRIPT.parent / "emu"), str(tmp_path / "a.c")], check=True)


def test_abi_matches_python() -> None:
    """The structures of emulator.py have the sizes of emu.h."""
    names = {
        "emu_param": "_Param",
        "emu_kernel": "_Kernel",
        "emu_buffer": "_Buffer",
        "emu_launch": "_Launch",
        "emu_api": "_Api",
    }
    import ctypes

    checks = "".join(
        f'_Static_assert(sizeof({c}) == {ctypes.sizeof(getattr(emulator, p))}, "");\n'
        for c, p in names.items()
    )
    command = [
        requirements.clang().replace("clang++", "clang"),
        "-x",
        "c",
        "-fsyntax-only",
        "-I",
        str(SCRIPT.parent / "emu"),
        "-",
    ]
    subprocess.run(command, input='#include "emu.h"\n' + checks, text=True, check=True)


@pytest.mark.parametrize("sample", ["faults", "features", "attention"])
def test_ptx_of_samples(sample: str) -> None:
    source = toolchain.flatten(SAMPLES / f"{sample}.metal")
    ptx = toolchain.compile_ptx(source)
    for instance in toolchain.kernels(source).instances:
        assert f".entry {instance.id}(" in ptx


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_shim_and_runtime_compile_for(machine: str, tmp_path: Path) -> None:
    """The other machine's code generation; the runtime needs that machine's system headers, so
    its assembly only."""
    flags = [
        f"--target={machine}-linux-gnu",
        "-std=c++17",
        "-fsigned-char",
        "-nostdinc",
        "-w",
        "-O1",
        "-c",
        "-x",
        "c++",
    ]
    flags += ["-mf16c"] if machine == "x86_64" else []
    translation = toolchain.kernels((SAMPLES / "features.metal").read_text())
    (tmp_path / "k.cpp").write_text(translation.text.replace("blocks[t]", "msl_flat(blocks[t])"))
    swap = f'typedef unsigned long uintptr_t;\n#include "{SCRIPT.parent}/emu/runtime/swap.h"\n'
    (tmp_path / "swap.cpp").write_text(swap)
    subprocess.run(
        [requirements.clang(), *flags, str(tmp_path / "swap.cpp"), "-o", str(tmp_path / "s.o")],
        check=True,
    )
    kernels = (SAMPLES / "attention.metal").read_text()
    (tmp_path / "k.cpp").write_text(toolchain.kernels(kernels).text)
    command = [
        requirements.clang(),
        *flags,
        "-include",
        str(toolchain.SHIM),
        str(tmp_path / "k.cpp"),
    ]
    subprocess.run([*command, "-o", str(tmp_path / "k.o")], check=True)


MEETING = """#include <metal_stdlib>
using namespace metal;
kernel void meet(device uint* y [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  threadgroup uint seen[256];
  seen[t] = t;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = seen[255 - t];
}
"""


def test_many_libraries_fit_into_one_process(tmp_path: Path) -> None:
    """Guard pages are mappings: the libraries of a process share one pool of stacks."""
    built = toolchain.compile_library(MEETING)
    script = tmp_path / "many.py"
    script.write_text(
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from tests.metal import emulator\n"
        "def mappings():\n"
        "    return len(Path('/proc/self/maps').read_text().splitlines())\n"
        "counts = []\n"
        "for path in sys.argv[1:]:\n"
        "    y = np.zeros(256, np.uint32)\n"
        "    emulator.Library(Path(path)).launch('meet', 1, 256, buffers={0: y})\n"
        "    assert (y == np.arange(256)[::-1]).all()\n"
        "    counts.append(mappings())\n"
        "print((counts[-1] - counts[0]) / (len(counts) - 1))\n"
    )
    copies = [tmp_path / f"{i}.so" for i in range(12)]
    for copy in copies:
        copy.write_bytes(built.read_bytes())
    result = subprocess.run(
        [sys.executable, str(script), *map(str, copies)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 40
