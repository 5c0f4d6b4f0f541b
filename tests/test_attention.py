"""attention on packed K and V against the float64 reference: formats, shapes, masks, layouts."""

from __future__ import annotations

import itertools
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention_helpers import INT4, INT8, TQ4, Case, assert_close, make
from tests.helpers import (
    ALL_FORMATS,
    HEAD_DIMS,
    SOME_FORMATS,
    dtype_id,
    holds,
    normal,
    reference_quantize,
)
from torch_kvq.formats import FLOAT_DTYPES, KVFormat
from torch_kvq.ops import Packed

# ---- Formats and shapes.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_every_format(device, fmt, dtype):
    make(fmt, head_dim=128, queries=2, dtype=dtype).check(device)
    narrow = max(64, fmt.group_size)
    make(fmt, head_dim=narrow, queries=1, share=1, dtype=dtype, seed=5).check(device)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
def test_rotation_and_means(device, fmt, rotate):
    make(fmt.rotated(rotate), head_dim=128, queries=3, means=True).check(device)


@pytest.mark.parametrize(
    "k_format,v_format", list(itertools.permutations(SOME_FORMATS, 2)), ids=dtype_id
)
def test_mixed_formats(device, k_format, v_format):
    make(k_format, v_format, head_dim=128, queries=2, length=70).check(device)


@pytest.mark.parametrize("head_dim,v_dim", list(itertools.permutations(HEAD_DIMS, 2)))
def test_two_head_dims(device, head_dim, v_dim):
    dtype = torch.bfloat16 if head_dim < v_dim else torch.float32
    make(TQ4, KVFormat("none"), head_dim=head_dim, v_dim=v_dim, dtype=dtype).check(device)
    make(KVFormat("none"), TQ4, head_dim=head_dim, v_dim=v_dim, queries=40, dtype=dtype).check(
        device
    )


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_head_dims_of_format(device, fmt):
    for head_dim in (d for d in HEAD_DIMS if holds(fmt, d)):
        make(fmt, head_dim=head_dim, queries=2, length=65, capacity=65).check(device)


@pytest.mark.parametrize("head_dim", [1, 7, 40, 59, 111, 512, 1024])
def test_odd_and_large_head_dims(device, head_dim):
    make(KVFormat("none"), head_dim=head_dim, queries=2, dtype=torch.float16).check(device)
    if head_dim % 8 == 0:
        make(KVFormat("tq3"), head_dim=head_dim, queries=2).check(device)


@pytest.mark.parametrize("share", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
def test_shares_in_bfloat16(device, fmt, share):
    """bfloat16 queries have kernels of their own where the processor multiplies such pairs."""
    for length, head_dim in ((127, 64), (64, 192), (9, 96)):
        fits = head_dim if holds(fmt, head_dim) else 128
        make(fmt, share=share, length=length, head_dim=fits, dtype=torch.bfloat16).check(device)


@pytest.mark.parametrize("share", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("queries", [1, 2, 5, 33])
def test_heads_and_queries(device, groups, share, queries):
    make(INT4, INT8, groups=groups, share=share, queries=queries).check(device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("queries", [127, 300])
def test_many_queries(device, queries, dtype):
    case = make(INT8, INT4, queries=queries, capacity=520, length=501, dtype=dtype)
    case.check(device)
    case = make(TQ4, INT4, queries=queries, capacity=300, length=300, dtype=dtype, head_dim=80,
                v_dim=64)  # fmt: skip
    case.check(device)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 501])
def test_lengths(device, length):
    make(INT4, length=length, capacity=501).check(device)
    make(INT4, length=length, capacity=length, groups=1, share=4).check(device)


@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES, ids=dtype_id)
def test_scale_dtypes(device, scale_dtype):
    for fmt in (INT8, KVFormat("fp8_e5m2", 32), TQ4):
        case = make(fmt, head_dim=128)
        x = normal(1, 2, 150, 128)
        case.keys = reference_quantize(x, fmt, scale_dtype=scale_dtype)
        case.check(device)


# ---- Memory layouts.


def layouts(packed: Packed) -> dict[str, Packed]:
    def inside(t: torch.Tensor) -> torch.Tensor:
        """t in the middle of a larger buffer of garbage."""
        big = torch.full([n + 2 for n in t.shape], 85, dtype=t.dtype)
        view = big[1:-1, 1:-1, 1:-1, 1:-1]
        view.copy_(t)
        return view

    return {
        "narrowed": Packed(*map(inside, packed)),
        "tokens first": Packed(
            *(t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in packed)
        ),
        "heads inside tokens": Packed(
            *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in packed)
        ),
    }


