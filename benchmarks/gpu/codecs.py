"""Kernels of packed rows: launched as csrc/mps does, checked by bytes, timed against copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tests.metal.kernels.row_layout import (
    READ_STEPS,
    WRITE_STEPS,
    row_floats,
    steps_for,
    takes_any_row,
    vectors_of,
    vectors_per_simdgroup,
)
from torch_kvq import reference
from torch_kvq.codebooks import codebook, hadamard_block, hadamard_signs
from torch_kvq.formats import KVFormat

from .catalogue import DTYPES
from .device import DEVICE, Kernels, time_calls, to_device
from .shares import WHOLE, Share, rows_of
from .structs import make

#: Tokens of the checks: no multiple of what the kernels take at once.
TOKENS = 67
SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def lay_out(simdgroups: int, heads: int, batch: int, floats: int) -> tuple[tuple, tuple, int]:
    """Grid, threadgroup and threadgroup memory of lay_out in csrc/mps/rows.h.

    CUDA has whole threadgroups only: as many simdgroups in one as divide their number.
    """
    together = math.gcd(simdgroups, 4)
    size = -(-together * max(floats, 1) * 4 // 16) * 16
    return (simdgroups // together, heads, batch), (32 * together, 1, 1), size


def set_strides(params: np.ndarray, tensor: torch.Tensor) -> None:
    for field, stride in zip(("batch", "head", "token"), tensor.stride(), strict=False):
        params[field] = stride


@dataclass
class Side:
    """One side of a write: what is written, where, and how."""

    fmt: KVFormat
    x: torch.Tensor
    packed: Packed
    signs: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    encoder: str = "default"
    wide: bool = True
    """As the kernel was compiled."""
    several: int = 0
    """Steps of a simdgroup, where the size is not to decide."""

    @property
    def vectors(self) -> int:
        """Vectors that a simdgroup takes at once."""
        return vectors_of(self.fmt, self.x.shape[3], self.wide)

    def steps(self, most: int) -> int:
        batch, heads, tokens, head_dim = self.x.shape
        if self.several and not takes_any_row(self.fmt, self.wide):
            return self.several
        return steps_for(self.fmt, tokens, batch * heads, head_dim, self.wide, most)


def hadamard_fields(head_dim: int) -> dict[str, object]:
    block = hadamard_block(head_dim)
    return {"head_dim": head_dim, "block": block, "norm": 1 / math.sqrt(block)}


def write_params(sides: list[Side], position: int) -> np.ndarray:
    """KvqWriteParams of a write at an integer position."""
    params = make("KvqWriteParams", position=position)
    for index, side in enumerate(sides):
        p = params["side"][index]
        for name, tensor in zip(("codes", "scales", "biases"), side.packed, strict=True):
            set_strides(p[name], tensor)
        set_strides(p["x"], side.x)
        codes, scales, _ = side.packed
        for name, value in {
            **hadamard_fields(side.x.shape[3]),
            "codes_step": codes.stride(3), "capacity": codes.shape[2], "heads": side.x.shape[1],
            "scale_dtype": SCALARS[scales.dtype], "codes_dtype": SCALARS.get(codes.dtype, 0),
            "encoder": side.encoder == "unbiased",
        }.items():  # fmt: skip
            p[name] = value
    x = sides[0].x
    params["batch"], params["tokens"] = x.shape[0], x.shape[2]
    params["heads"] = max(side.x.shape[1] for side in sides)
    params["steps"] = min(side.steps(WRITE_STEPS) for side in sides)
    params["row"] = max(row_floats(side.fmt, side.x.shape[3], side.wide) for side in sides)
    return params


def quantize_call(kernels: Kernels, row: dict, side: Side, position: int = 0) -> Callable:
    """quantize_into_ of one side."""
    params = write_params([side], position)
    simdgroups = -(-side.x.shape[2] // (side.vectors * int(params["steps"])))
    grid, block, shared = lay_out(simdgroups, side.x.shape[1], side.x.shape[0], int(params["row"]))
    buffers = [side.x, *side.packed, None, side.signs, side.mean]
    return kernels.prepare(row, grid, block, buffers, params, shared)


def append_call(kernels: Kernels, row: dict, k: Side, v: Side, position: int = 0) -> Callable:
    """append_ of both sides."""
    params = write_params([k, v], position)
    simdgroups = -(-k.x.shape[2] // (min(k.vectors, v.vectors) * int(params["steps"])))
    heads, batch = int(params["heads"]), 2 * k.x.shape[0]
    grid, block, shared = lay_out(simdgroups, heads, batch, int(params["row"]))
    buffers = []
    for side in (k, v):
        buffers += [side.x, *side.packed, side.signs, side.mean]
    return kernels.prepare(row, grid, block, [*buffers, None], params, shared)


def dequantize_call(
    kernels: Kernels, row: dict, side: Side, out: torch.Tensor, start: int = 0
) -> Callable:
    """dequantize of slots start to start + out.shape[2]."""
    codes, scales, _ = side.packed
    vectors = vectors_of(side.fmt, out.shape[3], side.wide)
    steps = side.steps(READ_STEPS)
    params = make(
        "KvqReadParams",
        **hadamard_fields(out.shape[3]),
        steps=steps,
        start=start, tokens=out.shape[2], heads=codes.shape[1],
        scale_dtype=SCALARS[scales.dtype], codes_dtype=SCALARS.get(codes.dtype, 0),
    )  # fmt: skip
    for name, tensor in zip(("codes", "scales", "biases"), side.packed, strict=True):
        set_strides(params[name], tensor)
    grid, block, shared = lay_out(
        -(-out.shape[2] // (vectors * steps)), out.shape[1], out.shape[0],
        out.shape[3] if takes_any_row(side.fmt, side.wide) else 0,
    )  # fmt: skip
    buffers = [*side.packed, side.signs, side.mean, out]
    return kernels.prepare(row, grid, block, buffers, params, shared)


def hadamard_call(
    kernels: Kernels, row: dict, x: torch.Tensor, signs: torch.Tensor | None, out: torch.Tensor
) -> Callable:
    """hadamard of contiguous vectors."""
    head_dim, wide = x.shape[-1], row["constants"]["kvq_wide"]
    vectors = x.numel() // head_dim
    params = make("KvqHadamardParams", vectors=vectors, **hadamard_fields(head_dim))
    together = vectors_per_simdgroup(head_dim) if wide else 1
    grid, block, shared = lay_out(-(-vectors // together), 1, 1, 0 if wide else head_dim)
    return kernels.prepare(row, grid, block, [x, signs, out], params, shared)


def mlx_native_call(
    kernels: Kernels, row: dict, codes: torch.Tensor, norms: torch.Tensor, bits: int,
    book: torch.Tensor, signs: torch.Tensor | None, out: torch.Tensor,
) -> Callable:  # fmt: skip
    """mlx_native_dequantize."""
    head_dim = out.shape[3]
    params = make(
        "KvqMlxNativeParams",
        **hadamard_fields(head_dim),
        tokens=codes.shape[2], heads=codes.shape[1], bits=bits, scale=1 / math.sqrt(head_dim),
        divisor=1.0,
    )  # fmt: skip
    set_strides(params["codes"], codes)
    set_strides(params["norms"], norms)
    grid, block, shared = lay_out(codes.shape[2], codes.shape[1], codes.shape[0], head_dim)
    return kernels.prepare(row, grid, block, [codes, norms, book, signs, out], params, shared)


# ---- checks


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values on the CPU, where the reference works; some vectors are special."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if len(shape) == 4 and shape[3] > 7:
        x[:, :, 1] = 0
        x[:, :, 2] = -x[:, :, 2].abs()
        x[:, :, 3, 5] = 300
        x[:, :, 4, 7] = math.nan
    return x


def small_side(  # type: ignore[no-untyped-def]
    spec: str, dtype: torch.dtype, head_dim: int, constants: dict, prefix: str, seed: int
):
    """A side with empty slots around the tokens, on the CPU; a simdgroup takes several steps."""
    fmt = KVFormat.parse(spec)
    x = random(2, 3, TOKENS, head_dim, seed=seed, dtype=dtype)
    scale_dtype = list(SCALARS)[constants[f"{prefix}scale_dtype"]]
    packed = fmt.empty(2, 3, TOKENS + 4, head_dim, dtype=dtype, scale_dtype=scale_dtype)
    signs = hadamard_signs(head_dim) if constants[f"{prefix}rotate"] else None
    mean = random(3, head_dim, seed=seed + 1) if constants[f"{prefix}centre"] else None
    encoder = "unbiased" if fmt.family == "turboquant" and mean is not None else "default"
    wide = bool(constants[f"{prefix}wide"])
    return Side(fmt, x, packed, signs, mean, encoder, wide, several=4)


def on_device(side: Side) -> Side:
    packed = tuple(t.clone() for t in side.packed)
    moved = map(to_device, (side.x, packed, side.signs, side.mean))
    return Side(side.fmt, *moved, side.encoder, side.wide, side.several)  # type: ignore[arg-type]


def write_reference(side: Side, position: int) -> None:
    reference.quantize_into_(
        *side.packed, side.x, position, side.fmt.name, side.fmt.group_size, signs=side.signs,
        mean=side.mean, encoder=side.encoder,
    )  # fmt: skip


def same_bytes(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    if expected.is_floating_point() and expected.shape[-1] > 16:
        return same_values(ours, expected)  # format none: the bits of a NaN are the device's own
    return torch.equal(
        ours.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def same_values(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, where every NaN is like the other."""
    return torch.equal(ours.cpu().nan_to_num(7777.0), expected.nan_to_num(7777.0)) and torch.equal(
        ours.cpu().isnan(), expected.isnan()
    )


