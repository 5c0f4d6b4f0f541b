"""Calibration on Metal code that real Macs run: torch ships its attention kernels as headers in
its wheel. They are read from the installed torch, compiled unmodified, and must give the values
of torch's CPU attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from . import emulator, toolchain  # noqa: E402

INCLUDE = Path(torch.__file__).parent / "include"
HEADERS = INCLUDE / "ATen" / "native" / "mps" / "kernels"
DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
PREFILL_NAMES = {"float": "float32", "half": "float16", "bfloat": "bfloat16"}
TOLERANCE = {"float": 3e-6, "half": 2e-3, "bfloat": 1.6e-2}
MASKS = ("none", "causal", "bool", "additive")

pytestmark = pytest.mark.skipif(
    not (HEADERS / "PrefillAttention.h").exists(),
    reason="this torch does not ship its Metal kernels",
)


@functools.cache
def source(header: str) -> str:
    text = "#include <metal_stdlib>\nusing namespace metal;\n#include <c10/metal/utils.h>\n"
    text += f"#include <{header}>\n"
    wrapper = INCLUDE / "wrapper.metal"  # never written: only its folder and name matter
    return toolchain.flatten_text(text, wrapper, [INCLUDE])


def decode_library(mode: str, dtype: str, head_size: int) -> emulator.Library:
    only = rf"_{dtype}_{head_size}(_|$)"
    return emulator.load(source("ATen/native/mps/kernels/DecodeAttention.h"), mode, only=only)


def prefill_library(mode: str, dtype: str, head_size: int) -> emulator.Library:
    only = rf"_{PREFILL_NAMES[dtype]}_bq32_bk\d+_bd{head_size}_.*(hm0|hm1_dc0)"
    return emulator.load(source("ATen/native/mps/kernels/PrefillAttention.h"), mode, only=only)


@dataclass
class Case:
    """One attention problem and its answer."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    expected: torch.Tensor


def make_case(
    dtype: str, head_size: int, heads: int, kv_heads: int, queries: int, keys: int, mask: str
) -> Case:
    generator = torch.Generator().manual_seed(head_size + queries)
    kind, batch = DTYPES[dtype], 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    q, k, v = (
        normal(batch, h, n, head_size)
        for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    given = None
    if mask == "bool":
        given = torch.rand(batch, heads, queries, keys, generator=generator) > 0.3
        given[..., 0] = True
    elif mask == "additive":
        given = normal(batch, heads, queries, keys)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(),
        k.float(),
        v.float(),
        attn_mask=given.float() if mask == "additive" else given,
        is_causal=mask == "causal",
        enable_gqa=True,
    )
    return Case(q, k, v, given, expected)


def check(case: Case, out: torch.Tensor, dtype: str) -> None:
    error = (out.float() - case.expected).abs().max().item()
    assert error < TOLERANCE[dtype], f"largest error {error:.2e}"


