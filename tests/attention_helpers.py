"""Calls of attention on packed K and V, and what the float64 reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tests.helpers import normal, on, reference_quantize, signs_for
from torch_kvq import reference
from torch_kvq.formats import KVFormat
from torch_kvq.ops import Packed

INT8, INT4, TQ4 = KVFormat("int8"), KVFormat("int4"), KVFormat("tq4")
#: Accepted error of out, relative to the largest value, and of lse.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LSE_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Case:
    """A query and a packed cache on the CPU, and what attention is told about them."""

    query: torch.Tensor
    keys: Packed
    values: Packed
    length: torch.Tensor | int
    k_format: KVFormat
    v_format: KVFormat
    options: dict = field(default_factory=dict)

    def run(self, device: str, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of the op, on the CPU."""
        arguments, options = self.arguments(), self.options | changes
        moved = [on(device, a) for a in arguments]
        out, lse = torch.ops.kvq.attention(*moved, **on(device, options))
        assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
        return out.cpu(), lse.cpu()

    def expected(self, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's out before its rounding to the query's dtype, and lse."""
        query, *rest = self.arguments()
        return reference.attention(query.double(), *rest, **self.options | changes)

    def arguments(self) -> list:
        formats = (
            self.k_format.name,
            self.k_format.group_size,
            self.v_format.name,
            self.v_format.group_size,
        )
        return [self.query, *self.keys, *self.values, self.length, *formats]

    def check(self, device: str) -> None:
        assert_close(self.run(device), self.expected(), self.query.dtype)


def assert_close(actual: tuple, expected: tuple, dtype: torch.dtype) -> None:
    (out, lse), (want, want_lse) = actual, expected
    assert out.shape == want.shape and out.dtype == dtype and lse.shape == want_lse.shape
    if out.numel() == 0:
        return
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(lse.isnan(), want_lse.isnan())
    error = (out.double() - want).abs().nan_to_num(0).amax()
    assert error <= TOLERANCE[dtype] * max(1e-3, want.abs().nan_to_num(0).amax()), float(error)
    finite = want_lse.isfinite()
    assert torch.equal(lse.nan_to_num(0)[~finite], want_lse.nan_to_num(0)[~finite])
    top = want_lse[finite].abs().clamp_min(1)
    assert ((lse - want_lse)[finite].abs() <= LSE_TOLERANCE[dtype] * top).all()


def make(
    k_format: KVFormat = INT8,
    v_format: KVFormat | None = None,
    *,
    batch: int = 1,
    groups: int = 2,
    share: int = 2,
    queries: int = 1,
    capacity: int = 150,
    length: torch.Tensor | int = 127,
    head_dim: int = 64,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    means: bool = False,
    **options: object,
) -> Case:
    v_format, v_dim = v_format or k_format, v_dim or head_dim
    x = normal(batch, groups, capacity, head_dim, dtype=dtype, seed=seed)
    y = normal(batch, groups, capacity, v_dim, dtype=dtype, seed=seed + 1)
    query = normal(batch, groups * share, queries, head_dim, dtype=dtype, seed=seed + 2)
    k_mean = normal(groups, head_dim, seed=seed + 3) if means else None
    v_mean = normal(groups, v_dim, seed=seed + 4) if means else None
    options |= {
        "k_signs": signs_for(k_format, head_dim),
        "v_signs": signs_for(v_format, v_dim),
        "k_mean": k_mean,
        "v_mean": v_mean,
    }
    keys = reference_quantize(x, k_format, mean=k_mean)
    values = reference_quantize(y, v_format, mean=v_mean)
    if not isinstance(length, torch.Tensor):
        length = torch.tensor(length)
    return Case(query, keys, values, length, k_format, v_format, options)
