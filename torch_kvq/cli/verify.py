"""Check every op on this machine against the reference; exit with 1 on any mismatch.

On a Mac this compiles every Metal library that its cases use and compares what the GPU computes
with the specification in torch_kvq/reference.py: codes byte for byte, decoded values exactly in
float32, attention to within twice the error that dense attention in the dtype makes, against
float64.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import torch_kvq
from torch_kvq import ops, reference
from torch_kvq.cli.terminal import CommandError, Progress, table
from torch_kvq.codebooks import hadamard_signs
from torch_kvq.formats import FLOAT_DTYPES, FORMATS, KVFormat
from torch_kvq.ops import Packed

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
QUICK_FORMATS = ("int4-g64", "int8-g32", "fp8_e4m3-g64", "q4_0", "tq4", "none")
#: Relative error of a float32 sum, and of rounding a result to float16 and bfloat16.
ONE_ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Case:
    """One check: ``run`` returns (largest error, allowed error)."""

    op: str
    format: str
    dtype: torch.dtype
    head_dim: int
    variant: str
    run: Callable[[str], tuple[float, float]]

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.format} {dtype} D={self.head_dim} {self.variant}".rstrip()


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "verify",
        help=(__doc__ or "").splitlines()[0],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "mps"), default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer formats and head sizes")
    parser.add_argument("--op", help="only the cases of this op")
    parser.add_argument("--json", action="store_true", help="print one JSON object, to post")
    return parser


def sample(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, special: bool = False
) -> torch.Tensor:
    """Normal values with an outlier channel; ``special`` adds zeros, constants, NaN, infinities."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 20
    if special:
        x[:, :, 0] = 0
        x[:, :, 1] = -2.5
        x[0, 0, 2, 5] = math.nan
        x[0, 0, 3, 1], x[0, 0, 3, 2] = math.inf, -math.inf
        x[:, :, 4] *= 1e-6
    return x.to(dtype)


def on(device: str, *tensors: torch.Tensor | None) -> list[Any]:
    return [t if t is None else t.to(device) for t in tensors]


def mismatches(ours: Any, expected: Any) -> float:
    """How many bytes of codes, scales and biases differ (a NaN equals a NaN)."""
    count = 0
    for a, b in zip(ours, expected, strict=True):
        a = a.cpu()
        if a.dtype != b.dtype or a.shape != b.shape:
            return math.inf
        differs = a != b
        if a.is_floating_point():
            differs &= ~(a.isnan() & b.isnan())
        count += int(differs.sum())
    return float(count)


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; infinite where only one of the two is NaN."""
    a, b = ours.cpu().float(), expected.float()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    same = (a == b) | a.isnan()  # infinities too
    return float(torch.where(same, 0.0, (a - b).abs()).max()) if a.numel() else 0.0


def rotation(fmt: KVFormat, head_dim: int) -> torch.Tensor | None:
    return hadamard_signs(head_dim) if fmt.rotate else None


def check_quantize(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, encoder: str, device: str
) -> tuple[float, float]:
    x, mean = sample(1, 2, 9, head_dim, dtype=dtype, special=True), sample(2, head_dim, seed=1)
    signs = rotation(fmt, head_dim)
    expected = reference.quantize(
        x, fmt.name, fmt.group_size, signs=signs, mean=mean, encoder=encoder
    )
    on_x, on_signs, on_mean = on(device, x, signs, mean)
    ours = ops.quantize(on_x, fmt, signs=on_signs, mean=on_mean, encoder=encoder)
    return mismatches(ours, expected), 0.0


def check_quantize_into(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, device: str
) -> tuple[float, float]:
    """Three tokens into the middle of a cache of seven; every other slot must stay as it was."""
    x, signs = sample(1, 2, 3, head_dim, dtype=dtype), rotation(fmt, head_dim)
    names = (fmt.name, fmt.group_size)
    caches = []
    for where, write in (
        (device, torch.ops.kvq.quantize_into_.int),
        ("cpu", reference.quantize_into_),
    ):
        cache = fmt.empty(1, 2, 7, head_dim, dtype=dtype, device=where)
        for tensor in cache:
            tensor.fill_(7)
        on_x, on_signs = on(where, x, signs)
        write(*cache, on_x, 2, *names, signs=on_signs)
        caches.append(cache)
    return mismatches(*caches), 0.0


def check_append(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, device: str
) -> tuple[float, float]:
    """K in ``fmt`` and V in int8, around the end of a ring, at a position of each row's own."""
    v_fmt = KVFormat("none") if head_dim % 32 else KVFormat("int8", 32)
    key, value = (sample(2, 2, 3, head_dim, dtype=dtype, seed=s) for s in (1, 2))
    position = torch.tensor([5, 11])
    caches = []
    for where, write in ((device, torch.ops.kvq.append_), ("cpu", reference.append_)):
        keys = fmt.empty(2, 2, 6, head_dim, dtype=dtype, device=where)
        values = v_fmt.empty(2, 2, 6, head_dim, dtype=dtype, device=where)
        new_key, new_value, at, signs = on(where, key, value, position, rotation(fmt, head_dim))
        names = (fmt.name, fmt.group_size, v_fmt.name, v_fmt.group_size)
        write(*keys, *values, new_key, new_value, at, *names, k_signs=signs, ring=True)
        caches.append((*keys, *values))
    return mismatches(*caches), 0.0


