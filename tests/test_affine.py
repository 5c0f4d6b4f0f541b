"""int8, int4 and int2 with one scale and bias per group."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import (
    all_formats,
    assert_packed,
    byte_cases,
    check_bytes,
    dtype_id,
    generator,
    hostile,
    near_edges,
    normal,
    on,
    reference_quantize,
)
from torch_kvq import KVFormat, ops
from torch_kvq.formats import FLOAT_DTYPES, SCALE_DTYPES

AFFINE = all_formats("affine")


@pytest.mark.parametrize(("fmt", "dtype", "head_dim", "tokens"), byte_cases("affine"))
def test_bytes_equal_reference(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, tokens: int, device: str
) -> None:
    check_bytes(device, fmt, dtype, head_dim, tokens)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
def test_scale_dtypes(dtype: torch.dtype, scale_dtype: torch.dtype, device: str) -> None:
    check_bytes(device, KVFormat("int8", 32), dtype, 96, 17, scale_dtype=scale_dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", AFFINE, ids=dtype_id)
def test_codes_beside_their_edges(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    """A value where the code changes takes the upper one; one bit below it, the lower one."""
    x = near_edges(fmt, dtype)
    assert_packed(ops.quantize(on(device, x), fmt), reference_quantize(x, fmt))


@pytest.mark.parametrize("fmt", AFFINE, ids=dtype_id)
def test_layout(fmt: KVFormat, device: str) -> None:
    """Codes are least significant bit first in little-endian words: MLX's uint32 packing."""
    levels = 2**fmt.bits
    codes = torch.randint(levels, (128,), generator=generator(1))
    codes.view(-1, fmt.group_size)[:, 0] = 0
    codes.view(-1, fmt.group_size)[:, 1] = levels - 1
    packed = ops.quantize(on(device, codes.float().view(1, 1, 1, 128)), fmt)
    assert packed.scales.cpu().eq(1).all() and packed.biases.cpu().eq(0).all()
    word = int.from_bytes(bytes(packed.codes.cpu().flatten().tolist()), "little")
    assert [word >> (i * fmt.bits) & (levels - 1) for i in range(128)] == codes.tolist()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", AFFINE, ids=dtype_id)
def test_error_is_half_a_step(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    """|x - decoded| <= scale / 2, plus what rounding the stored scale and bias costs."""
    x = normal(1, 2, 32, 256, dtype=dtype, seed=2)
    x[:, :, 8:16] = x[:, :, 8:16].abs() + 2
    x[:, :, 16:24] *= 100
    packed = ops.quantize(on(device, x), fmt)
    decoded = ops.dequantize(packed, fmt).cpu().double()
    scale, bias = (t.cpu().double().unsqueeze(-1) for t in (packed.scales, packed.biases))
    error = (x.double() - decoded).abs().unflatten(-1, (-1, fmt.group_size))
    stored = torch.finfo(packed.scales.dtype).eps / 2
    levels = 2**fmt.bits - 1
    # A bias or scale rounded the wrong way leaves the ends of the range outside the grid.
    outside = stored * (bias.abs() + levels * scale) if stored > 1e-6 else 0.0
    rounding = 2.0**-22 * (bias.abs() + levels * scale)
    assert (error <= scale / 2 + outside + rounding).all()


def test_constant_groups_are_exact(device: str) -> None:
    """A group without range keeps its value: scale 1, codes 0."""
    for value in (0.0, -0.0, 1.5, -65504.0):
        x = torch.full((1, 1, 1, 64), value)
        packed = ops.quantize(on(device, x), "int4")
        assert packed.scales.cpu().item() == 1
        assert not packed.codes.cpu().any()
        assert torch.equal(ops.dequantize(packed, "int4").cpu(), x + 0.0)


@pytest.mark.parametrize("fmt", AFFINE, ids=dtype_id)
def test_ends_of_the_range_are_exact(fmt: KVFormat, device: str) -> None:
    """The least value decodes to itself, the greatest to within a rounding of scale * levels."""
    x = normal(1, 1, 8, 128, seed=3)
    decoded = ops.qdq(on(device, x), fmt).cpu()
    groups, out = (t.unflatten(-1, (-1, fmt.group_size)) for t in (x, decoded))
    assert torch.equal(groups.amin(-1), out.amin(-1))
    torch.testing.assert_close(groups.amax(-1), out.amax(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", AFFINE, ids=dtype_id)
def test_nan_stays_in_its_group(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    x = normal(1, 2, 3, 128, dtype=dtype)
    x[0, 1, 1, 70] = torch.nan
    decoded = ops.qdq(on(device, x), fmt).cpu()
    expected = torch.zeros(1, 2, 3, 128, dtype=torch.bool)
    expected.unflatten(-1, (-1, fmt.group_size))[0, 1, 1, 70 // fmt.group_size] = True
    assert torch.equal(decoded.isnan(), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", AFFINE, ids=dtype_id)
def test_infinities_saturate(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    """Infinities decode to the ends of what a group can span: +-65504, or +-2^126 in float32."""
    x = normal(1, 1, 3, 128, dtype=dtype)
    x[0, 0, 0, 5] = torch.inf
    x[0, 0, 1, 5] = -torch.inf
    x[0, 0, 2, 5], x[0, 0, 2, 6] = torch.inf, -torch.inf
    packed = ops.quantize(on(device, x), fmt)
    decoded = ops.dequantize(packed, fmt).cpu().double()
    largest = 2.0**126 if dtype == torch.float32 else 65504.0
    assert decoded.isfinite().all()
    ends = torch.stack([decoded[0, 0, 0, 5], -decoded[0, 0, 1, 5], *decoded[0, 0, 2, 5:7].abs()])
    assert (ends - largest).abs().max() <= largest * 2.0**-8
    assert (decoded[0, 0, 2, 5] > 0) and (decoded[0, 0, 2, 6] < 0)


@pytest.mark.parametrize("fmt", AFFINE, ids=dtype_id)
def test_requantising_keeps_codes(fmt: KVFormat, device: str) -> None:
    """Where scale and bias are exact, decoded values encode to the same bytes again."""
    g = generator(4)
    levels = 2**fmt.bits
    codes = torch.randint(levels, (1, 1, 16, 256 // fmt.group_size, fmt.group_size), generator=g)
    codes[..., 0], codes[..., 1] = 0, levels - 1
    scale = torch.exp2(torch.randint(-6, 6, codes.shape[:-1], generator=g).float()).unsqueeze(-1)
    bias = torch.randint(-8, 8, codes.shape[:-1], generator=g).float().unsqueeze(-1) * scale
    x = (codes * scale + bias).flatten(-2)
    packed = ops.quantize(on(device, x), fmt)
    assert torch.equal(ops.dequantize(packed, fmt).cpu(), x)
    again = ops.quantize(ops.dequantize(packed, fmt), fmt)
    for a, b in zip(packed, again, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_encoder_uses_the_stored_scale(device: str) -> None:
    """Codes are chosen against the rounded float16 scale and bias, not the exact ones."""
    x = hostile(1, 1, 1, 64, torch.float32, seed=5)
    packed = on("cpu", ops.quantize(on(device, x), "int8", scale_dtype=torch.float16))
    assert isinstance(packed, ops.Packed)
    scale, bias = packed.scales.double(), packed.biases.double()
    nearest = ((x.double() - bias) / scale + 0.5).floor().clamp(0, 255)
    assert torch.equal(packed.codes.double(), nearest)
    exact = reference_quantize(x, KVFormat("int8"), scale_dtype=torch.float32)
    assert not torch.equal(packed.codes, exact.codes)
