"""The ops and peers that run.py times: each returns ours and the peer as functions of a round.

Operands rotate through copies larger together than the last-level cache, so that they come from
memory as in a model whose other layers evict them. Every result that is timed is checked first.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import copies

import torch_kvq  # noqa: F401  (registers the ops)
from torch_kvq import KVFormat, Packed, ops, reference
from torch_kvq.codebooks import hadamard_signs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Function = Callable[[int], Any]
#: Larger attention results than this many scores per head are not checked again by dense attention.
MOST_SCORES = 2**25


@dataclass
class Bench:
    """Ours and the peer, which take the number of a round, and the bytes that GB/s count."""

    ours: Function
    peer: Function
    nbytes: int = 0


class Case:
    """The operands of one row: random K and V of a layer, dense and packed, in rotation."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.k_format = KVFormat.parse(args.format)
        self.v_format = KVFormat.parse(args.v_format or args.format)
        self.dtype = DTYPES[args.dtype]
        self.shape = (args.batch, args.kv_heads, args.tokens, args.head_dim)
        generator = torch.Generator().manual_seed(0)
        self.key = torch.randn(self.shape, generator=generator).to(self.dtype)
        self.value = torch.randn(self.shape, generator=generator).to(self.dtype)
        self.query = torch.randn(
            args.batch, args.heads, args.queries, args.head_dim, generator=generator
        ).to(self.dtype)

    def packed(self) -> tuple[Packed, Packed]:
        return ops.quantize(self.key, self.k_format), ops.quantize(self.value, self.v_format)

    def signs(self, fmt: KVFormat) -> torch.Tensor | None:
        return hadamard_signs(self.args.head_dim) if fmt.rotate else None

    def length(self) -> torch.Tensor | int:
        if not self.args.ragged:
            return self.args.tokens
        # Rows from half to full length.
        steps = torch.linspace(0.5, 1.0, self.args.batch)
        return (steps * self.args.tokens).long()


def nbytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rotation(tensors: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(t.clone() for t in tensors) for _ in range(copies(nbytes(tensors)))]


def attention_ours(case: Case, queries: int | None = None) -> Function:
    query = case.query[:, :, :queries]
    keys, values = case.packed()
    turns = rotation((*keys, *values))
    length = case.length()
    rotated = {"k_signs": case.signs(case.k_format), "v_signs": case.signs(case.v_format)}

    def run(turn: int) -> torch.Tensor:
        packed = turns[turn % len(turns)]
        keys, values = Packed(*packed[:3]), Packed(*packed[3:])
        return ops.attention(query, keys, values, length, case.k_format, case.v_format, **rotated)[
            0
        ]

    return run


def row_mask(case: Case, rows: int) -> torch.Tensor | None:
    """Causal (lower right) and per-row length mask [B, 1, rows, T], None where all is visible."""
    args = case.args
    if args.queries == 1 and not args.ragged:
        return None
    length = torch.as_tensor(case.length()).reshape(-1, 1, 1, 1)
    position = torch.arange(args.tokens)
    query = length - args.queries + torch.arange(args.queries).view(1, 1, -1, 1)
    return (position <= query).repeat(1, 1, rows // args.queries, 1)


def attention_peer(case: Case, peer: str) -> Function:
    args = case.args
    if peer == "mlx":
        return attention_mlx(case)
    if peer == "one-query":
        one = attention_ours(case, 1)
        return lambda turn: [one(turn * args.queries + i) for i in range(args.queries)]
    dtype = torch.float32 if peer == "torch-fp32" else case.dtype
    turns = rotation((case.key.to(dtype), case.value.to(dtype)))
    query = case.query.to(dtype)
    fold = peer == "torch-folded"
    if fold:
        query = query.view(args.batch, args.kv_heads, -1, args.head_dim)
    square = args.queries == args.tokens and not fold and not args.ragged
    mask = None if square else row_mask(case, query.shape[2])

    def run(turn: int) -> torch.Tensor:
        key, value = turns[turn % len(turns)]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=square, enable_gqa=not fold
        )
        return out.view(args.batch, args.heads, args.queries, args.head_dim)

    return run


