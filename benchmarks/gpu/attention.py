"""Decode, prefill and merge kernels: launched as csrc/mps/attention.mm does, checked, timed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torch_kvq import reference
from torch_kvq.codebooks import hadamard_signs
from torch_kvq.formats import KVFormat, default_scale_dtype

from .catalogue import DTYPE_NAMES, DTYPES
from .device import DEVICE, Kernels, time_calls
from .shares import WHOLE, Share, is_in
from .structs import make

THREADS = 128
PREFILL_ROWS = 32
SPLITS = (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 128)


@dataclass
class Shape:
    """B, H, G, L, T and D of ops.attention; the capacity is T."""

    batch: int
    heads: int
    groups: int
    queries: int
    tokens: int
    head_dim: int = 128

    @property
    def rows(self) -> int:
        return self.queries * self.heads // self.groups


class Case:
    """A query and packed K and V on the GPU."""

    def __init__(
        self, k: str, v: str, dtype: torch.dtype, shape: Shape, seed: int = 0, quick: bool = False
    ) -> None:
        """`quick`: bytes of codes and scales are random, not packed values."""
        self.quick = quick
        self.k, self.v, self.dtype, self.shape = KVFormat.parse(k), KVFormat.parse(v), dtype, shape
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        s = shape
        self.query = self._random(s.batch, s.heads, s.queries, s.head_dim)
        self.signs = [
            hadamard_signs(s.head_dim).to(DEVICE) if fmt.rotate else None
            for fmt in (self.k, self.v)
        ]
        self.packed = [
            self._pack(fmt, signs) for fmt, signs in zip((self.k, self.v), self.signs, strict=True)
        ]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=DEVICE).to(self.dtype)

    def _pack(self, fmt: KVFormat, signs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Random K or V, quantised by the reference a batch row and 16,384 tokens at a time."""
        s = self.shape
        packed = fmt.empty(s.batch, s.groups, s.tokens, s.head_dim, dtype=self.dtype, device=DEVICE)
        if self.quick:
            for tensor in packed:
                tensor.view(torch.uint8).random_(0, 60)
            return packed
        for b in range(s.batch):
            for begin in range(0, s.tokens, 16384):
                end = min(begin + 16384, s.tokens)
                part = reference.quantize(
                    self._random(1, s.groups, end - begin, s.head_dim), fmt.name, fmt.group_size,
                    signs=signs, scale_dtype=default_scale_dtype(self.dtype),
                )  # fmt: skip
                for whole, piece in zip(packed, part, strict=True):
                    whole[b : b + 1, :, begin:end] = piece
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""
        return sum(t.numel() * t.element_size() for side in self.packed for t in side)

    def dense(self, dtype: torch.dtype, batch: slice = slice(None)) -> list[torch.Tensor]:
        """K and V dequantised."""
        return [
            reference.dequantize(
                *(t[batch] for t in side), fmt.name, fmt.group_size, signs=signs, dtype=dtype
            )
            for side, fmt, signs in zip(
                self.packed, (self.k, self.v), self.signs, strict=True
            )
        ]  # fmt: skip


def params_of(case: Case, splits: int):  # type: ignore[no-untyped-def]
    """KvqAttentionParams of a causal call without mask, window or bounds."""
    s = case.shape
    p = make(
        "KvqAttentionParams",
        heads=s.heads, groups=s.groups, repeat=s.heads // s.groups, queries=s.queries,
        capacity=s.tokens, value_dim=s.head_dim, splits=splits, causal=1, magic=0x4B000000,
        scale=1 / math.sqrt(s.head_dim),
    )  # fmt: skip
    for side, packed, signs in zip(("k", "v"), case.packed, case.signs, strict=True):
        for name, tensor in zip(("codes", "scales", "biases"), packed, strict=True):
            size = tensor.element_size()
            batch, head, token, _ = tensor.stride()
            p[side][f"{name}_batch"], p[side][f"{name}_head"] = batch * size, head * size
            p[side][f"{name}_token"] = token * size
        p[side]["rotated"] = signs is not None
    p["kv_length"]["value"] = s.tokens
    p["kv_end"]["value"] = torch.iinfo(torch.int64).max
    batch, head, token, _ = case.query.stride()
    p["query_batch"], p["query_head"], p["query_token"] = batch, head, token
    return p


def merge_threads(rows: int, splits: int) -> int:
    """As csrc/mps/attention.mm has it."""
    return 32 if splits <= 16 and rows > 256 else THREADS


