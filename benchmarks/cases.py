"""The ops and peers that run.py times: each returns ours and the peer as functions of a round.

Operands rotate through copies larger together than the last-level cache, so that they come from
memory as in a model whose other layers evict them. Every result that is timed is checked first.
"""

from __future__ import annotations

import argparse
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
    import mlx.core as mx

    args, fmt = case.args, case.k_format
    if fmt.family != "affine" or fmt != case.v_format or args.ragged or args.queries > 1:
        raise SystemExit("--peer mlx has one affine format for K and V, one query, equal lengths")
    how = {"group_size": fmt.group_size, "bits": fmt.bits}
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
    keys, values = case.packed()
    new = case.key[:, :, :1].contiguous(), case.value[:, :, :1].contiguous()
    dense = case.key.clone()
    index = torch.tensor([case.args.tokens // 2])
    k, v = case.k_format, case.v_format
    signs = {"k_signs": case.signs(k), "v_signs": case.signs(v)}

    def ours(turn: int) -> None:
        ops.append_(keys, values, *new, case.args.tokens // 2, k, v, **signs)

    def theirs(turn: int) -> None:
        dense.index_copy_(2, index, new[0])

    before = Packed(*(t.clone() for t in keys))
    ours(0)
    slot = case.args.tokens // 2
    expected = ops.quantize(new[0], k, signs=case.signs(k))
    for was, now, one in zip(before, keys, expected, strict=True):
        was[:, :, slot : slot + 1] = one
        assert torch.equal(was, now)
    return Bench(ours, theirs)


def bench_quantize(case: Case, peer: str) -> Bench:
    """K and V from dense to packed; a memcpy moves the dense bytes."""
    turns = rotation((case.key, case.value))

    def ours(turn: int) -> list[Packed]:
        return [
            ops.quantize(x, fmt)
            for x, fmt in zip(turns[turn % len(turns)], (case.k_format, case.v_format), strict=True)
        ]

    for packed, fmt, x in zip(
        ours(0), (case.k_format, case.v_format), (case.key, case.value), strict=True
    ):
        error = (ops.dequantize(packed, fmt) - x.float()).norm() / x.float().norm()
        bound = 0.1 if fmt.family == "fp8" else 2.0 ** (1 - fmt.bits)
        assert error < bound, f"{fmt} loses {error:.3f}"
    return Bench(ours, quantize_peer(case, peer), nbytes((case.key, case.value)))


def quantize_peer(case: Case, peer: str) -> Function:
    fmt = case.k_format
    if peer == "mlx":
        import mlx.core as mx

        # float32: MLX quantises it faster than its half types.
        arrays = [mx.array(t.float().numpy()) for t in (case.key, case.value)]
        mx.eval(*arrays)

        def run(turn: int) -> None:
            packed = [mx.quantize(a, group_size=fmt.group_size, bits=fmt.bits) for a in arrays]
            mx.eval(*packed)

        return run
    if peer == "gguf":
        from gguf import GGMLQuantizationType, quants

        rows = [t.float().reshape(-1, case.args.head_dim).numpy() for t in (case.key, case.value)]
        kind = GGMLQuantizationType[fmt.name.upper()]
        return lambda turn: [quants.quantize(r, kind) for r in rows]
    return copy_peer((case.key, case.value))


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
    start = (t[:, :, :64] for t in keys)
    expected = reference.dequantize(
        *start, fmt.name, fmt.group_size, signs=case.signs(fmt), dtype=case.dtype
    )
    assert torch.equal(dense[:, :, :64], expected)
    if peer == "mlx":
        theirs = dequantize_mlx(case)
    elif peer == "gguf":
        theirs = dequantize_gguf(case, turns)
    else:
        theirs = copy_peer((dense,))
    return Bench(ours, theirs, nbytes((dense,)))


def dequantize_mlx(case: Case) -> Function:
    import mlx.core as mx

    how = {"group_size": case.k_format.group_size, "bits": case.k_format.bits}
    packed = mx.quantize(mx.array(case.key.float().numpy()), **how)
    mx.eval(*packed)
    return lambda turn: mx.eval(mx.dequantize(*packed, **how))


def dequantize_gguf(case: Case, turns: list[tuple[torch.Tensor, ...]]) -> Function:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[case.k_format.name.upper()]
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
