"""The tool chain of the Metal emulator: flatten, translate, compile, check.

    python toolchain.py compile --mode fast --source kernels.metal --out kernels.so
    python toolchain.py flatten --source kernels.metal -I include
    python toolchain.py check --source kernels.metal
    python toolchain.py list --source kernels.metal
    python toolchain.py ptx --source kernels.metal --out kernels.ptx

A compiled library has the C ABI of emu/emu.h. Results are cached under KVQ_EMU_CACHE, else
~/.cache/torch_kvq/emu, by the hash of the source, the options and the tool chain itself."""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: become a module of the package that this folder is
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = Path(__file__).resolve().parent.name
    __import__(__package__)

from . import requirements
from .msl.repair import compile_with_repairs
from .msl.translate import Translation, TranslationError, translate

MODES = ("fast", "race", "asan", "fastmath")
HERE = Path(__file__).resolve().parent
SHIM = HERE / "emu" / "shim" / "entry.h"
DEFINES = {
    "__METAL__": "1",
    "__METAL_MACOS__": "1",
    "__METAL_VERSION__": "310",
    "__HAVE_BFLOAT__": "1",
    "__HAVE_SIMDGROUP_MATRIX__": "1",
    "__HAVE_SIMDGROUP_REDUCTION__": "1",
    "__APPLE__": "1",
}
_MACHINE = {"x86_64": ["-mavx2", "-mf16c", "-mfma"], "aarch64": []}
_COMMON = """
    -std=c++17 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-math-errno -fsigned-char -w
    -fno-strict-aliasing -Xclang -cl-single-precision-constant
    -Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none
    """.split()
# Every access becomes a call of the runtime (emu/runtime/access.cpp).
_TRACED = """
    -O1 -ffp-contract=off -gline-tables-only -fsanitize=kernel-address
    -mllvm -asan-instrumentation-with-call-threshold=0 -mllvm -asan-kernel-mem-intrinsic-prefix=1
    """.split()
_NO_CONTRACTION = re.compile(r"^\s*#pragma METAL fp contract\(off\)", re.MULTILINE)
_SAFE_MATH = re.compile(r"^\s*#pragma METAL fp math_mode\(safe\)", re.MULTILINE)
_KERNEL_FLAGS = {
    "fast": "-O2 -ffp-contract=off".split(),
    "fastmath": "-O2 -ffast-math".split(),
    "race": [
        *_TRACED,
        *"-mllvm -asan-opt=0 -mllvm -asan-stack=0 -mllvm -asan-globals=0".split(),
    ],
    "asan": [
        *_TRACED,
        *"-mllvm -asan-stack=1 -mllvm -asan-globals=1 -mllvm -asan-mapping-offset=0".split(),
        *"-mllvm -asan-max-inline-poisoning-size=0 -fsanitize-address-use-after-scope".split(),
        *"-fsanitize=undefined -fno-sanitize=vptr,function,pointer-overflow,null".split(),
    ],
}
_RUNTIME_FLAGS = """
    -std=c++17 -O2 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-strict-aliasing
    """.split()
# Apple's compiler inlines every function.
_PTX_FLAGS = """
    -std=c++17 -O3 -w -nostdinc -nostdinc++ -fsigned-char -mllvm -inline-threshold=100000
    --target=nvptx64-nvidia-cuda -Xclang -target-feature -Xclang +ptx80
    -Xclang -cl-single-precision-constant -S -x c++
    """.split()


class CompileError(Exception):
    """A source does not compile. The message is the compiler's, with lines of the .metal files."""


# ---- sources


def flatten(path: str | Path, include_dirs: Iterable[str | Path] = ()) -> str:
    """One self-contained source: every include that is found is put in its place, once where it
    says #pragma once.

    Includes that are not found (<metal_stdlib> and the like) stay.
    """
    return flatten_text(Path(path).read_text(), path, include_dirs)


def flatten_text(text: str, path: str | Path, include_dirs: Iterable[str | Path] = ()) -> str:
    """`flatten` of a text that stands for the file at `path`."""
    return _flatten(text, Path(path), [Path(d) for d in include_dirs], set())


_INCLUDE = re.compile(r'[ \t]*#[ \t]*(?:include|import)[ \t]*([<"])([^>"]+)[>"]')


def _flatten(text: str, path: Path, include_dirs: Sequence[Path], once: set[Path]) -> str:
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(text.splitlines(), 1):
        match = _INCLUDE.match(line)
        if re.match(r"\s*#\s*pragma\s+once\b", line):
            once.add(path.resolve())
            lines.append("")
            continue
        found = None
        if match:
            folders = ([path.parent] if match.group(1) == '"' else []) + list(include_dirs)
            found = next(
                (d / match.group(2) for d in folders if (d / match.group(2)).is_file()), None
            )
        if found is None:
            lines.append(line)
            continue
        if found.resolve() not in once:
            lines.append(_flatten(found.read_text(), found, include_dirs, once))
        lines.append(f'#line {number + 1} "{path.name}"')
    return "\n".join(lines)


