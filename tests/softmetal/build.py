"""Compiles and links C++ and Objective-C++ for the software Metal device, cached by content."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMPILER = "clang++-19"
MAX_JOBS = 2

FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fblocks",
    "-fexceptions",
    "-fobjc-runtime=gcc",
    "-fconstant-string-class=NSConstantString",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-Werror",
]
LINK_FLAGS = ["-shared", "-Wl,-z,defs", "-Wl,--no-undefined"]
LINK_LIBRARIES = ["-lobjc", "-lBlocksRuntime"]


class Unavailable(RuntimeError):
    """This machine lacks a tool that the software device is built with."""


class BuildError(RuntimeError):
    """A compiler or the linker refused; the message is its own."""


def objc_include() -> Path | None:
    """The folder that holds gcc's objc/objc.h."""
    found = sorted(Path("/usr/lib/gcc").glob("*/*/include/objc/objc.h"))
    return found[-1].parent.parent if found else None


def unavailable_reason() -> str | None:
    """Why the software device cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return f"the software Metal device is for Linux, this is {sys.platform}"
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is missing (apt install clang-19)"
    if objc_include() is None:
        return "objc/objc.h is missing (apt install libobjc-12-dev)"
    if not any(Path("/usr/include").rglob("Block.h")):
        return "Block.h is missing (apt install libblocksruntime-dev)"
    return None


def cache_dir() -> Path:
    """KVQ_SOFTMETAL_CACHE, else a folder in the user's cache."""
    chosen = os.environ.get("KVQ_SOFTMETAL_CACHE")
    path = Path(chosen) if chosen else Path.home() / ".cache" / "torch_kvq" / "softmetal"
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: str | bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:32]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file lock, so that parallel test processes build once."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@dataclass
class Target:
    """A shared library: sources, include folders and the libraries it links to."""

    name: str
    sources: Sequence[Path]
    include: Sequence[Path] = ()
    uses_torch: bool = False
    libraries: Sequence[Path] = ()
    defines: Sequence[str] = field(default_factory=list)


def torch_paths() -> tuple[Path, str]:
    import torch

    return Path(torch.__file__).parent, torch.__version__


def compile_command(target: Target) -> list[str]:
    command = [COMPILER, *FLAGS]
    command += [f"-D{name}" for name in target.defines]
    command += ["-isystem", str(objc_include())]
    include = [HERE / "include" / "frameworks", HERE / "include" / "libdispatch", *target.include]
    command += [f"-I{path}" for path in include]
    if target.uses_torch:
        torch_dir, _ = torch_paths()
        headers = torch_dir / "include"
        for path in (headers, headers / "torch" / "csrc" / "api" / "include"):
            command += ["-isystem", str(path)]
    return command


def dependencies(depfile: Path) -> list[str]:
    """Files named by a make rule that clang wrote, the object itself left out."""
    text = depfile.read_text().replace("\\\n", " ")
    return text.partition(":")[2].split()


def content_key(base: str, files: Sequence[str]) -> str | None:
    try:
        return digest(base, *(Path(file).read_bytes() for file in files))
    except FileNotFoundError:
        return None


def compile_object(source: Path, command: list[str], version: str, cache: Path) -> Path:
    """The object file of a source, compiled unless one of the same content is cached."""
    base = digest(json.dumps([*command, str(source)]), version)
    listing = cache / f"{base}.deps"
    if listing.exists():
        key = content_key(base, json.loads(listing.read_text()))
        if key and (cached := cache / f"{key}.o").exists():
            return cached
    unfinished = cache / f"{base}.{os.getpid()}.o"
    depfile = unfinished.with_suffix(".d")
    # -MMD leaves system headers out; torch's are covered by its version.
    run([*command, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(unfinished)])
    files = dependencies(depfile)
    depfile.unlink()
    listing.write_text(json.dumps(files))
    finished = cache / f"{content_key(base, files)}.o"
    unfinished.replace(finished)
    return finished


def build(target: Target) -> Path:
    """Builds a shared library and returns its path, which names its content."""
    if reason := unavailable_reason():
        raise Unavailable(reason)
    cache = cache_dir()
    torch_dir, version = torch_paths() if target.uses_torch else (None, "")
    command = compile_command(target)
    with locked(cache / "build.lock"), ThreadPoolExecutor(MAX_JOBS) as pool:
        objects = list(
            pool.map(lambda s: compile_object(s, command, version, cache), target.sources)
        )
        link = [COMPILER, *LINK_FLAGS, *map(str, objects), *map(str, target.libraries)]
        if torch_dir:
            link += [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
            link += [f"-Wl,-rpath,{torch_dir / 'lib'}"]
        link += LINK_LIBRARIES
        library = cache / f"lib{target.name}-{digest(json.dumps(link), version)}.so"
        if not library.exists():
            # The soname lets the loader find a library that is already loaded.
            unfinished = library.with_suffix(f".{os.getpid()}.so")
            run([*link, f"-Wl,-soname,{library.name}", "-o", str(unfinished)])
            unfinished.replace(library)
    return library
