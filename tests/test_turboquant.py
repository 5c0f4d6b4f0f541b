"""tq2 .. tq8: Lloyd-Max codebooks, norms, bit packing."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.helpers import (
    HEAD_DIMS,
    all_formats,
    byte_cases,
    check_bytes,
    dtype_id,
    generator,
    hostile,
    normal,
    on,
    reference_quantize,
)
from torch_kvq import KVFormat, Packed, codebooks, ops, reference
from torch_kvq._codebook_tables import POSITIVE_CENTROIDS
from torch_kvq.formats import FLOAT_DTYPES

ROOT = Path(__file__).resolve().parents[1]
TQ = all_formats("turboquant")
#: Distortion on N(0, 1) of the optimal quantiser, and its inner and outer centroids.
OPTIMUM = {
    2: (1.17482e-1, 0.45278, 1.51042),
    3: (3.45478e-2, 0.24509, 2.15195),
    4: (9.50101e-3, 0.12840, 2.73259),
    5: (2.50467e-3, 0.06589, 3.26073),
    6: (6.44240e-4, 0.03341, 3.74410),
    8: (4.1185e-5, 0.00845, 4.6035),
}


@pytest.mark.parametrize(("fmt", "dtype", "head_dim", "tokens"), byte_cases("turboquant"))
def test_bytes_equal_reference(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, tokens: int, device: str
) -> None:
    check_bytes(device, fmt, dtype, head_dim, tokens)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", TQ, ids=dtype_id)
def test_unbiased_bytes_equal_reference(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    check_bytes(device, fmt, dtype, 96, 17, encoder="unbiased")


def test_512_and_odd_head_sizes(device: str) -> None:
    for head_dim in (8, 24, 512):
        check_bytes(device, KVFormat("tq4"), torch.float16, head_dim, 17)


@pytest.mark.parametrize("bits", codebooks.BITS)
def test_codes_on_and_beside_every_boundary(bits: int, device: str) -> None:
    """A value on a boundary takes the lower code, the next float above it the upper one."""
    edges = codebooks.boundaries(bits)
    above = edges.nextafter(torch.tensor(torch.inf)).where(edges != 0, torch.tensor(1e-30))
    below = edges.nextafter(torch.tensor(-torch.inf)).where(edges != 0, torch.tensor(-1e-30))
    z = torch.cat([edges, above, below, torch.tensor([0.0, -0.0])])
    z = z[torch.randperm(len(z), generator=generator(bits))]
    z = torch.nn.functional.pad(z, (0, -len(z) % 64)).view(-1, 64)
    rest = ((512 - (z * z).sum(-1, keepdim=True)) / 448).sqrt()  # norms are 1 in float16
    x = torch.cat([z, rest.expand(-1, 448)], dim=-1)
    packed = torch.ops.kvq.quantize(
        on(device, x[None, None]), f"tq{bits}", scale_dtype=torch.float16
    )
    assert packed[1].cpu().eq(1).all()
    codes = reference.unpack_bits(packed[0].cpu(), bits)[0, 0, :, :64]
    assert codes.equal(torch.bucketize(z, edges).to(codes.dtype))


# Codebooks


@pytest.mark.parametrize("bits", codebooks.BITS)
def test_ranks_find_a_neighbouring_boundary(bits: int) -> None:
    """In float32, as the Metal encoder evaluates them, everywhere and beside every boundary."""
    edges = codebooks.boundaries(bits)[2 ** (bits - 1) - 1 :]  # from 0 on
    above = edges.nextafter(torch.tensor(torch.inf))
    x = torch.cat([torch.linspace(0, 1.5 * float(edges[-1]) + 1, 1 << 18), edges, above])
    below = torch.bucketize(x, edges)  # boundaries below x: those around it are below - 1 and below
    bounded, rank = x.minimum(edges[-1]), torch.zeros_like(x)
    for coefficient in reversed(codebooks.RANKS[bits]):
        rank = rank * bounded + coefficient
    nearest = rank.round().int()
    assert nearest.ge(0).all() and nearest.lt(len(edges)).all()
    assert ((nearest == below) | (nearest == below - 1)).all()


@pytest.mark.parametrize("bits", codebooks.BITS)
def test_distortion_is_optimal(bits: int) -> None:
    """The committed table, as the kernels read it, has the distortion of the facts."""
    optimum, inner, outer = OPTIMUM[bits]
    table = codebooks.codebook(bits).double().numpy()
    assert codebooks.distortion(table[len(table) // 2 :]) == pytest.approx(optimum, rel=1e-4)
    assert table[len(table) // 2] == pytest.approx(inner, rel=1e-3)
    assert table[-1] == pytest.approx(outer, rel=1e-4)


@pytest.mark.parametrize("bits", codebooks.BITS)
def test_distortion_by_integration(bits: int) -> None:
    """An independent trapezoidal integral of the squared error over the normal density."""
    x = torch.linspace(-12, 12, 480_001, dtype=torch.float64)
    c = codebooks.codebook(bits).double()
    nearest = c[torch.bucketize(x, (c[1:] + c[:-1]) / 2)]
    density = (-x * x / 2).exp() / math.sqrt(2 * math.pi)
    distortion = torch.trapezoid((x - nearest) ** 2 * density, x).item()
    assert distortion == pytest.approx(OPTIMUM[bits][0], rel=1e-4)


def test_4_bit_centroids() -> None:
    """The table of the facts, to its seven digits."""
    published = [0.1283950, 0.3880483, 0.6567591, 0.9423405]
    published += [1.2562312, 1.6180464, 2.0690172, 2.7325896]
    assert codebooks.codebook(4)[8:].tolist() == pytest.approx(published, abs=3e-7)


def test_generator_reproduces_the_committed_tables(tmp_path: Path) -> None:
    (tmp_path / "torch_kvq").mkdir()
    (tmp_path / "csrc" / "shared").mkdir(parents=True)
    codebooks._write_tables(tmp_path)
    for name in ("torch_kvq/_codebook_tables.py", "csrc/shared/codebooks.h"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name


@pytest.mark.parametrize("bits", codebooks.BITS)
def test_header_and_python_tables_agree(bits: int) -> None:
    """csrc/shared/codebooks.h holds the float32 values that Python uses."""
    header = (ROOT / "csrc" / "shared" / "codebooks.h").read_text()

    def array(name: str) -> torch.Tensor:
        body = re.search(rf"{name}\[\d+\] = \{{(.*?)\}};", header, re.DOTALL)
        assert body is not None
        values = body.group(1).replace("f", "").split(",")
        return torch.tensor([float(v) for v in values if v.strip()], dtype=torch.float32)

    table = codebooks.codebook(bits)
    assert torch.equal(array(f"kvq_codebook_{bits}"), table)
    assert torch.equal(array(f"kvq_boundaries_{bits}"), codebooks.boundaries(bits))
    assert len(POSITIVE_CENTROIDS[bits]) == 2 ** (bits - 1)
    assert all(a < b for a, b in pairwise(table.tolist()))
    assert torch.equal(table, -table.flip(0))


# Codes


def codes_by_definition(y: torch.Tensor, norm: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest centroid by exhaustive search in float64."""
    z = y.double() / norm.double()
    return (z.unsqueeze(-1) - codebooks.codebook(bits).double()).abs().argmin(-1)


