"""What quantize, quantize_into_, append_, dequantize and qdq promise for every format alike."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import (
    ALL_FORMATS,
    LAYOUTS,
    SOME_FORMATS,
    Twin,
    assert_bytes,
    assert_decoded,
    assert_packed,
    byte_cases,
    check_bytes,
    dtype_id,
    generator,
    holds,
    hostile,
    input_views,
    near_edges,
    normal,
    on,
    raw,
    reference_dequantize,
    reference_quantize,
    signs_for,
    twin,
)
from torch_kvq import KVFormat, Packed, ops, reference
from torch_kvq.formats import ENCODERS, FLOAT_DTYPES

each_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=dtype_id)
some_formats = pytest.mark.parametrize("fmt", SOME_FORMATS, ids=dtype_id)
each_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)


def reference_write(
    packed: Packed, x: torch.Tensor, position: object, fmt: KVFormat, **options: object
) -> None:
    """reference.quantize_into_ with the default signs of a format that rotates."""
    options.setdefault("signs", signs_for(fmt, x.shape[-1]))
    reference.quantize_into_(*packed, x, position, fmt.name, fmt.group_size, **options)


# Bytes: rotation, centring, format none


@pytest.mark.parametrize(("fmt", "dtype", "head_dim", "tokens"), byte_cases("none"))
def test_none_keeps_what_it_is_given(
    fmt: KVFormat, dtype: torch.dtype, head_dim: int, tokens: int, device: str
) -> None:
    check_bytes(device, fmt, dtype, head_dim, tokens)
    x = hostile(1, 2, tokens, head_dim, dtype)
    assert_bytes(ops.qdq(on(device, x), fmt), x)  # type: ignore[arg-type]


@each_dtype
@each_format
def test_rotated_bytes_equal_reference(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    check_bytes(device, fmt.rotated(), dtype, 128, 17)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 192, 256])
@some_formats
def test_rotated_head_sizes(fmt: KVFormat, head_dim: int, device: str) -> None:
    if not holds(fmt, head_dim):
        pytest.skip(f"{fmt} stores no vectors of {head_dim}")
    check_bytes(device, fmt.rotated(), torch.float16, head_dim, 17)


@each_dtype
@each_format
def test_centred_bytes_equal_reference(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    """A mean per head and channel is subtracted before encoding and added after decoding."""
    mean = 3 * torch.randn(2, 128, generator=generator(61))
    check_bytes(device, fmt, dtype, 128, 17, mean=mean)
    check_bytes(device, fmt.rotated(), dtype, 128, 3, mean=mean)


@some_formats
def test_centring_helps_shifted_data(fmt: KVFormat, device: str) -> None:
    mean = 10 * torch.randn(2, 64, generator=generator(62))
    x = normal(1, 2, 32, 64, seed=63) + mean[:, None]
    plain = (ops.qdq(on(device, x), fmt).cpu() - x).square().mean()  # type: ignore[arg-type]
    centred = (ops.qdq(on(device, x), fmt, mean=on(device, mean)).cpu() - x).square().mean()  # type: ignore[arg-type]
    assert centred <= plain / 2 or fmt.name == "none"


@some_formats
def test_rotated_data_can_be_read_rotated(fmt: KVFormat, device: str) -> None:
    """Without signs dequantize stays in the rotated domain; hadamard's inverse leads back."""
    if fmt.family == "turboquant":
        pytest.skip("a KVFormat of tq always rotates back; the raw op is tested with its codes")
    x = normal(1, 2, 5, 96 if holds(fmt, 96) else 128, seed=64)
    signs = signs_for(fmt.rotated(), x.shape[-1])
    assert signs is not None
    packed = ops.quantize(on(device, x), fmt.rotated())  # type: ignore[arg-type]
    rotated = ops.dequantize(packed, fmt.rotated(False))
    back = ops.hadamard(rotated, signs.to(device), inverse=True)
    assert_decoded(back, ops.dequantize(packed, fmt.rotated()).cpu())


# NaN, infinities, round trips


