"""The table of formats: rows, sizes, names, and that C++ and the fakes know the same table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import ALL_FORMATS, dtype_id, hostile, on, reference_quantize
from torch_kvq import FORMATS, KVFormat, ops
from torch_kvq.formats import ENCODERS, FLOAT_DTYPES, SCALE_DTYPES, default_scale_dtype

SIZES = (8, 32, 40, 64, 80, 96, 128, 192, 256, 512)


def test_names() -> None:
    assert FORMATS == (
        *("int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2", "q8_0", "q4_0"),
        *("tq2", "tq3", "tq4", "tq5", "tq6", "tq8", "none"),
    )


@pytest.mark.parametrize(
    ("spec", "head_dim", "bits"),
    [
        ("int8-g64", 128, 8.5),
        ("int8-g32", 128, 9),
        ("int4-g64", 128, 4.5),
        ("int4-g32", 64, 5),
        ("int2-g32", 128, 3),
        ("int2-g128", 256, 2.25),
        ("fp8_e4m3-g64", 128, 8.25),
        ("q8_0", 96, 8.5),
        ("q4_0", 64, 4.5),
        ("tq4", 128, 4.125),
        ("tq3", 128, 3.125),
        ("tq5", 64, 5.25),
        ("none", 80, 16),
    ],
)
def test_bits_per_element(spec: str, head_dim: int, bits: float) -> None:
    assert KVFormat.parse(spec).bits_per_element(head_dim) == bits


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=dtype_id)
def test_parse_reads_what_str_writes(fmt: KVFormat) -> None:
    for option in (fmt, fmt.rotated()):
        assert KVFormat.parse(str(option)) == option
        assert KVFormat.parse(option) is option
    assert KVFormat.parse(fmt.name).group_size == (64 if fmt.group_size else 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int5", r"unknown format 'int5'; expected one of int8, int4"),
        ("", "unknown format ''"),
        ("int4-g48", "group_size must be 32, 64 or 128, got 48"),
        ("int4-x", r"expected NAME\[-gGROUP\]\[-rot\], got option 'x'"),
        ("int4-g", "got option 'g'"),
        ("q8_0-g32", "q8_0 has no group_size to choose, got 32"),
        ("tq4-g64", "tq4 has no group_size to choose, got 64"),
    ],
)
def test_parse_refuses(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVFormat.parse(spec)


def test_turboquant_always_rotates() -> None:
    assert KVFormat("tq4").rotate
    assert KVFormat("tq4").rotated(False).rotate
    assert not KVFormat("int4").rotate


@given(st.sampled_from(ALL_FORMATS), st.integers(1, 16))
def test_rows_are_consistent(fmt: KVFormat, units: int) -> None:
    head_dim = units * (fmt.group_size or fmt.layout.multiple)
    assert fmt.head_dim(fmt.codes_row(head_dim)) == head_dim
    if fmt.family not in ("none", "gguf"):
        assert fmt.codes_row(head_dim) * 8 == head_dim * fmt.bits
    for dtype in FLOAT_DTYPES:
        packed = fmt.empty(2, 3, 5, head_dim, dtype=dtype)
        assert sum(t.nbytes for t in packed) == 30 * fmt.row_nbytes(head_dim, dtype, None)
        assert all(not t.any() for t in packed)


def _shapes(packed: tuple[torch.Tensor, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in packed]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=dtype_id)
def test_kernels_and_fakes_know_the_same_table(
    fmt: KVFormat, dtype: torch.dtype, device: str
) -> None:
    """Shapes and dtypes of the real op, the fake and formats.py agree, refusals too."""
    for head_dim in SIZES:
        x = torch.zeros(1, 2, 3, head_dim, dtype=dtype)
        raw_op = torch.ops.kvq.quantize
        fake_x = FakeTensorMode().from_tensor(x.to(device))
        try:
            fmt.check_head_dim(head_dim)
        except ValueError:
            for value in (x.to(device), fake_x):
                with pytest.raises(ValueError, match=r"head_dim to be a positive multiple"):
                    raw_op(value, fmt.name, fmt.group_size)
            continue
        expected = _shapes(fmt.empty(1, 2, 3, head_dim, dtype=dtype))
        real = raw_op(x.to(device), fmt.name, fmt.group_size)
        fake = raw_op(fake_x, fmt.name, fmt.group_size)
        assert _shapes(real) == _shapes(fake) == expected
        decoded = torch.ops.kvq.dequantize(*real, fmt.name, fmt.group_size, dtype=dtype)
        decoded_fake = torch.ops.kvq.dequantize(*fake, fmt.name, fmt.group_size, dtype=dtype)
        assert _shapes((decoded,)) == _shapes((decoded_fake,)) == _shapes((x,))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=dtype_id)
def test_encoders(fmt: KVFormat, device: str) -> None:
    """Every encoder of the table is accepted; what it writes is read by the same rule."""
    x = hostile(1, 1, 4, 128, torch.float32)
    for encoder in ENCODERS[fmt.family]:
        packed = ops.quantize(on(device, x), fmt, encoder=encoder)
        default = reference_quantize(x, fmt)
        assert _shapes(packed) == _shapes(default)
        if fmt.family != "none":
            assert torch.equal(packed.codes.cpu(), default.codes)
    with pytest.raises(ValueError, match=r"has no encoder 'best'; expected default"):
        torch.ops.kvq.quantize(on(device, x), fmt.name, fmt.group_size, encoder="best")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
def test_scale_dtypes(dtype: torch.dtype, device: str) -> None:
    """float16 scales for half and bfloat16 caches, float32 for float32, or what is asked for."""
    assert default_scale_dtype(dtype) == (
        torch.float32 if dtype == torch.float32 else torch.float16
    )
    x = hostile(1, 1, 4, 64, dtype)
    for wanted in (None, *SCALE_DTYPES):
        packed = ops.quantize(on(device, x), "int4", scale_dtype=wanted)
        assert packed.scales.dtype == packed.biases.dtype == (wanted or default_scale_dtype(dtype))
