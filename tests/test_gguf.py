"""q8_0 and q4_0: the bytes of GGUF's blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import byte_cases, check_bytes, dtype_id, generator, hostile, normal, on
from torch_kvq import KVFormat, Packed, ops
from torch_kvq.formats import FLOAT_DTYPES

gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle of q8_0 and q4_0")
TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
NAMES = tuple(TYPES)


def oracle_quantize(x: torch.Tensor, name: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.quantize(x.float().numpy(), TYPES[name]))


@pytest.mark.parametrize(("fmt", "dtype", "head_dim", "tokens"), byte_cases("gguf"))
def test_bytes_equal_reference(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, tokens: int, device: str
) -> None:
    check_bytes(device, fmt, dtype, head_dim, tokens)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_gguf(name: str, dtype: torch.dtype, device: str) -> None:
    x = hostile(1, 2, 17, 96, dtype, seed=11)
    x = x[:, :, x.isfinite().all(-1).all(1)[0]]
    x = x.float().clamp(-(2.0**18), 2.0**18).to(dtype)  # where gguf's float16 d is finite
    packed = ops.quantize(on(device, x), name)
    assert torch.equal(packed.codes.cpu(), oracle_quantize(x, name))
    assert packed.scales.shape[-1] == packed.biases.shape[-1] == 0


def near_ties(name: str, rows: int) -> torch.Tensor:
    """Values one float32 step around the midpoints of each block's grid."""
    g = generator(12)
    levels = 127 if name == "q8_0" else 8
    step = torch.rand(rows, 1, generator=g) + 0.5
    middle = torch.randint(-levels, levels - 1, (rows, 32), generator=g) + 0.5
    x = step * middle
    toward = torch.where(torch.rand(x.shape, generator=g) < 0.5, -1e9, 1e9)
    x = torch.where(torch.rand(x.shape, generator=g) < 0.3, x, torch.nextafter(x, toward))
    x[:, 0] = -levels * step[:, 0]
    return x.view(1, 1, rows, 32)


@pytest.mark.parametrize("name", NAMES)
def test_ties_round_as_gguf(name: str, device: str) -> None:
    """Products are rounded to float32 before 8.5 is added (q4_0) or they are rounded (q8_0)."""
    x = near_ties(name, 512)
    assert torch.equal(ops.quantize(on(device, x), name).codes.cpu(), oracle_quantize(x, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ties_round_as_gguf_sweep(name: str, device: str) -> None:
    x = torch.cat([near_ties(name, 1 << 16), normal(1, 1, 1 << 16, 32)], 2)
    assert torch.equal(ops.quantize(on(device, x), name).codes.cpu(), oracle_quantize(x, name))


def test_q4_0_ties_of_magnitude_pick_the_first(device: str) -> None:
    """The sign of d follows the first element of largest magnitude."""
    for first in (1.0, -1.0):
        x = torch.zeros(1, 1, 1, 32)
        x[..., 3], x[..., 20] = first, -first
        d = ops.quantize(on(device, x), "q4_0").codes.cpu()[0, 0, 0, :2].view(torch.float16)
        assert d.item() == -first / 8


@pytest.mark.parametrize("name", NAMES)
def test_layout(name: str, device: str) -> None:
    """A float16 d, then int8 codes, or nibbles with element j low and element j + 16 high."""
    g = generator(13)
    low, high = (-127, 128) if name == "q8_0" else (-8, 8)
    q = torch.randint(low, high, (32,), generator=g)
    q[0] = low
    block = ops.quantize(on(device, q.float().view(1, 1, 1, 32)), name).codes.cpu().flatten()
    assert block[:2].view(torch.float16).item() == 1
    if name == "q8_0":
        assert block[2:].view(torch.int8).tolist() == q.tolist()
    else:
        assert (block[2:] & 15).tolist() == (q[:16] + 8).tolist()
        assert (block[2:] >> 4).tolist() == (q[16:] + 8).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_decodes_gguf_bytes(name: str, device: str) -> None:
    codes = oracle_quantize(normal(1, 3, 9, 128, seed=14), name)
    empty = torch.zeros(*codes.shape[:-1], 0)
    decoded = ops.dequantize(on(device, Packed(codes, empty, empty.clone())), name)  # type: ignore[arg-type]
    expected = gguf.quants.dequantize(codes.numpy(), TYPES[name])
    assert torch.equal(decoded.cpu(), torch.from_numpy(expected).view(1, 3, 9, 128))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity(name: str, dtype: torch.dtype, device: str) -> None:
    """NaN marks its block and no other; infinities decode to the largest value a block holds."""
    x = normal(1, 1, 3, 96, dtype=dtype)
    x[0, 0, 0, 40] = torch.nan
    x[0, 0, 1, 3], x[0, 0, 1, 90] = torch.inf, -torch.inf
    decoded = ops.dequantize(ops.quantize(on(device, x), name), name).cpu()
    nan = torch.zeros(3, 96, dtype=torch.bool)
    nan[0, 32:64] = True
    assert torch.equal(decoded[0, 0].isnan(), nan)
    largest = 65504.0 * (127 if name == "q8_0" else 8)
    assert decoded[0, 0, 1, 3] == largest and decoded[0, 0, 1, 90] == -largest
    assert ops.qdq(on(device, x), name).cpu()[0, 0, 1].isfinite().all()