@each_dtype
@each_format
def test_nan_never_spreads_to_other_vectors(fmt: KVFormat, dtype: torch.dtype, device: str) -> None:
    """A NaN decodes to NaN; all other vectors are what they are without it."""
    for option in (fmt, fmt.rotated()):
        x = normal(1, 2, 3, 128, dtype=dtype, seed=65)
        clean = ops.qdq(on(device, x), option).cpu()  # type: ignore[arg-type]
        x[0, 1, 1, 77] = torch.nan
        decoded = ops.qdq(on(device, x), option).cpu()  # type: ignore[arg-type]
        assert decoded[0, 1, 1, 77].isnan()
        decoded[0, 1, 1] = clean[0, 1, 1]
        assert_bytes(decoded, clean)


@each_dtype
@each_format
def test_finite_and_infinite_values_decode_finite(
    fmt: KVFormat, dtype: torch.dtype, device: str
) -> None:
    """Everything but NaN decodes finite, in float32 and in x's dtype; none keeps infinities."""
    x = hostile(1, 2, 17, 128, dtype).nan_to_num(1.0, torch.inf, -torch.inf)
    for option in (fmt, fmt.rotated()):
        packed = ops.quantize(on(device, x), option)  # type: ignore[arg-type]
        for out_dtype in {torch.float32, dtype}:
            decoded = ops.dequantize(packed, option, dtype=out_dtype).cpu()
            keeps = option.name == "none" and not option.rotate
            assert torch.equal(decoded.isfinite(), x.isfinite() if keeps else decoded == decoded)
            assert decoded.isfinite().all() or keeps


@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", ["int8", "int4-g32", "fp8_e4m3", "fp8_e5m2-g128", "tq4"])
def test_nan_has_one_pattern_among_scales(name: str, scale_dtype: torch.dtype, device: str) -> None:
    """That of ``torch.tensor(nan)``; torch's vectorised conversions to bfloat16 have another."""
    fmt = KVFormat.parse(name)
    x = normal(1, 2, 5, 128, seed=3)
    x[0, 1, 1, 77] = torch.nan
    for packed in (
        ops.quantize(x.to(device), fmt, scale_dtype=scale_dtype),
        reference_quantize(x, fmt, scale_dtype=scale_dtype),
    ):
        scales = packed.scales.cpu()
        pattern = raw(torch.tensor(torch.nan, dtype=scale_dtype))
        found = raw(scales[scales.isnan()]).unflatten(-1, (-1, len(pattern)))
        assert len(found) == 1 and (found == pattern).all()


@each_format
def test_qdq_is_quantize_then_dequantize(fmt: KVFormat, device: str) -> None:
    x = on(device, hostile(2, 2, 17, 128, torch.bfloat16))
    assert isinstance(x, torch.Tensor)
    mean = torch.randn(2, 128, generator=generator(66)).to(device)
    for encoder in ENCODERS[fmt.family]:
        options = {"mean": mean, "encoder": encoder, "scale_dtype": torch.float32}
        packed = ops.quantize(x, fmt, **options)  # type: ignore[arg-type]
        expected = ops.dequantize(packed, fmt, mean=mean, dtype=x.dtype)
        assert_bytes(ops.qdq(x, fmt, **options), expected)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(
    fmt=st.sampled_from([f for f in ALL_FORMATS if f.family in ("fp8", "gguf", "none")]),
    seed=st.integers(0, 10_000),
    exponent=st.integers(3, 12),
)
def test_quantising_again_changes_nothing(
    device: str, fmt: KVFormat, seed: int, exponent: int
) -> None:
    """Formats that keep their largest value exactly are idempotent to the byte."""
    x = normal(1, 1, 3, 128, seed=seed) * 2.0**exponent
    packed = ops.quantize(x.to(device), fmt, scale_dtype=torch.float16)
    decoded = ops.dequantize(packed, fmt)
    again = ops.quantize(decoded, fmt, scale_dtype=torch.float16)
    assert_packed(again, on("cpu", packed))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(
    fmt=st.sampled_from([f for f in ALL_FORMATS if f.family == "affine"]),
    seed=st.integers(0, 10_000),
)
def test_affine_codes_are_stable(device: str, fmt: KVFormat, seed: int) -> None:
    """Affine codes survive a second round; the scale moves by a rounding at most."""
    x = normal(1, 1, 3, 128, seed=seed)
    packed = ops.quantize(x.to(device), fmt)
    again = ops.quantize(ops.dequantize(packed, fmt), fmt)
    assert torch.equal(packed.codes.cpu(), again.codes.cpu())
    torch.testing.assert_close(again.scales.cpu(), packed.scales.cpu(), rtol=1e-5, atol=0)