def attention_mlx(case: Case) -> Function:
    """MLX's affine codes, read by quantized_matmul, as mlx-lm's quantised cache does; float32."""
    mx, args, how = package("mlx.core"), case.args, mlx_options(case)
    if args.ragged or args.queries > 1:
        raise SystemExit("--op attention --peer mlx has one query and equal lengths")
    groups = args.heads // args.kv_heads
    query = mx.array(case.query.float().numpy() * args.head_dim**-0.5)
    query = query.reshape(args.batch, args.kv_heads, groups, args.head_dim)
    dense = [mx.array(t.float().numpy()) for t in (case.key, case.value)]
    packed = [mx.quantize(t, **how) for t in dense]
    mx.eval(query, *packed)
    nbytes_all = sum(a.nbytes for side in packed for a in side)
    turns = [[tuple(a + 0 for a in side) for side in packed] for _ in range(copies(nbytes_all))]
    for turn in turns:
        mx.eval(*turn)

    def run(turn: int) -> Any:
        keys, values = turns[turn % len(turns)]
        scores = mx.quantized_matmul(query, *keys, transpose=True, **how)
        weights = mx.softmax(scores, axis=-1, precise=True)
        out = mx.quantized_matmul(weights, *values, transpose=False, **how)
        mx.eval(out)
        return out

    return run


def check_attention(case: Case, out: torch.Tensor, peer: str = "") -> None:
    """Against float32 attention: ours on the dequantised cache, a peer on the dense one."""
    if peer:
        key, value = case.key.float(), case.value.float()
    else:
        keys, values = case.packed()
        key, value = ops.dequantize(keys, case.k_format), ops.dequantize(values, case.v_format)
    expected = F.scaled_dot_product_attention(
        case.query.float(), key, value, attn_mask=row_mask(case, case.args.queries), enable_gqa=True
    )
    error = (out.float() - expected).norm() / expected.norm()
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[case.dtype]
    if peer == "mlx":  # quantises by itself
        tolerance = {8: 0.02, 4: 0.2, 2: 0.9}[case.k_format.bits]
    assert error < tolerance, f"{peer or 'ours'}: attention is wrong by {error:.2e}"


def bench_attention(case: Case, peer: str) -> Bench:
    ours = attention_ours(case)
    theirs = attention_peer(case, peer)
    if case.args.queries * case.args.tokens <= MOST_SCORES:
        check_attention(case, ours(0))
        if peer != "one-query":
            out = theirs(0)
            out = out if isinstance(out, torch.Tensor) else torch.tensor(np.asarray(out))
            check_attention(case, out.reshape(case.query.shape), peer)
    return Bench(ours, theirs, nbytes((*case.packed()[0], *case.packed()[1])))


def bench_append(case: Case, peer: str) -> Bench:
    """One token's K and V into their slots, against one index_copy_ of as many dense values."""
    packed = case.packed()
    new = case.key[:, :, :1].contiguous(), case.value[:, :, :1].contiguous()
    dense = case.key.clone()
    slot = case.args.tokens // 2
    index = torch.tensor([slot])
    formats = case.k_format, case.v_format
    k_signs, v_signs = (case.signs(fmt) for fmt in formats)

    def ours(turn: int) -> None:
        ops.append_(*packed, *new, slot, *formats, k_signs=k_signs, v_signs=v_signs)

    def theirs(turn: int) -> None:
        dense.index_copy_(2, index, new[0])

    expected = [Packed(*(t.clone() for t in side)) for side in packed]
    expected_dense = dense.clone()
    for side, x, fmt in zip(expected, new, formats, strict=True):
        for t, one in zip(side, ops.quantize(x, fmt, signs=case.signs(fmt)), strict=True):
            t[:, :, slot : slot + 1] = one
    expected_dense[:, :, slot : slot + 1] = new[0]
    ours(0), theirs(0)
    for side, wanted in zip(packed, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(side, wanted, strict=True))
    assert torch.equal(dense, expected_dense)
    return Bench(ours, theirs)


def check_close(what: str, decoded: torch.Tensor, x: torch.Tensor, fmt: KVFormat) -> None:
    """What a codec made of x is x, but for what the format loses."""
    error = (decoded.float() - x.float()).norm() / x.float().norm()
    bound = 0.1 if fmt.family == "fp8" else 2.0 ** (1 - fmt.bits)
    if what == "mlx":  # rounds scales and biases to x's dtype
        bound += torch.finfo(x.dtype).eps
    assert error < bound, f"{what}: {fmt} loses {error:.3f}"


