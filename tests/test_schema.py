"""Every schema of torch.ops.kvq: kernels, fakes, autograd, opcheck, compiled graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.helpers import normal, on
from torch_kvq import KVFormat, Packed, ops

SCHEMAS = sorted(
    (s for s in torch._C._jit_get_all_schemas() if s.name.startswith("kvq::")),
    key=lambda s: (s.name, s.overload_name),
)
NAMES = [f"{s.name}.{s.overload_name}".rstrip(".") for s in SCHEMAS]
MUTATING = ("kv_cache_update_", "quantize_into_", "append_")
each_schema = pytest.mark.parametrize("name", NAMES)


def base(name: str) -> str:
    """kvq::append_.int -> append_"""
    return name.removeprefix("kvq::").partition(".")[0]


def overload(name: str) -> torch._ops.OpOverload:
    packet, _, kind = name.removeprefix("kvq::").partition(".")
    return getattr(getattr(torch.ops.kvq, packet), kind or "default")


def test_schemas_are_the_design_s() -> None:
    functional = {"quantize", "dequantize", "qdq", "hadamard", "mlx_native_dequantize"}
    functional |= {"q4_k_quantize", "q4_k_dequantize", "q4_k_gemv", "q4_k_matmul"}
    assert {base(n) for n in NAMES} >= functional | {"attention", *MUTATING}
    with_position = {n.removeprefix("kvq::") for n in NAMES if n.endswith(".int")}
    assert with_position == {f"{op}.int" for op in (*MUTATING, "attention")}


@each_schema
def test_aliasing_is_honest(name: str) -> None:
    """Ops that write end in _, return nothing, and say what they write; others write nothing."""
    schema = SCHEMAS[NAMES.index(name)]
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    expected = {
        "kv_cache_update_": ["cache"],
        "quantize_into_": ["codes", "scales", "biases"],
        "append_": [f"{side}_{part}" for side in "kv" for part in Packed._fields],
    }
    assert written == expected.get(base(name), [])
    assert bool(written) == base(name).endswith("_") == (not schema.returns)


@each_schema
def test_has_every_kernel(name: str, device: str) -> None:
    """A CPU kernel, a fake, a word on autograd; on MPS an MPS kernel."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for key in ("CPU", "Meta", "Autograd"):
        assert has(name, key), f"{name} has no {key} kernel"
    if device == "mps":
        assert has(name, "MPS"), f"{name} has no MPS kernel"


@each_schema
def test_has_wrapper_and_test(name: str) -> None:
    """torch_kvq.ops documents the op, and a file of tests other than this one calls it."""
    wrapper = getattr(ops, base(name))
    assert wrapper.__doc__
    word = re.compile(rf"\b{re.escape(base(name))}\(")
    here = Path(__file__)
    others = [p for p in here.parent.glob("test_*.py") if p != here]
    assert any(word.search(p.read_text()) for p in others), f"no test calls {base(name)}"


# One valid call of every overload


def quantized(fmt: str, tokens: int, head_dim: int) -> Packed:
    return ops.quantize(normal(2, 2, tokens, head_dim, dtype=torch.float16), fmt)