# Ranges of tokens


@each_format
def test_tokens_are_independent(fmt: KVFormat, device: str) -> None:
    """Quantising token by token gives the bytes of quantising all at once: crop is exact."""
    x = on(device, hostile(2, 2, 17, 128, torch.float16))
    assert isinstance(x, torch.Tensor)
    whole = ops.quantize(x, fmt)
    parts = [ops.quantize(x[:, :, t : t + 1], fmt) for t in range(17)]
    joined = Packed(*(torch.cat([part[i].cpu() for part in parts], 2) for i in range(3)))
    assert_packed(whole, joined)


@each_format
def test_ranges_equal_single_positions(fmt: KVFormat, device: str) -> None:
    """dequantize of [start, start + n) is the concatenation of its tokens, bit for bit."""
    x = on(device, hostile(2, 2, 17, 128, torch.bfloat16))
    packed = ops.quantize(x, fmt)  # type: ignore[arg-type]
    single = [ops.dequantize(packed, fmt, start=t, length=1).cpu() for t in range(17)]
    for start, length in ((0, None), (0, 17), (3, 5), (16, 1), (16, None), (7, 0), (17, 0)):
        end = 17 if length is None else start + length
        part = ops.dequantize(packed, fmt, start=start, length=length).cpu()
        assert part.shape == (2, 2, end - start, 128)
        if end > start:
            assert_bytes(part, torch.cat(single[start:end], 2))


@some_formats
def test_output_dtypes(fmt: KVFormat, device: str) -> None:
    x = hostile(1, 2, 17, 128, torch.float32)
    packed = reference_quantize(x, fmt)
    for dtype in FLOAT_DTYPES:
        decoded = ops.dequantize(on(device, packed), fmt, dtype=dtype)  # type: ignore[arg-type]
        assert_decoded(decoded, reference_dequantize(packed, fmt, dtype=dtype))


# Writing into caches


@pytest.mark.parametrize("layout", LAYOUTS)
@each_format
def test_writes_touch_no_other_byte(fmt: KVFormat, layout: str, device: str) -> None:
    """Caches of any strides, narrowed from larger buffers, keep every byte around the slots."""
    both = twin(fmt, (2, 2, 6, 128), torch.float16, device, layout)
    x = hostile(2, 2, 3, 128, torch.float16, seed=71)
    x[0, 1, 2] = torch.nan
    ops.quantize_into_(both.packed, x.to(device), 2, fmt)
    reference_write(both.cpu_packed, x, 2, fmt)
    both.check()
    decoded = ops.dequantize(both.packed, fmt, start=2, length=3)
    assert_decoded(decoded, reference_dequantize(both.cpu_packed, fmt, start=2, length=3))


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("ring", [False, True], ids=["line", "ring"])
@pytest.mark.parametrize("values", [4, [4], [0, 3, 1]], ids=["scalar", "one", "per row"])
def test_positions(values: int | list[int], ring: bool, integer: torch.dtype, device: str) -> None:
    fmt = KVFormat.parse("int4-g32-rot")
    batch = len(values) if isinstance(values, list) else 3
    position = torch.tensor(values, dtype=integer) * (5 if ring else 1)
    both = twin(fmt, (batch, 2, 7, 64), torch.float32, device)
    x = normal(batch, 2, 3, 64, seed=72)
    ops.quantize_into_(both.packed, x.to(device), position.to(device), fmt, ring=ring)
    reference_write(both.cpu_packed, x, position, fmt, ring=ring)
    both.check()


