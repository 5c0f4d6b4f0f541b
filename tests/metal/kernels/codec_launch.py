"""Launches the kernels of packed rows on the emulator as csrc/mps/*.mm do on a GPU.

Parameter structs are read from csrc/shared/params.h, so that a changed field shows here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from torch_kvq.codebooks import hadamard_block
from torch_kvq.formats import KVFormat, default_scale_dtype

from .. import emulator, toolchain
from .row_layout import (
    READ_STEPS,
    WRITE_STEPS,
    is_aligned,
    is_wide,
    row_floats,
    steps_for,
    takes_any_row,
    vectors_of,
    vectors_per_simdgroup,
)

ROOT = Path(__file__).resolve().parents[3]
METAL = ROOT / "metal"
NAMES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LIBRARIES = {"affine": "affine", "fp8": "fp8", "gguf": "gguf", "turboquant": "turboquant"}
FAMILIES = {"affine": 0, "fp8_e4m3": 1, "fp8_e5m2": 2, "q8_0": 3, "q4_0": 4, "turboquant": 5}
SIMDGROUPS = 4

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def structs() -> dict[str, np.dtype]:
    """The structs of params.h."""
    kinds: dict[str, object] = {
        "int64_t": "i8", "int32_t": "i4", "uint32_t": "u4", "float": "f4",
    }  # fmt: skip
    text = (ROOT / "csrc" / "shared" / "params.h").read_text()
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.S):
        fields = []
        for kind, field, count in re.findall(r"^ +(\w+) (\w+)(?:\[(\d+)\])?;", body, re.M):
            fields.append((field, kinds[kind], int(count)) if count else (field, kinds[kind]))
        kinds[name] = np.dtype(fields)
        (size,) = re.findall(rf"sizeof\({name}\) == (\d+)", text)
        assert kinds[name].itemsize == int(size), name
    return {name: kind for name, kind in kinds.items() if isinstance(kind, np.dtype)}


def family(fmt: KVFormat) -> int:
    return FAMILIES.get(fmt.name, FAMILIES.get(fmt.family, 6))


def tag(fmt: KVFormat) -> str:
    return f"{fmt.name}_g{fmt.group_size}" if fmt.group_size else fmt.name


@functools.cache
def library(name: str, mode: str, edits: tuple[tuple[str, str], ...] = ()) -> emulator.Library:
    """A library of metal/, its source changed by (old, new) replacements."""
    source = toolchain.flatten(METAL / f"{name}.metal")
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} of {old!r}"
        source = source.replace(old, new)
    return emulator.load(source, mode)


def bytes_of(t: torch.Tensor | None) -> np.ndarray:
    """A tensor's storage from its first element on: the emulator writes into it."""
    if t is None or t.numel() == 0:
        return np.zeros(256, np.uint8)
    whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    return whole.numpy()[t.storage_offset() * t.element_size() :]


def shape_constants(prefix, fmt, dense, packed, signs, mean):  # type: ignore[no-untyped-def]
    return {
        f"{prefix}rotate": signs is not None,
        f"{prefix}centre": mean is not None,
        f"{prefix}head_dim": dense.shape[3],
        f"{prefix}wide": is_wide(fmt, dense, packed[0], signs, mean),
        f"{prefix}scale_dtype": DTYPES[packed[1].dtype],
    }


def set_strides(params: np.ndarray, t: torch.Tensor) -> None:
    for field, stride in zip(("batch", "head", "token"), t.stride(), strict=False):
        params[field] = stride


