"""The attention kernels on the emulator: formats, head sizes, dtypes, every feature of the op."""

from __future__ import annotations

import math

import pytest
import torch

from torch_kvq import reference
from torch_kvq.codebooks import hadamard_signs
from torch_kvq.formats import FLOAT_DTYPES, FORMATS, GROUP_SIZES, KVFormat, default_scale_dtype

from .. import emulator, requirements
from .attention_launch import attention, choose, fits_matrix, source

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
ALL_FORMATS = [
    KVFormat(name, group)
    for name in FORMATS
    for group in (GROUP_SIZES if KVFormat(name).group_size else (0,))
]
#: One format of each layout.
SOME_FORMATS = [
    KVFormat.parse(spec)
    for spec in ("int8-g32", "int4-g64", "int2-g64", "fp8_e4m3-g64", "q8_0", "q4_0", "tq3", "none")
]


@pytest.fixture(autouse=True)
def _tools() -> None:
    requirements.require(requirements.missing_for_emulator())


#: Of lse, where the kernel multiplies in the query's dtype.
LOOSE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
KERNELS = ("decode", "prefill", "matrix")


def holds(fmt: KVFormat, head_dim: int) -> bool:
    return head_dim % (fmt.group_size or fmt.layout.multiple) == 0


class Case:
    """A query and packed K and V, and what float64 and torch's own attention make of them."""

    def __init__(
        self, k, v, dtype, *, batch=1, heads=2, groups=1, queries=1, capacity=200, tokens=190,
        head_dim=128, value_dim=None, rotate=False, scale_dtype=None, seed=0,
    ):  # fmt: skip
        value_dim = value_dim or head_dim
        generator = torch.Generator().manual_seed(seed)
        self.k_format, self.v_format, self.tokens = k, v, tokens

        def random(heads, tokens, dim):
            return torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype)

        self.query = random(heads, queries, head_dim)
        self.signs = [
            hadamard_signs(dim) if rotate or fmt.rotate else None
            for fmt, dim in ((k, head_dim), (v, value_dim))
        ]
        scale_dtype = scale_dtype or default_scale_dtype(dtype)
        self.packed = [
            reference.quantize(
                random(groups, capacity, dim), fmt.name, fmt.group_size, signs=signs,
                scale_dtype=scale_dtype,
            )
            for fmt, dim, signs in zip((k, v), (head_dim, value_dim), self.signs, strict=True)
        ]  # fmt: skip

    def arguments(self, tokens=None):
        k, v = self.k_format, self.v_format
        packed = [t for side in self.packed for t in side]
        tokens = self.tokens if tokens is None else tokens
        return (*packed, tokens, k.name, k.group_size, v.name, v.group_size)

    def options(self):
        return {"k_signs": self.signs[0], "v_signs": self.signs[1]}

    def run(self, tokens=None, **options):
        return attention(self.query, *self.arguments(tokens), **{**self.options(), **options})

    def expected(self, tokens=None, **options):
        options = {**self.options(), **options}
        return reference.attention(self.query.double(), *self.arguments(tokens), **options)

    def torch_error(self):
        """Error of torch's attention in the query's dtype, causal, on the dequantised values."""
        dense = [
            reference.dequantize(
                *side, fmt.name, fmt.group_size, signs=signs, dtype=self.query.dtype
            )[:, :, : self.tokens]
            for side, fmt, signs in zip(
                self.packed, (self.k_format, self.v_format), self.signs, strict=True
            )
        ]
        queries = self.query.shape[2]
        position = torch.arange(self.tokens - queries, self.tokens)
        mask = torch.arange(self.tokens) <= position[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            self.query, *dense, attn_mask=mask, enable_gqa=True
        )
        return error(out, self.expected()[0])


def error(out, expected):
    """Root of the mean squared error and the largest error."""
    difference = (out.double() - expected.double()).abs()
    return difference.square().mean().sqrt().item(), difference.max().item()