@some_formats
def test_ring_keeps_the_last_tokens(fmt: KVFormat, device: str) -> None:
    """Of more tokens than slots the last stay, each in slot position mod S."""
    capacity, head_dim = 5, 128
    x = normal(1, 2, 12, head_dim, seed=73)
    packed = fmt.empty(1, 2, capacity, head_dim, dtype=torch.float32, device=device)
    ops.quantize_into_(Packed(*packed), x.to(device), 3, fmt, ring=True)
    expected = reference_quantize(x, fmt)
    for token in range(12 - capacity, 12):
        slot = (3 + token) % capacity
        for actual, wanted in zip(packed, expected, strict=True):
            assert_bytes(actual[:, :, slot], wanted[:, :, token])


def test_large_ring_positions(device: str) -> None:
    """Positions are 64-bit: a ring at position 2^40 wraps as at its remainder."""
    fmt = KVFormat("int8", 32)
    x = normal(1, 1, 4, 32, seed=74)
    for position in (2**40 + 3, torch.tensor(2**40 + 3)):
        both = twin(fmt, (1, 1, 7, 32), torch.float32, device)
        moved = position.to(device) if isinstance(position, torch.Tensor) else position
        ops.quantize_into_(both.packed, x.to(device), moved, fmt, ring=True)
        reference_write(both.cpu_packed, x, (2**40 + 3) % 7, fmt, ring=True)
        both.check()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_write(device: str, data: st.DataObject) -> None:
    """Any sequence of writes, in a line or a ring, leaves what the reference leaves."""
    fmt = data.draw(st.sampled_from(SOME_FORMATS))
    layout = data.draw(st.sampled_from(LAYOUTS))
    ring = data.draw(st.booleans())
    batch, capacity = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    both = twin(fmt, (batch, 2, capacity, 64), torch.float16, device, layout)
    for _ in range(data.draw(st.integers(1, 3))):
        tokens = data.draw(st.integers(0, 2 * capacity if ring else capacity))
        room = 20 if ring else capacity - tokens
        rows = data.draw(st.lists(st.integers(0, room), min_size=batch, max_size=batch))
        x = normal(batch, 2, tokens, 64, dtype=torch.float16, seed=tokens)
        position = torch.tensor(rows)
        ops.quantize_into_(both.packed, x.to(device), position.to(device), fmt, ring=ring)
        reference_write(both.cpu_packed, x, position, fmt, ring=ring)
    both.check()


def append_case(k: KVFormat, v: KVFormat, device: str) -> tuple[Twin, Twin, list[torch.Tensor]]:
    keys = twin(k, (2, 2, 5, 128), torch.bfloat16, device)
    values = twin(v, (2, 2, 5, 64), torch.bfloat16, device)
    x = [normal(2, 2, 3, d, dtype=torch.bfloat16, seed=d) for d in (128, 64)]
    return keys, values, x


@pytest.mark.parametrize(
    ("k", "v"),
    [
        ("int8-g64", "int4-g32-rot"),
        ("tq4", "q4_0"),
        ("none", "tq3"),
        ("q8_0-rot", "none"),
        ("fp8_e4m3-g128", "fp8_e5m2-g64"),
        ("int2-g32", "int2-g64"),
    ],
)
@pytest.mark.parametrize("ring", [False, True], ids=["line", "ring"])
def test_append_is_two_writes(k: str, v: str, ring: bool, device: str) -> None:
    """Different formats, head sizes, means and encoders for keys and values, in one launch."""
    k_fmt, v_fmt = KVFormat.parse(k), KVFormat.parse(v)
    keys, values, (key, value) = append_case(k_fmt, v_fmt, device)
    position = torch.tensor([1, 2]) + (4 if ring else 0)
    k_mean = torch.randn(2, 128, generator=generator(75))
    v_mean = torch.randn(2, 64, generator=generator(76))
    encoder = ENCODERS[k_fmt.family][-1]
    ops.append_(
        keys.packed,
        values.packed,
        key.to(device),
        value.to(device),
        position.to(device),
        k_fmt,
        v_fmt,
        k_mean=k_mean.to(device),
        v_mean=v_mean.to(device),
        k_encoder=encoder,
        ring=ring,
    )
    reference_write(keys.cpu_packed, key, position, k_fmt, mean=k_mean, encoder=encoder, ring=ring)
    reference_write(values.cpu_packed, value, position, v_fmt, mean=v_mean, ring=ring)
    keys.check()
    values.check()


