"""Reading and writing safetensors files, in pieces and by memory mapping.

The safetensors library wants a file's tensors contiguous, on the CPU and all at once, a second
copy of a cache. These functions write views from any device in slabs, and read by mapping.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

#: safetensors' names of dtypes.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SLAB_BYTES = 1 << 24


class FileError(ValueError):
    """The file is not what was expected; the message says why, without the file's name."""


def _slabs(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor of any strides and device in row-major order, a few MiB at a time."""
    if tensor.numel() == 0:
        return
    if tensor.dim() > 0 and tensor.numel() * tensor.itemsize > _SLAB_BYTES and len(tensor) > 1:
        rows = max(1, _SLAB_BYTES * len(tensor) // (tensor.numel() * tensor.itemsize))
        for part in tensor.split(rows):
            yield from _slabs(part)
        return
    if tensor.dim() > 1 and len(tensor) == 1:
        yield from _slabs(tensor[0])
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    yield flat.numpy().data


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the tensors' bytes, in the order of the file, as eight hexadecimal digits."""
    value = 0
    for name in _order(tensors):
        for slab in _slabs(tensors[name]):
            value = zlib.crc32(slab, value)
    return f"{value:08x}"


def _order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Wide elements first, so that each tensor is aligned to its elements."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file: to a temporary file beside it, which then takes its name."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    order = _order(tensors)
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                for slab in _slabs(tensors[name]):
                    file.write(slab)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file.

    The tensors are on the CPU and mapped privately: pages are read when touched, and writing to
    them changes memory, never the file.

    Raises:
        FileError: the file is truncated or no safetensors file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise FileError(f"has {size} bytes and is no safetensors file")
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise FileError("is truncated or no safetensors file: its header does not fit into it")
        try:
            header = json.loads(file.read(length))
            entries, metadata = _parse(header)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                "is damaged or no safetensors file: its header is unreadable"
            ) from error
        start = 8 + length
        ends = [(e[2], e[3]) for e in entries.values()]
        position = 0
        for begin, end in sorted(ends):
            if begin != position:
                raise FileError("is damaged: its tensors overlap or leave gaps")
            position = end
        if start + position != size:
            word = "truncated" if size < start + position else "damaged"
            raise FileError(f"is {word}: {size} bytes where its header promises {start + position}")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if position else None
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        count = math.prod(shape)
        at = start + begin
        if at % dtype.itemsize:  # another writer's file
            data = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=at)
            tensors[name] = data.clone().view(dtype).reshape(shape)
        else:
            data = torch.frombuffer(mapped, dtype=dtype, count=count, offset=at)
            tensors[name] = data.reshape(shape)
    return metadata, tensors


_Entry = tuple[torch.dtype, tuple[int, ...], int, int]


def _parse(header: dict) -> tuple[dict[str, _Entry], dict[str, str]]:
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata")
    entries = {}
    for name, entry in header.items():
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        counts = (*shape, begin, end)
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError(name)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(name)
        entries[name] = dtype, shape, begin, end
    return entries, metadata
