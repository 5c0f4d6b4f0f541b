"""Launches the attention kernels on the emulator as csrc/mps/attention.mm does on a GPU.

Names and instantiations come from csrc/mps/attention_library.h itself, compiled here.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import torch

from torch_kvq.formats import KVFormat

from .. import emulator, requirements, toolchain

ROOT = Path(__file__).resolve().parents[3]
FAMILIES = {
    "affine": lambda fmt: 0,
    "fp8": lambda fmt: 1 if fmt.name == "fp8_e4m3" else 2,
    "gguf": lambda fmt: 3 if fmt.name == "q8_0" else 4,
    "turboquant": lambda fmt: 5,
    "none": lambda fmt: 6,
}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MASKS = {None: 0, torch.bool: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
THREADS = 128
PREFILL_ROWS = 32

BOUND = np.dtype([("value", "i8"), ("kind", "u4"), ("stride", "u4")])
SIDE = np.dtype(
    [(f"{t}_{s}", "i8") for t in ("codes", "scales", "biases") for s in ("batch", "head")]
    + [(f"{t}_token", "u4") for t in ("codes", "scales", "biases")]
    + [("rotated", "u4"), ("centred", "u4"), ("unused", "u4")]
)
PARAMS = np.dtype(
    [("k", SIDE), ("v", SIDE), ("kv_length", BOUND), ("kv_start", BOUND), ("kv_end", BOUND)]
    + [(f"query_{s}", "i8") for s in ("batch", "head", "token")]
    + [(f"mask_{s}", "i8") for s in ("batch", "head", "query", "column", "columns")]
    + [("window", "i8")]
    + [(n, "u4") for n in ("heads", "groups", "queries", "capacity", "value_dim", "splits")]
    + [(n, "u4") for n in ("causal", "ring", "mask_kind", "has_sinks", "magic", "repeat")]
    + [("scale", "f4"), ("softcap", "f4")]
)

_COMPOSER = """
#include "csrc/mps/attention_library.h"
#include <cstring>
static kvq::AttentionFormat format(const int* f, const char* name) {
  return {KvqFamily(f[0]), f[1], f[2], KvqDtype(f[3]), name};
}
extern "C" int compose(int kind, int dtype, const int* k, const char* k_name, const int* v,
                       const char* v_name, int head_dim, int value_dim, int rows, int aligned,
                       char* name, char* line) {
  const kvq::AttentionKernel kernel{kvq::AttentionKind(kind), KvqDtype(dtype),
                                    format(k, k_name), format(v, v_name),
                                    head_dim, value_dim, rows, aligned != 0};
  std::strcpy(name, kernel.name().c_str());
  std::strcpy(line, kernel.instantiation().c_str());
  return kernel.fits_matrix();
}
"""


@functools.cache
def _composer() -> ctypes.CDLL:
    header = (ROOT / "csrc/mps/attention_library.h").read_text()
    path = toolchain.cache_dir() / f"composer-{toolchain._digest(header, _COMPOSER)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [requirements.clang(), "-std=c++20", "-shared", "-fPIC", "-I", str(ROOT)]
        scratch = path.with_suffix(f".{os.getpid()}.tmp")  # workers may meet here
        subprocess.run(
            [*command, "-x", "c++", "-", "-o", scratch], input=_COMPOSER, text=True, check=True
        )
        scratch.replace(path)
    return ctypes.CDLL(str(path))


#: Kernels of attention, as AttentionKind numbers them.
KINDS = {"decode": 0, "prefill": 1, "matrix": 2}


def _kind(kernel) -> int:
    """A kernel's number; of a bool, whether it is prefill."""
    return KINDS[kernel] if isinstance(kernel, str) else int(kernel)


def compose(kernel, dtype, k, k_dtype, v, v_dtype, head_dim, value_dim, rows=1, aligned=True):
    """(kernel name, line that instantiates it), from the host's own function."""
    return _compose(kernel, dtype, k, k_dtype, v, v_dtype, head_dim, value_dim, rows, aligned)[:2]