@pytest.mark.parametrize(
    ("k", "v"), [("int8-g64", "int4-g64-rot"), ("tq4", "q4_0"), ("fp8_e4m3-g64", "none")]
)
@pytest.mark.parametrize("tokens", [1030, 2100])
def test_many_tokens(k: str, v: str, tokens: int, device: str) -> None:
    """So many that a Metal simdgroup takes its rows in two and four steps, past a ring's end."""
    k_fmt, v_fmt, capacity = KVFormat.parse(k), KVFormat.parse(v), tokens + 7
    fmts = k_fmt, v_fmt
    sides = [twin(fmt, (1, 8, capacity, 128), torch.float16, device) for fmt in fmts]
    x = [normal(1, 8, tokens, 128, dtype=torch.float16, seed=s) for s in (81, 82)]
    moved = [t.to(device) for t in x]
    ops.append_(sides[0].packed, sides[1].packed, *moved, 500, *fmts, ring=True)
    for side, fmt, values, on_device in zip(sides, fmts, x, moved, strict=True):
        ops.quantize_into_(side.cpu_packed, values, 500, fmt, ring=True)
        side.check()
        assert_packed(ops.quantize(on_device, fmt), ops.quantize(values, fmt))
        for start, length in ((0, capacity), (tokens // 2, tokens // 2 + 1)):
            decoded = ops.dequantize(side.packed, fmt, start=start, length=length)
            expected = ops.dequantize(side.cpu_packed, fmt, start=start, length=length)
            assert_decoded(decoded, expected)


def test_append_own_signs_and_integer_position(device: str) -> None:
    fmt = KVFormat.parse("int4-g64-rot")
    keys, values, (key, value) = append_case(fmt, fmt, device)
    signs = [torch.where(normal(d, seed=77) < 0, -1.0, 1.0) for d in (128, 64)]
    moved = [s.to(device) for s in signs]
    ops.append_(
        keys.packed,
        values.packed,
        key.to(device),
        value.to(device),
        2,
        fmt,
        fmt,
        k_signs=moved[0],
        v_signs=moved[1],
    )
    reference_write(keys.cpu_packed, key, 2, fmt, signs=signs[0])
    reference_write(values.cpu_packed, value, 2, fmt, signs=signs[1])
    keys.check()
    values.check()


def test_writes_take_no_part_in_autograd(device: str) -> None:
    """A key that requires grad is written as under no_grad; the cache stays a plain buffer."""
    fmt = KVFormat("none")
    packed = Packed(*fmt.empty(1, 1, 3, 32, dtype=torch.float32, device=device))
    x = torch.ones(1, 1, 1, 32, device=device, requires_grad=True)
    ops.quantize_into_(packed, x, 0, fmt)
    ops.append_(packed, Packed(*(t.clone() for t in packed)), x, x, 1, fmt, fmt)
    assert not any(t.requires_grad or t.grad_fn for t in packed)
    assert packed.codes.cpu()[0, 0, :, 0].tolist() == [1, 1, 0]


# Empty inputs, views, threads, instruction sets


@each_format
def test_empty_inputs(fmt: KVFormat, device: str) -> None:
    for batch, tokens in ((2, 0), (0, 3), (0, 0)):
        x = torch.zeros(batch, 2, tokens, 128, dtype=torch.float16, device=device)
        packed = ops.quantize(x, fmt)
        assert [t.shape[:3] for t in packed] == [(batch, 2, tokens)] * 3
        assert ops.dequantize(packed, fmt).shape == x.shape
        assert ops.qdq(x, fmt).shape == x.shape
        both = twin(fmt, (batch, 2, 4, 128), torch.float16, device)
        ops.quantize_into_(both.packed, x, 4 - tokens, fmt)
        ops.append_(both.packed, Packed(*(t.clone() for t in both.packed)), x, x, 0, fmt, fmt)
        both.check()


@some_formats
def test_views_of_the_input(fmt: KVFormat, device: str) -> None:
    x = normal(2, 2, 5, 64, dtype=torch.float16, seed=81)
    for name, view in input_views(x, device):
        expected = reference_quantize(view.cpu(), fmt)
        assert_packed(ops.quantize(view, fmt), expected)
        both = twin(fmt, (2, 2, 5, 64), torch.float16, device)
        ops.quantize_into_(both.packed, view, 0, fmt)
        assert_packed(both.packed, expected)
        assert_bytes(ops.qdq(view, fmt), ops.qdq(view.contiguous(), fmt), name)


def test_views_of_signs_and_mean(device: str) -> None:
    x = normal(1, 2, 3, 64, seed=82)
    signs = torch.where(normal(64, seed=83) < 0, -1.0, 1.0)
    mean = normal(2, 64, seed=84)
    expected = reference_quantize(x, KVFormat("int8"), signs=signs, mean=mean)
    spread = torch.stack([signs, signs], -1).to(device)[:, 1]
    packed = ops.quantize(x.to(device), "int8", signs=spread, mean=mean.T.contiguous().to(device).T)
    assert_packed(packed, expected)


def test_threads_change_nothing(device: str) -> None:
    """More vectors than one task takes, on one thread and on two."""
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    x = normal(3, 4, 127, 64, seed=85)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for fmt in SOME_FORMATS:
                packed = ops.quantize(x, fmt)
                results += [*packed, ops.dequantize(packed, fmt), ops.hadamard(x)]
    finally:
        torch.set_num_threads(before)
    half = len(results) // 2
    for one, two in zip(results[:half], results[half:], strict=True):
        assert_bytes(two, one)


def digest() -> str:
    """A hash of what every format writes and reads; NaN counts as NaN."""
    found = hashlib.sha256()

    def add(t: torch.Tensor) -> None:
        if t.is_floating_point():
            t = torch.where(t.isnan(), torch.nan, t)
        found.update(t.contiguous().view(torch.uint8).numpy().tobytes())

    for fmt in ALL_FORMATS:
        for option in (fmt, fmt.rotated()):
            for dtype in FLOAT_DTYPES:
                for head_dim in (96, 128):
                    if holds(option, head_dim):
                        x = hostile(1, 2, 34, head_dim, dtype)
                        packed = ops.quantize(x, option, encoder=ENCODERS[option.family][-1])
                        for t in (*packed, ops.dequantize(packed, option, dtype=dtype)):
                            add(t)
            if fmt.family == "affine":
                for t in ops.quantize(near_edges(fmt, dtype), fmt):
                    add(t)
    return found.hexdigest()


def test_instruction_sets_give_the_same_bytes(device: str) -> None:
    """The CPU kernels compiled for each instruction set agree to the last bit."""
    if device != "cpu":
        pytest.skip("instruction sets are the CPU's")
    code = "from tests.test_quantize import digest; print(digest())"
    results = {}
    for isa in ("baseline", "avx2", "avx512", "avx512_bf16", "neon"):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "KVQ_CPU_ISA": isa},
            cwd=Path(__file__).resolve().parents[1],
            capture_output=True,
            text=True,
        )
        if ran.returncode and "is not built in or not supported" in ran.stderr:
            continue
        assert ran.returncode == 0, ran.stderr
        results[isa] = ran.stdout.strip()
    assert "baseline" in results
    assert set(results.values()) == {digest()}, results