def check_dequantize(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, device: str
) -> tuple[float, float]:
    signs, mean = rotation(fmt, head_dim), sample(2, head_dim, seed=1)
    packed: list[Any] = reference.quantize(
        sample(1, 2, 9, head_dim, special=True), fmt.name, fmt.group_size, signs=signs
    )
    options: dict[str, Any] = {"dtype": dtype, "start": 2, "length": 6}
    codes, scales, biases = packed
    expected = reference.dequantize(
        codes, scales, biases, fmt.name, fmt.group_size, signs=signs, mean=mean, **options
    )
    *on_packed, on_signs, on_mean = on(device, *packed, signs, mean)
    ours = ops.dequantize(Packed(*on_packed), fmt, signs=on_signs, mean=on_mean, **options)
    return difference(ours, expected), 0.0


def check_qdq(fmt: KVFormat, dtype: torch.dtype, head_dim: int, device: str) -> tuple[float, float]:
    x, signs = sample(1, 2, 9, head_dim, dtype=dtype, special=True), rotation(fmt, head_dim)
    expected = reference.qdq(x, fmt.name, fmt.group_size, signs=signs)
    on_x, on_signs = on(device, x, signs)
    return difference(ops.qdq(on_x, fmt, signs=on_signs), expected), 0.0


def check_hadamard(dtype: torch.dtype, head_dim: int, device: str) -> tuple[float, float]:
    x, signs = sample(2, 5, head_dim, dtype=dtype), hadamard_signs(head_dim)
    on_x, on_signs = on(device, x, signs)
    worst = max(
        difference(ops.hadamard(on_x, on_signs, back), reference.hadamard(x, signs, back))
        for back in (False, True)
    )
    return worst, 0.0


def check_update(dtype: torch.dtype, head_dim: int, device: str) -> tuple[float, float]:
    src, position = sample(2, 2, 3, head_dim, dtype=dtype), torch.tensor([0, 4])
    caches = []
    for where, write in ((device, ops.kv_cache_update_), ("cpu", reference.kv_cache_update_)):
        cache = torch.zeros(2, 2, 7, head_dim, dtype=dtype, device=where)
        write(cache, *on(where, src, position))
        caches.append(cache)
    return mismatches(caches[:1], caches[1:]), 0.0


