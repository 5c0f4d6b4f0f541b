"""Calibration on more Metal code that real Macs run: MLX ships its kernels as headers in its
wheel, for Linux too. They are read from the installed mlx, compiled unmodified, and compared with
mlx on the CPU and with torch."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from . import emulator, toolchain  # noqa: E402


def include_dir() -> Path | None:
    """Folder of mlx's headers."""
    spec = importlib.util.find_spec("mlx")
    folders = [Path(p) / "include" for p in (spec.submodule_search_locations or [])] if spec else []
    return next(
        (p for p in folders if (p / "mlx/backend/metal/kernels/quantized.h").exists()), None
    )


pytestmark = pytest.mark.skipif(include_dir() is None, reason="mlx is not installed")


@functools.cache
def library(headers: str, instances: str, mode: str = "fast") -> emulator.Library:
    folder = include_dir()
    text = "".join(f"#include <mlx/backend/metal/kernels/{name}>\n" for name in headers.split())
    for instance in instances.split("; "):
        host_name, arguments = instance.split(": ")
        text += f'instantiate_kernel("{host_name}", {arguments})\n'
    source = toolchain.flatten_text(text, folder / "instances.metal", [folder])
    return emulator.load(source, mode)


QUANTIZED = "utils.h quantized_utils.h steel/gemm/gemm.h quantized.h"


@pytest.mark.parametrize("mode", ["fast", pytest.param("race", marks=pytest.mark.slow)])
def test_affine_quantize(mode: str) -> None:
    mx = pytest.importorskip("mlx.core")
    names = [f"{kind}_{bits}" for kind in ("quantize", "dequantize") for bits in (2, 4, 6, 8)]
    instances = "; ".join(
        f"{n}: affine_{n.split('_')[0]}, float, 64, {n.split('_')[1]}" for n in names
    )
    metal = library(QUANTIZED, instances, mode)
    x = np.random.default_rng(0).standard_normal((6, 256), np.float32)
    for bits in (2, 4, 6, 8):
        codes = np.zeros((6, 256 * bits // 8), np.uint8)
        scales, biases = np.zeros((6, 4), np.float32), np.zeros((6, 4), np.float32)
        per_thread = 64 // 32
        grid = x.size // per_thread
        metal.launch(f"quantize_{bits}", grid, 64, [x, codes, scales, biases], grid_in_threads=True)
        want = [np.array(a) for a in mx.quantize(mx.array(x), group_size=64, bits=bits)]
        np.testing.assert_array_equal(codes, want[0].view(np.uint8))
        np.testing.assert_allclose(scales, want[1], rtol=1e-6)
        np.testing.assert_allclose(biases, want[2], rtol=1e-6)
        out = np.zeros_like(x)
        pack = {2: 4, 4: 2, 6: 4, 8: 1}[bits]
        grid = x.size // pack
        metal.launch(
            f"dequantize_{bits}", grid, 64, [codes, scales, biases, out], grid_in_threads=True
        )
        want_out = np.array(mx.dequantize(*(mx.array(a) for a in want), group_size=64, bits=bits))
        np.testing.assert_allclose(out, want_out, rtol=1e-6, atol=1e-6)


def attention_case(queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(keys)
    shapes = ((1, 8, queries, 64), (1, 2, keys, 64), (1, 2, keys, 64))
    q, k, v = (torch.randn(*shape, generator=generator) for shape in shapes)
    return q, k, v


FLAGS = ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks")


def test_sdpa_vector() -> None:
    q, k, v = attention_case(1, 77)
    metal = library("utils.h sdpa_vector.h", "one: sdpa_vector, float, 64, 64")
    assert metal.uses("one") == list(FLAGS)
    out = torch.zeros_like(q)
    size = [np.int32(4), np.int32(77)]
    strides = [np.uint64(s) for s in (77 * 64, 64, 77 * 64, 64)]
    buffers = [q, k, v, out, *size, *strides, np.float32(0.125)]
    metal.launch("one", (8, 1, 1), 1024, buffers, dict.fromkeys(FLAGS, False))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=0, atol=3e-6)


def test_sdpa_vector_with_a_bool_mask() -> None:
    q, k, v = attention_case(1, 40)
    metal = library("utils.h sdpa_vector.h", "one: sdpa_vector, float, 64, 64")
    mask = torch.rand(1, 8, 1, 40, generator=torch.Generator().manual_seed(1)) > 0.4
    out = torch.zeros_like(q)
    strides = [np.uint64(s) for s in (40 * 64, 64, 40 * 64, 64)]
    buffers = [q, k, v, out, np.int32(4), np.int32(40), *strides, np.float32(0.125), mask, None]
    buffers += [np.int32(1), np.int32(40), np.int32(40)]
    flags = {**dict.fromkeys(FLAGS, False), "has_mask": True, "bool_mask": True}
    metal.launch("one", (8, 1, 1), 1024, buffers, flags)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=0, atol=3e-6)


def test_steel_attention() -> None:
    """Prefill by simdgroup_matrix, with a rest in both directions."""
    queries = keys = 45
    q, k, v = attention_case(queries, keys)
    header = "utils.h steel/attn/attn.h steel/attn/kernels/steel_attention.h"
    metal = library(header, "prefill: attention, float, 32, 32, 64, 64, 4, 1")
    blocks = -(-queries // 32)
    sizes = [1, 8, 64, queries, keys, 4]
    counts = [blocks, blocks, queries // 32, keys // 32, queries % 32, keys % 32, 0]
    params = np.array(sizes, np.int32).tobytes() + np.float32(0.125).tobytes()
    params += np.array(counts, np.int32).tobytes()
    out = torch.zeros_like(q)
    params += np.array([s for t in (q, k, v, out) for s in t.stride()[:3]], np.int64).tobytes()
    for causal in (False, True):
        flags = {name: False for name in metal.uses("prefill")} | {"do_causal": causal}
        metal.launch("prefill", (blocks, 8, 1), 128, [q, k, v, out, params], flags)
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True
        )
        torch.testing.assert_close(out, want, rtol=0, atol=3e-6)


def test_softmax() -> None:
    metal = library(
        "utils.h softmax.h", "rows: softmax_single_row, float; long: softmax_looped, half, float"
    )
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    metal.launch("rows", 3, 64, [x, out, np.int32(200)])
    torch.testing.assert_close(out, x.softmax(-1), rtol=1e-5, atol=1e-7)
    half = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).half()
    result = torch.zeros_like(half)
    metal.launch("long", 2, 1024, [half, result, np.int32(5000)])
    torch.testing.assert_close(result.float(), half.float().softmax(-1), rtol=2e-3, atol=1e-6)


def test_hadamard() -> None:
    folder = include_dir()
    text = "#include <mlx/backend/metal/kernels/utils.h>\n"
    text += "#include <mlx/backend/metal/kernels/steel/utils.h>\n"
    text += "METAL_FUNC void hadamard_radix_m(thread float *x) {}\n"
    text += "#include <mlx/backend/metal/kernels/hadamard.h>\n"
    text += 'instantiate_kernel("h128", hadamard_n, float, 128, 16, 4)\n'
    metal = emulator.load(toolchain.flatten_text(text, folder / "hadamard.metal", [folder]))
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    out = np.zeros_like(x)
    metal.launch("h128", (8, 5), (8, 1), [x, out, np.float32(128**-0.5)], grid_in_threads=True)
    h = np.array([[1.0]])
    while len(h) < 128:
        h = np.block([[h, h], [h, -h]])
    np.testing.assert_allclose(out, x @ h / 128**0.5, rtol=1e-4, atol=1e-5)