@pytest.mark.parametrize("fmt", TQ, ids=dtype_id)
def test_codes_and_packing_by_definition(fmt: KVFormat, device: str) -> None:
    """Nearest centroids in a dense little-endian bit stream, read with Python's integers."""
    y = normal(1, 1, 6, 64, seed=21)
    packed = torch.ops.kvq.quantize(y.to(device), fmt.name)  # no signs: y is taken as rotated
    rms = y.double().square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(packed[1].cpu().double(), rms, rtol=1e-6, atol=0)
    expected = codes_by_definition(y, packed[1].cpu(), fmt.bits)
    for row, codes in zip(packed[0].cpu()[0, 0], expected[0, 0], strict=True):
        stream = int.from_bytes(bytes(row.tolist()), "little")
        got = [stream >> (i * fmt.bits) & (2**fmt.bits - 1) for i in range(64)]
        assert got == codes.tolist()
    decoded = torch.ops.kvq.dequantize(*packed, fmt.name).cpu()
    assert torch.equal(decoded, codebooks.codebook(fmt.bits)[expected] * packed[1].cpu())


def test_tq4_low_nibble_is_the_even_coordinate(device: str) -> None:
    y = torch.full((1, 1, 1, 8), 1.0)
    y[..., 1::2] = -1.0
    codes = torch.ops.kvq.quantize(y.to(device), "tq4")[0].cpu()
    expected = torch.bucketize(torch.tensor([1.0, -1.0]), codebooks.boundaries(4)).tolist()
    assert expected[0] > 7 > expected[1]
    assert (codes & 15).eq(expected[0]).all() and (codes >> 4).eq(expected[1]).all()


@pytest.mark.parametrize("fmt", TQ, ids=dtype_id)
def test_distortion_of_the_op(fmt: KVFormat, device: str) -> None:
    """Mean squared error on N(0, 1) vectors is the codebook's distortion."""
    x = normal(1, 4, 512, 128, seed=22)
    error = (ops.qdq(on(device, x), fmt).cpu() - x).double().square().sum()
    measured = (error / x.double().square().sum()).item()
    # The norm is shared by 128 elements, which moves the optimum by O(1/D).
    assert measured == pytest.approx(OPTIMUM[fmt.bits][0], rel=0.03)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_spreads_outliers(head_dim: int, device: str) -> None:
    """A lone outlier costs what Gaussian data costs, at every head size."""
    x = normal(1, 2, 64, head_dim, seed=23)
    x[..., 7] *= 30
    error = (ops.qdq(on(device, x), "tq4").cpu() - x).square().sum(-1) / x.square().sum(-1)
    assert error.mean() < 3 * OPTIMUM[4][0]


