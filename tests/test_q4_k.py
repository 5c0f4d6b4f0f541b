"""GGUF Q4_K: super-blocks, their products with one and with many vectors, and what is refused."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers import assert_bytes, assert_decoded, dtype_id, hostile, normal
from torch_kvq import Q4KLinear, ops, reference
from torch_kvq.formats import FLOAT_DTYPES

gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle of Q4_K")
Q4_K = gguf.GGMLQuantizationType.Q4_K
each_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
#: Relative error of a product against float64: of float32 sums, of x in 16-bit integers (a CPU may
#: round x so unless exact), and of rounding the result to its dtype.
SUMS, INTEGERS = 4e-6, 4e-4
ROUNDING = {torch.float32: 0.0, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@functools.cache
def ggml() -> ctypes.CDLL:
    """The ggml of llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    found = sorted(Path(spec.origin).parent.glob("lib/libggml-base.*")) if spec else []
    if not found:
        pytest.skip("llama-cpp-python, whose ggml is the oracle, is not installed")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def ggml_quantize(w: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(w.shape[0], w.shape[1] // 256 * 144, dtype=torch.uint8)
    w = w.float().contiguous()
    size = ggml().ggml_quantize_chunk(
        int(Q4_K), w.data_ptr(), out.data_ptr(), 0, w.shape[0], w.shape[1], None
    )
    assert size == out.numel()
    return out


def gguf_dequantize(blocks: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.cpu().numpy(), Q4_K))


def random_blocks(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Blocks of random bytes but for their two float16 scales, which are finite."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, k // 256, 144), generator=g, dtype=torch.uint8)
    scales = (torch.rand(rows, k // 256, 2, generator=g) - 0.2).half()
    blocks[..., :4] = scales.view(torch.uint8)
    return blocks.flatten(1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.cpu().double() - expected).norm() / expected.norm())


# Blocks


@each_dtype
@pytest.mark.parametrize("k", [256, 768])
def test_bytes_equal_reference(k: int, dtype: torch.dtype, device: str) -> None:
    w = hostile(1, 2, 17, k, dtype, seed=k)[0].flatten(0, 1)
    expected = reference.q4_k_quantize(w)
    assert_bytes(ops.q4_k_quantize(w.to(device)), expected)
    for out_dtype in {torch.float32, dtype}:
        decoded = ops.q4_k_dequantize(expected.to(device), dtype=out_dtype)
        assert_decoded(decoded, reference.q4_k_dequantize(expected, out_dtype))


def test_decodes_as_gguf(device: str) -> None:
    """Bit for bit, for every byte a block can hold."""
    for seed in range(3):
        blocks = random_blocks(37, 512, seed)
        assert torch.equal(ops.q4_k_dequantize(blocks.to(device)).cpu(), gguf_dequantize(blocks))


def test_layout(device: str) -> None:
    """The packing of scales, minima and nibbles, spelled out."""
    g = torch.Generator().manual_seed(3)
    sc, m = torch.randint(1, 64, (2, 8), generator=g).tolist()
    q = torch.randint(0, 16, (8, 32), generator=g)
    packed = [0] * 12
    for j in range(4):
        packed[j] = sc[j] | (sc[j + 4] >> 4) << 6
        packed[j + 4] = m[j] | (m[j + 4] >> 4) << 6
        packed[j + 8] = (sc[j + 4] & 15) | (m[j + 4] & 15) << 4
    header = torch.tensor([0.5, 0.25], dtype=torch.float16).view(torch.uint8)
    codes = (q[0::2] | q[1::2] << 4).flatten().to(torch.uint8)
    block = torch.cat([header, torch.tensor(packed, dtype=torch.uint8), codes])
    expected = 0.5 * torch.tensor(sc)[:, None] * q - 0.25 * torch.tensor(m)[:, None]
    actual = ops.q4_k_dequantize(block.view(1, 144).to(device)).cpu()
    assert torch.equal(actual, expected.view(1, 256))


def test_round_trips_what_it_can_hold(device: str) -> None:
    """Values on a block's own grid, its largest scale and minimum at 63, come back exactly."""
    g = torch.Generator().manual_seed(4)
    q = torch.randint(0, 16, (64, 8, 32), generator=g)
    q[..., 0], q[..., 1] = 0, 15
    w = (63.0 * q - 63.0 * 4).flatten(1)
    assert torch.equal(ops.q4_k_dequantize(ops.q4_k_quantize(w.to(device))).cpu(), w)


WEIGHTS = {
    "normal": lambda g: torch.randn(64, 1024, generator=g),
    "uniform": lambda g: torch.rand(64, 1024, generator=g) - 0.3,
    "heavy tails": lambda g: torch.randn(64, 1024, generator=g) ** 3,
    "small": lambda g: torch.randn(64, 1024, generator=g) * 0.02,
    "outliers": lambda g: (
        torch.randn(64, 1024, generator=g) * (1 + 30 * (torch.rand(64, 1024, generator=g) < 0.01))
    ),
}


def some(device: str) -> int:
    """Rows of a test whose quantiser runs lane by lane on the software device."""
    return 64 if device == "cpu" else 8


@pytest.mark.parametrize("name", WEIGHTS)
def test_error_against_llama_cpp(name: str, device: str) -> None:
    w = WEIGHTS[name](torch.Generator().manual_seed(5))[: some(device)]
    ours = relative_error(ops.q4_k_dequantize(ops.q4_k_quantize(w.to(device))), w.double())
    theirs = relative_error(gguf_dequantize(ggml_quantize(w)), w.double())
    assert ours <= 1.02 * theirs


def test_error_on_a_trained_model(code_model: Path, device: str) -> None:
    from safetensors import safe_open

    weights = {}
    for path in code_model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and shape[1] % 256 == 0:
                    weights[name] = file.get_slice(name)[: some(device)]
    names = sorted(weights)
    assert len(names) > 10
    for name in names[:: len(names) // 8]:
        w = weights[name].float()
        blocks = ops.q4_k_quantize(w.to(device))
        ours = relative_error(gguf_dequantize(blocks), w.double())
        theirs = relative_error(gguf_dequantize(ggml_quantize(w)), w.double())
        assert ours <= 1.02 * theirs, name


def test_nan_and_infinity(device: str) -> None:
    """NaN marks its super-block and no other; infinities decode to about the largest values."""
    w = normal(2, 768)
    w[0, 300] = torch.nan
    w[1, 5], w[1, 700] = torch.inf, -torch.inf
    blocks = ops.q4_k_quantize(w.to(device))
    decoded = ops.q4_k_dequantize(blocks).cpu()
    nan = torch.zeros(2, 768, dtype=torch.bool)
    nan[0, 256:512] = True
    assert torch.equal(decoded.isnan(), nan)
    assert decoded[1, 5] > 5.7e7 and decoded[1, 700] == 63 * -65504
    half = ops.q4_k_dequantize(blocks, dtype=torch.float16).cpu()
    assert half[1, 5] == 65504 and half[1, 700] == -65504


def test_views_and_ranks(device: str) -> None:
    w = normal(4, 3, 512)
    blocks = ops.q4_k_quantize(w.to(device))
    assert blocks.shape == (4, 3, 288)
    assert_bytes(ops.q4_k_quantize(w.transpose(0, 1).to(device)), blocks.transpose(0, 1))
    assert_bytes(ops.q4_k_quantize(w[0, 0].to(device)), blocks[0, 0])
    expected = ops.q4_k_dequantize(blocks)
    assert torch.equal(ops.q4_k_dequantize(blocks.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(ops.q4_k_dequantize(blocks[1, 2]), expected[1, 2])
    assert ops.q4_k_quantize(torch.zeros(0, 256, device=device)).shape == (0, 144)
    assert ops.q4_k_dequantize(blocks[:0]).shape == (0, 3, 512)


# Products


def check_product(
    x: torch.Tensor, blocks: torch.Tensor, device: str, bound: float | None = None
) -> torch.Tensor:
    """A product against float64, exact and by default; returns the exact one."""
    expected = x.double() @ reference.q4_k_dequantize(blocks).double().T
    multiply = ops.q4_k_gemv if x.numel() == x.shape[-1] else ops.q4_k_matmul
    results = []
    for exact in (False, True):
        out = multiply(x.to(device), blocks.to(device), exact=exact)
        assert out.dtype == x.dtype and out.device.type == device
        allowed = ROUNDING[x.dtype] + (SUMS if exact else INTEGERS)
        assert relative_error(out, expected) <= (bound or allowed)
        results.append(out)
    return results[1]


@pytest.mark.parametrize(("n", "k"), [(1, 256), (3, 512), (7, 2304), (130, 768)])
@each_dtype
def test_gemv(n: int, k: int, dtype: torch.dtype, device: str) -> None:
    check_product(normal(1, k, dtype=dtype, seed=n), random_blocks(n, k), device)


def test_gemv_at_o_proj(device: str) -> None:
    """Qwen3-8B's o_proj, 4096 by 4096 (a quarter of its rows on the software device)."""
    n = 4096 if device == "cpu" else 1024
    blocks = random_blocks(n, 4096, seed=6)
    for dtype in FLOAT_DTYPES:
        check_product(normal(4096, dtype=dtype, seed=7), blocks, device)


def test_gemv_of_a_vocabulary(device: str) -> None:
    """151936 by 1024: every row is right, in 64-bit offsets."""
    n, k = (151936, 1024) if device == "cpu" else (6001, 1024)
    few = random_blocks(509, k)
    blocks = few.repeat(-(-n // 509), 1)[:n]
    x = normal(k, seed=8)
    out = ops.q4_k_gemv(x.to(device), blocks.to(device), exact=True).cpu()
    expected = x.double() @ reference.q4_k_dequantize(few).double().T
    assert relative_error(out[:509], expected) <= SUMS
    assert torch.equal(out, out[:509].repeat(-(-n // 509))[:n])


@each_dtype
@pytest.mark.parametrize("m", [2, 3, 4, 5, 6, 7, 8, 9, 33, 70])
def test_matmul(m: int, dtype: torch.dtype, device: str) -> None:
    """Odd numbers of rows of x and w; 8 and fewer share each decoded block."""
    for n, k in ((1, 256), (67, 768)):
        check_product(normal(m, k, dtype=dtype, seed=m), random_blocks(n, k), device)


def test_matmul_in_several_tiles(device: str) -> None:
    """A workspace smaller than the weights."""
    n, k = (1037, 2048) if device == "cpu" else (77, 512)
    check_product(normal(9, k, seed=9), random_blocks(n, k), device)


def test_shapes(device: str) -> None:
    blocks, x = random_blocks(5, 256), normal(2, 3, 256)
    out = check_product(x, blocks, device)
    assert out.shape == (2, 3, 5)
    row = ops.q4_k_matmul(x[:1, 1:2].to(device), blocks.to(device), exact=True)
    torch.testing.assert_close(row, out[:1, 1:2], rtol=1e-4, atol=1e-4)
    assert ops.q4_k_gemv(x[0, 0].to(device), blocks.to(device)).shape == (5,)
    assert ops.q4_k_matmul(x[:0].to(device), blocks.to(device)).shape == (0, 3, 5)
    assert ops.q4_k_matmul(x.to(device), blocks[:0].to(device)).shape == (2, 3, 0)
    nothing = ops.q4_k_matmul(x[..., :0].to(device), blocks[:, :0].to(device))
    assert nothing.shape == (2, 3, 5) and not nothing.any()


@pytest.mark.parametrize("m", [1, 3, 12])
def test_views(m: int, device: str) -> None:
    """Rows of a wider buffer, columns apart, x transposed or with a storage offset."""
    blocks, x = random_blocks(9, 512), normal(m, 512)
    expected = ops.q4_k_matmul(x.to(device), blocks.to(device))
    wide = torch.full((11, 288 + 14), 7, dtype=torch.uint8)
    wide[1:10, 6:294] = blocks
    apart = torch.full((9, 576), 7, dtype=torch.uint8)
    apart[:, ::2] = blocks
    odd = torch.full((9 * 288 + 1,), 7, dtype=torch.uint8)
    odd[1:] = blocks.flatten()
    for view in (
        wide.to(device)[1:10, 6:294],
        apart.to(device)[:, ::2],
        odd.to(device)[1:].view(9, 288),
    ):
        assert torch.equal(ops.q4_k_matmul(x.to(device), view), expected)
    shifted = torch.cat([torch.zeros(1, 512), x]).to(device)[1:]
    assert torch.equal(ops.q4_k_matmul(shifted, blocks.to(device)), expected)
    transposed = x.T.contiguous().to(device).T
    assert torch.equal(ops.q4_k_matmul(transposed, blocks.to(device)), expected)


@pytest.mark.parametrize("m", [1, 2, 20])
@pytest.mark.parametrize("byte_offset", [0, 2, 32, 1230])
def test_byte_offset(byte_offset: int, m: int, device: str) -> None:
    """A tensor inside a larger buffer, with more behind it."""
    blocks, x = random_blocks(7, 512, seed=1), normal(m, 512).to(device)
    expected = ops.q4_k_matmul(x, blocks.to(device))
    buffer = torch.full((byte_offset + blocks.numel() + 99,), 0xFF, dtype=torch.uint8)
    buffer[byte_offset : byte_offset + blocks.numel()] = blocks.flatten()
    moved = buffer.to(device)
    assert torch.equal(ops.q4_k_matmul(x, moved, byte_offset, 7), expected)
    if m == 1:
        assert torch.equal(ops.q4_k_gemv(x, moved, byte_offset, 7), expected)
    rest = moved[: byte_offset + blocks.numel()]
    assert torch.equal(ops.q4_k_matmul(x, rest, byte_offset), expected)
    if byte_offset == 32:
        part = ops.q4_k_matmul(x, moved, byte_offset + 288, 3)
        torch.testing.assert_close(part, expected[:, 1:4], rtol=1e-4, atol=1e-4)


def test_reads_a_mapped_file_in_place(tmp_path: Path, device: str) -> None:
    """The rows of a read-only mapping are used where they lie."""
    blocks, x = random_blocks(64, 1024), normal(1024)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\0" * 4096 + blocks.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    out = ops.q4_k_gemv(x.to(device), mapped.to(device), 4096)
    assert torch.equal(out, ops.q4_k_gemv(x.to(device), blocks.to(device)))


@each_dtype
def test_special_values_of_x(dtype: torch.dtype, device: str) -> None:
    """NaN and infinity reach the result; tiny and large x lose nothing."""
    blocks = random_blocks(5, 512)
    x = normal(512, dtype=dtype)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[300] = value
        assert not ops.q4_k_gemv(bad.to(device), blocks.to(device)).cpu().isfinite().any()
    check_product(torch.full((512,), 0.1, dtype=dtype), blocks, device)
    assert not ops.q4_k_gemv(torch.zeros(512, dtype=dtype, device=device), blocks.to(device)).any()
    if dtype != torch.float16:
        for scale in (1e-36, 1e30):
            check_product((x.double() * scale).to(dtype), blocks, device)
    outlier = x.clone() / 100
    outlier[7] *= 10000
    check_product(outlier, blocks, device, bound=1e-2)


def test_a_nan_block_makes_its_row_nan(device: str) -> None:
    blocks = random_blocks(5, 512)
    blocks[2, 144:146] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    for m in (1, 4, 11):
        out = ops.q4_k_matmul(normal(m, 512).to(device), blocks.to(device)).cpu()
        expected = torch.zeros(m, 5, dtype=torch.bool)
        expected[:, 2] = True
        assert torch.equal(out.isnan(), expected)


def test_float16_results_overflow_to_infinity(device: str) -> None:
    """As torch's own linear does; nothing saturates in silence."""
    w = torch.full((3, 256), 900.0)
    for m in (1, 2, 9):
        x = torch.full((m, 256), 900.0, dtype=torch.float16)
        blocks = ops.q4_k_quantize(w.to(device))
        assert ops.q4_k_matmul(x.to(device), blocks).isposinf().all()


# Refusals

ROW = 288  # bytes of a row of K = 512


REFUSED = {
    "K = 255": ((255,), (4, 144), {}, ValueError, "multiple of 256, got 255"),
    "K of blocks": ((512,), (4, 144), {}, ValueError, "rows of 288 bytes for K = 512, got 144"),
    "truncated rows": ((512,), (4, ROW - 1), {}, ValueError, "rows of 288 bytes.*got 287"),
    "truncated": ((512,), (4 * ROW - 2,), {}, ValueError, "whole rows of 288 bytes.*1150 bytes"),
    "too many rows": (
        (512,), (4 * ROW,), {"rows": 5}, ValueError, "5 rows of 288 bytes.*fit into the 1152 bytes",
    ),
    "rows from the offset": (
        (512,), (4 * ROW,), {"byte_offset": 2, "rows": 4}, ValueError, "4 rows .*offset 2 .*fit",
    ),
    "huge rows": ((512,), (4 * ROW,), {"rows": 2**62}, ValueError, "do not fit"),
    "odd offset": ((512,), (4 * ROW + 1,), {"byte_offset": 1}, ValueError, "even.*got 1"),
    "negative offset": ((512,), (4 * ROW,), {"byte_offset": -2}, ValueError, "got -2"),
    "offset beyond": ((512,), (4 * ROW,), {"byte_offset": 4 * ROW + 2}, ValueError, "beyond"),
    "negative rows": ((512,), (4 * ROW,), {"rows": -1}, ValueError, "rows must not be negative"),
    "scalar x": ((), (4, ROW), {}, ValueError, "at least 1 dimension"),
}  # fmt: skip


@pytest.mark.parametrize("op", [ops.q4_k_gemv, ops.q4_k_matmul], ids=["gemv", "matmul"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_products(case: str, op, device: str) -> None:  # type: ignore[no-untyped-def]
    x_shape, blocks_shape, options, error, message = REFUSED[case]
    x = torch.zeros(x_shape, device=device)
    blocks = torch.zeros(blocks_shape, dtype=torch.uint8, device=device)
    with pytest.raises(error, match=rf"\[kvq\.{op.__name__}\] .*{message}"):
        op(x, blocks, **options)


def test_other_refusals(device: str) -> None:
    x = torch.zeros(512, device=device)
    blocks = torch.zeros(4, ROW, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"\[kvq.q4_k_gemv\] x must be one vector, got shape"):
        ops.q4_k_gemv(x.expand(2, 512), blocks)
    with pytest.raises(TypeError, match=r"\[kvq.q4_k_gemv\] blocks must be uint8, got"):
        ops.q4_k_gemv(x, blocks.float())
    with pytest.raises(TypeError, match=r"\[kvq.q4_k_matmul\] x must be float32"):
        ops.q4_k_matmul(x.long(), blocks)
    with pytest.raises(ValueError, match=r"\[kvq.q4_k_matmul\] blocks .* must be contiguous"):
        ops.q4_k_matmul(x, blocks[:, ::2], 2)
    with pytest.raises(ValueError, match=r"\[kvq.q4_k_quantize\] w's last .*256, got 255"):
        ops.q4_k_quantize(torch.zeros(3, 255, device=device))
    with pytest.raises(TypeError, match=r"\[kvq.q4_k_quantize\] w must be float32"):
        ops.q4_k_quantize(blocks)
    with pytest.raises(ValueError, match=r"\[kvq.q4_k_dequantize\] blocks' last .*got 143"):
        ops.q4_k_dequantize(blocks[:, :143])
    with pytest.raises(TypeError, match=r"\[kvq.q4_k_dequantize\] blocks must be uint8"):
        ops.q4_k_dequantize(x)
    with pytest.raises(TypeError, match=r"\[kvq.q4_k_dequantize\] dtype must be float32"):
        ops.q4_k_dequantize(blocks, dtype=torch.int32)


# The layer


def write_gguf(path: Path, tensors: dict[str, tuple[torch.Tensor, object]]) -> None:
    """A GGUF file of tensors; raw bytes [N, row] where a type is given."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (tensor, kind) in tensors.items():
        writer.add_tensor(name, tensor.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_layer_from_linear(device: str) -> None:
    linear = torch.nn.Linear(512, 37).to(device)
    layer = Q4KLinear.from_linear(linear)
    assert_bytes(layer.blocks, ops.q4_k_quantize(linear.weight.detach()))
    for shape in ((512,), (1, 1, 512), (2, 3, 512), (3, 11, 512)):
        x = normal(*shape, seed=10)
        dense = torch.nn.functional.linear(
            x, ops.q4_k_dequantize(layer.blocks).cpu(), linear.bias.detach().cpu()
        )
        assert relative_error(layer(x.to(device)), dense.double()) < INTEGERS
    half = layer.half()
    assert half.blocks.dtype == torch.uint8 and half(x.half().to(device)).dtype == torch.float16
    text = "in_features=512, out_features=37, bias=True, format=q4_k"
    assert repr(layer) == f"Q4KLinear({text})"
    assert not list(layer.parameters()) and set(layer.state_dict()) == {"blocks", "bias"}


def test_layer_from_gguf(tmp_path: Path, device: str) -> None:
    """Each type it reads, in place in the mapped file, with a bias."""
    w, bias = normal(33, 1280, seed=11) * 0.05, normal(33, seed=12)
    types = {"q4_k": Q4_K, "q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": None}
    types["q8_0"] = gguf.GGMLQuantizationType.Q8_0
    rows = {name: gguf.quants.quantize(w.numpy(), t) for name, t in types.items() if name != "q4_k"}
    tensors = {name: (torch.from_numpy(row), types[name]) for name, row in rows.items()}
    tensors["q4_k"] = (ops.q4_k_quantize(w), Q4_K)
    path = tmp_path / "weights.gguf"
    write_gguf(path, {**tensors, "bias": (bias, None), "dense": (w, None)})
    for name, kind in types.items():
        layer = Q4KLinear.from_gguf(path, name, "bias", exact=True)
        assert (layer.format, layer.in_features, layer.out_features) == (name, 1280, 33)
        assert torch.equal(layer.blocks, tensors[name][0])
        dense = torch.from_numpy(gguf.quants.dequantize(tensors[name][0].numpy(), kind)).double()
        moved = layer.to(device)
        for x in (normal(1280, seed=13), normal(2, 9, 1280, seed=14)):
            expected = x.double() @ dense.T + bias.double()
            assert relative_error(moved(x.to(device)), expected) < SUMS
    for name, message in {
        "dense": "type Q4_K, Q4_0 or Q8_0, got F32",
        "bias": r"must have 2 dimensions.*got F32 \[33\]",
    }.items():
        with pytest.raises(ValueError, match=rf"\[kvq\.Q4KLinear\] tensor '{name}' .*{message}"):
            Q4KLinear.from_gguf(path, name)
    with pytest.raises(KeyError, match=r"\[kvq\.Q4KLinear\] .* has no tensor 'nothing'"):
        Q4KLinear.from_gguf(path, "nothing")
    with pytest.raises(ValueError, match="bias 'q4_0' must have type F32 or F16, got Q4_0"):
        Q4KLinear.from_gguf(path, "q4_k", "q4_0")


def anonymous_kib(address: int) -> int:
    """Memory, not of a file, in the mapping that holds this address."""
    anonymous, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "Anonymous:":
            anonymous += int(line.split()[1])
    return anonymous


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_layer_of_a_file_owns_no_memory(tmp_path: Path, device: str) -> None:
    if device != "cpu":
        pytest.skip("a device has its own copy")
    path = tmp_path / "weights.gguf"
    write_gguf(path, {"w": (random_blocks(2048, 1024), Q4_K)})
    layer = Q4KLinear.from_gguf(path, "w")
    layer(normal(1024)), layer(normal(20, 1024))
    assert anonymous_kib(layer.blocks.data_ptr()) == 0
    copied = layer.blocks.clone()
    assert anonymous_kib(copied.data_ptr()) >= copied.numel() // 1024 - 8


def test_layer_refusals() -> None:
    blocks = random_blocks(4, 256)
    for arguments, message in {
        (blocks, None, "q5_k"): "format must be one of q4_k, q8_0, q4_0, got 'q5_k'",
        (blocks[:, :-1], None, "q4_k"): r"\[N, a multiple of 144\], got torch.uint8 \[4, 143\]",
        (blocks.int(), None, "q4_k"): "must be uint8",
        (blocks, torch.zeros(5), "q4_k"): r"bias must be \[4\], got \[5\]",
    }.items():
        with pytest.raises(ValueError, match=rf"\[kvq\.Q4KLinear\] .*{message}"):
            Q4KLinear(arguments[0], arguments[1], format=arguments[2])
    with pytest.raises(ValueError, match="multiple of 256, got 320"):
        Q4KLinear.from_linear(torch.nn.Linear(320, 4))


@pytest.mark.parametrize("kind", ["q4_k", "q8_0"])
def test_layer_compiles(kind: str, device: str) -> None:
    """One graph for every number of rows, with the eager results."""
    if kind == "q4_k":
        layer = Q4KLinear.from_linear(torch.nn.Linear(256, 40), exact=True)
    else:
        rows = gguf.quants.quantize(normal(40, 256).numpy(), gguf.GGMLQuantizationType.Q8_0)
        layer = Q4KLinear(torch.from_numpy(rows), normal(40), format="q8_0")
    layer = layer.to(device)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 17):
            x = normal(rows, 256, seed=rows).to(device)
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