def fits_matrix(dtype, k, k_dtype, v, v_dtype, head_dim, value_dim):
    """Whether the host would let the matrix kernel serve this."""
    return _compose("matrix", dtype, k, k_dtype, v, v_dtype, head_dim, value_dim, 8, True)[2]


def _compose(kernel, dtype, k, k_dtype, v, v_dtype, head_dim, value_dim, rows, aligned):
    def packed(fmt, scale_dtype):
        values = (FAMILIES[fmt.family](fmt), fmt.bits, fmt.group_size, DTYPES[scale_dtype])
        return (ctypes.c_int * 4)(*values), fmt.name.encode()

    name, line = ctypes.create_string_buffer(512), ctypes.create_string_buffer(4096)
    fits = _composer().compose(
        _kind(kernel),
        DTYPES[dtype],
        *packed(k, k_dtype),
        *packed(v, v_dtype),
        head_dim,
        value_dim,
        rows,
        int(aligned),
        name,
        line,
    )
    return name.value.decode(), line.value.decode(), bool(fits)


@functools.cache
def template(library: str) -> str:
    """The flattened source of a library of metal/."""
    return toolchain.flatten(ROOT / "metal" / f"{library}.metal")


def source(kernel, lines: str) -> str:
    """The library of a kernel, by name or whether it is prefill, with these instantiations."""
    names = {number: name for name, number in KINDS.items()}
    return template(f"attention_{names[_kind(kernel)]}") + "\n" + lines


def _storage(t: torch.Tensor) -> np.ndarray:
    """Bytes from the tensor's first element to the end of its storage."""
    whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    return whole.numpy()[t.storage_offset() * t.element_size() :]


def _side(params, packed, signs, mean):
    buffers = []
    for tensor, name in zip(packed, ("codes", "scales", "biases"), strict=True):
        size = tensor.element_size()
        batch, head, token, _ = tensor.stride()
        params[f"{name}_batch"], params[f"{name}_head"] = batch * size, head * size
        params[f"{name}_token"] = token * size
        buffers.append(_storage(tensor) if tensor.numel() else None)
    params["rotated"], params["centred"] = signs is not None, mean is not None
    return buffers


def _bound(params, value, default):
    if value is None or isinstance(value, int):
        params["value"] = default if value is None else value
        return None
    params["kind"] = 2 if value.dtype == torch.int64 else 1
    params["stride"] = 1 if value.dim() == 1 and value.numel() > 1 else 0
    return value.contiguous()


def choose(query, k_packed, v_packed, k, v, kernel, rows=None, aligned=True):
    """(name, line, rows) of the kernel for these tensors; few rows unless `rows` says otherwise."""
    if rows is None:
        repeat = query.shape[1] // k_packed[0].shape[1]
        rows = min(8, 1 << (query.shape[2] * repeat - 1).bit_length())
        if _kind(kernel) == KINDS["matrix"]:
            rows = 8 if query.shape[2] * repeat <= 8 else 16
    k_dtype, v_dtype = (
        (codes if fmt.family == "none" else scales).dtype
        for (codes, scales, _), fmt in ((k_packed, k), (v_packed, v))
    )
    dims = query.shape[-1], v.head_dim(v_packed[0].shape[-1])
    return *compose(kernel, query.dtype, k, k_dtype, v, v_dtype, *dims, rows, aligned), rows


