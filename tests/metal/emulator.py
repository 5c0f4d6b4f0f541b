"""Launching kernels of a compiled library from numpy arrays and torch tensors.

    library = emulator.load(source, mode="race")
    library.launch("kvq_quantize_half_int4_g64", grid=(rows, 1, 1), threadgroup=(32, 1, 1),
                   buffers={0: x, 1: codes, 2: scales, 3: params}, constants={0: True})

Buffers are read and written in place of a GPU's: outputs are there when launch returns. A fault
raises KernelFault."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import requirements, toolchain

try:
    import torch
except ImportError:  # the emulator itself needs numpy only
    torch = None


class KernelFault(Exception):
    """The kernel did something wrong."""


class LaunchRefused(Exception):
    """The request itself is wrong: a buffer is not bound, a limit is passed."""


@dataclass
class Offset:
    """A buffer bound with an offset in bytes, as setBuffer:offset:atIndex: does."""

    buffer: Any
    offset: int


@dataclass
class InPlace:
    """A buffer that is too large to copy between guard pages: the kernel works on the memory
    itself."""

    buffer: Any


class _Param(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("index", ctypes.c_uint32),
        ("elem_size", ctypes.c_uint32),
        ("elem_align", ctypes.c_uint32),
        ("is_constant", ctypes.c_uint8),
        ("is_read_only", ctypes.c_uint8),
        ("is_reference", ctypes.c_uint8),
        ("is_optional", ctypes.c_uint8),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("params", ctypes.POINTER(_Param)),
        ("n_params", ctypes.c_uint32),
        ("max_threads", ctypes.c_uint32),
        ("function_constants", ctypes.POINTER(ctypes.c_uint32)),
        ("n_function_constants", ctypes.c_uint32),
    ]


class _FunctionConstant(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_char_p),
        ("index", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("index", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_uint64),
    ]


class _ThreadgroupMemory(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("length", ctypes.c_uint32)]


class _ConstantValue(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("size", ctypes.c_uint32), ("value", ctypes.c_void_p)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.POINTER(_Kernel)),
        ("grid", ctypes.c_uint32 * 3),
        ("threads_per_threadgroup", ctypes.c_uint32 * 3),
        ("flags", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("threadgroup_memory", ctypes.POINTER(_ThreadgroupMemory)),
        ("constants", ctypes.POINTER(_ConstantValue)),
        ("n_buffers", ctypes.c_uint32),
        ("n_threadgroup_memory", ctypes.c_uint32),
        ("n_constants", ctypes.c_uint32),
    ]


class _Api(ctypes.Structure):
    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("mode", ctypes.c_char_p),
        ("kernels", ctypes.POINTER(_Kernel)),
        ("n_kernels", ctypes.c_uint32),
        ("function_constants", ctypes.POINTER(_FunctionConstant)),
        ("n_function_constants", ctypes.c_uint32),
        (
            "launch",
            ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.POINTER(_Launch), ctypes.c_char_p, ctypes.c_size_t
            ),
        ),
        (
            "check_constants",
            ctypes.CFUNCTYPE(
                ctypes.c_int,
                ctypes.POINTER(_Kernel),
                ctypes.POINTER(_ConstantValue),
                ctypes.c_uint32,
                ctypes.c_char_p,
                ctypes.c_size_t,
            ),
        ),
        ("static_threadgroup_bytes", ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.POINTER(_Kernel))),
    ]


ABI_VERSION = 1
_COPY = 1
_GRID_IN_THREADS, _PARTIAL_SIMD, _ALLOW_LOCKSTEP, _GUARD_LOW = 1, 2, 4, 8
_CONSTANT_TYPES = {
    "bool": np.bool_,
    "char": np.int8,
    "uchar": np.uint8,
    "uint8_t": np.uint8,
    "short": np.int16,
    "ushort": np.uint16,
    "uint16_t": np.uint16,
    "int": np.int32,
    "uint": np.uint32,
    "uint32_t": np.uint32,
    "int32_t": np.int32,
    "long": np.int64,
    "ulong": np.uint64,
    "uint64_t": np.uint64,
    "half": np.float16,
    "float": np.float32,
}


def load(
    source: str,
    mode: str = "fast",
    *,
    defines: Mapping[str, str] | None = None,
    only: str | None = None,
) -> Library:
    """Compiles a flattened source (or takes it from the cache) and loads it."""
    return _load(toolchain.compile_library(source, mode, defines=defines, only=only))


def load_file(
    path: str | Path, mode: str = "fast", *, include_dirs: Sequence[str | Path] = (), **options: Any
) -> Library:
    """`load` of a .metal file with its includes flattened."""
    return load(toolchain.flatten(path, include_dirs), mode, **options)


@functools.cache
def _load(path: Path) -> Library:
    return Library(path)


class Library:
    """A compiled kernel library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = ctypes.CDLL(str(path))
        get_api = self._handle.emu_get_api
        get_api.restype = ctypes.POINTER(_Api)
        self._api = get_api().contents
        if self._api.abi_version != ABI_VERSION:
            raise RuntimeError(
                f"{path}: ABI version {self._api.abi_version}, expected {ABI_VERSION}"
            )
        self.mode = self._api.mode.decode()
        self._kernels = {self._api.kernels[i].name.decode(): i for i in range(self._api.n_kernels)}
        self._constants = {
            c.index: (c.name.decode(), c.type.decode(), c.size)
            for c in (
                self._api.function_constants[i] for i in range(self._api.n_function_constants)
            )
        }

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels."""
        return list(self._kernels)

    @property
    def function_constants(self) -> dict[int, tuple[str, str]]:
        """Index to (name, type) of the function constants."""
        return {index: (name, kind) for index, (name, kind, _) in self._constants.items()}

    def parameters(self, kernel: str) -> list[dict[str, Any]]:
        """The buffers and threadgroup arguments of a kernel."""
        k = self._kernel(kernel)
        names = [name for name, _ in _Param._fields_]
        params = [{n: getattr(k.params[i], n) for n in names} for i in range(k.n_params)]
        return [
            {**p, "name": p["name"].decode(), "kind": ("buffer", "threadgroup")[p["kind"]]}
            for p in params
        ]

    def max_threads(self, kernel: str) -> int:
        """max_total_threads_per_threadgroup of a kernel."""
        return self._kernel(kernel).max_threads

    def uses(self, kernel: str) -> list[str]:
        """Function constants that a kernel names."""
        k = self._kernel(kernel)
        return [
            self._api.function_constants[k.function_constants[i]].name.decode()
            for i in range(k.n_function_constants)
        ]

    def static_threadgroup_bytes(self, kernel: str) -> int:
        """Bytes of threadgroup variables that launches of the kernel have met."""
        return self._api.static_threadgroup_bytes(ctypes.byref(self._kernel(kernel)))

    def _kernel(self, name: str) -> _Kernel:
        if name not in self._kernels:
            raise KeyError(f"no kernel {name}; the library has {', '.join(self._kernels)}")
        return self._api.kernels[self._kernels[name]]

    @contextlib.contextmanager
    def matrix_layout(self, places: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Another layout of simdgroup_matrix over lanes: the row and the even column of each."""
        tables = {
            name: (ctypes.c_ubyte * 32).in_dll(self._handle, f"emu_matrix_{name}")
            for name in ("row", "column", "lane")
        }
        before = {name: list(table) for name, table in tables.items()}
        for lane, (row, column) in enumerate(places):
            tables["row"][lane], tables["column"][lane] = row, column
            tables["lane"][row * 4 + column // 2] = lane
        try:
            yield
        finally:
            for name, table in tables.items():
                table[:] = before[name]

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        threadgroup: int | Sequence[int],
        buffers: Mapping[int, Any] | Sequence[Any],
        constants: Mapping[int | str, Any] | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        *,
        grid_in_threads: bool = False,
        partial_simd: bool = False,
        allow_lockstep: bool = False,
        guard_low: bool = False,
        seed: int = 0,
    ) -> None:
        """Runs a kernel to its end.

        Args:
            kernel: its host name.
            grid, threadgroup: up to three numbers; grid counts threadgroups, or threads with
                grid_in_threads.
            buffers: by index; contiguous numpy arrays and CPU tensors (their memory), bytes and
                numpy scalars (setBytes), Offset, InPlace. None leaves an index unbound.
            constants: function constants by index or name.
            threadgroup_memory: bytes by index.
            grid_in_threads: the last threadgroups of an axis may be smaller.
            partial_simd: simdgroup functions may be called by some lanes only.
            allow_lockstep: races inside a simdgroup are no fault (race build).
            guard_low: guard pages meet the start of the buffers instead of their end.
            seed: shuffles the order in which threads run.
        """
        items = buffers.items() if isinstance(buffers, Mapping) else enumerate(buffers)
        keep: list[Any] = []
        bound = [_bind(index, value, keep) for index, value in items if value is not None]
        values = [self._constant(key, value, keep) for key, value in (constants or {}).items()]
        memory = [
            _ThreadgroupMemory(index, length)
            for index, length in (threadgroup_memory or {}).items()
        ]
        flags = _GRID_IN_THREADS * grid_in_threads | _PARTIAL_SIMD * partial_simd
        flags |= _ALLOW_LOCKSTEP * allow_lockstep | _GUARD_LOW * guard_low
        request = _Launch(
            ctypes.pointer(self._kernel(kernel)),
            (ctypes.c_uint32 * 3)(*_three(grid)),
            (ctypes.c_uint32 * 3)(*_three(threadgroup)),
            flags,
            seed,
            (_Buffer * max(1, len(bound)))(*bound),
            (_ThreadgroupMemory * max(1, len(memory)))(*memory),
            (_ConstantValue * max(1, len(values)))(*values),
            len(bound),
            len(memory),
            len(values),
        )
        error = ctypes.create_string_buffer(4096)
        status = self._api.launch(ctypes.byref(request), error, len(error))
        if status:
            message = error.value.decode(errors="replace")
            raise (KernelFault(self.symbolize(message)) if status == 1 else LaunchRefused(message))

    def check_constants(self, kernel: str, constants: Mapping[int | str, Any]) -> None:
        """What pipeline creation checks: every function constant that the kernel names has a
        value."""
        keep: list[Any] = []
        values = [self._constant(key, value, keep) for key, value in constants.items()]
        array = (_ConstantValue * max(1, len(values)))(*values)
        error = ctypes.create_string_buffer(1024)
        if self._api.check_constants(
            ctypes.byref(self._kernel(kernel)), array, len(values), error, len(error)
        ):
            raise LaunchRefused(error.value.decode())

    def _constant(self, key: int | str, value: Any, keep: list[Any]) -> _ConstantValue:
        if isinstance(key, str):
            found = [index for index, (name, _, _) in self._constants.items() if name == key]
            if not found:
                raise KeyError(f"no function constant {key}")
            key = found[0]
        if key not in self._constants:  # a pipeline takes values that a function does not use
            data = np.asarray(value)
        else:
            data = np.asarray(value, dtype=_CONSTANT_TYPES[self._constants[key][1]])
        data = np.atleast_1d(data)
        keep.append(data)
        return _ConstantValue(key, data.nbytes, data.ctypes.data)

    def symbolize(self, message: str) -> str:
        """Replaces code offsets in a message by lines of the source, where addr2line is there."""
        tool = requirements.addr2line()
        offsets = re.findall(r"\[pc (0x[0-9a-f]+)\]", message)
        if not tool or not offsets:
            return message
        # The offset is that of the instruction after the call.
        calls = [hex(int(offset, 16) - 1) for offset in offsets]
        result = subprocess.run(
            [tool, "-e", str(self.path), *calls], capture_output=True, text=True, check=False
        )
        for offset, line in zip(offsets, result.stdout.splitlines(), strict=False):
            if not line.startswith("??"):
                place = Path(line.split(" ")[0]).name
                message = message.replace(f"[pc {offset}]", f"({place})")
        return message