def run_decode(
    library: emulator.Library, dtype: str, head_size: int, mask: str, two_passes: bool
) -> None:
    heads, kv_heads, queries = 8, 2, 2
    keys = 300 if two_passes and library.mode == "fast" else 77
    case = make_case(dtype, head_size, heads, kv_heads, queries, keys, mask)
    q, k, v = case.q, case.k, case.v
    batch = q.shape[0]
    out = torch.full_like(q, float("nan"))
    suffix = {
        "none": "_masknone",
        "causal": "_masknone_causal",
        "bool": "_maskbool",
        "additive": f"_mask{dtype}",
    }[mask]
    head_strides = np.array([q.stride(1), k.stride(1), v.stride(1), 0], np.uint32)
    seq_strides = np.array([q.stride(2), k.stride(2), v.stride(2), 0], np.uint32)
    batch_strides = np.array([q.stride(0), k.stride(0), v.stride(0), heads], np.uint32)
    given = case.mask if case.mask is not None else np.zeros(16, np.uint8)
    m = case.mask.stride() if case.mask is not None else (0, 0, 0, 0)
    mask_strides = np.array([m[3], m[2], m[1], m[0]], np.uint32)
    group, length, scale = (
        np.uint32(heads // kv_heads),
        np.uint32(keys),
        np.float32(head_size**-0.5),
    )
    if not two_passes:
        buffers = [
            q,
            k,
            v,
            out,
            group,
            length,
            head_strides,
            seq_strides,
            scale,
            given,
            mask_strides,
            batch_strides,
        ]
        name = f"sdpa_vector_{dtype}_{head_size}_{head_size}{suffix}"
        library.launch(name, (batch * heads, queries, 1), 1024, buffers)
    else:
        blocks = 32
        partial = torch.zeros(batch * heads, queries, blocks, head_size, dtype=q.dtype)
        sums = torch.zeros(batch * heads, queries, blocks)
        maxima = torch.zeros_like(sums)
        buffers = [
            q,
            k,
            v,
            partial,
            sums,
            maxima,
            group,
            length,
            head_strides,
            seq_strides,
            scale,
            given,
            mask_strides,
        ]
        name = f"sdpa_vector_2pass_1_{dtype}_{head_size}_{head_size}{suffix}"
        library.launch(name, (batch * heads, queries, blocks), 256, [*buffers, batch_strides])
        name = f"sdpa_vector_2pass_2_{dtype}_{head_size}"
        library.launch(name, (batch * heads, queries, 1), 1024, [partial, sums, maxima, out])
    check(case, out, dtype)


def run_prefill(library: emulator.Library, dtype: str, head_size: int, mask: str) -> None:
    heads, kv_heads, queries = 4, 1, 45
    case = make_case(dtype, head_size, heads, kv_heads, queries, queries, mask)
    q, k, v = case.q, case.k, case.v
    batch = q.shape[0]
    out = torch.full_like(q, float("nan"))
    shape = np.array([batch, heads, head_size, queries, queries, heads // kv_heads], np.int32)
    scale = np.array([head_size**-0.5, 1.0], np.float32)
    strides = np.array([s for t in (q, k, v, out) for s in t.stride()[:3]], np.int32)
    params = shape.tobytes() + scale.tobytes() + strides.tobytes()
    given = case.mask if case.mask is not None else np.zeros(16, np.uint8)
    mask_strides = np.array(case.mask.stride() if case.mask is not None else (0, 0, 0, 0), np.int32)
    kind = "bool_" if mask == "bool" else PREFILL_NAMES[dtype]
    ending = f"hm{int(case.mask is not None)}_dc{int(mask == 'causal')}_mask{kind}"
    start = f"prefill_attention_{PREFILL_NAMES[dtype]}_bq32_"
    (name,) = (
        n
        for n in library.kernels
        if n.startswith(start) and n.endswith(ending) and f"_bd{head_size}_" in n
    )
    grid = ((queries + 31) // 32, heads, batch)
    library.launch(name, grid, 128, [q, k, v, out, params, mask_strides, given])
    check(case, out, dtype)


@pytest.mark.parametrize("two_passes", [False, True], ids=["one_pass", "two_passes"])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype: str, head_size: int, two_passes: bool) -> None:
    library = decode_library("fast", dtype, head_size)
    for mask in MASKS:
        run_decode(library, dtype, head_size, mask, two_passes)


@pytest.mark.parametrize("mode", ["race", "asan", "fastmath"])
def test_decode_other_builds(mode: str) -> None:
    library = decode_library(mode, "half", 64)
    run_decode(library, "half", 64, "causal", two_passes=False)
    run_decode(library, "half", 64, "additive", two_passes=True)


@pytest.mark.parametrize("head_size", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(dtype: str, head_size: int) -> None:
    library = prefill_library("fast", dtype, head_size)
    for mask in MASKS:
        run_prefill(library, dtype, head_size, mask)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["race", "asan", "fastmath"])
def test_prefill_other_builds(mode: str) -> None:
    library = prefill_library(mode, "half", 64)
    run_prefill(library, "half", 64, "causal")
    run_prefill(library, "half", 64, "additive")


@pytest.mark.parametrize(
    "header", ["DecodeAttention.h", pytest.param("PrefillAttention.h", marks=pytest.mark.slow)]
)
def test_strict_check_accepts(header: str) -> None:
    assert toolchain.strict_check(source(f"ATen/native/mps/kernels/{header}"), subset=False) == []