def attention(
    query,
    k_codes,
    k_scales,
    k_biases,
    v_codes,
    v_scales,
    v_biases,
    kv_length,
    k_format,
    k_group_size,
    v_format,
    v_group_size,
    *,
    kv_start=None,
    kv_end=None,
    mask=None,
    sinks=None,
    k_signs=None,
    v_signs=None,
    k_mean=None,
    v_mean=None,
    scale=None,
    softcap=0.0,
    window=0,
    causal=True,
    ring=False,
    kernel="decode",
    rows=None,
    splits=1,
    aligned=True,
    mode="fast",
    seed=0,
    guard_low=False,
    in_place=False,
    memory=None,
    library=None,
    merge_library=None,
):
    """torch.ops.kvq.attention by one kernel of the caller's choice.

    in_place: inputs are not copied behind guard pages. memory: takes the threadgroup memory used.
    library, merge_library: run these, mutants of the kernel's library and of the merge's.
    """
    k, v = KVFormat(k_format, k_group_size), KVFormat(v_format, v_group_size)
    batch, heads, queries, head_dim = query.shape
    groups, capacity = k_codes.shape[1:3]
    value_dim = v.head_dim(v_codes.shape[-1])
    repeat = heads // groups
    prefill = kernel == "prefill"
    k_packed, v_packed = (k_codes, k_scales, k_biases), (v_codes, v_scales, v_biases)
    name, line, rows = choose(query, k_packed, v_packed, k, v, kernel, rows, aligned)

    p = np.zeros((), PARAMS)
    buffers = [_storage(query)]
    buffers += _side(p["k"], k_packed, k_signs, k_mean)
    buffers += _side(p["v"], v_packed, v_signs, v_mean)
    buffers.append(_bound(p["kv_length"], kv_length, 0))
    buffers.append(_bound(p["kv_start"], kv_start, 0))
    buffers.append(_bound(p["kv_end"], kv_end, np.iinfo(np.int64).max))
    for field, stride in zip(("batch", "head", "token"), query.stride(), strict=False):
        p[f"query_{field}"] = stride
    if mask is not None:
        strides = mask.expand(batch, heads, queries, mask.shape[-1]).stride()
        for field, stride in zip(("batch", "head", "query", "column"), strides, strict=True):
            p[f"mask_{field}"] = stride
        p["mask_columns"] = mask.shape[-1]
        p["mask_kind"] = MASKS[mask.dtype]
    buffers.append(_storage(mask) if mask is not None and mask.numel() else None)
    buffers += [None if t is None else t.float() for t in (sinks, k_signs, v_signs)]
    buffers += [k_mean, v_mean]
    out = torch.full((batch, heads, queries, value_dim), math.nan, dtype=query.dtype)
    lse = torch.full((batch, heads, queries), math.nan)
    shape = (batch, heads, queries, splits, value_dim + 2) if splits > 1 else (1,)
    partial = torch.full(shape, math.nan)
    for field, value in {
        "heads": heads, "groups": groups, "repeat": repeat, "queries": queries,
        "capacity": capacity,
        "value_dim": value_dim, "splits": splits, "causal": causal, "ring": ring,
        "window": window, "has_sinks": sinks is not None, "softcap": softcap, "magic": 0x4B000000,
        "scale": 1 / math.sqrt(head_dim) if scale is None else scale,
    }.items():  # fmt: skip
        p[field] = value
    placeholder = np.zeros(256, np.uint8)
    # Inputs that are no multiple of their type's size past the end would read the placeholder.
    buffers = [placeholder if b is None else b for b in buffers]

    if in_place:
        buffers = [emulator.InPlace(b) for b in buffers]

    library = library or emulator.load(source(kernel, line), mode)
    tile = PREFILL_ROWS if prefill else rows
    grid = (splits, -(-queries * repeat // tile), batch * groups)
    options = {"seed": seed, "guard_low": guard_low}
    library.launch(name, grid, THREADS, [*buffers, out, lse, partial, p], **options)
    if memory is not None:
        memory["bytes"] = library.static_threadgroup_bytes(name)
    if splits > 1:
        # As csrc/mps/attention.mm has it.
        merge_threads = 32 if splits <= 16 and queries * heads * batch > 256 else THREADS
        merge = merge_library or emulator.load(template("attention_merge"), mode)
        dtype = {0: "float", 1: "half", 2: "bfloat"}[DTYPES[query.dtype]]
        merge.launch(
            f"kvq_attention_merge_{dtype}",
            (queries, heads, batch),
            merge_threads,
            [partial, buffers[11], buffers[13], buffers[15], out, lse, p],
            **options,
        )
    return out, lse