def check_row(kernels: Kernels, row: dict, head_dim: int, seed: int, checked: bool = True) -> bool:
    """One codec kernel against the reference on small tensors, or only launched."""
    dtype, constants = DTYPES[row["dtype"]], row["constants"]
    position = 2
    if row["op"] == "append":
        sides = [
            small_side(row[s], dtype, head_dim, constants, f"kvq_{s}_", seed + i)
            for i, s in enumerate(("k", "v"))
        ]
        ours = [on_device(side) for side in sides]
        append_call(kernels, row, *ours, position)()
        if not checked:
            return True
        for side in sides:
            write_reference(side, position)
        pairs = zip(ours, sides, strict=True)
        return all(
            same_bytes(a, b) for o, s in pairs for a, b in zip(o.packed, s.packed, strict=True)
        )
    if row["op"] == "hadamard":
        x = random(2, 3, 36, head_dim, seed=seed, dtype=dtype)
        signs = hadamard_signs(head_dim) if constants["kvq_signs"] else None
        inverse = bool(constants["kvq_inverse"])
        out = torch.full_like(x, math.nan).to(DEVICE)
        hadamard_call(kernels, row, to_device(x), to_device(signs), out)()
        return not checked or same_values(
            out, reference.to_dtype(reference.hadamard(x, signs, inverse), dtype)
        )
    if row["op"] == "mlx_native_dequantize":
        bits = 4
        codes = torch.randint(
            0, 256, (2, 3, 36, head_dim // 2), generator=torch.Generator().manual_seed(seed)
        ).to(torch.uint8)
        norms = random(2, 3, 36, 1, seed=seed).abs()
        signs = hadamard_signs(head_dim) if constants["kvq_signs"] else None
        out = torch.full((2, 3, 36, head_dim), math.nan, device=DEVICE)
        operands = map(to_device, (codes, norms))
        mlx_native_call(
            kernels, row, *operands, bits, to_device(codebook(bits)), to_device(signs), out
        )()
        if not checked:
            return True
        expected = reference.mlx_native_dequantize(
            codes, norms, bits, codebook=codebook(bits), signs=signs,
            rotate_back=bool(constants["kvq_rotate"]),
        )  # fmt: skip
        return same_values(out, expected)
    side = small_side(row["format"], dtype, head_dim, constants, "kvq_", seed)
    if row["op"] == "quantize":
        ours = on_device(side)
        quantize_call(kernels, row, ours, position)()
        if not checked:
            return True
        write_reference(side, position)
        return all(same_bytes(a, b) for a, b in zip(ours.packed, side.packed, strict=True))
    if checked:
        write_reference(side, position)
    out = torch.full((2, 3, TOKENS, head_dim), math.nan, dtype=dtype, device=DEVICE)
    dequantize_call(kernels, row, on_device(side), out, position)()
    if not checked:
        return True
    expected = reference.dequantize(
        *side.packed, side.fmt.name, side.fmt.group_size, signs=side.signs, mean=side.mean,
        dtype=dtype, start=position, length=TOKENS,
    )  # fmt: skip
    return same_values(out, expected)


def head_dim_of(row: dict) -> int:
    """The head size that a kernel is specialised for."""
    constants = row["constants"]
    return constants.get("kvq_head_dim") or constants.get("kvq_k_head_dim") or 128


def small_checks(
    kernels: Kernels, checked: bool = True, share: Share = WHOLE, ops: list[str] | None = None
) -> Iterator[tuple[dict, dict[str, object]]]:
    """A share of the build's codec kernels, at the head sizes that they were compiled for."""
    for number, row in rows_of(kernels, share, ops):
        if str(row["op"]).startswith(("attention", "q4_k")):
            continue
        head_dim = head_dim_of(row)
        right = check_row(kernels, row, head_dim, seed=number, checked=checked)
        yield row, {"head_dim": head_dim, "ok": right}


# ---- timing


def format_of(row: dict) -> str:
    """What a timed row is called: its format, or those of K and V."""
    return row.get("format") or "/".join(row[side] for side in ("k", "v") if side in row)


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def copy_call(size: int) -> Callable[[], object]:
    """A copy that moves this many bytes, half of them read."""
    source = torch.randint(0, 255, (size // 2,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def timed_call(kernels: Kernels, row: dict, batch: int, tokens: int, groups: int, head_dim: int):  # type: ignore[no-untyped-def]
    """(call, bytes it must read and write) of one row at this size."""
    dtype, constants = DTYPES[row["dtype"]], row["constants"]
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (batch, groups, tokens, head_dim)

    def dense() -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    if row["op"] == "hadamard":
        x, signs = dense(), to_device(hadamard_signs(head_dim))
        out = torch.empty_like(x)
        return hadamard_call(kernels, row, x, signs, out), nbytes(x, out)

    def side_of(spec: str, prefix: str) -> Side:
        fmt = KVFormat.parse(spec)
        signs = to_device(hadamard_signs(head_dim)) if constants[f"{prefix}rotate"] else None
        mean = torch.randn(groups, head_dim, device=DEVICE)
        packed = fmt.empty(*shape, dtype=dtype, device=DEVICE)
        return Side(
            fmt, dense(), packed, signs, mean if constants[f"{prefix}centre"] else None
        )  # fmt: skip

    if row["op"] == "append":
        k, v = side_of(row["k"], "kvq_k_"), side_of(row["v"], "kvq_v_")
        return append_call(kernels, row, k, v), nbytes(k.x, v.x, *k.packed, *v.packed)
    side = side_of(row["format"], "kvq_")
    if row["op"] == "quantize":
        return quantize_call(kernels, row, side), nbytes(side.x, *side.packed)
    size = nbytes(side.x, *side.packed)
    for tensor in side.packed:
        tensor.view(torch.uint8).random_(1, 60)  # finite as scales, too
    return dequantize_call(kernels, row, side, side.x), size


def measure(
    kernels: Kernels,
    rows: list[dict],
    batch: int,
    tokens: int,
    groups: int = 8,
    head_dim: int = 128,
) -> Iterator[dict[str, object]]:
    """Each row's time and its share of the bandwidth of a copy of as many bytes, caches cold."""
    flush = torch.ones(2**26, device=DEVICE)
    for row in rows:
        call, size = timed_call(kernels, row, batch, tokens, groups, head_dim)
        times = time_calls({"ours": call, "copy": copy_call(size)}, flush=flush)
        yield {
            **{key: row[key] for key in ("kernel", "op", "dtype", "constants", "registers")},
            "format": format_of(row),
            "batch": batch, "tokens": tokens, "us": times["ours"], "nbytes": size,
            "gbps": size / times["ours"] / 1e3, "of_copy": times["copy"] / times["ours"],
        }  # fmt: skip
        torch.cuda.empty_cache()