def check_accuracy(case, **options):
    """At most twice torch's error, of all elements and of the worst one.

    The worst one may also be half a rounding of the output away, which is anybody's luck.
    """
    out, lse = case.run(**options)
    expected, expected_lse = case.expected()
    ours, torchs = error(out, expected), case.torch_error()
    rounding = torch.finfo(case.query.dtype).eps * expected.abs().max().item()
    assert ours[0] <= 2 * torchs[0] + 0.05 * rounding, (ours, torchs)
    assert ours[1] <= 2 * torchs[1] + 0.5 * rounding, (ours, torchs)
    loose = options.get("kernel") in ("prefill", "matrix")
    atol = LOOSE[case.query.dtype] if loose else 1e-5
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=atol)


def check_close(case, tokens=None, rtol=None, launch=None, **options):
    half = case.query.dtype == torch.float16
    rtol = rtol or (2e-3 if half else 2e-5)
    out, lse = case.run(tokens, **options, **(launch or {}))
    expected, expected_lse = case.expected(tokens, **options)
    scale = expected.nan_to_num().abs().max().item()
    torch.testing.assert_close(
        out.double(), expected.double(), rtol=rtol, atol=rtol * scale, equal_nan=True
    )
    lse_rtol, atol = (2.0**-12, LOOSE[case.query.dtype]) if half else (1e-5, 1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=lse_rtol, atol=atol, equal_nan=True)


def smallest_dim(fmt, fits=holds):
    return next((d for d in HEAD_DIMS if holds(fmt, d) and fits(fmt, d)), None)


def fits(fmt, head_dim, value_format=None, value_dim=None, dtype=torch.float16):
    """Whether the matrix kernel can serve these formats and head sizes."""
    sides = [(fmt, dtype), (value_format or fmt, dtype)]
    return fits_matrix(dtype, *(x for s in sides for x in s), head_dim, value_dim or head_dim)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_decode_of_every_format(fmt):
    i = ALL_FORMATS.index(fmt)
    case = Case(fmt, fmt, FLOAT_DTYPES[i % 3], heads=(1, 2, 4)[i % 3], head_dim=smallest_dim(fmt))
    check_accuracy(case)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_matrix_of_every_format(fmt):
    i = ALL_FORMATS.index(fmt)
    head_dim = smallest_dim(fmt, fits)
    if head_dim is None:  # a group of 32 codes of 2 bits is too short to be shared
        assert str(fmt) == "int2-g32"
        return
    dtype = torch.float16 if i % 2 or fmt.name == "none" else torch.bfloat16
    check_accuracy(
        Case(fmt, fmt, dtype, heads=3 + i % 4, queries=1 + i % 2, head_dim=head_dim),
        kernel="matrix",
    )


@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
def test_prefill_of_every_layout(fmt):
    i = SOME_FORMATS.index(fmt)
    case = Case(
        fmt, fmt, FLOAT_DTYPES[i % 3], heads=2, queries=21, tokens=80, capacity=90,
        head_dim=smallest_dim(fmt),
    )  # fmt: skip
    check_accuracy(case, kernel="prefill")


MIXED = [
    ("int8-g32", "tq4", torch.float16, 64, 64),
    ("tq3", "none", torch.bfloat16, 80, 80),
    ("q8_0", "q4_0", torch.float32, 96, 96),
    ("int4-g64", "tq2", torch.float16, 192, 128),
    ("tq5", "fp8_e5m2-g128", torch.float32, 80, 256),
    ("none", "int2-g64", torch.bfloat16, 256, 64),
]


@pytest.mark.parametrize(("k", "v", "dtype", "head_dim", "value_dim"), MIXED)
@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_mixed_formats_and_head_sizes(kernel, k, v, dtype, head_dim, value_dim):
    case = Case(
        KVFormat.parse(k), KVFormat.parse(v), dtype, batch=2, heads=6, groups=2,
        queries=1 if kernel == "decode" else 13, head_dim=head_dim, value_dim=value_dim,
        tokens=150,
    )  # fmt: skip
    check_accuracy(case, kernel=kernel, splits=2)