def check_mlx_native(bits: int, head_dim: int, device: str) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    row = head_dim // 2 if bits == 4 else head_dim
    high = 256 if bits in (4, 8) else 2**bits
    codes = torch.randint(0, high, (1, 2, 5, row), generator=generator, dtype=torch.uint8)
    norms = torch.rand(1, 2, 5, max(1, head_dim // 256), generator=generator) + 0.5
    signs = hadamard_signs(head_dim)
    on_codes, on_norms, on_signs = on(device, codes, norms, signs)
    worst = 0.0
    for back in (False, True):
        expected = reference.mlx_native_dequantize(
            codes, norms, bits, signs=signs, rotate_back=back, start=1, length=3
        )
        ours = ops.mlx_native_dequantize(
            on_codes, on_norms, bits, signs=on_signs, rotate_back=back, start=1, length=3
        )
        worst = max(worst, difference(ours, expected))
    return worst, 0.0


def check_q4_k_quantize(dtype: torch.dtype, size: int, device: str) -> tuple[float, float]:
    w = sample(1, 2, 9, size, dtype=dtype, special=True)[0]
    ours = ops.q4_k_quantize(*on(device, w))
    return mismatches((ours,), (reference.q4_k_quantize(w),)), 0.0


def check_q4_k_dequantize(dtype: torch.dtype, size: int, device: str) -> tuple[float, float]:
    blocks = reference.q4_k_quantize(sample(1, 2, 9, size, special=True)[0])
    ours = ops.q4_k_dequantize(*on(device, blocks), dtype=dtype)
    return difference(ours, reference.q4_k_dequantize(blocks, dtype)), 0.0


def check_q4_k_product(
    dtype: torch.dtype, size: int, vectors: int, offset: int, device: str
) -> tuple[float, float]:
    """Relative error against float64; the weights lie at a byte offset of a larger buffer."""
    n = 37
    blocks = reference.q4_k_quantize(sample(n, size))
    buffer = torch.full((offset + blocks.numel() + 50,), 255, dtype=torch.uint8)
    buffer[offset : offset + blocks.numel()] = blocks.flatten()
    x = sample(vectors, size, dtype=dtype, seed=1)
    expected = reference.q4_k_matmul(x.double(), blocks)
    multiply = ops.q4_k_gemv if vectors == 1 else ops.q4_k_matmul
    on_x, on_buffer = on(device, x, buffer)
    out = multiply(on_x, on_buffer, offset, n, exact=True)
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    return error, 2 * ONE_ROUNDING[dtype]


def check_attention(
    k_fmt: KVFormat,
    v_fmt: KVFormat,
    dtype: torch.dtype,
    head_dim: int,
    queries: int,
    features: bool,
    device: str,
) -> tuple[float, float]:
    """Relative error against float64, and what is allowed: twice that of dense attention, which has
    keys, values and result rounded to the dtype and computes in float32."""
    batch, heads, groups, capacity = 2, 4, 2, max(160, queries + 20)
    key, value = (sample(batch, groups, capacity, head_dim, seed=s) for s in (1, 2))
    query = sample(batch, heads, queries, head_dim, dtype=dtype, seed=3)
    length = torch.tensor([capacity, capacity - 13])
    packed: list[Any] = []
    signs: dict[str, Any] = {}
    for side, fmt, x in (("k", k_fmt, key), ("v", v_fmt, value)):
        side_signs = rotation(fmt, head_dim)
        signs[f"{side}_signs"] = side_signs
        packed += reference.quantize(
            x.to(dtype), fmt.name, fmt.group_size, signs=side_signs, scale_dtype=torch.float16
        )
    extra: dict[str, Any] = {}
    if features:
        extra = {
            "mask": sample(batch, 1, queries, capacity, seed=4) > -1.3,
            "sinks": sample(heads, seed=5),
            "kv_start": torch.tensor([3, 0]),
        }
    scalars: dict[str, Any] = {"softcap": 30.0, "window": 90} if features else {}
    names: list[Any] = [k_fmt.name, k_fmt.group_size, v_fmt.name, v_fmt.group_size]
    attention: Any = reference.attention
    options: dict[str, Any] = {**extra, **scalars}
    expected, expected_lse = attention(query.double(), *packed, length, *names, **signs, **options)
    rounded: list[Any] = []
    for side, fmt, (codes, scales, biases) in (
        ("k", k_fmt, packed[:3]),
        ("v", v_fmt, packed[3:]),
    ):
        dense = reference.dequantize(
            codes, scales, biases, fmt.name, fmt.group_size, signs=signs[f"{side}_signs"]
        )
        rounded += reference.quantize(dense.to(dtype), "none", 0)
    dense_out, dense_lse = attention(
        query.float(), *rounded, length, "none", 0, "none", 0, **options, compute=torch.float32
    )
    tensors = on(device, query, *packed, length)
    on_device = {
        name: None if t is None else t.to(device) for name, t in {**signs, **extra}.items()
    }
    out, lse = torch.ops.kvq.attention(*tensors, *names, **on_device, **scalars)

    def error(values: torch.Tensor) -> float:
        return float((values.double() - expected).norm() / expected.norm())

    lse_off = float((dense_lse - expected_lse).abs().max())
    # NaN compares as a failure.
    if not torch.allclose(lse.cpu(), expected_lse.float(), rtol=2e-3, atol=2e-3 + 2 * lse_off):
        return math.inf, 0.0
    return error(out.cpu()), 2 * (error(dense_out) + ONE_ROUNDING[dtype])


def formats_to_check(quick: bool) -> list[KVFormat]:
    if quick:
        return [KVFormat.parse(spec) for spec in QUICK_FORMATS]
    return [KVFormat(n, g) for n in FORMATS for g in KVFormat(n).layout.groups or (0,)]


def fits(fmt: KVFormat, head_dim: int) -> bool:
    try:
        fmt.check_head_dim(head_dim)
    except ValueError:
        return False
    return True


def cases(quick: bool) -> Iterator[Case]:
    """Every check of ``verify``."""
    head_dims = (64, 128) if quick else HEAD_DIMS
    formats = formats_to_check(quick)
    for dtype in FLOAT_DTYPES:
        for d in head_dims:
            yield Case("kv_cache_update_", "dense", dtype, d, "", _bind(check_update, dtype, d))
            yield Case("hadamard", "dense", dtype, d, "", _bind(check_hadamard, dtype, d))
        for fmt in formats:
            for d in filter(lambda d, fmt=fmt: fits(fmt, d), head_dims):  # type: ignore[misc]
                yield from _codec_cases(fmt, dtype, d)
    for bits in (4, 5, 6, 8):
        for d in (256, 512) if quick else (64, 128, 256, 512):
            run = _bind(check_mlx_native, bits, d)
            yield Case("mlx_native_dequantize", f"{bits} bits", torch.float32, d, "", run)
    yield from _q4_k_cases(quick)
    yield from _attention_cases(formats, head_dims, quick)


def _bind(check: Callable, *arguments: Any) -> Callable[[str], tuple[float, float]]:
    return lambda device: check(*arguments, device)


def _codec_cases(fmt: KVFormat, dtype: torch.dtype, d: int) -> Iterator[Case]:
    for rotate in (False, True) if fmt.family != "turboquant" else (True,):
        chosen = fmt.rotated(rotate)
        name = str(chosen)
        encoders = ("default", "unbiased") if fmt.family == "turboquant" else ("default",)
        for encoder in encoders:
            run = _bind(check_quantize, chosen, dtype, d, encoder)
            yield Case("quantize", name, dtype, d, encoder, run)
        for op, check in (
            ("quantize_into_", check_quantize_into),
            ("append_", check_append),
            ("dequantize", check_dequantize),
            ("qdq", check_qdq),
        ):
            yield Case(op, name, dtype, d, "", _bind(check, chosen, dtype, d))


def _q4_k_cases(quick: bool) -> Iterator[Case]:
    for dtype in FLOAT_DTYPES:
        for size in (512,) if quick else (256, 512, 2304):
            for op, check in (
                ("q4_k_quantize", check_q4_k_quantize),
                ("q4_k_dequantize", check_q4_k_dequantize),
            ):
                yield Case(op, "q4_k", dtype, size, "", _bind(check, dtype, size))
            for vectors in (1, 3, 8, 40):
                op = "q4_k_gemv" if vectors == 1 else "q4_k_matmul"
                for offset in (0, 2):
                    run = _bind(check_q4_k_product, dtype, size, vectors, offset)
                    yield Case(op, "q4_k", dtype, size, f"M={vectors} offset={offset}", run)


def _attention_cases(
    formats: list[KVFormat], head_dims: tuple[int, ...], quick: bool
) -> Iterator[Case]:
    """Every format with every dtype and head size; each is a kernel of its own, so that the kinds
    of kernel (one query, a few, many) take turns at all head sizes but 128."""
    int8, int4 = KVFormat("int8"), KVFormat("int4", rotate=True)
    wanted = [
        (fmt, fmt, dtype, d)
        for d in head_dims
        for fmt in formats
        for dtype in FLOAT_DTYPES
        if fits(fmt, d) and (d == 128 or dtype == torch.float16 or not quick)
    ]
    wanted += [(int8, int4, dtype, 128) for dtype in FLOAT_DTYPES]
    for i, (k_fmt, v_fmt, dtype, d) in enumerate(wanted):
        if quick:
            counts: tuple[int, ...] = (1, 5)
        elif k_fmt != v_fmt:
            counts = (1, 5, 70)
        else:
            counts = (1, 70) if d == 128 else ((1, 5, 70)[(i + i // 3) % 3],)
        for queries in counts:
            for features in (False, True):
                run = _bind(check_attention, k_fmt, v_fmt, dtype, d, queries, features)
                pair = str(k_fmt) if k_fmt == v_fmt else f"{k_fmt}/{v_fmt}"
                variant = f"L={queries}" + (" masked" if features else "")
                yield Case("attention", pair, dtype, d, variant, run)


def run_case(case: Case, device: str) -> dict[str, Any]:
    """One row of the report; a refusal or a compile error is a failed row with its message."""
    row: dict[str, Any] = {
        "op": case.op,
        "format": case.format,
        "dtype": str(case.dtype).removeprefix("torch."),
        "head_dim": case.head_dim,
        "variant": case.variant,
    }
    try:
        error, allowed = case.run(device)
    except Exception as failure:
        return {**row, "max_error": None, "ok": False, "message": str(failure)}
    return {**row, "max_error": error, "ok": error <= allowed, "message": ""}


def machine(device: str) -> dict[str, Any]:
    return {
        "device": device,
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_kernels": torch_kvq._C.cpu_isa(),
        "torch": torch.__version__,
        "torch_kvq": torch_kvq.__version__,
        "python": platform.python_version(),
    }


def run(args: argparse.Namespace) -> int:
    device = args.device
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "mps" and not torch.backends.mps.is_available():
        raise CommandError("PyTorch finds no MPS device here; try --device cpu")
    chosen = [case for case in cases(args.quick) if args.op in (None, case.op)]
    if not chosen:
        raise CommandError(f"no case checks an op named {args.op!r}")
    rows, began = [], time.perf_counter()
    with Progress(len(chosen)) as progress:
        for case in chosen:
            progress.stage(case.name)
            rows.append(run_case(case, device))
            progress.advance()
    report = {**machine(device), "seconds": round(time.perf_counter() - began, 1), "cases": rows}
    failed = [row for row in rows if not row["ok"]]
    print(json.dumps(report) if args.json else describe(report, failed))
    return 1 if failed else 0


def describe(report: dict[str, Any], failed: list[dict[str, Any]]) -> str:
    """A line per op, then every failure."""
    summary = []
    for op in dict.fromkeys(row["op"] for row in report["cases"]):
        of_op = [row for row in report["cases"] if row["op"] == op]
        errors = [row["max_error"] for row in of_op if row["max_error"] is not None]
        passed = sum(row["ok"] for row in of_op)
        worst = f"{max(errors):.2g}" if errors else "-"
        summary.append((op, str(len(of_op)), str(passed), str(len(of_op) - passed), worst))
    lines = [
        f"{report['device']} on {report['system']}, torch {report['torch']}, "
        f"torch_kvq {report['torch_kvq']}: {report['seconds']} s",
        "",
        table(("op", "cases", "passed", "failed", "largest error"), summary),
    ]
    for row in failed[:20]:
        what = row["message"].splitlines()[0] if row["message"] else f"error {row['max_error']:.3g}"
        label = f"{row['op']} {row['format']} {row['dtype']} D={row['head_dim']} {row['variant']}"
        lines.append(f"FAILED {label}: {what}")
    if len(failed) > 20:
        lines.append(f"... and {len(failed) - 20} more (--json lists all)")
    verdict = f"{len(failed)} cases failed" if failed else "every case agrees with the reference"
    return "\n".join([*lines, "", verdict])
