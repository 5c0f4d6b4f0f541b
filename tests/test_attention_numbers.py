"""attention's error against float64 and against dense attention; NaN, infinity, huge scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.attention_helpers import INT4, INT8, TQ4, make
from tests.helpers import (
    ALL_FORMATS,
    SOME_FORMATS,
    dtype_id,
    normal,
    reference_dequantize,
    reference_quantize,
)
from torch_kvq.formats import FLOAT_DTYPES, KVFormat
from torch_kvq.ops import Packed


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
@pytest.mark.parametrize("queries", [1, 64])
def test_error_is_at_most_twice_sdpa_error(device, fmt, dtype, queries):
    case = make(fmt, head_dim=128, queries=queries, length=501, capacity=501, dtype=dtype, share=4)
    dense = [
        reference_dequantize(packed, fmt).double()
        for packed in (case.keys, case.values)
    ]  # fmt: skip
    mask = torch.ones(queries, 501, dtype=torch.bool).tril(501 - queries)
    exact = scaled_dot_product_attention(
        case.query.double(), *dense, attn_mask=mask, enable_gqa=True
    )
    rounded = [t.to(dtype) for t in dense]
    peer = scaled_dot_product_attention(case.query, *rounded, attn_mask=mask, enable_gqa=True)
    out, _ = case.run(device)
    ours, theirs = out.double() - exact, peer.double() - exact
    assert ours.abs().mean() <= 2 * theirs.abs().mean()
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()
    # Of the worst element too; half a rounding of the output is anybody's luck.
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert ours.abs().max() <= 2 * theirs.abs().max() + 0.5 * rounding


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", [f for f in ALL_FORMATS if f.group_size in (0, 32, 128)], ids=str)
def test_error_where_few_tokens_matter(device, fmt, dtype):
    """Queries along some keys: their scores are large, and an error all codes share would show."""
    case = make(fmt, head_dim=128, queries=2, length=300, capacity=300, dtype=dtype, share=4)
    dense = [reference_dequantize(p, fmt).double() for p in (case.keys, case.values)]
    heads = torch.arange(8)
    case.query = torch.stack([dense[0][:, heads // 4, 30 * heads + i] for i in (5, 9)], 2).to(dtype)
    exact, _ = case.expected()
    mask = torch.ones(2, 300, dtype=torch.bool).tril(298)
    rounded = [t.to(dtype) for t in dense]
    peer = scaled_dot_product_attention(case.query, *rounded, attn_mask=mask, enable_gqa=True)
    out, _ = case.run(device)
    ours, theirs = out.double() - exact, peer.double() - exact
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("fmt", [*SOME_FORMATS, KVFormat("fp8_e5m2", 32)], ids=str)
@pytest.mark.parametrize("where", ["k", "v", "q"])
def test_nan_is_never_hidden(device, fmt, where, dtype):
    case = make(fmt, head_dim=64, queries=2, length=100, dtype=dtype)
    if where == "q":
        case.query[0, 1, 1, 3] = torch.nan
    else:
        x = normal(1, 2, 150, 64, seed=9, dtype=dtype)
        x[0, 1, 40, 5] = torch.nan
        packed = reference_quantize(x, fmt)
        case.keys, case.values = (packed, case.values) if where == "k" else (case.keys, packed)
    out, lse = case.run(device)
    if where == "q":
        seen = torch.zeros(1, 4, 2, dtype=torch.bool)
        seen[0, 1, 1] = True
        assert torch.equal(out.isnan().all(-1), seen) and torch.equal(lse.isnan(), seen)
        return
    assert out[:, 2:].isnan().any(-1).all() and not out[:, :2].isnan().any()
    assert where == "v" or lse[:, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("queries", [1, 3, 90])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_every_fp8_code(device, name, queries, dtype):
    """Codes that no encoder writes too: NaN and infinity decode to themselves."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 64)
    scales = torch.full((1, 1, 4, 1), 0.5, dtype=torch.float16)
    packed = Packed(codes, scales, scales[..., :0])
    values = reference_dequantize(packed, KVFormat(name))
    for token in range(4):
        case = make(
            KVFormat("none"), KVFormat(name), queries=queries, groups=1, share=1, dtype=dtype
        )
        case.values = packed
        case.keys = Packed(*(t[:, :, :4] for t in case.keys))
        bounds = {"kv_start": torch.tensor(token), "kv_end": torch.tensor(token + 1)}
        case.length = torch.tensor(4)
        out, _ = case.run(device, causal=False, **bounds)
        want = values[0, 0, token].expand(queries, 64)
        out = out[0, 0].float()
        assert torch.equal(out.isnan(), want.isnan())
        assert torch.equal(out.nan_to_num(0, 1e9, -1e9), want.nan_to_num(0, 1e9, -1e9))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("queries", [1, 3, 90])
def test_infinite_value(device, queries, dtype):
    """A value that is infinite makes outputs infinite, not NaN, wherever it stands in the cache."""
    for slot in (0, 63, 126):
        case = make(KVFormat("none"), queries=queries, causal=False, dtype=dtype)
        case.values.codes.view(dtype)[:, :, slot, 5] = -math.inf
        out, _ = case.run(device)
        assert (out[..., 5] == -math.inf).all()
        out[..., 5] = 0
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("queries", [1, 3, 90])
@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
def test_unseen_slots_do_not_matter(device, fmt, queries, dtype):
    case = make(fmt, head_dim=128, queries=queries, dtype=dtype, kv_start=torch.tensor(20))
    clean = case.run(device)
    for packed in (case.keys, case.values):
        for t in packed:
            for garbage in (t[:, :, :20], t[:, :, 127:]):
                if t.is_floating_point():
                    garbage.fill_(torch.nan)
                else:
                    garbage.fill_(255)
    for a, b in zip(case.run(device), clean, strict=True):
        assert torch.equal(a, b)


def test_huge_and_tiny_scores(device):
    case = make(INT8, queries=3)
    case.query *= 1e4
    out, lse = case.run(device)
    want, want_lse = case.expected()
    assert (out - want).abs().max() < 1e-2 and out.isfinite().all()
    assert ((lse - want_lse).abs() <= 1e-5 * want_lse.abs()).all()
    case.query *= 1e-12
    case.check(device)


@pytest.mark.parametrize("queries", [1, 4, 90])
def test_ranges_merge_to_the_whole(device, queries):
    """Attention over two ranges of positions, merged by lse, is attention over both."""
    case = make(INT4, TQ4, queries=queries, length=400, capacity=400, means=True)
    out, lse = case.run(device)
    for at in (0, 1, 64, 333, 400):
        parts = [
            case.run(device, kv_end=torch.tensor(at)),
            case.run(device, kv_start=torch.tensor(at)),
        ]
        total = torch.logaddexp(parts[0][1], parts[1][1])
        merged = sum(o * (part - total).exp().nan_to_num(0).unsqueeze(-1) for o, part in parts)
        assert (merged - out).abs().max() < 1e-5 and (total - lse).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("queries,length", [(1, 2000), (3, 700), (33, 300), (300, 300)])
def test_threads_do_not_change_a_bit(device, queries, length, dtype):
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    lengths = torch.tensor([length, length // 3])
    case = make(INT4, TQ4, batch=2, share=4, queries=queries, capacity=length, length=lengths,
                dtype=dtype)  # fmt: skip
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(device))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