MIXED_MATRIX = [
    ("int8-g32", "tq4", torch.float16, 64, 64),
    ("q8_0", "q4_0", torch.bfloat16, 96, 128),
    ("int4-g64", "tq2", torch.float16, 192, 128),
    ("tq3", "fp8_e5m2-g128", torch.bfloat16, 128, 256),
    ("none", "int2-g64", torch.float16, 256, 64),
]


@pytest.mark.parametrize(("k", "v", "dtype", "head_dim", "value_dim"), MIXED_MATRIX)
def test_mixed_formats_by_matrix(k, v, dtype, head_dim, value_dim):
    k, v = KVFormat.parse(k), KVFormat.parse(v)
    assert fits(k, head_dim, v, value_dim)
    case = Case(
        k, v, dtype, batch=2, heads=12, groups=2, queries=2, head_dim=head_dim,
        value_dim=value_dim, tokens=150,
    )  # fmt: skip
    check_accuracy(case, kernel="matrix", splits=2)


LAYOUTS = {
    "mma": [(lane // 4, lane % 4 * 2) for lane in range(32)],
    "scrambled": [((lane * 3 + 5) % 8, 6 - lane // 8 * 2) for lane in range(32)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_matrices(layout):
    """Metal does not say which elements of a matrix a lane holds: the kernel finds out."""
    case = feature_case("matrix")
    options = feature_options("everything", case)
    line = choose(case.query, *case.packed, case.k_format, case.v_format, "matrix")[1]
    library = emulator.load(source("matrix", line))
    with library.matrix_layout(LAYOUTS[layout]):
        check_close(case, launch={"kernel": "matrix", "library": library}, **options)


@pytest.mark.parametrize("head_dim", [8, 24, 37, 512])
def test_decode_of_unusual_head_sizes(head_dim):
    fmt = KVFormat("none") if head_dim == 37 else KVFormat("tq3")
    check_accuracy(Case(fmt, fmt, torch.float16, heads=3, tokens=70, head_dim=head_dim))


INT4, TQ4 = KVFormat("int4", 64), KVFormat("tq4")


def feature_case(kernel, **options):
    queries = 12 if kernel == "prefill" else 3
    dtype = torch.float16 if kernel == "matrix" else torch.float32
    given = {"batch": 2, "heads": 4, "groups": 2, "queries": queries, "head_dim": 64}
    # int4 K, rotated, and tq4 V: one library for all features.
    return Case(INT4, TQ4, dtype, rotate=True, **{**given, **options})


def features():
    """name: options of the op, as functions of a generator and the case."""

    def length(*values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype)

    def random(*shape):
        return lambda g, c: torch.randn(
            *(c.query.shape[i] if i < 0 else i for i in shape), generator=g
        )

    heads, queries = -3, -2  # sizes taken from the query
    return {
        "plain": {},
        "not-causal": {"causal": False},
        "window": {"window": 40},
        "window-not-causal": {"window": 5, "causal": False},
        "softcap": {"softcap": 2.0},
        "scale": {"scale": 0.5},
        "sinks": {"sinks": random(heads)},
        "lengths": {"tokens": length(37, 190)},
        "lengths-int32": {"tokens": length(101, dtype=torch.int32)[0]},
        "short": {"tokens": length(1, 0)},
        "start": {"kv_start": length(30, 189)},
        "end": {"kv_end": length(170, 12, dtype=torch.int32), "kv_start": length(3)[0]},
        "ring": {"ring": True, "tokens": length(455, 199)},
        "ring-window": {"ring": True, "tokens": length(10**12, 250), "window": 60},
        "mask": {"mask": lambda g, c: random(2, 4, queries, 190)(g, c) > 0},
        "mask-broadcast": {"mask": lambda g, c: random(queries, 190)(g, c) > 0},
        "mask-narrow": {"mask": lambda g, c: random(2, 1, 1, 50)(g, c), "tokens": length(30, 190)},
        "mask-half": {"mask": lambda g, c: random(1, 4, 1, 190)(g, c).half()},
        "mask-bfloat": {"mask": lambda g, c: random(1, 4, queries, 190)(g, c).bfloat16()},
        "mask-all": {"mask": torch.zeros(190, dtype=torch.bool)},
        "mask-infinite": {"mask": torch.full((190,), -math.inf), "sinks": random(heads)},
        "mask-wide": {"mask": random(1, 1, queries, 300), "tokens": length(150, 190)},
        "means": {"k_mean": random(2, 64), "v_mean": random(2, 64)},
        "everything": {
            "k_mean": random(2, 64), "v_mean": random(2, 64), "sinks": random(heads),
            "softcap": 5.0, "window": 70, "ring": True, "tokens": length(205, 420),
            "kv_start": length(180, 390),
            "mask": lambda g, c: random(2, 4, queries, 200)(g, c) > -1,
        },
    }  # fmt: skip


FEATURES = features()


def feature_options(name, case):
    generator = torch.Generator().manual_seed(1)
    return {
        key: value(generator, case) if callable(value) else value
        for key, value in FEATURES[name].items()
    }


@pytest.mark.parametrize(
    ("kernel", "splits"),
    [("decode", 1), ("decode", 3), ("prefill", 1), ("prefill", 3), ("matrix", 3)],
)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, kernel, splits):
    case = feature_case(kernel)
    options = feature_options(name, case)
    check_close(case, launch={"kernel": kernel, "splits": splits}, **options)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_masked_with_the_lowest_float_is_uniform(kernel):
    """Not zeros: finfo.min leaves all scores equal, which models with padding rely on."""
    case = feature_case(kernel)
    mask = torch.full((190,), torch.finfo(torch.float32).min)
    out, _ = case.run(mask=mask, kernel=kernel)
    expected, _ = case.expected(scale=0.0)
    close = 1e-3 if kernel == "matrix" else 1e-5
    torch.testing.assert_close(out.double(), expected.double(), rtol=close, atol=close)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_many_rows_are_merged_by_one_simdgroup_each(head_dim):
    case = feature_case("prefill", queries=34, head_dim=head_dim, tokens=100, capacity=100)
    assert case.query.shape[:3].numel() > 256
    launch = {"kernel": "prefill", "splits": 2, "mode": "race"}
    check_close(case, launch=launch)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["plain", "everything", "mask-narrow", "short"])
def test_no_races(name, kernel):
    case = feature_case(kernel, tokens=90 if kernel == "prefill" else 190)
    options = feature_options(name, case)
    for splits in (1, 2):
        launch = {"kernel": kernel, "splits": splits, "mode": "race", "seed": splits}
        check_close(case, launch=launch, **options)


@pytest.mark.parametrize("fmt", SOME_FORMATS, ids=str)
def test_no_undefined_behaviour(fmt):
    """Misaligned loads, shifts, array bounds: what x86 lets pass and a GPU does not."""
    case = Case(fmt, fmt, torch.float16, head_dim=smallest_dim(fmt), tokens=70)
    check_accuracy(case, mode="asan", splits=2)
    if smallest_dim(fmt, fits):
        case = Case(fmt, fmt, torch.float16, head_dim=smallest_dim(fmt, fits), tokens=70)
        check_accuracy(case, kernel="matrix", mode="asan", splits=2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["plain", "window", "sinks", "softcap", "short", "mask", "means"])
def test_fast_math(name, kernel):
    case = feature_case(kernel)
    options = feature_options(name, case)
    check_close(case, launch={"kernel": kernel, "splits": 2, "mode": "fastmath"}, **options)


def test_no_memory_errors_at_either_end():
    case = feature_case("decode", capacity=190)
    for guard_low in (False, True):
        check_close(case, launch={"guard_low": guard_low})


def poison(packed, rows, value=math.nan):
    """Overwrites whole slots of packed K or V."""
    for tensor in packed:
        if tensor.numel() and tensor.dtype == torch.uint8:
            tensor[:, :, rows] = 0xFF
        elif tensor.numel():
            tensor[:, :, rows] = value


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", ["int4-g64", "none"])
def test_slots_that_no_query_sees_do_not_matter(spec, kernel):
    fmt = KVFormat.parse(spec)
    queries = 12 if kernel == "prefill" else 1
    dtype = torch.float16 if kernel == "matrix" else torch.float32
    case = Case(fmt, fmt, dtype, batch=2, heads=4, groups=2, queries=queries, head_dim=64)
    clean = case.run(torch.tensor([150, 90]), window=80, kernel=kernel)
    for side in case.packed:
        poison(side, slice(150, None))
        for tensor in side:
            if tensor.numel():
                tensor[1, :, 90:] = tensor[1, :, 150:151]
        poison([t[:1] for t in side], slice(0, 150 - 80 - queries + 1))
    dirty = case.run(torch.tensor([150, 90]), window=80, kernel=kernel)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert not dirty[0].isnan().any()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_visible_nan_shows(kernel, side):
    queries = 12 if kernel == "prefill" else 1
    dtype = torch.float16 if kernel == "matrix" else torch.float32
    case = Case(INT4, INT4, dtype, heads=2, queries=queries, head_dim=64)
    case.packed[side][1][:, :, 70, 0] = math.nan
    check_close(case, launch={"kernel": kernel})
    assert case.run(kernel=kernel)[0].isnan().any()


def test_a_nan_query_spoils_its_own_row_only():
    for kernel in KERNELS:
        dtype, queries = (torch.float16, 6) if kernel == "matrix" else (torch.float32, 12)
        case = Case(INT4, INT4, dtype, heads=2, queries=queries, head_dim=64)
        case.query[0, 1, 5, 3] = math.nan
        out, lse = case.run(kernel=kernel)
        assert out[0, 1, 5].isnan().all() and lse[0, 1, 5].isnan()
        assert out.isnan().sum() == 64 and lse.isnan().sum() == 1


@pytest.mark.parametrize("kernel", ["decode", "matrix"])
def test_e4m3_nan_code(kernel):
    fmt = KVFormat("fp8_e4m3", 64)
    dtype = torch.float16 if kernel == "matrix" else torch.float32
    case = Case(fmt, fmt, dtype, head_dim=64)
    case.packed[1][0][0, 0, 5, 9] = 0x7F
    case.packed[1][0][0, 0, 8, 11] = 0x01  # the least subnormal
    out, _ = case.run(kernel=kernel)
    assert out[0, :, 0, 9].isnan().all() and out.isnan().sum() == case.query.shape[1]
    expected, _ = case.expected()
    assert torch.equal(expected.isnan(), out.isnan())


@pytest.mark.parametrize("kernel", ["decode", "matrix"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_dtypes(scale_dtype, kernel):
    case = Case(INT4, TQ4, torch.bfloat16, head_dim=64, scale_dtype=scale_dtype)
    check_accuracy(case, kernel=kernel)


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
@pytest.mark.parametrize("spec", ["int4-g64", "tq4", "fp8_e4m3-g64"])
def test_values_far_from_float16(spec, factor):
    """bfloat rows whose elements float16 has no room for: codes are float16, scales are not."""
    fmt = KVFormat.parse(spec)
    case = Case(fmt, fmt, torch.bfloat16, heads=4, head_dim=64, scale_dtype=torch.float32)
    for scales in case.packed[1][1:]:
        scales *= factor
    case.query /= factor**0.25
    for scales in case.packed[0][1:]:
        scales *= factor**0.25
    check_accuracy(case, kernel="matrix", splits=2)


@pytest.mark.parametrize("kernel", ["decode", "matrix"])
@pytest.mark.parametrize("spec", ["int4-g64", "tq5", "q8_0"])
def test_unaligned_rows(spec, kernel):
    fmt = KVFormat.parse(spec)
    dtype = torch.float16 if kernel == "matrix" else torch.float32
    case = Case(fmt, fmt, dtype, heads=2, head_dim=64)
    want = case.run(kernel=kernel)
    shifted = []
    for codes, scales, biases in case.packed:
        wide = torch.zeros(1, 1, 200, codes.shape[-1] + 5, dtype=torch.uint8)
        view = wide[..., 3 : 3 + codes.shape[-1]]
        view.copy_(codes)
        shifted.append((view, scales, biases))
    case.packed = shifted
    got = case.run(aligned=False, kernel=kernel)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_views(kernel):
    """Slots, heads and batch rows far apart, and a query with its tokens outside its heads."""
    case = feature_case(kernel)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    views = []
    for side in case.packed:
        views.append([])
        for t in side:
            wide = torch.zeros(3, 200, 2, 2 * t.shape[-1], dtype=t.dtype)
            view = wide[1:].transpose(1, 2)[..., : t.shape[-1]]
            views[-1].append(view.copy_(t))
    case.packed = views
    check_close(case, launch={"kernel": kernel})


def test_offsets_beyond_2_31_bytes():
    """Slots at the end of 3 GiB of codes: virtual memory, of which a window is touched."""
    fmt = KVFormat("int8", 128)
    small = Case(fmt, fmt, torch.float32, heads=2, head_dim=128, capacity=64, tokens=64)
    want = small.run(kernel="decode")
    capacity = 3 * 2**30 // 128
    large = []
    for codes, scales, biases in small.packed:
        whole = [
            torch.empty(1, 1, capacity, t.shape[-1], dtype=t.dtype) for t in (codes, scales, biases)
        ]
        for big, t in zip(whole, (codes, scales, biases), strict=True):
            big[:, :, -64:] = t
        large.append(whole)
    small.packed = large
    for kernel in ("decode", "prefill"):
        out, _ = small.run(capacity, window=64, kernel=kernel, in_place=True)
        torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-6)


def test_threadgroup_memory_is_bounded():
    """At most 32 KB, the limit of every Apple GPU, for the widest rows."""
    none = KVFormat("none")
    for kernel, dtype, head_dim, rows in (
        ("decode", torch.float32, 512, 8),
        ("decode", torch.float32, 1024, 4),
        ("prefill", torch.float32, 256, None),
        ("prefill", torch.float16, 256, None),
        ("matrix", torch.float16, 256, 16),
    ):
        queries = 9 if kernel == "prefill" else 4
        case = Case(none, none, dtype, heads=1, queries=queries, head_dim=head_dim, tokens=40)
        used = {}
        case.run(kernel=kernel, rows=rows, memory=used)
        assert 0 < used["bytes"] <= 32768


def test_row_tiles():
    """More (query, head) rows than a threadgroup serves, and fewer."""
    case = Case(INT4, INT4, torch.float32, heads=3, queries=3, head_dim=64)
    for rows in (1, 2, 4, 8):
        check_close(case, launch={"rows": rows})
    case = Case(INT4, INT4, torch.float16, heads=3, queries=6, head_dim=64)
    for rows in (8, 16):
        check_close(case, launch={"rows": rows, "kernel": "matrix"})


def check_together(cases, kernel, mode="fast"):
    """check_accuracy of cases whose kernels are in one library: a process can load some 200."""
    lines = {
        choose(case.query, *case.packed, case.k_format, case.v_format, kernel)[1] for case in cases
    }
    library = emulator.load(source(kernel, "".join(sorted(lines))), mode)
    for case in cases:
        check_accuracy(case, kernel=kernel, splits=2, mode=mode, library=library)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_format_dtype_and_head_size(kernel, fmt):
    queries = 17 if kernel == "prefill" else 1
    cases = [
        Case(fmt, fmt, dtype, heads=4, groups=2, queries=queries, head_dim=head_dim, tokens=120)
        for dtype in FLOAT_DTYPES
        for head_dim in HEAD_DIMS
        if holds(fmt, head_dim) and (kernel != "matrix" or fits(fmt, head_dim, dtype=dtype))
    ]
    if cases:
        check_together(cases, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "queries"), [("decode", 1), ("prefill", 9), ("matrix", 3)])
@pytest.mark.parametrize("mode", ["race", "asan", "fastmath"])
def test_every_format_in_every_build(mode, kernel, queries):
    dtype, fitting = (torch.float16, fits) if kernel == "matrix" else (torch.float32, holds)
    cases = [
        Case(fmt, fmt, dtype, heads=3, queries=queries, tokens=90, head_dim=head_dim)
        for fmt in ALL_FORMATS
        if (head_dim := smallest_dim(fmt, fitting))
    ]
    check_together(cases, kernel, mode)
