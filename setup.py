"""Builds torch_kvq/_C: schemas, CPU kernels once per instruction set, MPS host code on macOS."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "torch_kvq builds against the PyTorch you run: install torch first "
        "(pip install torch==2.13.0), then pip install --no-build-isolation torch_kvq"
    )

MACOS = sys.platform == "darwin"
X86 = platform.machine().lower() in ("x86_64", "amd64")
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
# One rounding per written operation: codes must not depend on the compiler (reference.py).
KERNEL_FLAGS = [
    *CXX_FLAGS, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512",
]  # fmt: skip
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"],
}


def compiler_accepts(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"", capture_output=True).returncode == 0


def metal_compiler() -> Callable[[str], bytes] | None:
    """Makes a metallib of Metal source, where Apple's Metal tool chain is installed.

    Without it, or with KVQ_METALLIB=0, the sources are compiled at first use.
    """
    metal = ["xcrun", "--sdk", "macosx", "metal"]
    if os.environ.get("KVQ_METALLIB") == "0" or not shutil.which("xcrun"):
        return None
    if subprocess.run([*metal, "--version"], capture_output=True).returncode != 0:
        return None

    def compile_metal(source: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "kernels.metal", Path(folder) / "kernels.metallib"
            given.write_text(source)
            # As runtime.mm's compile options: the kernels' results must not depend on the way.
            flags = ["-std=metal3.1", "-mmacosx-version-min=14.0", "-fno-fast-math"]
            subprocess.run([*metal, *flags, str(given), "-o", str(made)], check=True)
            return made.read_bytes()

    return compile_metal


def embed_metal(output: Path) -> None:
    """Writes the header from which csrc/mps/runtime.mm takes its Metal libraries."""
    spec = importlib.util.spec_from_file_location("embed", ROOT / "metal" / "embed.py")
    embed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(embed)
    embed.embed(ROOT / "metal", output, compile_metal=metal_compiler())


class Build(BuildExtension):
    """Compiles csrc/cpu/kernels once per instruction set, then the rest as usual.

    On macOS it first embeds the Metal kernels in a generated header.
    """

    def build_extensions(self) -> None:
        compiler = self.cxx()
        if shutil.which(compiler[0]) is None:
            sys.exit(
                f"torch_kvq needs a C++20 compiler and found no {compiler[0]!r}: install g++ "
                "(apt install g++), or on macOS the command line tools (xcode-select --install)"
            )
        super().build_extensions()

    def cxx(self) -> list[str]:
        return list(getattr(self.compiler, "compiler_cxx", None) or ["c++"])

    def build_extension(self, ext) -> None:
        compiler = self.cxx()
        sets = {"baseline": []}
        if X86:
            sets |= {
                name: flags
                for name, flags in INSTRUCTION_SETS.items()
                if compiler_accepts(compiler[:1], flags)
            }
        folder = ROOT / "csrc/cpu/kernels"
        kernels = sorted(str(p.relative_to(ROOT)) for p in folder.glob("*.cpp"))
        for name, flags in sets.items():
            ext.extra_objects += self.compiler.compile(
                kernels,
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=[str(ROOT / "csrc")],
                extra_postargs=[*KERNEL_FLAGS, f"-DKVQ_ISA={name}", *flags],
            )
        ext.define_macros += [(f"KVQ_HAVE_{n.upper()}", "1") for n in sets if n != "baseline"]
        if MACOS:
            generated = Path(self.build_temp).resolve() / "generated"
            embed_metal(generated / "metal_libraries.h")
            ext.include_dirs.append(str(generated))
        super().build_extension(ext)


def sources() -> list[str]:
    found = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    if MACOS:
        found += ROOT.glob("csrc/mps/*.mm")
    return sorted(str(p.relative_to(ROOT)) for p in found)


openmp = [] if MACOS else ["-fopenmp"]
frameworks = ["-framework", "Metal", "-framework", "Foundation"] if MACOS else []
setup(
    ext_modules=[
        CppExtension(
            "torch_kvq._C",
            sources(),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=[*CXX_FLAGS, *openmp],
            extra_link_args=[*openmp, *frameworks],
        )
    ],
    cmdclass={"build_ext": Build},
)
