"""Sample makers and comparisons shared by the tests of formats and ops.

Inputs are made on the CPU, moved to the device under test, and results are compared on the CPU
with :mod:`torch_kvq.reference`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from torch_kvq import ops, reference
from torch_kvq.codebooks import hadamard_signs
from torch_kvq.formats import FLOAT_DTYPES, FORMATS, GROUP_SIZES, KVFormat, default_scale_dtype
from torch_kvq.ops import Packed

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
TOKENS = (1, 127, 501)
#: A byte no encoder is asked to write: what untouched memory holds.
SENTINEL = 0xA5


def all_formats(*families: str) -> list[KVFormat]:
    """Every format with every group it offers; of the named families, or all."""
    found = []
    for name in FORMATS:
        groups = GROUP_SIZES if KVFormat(name).group_size else (0,)
        found += [KVFormat(name, group) for group in groups]
    return [f for f in found if not families or f.family in families]


ALL_FORMATS = all_formats()
#: One format of each layout, for tests whose subject is not the format.
SOME_FORMATS = [
    KVFormat.parse(spec)
    for spec in ("int8-g32", "int4-g64-rot", "fp8_e4m3-g64", "q8_0", "q4_0-rot", "tq3", "none")
]


def dtype_id(value: object) -> str | None:
    """Short pytest ids for dtypes and formats."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, KVFormat) else None


def holds(fmt: KVFormat, head_dim: int) -> bool:
    """Whether the format can store vectors of head_dim elements."""
    try:
        fmt.check_head_dim(head_dim)
    except ValueError:
        return False
    return True


def byte_cases(*families: str) -> list:
    """(format, dtype, head_dim, tokens): a small default set, and the whole sweep marked slow.

    By default each format and group meets each dtype once, each head size once, and the first
    format of the family the long odd token counts.
    """
    formats = all_formats(*families)
    chosen = set()
    for i, fmt in enumerate(formats):
        chosen |= {(fmt, dtype, 128, len(KINDS)) for dtype in FLOAT_DTYPES}
        fitting = [d for d in HEAD_DIMS if holds(fmt, d)]
        chosen |= {(fmt, FLOAT_DTYPES[(i + j) % 3], d, 7) for j, d in enumerate(fitting)}
    chosen |= {(formats[0], FLOAT_DTYPES[i], 64, tokens) for i, tokens in enumerate(TOKENS)}
    sweep = itertools.product(formats, FLOAT_DTYPES, HEAD_DIMS, TOKENS)
    rest = [case for case in sweep if case not in chosen and holds(case[0], case[2])]

    def param(case: tuple, *marks: object):  # type: ignore[no-untyped-def]
        fmt, dtype, head_dim, tokens = case
        return pytest.param(*case, id=f"{fmt}-{dtype_id(dtype)}-d{head_dim}-s{tokens}", marks=marks)

    def order(case: tuple) -> tuple:
        return str(case[0]), str(case[1]), case[2], case[3]

    return [
        *(param(case) for case in sorted(chosen, key=order)),
        *(param(case, pytest.mark.slow) for case in rest),
    ]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """N(0, 1) on the CPU."""
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


#: What the token i % len(KINDS) of :func:`hostile` holds.
KINDS = (
    "normal", "zeros", "negative", "outlier", "constant", "subnormal", "max", "inf", "-inf",
    "both infs", "nan", "offset", "ties", "tiny", "negative zeros", "powers", "wide",
)  # fmt: skip