def bench_quantize(case: Case, peer: str) -> Bench:
    """K and V from dense to packed; a memcpy moves the dense bytes."""
    turns = rotation((case.key, case.value))
    formats = case.k_format, case.v_format

    def ours(turn: int) -> list[Packed]:
        pairs = zip(turns[turn % len(turns)], formats, strict=True)
        return [ops.quantize(x, fmt) for x, fmt in pairs]

    for packed, fmt, x in zip(ours(0), formats, turns[0], strict=True):
        check_close("ours", ops.dequantize(packed, fmt), x, fmt)
    if peer == "mlx":
        theirs = quantize_mlx(case, turns)
    elif peer == "gguf":
        theirs = quantize_gguf(case, turns)
        for packed, rows in zip(ours(0), theirs(0), strict=True):
            assert torch.equal(packed.codes.flatten(0, 2), torch.from_numpy(rows))
    else:
        theirs = copy_peer((case.key, case.value))
    return Bench(ours, theirs, nbytes((case.key, case.value)))


def package(name: str) -> Any:
    """A peer's package."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SystemExit(f"this peer needs the package {name.partition('.')[0]}") from None


def mlx_array(mx: Any, x: torch.Tensor) -> Any:
    """x as an MLX array of its dtype."""
    return mx.array(x.float().numpy()).astype(getattr(mx, str(x.dtype).removeprefix("torch.")))


def to_torch(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array.astype(package("mlx.core").float32)))


def mlx_options(case: Case) -> dict[str, int]:
    fmt = case.k_format
    if fmt.family != "affine" or fmt.rotate or fmt != case.v_format:
        raise SystemExit("--peer mlx has int8, int4 and int2, unrotated, K and V alike")
    return {"group_size": fmt.group_size, "bits": fmt.bits}


def gguf_type(case: Case) -> tuple[Any, Any]:
    """The gguf package's quants, and the format's name there."""
    gguf = package("gguf")
    if case.k_format.family != "gguf" or case.k_format.rotate or case.k_format != case.v_format:
        raise SystemExit("--peer gguf has q8_0 and q4_0, unrotated, K and V alike")
    return gguf.quants, gguf.GGMLQuantizationType[case.k_format.name.upper()]


def quantize_mlx(case: Case, turns: list[tuple[torch.Tensor, ...]]) -> Function:
    """mx.quantize of the same tensors in the same dtype."""
    mx, how = package("mlx.core"), mlx_options(case)
    arrays = [[mlx_array(mx, x) for x in turn] for turn in turns]
    mx.eval(*arrays)

    def run(turn: int) -> Any:
        packed = [mx.quantize(a, **how) for a in arrays[turn % len(arrays)]]
        mx.eval(*packed)
        return packed

    for packed, x in zip(run(0), turns[0], strict=True):
        check_close("mlx", to_torch(mx.dequantize(*packed, **how)), x, case.k_format)
    return run


def quantize_gguf(case: Case, turns: list[tuple[torch.Tensor, ...]]) -> Function:
    """The gguf package's quantise, in numpy, of the same values in float32, all that it takes."""
    quants, kind = gguf_type(case)
    rows = [[x.float().flatten(0, 2).numpy() for x in turn] for turn in turns]
    return lambda turn: [quants.quantize(r, kind) for r in rows[turn % len(rows)]]


def copy_peer(tensors: tuple[torch.Tensor, ...]) -> Function:
    """memcpy of as many bytes, into memory that rotates too."""
    sources, targets = rotation(tensors), rotation(tensors)

    def run(turn: int) -> None:
        pairs = zip(targets[turn % len(targets)], sources[turn % len(sources)], strict=True)
        for target, source in pairs:
            target.copy_(source)

    return run


def bench_dequantize(case: Case, peer: str) -> Bench:
    """K from packed to dense; a memcpy moves the dense bytes."""
    keys, fmt = case.packed()[0], case.k_format
    turns = rotation(tuple(keys))

    def ours(turn: int) -> torch.Tensor:
        return ops.dequantize(Packed(*turns[turn % len(turns)]), fmt, dtype=case.dtype)

    dense = ours(0)
    expected = reference.dequantize(
        *keys, fmt.name, fmt.group_size, signs=case.signs(fmt), dtype=case.dtype
    )
    assert torch.equal(dense, expected)
    if peer == "mlx":
        theirs = dequantize_mlx(case)
    elif peer == "gguf":
        theirs = dequantize_gguf(case, turns)
        rows = torch.from_numpy(theirs(0)).view(dense.shape)
        assert torch.equal(rows.to(case.dtype), dense)
    else:
        theirs = copy_peer((dense,))
    return Bench(ours, theirs, nbytes((dense,)))


