"""fp8 e4m3 and e5m2: codes equal torch's casts of x / scale."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import all_formats, byte_cases, check_bytes, dtype_id, generator, normal, on
from torch_kvq import KVFormat, Packed, ops
from torch_kvq.formats import FLOAT_DTYPES

FP8 = all_formats("fp8")
CASTS = {"fp8_e4m3": (torch.float8_e4m3fn, 448.0), "fp8_e5m2": (torch.float8_e5m2, 57344.0)}


@pytest.mark.parametrize(("fmt", "dtype", "head_dim", "tokens"), byte_cases("fp8"))
def test_bytes_equal_reference(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, tokens: int, device: str
) -> None:
    check_bytes(device, fmt, dtype, head_dim, tokens)


def values(name: str) -> torch.Tensor:
    """What torch reads in each of the 256 bytes, float32."""
    return torch.arange(256, dtype=torch.uint8).view(CASTS[name][0]).float()


def encode_at_scale_1(x: torch.Tensor, name: str, device: str) -> torch.Tensor:
    """Codes of the values of x: every group also holds the largest value, so its scale is 1."""
    padded = torch.nn.functional.pad(x, (0, -x.numel() % 31)).view(1, 1, -1, 31)
    padded = torch.cat([torch.full((*padded.shape[:-1], 1), CASTS[name][1]), padded], -1)
    packed = ops.quantize(on(device, padded), KVFormat(name, 32))
    assert packed.scales.cpu().eq(1).all()
    return packed.codes.cpu()[..., 1:].flatten()[: x.numel()]


@pytest.mark.parametrize("name", CASTS)
def test_every_code(name: str, device: str) -> None:
    """Each finite value encodes to its own byte; all 256 bytes decode as torch reads them."""
    table = values(name)
    finite = table[table.isfinite()]
    codes = torch.arange(256, dtype=torch.uint8)[table.isfinite()]
    assert torch.equal(encode_at_scale_1(finite, name, device), codes)
    packed = Packed(
        torch.arange(256, dtype=torch.uint8).view(1, 1, 2, 128),
        torch.ones(1, 1, 2, 2),
        torch.zeros(1, 1, 2, 0),
    )
    decoded = ops.dequantize(on(device, packed), name).cpu().flatten()  # type: ignore[arg-type]
    assert torch.equal(decoded.nan_to_num(-1, 1e9, -1e9), table.nan_to_num(-1, 1e9, -1e9))


@pytest.mark.parametrize("name", CASTS)
def test_rounding(name: str, device: str) -> None:
    """Midpoints, their float32 neighbours, carries, subnormals and halves of the smallest."""
    table = values(name)
    table = table[table.isfinite()].unique()
    middle = (table[1:] + table[:-1]) / 2
    smallest = table[table > 0].min()
    x = torch.cat(
        [
            *(torch.nextafter(middle, middle + step) for step in (-1e9, 1e9)),
            middle,
            torch.linspace(-20, 20, 801) * smallest,
            torch.tensor([1.94, -1.94, 3.9, 0.97, 0.0, -0.0, 1e-30, -1e-30, 1e-42]),
        ]
    )
    x = x[x.abs() <= CASTS[name][1]]
    expected = x.to(CASTS[name][0]).view(torch.uint8)
    assert torch.equal(encode_at_scale_1(x, name, device), expected)


def test_known_encoder_faults_are_absent(device: str) -> None:
    """metaltile's encoder emits neither zero nor subnormals and drops the mantissa carry."""
    x = torch.tensor([0.0, 2.0**-9, 3 * 2.0**-9, 1.94, 1.97, 15.6])
    codes = encode_at_scale_1(x, "fp8_e4m3", device)
    decoded = codes.view(torch.float8_e4m3fn).float()
    assert decoded.tolist() == [0.0, 2.0**-9, 3 * 2.0**-9, 2.0, 2.0, 16.0]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", FP8, ids=dtype_id)
def test_codes_equal_torch_casts(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    """codes = (x / stored scale).to(float8), saturating, for scales of every size."""
    x = normal(1, 2, 16, 256, dtype=torch.float32, seed=7)
    x = (x * torch.exp2(torch.randint(-12, 9, (1, 2, 16, 1), generator=generator(8)))).to(dtype)
    packed = ops.quantize(on(device, x), fmt)
    cast, largest = CASTS[fmt.name]
    scales = packed.scales.cpu().float().repeat_interleave(fmt.group_size, -1)
    expected = (x.float() / scales).clamp(-largest, largest).to(cast)
    assert torch.equal(packed.codes.cpu(), expected.view(torch.uint8))
    decoded = ops.dequantize(packed, fmt).cpu()
    assert torch.equal(decoded, expected.float() * scales)
    # The scale is the largest magnitude over the format's largest value; 1 where that is 0.
    top = x.float().unflatten(-1, (-1, fmt.group_size)).abs().amax(-1) / largest
    top = top.to(packed.scales.dtype)
    assert torch.equal(packed.scales.cpu(), torch.where(top == 0, torch.ones_like(top), top))


@pytest.mark.parametrize("fmt", FP8, ids=dtype_id)
def test_zeros(fmt: KVFormat, device: str) -> None:
    packed = ops.quantize(torch.zeros(1, 1, 2, 128, device=device), fmt)
    assert packed.scales.cpu().eq(1).all() and not packed.codes.cpu().any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", FP8, ids=dtype_id)
def test_nan_and_infinity(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    """NaN marks its group and no other; infinities decode to the largest value of the group."""
    x = normal(1, 1, 3, 256, dtype=dtype)
    x[0, 0, 0, 200] = torch.nan
    x[0, 0, 1, 3], x[0, 0, 1, 250] = torch.inf, -torch.inf
    packed = ops.quantize(on(device, x), fmt)
    decoded = ops.dequantize(packed, fmt).cpu()
    nan = torch.zeros(3, 256, dtype=torch.bool)
    nan.view(3, -1, fmt.group_size)[0, 200 // fmt.group_size] = True
    assert torch.equal(decoded[0, 0].isnan(), nan)
    largest = CASTS[fmt.name][1]
    limit = 2.0**126 if dtype == torch.float32 else 65504.0 * largest
    ends = torch.tensor([decoded[0, 0, 1, 3], -decoded[0, 0, 1, 250]]).double()
    assert ((ends - limit).abs() <= limit * 2.0**-20).all()
    assert ops.qdq(on(device, x), fmt).cpu()[0, 0, 1].isfinite().all()