def hostile(
    batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    """[batch, heads, tokens, head_dim] whose tokens cycle through KINDS."""
    g = generator(seed)
    info = torch.finfo(dtype)
    x = torch.randn(batch, heads, tokens, head_dim, generator=g, dtype=torch.float64)
    where = torch.randint(head_dim, (batch, heads, tokens), generator=g)
    one = torch.nn.functional.one_hot(where, head_dim).bool()
    for t in range(tokens):
        part, spot = x[:, :, t], one[:, :, t]
        match KINDS[t % len(KINDS)]:
            case "zeros":
                part.zero_()
            case "negative":
                part.abs_().add_(0.25).neg_()
            case "outlier":
                part[spot] *= 1000
            case "constant":
                part.copy_(part[..., :1].clone())
            case "subnormal":
                part.mul_(info.smallest_normal / 4)
            case "max":
                part.sign_().mul_(info.max)
            case "inf":
                part[spot] = torch.inf
            case "-inf":
                part[spot] = -torch.inf
            case "both infs":
                part[spot] = torch.inf
                part[spot.roll(1, -1)] = -torch.inf
            case "nan":
                part[spot] = torch.nan
            case "offset":
                part.mul_(0.01).add_(30)
            case "ties":
                part.mul_(4).round_().div_(2)
            case "tiny":
                part.mul_(2.0**-20)
            case "negative zeros":
                part.mul_(-0.0)
            case "powers":
                part.copy_(torch.exp2(part.mul(4).round()) * part.sign())
            case "wide":
                part.mul_(torch.exp2(4 * torch.randn(part.shape, generator=g).double()))
    return x.to(dtype)


def near_edges(fmt: KVFormat, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """x [1, 1, T, 128] of an affine format: where codes change, one bit beside it, and next to 0.

    Groups with ranges of every kind: around zero, symmetric (an edge lies at 0), with an edge near
    it, above it, narrow ones far away from it, and tiny ones.
    """
    g = generator(seed)
    levels = 2**fmt.bits - 1
    low, step = torch.randn(256, generator=g), torch.rand(256, generator=g) + 0.5
    step *= torch.exp2(torch.randint(-12, 8, (256,), generator=g).float())
    low[:64] = (low[:64] - 0.5) * step[:64] * levels
    low[64:128] = -step[64:128] * levels / 2
    edges = torch.randint(levels, (64,), generator=g) + 0.5
    low[128:192] = -step[128:192] * edges * (1 + torch.randn(64, generator=g) * 2.0**-9)
    low[192:224] = step[192:224] * torch.exp2(torch.randint(-9, 2, (32,), generator=g).float())
    low[224:] = step[224:] * levels * torch.exp2(torch.randint(0, 12, (32,), generator=g).float())
    mantissa, exponent = torch.frexp(step[::2])
    step[::2] = torch.ldexp((mantissa * 16).round() / 16, exponent)  # edges are numbers of dtype
    step[240:] *= 2.0**-24 / step[240:].mean()  # scales are float16's least numbers
    low[240:] = torch.randn(16, generator=g) * 8 * step[240:]
    ends = torch.stack([low, low + levels * step], dim=-1).clamp(-6e4, 6e4).to(dtype)
    filled = ends.repeat_interleave(fmt.group_size // 2, -1).view(1, 1, 256, -1)
    packed = reference_quantize(filled, fmt)
    bias, scale = (t.double().view(256, 1) for t in (packed.biases, packed.scales))
    at = (bias + (torch.arange(levels) + 0.5) * scale).to(dtype)
    small = (scale * torch.exp2(-torch.arange(4, 24).double())).to(dtype)
    x = torch.cat([at, small, -small, torch.zeros_like(at[:, :1])], dim=-1)
    bits = x.view(torch.int16 if x.itemsize == 2 else torch.int32)
    x = torch.cat([bits - 1, bits, bits + 1], dim=-1).view(dtype).nan_to_num(0, 0, 0)
    x = torch.minimum(torch.maximum(x, ends[:, :1]), ends[:, 1:])
    chosen = torch.randint(x.shape[1], (256, 4 * fmt.group_size - 8), generator=g)
    rows = x.gather(1, chosen).view(256, 4, -1)
    rows = torch.cat([ends[:, None].expand(-1, 4, -1), rows], dim=-1)
    return rows.reshape(1, 1, -1, 128)


def signs_for(fmt: KVFormat, head_dim: int) -> torch.Tensor | None:
    """The default signs, where the format rotates."""
    return hadamard_signs(head_dim) if fmt.rotate else None


def reference_quantize(x: torch.Tensor, fmt: KVFormat, **options: object) -> Packed:
    """reference.quantize with the default signs of a format that rotates."""
    options.setdefault("signs", signs_for(fmt, x.shape[-1]))
    return Packed(*reference.quantize(x, fmt.name, fmt.group_size, **options))


def reference_dequantize(packed: Packed, fmt: KVFormat, **options: object) -> torch.Tensor:
    """reference.dequantize with the default signs of a format that rotates."""
    options.setdefault("signs", signs_for(fmt, fmt.head_dim(packed.codes.shape[-1])))
    return reference.dequantize(*packed, fmt.name, fmt.group_size, **options)


def on(device: str, value: object) -> object:
    """Move a tensor, or the tensors of a Packed, tuple or dict, to the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Packed):
        return Packed(*(t.to(device) for t in value))
    if isinstance(value, dict):
        return {name: on(device, v) for name, v in value.items()}
    return value


def raw(t: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, [..., row bytes], on the CPU."""
    return torch.atleast_1d(t.detach().cpu()).contiguous().view(torch.uint8)


def assert_bytes(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensor") -> None:
    """Same shape, dtype and bytes; where both are NaN any NaN will do for float codes."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.numel() == 0:
        return
    size = actual.element_size()
    differ = (raw(actual) != raw(expected)).unflatten(-1, (-1, size)).any(-1)
    if actual.is_floating_point():
        differ &= ~(actual.isnan() & expected.isnan())
    if differ.any():
        at = differ.nonzero()[0].tolist()
        index = tuple(at)
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} elements differ, first at {at}: "
            f"{actual[index].item()} instead of {expected[index].item()}"
        )


def assert_packed(actual: Packed, expected: Packed) -> None:
    """Codes, scales and biases byte for byte; scales have one NaN pattern, codes of none any."""
    for name, a, b in zip(Packed._fields, actual, expected, strict=True):
        assert_bytes(a, b, name)


def assert_decoded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Decoded values: bit for bit on the CPU, within float32 rounding of the row elsewhere."""
    if actual.device.type == "cpu":
        assert_bytes(actual, expected, "decoded")
        return
    actual = actual.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    if expected.numel() == 0:
        return
    top = expected.float().abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True)
    eps = torch.finfo(expected.dtype).eps
    same = actual == expected
    near = (actual.float() - expected.float()).abs() <= 4 * 2**-23 * top + eps * expected.abs()
    assert (same | near | expected.isnan()).all()


def check_bytes(
    device: str, fmt: KVFormat, dtype: torch.dtype, head_dim: int, tokens: int, **options: object
) -> None:
    """quantize and dequantize hostile data of the case and compare with the reference."""
    x = hostile(1, 2, tokens, head_dim, dtype, seed=head_dim + tokens)
    expected = reference_quantize(x, fmt, **options)
    moved = on(device, options)
    assert isinstance(moved, dict)
    packed = ops.quantize(on(device, x), fmt, **moved)
    assert_packed(packed, expected)
    reading = {name: value for name, value in options.items() if name in ("signs", "mean")}
    for out_dtype in {torch.float32, dtype}:
        decoded = ops.dequantize(on(device, expected), fmt, dtype=out_dtype, **on(device, reading))
        assert_decoded(decoded, reference_dequantize(expected, fmt, dtype=out_dtype, **reading))


@dataclass
class Twin:
    """A sentinel-filled cache on the device and its copy on the CPU, in one memory layout."""

    packed: Packed
    bases: tuple[torch.Tensor, ...]
    cpu_packed: Packed
    cpu_bases: tuple[torch.Tensor, ...]

    def check(self) -> None:
        """Every byte of both is the same, around the cache too."""
        for name, base, cpu_base in zip(Packed._fields, self.bases, self.cpu_bases, strict=True):
            assert_bytes(base, cpu_base, name)


#: Memory layouts of a cache: how the base buffer differs from a plain [B, G, S, row].
LAYOUTS = ("plain", "narrowed", "tokens first", "heads inside tokens")


def _base_and_view(shape: tuple[int, ...], layout: str) -> tuple[tuple[int, ...], object]:
    """Shape of the buffer and the function that takes the [B, G, S, row] view of it."""
    b, g, s, row = shape
    if layout == "plain":
        return shape, lambda t: t
    if layout == "narrowed":
        return (
            (b + 1, g + 2, s + 3, row + 5 if row else 0),
            lambda t: t[1:, 1 : g + 1, 2 : s + 2, 3 : row + 3] if row else t[1:, :g, :s],
        )
    if layout == "tokens first":
        return (s, b, g, row), lambda t: t.permute(1, 2, 0, 3)
    return (b, s, g, row), lambda t: t.transpose(1, 2)


def twin(
    fmt: KVFormat,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    layout: str = "plain",
    scale_dtype: torch.dtype | None = None,
) -> Twin:
    """A cache of [B, G, S, D] that holds SENTINEL bytes everywhere."""
    b, g, s, d = shape
    scale_dtype = scale_dtype or default_scale_dtype(dtype)
    rows = (
        (fmt.codes_row(d), fmt.codes_dtype(dtype)),
        (fmt.scales_row(d), scale_dtype),
        (fmt.biases_row(d), scale_dtype),
    )
    sides: list[list[torch.Tensor]] = [[], [], [], []]
    for row, row_dtype in rows:
        base_shape, view = _base_and_view((b, g, s, row), layout)
        base = torch.zeros(base_shape, dtype=row_dtype)
        base.view(torch.uint8).fill_(SENTINEL)
        moved = base.clone().to(device)
        for side, t in zip(sides, (view(moved), moved, view(base), base), strict=True):  # type: ignore[operator]
            side.append(t)
    return Twin(Packed(*sides[0]), tuple(sides[1]), Packed(*sides[2]), tuple(sides[3]))


def input_views(x: torch.Tensor, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """x [B, G, L, D] on the device behind other strides and storage offsets."""
    yield "tokens before heads", x.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    yield "batch last", x.permute(1, 2, 3, 0).contiguous().to(device).permute(3, 0, 1, 2)
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7, dtype=x.dtype)
    wide[..., ::2] = x
    yield "stride 2", wide.to(device)[..., ::2]
    padded = torch.full([n + 3 for n in x.shape], 7, dtype=x.dtype)
    padded[1:-2, 2:-1, 1:-2, 3:] = x
    yield "offset", padded.to(device)[1:-2, 2:-1, 1:-2, 3:]
    yield "expanded", x[:1, :1].to(device).expand(x.shape)