def _three(value: int | Sequence[int]) -> tuple[int, int, int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return tuple(int(n) for n in [*numbers, 1, 1][:3])


def _bind(index: int, value: Any, keep: list[Any]) -> _Buffer:
    flags, offset = _COPY, 0
    if isinstance(value, Offset):
        value, offset = value.buffer, value.offset
    if isinstance(value, InPlace):
        value, flags = value.buffer, 0
    if torch is not None and isinstance(value, torch.Tensor):
        if value.device.type != "cpu" or not value.is_contiguous():
            raise ValueError(f"buffer {index}: a contiguous CPU tensor is needed")
        address, size = value.data_ptr(), value.numel() * value.element_size()
    else:
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = np.frombuffer(bytes(value), np.uint8).copy()
        elif not isinstance(value, np.ndarray):
            if isinstance(value, (int, float)) and not isinstance(value, np.generic):
                raise TypeError(
                    f"buffer {index}: {value!r} has no width; "
                    f"use a numpy scalar such as np.uint32({value!r})"
                )
            value = np.atleast_1d(np.asarray(value))
        if not value.flags.c_contiguous:
            raise ValueError(f"buffer {index}: a contiguous array is needed")
        address, size = value.ctypes.data, value.nbytes
    if offset > size:
        raise ValueError(f"buffer {index}: offset {offset} is past the end ({size} bytes)")
    keep.append(value)
    return _Buffer(index, flags, address + offset, size - offset)