@pytest.mark.parametrize("fmt", TQ, ids=dtype_id)
def test_unbiased_norm(fmt: KVFormat, device: str) -> None:
    """<x, decoded> = |x|^2 but for the rounding of the norm; the plain norm is biased low."""
    x = normal(1, 4, 128, 128, seed=24)
    square = x.double().square().sum(-1)

    def bias(encoder: str, scale_dtype: torch.dtype) -> torch.Tensor:
        packed = ops.quantize(on(device, x), fmt, encoder=encoder, scale_dtype=scale_dtype)
        decoded = ops.dequantize(packed, fmt).cpu().double()
        return (decoded * x).sum(-1) / square - 1

    assert bias("unbiased", torch.float32).abs().max() < 1e-5
    half = bias("unbiased", torch.float16)
    assert half.abs().max() < 2.0**-11 + 1e-5
    plain = bias("default", torch.float16)
    assert half.mean().abs() < plain.mean().abs()
    if fmt.bits < 8:
        assert plain.mean() == pytest.approx(-OPTIMUM[fmt.bits][0], rel=0.2)


def test_unbiased_differs_only_in_the_norm(device: str) -> None:
    x = hostile(1, 1, 17, 128, torch.float16)
    plain, unbiased = (
        ops.quantize(on(device, x), "tq3", encoder=encoder) for encoder in ("default", "unbiased")
    )
    assert torch.equal(plain.codes.cpu(), unbiased.codes.cpu())
    assert not torch.equal(plain.scales.cpu(), unbiased.scales.cpu())


# Special values


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("encoder", ["default", "unbiased"])
@pytest.mark.parametrize("fmt", TQ, ids=dtype_id)
def test_nan_infinity_and_zero(
    fmt: KVFormat, encoder: str, dtype: torch.dtype, device: str
) -> None:
    """NaN marks its whole vector and no other, infinities stay finite, zero stays zero."""
    x = normal(1, 1, 5, 128, dtype=dtype)
    x[0, 0, 0, 40] = torch.nan
    x[0, 0, 1, 3] = torch.inf
    x[0, 0, 2, 3], x[0, 0, 2, 90] = torch.inf, -torch.inf
    x[0, 0, 3] = 0
    packed = ops.quantize(on(device, x), fmt, encoder=encoder)
    for out_dtype in {torch.float32, dtype}:
        decoded = ops.dequantize(packed, fmt, dtype=out_dtype).cpu()[0, 0]
        assert decoded[0].isnan().all()
        assert decoded[1:].isfinite().all()
        assert decoded[1, 3] > 1e4 and decoded[2, 3] > 1e4 and decoded[2, 90] < -1e4
        assert decoded[3].eq(0).all()
    torch.testing.assert_close(decoded[4].float(), x[0, 0, 4].float(), rtol=0, atol=2.0)


def test_norm_saturates(device: str) -> None:
    """A norm beyond float16 is stored as its largest finite value."""
    x = torch.full((1, 1, 1, 64), 1e6)
    x[..., ::2] = -1e6
    packed = ops.quantize(x.to(device), "tq4", scale_dtype=torch.float16)
    assert packed.scales.cpu().item() == 65504.0


def test_centred_and_own_signs(device: str) -> None:
    """A mean is subtracted before the rotation, and other signs give other codes."""
    g = generator(25)
    mean = 5 * torch.randn(2, 96, generator=g)
    signs = torch.where(torch.rand(96, generator=g) < 0.5, -1.0, 1.0)
    check_bytes(device, KVFormat("tq3"), torch.bfloat16, 96, 17, mean=mean, signs=signs)
    x = normal(1, 2, 64, 96, seed=26) + mean[:, None]
    plain = (ops.qdq(on(device, x), "tq3").cpu() - x).square().mean()
    centred = (ops.qdq(on(device, x), "tq3", mean=on(device, mean)).cpu() - x).square().mean()  # type: ignore[arg-type]
    assert centred < plain / 4
    default = reference_quantize(x, KVFormat("tq3"))
    other: Packed = ops.quantize(on(device, x), "tq3", signs=on(device, signs))  # type: ignore[arg-type]
    assert not torch.equal(other.codes.cpu(), default.codes)


@pytest.mark.parametrize("bits", codebooks.CELL_BITS)
def test_cells_give_the_codes(bits: int) -> None:
    """The Metal encoder's table: one boundary a cell at most, and the code above it."""
    z = torch.linspace(-3.8, 3.8, 40001)
    table = torch.from_numpy(codebooks.cells(bits).astype("int64"))
    entry = table[(z / codebooks.CELL_WIDTH).round().long() % 32]
    edge = (entry & ~15).to(torch.int32).view(torch.float32)
    codes = (entry & 15) - (z <= edge).long()
    clear = (z[:, None] - codebooks.boundaries(bits)).abs().amin(1) > 1e-5
    assert torch.equal(codes[clear], torch.bucketize(z, codebooks.boundaries(bits))[clear])
