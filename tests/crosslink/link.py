"""Compiles csrc for macOS arm64 and links it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .stubs import write_stubs
from .wheel import CACHE, Unavailable, unpacked

ROOT = Path(__file__).resolve().parents[2]
SOFTMETAL = ROOT / "tests" / "softmetal"
TARGET = ["-target", "aarch64-macos.14.0"]
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g0",
    "-fblocks",
    "-fvisibility=hidden",
    "-fno-sized-deallocation",
    # Use of libc++ as on a Mac: nothing that macOS 14's libc++.dylib does not have yet.
    "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS",
    "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
    "-Wall",
    "-Werror=objc-method-access",
    "-Werror=incompatible-pointer-types",
]
MAX_JOBS = 2


class LinkError(RuntimeError):
    """The compiler or the linker refused; the message is its own."""


def zig(arguments: Sequence[str]) -> None:
    # zig caches objects by content itself.
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(CACHE / "zig")}
    command = [sys.executable, "-m", "ziglang", "c++", *TARGET, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise LinkError(f"{' '.join(command)}\n{done.stderr}")


class MacBuild:
    """A build folder with torch's macOS headers and dylibs and Apple's stubs at hand."""

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("ziglang") is None:
            raise Unavailable("ziglang is missing (pip install ziglang)")
        self.torch = unpacked()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.stubs = folder / "stubs"
        write_stubs(self.dylibs(), self.stubs)

    def dylibs(self) -> list[Path]:
        names = ("c10", "torch_cpu", "torch_python")
        return [self.torch / "lib" / f"lib{name}.dylib" for name in names]

    def compile(self, source: Path, flags: Sequence[str] = ()) -> Path:
        name = "-".join(source.relative_to(source.anchor).parts[-3:])
        output = self.folder / f"{name}.o"
        include = [ROOT / "csrc", SOFTMETAL / "include" / "frameworks"]
        system = [
            self.torch / "include",
            self.torch / "include" / "torch" / "csrc" / "api" / "include",
            Path(sysconfig.get_path("include")),
        ]
        arguments = [*FLAGS, *flags, *(f"-I{path}" for path in include)]
        for path in system:
            arguments += ["-isystem", str(path)]
        language = "objective-c++" if source.suffix == ".mm" else "c++"
        zig([*arguments, "-x", language, "-c", str(source), "-o", str(output)])
        return output

    def compile_all(self, sources: Sequence[tuple[Path, Sequence[str]]]) -> list[Path]:
        with ThreadPoolExecutor(MAX_JOBS) as pool:
            return list(pool.map(lambda item: self.compile(*item), sources))

    def link(self, objects: Sequence[Path], name: str = "_C.so") -> Path:
        output = self.folder / name
        inputs = [*objects, *self.dylibs(), *self.stubs.glob("*.tbd")]
        flags = ["-shared", "-nostdlib++", f"-F{self.stubs}"]
        flags += ["-framework", "Metal", "-framework", "Foundation"]
        zig([*flags, *map(str, inputs), "-o", str(output)])
        return output
