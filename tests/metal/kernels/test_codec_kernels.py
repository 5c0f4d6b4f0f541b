"""Kernels of packed rows on the emulator: exact bytes, no races, nothing outside the slots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from tests.helpers import (
    ALL_FORMATS,
    HEAD_DIMS,
    KINDS,
    SENTINEL,
    assert_bytes,
    assert_packed,
    dtype_id,
    holds,
    hostile,
    normal,
)
from tests.softmetal.requirement import missing
from torch_kvq import reference
from torch_kvq.codebooks import codebook, hadamard_signs
from torch_kvq.formats import FLOAT_DTYPES, KVFormat
from torch_kvq.ops import Packed

from .. import emulator, toolchain
from . import codec_launch
from .codec_launch import METAL, ROOT
from .compile_time import check_compile_time

MODES = ("fast", "race", "asan")
LIBRARIES = (
    "affine", "fp8", "gguf", "turboquant", "dense", "append", "hadamard", "mlx_native", "q4_k",
)  # fmt: skip
SCALES = (None, torch.float16, torch.bfloat16, torch.float32)


def variants(fmt: KVFormat) -> list[dict[str, object]]:
    """Encoder options: (rotate, centre, encoder)."""
    encoders = ["default", *(["unbiased"] if fmt.family == "turboquant" else [])]
    return [
        {"rotate": rotate, "centre": centre, "encoder": encoder}
        for rotate, centre, encoder in [
            (False, False, encoders[0]),
            (True, True, encoders[-1]),
            (True, False, encoders[0]),
        ]
    ]


def options_of(head_dim: int, heads: int, rotate, centre, encoder):  # type: ignore[no-untyped-def]
    return {
        "signs": hadamard_signs(head_dim) if rotate else None,
        "mean": normal(heads, head_dim, seed=5) if centre else None,
        "encoder": encoder,
    }


def check(fmt: KVFormat, dtype: torch.dtype, head_dim: int, mode: str, **launch: object) -> None:
    """Both directions of a format, on every kind of hostile vector, against the reference."""
    x = hostile(1, 2, len(KINDS), head_dim, dtype)
    for i, variant in enumerate(variants(fmt)):
        options = options_of(head_dim, 2, **variant)  # type: ignore[arg-type]
        scale_dtype = SCALES[i]
        expected = reference.quantize(
            x, fmt.name, fmt.group_size, scale_dtype=scale_dtype, **options
        )
        packed = codec_launch.quantize(
            x, fmt, scale_dtype=scale_dtype, mode=mode, **options, **launch
        )
        assert_packed(Packed(*packed), Packed(*expected))
        del options["encoder"]
        out_dtype = FLOAT_DTYPES[i]
        decode = {**options, "dtype": out_dtype, "start": 2, "length": len(KINDS) - 3}
        assert_bytes(
            codec_launch.dequantize(expected, fmt, mode=mode, **decode, **launch),
            reference.dequantize(*expected, fmt.name, fmt.group_size, **decode),
            "decoded",
        )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_bytes(fmt: KVFormat, dtype: torch.dtype) -> None:
    for head_dim in filter(lambda d: holds(fmt, d), HEAD_DIMS):
        check(fmt, dtype, head_dim, "fast")


@pytest.mark.parametrize("mode", ["race", "asan"])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_no_faults(fmt: KVFormat, mode: str) -> None:
    """Threads in shuffled order; buffers that end, and then begin, at a guard page."""
    for i, dtype in enumerate(FLOAT_DTYPES):
        check(fmt, dtype, 128, mode, seed=i + 1, guard_low=i == 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["race", "asan"])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_no_faults_at_any_head_dim(fmt: KVFormat, mode: str) -> None:
    for i, head_dim in enumerate(filter(lambda d: holds(fmt, d), HEAD_DIMS)):
        check(fmt, FLOAT_DTYPES[i % 3], head_dim, mode, seed=i)


@pytest.mark.parametrize("head_dim", [8, 24, 40, 512, 768, 1024])
def test_unusual_head_dims(head_dim: int) -> None:
    for name in ("tq3", "none", "q8_0", "int4"):
        fmt = KVFormat(name)
        if holds(fmt, head_dim):
            check(fmt, torch.float16, head_dim, "race")


PAIRS = [
    ("int8-g32", "int4-g64-rot"),
    ("int4-g128", "int2-g32"),
    ("fp8_e4m3-g64", "fp8_e5m2-g128"),
    ("q8_0", "q4_0-rot"),
    ("tq4", "tq3"),
    ("tq8", "none"),
    ("none", "q8_0"),
    ("q4_0", "tq6"),
]


def sentinel(fmt: KVFormat, dtype: torch.dtype, *shape: int) -> Packed:
    packed = fmt.empty(*shape, dtype=dtype)
    return Packed(*(t.view(torch.uint8).fill_(SENTINEL).view(t.dtype) for t in packed))


def views(packed: Packed) -> Packed:
    """The same contents as non-contiguous views with a storage offset."""
    made = []
    for t in packed:
        b, g, s, row = t.shape
        made.append(t.new_zeros(s + 1, b, g, row + 3).permute(1, 2, 0, 3)[:, :, 1:, 3:].copy_(t))
    return Packed(*made)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "+".join(p))
def test_append(pair: tuple[str, str], mode: str) -> None:
    """One launch writes K and V of different formats, head sizes and capacities into a ring."""
    formats = [KVFormat.parse(spec) for spec in pair]
    dtype = FLOAT_DTYPES[PAIRS.index(pair) % 3]
    position = torch.tensor([5, 11, 2], dtype=torch.int32)[::2]
    sizes = ((128, 3, 9), (256, 2, 12))  # head size, heads, capacity
    actual, expected, arguments = [], [], {"ring": True}
    for side, fmt, (head_dim, heads, capacity) in zip("kv", formats, sizes, strict=True):
        encoder = "unbiased" if fmt.family == "turboquant" and side == "k" else "default"
        for name, value in options_of(head_dim, heads, fmt.rotate, side == "k", encoder).items():
            arguments[f"{side}_{name}"] = value
        expected.append(sentinel(fmt, dtype, 2, heads, capacity, head_dim))
        actual.append(views(expected[-1]))
    k, v = (
        hostile(2, heads, 11, head_dim, dtype, seed=4).transpose(0, 1).contiguous().transpose(0, 1)
        for head_dim, heads, _ in sizes
    )
    reference.append_(
        *expected[0], *expected[1], k, v, position, pair[0].split("-")[0], formats[0].group_size,
        pair[1].split("-")[0], formats[1].group_size, **arguments,
    )  # fmt: skip
    steps = 1 + MODES.index(mode)  # with several the ring begins again in the middle of a simdgroup
    codec_launch.append_(*actual, k, v, position, *formats, mode=mode, steps=steps, **arguments)
    for a, b in zip(actual, expected, strict=True):
        assert_packed(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("ring", [False, True], ids=["plain", "ring"])
def test_slots_out_of_range_are_not_written(ring: bool, dtype: torch.dtype) -> None:
    fmt, far = KVFormat("int4"), torch.iinfo(dtype)
    position = torch.tensor([-1, far.min, far.max, 6], dtype=dtype)
    x = normal(4, 2, 3, 64)
    packed = sentinel(fmt, torch.float32, 4, 2, 8, 64)
    expected = Packed(*(t.clone() for t in packed))
    fits = {3: range(3)} if ring else {3: range(2)}
    if ring and dtype == torch.int32:
        fits[2] = range(3)
    for row, tokens in fits.items():
        for token in tokens:
            slot = (int(position[row]) + token) % 8
            one = reference.quantize(x[row : row + 1, :, token : token + 1], fmt.name, 64)
            for cache, value in zip(expected, one, strict=True):
                cache[row, :, slot] = value[0, :, 0]
    codec_launch.quantize_into_(packed, x, position, fmt, ring=ring, mode="race")
    assert_packed(packed, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_dim", [1, 5, 80, 96, 128, 320, 1024])
def test_hadamard(head_dim: int, mode: str) -> None:
    for dtype in FLOAT_DTYPES:
        x = hostile(1, 1, len(KINDS), head_dim, dtype)[0, 0]
        for signs in (None, hadamard_signs(head_dim)):
            for inverse in (False, True):
                assert_bytes(
                    codec_launch.hadamard(x, signs, inverse, mode=mode),
                    reference.hadamard(x, signs, inverse),
                )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_mlx_native(bits: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for head_dim in (80, 128, 512):
        row = head_dim // 2 if bits == 4 else head_dim
        codes = torch.randint(256, (2, 3, 4, row), generator=generator, dtype=torch.uint8)
        norms = torch.rand(2, 3, 4, max(1, head_dim // 256), generator=generator)
        for signs in (None, hadamard_signs(head_dim)):
            for rotate_back in (False, True):
                assert_bytes(
                    codec_launch.mlx_native_dequantize(
                        codes, norms, bits, codebook(bits), factor=1.5, signs=signs,
                        rotate_back=rotate_back, mode=mode,
                    ),
                    reference.mlx_native_dequantize(
                        codes, norms, bits, scale_factor_d512=1.5, signs=signs,
                        rotate_back=rotate_back,
                    ),
                )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spec", "number"),
    [("turboquant", "tq4", i) for i in range(3)] + [("gguf", "q8_0", i) for i in range(2)],
)
def test_barriers_are_needed(name: str, spec: str, number: int) -> None:
    """Sums of tq vectors and rows of blocks go through threadgroup memory: without any one of the
    barriers around them the race build must object. Nothing else needs one."""
    source = toolchain.flatten(METAL / f"{name}.metal")
    barriers = [
        (barrier, next_line)
        for barrier, next_line in re.findall(r"( *simdgroup_barrier\(.*\);.*\n)(.*\n)", source)
        if source.count(barrier + next_line) == 1
    ]
    assert len(barriers) == {"turboquant": 3, "gguf": 2}[name]
    assert "_barrier" not in toolchain.flatten(METAL / "affine.metal")
    barrier, next_line = barriers[number]
    x = normal(1, 1, 128, 128)
    tq = {"signs": hadamard_signs(128), "encoder": "unbiased"}
    options = {"mode": "race", "steps": 4, **(tq if name == "turboquant" else {})}
    with pytest.raises(emulator.KernelFault, match=r"RACE inside a simdgroup|UNINITIALISED"):
        codec_launch.quantize(
            x, KVFormat(spec), edits=((barrier + next_line, next_line),), **options
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "spec", ["int8-g32", "int4-g64-rot", "fp8_e4m3-g128", "q4_0", "tq5", "none"]
)
def test_many_tokens(spec: str, mode: str) -> None:
    """Simdgroups that take several vectors several times, the last of which are not all there."""
    fmt = KVFormat.parse(spec)
    for head_dim, tokens in ((128, 67), (256, 35)):
        x = normal(1, 2, tokens, head_dim, dtype=torch.float16)
        signs = hadamard_signs(head_dim) if fmt.rotate else None
        expected = reference.quantize(x, fmt.name, fmt.group_size, signs=signs)
        packed = codec_launch.quantize(x, fmt, signs=signs, mode=mode, steps=4)
        assert_packed(Packed(*packed), Packed(*expected))
        assert_bytes(
            codec_launch.dequantize(packed, fmt, signs=signs, start=1, mode=mode, steps=4),
            reference.dequantize(*packed, fmt.name, fmt.group_size, signs=signs, start=1),
            "decoded",
        )


@pytest.mark.parametrize("name", LIBRARIES)
def test_strict_check(name: str) -> None:
    """Address spaces, overloads and the subset that Metal compilers agree on."""
    assert not toolchain.strict_check(toolchain.flatten(METAL / f"{name}.metal"))


def test_offsets_beyond_2_31() -> None:
    """A slot more than 2**31 bytes into the codes: untouched pages take no memory."""
    fmt, slots, head_dim = KVFormat("int8", 128), (1 << 31) // 128 + 8, 128
    codes = torch.empty(1, 1, slots, head_dim, dtype=torch.uint8)
    scales, biases = (torch.empty(1, 1, slots, 1, dtype=torch.float16) for _ in range(2))
    x = normal(1, 1, 2, head_dim, dtype=torch.float16)
    packed = (codes, scales, biases)
    codec_launch.quantize_into_(packed, x, slots - 2, fmt, in_place=True)
    tail = Packed(*(t[:, :, -2:] for t in packed))
    assert_packed(tail, Packed(*reference.quantize(x, fmt.name, 128)))
    out = codec_launch.dequantize(packed, fmt, start=slots - 2, in_place=True)
    assert_bytes(out, reference.dequantize(*tail, fmt.name, 128))


@pytest.fixture(scope="module")
def software_device() -> Iterator[ModuleType]:
    from tests import softmetal

    if reason := softmetal.unavailable_reason():
        missing(reason)
    softmetal.install()
    yield softmetal
    torch.mps.synchronize()


def test_every_kernel_the_host_can_name_exists(software_device: ModuleType) -> None:
    """Compares csrc/mps/names.mm, run on the software device, with the libraries."""
    expected = torch.ops.kvq_metal.expected_kernels()
    assert len(set(expected)) == len(expected)
    libraries = {name.partition(".")[0] for name in expected}
    held = {f"{lib}.{k}" for lib in libraries for k in torch.ops.kvq_metal.kernels(lib)}
    assert held == set(expected)
    assert set(LIBRARIES) == {lib.partition(":")[0] for lib in libraries}
    assert set(LIBRARIES) <= set(torch.ops.kvq_metal.libraries())


@pytest.mark.parametrize(
    "library", ["affine:int4_g64", "fp8:fp8_e4m3_g64", "turboquant:tq4", "append", "q4_k"]
)
def test_compile_time(software_device: ModuleType, library: str) -> None:
    """A library is compiled on the user's machine at first use: at most 2 s of clang here."""
    stem, _, tag = library.partition(":")
    lines = toolchain.flatten(METAL / f"{stem}.metal").splitlines(keepends=True)
    text = "".join(
        s for s in lines if not tag or not s.startswith('KVQ_CODEC("') or f'"{tag}"' in s
    )
    kernels = [instance.host_name for instance in toolchain.kernels(text).instances]
    assert sorted(kernels) == sorted(torch.ops.kvq_metal.kernels(library))
    check_compile_time(library, text)