def dequantize_mlx(case: Case) -> Function:
    mx, how = package("mlx.core"), mlx_options(case)
    packed = mx.quantize(mlx_array(mx, case.key), **how)
    mx.eval(*packed)
    turns = [[a + 0 for a in packed] for _ in range(copies(sum(a.nbytes for a in packed)))]
    mx.eval(*turns)

    def run(turn: int) -> Any:
        dense = mx.dequantize(*turns[turn % len(turns)], **how)
        mx.eval(dense)
        return dense

    check_close("mlx", to_torch(run(0)), case.key, case.k_format)
    return run


def dequantize_gguf(case: Case, turns: list[tuple[torch.Tensor, ...]]) -> Function:
    quants, kind = gguf_type(case)
    blocks = [turn[0].flatten(0, 2).numpy() for turn in turns]
    return lambda turn: quants.dequantize(blocks[turn % len(blocks)], kind)


def bench_dense_to_dense(case: Case, peer: str) -> Bench:
    """qdq and hadamard: K in, as much out; against a copy."""
    turns = rotation((case.key,))
    signs = hadamard_signs(case.args.head_dim)

    def ours(turn: int) -> torch.Tensor:
        (key,) = turns[turn % len(turns)]
        return (
            ops.hadamard(key, signs) if case.args.op == "hadamard" else ops.qdq(key, case.k_format)
        )

    if case.args.op == "hadamard":
        expected = reference.hadamard(case.key[:, :, :64], signs)
    else:
        fmt = case.k_format
        start = case.key[:, :, :64]
        expected = reference.qdq(start, fmt.name, fmt.group_size, signs=case.signs(fmt))
    assert torch.equal(ours(0)[:, :, :64], expected)
    return Bench(ours, copy_peer((case.key,)), nbytes((case.key,)))


def bench_update(case: Case, peer: str) -> Bench:
    """One token into a dense cache, against index_copy_."""
    cache, dense, new = case.key.clone(), case.key.clone(), case.value[:, :, :1].contiguous()
    slot = case.args.tokens // 2
    index = torch.tensor([slot])

    def ours(turn: int) -> None:
        ops.kv_cache_update_(cache, new, slot)

    def theirs(turn: int) -> None:
        dense.index_copy_(2, index, new)

    ours(0), theirs(0)
    assert torch.equal(cache, dense)
    return Bench(ours, theirs)


def bench_mlx_native(case: Case, peer: str) -> Bench:
    """4-bit rows of mlx-native's layout to float32, against a copy of as many floats."""
    generator = torch.Generator().manual_seed(0)
    row = (*case.shape[:3], case.args.head_dim // 2)
    codes = torch.randint(0, 256, row, generator=generator, dtype=torch.uint8)
    turns = rotation((codes, torch.ones(*case.shape[:3], max(1, case.args.head_dim // 256))))

    def ours(turn: int) -> torch.Tensor:
        return ops.mlx_native_dequantize(*turns[turn % len(turns)], 4)

    assert torch.allclose(ours(0), reference.mlx_native_dequantize(*turns[0], 4))
    source = torch.zeros(case.shape)
    return Bench(ours, copy_peer((source,)), nbytes((source,)))


OPS = {
    "attention": (
        bench_attention, ("torch-folded", "torch-gqa", "torch-fp32", "mlx", "one-query"),
    ),
    "append": (bench_append, ("index-copy",)),
    "quantize": (bench_quantize, ("memcpy", "mlx", "gguf")),
    "dequantize": (bench_dequantize, ("memcpy", "mlx", "gguf")),
    "qdq": (bench_dense_to_dense, ("memcpy",)),
    "hadamard": (bench_dense_to_dense, ("memcpy",)),
    "kv_cache_update": (bench_update, ("index-copy",)),
    "mlx_native_dequantize": (bench_mlx_native, ("memcpy",)),
}  # fmt: skip
