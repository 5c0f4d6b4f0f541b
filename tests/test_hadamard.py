"""Sign flips and the block Walsh-Hadamard transform."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import HEAD_DIMS, assert_bytes, assert_decoded, dtype_id, hostile, normal
from torch_kvq import ops, reference
from torch_kvq.codebooks import SIGNS_SEED, hadamard_block, hadamard_signs
from torch_kvq.formats import FLOAT_DTYPES

SIZES = (*HEAD_DIMS, 8, 40, 512)


def sylvester(size: int) -> torch.Tensor:
    """The dense orthonormal block Hadamard matrix: entry (i, j) has the sign of popcount(i & j)."""
    block = size & -size
    i = torch.arange(block)
    parity = torch.tensor([[(a & b).bit_count() & 1 for b in i.tolist()] for a in i.tolist()])
    dense = (1.0 - 2.0 * parity).double() / math.sqrt(block)
    return torch.block_diag(*[dense] * (size // block))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_reference(size: int, inverse: bool, dtype: torch.dtype, device: str) -> None:
    x = hostile(1, 1, 17, size, dtype, seed=31)
    for signs in (None, hadamard_signs(size)):
        moved = None if signs is None else signs.to(device)
        actual = ops.hadamard(x.to(device), moved, inverse)
        assert_decoded(actual, reference.hadamard(x, signs, inverse))


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_dense_matrix(size: int, device: str) -> None:
    x = normal(2, 3, size, seed=32)
    signs = hadamard_signs(size)
    matrix = sylvester(size)
    forward = (x * signs).double() @ matrix
    backward = (x.double() @ matrix) * signs
    for expected, inverse in ((forward, False), (backward, True)):
        actual = ops.hadamard(x.to(device), signs.to(device), inverse).cpu()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_orthonormal_and_invertible(size: int, device: str) -> None:
    x = normal(4, size, seed=33).to(device)
    signs = hadamard_signs(size, device=device)
    y = ops.hadamard(x, signs)
    torch.testing.assert_close(y.cpu().norm(dim=-1), x.cpu().norm(dim=-1), rtol=1e-6, atol=0)
    back = ops.hadamard(y, signs, inverse=True).cpu()
    torch.testing.assert_close(back, x.cpu(), rtol=0, atol=2e-6)
    # The transform keeps dot products, so attention may run in the rotated domain.
    torch.testing.assert_close(y.cpu() @ y.cpu().T, x.cpu() @ x.cpu().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [80, 96, 192])
def test_blocks_do_not_mix(size: int, device: str) -> None:
    """Where D is no power of two, each block of the largest one that divides it is on its own."""
    block = hadamard_block(size)
    assert block == {80: 16, 96: 32, 192: 64}[size]
    x = torch.zeros(1, size)
    x[0, block + 3] = 1
    y = ops.hadamard(x.to(device)).cpu()[0]
    inside = torch.zeros(size, dtype=torch.bool)
    inside[block : 2 * block] = True
    assert torch.equal(y != 0, inside)
    torch.testing.assert_close(y[inside].abs(), torch.full((block,), block**-0.5))


def test_ranks_and_views(device: str) -> None:
    x = normal(3, 4, 5, 64, seed=34)
    expected = reference.hadamard(x)
    assert_decoded(ops.hadamard(x.to(device)), expected)
    assert_decoded(ops.hadamard(x[0, 0, 0].to(device)), expected[0, 0, 0])
    moved = x.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    assert_decoded(ops.hadamard(moved), expected)
    wide = torch.zeros(3, 4, 5, 128)
    wide[..., ::2] = x
    assert_decoded(ops.hadamard(wide.to(device)[..., ::2]), expected)
    assert ops.hadamard(torch.zeros(0, 64, device=device)).shape == (0, 64)


def test_float16_saturates(device: str) -> None:
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    y = ops.hadamard(x.to(device)).cpu()
    assert y[0, 0] == 65504 and y[0, 1:].eq(0).all()


def test_default_signs_are_the_same_everywhere() -> None:
    """splitmix64 of seed 0: a cache written on one machine is read on another."""
    assert SIGNS_SEED == 0
    signs = hadamard_signs(128)
    assert signs.dtype == torch.float32 and signs.abs().eq(1).all()
    assert "".join("+-"[s < 0] for s in signs[:16].tolist()) == GOLDEN_SIGNS
    assert torch.equal(signs, hadamard_signs(128, seed=0))
    assert not torch.equal(signs, hadamard_signs(128, seed=1))
    assert not torch.equal(signs[:64], hadamard_signs(64))
    assert_bytes(ops.default_signs(128, torch.device("cpu")), signs)


#: First 16 default signs of D = 128.
GOLDEN_SIGNS = "---+-++---++--++"