@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
@pytest.mark.parametrize("layout", ["narrowed", "tokens first", "heads inside tokens"])
def test_cache_layouts(device, fmt, layout):
    case = make(fmt, batch=2, queries=2, head_dim=128)
    expected = case.expected()
    if device == "cpu":
        case.keys, case.values = layouts(case.keys)[layout], layouts(case.values)[layout]
        assert_close(case.run(device), expected, torch.float32)


@pytest.mark.parametrize("queries", [1, 40])
def test_query_layouts(device, queries):
    case = make(INT8, batch=2, queries=queries, dtype=torch.bfloat16)
    plain, q = case.run(device), case.query
    wide = torch.full((*q.shape[:3], 2 * q.shape[3]), torch.nan, dtype=q.dtype)
    wide[..., ::2] = q
    views = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        q.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        wide[..., ::2],
    )
    for view in views:
        case.query = view
        for a, b in zip(case.run(device), plain, strict=True):
            assert torch.equal(a, b)


def test_int_length_is_a_tensor_length(device):
    case = make(INT4, queries=2)
    expected = case.run(device)
    case.length = 127
    assert all(map(torch.equal, case.run(device), expected))
    case.length = torch.tensor(127, dtype=torch.int32)
    assert all(map(torch.equal, case.run(device), expected))


# ---- Which tokens a query sees.


@pytest.mark.parametrize("queries", [1, 5, 90])
def test_ragged_lengths(device, queries):
    lengths = torch.tensor([127, 1, 90, 0])
    make(INT4, batch=4, queries=queries, length=lengths).check(device)
    make(INT4, batch=4, queries=queries, length=lengths, causal=False).check(device)


