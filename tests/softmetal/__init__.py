"""A software Metal device behind a software ``mps`` device of torch: the MPS tests run on Linux.

``install()`` makes ``torch.device("mps")`` usable. On a Mac it does nothing, so a conftest.py can
call it wherever ``--device mps`` is asked for. On Linux it builds and loads

- a Metal, Foundation and dispatch of our own (``src``, ``include``) whose device compiles the Metal
  source it is given with the emulator of ``tests/metal`` and checks what host code does with it,
- an mps backend for torch on top of it,
- the product's host code, ``csrc/mps/*.mm``, with the Metal sources embedded.

Settings, from the environment or as arguments of ``install`` and ``configure``:

=========================  ==================================================================
KVQ_SOFTMETAL_MODE         build of the kernels: fast (default), race, asan or fastmath. "fast"
                           takes the fast-math build where the host's compile options ask for it
KVQ_SOFTMETAL_LAZY=1       command buffers run only when somebody waits for them, so that reading
                           a result without synchronising shows
KVQ_SOFTMETAL_SEED         order in which a threadgroup's threads run; 0 (default) is ascending
KVQ_SOFTMETAL_MAX_THREADS  most threads per threadgroup that any pipeline admits (default 1024)
KVQ_SOFTMETAL_CACHE        where builds go (default ~/.cache/torch_kvq/softmetal)
=========================  ==================================================================

A misuse of Metal by host code aborts the process with ``[softmetal] failed assertion: ...``, as
Metal's validation layer does. A fault of a kernel raises at the next synchronisation.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from . import build
from .build import ROOT, BuildError, Target, Unavailable, unavailable_reason

if TYPE_CHECKING:
    import torch

__all__ = [
    "BuildError",
    "Unavailable",
    "configure",
    "embed",
    "install",
    "load_host_code",
    "python_environment",
    "reset_stats",
    "stats",
    "unavailable_reason",
]


def _load_embed() -> ModuleType:
    """metal/embed.py, with which setup.py embeds the Metal sources, too."""
    spec = importlib.util.spec_from_file_location("kvq_embed", ROOT / "metal" / "embed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).resolve().parent
embed = _load_embed()
TOOLCHAIN = ROOT / "tests" / "metal" / "toolchain.py"
MODES = ("fast", "race", "asan", "fastmath")
SETTINGS = {
    "mode": "KVQ_SOFTMETAL_MODE",
    "lazy": "KVQ_SOFTMETAL_LAZY",
    "seed": "KVQ_SOFTMETAL_SEED",
    "max_threads": "KVQ_SOFTMETAL_MAX_THREADS",
}
# The order of struct Counters in src/softmetal.h.
COUNTERS = (
    "libraries",
    "pipelines",
    "command_buffers",
    "encoders",
    "dispatches",
    "explicit_commits",
    "waits",
    "fallbacks",
    "buffer_bytes",
    "peak_buffer_bytes",
    "live_objects",
)
LIVING = ("buffer_bytes", "live_objects")

_device: ctypes.CDLL | None = None
_device_path: Path | None = None


def _device_target() -> Target:
    names = ["commands", "dispatch", "foundation", "resources"]
    plain = ["config", "kernel_library", "timeline"]
    sources = [HERE / "src" / f"{name}.mm" for name in names]
    sources += [HERE / "src" / f"{name}.cpp" for name in plain]
    return Target("softmetal", sources)


def _backend_target(device: Path) -> Target:
    sources = [HERE / "src" / "mps_backend.mm", HERE / "src" / "mps_ops.mm"]
    return Target("softmps", sources, uses_torch=True, libraries=[device])


def _toolchain_key() -> str:
    """Changes with any file that compiled kernels depend on."""
    folder = TOOLCHAIN.parent
    files = [TOOLCHAIN, *sorted(folder.glob("emu/**/*")), *sorted(folder.glob("msl/**/*.py"))]
    return build.digest(*(file.read_bytes() for file in files if file.is_file()))


def install(*, product: bool = True, **settings: object) -> None:
    """Makes ``torch.device("mps")`` usable; on a Mac it already is.

    With ``product`` the ops of torch_kvq get their MPS kernels, too. Raises ``Unavailable`` where a
    tool is missing.
    """
    if sys.platform == "darwin":
        return
    global _device, _device_path
    if _device is None:
        _device_path = build.build(_device_target())
        backend = build.build(_backend_target(_device_path))
        _device = ctypes.CDLL(str(_device_path), mode=ctypes.RTLD_GLOBAL)
        _device.softmetal_configure.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        _device.softmetal_counters.restype = ctypes.POINTER(ctypes.c_uint64 * len(COUNTERS))
        kernels = build.cache_dir() / "kernels"
        kernels.mkdir(exist_ok=True)
        _set("python", sys.executable)
        _set("toolchain", TOOLCHAIN)
        _set("toolchain_key", _toolchain_key())
        _set("cache", kernels)
        configure(**{k: os.environ[name] for k, name in SETTINGS.items() if name in os.environ})
        _install_backend(backend)
    configure(**settings)
    if product:
        _install_product()


def _install_backend(library: Path) -> None:
    import torch

    torch.ops.load_library(str(library))
    torch._C._has_mps = True
    torch._C._mps_get_name = lambda: "Software Metal"
    torch._C._mps_get_core_count = lambda: 1
    torch.backends.mps.is_available.cache_clear()
    torch.UntypedStorage.mps = _storage_to_mps
    atexit.register(_report_fault_at_exit)


def _storage_to_mps(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """UntypedStorage.mps() of a CPU build knows no such device; torch.load needs it."""
    import torch

    made = torch.empty(storage.size(), dtype=torch.uint8, device="mps")
    host = torch.empty(0, dtype=torch.uint8).set_(storage)
    return made.copy_(host).untyped_storage()


_product_loaded = False


def _install_product() -> None:
    global _product_loaded
    sources = sorted((ROOT / "csrc" / "mps").glob("*.mm"))
    if _product_loaded:
        return
    _product_loaded = True
    importlib.import_module("torch_kvq")  # has the schemas
    # Helpers that host code shares with the CPU kernels; _C.so hides its copies. What registers
    # something, or speaks to Python, is not a helper.
    registers = re.compile(r"\bTORCH_LIBRARY|\bPyMODINIT_FUNC|\bPyInit_|\bPyObject\b")
    helpers = [p for p in (ROOT / "csrc").glob("*.cpp") if not registers.search(p.read_text())]
    load_host_code("kvq_mps", [*sources, *sorted(helpers)], ROOT / "metal", [ROOT / "csrc"])


def load_host_code(
    name: str,
    sources: Sequence[Path],
    metal: Path,
    include: Sequence[Path] = (),
    *,
    metallib: bool = False,
) -> None:
    """Builds host code with the Metal libraries of a folder embedded, and loads it.

    With ``metallib`` they are embedded as "compiled" libraries, which for the software device are
    their source, so that the runtime takes the way it takes on a Mac with Xcode.
    """
    import torch

    if _device_path is None:
        raise RuntimeError("call install() first")
    generated = build.cache_dir() / "generated" / f"{name}{'-metallib' if metallib else ''}"
    compile_metal = str.encode if metallib else None
    embed.embed(metal, generated / "metal_libraries.h", include, compile_metal)
    target = Target(name, sources, [generated, *include], uses_torch=True, libraries=[_device_path])
    torch.ops.load_library(str(build.build(target)))


def _set(name: str, value: object) -> None:
    assert _device is not None
    assert _device.softmetal_configure(name.encode(), str(value).encode()), name


def configure(**settings: object) -> None:
    """Changes mode, lazy, seed or max_threads; libraries that are compiled already stay."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"no setting {name!r}; there are {', '.join(SETTINGS)}")
        if name == "mode" and value not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {value!r}")
        _set(name, int(value) if isinstance(value, bool) else value)


def _counters() -> ctypes.Array[ctypes.c_uint64]:
    if _device is None:
        raise RuntimeError("call install() first")
    return _device.softmetal_counters().contents


def stats() -> dict[str, int]:
    """Counts since the last reset: encoders, dispatches, commits, waits, living bytes, ..."""
    return dict(zip(COUNTERS, _counters(), strict=True))


def reset_stats() -> None:
    """Zeroes the counts; the peak becomes what is living now."""
    values = _counters()
    for index, name in enumerate(COUNTERS):
        if name not in LIVING:
            values[index] = 0
    values[COUNTERS.index("peak_buffer_bytes")] = values[COUNTERS.index("buffer_bytes")]


def python_environment(**changes: str) -> dict[str, str]:
    """Environment of a Python process that is to import this package by the same name."""
    return os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{ROOT}"} | changes


def _report_fault_at_exit() -> None:
    """A kernel fault that nobody synchronised on must not pass for a success."""
    import torch

    try:
        torch.mps.synchronize()
    except RuntimeError as fault:
        print(fault, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
