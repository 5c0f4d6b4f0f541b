"""The error of float decode, over many draws, against dense attention as a GPU sums it."""

from __future__ import annotations

import math

import pytest
import torch

from torch_kvq import reference
from torch_kvq.formats import KVFormat

from .. import requirements
from .test_attention_kernels import Case, error


@pytest.fixture(autouse=True)
def _tools() -> None:
    requirements.require(requirements.missing_for_emulator())


def lanes_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums the last dimension as 32 lanes do: each its share, then pairs of lanes."""
    parts = x.unflatten(-1, (-1, 32)).unbind(-2)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total.squeeze(-1)


def dense(case: Case) -> torch.Tensor:
    """softmax(q k^T) v of one query a KV head, in float32 but for the sum over the tokens."""
    key, value = (
        reference.dequantize(*packed, fmt.name, fmt.group_size, signs=signs)
        for packed, fmt, signs in zip(
            case.packed, (case.k_format, case.v_format), case.signs, strict=True
        )
    )
    scores = lanes_sum(case.query * key) / math.sqrt(key.shape[-1])
    return scores.softmax(-1).double().unsqueeze(-2) @ value.double()


@pytest.mark.parametrize("spec", ["int4-g64", "tq4", "tq8"])
def test_float_decode_is_at_most_twice_a_gpus_dense_error(spec):
    """An H100's float attention has half the error of a CPU's: its sums are trees."""
    fmt = KVFormat.parse(spec)
    for seed in range(12):
        case = Case(
            fmt, fmt, torch.float32, batch=16, heads=2, groups=2, tokens=203, capacity=203,
            seed=seed,
        )  # fmt: skip
        expected, _ = case.expected()
        ours, theirs = (error(x, expected)[0] for x in (case.run()[0], dense(case).float()))
        assert ours <= 2 * theirs, (seed, ours, theirs)