@pytest.mark.parametrize("queries", [1, 5, 90])
def test_start_and_end(device, queries):
    start, end = torch.tensor([0, 100, 127]), torch.tensor([127, 60, 500])
    for options in ({"kv_start": start}, {"kv_end": end}, {"kv_start": start, "kv_end": end}):
        make(INT8, batch=3, queries=queries, **options).check(device)
    make(INT8, batch=2, queries=queries, kv_start=torch.tensor(3, dtype=torch.int32)).check(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("queries", [1, 5, 90])
@pytest.mark.parametrize("window", [1, 17, 64, 1000])
def test_window(device, window, queries, dtype):
    make(INT8, queries=queries, window=window, dtype=dtype).check(device)
    make(INT8, queries=queries, window=window, causal=False, dtype=dtype).check(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("length", [20, 100, 101, 150, 363])
@pytest.mark.parametrize("queries", [1, 5, 90])
def test_ring(device, length, queries, dtype):
    options = {"capacity": 100, "length": length, "queries": queries, "dtype": dtype}
    make(INT4, ring=True, **options).check(device)
    make(TQ4, ring=True, window=37, **options).check(device)


@pytest.mark.parametrize("queries", [1, 5, 90])
@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_softcap(device, cap, queries):
    make(INT8, queries=queries, softcap=cap, means=True).check(device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
def test_sinks(device, dtype):
    sinks = torch.tensor([3.0, -2.0, 0.0, -math.inf]).to(dtype)
    for queries in (1, 90):
        make(INT8, queries=queries, sinks=sinks, means=True, dtype=dtype).check(device)
    case = make(INT8, queries=2, length=0, sinks=sinks)
    out, lse = case.run(device)
    assert out.eq(0).all() and torch.equal(lse, sinks.float().view(1, 4, 1).expand(1, 4, 2))


def test_scale(device):
    make(INT8, scale=0.7).check(device)
    make(INT8, scale=-0.1, queries=4).check(device)


def masks(batch: int, heads: int, queries: int, columns: int) -> list[torch.Tensor]:
    shapes = [
        (columns,),
        (queries, columns),
        (1, columns),
        (1, 1, queries, columns),
        (batch, 1, 1, columns),
        (1, heads, queries, columns),
        (batch, heads, queries, columns),
    ]
    found = []
    for i, shape in enumerate(shapes):
        keep = normal(*shape, seed=i) > -0.5
        found += [keep, normal(*shape, seed=i + 50).masked_fill(~keep, -math.inf)]
    return found


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("queries", [1, 5, 70])
def test_masks(device, queries, dtype):
    for columns in (1, 50, 127, 150):
        for mask in masks(2, 4, queries, columns):
            if mask.dtype != torch.bool:
                mask = mask.to(dtype)
            lengths = torch.tensor([127, 40])
            make(INT8, batch=2, queries=queries, mask=mask, length=lengths, dtype=dtype).check(
                device
            )


def test_mask_views(device):
    """Masks with strides of their own: expanded, transposed."""
    keep = normal(127, 5) > -0.5
    make(INT8, queries=5, mask=keep.T).check(device)
    make(INT8, queries=5, mask=keep[:, :1].T.expand(5, 127)).check(device)
    make(INT8, queries=5, mask=normal(5, 254)[:, ::2], ring=True, capacity=60).check(device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("queries", [1, 3, 90])
def test_rows_that_see_nothing(device, queries, dtype):
    mask = torch.ones(1, 4, queries, 127, dtype=torch.bool)
    mask[:, :, 0] = False
    mask[:, 1] = False
    minus_infinity = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
    for hiding in (minus_infinity, mask):
        case = make(INT4, queries=queries, mask=hiding, dtype=dtype, means=True)
        case.check(device)
        out, lse = case.run(device)
        assert out[:, 1].eq(0).all() and lse[:, 1].eq(-math.inf).all()
    for change in ({"kv_start": torch.tensor(127)}, {"kv_end": torch.tensor(0)}):
        out, lse = case.run(device, mask=None, **change)
        assert out.eq(0).all() and lse.eq(-math.inf).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_anything(device, data):
    """Options in combination."""
    draw = data.draw
    k_format, v_format = draw(st.sampled_from(SOME_FORMATS)), draw(st.sampled_from(SOME_FORMATS))
    batch, groups, share = (draw(st.integers(1, n)) for n in (3, 3, 5))
    queries, capacity = draw(st.sampled_from([1, 2, 7, 20])), draw(st.integers(1, 200))
    ring = draw(st.booleans())
    longest = 2 * capacity if ring else capacity
    lengths = draw(st.lists(st.integers(0, longest), min_size=batch, max_size=batch))
    bound = st.none() | st.lists(st.integers(0, longest), min_size=batch, max_size=batch)
    options: dict = {"ring": ring, "causal": draw(st.booleans())}
    for name in ("kv_start", "kv_end"):
        drawn = draw(bound)
        options[name] = None if drawn is None else torch.tensor(drawn)
    options["window"] = draw(st.sampled_from([0, 0, 1, 30, 64]))
    options["softcap"] = draw(st.sampled_from([0.0, 0.0, 10.0]))
    if draw(st.booleans()):
        options["sinks"] = normal(groups * share)
    if draw(st.booleans()):
        options["mask"] = draw(st.sampled_from(masks(batch, groups * share, queries, capacity)))
    make(
        k_format,
        v_format,
        batch=batch,
        groups=groups,
        share=share,
        queries=queries,
        capacity=capacity,
        length=torch.tensor(lengths),
        head_dim=128,
        v_dim=64,
        dtype=draw(st.sampled_from(FLOAT_DTYPES)),
        means=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        **options,
    ).check(device)


# ---- Instruction sets, threads, empty inputs, refusals.


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(device, isa):
    """The same tests of formats and options with the kernels of lesser processors."""
    if device != "cpu" or platform.machine() != "x86_64":
        pytest.skip("chooses among the kernels of x86-64")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            __file__,
            "-k",
            "format or anything or window",
        ],
        env=os.environ | {"KVQ_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("queries", [1, 16])
def test_workspace_does_not_grow_with_the_cache(device, queries):
    """A call allocates its outputs and partial results, whose size no cache length changes."""
    if device != "cpu":
        pytest.skip("the profiler counts the CPU's allocations")
    held = []
    for length in (20_000, 60_000):
        keys = Packed(*(t.expand(1, 2, length, -1) for t in reference_quantize(
            normal(1, 2, 1, 64, dtype=torch.bfloat16), INT4)))  # fmt: skip
        case = Case(normal(1, 8, queries, 64, dtype=torch.bfloat16), keys, keys,
                    torch.tensor(length), INT4, INT4)  # fmt: skip
        case.run(device)
        with torch.profiler.profile(profile_memory=True) as profile:
            case.run(device)
        held.append(sum(max(0, e.self_cpu_memory_usage) for e in profile.events()))
    assert held[0] == held[1] and 0 < held[0] < 2 << 20, held


@pytest.mark.parametrize("shape", [{"queries": 0}, {"batch": 0}])
def test_empty_inputs(device, shape):
    out, lse = make(INT8, v_dim=128, **shape).run(device)
    assert out.shape == (shape.get("batch", 1), 4, shape.get("queries", 1), 128)
    assert lse.shape == out.shape[:3]


@pytest.mark.parametrize("ring", [False, True])
def test_empty_cache(device, ring):
    for capacity in (0, 10):
        out, lse = make(INT8, capacity=capacity, length=0, queries=2, ring=ring).run(device)
        assert out.eq(0).all() and lse.eq(-math.inf).all()


def refuse(device: str, case: Case, message: str, **changes: object) -> None:
    with pytest.raises(
        (ValueError, TypeError, IndexError), match=rf"\[kvq\.attention\] .*{message}"
    ):
        case.run(device, **changes)


def test_bad_tensors(device):
    case = make(INT8)
    for change, message in (
        ({"query": case.query[0]}, "query must have 4 dimensions, got 3"),
        ({"query": case.query[..., :32]}, "head_dim 64 .*got 32"),
        ({"query": case.query[:, :3]}, "multiple of .* 2, got 3"),
        ({"query": case.query.expand(2, -1, -1, -1)}, "batch 2.* 1"),
        ({"keys": Packed(case.keys.codes.int(), *case.keys[1:])}, "uint8, got Int"),
        ({"keys": Packed(case.keys.codes[0], *case.keys[1:])}, "4 dimensions, got 3"),
        ({"keys": Packed(case.keys.codes, case.keys.scales[:, :, 1:], case.keys.biases)}, "scales"),
        ({"keys": Packed(*(t[:, :, 1:] for t in case.keys))}, "agree in batch, heads and capacity"),
        ({"v_format": INT4}, "biases|scales"),
        ({"length": torch.tensor([1, 2])}, "kv_length must be a scalar or"),
        ({"length": torch.tensor(1.0)}, "kv_length must be int64 or int32, got Float"),
        ({"length": 151}, "kv_length 151 exceeds the capacity 150"),
    ):
        bad = Case(**{**case.__dict__, **change})
        refuse(device, bad, message)


def test_bad_values_that_only_the_cpu_sees(device):
    """MPS has no float64, and does not wait for the GPU to read a length: kernels clamp it."""
    if device != "cpu":
        pytest.skip("the CPU's")
    case = make(INT8)
    for change, message in (
        ({"query": case.query.double()}, "query must be float32, float16 or bfloat16, got Double"),
        ({"length": torch.tensor(-1)}, "kv_length must not be negative, got -1"),
        ({"length": torch.tensor(151)}, "kv_length 151 exceeds the capacity 150"),
    ):
        refuse(device, Case(**{**case.__dict__, **change}), message)


def test_bad_options(device):
    case = make(INT8, queries=2)
    for options, message in (
        ({"window": -1}, "window must be .*got -1"),
        ({"softcap": -1.0}, "softcap must be .*got -1"),
        ({"softcap": math.nan}, "softcap must be .*got nan"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\], got \[3\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, "sinks must be float32"),
        ({"mask": torch.zeros(3, 127)}, r"mask must broadcast to \[1, 4, 2, columns\], got \[3, "),
        ({"mask": torch.zeros(2, 1, 1, 127)}, "mask must broadcast"),
        ({"mask": torch.zeros(1, 1, 1, 2, 127)}, "mask must broadcast"),
        ({"mask": torch.zeros(2, 127, dtype=torch.int32)}, "mask .*must be float32"),
        ({"kv_start": torch.tensor([1, 2])}, "kv_start must be a scalar or"),
        ({"kv_end": torch.tensor(1.5)}, "kv_end must be int64 or int32"),
        ({"k_signs": torch.ones(32)}, r"k_signs must be \[64\], got \[32\]"),
        ({"v_mean": torch.ones(3, 64)}, r"v_mean must be \[2, 64\], got \[3, 64\]"),
    ):  # fmt: skip
        refuse(device, case, message, **options)


def test_a_longer_length_is_fine_where_it_is_bounded(device):
    case = make(INT8, length=400, kv_end=torch.tensor(150))
    case.check(device)
    make(INT8, length=400, ring=True).check(device)
