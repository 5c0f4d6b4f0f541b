"""Bad input: refused with `[kvq.<op>] ...`, what was expected and what came; nothing changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import normal, on, raw, twin
from torch_kvq import KVFormat, Packed, ops

HUGE = 2**63 - 1
Args = dict[str, object]


def packed_args(fmt: KVFormat, prefix: str = "", head_dim: int = 64) -> Args:
    """A cache of [2, 2, 6, head_dim] full of sentinels, float32."""
    packed = twin(fmt, (2, 2, 6, head_dim), torch.float32, "cpu").cpu_packed
    return {prefix + name: t for name, t in zip(Packed._fields, packed, strict=True)}


def good(op: str) -> Args:
    """Valid arguments of each op, on the CPU, by name."""
    x = normal(2, 2, 3, 64)
    int4 = {"format": "int4", "group_size": 32}
    match op:
        case "kv_cache_update_":
            return {"cache": normal(2, 2, 6, 64, seed=1), "src": x, "position": 1}
        case "quantize" | "qdq":
            return {"x": x, **int4}
        case "quantize_into_":
            return {**packed_args(KVFormat("int4", 32)), "x": x, "position": 1, **int4}
        case "append_":
            return {
                **packed_args(KVFormat("int4", 32), "k_"),
                **packed_args(KVFormat("tq4"), "v_", 96),
                **{"k": x, "v": normal(2, 2, 3, 96), "position": 1},
                **{"k_format": "int4", "k_group_size": 32},
                **{"v_format": "tq4", "v_group_size": 0},
            }
        case "dequantize":
            return {**packed_args(KVFormat("int4", 32)), **int4}
        case "hadamard":
            return {"x": x}
        case "mlx_native_dequantize":
            codes = torch.zeros(1, 2, 5, 32, dtype=torch.uint8)
            return {"codes": codes, "norms": torch.ones(1, 2, 5, 1), "bits": 4}
    raise AssertionError(op)


@dataclass
class Bad:
    """One argument changed (to a value, or by a function of the good arguments)."""

    op: str
    argument: str
    value: object
    error: type[Exception]
    message: str

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.message}"[:70]


def like(argument: str, **options: object) -> Callable[[Args], torch.Tensor]:
    """The good tensor with another dtype or device."""
    return lambda args: args[argument].to(**options)  # type: ignore[attr-defined]


def other(argument: str) -> Callable[[Args], object]:
    """The tensor of another argument itself."""
    return lambda args: args[argument]


def of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


ONE_DEVICE = r"on one device, got .*meta|must be on \w+.*, got meta"


def positions(op: str) -> list[Bad]:
    """Positions that every writing op refuses; 3 tokens, 6 slots, 2 rows."""
    return [
        Bad(op, "position", -1, IndexError, "position must not be negative, got -1"),
        Bad(op, "position", 4, IndexError, r"position 4 \+ 3 tokens exceed the capacity 6"),
        Bad(op, "position", HUGE, IndexError, rf"position {HUGE} \+ 3 tokens exceed the"),
        Bad(op, "position", of(2), TypeError, "position must be int64 or int32, got Float"),
        Bad(
            op, "position", of(3, dtype=torch.int64), ValueError,
            r"position must be a scalar or \[2\], got \[3\]",
        ),
        Bad(
            op, "position", of(2, 1, dtype=torch.int64), ValueError,
            r"position must be a scalar or \[2\], got \[2, 1\]",
        ),
        Bad(
            op, "position", torch.ones(2, dtype=torch.int64, device="meta"), ValueError, ONE_DEVICE
        ),
    ]  # fmt: skip


def inputs(op: str, x: str, name: str | None = None, multiple: bool = True) -> list[Bad]:
    """What every op refuses of its dense input `x`, called `name` in messages."""
    name = name or x
    wrong_dim = r"head_dim" if not multiple else r"head_dim to be a positive multiple of 32, got 48"
    return [
        Bad(op, x, like(x, dtype=torch.int32), TypeError, f"{name} must be float32.*, got Int"),
        Bad(op, x, of(2, 3, 64), ValueError, f"{name} must have 4 dimensions, got 3"),
        Bad(op, x, of(1, 2, 2, 3, 64), ValueError, f"{name} must have 4 dimensions, got 5"),
        Bad(op, x, of(2, 2, 3, 48), ValueError, wrong_dim),
        Bad(op, x, of(2, 2, 3, 2048), ValueError, "head_dim 2048"),
    ]


def formats(op: str, prefix: str = "") -> list[Bad]:
    """Format, group and encoder of a side whose good format is int4, group 32."""
    return [
        Bad(op, f"{prefix}format", "int5", ValueError, "unknown format 'int5'; expected one of"),
        Bad(op, f"{prefix}format", "q8_0", ValueError, "q8_0 has no group_size to choose, got 32"),
        Bad(op, f"{prefix}group_size", 48, ValueError, "group_size must be 32, 64 or 128, got 48"),
        Bad(op, f"{prefix}group_size", -32, ValueError, "group_size must be .* got -32"),
    ]  # fmt: skip


def encoders(op: str, prefix: str = "") -> list[Bad]:
    argument = f"{prefix}encoder"
    return [
        Bad(op, argument, "best", ValueError, "int4 has no encoder 'best'; expected default"),
        Bad(op, argument, "unbiased", ValueError, "int4 has no encoder 'unbiased'"),
    ]


def rotation(op: str, prefix: str = "", mean: bool = True) -> list[Bad]:
    signs = [
        Bad(op, f"{prefix}signs", of(32), ValueError, r"signs must be \[64\], got \[32\]"),
        Bad(op, f"{prefix}signs", of(1, 64), ValueError, r"signs must be \[64\], got \[1, 64\]"),
        Bad(
            op, f"{prefix}signs", of(64, dtype=torch.float16), TypeError,
            "signs must be float32, got Half",
        ),
        Bad(op, f"{prefix}signs", torch.ones(64, device="meta"), ValueError, ONE_DEVICE),
    ]  # fmt: skip
    means = [
        Bad(op, f"{prefix}mean", of(64), ValueError, r"mean must be \[2, 64\], got \[64\]"),
        Bad(op, f"{prefix}mean", of(3, 64), ValueError, r"mean must be \[2, 64\], got \[3, 64\]"),
        Bad(
            op, f"{prefix}mean", of(2, 64, dtype=torch.bfloat16), TypeError,
            "mean must be float32, got BFloat16",
        ),
        Bad(op, f"{prefix}mean", torch.ones(2, 64, device="meta"), ValueError, ONE_DEVICE),
    ]  # fmt: skip
    return signs + (means if mean else [])


def caches(op: str, prefix: str = "") -> list[Bad]:
    """Codes, scales and biases that do not belong together; int4 group 32, [2, 2, 6, 64]."""
    p = prefix
    uint8 = torch.uint8
    return [
        Bad(op, f"{p}codes", of(2, 2, 6, 32), TypeError, "codes of int4-g32 must be uint8, got"),
        Bad(
            op, f"{p}codes", of(2, 2, 6, 31, dtype=uint8), ValueError,
            f"{p}codes rows of 31 elements fit no head_dim of int4-g32",
        ),
        Bad(op, f"{p}codes", of(2, 6, 32, dtype=uint8), ValueError, "4 dimensions, got 3"),
        Bad(
            op, f"{p}codes", of(2, 2, 6, 64, dtype=uint8)[..., ::2], ValueError,
            "must have contiguous rows, got strides",
        ),
        Bad(
            op, f"{p}codes", of(2, 2, 5, 32, dtype=uint8), ValueError,
            rf"{p}scales must be \[2, 2, 5, 2\] to match codes of int4-g32, got \[2, 2, 6, 2\]",
        ),
        Bad(
            op, f"{p}scales", of(2, 2, 6, 1), ValueError,
            rf"{p}scales must be \[2, 2, 6, 2\] .*, got \[2, 2, 6, 1\]",
        ),
        Bad(
            op, f"{p}biases", of(1, 2, 6, 2), ValueError,
            rf"{p}biases must be \[2, 2, 6, 2\] .*, got \[1, 2, 6, 2\]",
        ),
        Bad(
            op, f"{p}scales", like(f"{p}scales", dtype=torch.float16), TypeError,
            f"{p}scales and biases must have one dtype, got Half and Float",
        ),
        Bad(
            op, f"{p}scales", like(f"{p}scales", dtype=torch.int32), TypeError,
            "scales must be float32, float16 or bfloat16, got Int",
        ),
        Bad(op, f"{p}scales", like(f"{p}scales", device="meta"), ValueError, ONE_DEVICE),
        Bad(op, f"{p}codes", like(f"{p}codes", device="meta"), ValueError, ONE_DEVICE),
    ]  # fmt: skip


def ranges(op: str, capacity: int) -> list[Bad]:
    return [
        Bad(op, "start", -1, IndexError, rf"start must be in \[0, {capacity}\], got -1"),
        Bad(op, "start", capacity + 1, IndexError, rf"start must be in .* got {capacity + 1}"),
        Bad(op, "length", -1, IndexError, "length must not be negative, got -1"),
        Bad(
            op, "length", capacity + 1, IndexError,
            rf"start 0 \+ length {capacity + 1} exceeds the capacity {capacity}",
        ),
    ]  # fmt: skip


#: append_ may compare its two inputs before it looks at the caches.
SAME_BATCH = "key and value must have the same batch, got"


def same_rows(op: str, x: str, name: str) -> list[Bad]:
    """A step that fits the format but not the cache [2, 2, 6, 64]."""
    return [
        Bad(op, x, of(3, 2, 3, 64), ValueError, f"{name} batch 3 does not|{SAME_BATCH}"),
        Bad(op, x, of(2, 4, 3, 64), ValueError, f"{name} heads 4 do not match the cache's 2"),
        Bad(op, x, of(2, 2, 3, 96), ValueError, f"{name} head_dim 96 does not match"),
    ]


CASES = [
    *positions("kv_cache_update_"),
    *inputs("kv_cache_update_", "src", multiple=False)[:3],
    *inputs("kv_cache_update_", "cache", multiple=False)[:3],
    *[
        Bad("kv_cache_update_", "src", of(*shape), ValueError, r"must be \[2, 2, L, 64\] .*, got")
        for shape in ((3, 2, 3, 64), (2, 1, 3, 64), (2, 2, 3, 32))
    ],
    Bad("kv_cache_update_", "src", like("src", device="meta"), ValueError, ONE_DEVICE),
    Bad(
        "kv_cache_update_", "src", lambda a: a["cache"][:, :, 2:5], ValueError,
        "cache is written and must not share memory with src",
    ),
    Bad(
        "kv_cache_update_", "cache", normal(1, 2, 6, 64).expand(2, 2, 6, 64), ValueError,
        r"cache is written and must not overlap itself \(expanded\?\)",
    ),
    *(case for op in ("quantize", "qdq") for case in inputs(op, "x")),
    *(case for op in ("quantize", "qdq") for case in formats(op) + encoders(op) + rotation(op)),
    Bad("quantize", "x", of(2, 2, 3, 0), ValueError, "positive multiple of 32, got 0"),
    Bad("quantize", "scale_dtype", torch.int32, TypeError, "scale_dtype must be float32.* got Int"),
    Bad("qdq", "scale_dtype", torch.float64, TypeError, "scale_dtype must be float32.* got Double"),
    *positions("quantize_into_"),
    *inputs("quantize_into_", "x", multiple=False),
    *same_rows("quantize_into_", "x", "x"),
    *formats("quantize_into_")[:1],
    *formats("quantize_into_")[2:],
    *encoders("quantize_into_"),
    *rotation("quantize_into_"),
    *caches("quantize_into_"),
    Bad("quantize_into_", "x", like("x", device="meta"), ValueError, ONE_DEVICE),
    Bad(
        "quantize_into_", "biases", other("scales"), ValueError,
        "scales and biases are written and must not share memory",
    ),
    Bad(
        "quantize_into_", "codes", of(2, 1, 6, 32, dtype=torch.uint8).expand(2, 2, 6, 32),
        ValueError, r"codes is written and must not overlap itself \(expanded\?\)",
    ),
    Bad(
        "quantize_into_", "codes",
        torch.ones(600, dtype=torch.uint8).as_strided((2, 2, 6, 32), (96, 48, 16, 1)),
        ValueError, "codes is written and must not overlap itself",
    ),
    *positions("append_"),
    *inputs("append_", "k", "key", multiple=False),
    *inputs("append_", "v", "value", multiple=False)[:3],
    *same_rows("append_", "k", "key"),
    Bad("append_", "v", of(2, 2, 3, 64), ValueError, "value head_dim 64 does not match"),
    Bad("append_", "v", of(2, 2, 2, 96), ValueError, "must have as many tokens, got 3 and 2"),
    Bad("append_", "v", of(3, 2, 3, 96), ValueError, f"value batch 3 does not|{SAME_BATCH}"),
    Bad("append_", "v", of(2, 1, 3, 96), ValueError, "value heads 1 do not match the cache's 2"),
    Bad("append_", "v_format", "tq7", ValueError, "unknown format 'tq7'"),
    Bad("append_", "v_group_size", 32, ValueError, "tq4 has no group_size to choose, got 32"),
    Bad("append_", "v_encoder", "best", ValueError, "expected default or unbiased"),
    Bad("append_", "v_mean", of(2, 64), ValueError, r"v_mean must be \[2, 96\], got \[2, 64\]"),
    Bad("append_", "v", like("v", device="meta"), ValueError, ONE_DEVICE),
    *formats("append_", "k_")[:1],
    *formats("append_", "k_")[2:],
    *encoders("append_", "k_"),
    *rotation("append_", "k_"),
    *caches("append_", "k_"),
    *caches("dequantize"),
    *formats("dequantize")[:1],
    *formats("dequantize")[2:],
    *rotation("dequantize"),
    *ranges("dequantize", 6),
    Bad("dequantize", "dtype", torch.int32, TypeError, "dtype must be float32.*, got Int"),
    Bad("hadamard", "x", like("x", dtype=torch.int32), TypeError, "x must be float32.*, got Int"),
    Bad("hadamard", "x", torch.tensor(1.0), ValueError, "x must have at least 1 dimension"),
    Bad("hadamard", "x", of(2, 2048), ValueError, r"dimension must be in \[1, 1024\], got 2048"),
    Bad("hadamard", "x", of(2, 0), ValueError, r"last dimension must be in \[1, 1024\], got 0"),
    *rotation("hadamard", mean=False),
    Bad("mlx_native_dequantize", "bits", 3, ValueError, "bits must be 4, 5, 6 or 8, got 3"),
    Bad(
        "mlx_native_dequantize", "codes", like("codes", dtype=torch.int32), TypeError,
        "codes must be uint8 and norms float32, got Int and Float",
    ),
    Bad(
        "mlx_native_dequantize", "norms", like("norms", dtype=torch.float16), TypeError,
        "codes must be uint8 and norms float32, got Byte and Half",
    ),
    Bad(
        "mlx_native_dequantize", "norms", of(1, 2, 5, 2), ValueError,
        r"norms must be \[1, 2, 5, 1\], got \[1, 2, 5, 2\]",
    ),
    Bad("mlx_native_dequantize", "norms", of(2, 5, 1), ValueError, "dimensions, got 4 and 3"),
    Bad("mlx_native_dequantize", "norms", like("norms", device="meta"), ValueError, ONE_DEVICE),
    Bad(
        "mlx_native_dequantize", "codes", of(1, 2, 5, 192, dtype=torch.uint8), ValueError,
        "head_dim must be at most 256, or 512, got 384",
    ),
    Bad(
        "mlx_native_dequantize", "codebook", of(8), ValueError,
        r"codebook must be float32 \[16\] on \w+.*, got Float \[8\]",
    ),
    Bad(
        "mlx_native_dequantize", "codebook", of(16, dtype=torch.float16), ValueError,
        r"codebook must be float32 \[16\] on \w+.*, got Half \[16\]",
    ),
    Bad(
        "mlx_native_dequantize", "scale_factor_d512", 0.0, ValueError,
        "scale_factor_d512 must be positive, got 0",
    ),
    *ranges("mlx_native_dequantize", 5),
    *rotation("mlx_native_dequantize", mean=False),
]  # fmt: skip


def call_refused(op: str, args: Args, error: type[Exception], message: str) -> None:
    """The call raises what it should, and every tensor keeps its bytes."""
    tensors = {n: t for n, t in args.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    before = {name: raw(t).clone() for name, t in tensors.items() if t.numel()}
    with pytest.raises(error, match=rf"^\[kvq\.{re.escape(op)}\] .*({message})"):
        getattr(torch.ops.kvq, op)(**args)
    for name, bytes_before in before.items():
        assert torch.equal(raw(tensors[name]), bytes_before), f"{name} was changed"


@pytest.mark.parametrize("bad", CASES, ids=str)
def test_refused(bad: Bad, device: str) -> None:
    args = good(bad.op)
    moved = {name: on(device, value) for name, value in args.items()}
    value = bad.value(moved) if callable(bad.value) else bad.value
    if isinstance(value, torch.Tensor) and not callable(bad.value) and not value.is_meta:
        # Move the memory, then view it alike: expanded and strided tensors stay so.
        base = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
        value = base.as_strided(value.shape, value.stride(), value.storage_offset())
    moved[bad.argument] = value
    call_refused(bad.op, moved, bad.error, bad.message)


@pytest.mark.parametrize("op", ["kv_cache_update_", "quantize", "qdq", "quantize_into_", "append_",
                                "dequantize", "hadamard", "mlx_native_dequantize"])  # fmt: skip
def test_good_calls_are_not_refused(op: str, device: str) -> None:
    """What the bad calls change one argument of is valid."""
    getattr(torch.ops.kvq, op)(**{n: on(device, v) for n, v in good(op).items()})


@pytest.mark.parametrize("op", ["kv_cache_update_", "quantize_into_", "append_"])
@pytest.mark.parametrize("values", [[0, 4], [-1, 0], [0, HUGE]], ids=["late", "early", "huge"])
def test_positions_in_tensors(op: str, values: list[int], device: str) -> None:
    """The CPU refuses when any row is out of range; a GPU, which cannot, is tested below."""
    if device != "cpu":
        pytest.skip("reading a tensor's position there would stop the GPU's queue")
    for dtype in (torch.int64, torch.int32):
        if max(values) < 2**31 or dtype == torch.int64:
            args = {**good(op), "position": torch.tensor(values, dtype=dtype)}
            call_refused(op, args, IndexError, "position")


@pytest.mark.parametrize("ring", [False, True], ids=["line", "ring"])
def test_a_gpu_skips_slots_out_of_range(ring: bool, device: str) -> None:
    """Positions known to the GPU only never lead outside the cache."""
    if device == "cpu":
        pytest.skip("the CPU refuses such positions")
    fmt = KVFormat("int8", 32)
    for values in ([-7, -2], [5, 100], [HUGE - 1, -HUGE]):
        both = twin(fmt, (2, 2, 6, 32), torch.float32, device, "narrowed")
        inside = [view.clone() for view in both.packed]
        position = torch.tensor(values, device=device)
        ops.quantize_into_(both.packed, normal(2, 2, 3, 32).to(device), position, fmt, ring=ring)
        for view, before in zip(both.packed, inside, strict=True):
            view.copy_(before)
        both.check()


@pytest.mark.parametrize("position", [HUGE, HUGE - 2], ids=["end", "near the end"])
def test_ring_positions_do_not_overflow(position: int, device: str) -> None:
    args = {n: on(device, v) for n, v in good("quantize_into_").items()}
    args |= {"ring": True, "position": position}
    call_refused("quantize_into_", args, IndexError, "exceed")


def test_ranges_do_not_overflow(device: str) -> None:
    args = {n: on(device, v) for n, v in good("dequantize").items()}
    args |= {"start": 1, "length": HUGE}
    call_refused("dequantize", args, IndexError, "exceeds the capacity 6")


def test_empty_cache_takes_no_tokens(device: str) -> None:
    packed = KVFormat("none").empty(1, 1, 0, 8, dtype=torch.float32, device=device)
    args: Args = dict(zip(Packed._fields, packed, strict=True))
    args |= {"x": torch.ones(1, 1, 1, 8, device=device), "position": 0, "format": "none"}
    call_refused("quantize_into_", {**args, "ring": True}, IndexError, "capacity 0")
    call_refused("quantize_into_", args, IndexError, "exceed the capacity 0")


# Shared memory


def append_args(keys: list[torch.Tensor], values: list[torch.Tensor], x: torch.Tensor) -> Args:
    names = [f"{side}_{part}" for side in "kv" for part in Packed._fields]
    formats = {"k_format": "none", "k_group_size": 0, "v_format": "none", "v_group_size": 0}
    tensors = dict(zip(names, [*keys, *values], strict=True))
    return {**tensors, "k": x, "v": x.clone(), "position": 0, **formats}


def none_packed(codes: torch.Tensor) -> list[torch.Tensor]:
    return [codes, *(codes.new_zeros(*codes.shape[:3], 0) for _ in range(2))]


def test_keys_and_values_must_not_share_memory(device: str) -> None:
    """The same cache twice, and caches narrowed from one buffer so that they overlap."""
    buffer = normal(2, 2, 12, 24).to(device)
    x = normal(2, 2, 3, 8).to(device)
    codes = buffer[:, :, :6, :8]
    message = "k_codes and v_codes are written and must not share memory"
    for other_codes in (
        codes,
        buffer[:, :, :6, 4:12],
        buffer[:, :, :6, 7:15],
        buffer[:, :, 5:11, :8],
        buffer[:, :, 5:11, 1:9],
    ):
        args = append_args(none_packed(codes), none_packed(other_codes), x)
        call_refused("append_", args, ValueError, message)


def test_keys_and_values_may_share_a_buffer(device: str) -> None:
    """Disjoint parts of one buffer are no overlap: side by side, by tokens, heads or batch."""
    x = normal(2, 2, 3, 8).to(device)
    for first, second in (
        (lambda t: t[:2, :2, :6, :8], lambda t: t[:2, :2, :6, 8:16]),
        (lambda t: t[:2, :2, :6, 8:16], lambda t: t[:2, :2, :6, :8]),
        (lambda t: t[:2, :2, :6, :8], lambda t: t[:2, :2, 6:, :8]),
        (lambda t: t[:2, :2, ::2, :8], lambda t: t[:2, :2, 1::2, :8]),
        (lambda t: t[:2, :2, :6, :8], lambda t: t[:2, 2:, 3:9, 8:16]),
        (lambda t: t[:2, ::2, :6, :8], lambda t: t[2:, 1::2, :6, :8]),
    ):
        buffer = torch.zeros(4, 4, 12, 16, device=device)
        args = append_args(none_packed(first(buffer)), none_packed(second(buffer)), x)
        torch.ops.kvq.append_(**args)
        assert torch.equal(first(buffer)[:, :, :3], x) and torch.equal(second(buffer)[:, :, :3], x)


def test_input_must_not_be_the_cache(device: str) -> None:
    buffer = normal(2, 2, 6, 16).to(device)
    packed = dict(zip(Packed._fields, none_packed(buffer[..., :8]), strict=True))
    rest = {"position": 0, "format": "none"}
    for x in (buffer[..., :8], buffer[:, :, 2:5, :8], buffer[..., 4:12]):
        args = {**packed, "x": x, **rest}
        message = "codes is written and must not share memory with x"
        call_refused("quantize_into_", args, ValueError, message)
    beside = {**packed, "x": buffer[:, :, 2:5, 8:], **rest}
    torch.ops.kvq.quantize_into_(**beside)
    assert torch.equal(buffer[:, :, :3, :8], buffer[:, :, 2:5, 8:])


def part(data: st.DataObject) -> tuple[slice, ...]:
    """A non-empty slice of each dimension of [3, 3, 5, 6]."""
    slices = []
    for size in (3, 3, 5):
        start = data.draw(st.integers(0, size - 2))
        slices.append(slice(start, start + 2))
    start = data.draw(st.integers(0, 3))
    return (*slices, slice(start, start + 3))


@settings(deadline=None, max_examples=100)
@given(st.data(), st.permutations(range(3)))
def test_overlap_is_exact(device: str, data: st.DataObject, order: list[int]) -> None:
    """Views of one buffer are refused if and only if they share an element."""
    shape = [3, 3, 5]
    base = torch.zeros([shape[i] for i in order] + [6], device=device)
    buffer = base.permute([*(order.index(i) for i in range(3)), 3])
    first, second = part(data), part(data)
    counts = torch.zeros(3, 3, 5, 6)
    counts[first] += 1
    counts[second] += 1
    args = append_args(
        none_packed(buffer[first]),
        none_packed(buffer[second]),
        torch.ones(2, 2, 1, 3, device=device),
    )
    if counts.max() > 1:
        with pytest.raises(ValueError, match="must not share memory"):
            torch.ops.kvq.append_(**args)
        assert not base.any()
    else:
        torch.ops.kvq.append_(**args)
        assert base.sum().item() == 2 * 2 * 2 * 3