def samples(name: str) -> list[tuple[tuple, dict]]:
    """(args, kwargs) of valid calls, on the CPU."""
    op, integer = base(name), name.endswith(".int")
    x = normal(2, 2, 3, 64, dtype=torch.float16)
    position = 1 if integer else torch.tensor([1, 2])
    signs = torch.ones(64)
    mean = torch.zeros(2, 64)
    extras = {"signs": signs, "mean": mean}
    keys, values = quantized("int8-g32", 6, 64), quantized("q4_0", 6, 64)
    match op:
        case "kv_cache_update_":
            return [((torch.zeros(2, 2, 6, 64), x, position), {})]
        case "quantize" | "qdq":
            return [
                ((x, "int4", 32), extras),
                ((x, "tq3"), {"signs": signs, "encoder": "unbiased"}),
                ((x, "none"), {"scale_dtype": torch.float32}),
            ]
        case "quantize_into_":
            return [
                ((*keys, x, position, "int8", 32), extras),
                ((*values, x, position, "q4_0"), {"ring": True}),
            ]
        case "append_":
            return [
                (
                    (*keys, *values, x, x.clone(), position, "int8", 32, "q4_0", 0),
                    {"k_signs": signs, "v_mean": mean},
                )
            ]
        case "dequantize":
            return [
                ((*keys, "int8", 32), extras),
                ((*values, "q4_0"), {"start": 2, "length": 3, "dtype": torch.bfloat16}),
            ]
        case "hadamard":
            return [((x,), {}), ((x, signs, True), {})]
        case "mlx_native_dequantize":
            codes = torch.zeros(1, 2, 5, 32, dtype=torch.uint8)
            norms = torch.ones(1, 2, 5, 1)
            return [
                ((codes, norms, 4), {"signs": signs, "rotate_back": True}),
                ((codes, norms, 8), {"start": 1, "length": 2, "codebook": torch.ones(256)}),
            ]
        case "q4_k_quantize":
            return [((normal(3, 512),), {}), ((normal(2, 3, 256, dtype=torch.float16),), {})]
        case "q4_k_dequantize":
            blocks = torch.zeros(3, 288, dtype=torch.uint8)
            return [((blocks,), {}), ((blocks,), {"dtype": torch.bfloat16})]
        case "q4_k_gemv" | "q4_k_matmul":
            blocks, vector = torch.zeros(5, 288, dtype=torch.uint8), normal(512, dtype=torch.half)
            buffer = torch.zeros(2000, dtype=torch.uint8)
            return [
                ((vector, blocks), {}),
                ((vector.view(1, 1, 512), buffer, 32), {"rows": 4, "exact": True}),
                ((vector, buffer[: 288 * 4 + 2], 2), {}),
            ]
        case "attention":
            query = normal(2, 4, 3, 64, dtype=torch.float16)
            length = 5 if integer else torch.tensor([5, 4])
            call = (query, *keys, *values, length, "int8", 32, "q4_0", 0)
            mask = torch.ones(2, 1, 3, 6, dtype=torch.bool)
            return [(call, {}), (call, {"mask": mask, "sinks": torch.zeros(4), "window": 4})]
    raise AssertionError(f"{name} has no sample call: add one")


def moved(device: str, call: tuple[tuple, dict]) -> tuple[tuple, dict]:
    return tuple(on(device, a) for a in call[0]), on(device, call[1])  # type: ignore[return-value]


CASES = [(name, i) for name in NAMES for i in range(len(samples(name)))]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_opcheck(name: str, index: int, device: str) -> None:
    """Schema, autograd registration, fake tensors, and AOT dispatch with symbolic shapes."""
    args, kwargs = moved(device, samples(name)[index])
    torch.library.opcheck(overload(name), args, kwargs)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_fake_shapes_equal_real_ones(name: str, index: int, device: str) -> None:
    """On the meta device every op gives the shapes, strides and dtypes of the real call."""
    args, kwargs = samples(name)[index]
    real = overload(name)(*moved(device, (args, kwargs))[0], **moved(device, (args, kwargs))[1])
    fake = overload(name)(*moved("meta", (args, kwargs))[0], **moved("meta", (args, kwargs))[1])

    def layout(result: object) -> list[tuple]:
        if result is None:
            return []
        tensors = result if isinstance(result, tuple) else (result,)
        return [(t.shape, t.stride(), t.dtype) for t in tensors]

    assert layout(real) == layout(fake)