def run(
    lib: str,
    kernel: str,
    simdgroups: int,
    heads: int,
    batch: int,
    floats: int,
    buffers: Sequence[object],
    constants: dict[str, object],
    *,
    mode: str = "fast",
    seed: int = 0,
    guard_low: bool = False,
    in_place: bool = False,
    edits: tuple[tuple[str, str], ...] = (),
) -> None:
    """in_place: buffers are not copied behind guard pages."""
    together = min(SIMDGROUPS, simdgroups)
    if in_place:
        buffers = [emulator.InPlace(b) if b is not buffers[-1] else b for b in buffers]
    library(lib, mode, edits).launch(
        kernel,
        (32 * simdgroups, heads, batch),
        (32 * together, 1, 1),
        buffers,
        constants,
        {0: -(-together * max(floats, 1) * 4 // 16) * 16},
        grid_in_threads=True,
        seed=seed,
        guard_low=guard_low,
    )


def _fill_side(
    side: np.ndarray, fmt: KVFormat, packed: Packed, x: torch.Tensor, encoder: str
) -> None:
    for name, t in zip(("codes", "scales", "biases", "x"), (*packed, x), strict=True):
        set_strides(side[name], t)
    codes, scales, _ = packed
    head_dim = x.shape[3]
    side["codes_step"], side["capacity"] = codes.stride(3), codes.shape[2]
    side["heads"], side["head_dim"] = x.shape[1], head_dim
    side["block"] = hadamard_block(head_dim)
    side["norm"] = 1 / math.sqrt(hadamard_block(head_dim))
    side["scale_dtype"] = DTYPES[scales.dtype]
    side["codes_dtype"] = DTYPES.get(codes.dtype, 0)
    side["encoder"] = encoder == "unbiased"


def _write_params(sides, wide, position, ring, steps):  # type: ignore[no-untyped-def]
    params = np.zeros((), structs()["KvqWriteParams"])
    for i, (fmt, packed, x, encoder) in enumerate(sides):
        _fill_side(params["side"][i], fmt, packed, x, encoder)
    first = sides[0][2]
    params["batch"], params["tokens"], params["ring"] = first.shape[0], first.shape[2], ring
    params["heads"] = max(x.shape[1] for _, _, x, _ in sides)
    each = [(f, x.shape, w) for (f, _, x, _), w in zip(sides, wide, strict=True)]
    params["steps"] = min(
        steps_for(f, tokens, batch * heads, head_dim, w, WRITE_STEPS)
        for f, (batch, heads, tokens, head_dim), w in each
    )
    if steps and not any(takes_any_row(f, w) for f, _, w in each):
        params["steps"] = steps
    params["row"] = max(row_floats(f, shape[3], w) for f, shape, w in each)
    if isinstance(position, torch.Tensor):
        params["position_bytes"] = position.element_size()
        params["position_stride"] = position.stride(0) if position.dim() else 0
        return params, bytes_of(position)
    params["position"] = position
    return params, bytes_of(None)


def quantize_into_(
    packed: Packed, x, position, fmt, *, signs=None, mean=None, encoder="default", ring=False,
    steps=None, **options,
):  # type: ignore[no-untyped-def]  # fmt: skip
    constants = shape_constants("kvq_", fmt, x, packed, signs, mean)
    wide = constants["kvq_wide"]
    params, where = _write_params([(fmt, packed, x, encoder)], [wide], position, ring, steps)
    run(
        LIBRARIES.get(fmt.family, "dense"),
        f"kvq_quantize_{NAMES[x.dtype]}_{tag(fmt)}",
        -(-x.shape[2] // (vectors_of(fmt, x.shape[3], wide) * int(params["steps"]))),
        x.shape[1],
        x.shape[0],
        int(params["row"]),
        [*map(bytes_of, (x, *packed)), where, bytes_of(signs), bytes_of(mean), params],
        constants,
        **options,
    )


def quantize(x, fmt, *, scale_dtype=None, **options):  # type: ignore[no-untyped-def]
    packed = fmt.empty(
        *x.shape[:3],
        x.shape[3],
        dtype=x.dtype,
        scale_dtype=scale_dtype or default_scale_dtype(x.dtype),
    )
    quantize_into_(packed, x, 0, fmt, **options)
    return packed


def append_(
    k_packed, v_packed, k, v, position, k_fmt, v_fmt, *, k_signs=None, v_signs=None, k_mean=None,
    v_mean=None, k_encoder="default", v_encoder="default", ring=False, steps=None, **options,
):  # type: ignore[no-untyped-def]  # fmt: skip
    sides = [(k_fmt, k_packed, k, k_encoder), (v_fmt, v_packed, v, v_encoder)]
    constants = {}
    for side, fmt, x, packed, signs, mean in (
        ("k", k_fmt, k, k_packed, k_signs, k_mean),
        ("v", v_fmt, v, v_packed, v_signs, v_mean),
    ):
        constants |= {
            f"kvq_{side}_family": family(fmt),
            f"kvq_{side}_bits": fmt.bits,
            f"kvq_{side}_group": fmt.group_size,
            **shape_constants(f"kvq_{side}_", fmt, x, packed, signs, mean),
        }
    wide = [constants["kvq_k_wide"], constants["kvq_v_wide"]]
    params, where = _write_params(sides, wide, position, ring, steps)
    vectors = min(vectors_of(f, x.shape[3], w) for (f, _, x, _), w in zip(sides, wide, strict=True))
    buffers = (k, *k_packed, k_signs, k_mean, v, *v_packed, v_signs, v_mean)
    run(
        "append",
        f"kvq_append_{NAMES[k.dtype]}",
        -(-k.shape[2] // (vectors * int(params["steps"]))),
        int(params["heads"]),
        2 * k.shape[0],
        int(params["row"]),
        [*map(bytes_of, buffers), where, params],
        constants,
        **options,
    )


def dequantize(
    packed: Packed, fmt, *, signs=None, mean=None, dtype=torch.float32, start=0, length=None,
    steps=None, **options,
):  # type: ignore[no-untyped-def]  # fmt: skip
    codes, scales, _ = packed
    head_dim = fmt.head_dim(codes.shape[3])
    length = codes.shape[2] - start if length is None else length
    out = torch.full((*codes.shape[:2], length, head_dim), math.nan, dtype=dtype)
    constants = shape_constants("kvq_", fmt, out, packed, signs, mean)
    wide = constants["kvq_wide"]
    heads = codes.shape[0] * codes.shape[1]
    default_steps = steps_for(fmt, length, heads, head_dim, wide, READ_STEPS)
    steps = steps if steps and not takes_any_row(fmt, wide) else default_steps
    params = np.zeros((), structs()["KvqReadParams"])
    for name, t in zip(("codes", "scales", "biases"), packed, strict=True):
        set_strides(params[name], t)
    for name, value in {
        "start": start, "tokens": length, "steps": steps,
        "heads": codes.shape[1], "head_dim": head_dim,
        "block": hadamard_block(head_dim), "norm": 1 / math.sqrt(hadamard_block(head_dim)),
        "scale_dtype": DTYPES[scales.dtype], "codes_dtype": DTYPES.get(codes.dtype, 0),
    }.items():  # fmt: skip
        params[name] = value
    run(
        LIBRARIES.get(fmt.family, "dense"),
        f"kvq_dequantize_{NAMES[dtype]}_{tag(fmt)}",
        -(-length // (vectors_of(fmt, head_dim, wide) * steps)),
        codes.shape[1],
        codes.shape[0],
        head_dim if takes_any_row(fmt, wide) else 0,
        [*map(bytes_of, (*packed, signs, mean)), out, params],
        constants,
        **options,
    )
    return out


def hadamard(x, signs=None, inverse=False, **options):  # type: ignore[no-untyped-def]
    out = torch.full_like(x, math.nan)
    params = np.zeros((), structs()["KvqHadamardParams"])
    params["head_dim"], params["block"] = x.shape[-1], hadamard_block(x.shape[-1])
    params["norm"] = 1 / math.sqrt(hadamard_block(x.shape[-1]))
    params["vectors"] = vectors = x.numel() // x.shape[-1]
    wide = x.shape[-1] % 16 == 0 and is_aligned(x, 16) and is_aligned(signs, 16)
    run(
        "hadamard",
        f"kvq_hadamard_{NAMES[x.dtype]}",
        -(-vectors // (vectors_per_simdgroup(x.shape[-1]) if wide else 1)),
        1,
        1,
        0 if wide else x.shape[-1],
        [x, bytes_of(signs), out, params],
        {
            "kvq_signs": signs is not None,
            "kvq_inverse": inverse,
            "kvq_head_dim": x.shape[-1],
            "kvq_wide": wide,
        },
        **options,
    )
    return out


def mlx_native_dequantize(
    codes, norms, bits, codebook, *, factor=1.0, signs=None, rotate_back=False, **options
):  # type: ignore[no-untyped-def]
    head_dim = codes.shape[3] * (2 if bits == 4 else 1)
    out = torch.full((*codes.shape[:3], head_dim), math.nan)
    params = np.zeros((), structs()["KvqMlxNativeParams"])
    set_strides(params["codes"], codes)
    set_strides(params["norms"], norms)
    for name, value in {
        "tokens": codes.shape[2], "heads": codes.shape[1], "head_dim": head_dim, "bits": bits,
        "block": hadamard_block(head_dim), "norm": 1 / math.sqrt(hadamard_block(head_dim)),
        "scale": 1 / math.sqrt(head_dim), "divisor": factor,
    }.items():  # fmt: skip
        params[name] = value
    run(
        "mlx_native",
        "kvq_mlx_native_dequantize",
        codes.shape[2],
        codes.shape[1],
        codes.shape[0],
        head_dim,
        [*map(bytes_of, (codes, norms, codebook, signs)), out, params],
        {"kvq_signs": signs is not None, "kvq_rotate": rotate_back},
        **options,
    )
    return out
