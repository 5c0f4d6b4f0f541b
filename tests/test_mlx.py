"""Data of other programs: MLX's affine triples and mlx-native's TurboQuant layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.helpers import assert_decoded, dtype_id, generator, normal, on
from tests.test_hadamard import sylvester
from torch_kvq import Packed, ops, reference
from torch_kvq.codebooks import codebook, hadamard_signs

BITS = (4, 5, 6, 8)


# MLX affine triples


def mlx_triple(x: torch.Tensor, group: int, bits: int) -> tuple[Packed, torch.Tensor]:
    """MLX's own quantisation of x, and its own dequantisation as float32."""
    mx = pytest.importorskip("mlx.core", reason="MLX (extra `mlx`) is the oracle of its triples")
    kinds = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}
    with mx.stream(mx.cpu):
        given = mx.array(x.float().numpy()).astype(kinds[x.dtype])
        words, scales, biases = mx.quantize(given, group_size=group, bits=bits)
        decoded = mx.dequantize(words, scales, biases, group_size=group, bits=bits)
        scales, biases, decoded = (a.astype(mx.float32) for a in (scales, biases, decoded))
        arrays = [torch.from_numpy(np.array(a)) for a in (words, scales, biases, decoded)]
    codes = arrays[0].view(torch.uint8)
    return Packed(codes, arrays[1].to(x.dtype), arrays[2].to(x.dtype)), arrays[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_decodes_mlx_triples(bits: int, group: int, dtype: torch.dtype, device: str) -> None:
    """q * scale + bias of MLX's triples gives MLX's values, negative scales included."""
    x = normal(1, 2, 9, 128, dtype=dtype, seed=41)
    x[0, 0, 0] = 0
    x[0, 0, 1] = x[0, 0, 1].abs() + 3
    x[0, 0, 2] = -x[0, 0, 1]
    packed, expected = mlx_triple(x, group, bits)
    assert (packed.scales < 0).any() and (packed.scales > 0).any()
    decoded = ops.dequantize(on(device, packed), f"int{bits}-g{group}").cpu()  # type: ignore[arg-type]
    # MLX rounds in the dtype of its scales; ours is float32 throughout.
    step = torch.finfo(dtype).eps * expected.abs().unflatten(-1, (-1, group)).amax(-1)
    step = step.repeat_interleave(group, -1)
    assert ((decoded - expected).abs() <= step).all()
    assert_decoded(
        ops.dequantize(on(device, packed), f"int{bits}-g{group}"),  # type: ignore[arg-type]
        reference.dequantize(*packed, f"int{bits}", group),
    )


def test_mlx_bfloat16_triples(device: str) -> None:
    packed, expected = mlx_triple(normal(1, 1, 4, 64, dtype=torch.bfloat16, seed=42), 64, 4)
    decoded = ops.dequantize(on(device, packed), "int4-g64").cpu()  # type: ignore[arg-type]
    torch.testing.assert_close(decoded, expected, rtol=0, atol=expected.abs().max() * 2.0**-7)


# mlx-native TurboQuant


def native_cache(head_dim: int, bits: int, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes in mlx-native's packing and float32 norms, [1, 2, tokens, ...]."""
    g = generator(head_dim + bits)
    index = torch.randint(2**bits, (1, 2, tokens, head_dim), generator=g, dtype=torch.uint8)
    codes = index[..., ::2] | index[..., 1::2] << 4 if bits == 4 else index
    norms = torch.rand(1, 2, tokens, max(1, head_dim // 256), generator=g) * 20 + 0.1
    return codes, norms


def native_decode(
    codes: torch.Tensor, norms: torch.Tensor, bits: int, table: torch.Tensor, factor: float
) -> torch.Tensor:
    """mlx-native's rule, element by element in numpy float64."""
    packed, values, norm = codes.numpy(), table.double().numpy(), norms.double().numpy()
    head_dim = packed.shape[-1] * (2 if bits == 4 else 1)
    out = np.zeros((*packed.shape[:-1], head_dim))
    for i in range(head_dim):
        if bits == 4:
            code = (packed[..., i // 2] >> (4 * (i % 2))) & 15
        else:
            code = packed[..., i]
        if head_dim == 512:  # RMS of each half
            out[..., i] = values[code] * norm[..., i // 256] / factor
        else:  # L2 norm of the vector
            out[..., i] = values[code] * norm[..., 0] / math.sqrt(head_dim)
    return torch.from_numpy(out)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_mlx_native_values(head_dim: int, bits: int, device: str) -> None:
    """Both norm conventions, in the rotated domain and rotated back, sequence and position."""
    codes, norms = native_cache(head_dim, bits)
    table = codebook(bits)
    expected = native_decode(codes, norms, bits, table, 1.0)
    args = (codes.to(device), norms.to(device), bits)
    rotated = ops.mlx_native_dequantize(*args).cpu()
    torch.testing.assert_close(rotated.double(), expected, rtol=1e-6, atol=1e-7)

    signs = hadamard_signs(head_dim)
    back = ops.mlx_native_dequantize(*args, signs=signs.to(device), rotate_back=True).cpu()
    dense = (expected @ sylvester(head_dim)) * signs
    torch.testing.assert_close(back.double(), dense, rtol=0, atol=2e-5)
    unsigned = ops.mlx_native_dequantize(*args, rotate_back=True).cpu()
    torch.testing.assert_close(unsigned.double(), expected @ sylvester(head_dim), rtol=0, atol=2e-5)

    assert_decoded(
        ops.mlx_native_dequantize(*args, signs=signs.to(device), rotate_back=True),
        reference.mlx_native_dequantize(codes, norms, bits, signs=signs, rotate_back=True),
    )
    for t in (0, 3, 5):
        one = ops.mlx_native_dequantize(*args, start=t, length=1).cpu()
        assert torch.equal(one, rotated[:, :, t : t + 1])
    assert torch.equal(
        ops.mlx_native_dequantize(*args, start=2, length=3).cpu(), rotated[:, :, 2:5]
    )
    assert ops.mlx_native_dequantize(*args, start=6, length=0).shape == (1, 2, 0, head_dim)


@pytest.mark.parametrize("factor", [1.0, 16.0, math.sqrt(256) * math.sqrt(2), 0.5])
def test_mlx_native_scale_factor(factor: float, device: str) -> None:
    """scale_factor_d512 divides at D = 512 and means nothing below."""
    codes, norms = native_cache(512, 4)
    expected = native_decode(codes, norms, 4, codebook(4), factor)
    args = (codes.to(device), norms.to(device), 4)
    actual = ops.mlx_native_dequantize(*args, scale_factor_d512=factor).cpu()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7)
    codes, norms = native_cache(256, 4)
    args = (codes.to(device), norms.to(device), 4)
    plain = ops.mlx_native_dequantize(*args).cpu()
    assert torch.equal(plain, ops.mlx_native_dequantize(*args, scale_factor_d512=factor).cpu())


@pytest.mark.parametrize("bits", BITS)
def test_mlx_native_own_codebook(bits: int, device: str) -> None:
    """A given table replaces this project's (mlx-native's 6- and 8-bit tables differ)."""
    codes, norms = native_cache(128, bits)
    table = torch.randn(2**bits, generator=generator(43)).sort().values
    expected = native_decode(codes, norms, bits, table, 1.0)
    strided = torch.stack([table, table], -1).to(device)[:, 0]
    for given in (table.to(device), strided):
        actual = ops.mlx_native_dequantize(
            codes.to(device), norms.to(device), bits, codebook=given
        ).cpu()
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7)


def test_mlx_native_views(device: str) -> None:
    """Token-major storage and caches narrowed from larger buffers."""
    codes, norms = native_cache(128, 4, tokens=9)
    expected = reference.mlx_native_dequantize(codes, norms, 4)
    swapped = [t.transpose(1, 2).contiguous().to(device).transpose(1, 2) for t in (codes, norms)]
    assert_decoded(ops.mlx_native_dequantize(*swapped, 4), expected)
    narrowed = [t.to(device)[:, 1:, 2:7] for t in (codes, norms)]
    assert_decoded(ops.mlx_native_dequantize(*narrowed, 4), expected[:, 1:, 2:7])


def test_mlx_native_reads_what_tq_means(device: str) -> None:
    """Our tq4 codes with L2 norms in mlx-native's convention decode to our values."""
    x = normal(1, 2, 5, 128, seed=44)
    packed = ops.quantize(on(device, x), "tq4")
    decoded = ops.mlx_native_dequantize(
        packed.codes,
        packed.scales * math.sqrt(128),
        4,
        signs=hadamard_signs(128, device=device),
        rotate_back=True,
    )
    torch.testing.assert_close(
        decoded.cpu(), ops.dequantize(packed, "tq4").cpu(), rtol=0, atol=2e-6
    )