def with_grad(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


@pytest.mark.parametrize("name", [n for n in NAMES if base(n) not in MUTATING])
def test_backward_raises(name: str, device: str) -> None:
    """No silent zeros: the outputs have a history, and walking it is refused."""
    args, kwargs = moved(device, samples(name)[0])
    outputs = overload(name)(*map(with_grad, args), **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floats = [out for out in outputs if out.is_floating_point()]
    if base(name) in ("q4_k_quantize", "q4_k_dequantize"):  # from or to bytes: nothing to derive
        assert not any(out.requires_grad for out in outputs)
        return
    assert floats and all(out.requires_grad for out in floats)
    for out in floats:
        with pytest.raises(RuntimeError, match=rf"kvq::{base(name)}.*not implemented"):
            out.float().sum().backward()


@pytest.mark.parametrize("name", [n for n in NAMES if base(n) in MUTATING])
def test_writes_have_no_history(name: str, device: str) -> None:
    """Appending keys that require grad leaves the cache a plain buffer."""
    args, kwargs = moved(device, samples(name)[0])
    schema = SCHEMAS[NAMES.index(name)]
    caches = [a for a, s in zip(args, schema.arguments, strict=False) if s.alias_info]
    rest = [
        a if s.alias_info else with_grad(a) for a, s in zip(args, schema.arguments, strict=False)
    ]
    assert overload(name)(*rest, **kwargs) is None
    assert caches and not any(c.requires_grad or c.grad_fn for c in caches)


def test_fake_calls_leave_nothing_behind(device: str) -> None:
    """Default signs made among fake tensors are not kept for real ones."""
    x = normal(1, 1, 1, 152).to(device)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert isinstance(ops.quantize(fake, "tq4").codes, FakeTensor)
    assert not isinstance(ops.quantize(x, "tq4").codes, FakeTensor)


# Compiled graphs


def compiled(function: Callable, backend: str) -> tuple[Callable, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def attend_case(k: str, v: str, device: str) -> tuple[Packed, Packed, Callable]:
    k_fmt, v_fmt = KVFormat.parse(k), KVFormat.parse(v)
    keys = Packed(*k_fmt.empty(2, 2, 16, 64, dtype=torch.float32, device=device))
    values = Packed(*v_fmt.empty(2, 2, 16, 64, dtype=torch.float32, device=device))

    def step(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        ops.append_(keys, values, key, value, position, k_fmt, v_fmt)
        out, _ = ops.attention(query, keys, values, position + key.shape[2], k_fmt, v_fmt)
        return out * 2

    return keys, values, step


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_append_and_attend_in_one_graph(backend: str, device: str) -> None:
    """One graph, compiled once, serves every position; caches and outputs equal eager's."""
    if backend == "inductor" and device != "cpu":
        pytest.skip("inductor is tried on the CPU; elsewhere it needs the device's own compiler")
    k, v = "int8-g32", "int4-g32-rot"
    keys, values, step = attend_case(k, v, device)
    eager_keys, eager_values, eager_step = attend_case(k, v, device)
    fast, counter = compiled(step, backend)
    for start in range(6):
        query = normal(2, 4, 1, 64, seed=start).to(device)
        key, value = (normal(2, 2, 1, 64, seed=start + s).to(device) for s in (10, 20))
        position = torch.tensor([start, 2 * start], device=device)
        out = fast(query, key, value, position)
        expected = eager_step(query, key, value, position)
        torch.testing.assert_close(out.cpu(), expected.cpu(), rtol=0, atol=0)
    assert counter.frame_count == 1
    for a, b in zip((*keys, *values), (*eager_keys, *eager_values), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("integer", [False, True], ids=["tensor", "int"])
def test_quantize_into_does_not_recompile(integer: bool, device: str) -> None:
    """A moving tensor position never recompiles; an int one turns symbolic at its second value."""
    fmt = KVFormat.parse("tq4")
    packed = Packed(*fmt.empty(1, 2, 16, 64, dtype=torch.float32, device=device))
    x = normal(1, 2, 1, 64).to(device)

    def step(x: torch.Tensor, position: torch.Tensor | int) -> torch.Tensor:
        ops.quantize_into_(packed, x + 1, position, fmt, ring=True)
        return ops.dequantize(packed, fmt)

    fast, counter = compiled(step, "aot_eager")
    for start in range(2, 8):
        out = fast(x, start if integer else torch.tensor(start, device=device))
        torch.testing.assert_close(out, ops.dequantize(packed, fmt), rtol=0, atol=0)
    assert counter.frame_count == (2 if integer else 1)
    written = packed.codes.cpu().any(-1)[0, 0].nonzero().flatten().tolist()
    assert written == list(range(2, 8))


def test_symbolic_lengths(device: str) -> None:
    """One graph serves every number of tokens, batches and ranges to read."""

    def round_trip(x: torch.Tensor, length: int) -> torch.Tensor:
        packed = ops.quantize(ops.hadamard(x), "int4-g32", mean=torch.zeros(2, 64, device=x.device))
        part = ops.dequantize(packed, "int4-g32", start=1, length=length)
        return part + ops.qdq(x, "q8_0")[:, :, 1 : length + 1]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(round_trip, fullgraph=True, backend=counter, dynamic=True)
    for batch, tokens, length in ((3, 5, 3), (4, 9, 5), (5, 17, 12)):
        x = normal(batch, 2, tokens, 64).to(device)
        torch.testing.assert_close(fast(x, length), round_trip(x, length), rtol=0, atol=0)
    assert counter.frame_count == 1