class Attention:
    """A prepared call: the kernel of a manifest row, and the merge pass where tokens are split."""

    def __init__(self, kernels: Kernels, row: dict, case: Case, splits: int) -> None:
        s = case.shape
        p = params_of(case, splits)
        self.out = torch.full_like(case.query, math.nan)
        self.lse = torch.full(case.query.shape[:3], math.nan, device=DEVICE)
        size = case.query.shape[:3].numel() * splits * (s.head_dim + 2) if splits > 1 else 1
        self.partial = torch.full((size,), math.nan, device=DEVICE)
        tile = PREFILL_ROWS if row["prefill"] else row["rows"]
        absent = [None] * 5  # kv_length, kv_start, kv_end, mask, sinks
        means = [None, None]
        self.launches = [
            kernels.prepare(
                row,
                (splits, -(-s.rows // tile), s.batch * s.groups),
                (THREADS,),
                [case.query, *case.packed[0], *case.packed[1], *absent, *case.signs, *means,
                 self.out, self.lse, self.partial],
                p,
            )
        ]  # fmt: skip
        if splits > 1:
            merge = kernels.find(op="attention_merge", dtype=DTYPE_NAMES[case.dtype])
            self.launches.append(
                kernels.prepare(
                    merge,
                    (s.queries, s.heads, s.batch),
                    (merge_threads(s.batch * s.heads * s.queries, splits),),
                    [self.partial, None, case.signs[1], None, self.out, self.lse],
                    p,
                )
            )

    def __call__(self) -> None:
        for launch in self.launches:
            launch()


def exact(case: Case, batch: slice) -> torch.Tensor:
    """Attention in float64 on the dequantised values."""
    key, value = (t.double() for t in case.dense(torch.float32, batch))
    return _attend(case.query[batch].double(), key, value)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v in the dtype of the arguments, causal, heads folded."""
    batch, heads, queries, dim = query.shape
    groups, tokens = key.shape[1:3]
    folded = query.reshape(batch, groups, heads // groups * queries, dim)
    scores = folded @ key.transpose(-1, -2) / math.sqrt(dim)
    if queries > 1:
        last = torch.arange(tokens - queries, tokens, device=query.device)
        hidden = torch.arange(tokens, device=query.device) > last[:, None]
        scores = scores.unflatten(2, (-1, queries)).masked_fill(hidden, -math.inf).flatten(2, 3)
    return (scores.softmax(-1) @ value).reshape(batch, heads, queries, dim)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared error."""
    return (out.double() - expected.double()).square().mean().sqrt().item()


def check(case: Case, out: torch.Tensor, batch: slice = slice(None)) -> dict[str, object]:
    """Our error against float64, and that of torch's attention in the query's dtype on the
    dequantised values; ours must not be above twice torch's and the rounding of the output."""
    expected = exact(case, batch)
    s = case.shape
    mask = None
    if s.queries > 1:
        last = torch.arange(s.tokens - s.queries, s.tokens, device=DEVICE)
        mask = torch.arange(s.tokens, device=DEVICE) <= last[:, None]
    dense = F.scaled_dot_product_attention(
        case.query[batch], *case.dense(case.dtype, batch), attn_mask=mask, enable_gqa=True
    )
    ours, torchs = error(out[batch], expected), error(dense, expected)
    rounding = torch.finfo(case.dtype).eps * expected.abs().max().item()
    return {"error": ours, "dense_error": torchs, "ok": ours <= 2 * torchs + 0.05 * rounding}


def dense_calls(shape: Shape) -> Iterator[tuple[str, Callable[[], object]]]:
    """torch's scaled_dot_product_attention in bfloat16, by every backend that takes the call, with
    its own grouping and with query heads folded into rows. Several query tokens go without a
    causal mask, which can only be faster."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    s = shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, dtype=torch.bfloat16)

    query = random(s.batch, s.heads, s.queries, s.head_dim)
    key, value = (random(s.batch, s.groups, s.tokens, s.head_dim) for _ in range(2))
    folded = query.reshape(s.batch, s.groups, s.rows, s.head_dim)
    backends = {
        "default": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    for name, backend in backends.items():
        for layout, q in (("gqa", query), ("folded", folded)):
            if layout == "folded" and s.heads == s.groups:
                continue

            def call(q=q, backend=backend, gqa=q.shape[1] != s.groups):  # type: ignore[no-untyped-def]
                with sdpa_kernel(backend) if backend is not None else nullcontext():
                    return F.scaled_dot_product_attention(q, key, value, enable_gqa=gqa)

            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they say why a backend refuses
                    call()
                torch.cuda.synchronize()
            except (RuntimeError, torch.OutOfMemoryError):
                continue
            yield f"{name}-{layout}", call


def best_dense(shape: Shape) -> dict[str, object]:
    """Microseconds of each way to call torch, and the best."""
    calls = dict(dense_calls(shape))
    times = time_calls(calls, repeats=5)
    quick = sorted(times, key=times.__getitem__)[:2]
    times |= time_calls({name: calls[name] for name in quick}, repeats=30)
    best = min(quick, key=times.__getitem__)
    return {"us": times[best], "by": best, "all": times}


def candidates(kernels: Kernels, case: Case) -> dict[str, dict]:
    """Kernels of the manifest that could serve the case, of each kind the one whose rows suit it.
    As the built-in table of csrc/mps/tuning.h has it, the matrix kernel serves 3 rows or more."""
    least = {"decode": 1, "matrix": 3, "prefill": PREFILL_ROWS // 2}
    wanted = case.shape.rows
    found: dict[str, dict] = {}
    for row in kernels.select(
        op="attention", dtype=DTYPE_NAMES[case.dtype], k=str(case.k), v=str(case.v),
        head_dim=case.shape.head_dim, aligned=True,
    ):  # fmt: skip
        kind = "prefill" if row["prefill"] else "matrix" if row["matrix"] else "decode"
        # The fewest rows that hold all, else the most.
        rank = (row["rows"] < wanted, abs(row["rows"] - wanted))
        best = found.get(kind)
        if wanted >= least[kind] and (best is None or rank < best["rank"]):
            found[kind] = {**row, "rank": rank}
    return {f"{kind}{row['rows']}": row for kind, row in found.items()}


def built_in(shape: Shape, found: dict[str, dict]) -> tuple[str, int]:
    """Which of the candidates, and how many splits, the built-in table of csrc/mps/tuning.h makes
    of a call: one for all formats, with Apple's GPUs in mind."""
    kinds = ["decode"] if shape.rows <= 2 else ["matrix", "decode"]
    if shape.rows > 128:
        kinds = ["prefill", *kinds]
    name = next(n for kind in kinds for n in found if n.startswith(kind))
    tile = PREFILL_ROWS if found[name]["prefill"] else found[name]["rows"]
    tasks = -(-shape.rows // tile) * shape.batch * shape.groups
    needed = -(-shape.tokens // 2**15) if found[name]["matrix"] else 1
    return name, min(max(needed, min(256 // tasks, shape.tokens // 256)), 128)


def measure(kernels: Kernels, case: Case, splits: tuple[int, ...] = SPLITS) -> dict[str, object]:
    """The fastest kernel and number of splits for a case, timed and checked; `table_us` is what the
    built-in tuning table's choice takes."""
    tried: dict[str, float] = {}
    rows = {}
    found = candidates(kernels, case)
    for kind, row in found.items():
        calls = {f"{kind}/{n}": Attention(kernels, row, case, n) for n in splits}
        tried |= time_calls(calls, repeats=5)
        rows |= dict.fromkeys(calls, row)
    best = min(tried, key=tried.__getitem__)
    row, number = rows[best], int(best.partition("/")[2])
    call = Attention(kernels, row, case, number)
    us = time_calls({"ours": call})["ours"]
    kind, table_splits = built_in(case.shape, found)
    table = Attention(kernels, found[kind], case, table_splits)
    table_us = time_calls({"table": table})["table"]
    results = [check(case, call.out, slice(b, b + 1)) for b in {0, case.shape.batch - 1}]
    return {
        "kernel": row["kernel"], "registers": row["registers"], "spilled": row.get("spilled", 0),
        "splits": number, "us": us, "table_splits": table_splits, "table_us": table_us,
        "nbytes": case.nbytes, "gbps": case.nbytes / us / 1e3,
        "tried": tried, "checks": results, "ok": all(r["ok"] for r in results),
    }  # fmt: skip


def small_checks(
    kernels: Kernels, checked: bool = True, share: Share = WHOLE, ops: list[str] | None = None
) -> Iterator[tuple[dict, dict[str, object]]]:
    """A share of the build's attention kernels on small shapes, with one split and with three;
    only launched unless `checked`."""
    for number, row in enumerate(kernels.select(op="attention")):
        if not is_in(number, share) or (ops and "attention" not in ops):
            continue
        repeat = (1, 2, 4, 8)[number % 4]
        queries = max(1, (PREFILL_ROWS if row["prefill"] else row["rows"]) // repeat)
        if row["prefill"]:
            queries += 3
        shape = Shape(2, 2 * repeat, 2, queries, 203, row["head_dim"])
        case = Case(row["k"], row["v"], DTYPES[row["dtype"]], shape, number, quick=not checked)
        results = []
        for splits in (1, 3):
            call = Attention(kernels, row, case, splits)
            call()
            if checked:
                results.append(check(case, call.out))
        yield row, {"checks": results, "ok": all(r["ok"] for r in results)}
