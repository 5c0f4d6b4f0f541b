"""Which kernels are built, each for which values of its function constants.

A unit is one source, compiled to one cubin. Its rows are plain dictionaries, which become the
manifest's: ``kernel`` (the entry), ``op``, ``constants`` and what the launch needs to know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_kvq.formats import FLOAT_DTYPES, FORMATS, GROUP_SIZES, KVFormat, default_scale_dtype

METAL = Path(__file__).resolve().parents[2] / "metal"
FAMILIES = {"affine": 0, "fp8_e4m3": 1, "fp8_e5m2": 2, "q8_0": 3, "q4_0": 4, "turboquant": 5}
DTYPE_NAMES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

#: Every format with every group it offers.
ALL_FORMATS = [
    KVFormat(name, group)
    for name in FORMATS
    for group in (GROUP_SIZES if KVFormat(name).group_size else (0,))
]
#: Different formats for K and V: the default pair, and pairs of unlike layouts.
MIXED = [
    ("int8-g64", "int4-g64-rot"),
    ("int4-g64-rot", "int4-g64-rot"),
    ("q8_0", "q4_0"),
    ("tq4", "int4-g64"),
    ("fp8_e4m3-g64", "none"),
]
#: Attention is built for these besides D = 128.
HEAD_DIMS = (64, 80, 96, 192, 256)
#: So are the codecs, at 384 with unaligned rows, at 24 and 1024 for the layouts of their lanes.
CODEC_DIMS = (24, *HEAD_DIMS, 384, 1024)
#: KvqDtype of the default scales of each dtype.
SCALES_OF = ((("float",), 0), (("half", "bfloat"), 1))
#: (query, head) rows of a decode threadgroup.
ROWS = (1, 2, 4, 8)
PAIRS = [(f, f) for f in ALL_FORMATS] + [(KVFormat.parse(k), KVFormat.parse(v)) for k, v in MIXED]

Row = dict[str, object]


@dataclass
class Unit:
    """One source and the kernels that are taken from it."""

    library: str
    rows: list[Row]
    lines: str = ""
    constants: dict[str, int] | None = None


def holds(fmt: KVFormat, head_dim: int) -> bool:
    """Whether the format can store vectors of head_dim elements."""
    return head_dim % (fmt.group_size or fmt.layout.multiple) == 0


def family(fmt: KVFormat) -> int:
    """KvqFamily of csrc/shared/formats.h."""
    return FAMILIES.get(fmt.name, FAMILIES.get(fmt.family, 6))


def _switches(*names: str) -> list[dict[str, int]]:
    """Neither, the first, both."""
    return [dict(zip(names, values, strict=True)) for values in ((0, 0), (1, 0), (1, 1))]


def _format_of(tag: str) -> str:
    """int4_g64 to int4-g64."""
    return re.sub(r"_(g\d+)$", r"-\1", tag)


def parse_name(kernel: str) -> Row | None:
    """What a kernel's name says; None for attention's template instances."""
    if match := re.fullmatch(r"kvq_(quantize|dequantize)_(float|half|bfloat)_(\w+)", kernel):
        op, dtype, tag = match.groups()
        return {"op": op, "dtype": dtype, "format": _format_of(tag)}
    if match := re.fullmatch(r"kvq_(append|hadamard|attention_merge)_(float|half|bfloat)", kernel):
        return {"op": match[1], "dtype": match[2]}
    if match := re.fullmatch(r"kvq_(q4_k_\w+)_(float|half|bfloat)", kernel):
        return {"op": match[1], "dtype": match[2], "format": "q4_k"}
    if kernel == "kvq_mlx_native_dequantize":
        return {"op": "mlx_native_dequantize", "dtype": "float"}
    return None


def codec_units(library: str, kernels: Iterable[str], pairs: list | None = None) -> Iterator[Unit]:
    """Units of a library whose kernels are all instantiated in its .metal file."""
    rows = []
    for kernel in kernels:
        row = parse_name(kernel)
        if row is None:
            raise ValueError(f"{library}.metal: no row for {kernel!r}")
        rows.append({"kernel": kernel, **row})
    ops = {str(row["op"]) for row in rows}
    if ops <= {"quantize", "dequantize"}:
        for switches in _switches("kvq_rotate", "kvq_centre"):
            for dtypes, scale in SCALES_OF:
                constants = {**switches, **shape(128), "kvq_scale_dtype": scale}
                yield _unit(library, [r for r in rows if r["dtype"] in dtypes], constants)
        for number, head_dim in enumerate(CODEC_DIMS):
            wide = head_dim % 16 == 0 and head_dim != 384
            mine = []
            for index, fmt in enumerate(dict.fromkeys(str(row["format"]) for row in rows)):
                # One dtype of each format; all of them with rows that begin anywhere.
                dtypes = {list(DTYPES)[(index + number) % 3]} if wide else set(DTYPES)
                if holds(KVFormat.parse(fmt), head_dim):
                    mine += [r for r in rows if r["format"] == fmt and r["dtype"] in dtypes]
            constants = {"kvq_rotate": 1, "kvq_centre": 1, **shape(head_dim, wide)}
            yield _unit(library, mine, {**constants, "kvq_scale_dtype": 2})
        return
    if ops == {"append"}:
        for k, v in PAIRS if pairs is None else pairs:
            for dtypes, scale in SCALES_OF:
                named = [
                    {**row, "k": str(k), "v": str(v)} for row in rows if row["dtype"] in dtypes
                ]
                yield _unit(library, named, append_constants(k, v, scale))
        return
    if ops == {"hadamard"}:
        shapes = [shape(128), shape(80), shape(1024), shape(24, wide=False)]
        settings = [{**s, **d} for d in shapes for s in _switches("kvq_signs", "kvq_inverse")]
    elif ops == {"mlx_native_dequantize"}:
        settings = _switches("kvq_rotate", "kvq_signs")
    elif library == "q4_k":
        settings = [{"kvq_aligned": 1, "kvq_vectors": m} for m in (2, 8)]
        settings.append({"kvq_aligned": 0, "kvq_vectors": 8})
    else:
        settings = [{}]
    for constants in settings:
        yield _unit(library, rows, constants)


def _unit(library: str, rows: list[Row], constants: dict[str, int]) -> Unit:
    return Unit(library, [{**row, "constants": constants} for row in rows], constants=constants)


def shape(head_dim: int, wide: bool = True) -> dict[str, int]:
    return {"kvq_head_dim": head_dim, "kvq_wide": int(wide)}


def append_constants(k: KVFormat, v: KVFormat, scale_dtype: int = 1) -> dict[str, int]:
    """The function constants of kvq_append_*; rotated formats are centred, too."""
    return {
        f"kvq_{side}_{name}": int(value)
        for side, fmt in (("k", k), ("v", v))
        for name, value in {
            "family": family(fmt),
            "bits": fmt.bits,
            "group": fmt.group_size,
            "rotate": fmt.rotate,
            "centre": fmt.rotate,
            "head_dim": 128,
            "wide": 1,
            "scale_dtype": scale_dtype,
        }.items()
    }


def attention_units(
    pairs: Iterable[tuple[KVFormat, KVFormat]] = tuple(PAIRS),
    dtypes: Iterable[torch.dtype] = FLOAT_DTYPES,
    rows: Iterable[int] = ROWS,
    prefill: bool = True,
    other_dims: bool = True,
) -> Iterator[Unit]:
    """Attention on each pair of formats: decode with 1, 2, 4 and 8 rows, by matrices where they
    serve it, with 8 and 16, and prefill, at D = 128;
    one kernel of each for each other head size."""
    wanted = [("decode", r) for r in rows] + [("matrix", 8), ("matrix", 16)]
    wanted += [("prefill", 1)] if prefill else []
    for number, (k, v) in enumerate(pairs):
        for dtype in dtypes:
            yield from _attention_unit(k, v, dtype, 128, wanted)
        if other_dims and k == v:
            dims = [d for d in HEAD_DIMS if holds(k, d)]
            for i, head_dim in enumerate(dims):
                dtype = FLOAT_DTYPES[(number + i) % 3]
                chosen = [wanted[(number + i) % len(wanted)], wanted[-1]]
                yield from _attention_unit(k, v, dtype, head_dim, chosen, aligned=i % 2 == 0)


def _attention_unit(k, v, dtype, head_dim, wanted, aligned=True):  # type: ignore[no-untyped-def]
    from tests.metal.kernels.attention_launch import compose, fits_matrix

    scales = default_scale_dtype(dtype)
    sides = [(fmt, dtype if fmt.family == "none" else scales) for fmt in (k, v)]
    flat = [x for side in sides for x in side]
    # Some on their own: ptxas takes one limit of registers for a unit.
    units = [("decode", {1}), ("decode", {2, 4, 8}), ("matrix", {8}), ("matrix", {16})]
    for kind, only in [*units, ("prefill", {1})]:
        lines, named = "", []
        for each, rows in dict.fromkeys(wanted):
            if (
                each != kind
                or rows not in only
                or (kind == "matrix" and not fits_matrix(dtype, *flat, head_dim, head_dim))
            ):
                continue
            kernel, line = compose(kind, dtype, *flat, head_dim, head_dim, rows, aligned)
            lines += line
            named.append({
                "kernel": kernel, "op": "attention", "dtype": DTYPE_NAMES[dtype], "constants": {},
                "k": str(k), "v": str(v), "head_dim": head_dim, "prefill": kind == "prefill",
                "matrix": kind == "matrix",
                "rows": rows, "aligned": aligned,
            })  # fmt: skip
        if named:
            yield Unit(f"attention_{kind}", named, lines)