def preprocess(source: str, defines: Mapping[str, str] | None = None) -> str:
    """Expands macros. Metal's own headers are taken out: the shim defines what they do."""
    source = re.sub(
        r"^[ \t]*#[ \t]*(?:include|import)[ \t]*<(metal_|simd/|stdint|stddef|limits)[^>]*>.*$",
        "",
        source,
        flags=re.M,
    )
    if not source.startswith("#line"):
        source = '#line 1 "source.metal"\n' + source
    command = [_clang(), "-E", "-x", "c++", "-std=c++17", "-nostdinc", "-undef", "-w", "-"]
    command += [f"-D{name}={value}" for name, value in {**DEFINES, **(defines or {})}.items()]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(result.stderr)
    # The count of an unroll hint may be a function constant, which is no constant expression here.
    return re.sub(
        r"^([ \t]*#[ \t]*pragma[ \t]+unroll)[ \t]*\((?!\s*\d+\s*\)).*$",
        r"\1",
        result.stdout,
        flags=re.M,
    )


def kernels(source: str, defines: Mapping[str, str] | None = None) -> Translation:
    """What a source declares: kernels with their parameters, instances by host name, function
    constants."""
    return translate(preprocess(source, defines))


# ---- compiling


def cache_dir() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("KVQ_EMU_CACHE") or Path.home() / ".cache" / "torch_kvq" / "emu")


def compile_library(
    source: str,
    mode: str = "fast",
    *,
    defines: Mapping[str, str] | None = None,
    only: str | None = None,
) -> Path:
    """Compiles a flattened source to a kernel library and returns the path of the cached shared
    object.

    `only` is a regular expression: other [[host_name]] instantiations are left out.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "fastmath" and _SAFE_MATH.search(source):
        mode = "fast"  # the pragma outranks the compile options
    key = _digest(_toolchain_id(), mode, source, repr(sorted((defines or {}).items())), only or "")
    path = cache_dir() / mode / f"{key}.so"
    if not path.exists():
        translation = translate(preprocess(source, defines), only=only)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = Path(scratch) / "library.so"
            _build(translation.text, mode, Path(scratch), built)
            built.replace(path)
    return path


def _build(text: str, mode: str, scratch: Path, out: Path) -> None:
    unit = scratch / "kernels.cpp"
    command = [_clang(), *_kernel_flags(mode), "-include-pch", str(_precompiled_shim(mode))]
    link = [
        "-shared",
        "-o",
        str(out),
        str(unit),
        str(_runtime(mode)),
        "-Wl,-Bsymbolic",
        "-lpthread",
    ]
    text, result = compile_with_repairs([*command, *link], text, unit)
    if result.returncode == 0:
        return
    result = subprocess.run([*command, "-fsyntax-only", str(unit)], capture_output=True, text=True)
    raise CompileError(result.stderr.replace(f"{scratch}{os.sep}", ""))


def _kernel_flags(mode: str) -> list[str]:
    return [
        *_COMMON,
        "-nostdinc",
        "-nostdinc++",
        *_MACHINE[platform.machine()],
        *_KERNEL_FLAGS[mode],
    ]


def _support_dir() -> Path:
    """The shim's headers, copied beside what is built from them: a change makes a new folder."""
    folder = cache_dir() / "support" / _toolchain_id()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        shutil.copytree(HERE / "emu", scratch / "emu")
        try:
            (scratch / "emu").rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise
        shutil.rmtree(scratch)
    return folder


def _once(path: Path, command: list[str]) -> Path:
    """Runs a command that writes to the path after its last argument, unless that is there
    already."""
    if not path.exists():
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        result = subprocess.run([*command, str(scratch)], capture_output=True, text=True)
        if result.returncode:
            raise CompileError(result.stderr)
        scratch.replace(path)
    return path


def _precompiled_shim(mode: str) -> Path:
    support = _support_dir()
    header = support / "shim" / "entry.h"
    flags = [*_kernel_flags(mode), "-I", str(support), "-x", "c++-header", str(header), "-o"]
    return _once(support / f"shim.{mode}.pch", [_clang(), *flags])