def test_one_dispatch_per_op(software_device: ModuleType) -> None:
    """K and V of an append, any range of a dequantize: one dispatch, no commit, no wait."""
    k = normal(2, 2, 3, 64, dtype=torch.float16).to("mps")
    v = normal(2, 2, 3, 128, dtype=torch.float16).to("mps")
    k_packed = KVFormat("int8").empty(2, 2, 9, 64, dtype=torch.float16, device="mps")
    v_packed = KVFormat("q4_0").empty(2, 2, 9, 128, dtype=torch.float16, device="mps")
    position, one = torch.tensor([1, 4], device="mps"), k[:, :, :1].clone()
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "append_": (1, lambda: torch.ops.kvq.append_(
            *k_packed, *v_packed, k, v, position, "int8", 64, "q4_0", 0, ring=True)),
        "quantize_into_": (1, lambda: torch.ops.kvq.quantize_into_(
            *k_packed, k, position, "int8", 64)),
        "kv_cache_update_": (1, lambda: torch.ops.kvq.kv_cache_update_(k, one, 2)),
        "quantize": (1, lambda: torch.ops.kvq.quantize(k, "int4", 32)),
        "dequantize": (1, lambda: torch.ops.kvq.dequantize(
            *k_packed, "int8", 64, start=2, length=5)),
        "qdq": (2, lambda: torch.ops.kvq.qdq(k, "int4", 32)),
        "hadamard": (1, lambda: torch.ops.kvq.hadamard(k)),
    }  # fmt: skip
    for name, (dispatches, call) in calls.items():
        torch.mps.synchronize()
        software_device.reset_stats()
        call()
        stats = software_device.stats()
        assert stats["dispatches"] == stats["encoders"] + dispatches - 1 == dispatches, name
        assert stats["explicit_commits"] == stats["waits"] == stats["fallbacks"] == 0, name


def test_no_file_of_metal_is_left_out() -> None:
    stems = {p.stem for p in (ROOT / "metal").glob("*.metal")}
    assert stems == {*LIBRARIES, *(s for s in stems if s.startswith("attention"))}
