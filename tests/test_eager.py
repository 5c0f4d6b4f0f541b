"""The short way from Python to the ops of a decode step: what takes it, and what torch.ops gets."""

from __future__ import annotations

import pytest
import torch
from helpers import normal
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_kvq import _C, ops
from torch_kvq.ops import Packed

D = 64


def packed(device: str, fmt: str = "int4-g32") -> Packed:
    return ops.quantize(normal(1, 2, 8, D).to(device), fmt)


def calls(device: str, position: torch.Tensor | int) -> dict[str, tuple[tuple, tuple, dict]]:
    """op: required arguments, options as a tuple, the same as keywords."""
    keys, values = packed(device), packed(device)
    x = normal(1, 2, 1, D, seed=1).to(device)
    query = normal(1, 4, 1, D, seed=2).to(device)
    format = ("int4", 32)
    write = {"signs": None, "mean": None, "encoder": "default", "ring": False}
    append = dict.fromkeys(("k_signs", "v_signs", "k_mean", "v_mean"))
    append |= {"k_encoder": "default", "v_encoder": "default", "ring": False}
    options = ("kv_start", "kv_end", "mask", "sinks", "k_signs", "v_signs", "k_mean", "v_mean")
    attention = dict.fromkeys((*options, "scale"))
    attention |= {"softcap": 0.0, "window": 0, "causal": True, "ring": False}
    dense = normal(1, 2, 8, D).to(device)
    return {
        "kv_cache_update_": ((dense, x, position), (), {}),
        "quantize_into_": ((*keys, x, position, *format), tuple(write.values()), write),
        "append_": (
            (*keys, *values, x, x, position, *format, *format), tuple(append.values()), append,
        ),
        "attention": (
            (query, *keys, *values, position, *format, *format), tuple(attention.values()),
            attention,
        ),
    }  # fmt: skip


OPS = tuple(calls("cpu", 1))


@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("op", OPS)
def test_same_as_torch_ops(op: str, tensor: bool, device: str) -> None:
    """Bit for bit, in what is returned and in what is written."""
    results = []
    for short in (False, True):
        position = torch.tensor([3], device=device) if tensor else 3
        required, options, keywords = calls(device, position)[op]
        packet = getattr(torch.ops.kvq, op)
        if short:
            out = getattr(_C, op)(required, options)
            assert out is not NotImplemented
        else:
            out = (packet.default if tensor else packet.int)(*required, **keywords)
        assert (out is None) == op.endswith("_")
        tensors = [a for a in required if isinstance(a, torch.Tensor)]
        results.append([t.cpu().clone() for t in (*(out or ()), *tensors)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("op", OPS)
def test_declines_what_only_torch_ops_can_read(op: str) -> None:
    required, options, _ = calls("cpu", 1)[op]
    direct = getattr(_C, op)
    before = [a.clone() for a in required if isinstance(a, torch.Tensor)]
    for changed in (
        (required[0].as_subclass(Subclass), *required[1:]),
        (*required, None),
        required[:2],
        tuple(float(a) if isinstance(a, int) else a for a in required),
    ):
        assert direct(changed, options) is NotImplemented
    for a, b in zip(before, (a for a in required if isinstance(a, torch.Tensor)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="two tuples"):
        direct(list(required), options)


def test_errors_are_the_ops_own() -> None:
    required, options, _ = calls("cpu", 9)["append_"]
    with pytest.raises(IndexError, match=r"\[kvq\.append_\] position 9 \+ 1 tokens exceed"):
        _C.append_(required, options)


def test_modes_see_the_calls() -> None:
    """A function mode through torch.ops, a dispatch mode through the dispatcher."""
    seen: list[str] = []

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    keys, x = packed("cpu"), normal(1, 2, 1, D)
    for mode in (Function, Dispatch):
        with mode():
            ops.append_(keys, packed("cpu"), x, x, 1, "int4-g32", "int4-g32")
        assert any("kvq" in name and "append_" in name for name in seen), (mode, seen)
        seen.clear()


def test_parsed_formats_are_kept_and_refusals_are_not() -> None:
    assert ops.KVFormat.parse("int4-g32-rot") is ops.KVFormat.parse("int4-g32-rot")
    for _ in range(2):
        with pytest.raises(ValueError, match="group_size"):
            ops.KVFormat.parse("int4-g48")