def _runtime(mode: str) -> Path:
    support = _support_dir()
    define = {
        "race": ["-DEMU_RACE"],
        "asan": ["-DEMU_ASAN"],
        "fastmath": ["-DEMU_FASTMATH"],
        "fast": [],
    }[mode]
    sources = sorted(str(p) for p in (support / "runtime").glob("*.cpp"))
    includes = [argument for source in sources for argument in ("-include", source)]
    flags = [
        *_RUNTIME_FLAGS,
        *_MACHINE[platform.machine()],
        *define,
        "-x",
        "c++",
        "-c",
        os.devnull,
        *includes,
        "-o",
    ]
    return _once(support / f"runtime.{mode}.o", [_clang(), *flags])


@functools.cache
def _toolchain_id() -> str:
    version = subprocess.run(
        [_clang(), "--version"], capture_output=True, text=True, check=True
    ).stdout
    files = sorted(
        p
        for folder in ("emu", "msl")
        for p in (HERE / folder).rglob("*")
        if p.suffix in (".h", ".cpp", ".py")
    )
    return _digest(
        version,
        *(f"{p.relative_to(HERE)}\n{p.read_text()}" for p in files),
        Path(__file__).read_text(),
    )[:16]


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.encode())
    return digest.hexdigest()[:32]


def _clang() -> str:
    compiler = requirements.clang()
    if compiler is None:
        raise RuntimeError(requirements.missing_for_emulator())
    return compiler


# ---- other back ends


def compile_ptx(
    source: str,
    arch: str = "sm_90",
    *,
    defines: Mapping[str, str] | None = None,
    only: str | None = None,
    constants: Mapping[str, int] | None = None,
    line_tables: bool = True,
) -> str:
    """Compiles a flattened source to PTX. An entry has the host name with other characters
    replaced by _, takes one pointer for each buffer index from 0 to the largest, and then, for
    each threadgroup index, the offset of its memory in dynamic shared memory. `constants` are the
    values of function constants; others are variables of the module, 0 at first."""
    for name, value in (constants or {}).items():
        source, count = re.subn(
            rf"^constant (\w+) {name} \[\[function_constant\(\d+\)\]\];",
            rf"constant constexpr \1 {name} = {int(value)};",
            source,
            flags=re.M,
        )
        if count != 1:
            raise CompileError(f"{count} function constants {name!r}")
    translation = translate(preprocess(source, defines), "ptx", only)
    contract = "off" if _NO_CONTRACTION.search(source) else "fast"
    with tempfile.TemporaryDirectory() as scratch:
        unit, out = Path(scratch) / "kernels.cpp", Path(scratch) / "kernels.ptx"
        command = [
            _clang(),
            *_PTX_FLAGS,
            f"-march={arch}",
            f"-ffp-contract={contract}",
            *(["-gline-tables-only"] if line_tables else []),
            "-include",
            str(SHIM),
            str(unit),
            "-o",
            str(out),
        ]
        _, result = compile_with_repairs(command, translation.text, unit)
        if result.returncode:
            raise CompileError(result.stderr)
        return out.read_text()


def strict_check(
    source: str, *, defines: Mapping[str, str] | None = None, subset: bool = True
) -> list[str]:
    """What a Metal compiler, or with `subset` the rules of this project, would object to: empty
    if nothing."""
    from .msl.lint import lint

    try:
        preprocessed = preprocess(source, defines)
    except CompileError as error:
        return [line for line in str(error).splitlines() if "error: " in line]
    return lint(preprocessed, subset)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("compile", "flatten", "check", "list", "ptx"):
        command = commands.add_parser(name)
        command.add_argument(
            "--source", required=True, help="a .metal file; - reads standard input"
        )
        command.add_argument("-I", dest="include", action="append", default=[])
        command.add_argument(
            "-D", dest="define", action="append", default=[], metavar="NAME[=VALUE]"
        )
        if name == "compile":
            command.add_argument("--mode", choices=MODES, default="fast")
        if name in ("compile", "ptx"):
            command.add_argument("--only", help="keep the host names that this expression matches")
            command.add_argument("--out", required=True)
        if name == "ptx":
            command.add_argument("--arch", default="sm_90")
    options = parser.parse_args(arguments)
    source = sys.stdin.read() if options.source == "-" else flatten(options.source, options.include)
    defines = dict((d.split("=", 1) if "=" in d else (d, "1")) for d in options.define)
    try:
        if options.command == "compile":
            library = compile_library(source, options.mode, defines=defines, only=options.only)
            shutil.copyfile(library, f"{options.out}.{os.getpid()}")
            os.replace(f"{options.out}.{os.getpid()}", options.out)
        elif options.command == "ptx":
            Path(options.out).write_text(
                compile_ptx(source, options.arch, defines=defines, only=options.only)
            )
        elif options.command == "flatten":
            print(source)
        elif options.command == "check":
            problems = strict_check(source, defines=defines)
            print("\n".join(problems))
            return 1 if problems else 0
        else:
            for instance in kernels(source, defines).instances:
                print(instance.host_name)
    except (CompileError, TranslationError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
