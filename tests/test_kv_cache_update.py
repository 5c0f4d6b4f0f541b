"""kv_cache_update_: a dense slot write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import LAYOUTS, assert_bytes, dtype_id, hostile, input_views, normal, twin
from torch_kvq import KVFormat, ops, reference
from torch_kvq.formats import FLOAT_DTYPES

NONE = KVFormat("none")


@pytest.mark.parametrize("src_dtype", FLOAT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
def test_casts_like_torch(dtype: torch.dtype, src_dtype: torch.dtype, device: str) -> None:
    """src is cast to the cache's dtype as Tensor.to does; the same dtype keeps its bytes."""
    src = hostile(2, 2, 17, 40, src_dtype)
    cache = torch.zeros(2, 2, 20, 40, dtype=dtype)
    moved = cache.to(device)
    assert ops.kv_cache_update_(moved, src.to(device), 2) is moved
    cache[:, :, 2:19] = src.to(dtype)
    assert_bytes(moved, cache, "cache")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=dtype_id)
def test_touches_no_other_slot(dtype: torch.dtype, layout: str, device: str) -> None:
    both = twin(NONE, (3, 2, 9, 48), dtype, device, layout)
    src = normal(3, 2, 4, 48, dtype=dtype, seed=51)
    for position in (3, 0, 5, 5):
        ops.kv_cache_update_(both.packed.codes, src.to(device), position)
        reference.kv_cache_update_(both.cpu_packed.codes, src, position)
        both.check()


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("values", [4, [4], [0, 6, 3]], ids=["scalar", "one", "per row"])
def test_positions(values: int | list[int], integer: torch.dtype, device: str) -> None:
    batch = len(values) if isinstance(values, list) else 3
    position = torch.tensor(values, dtype=integer)
    both = twin(NONE, (batch, 1, 8, 32), torch.float32, device)
    src = normal(batch, 1, 2, 32, seed=52)
    ops.kv_cache_update_(both.packed.codes, src.to(device), position.to(device))
    reference.kv_cache_update_(both.cpu_packed.codes, src, position)
    both.check()


def test_views_of_the_source(device: str) -> None:
    src = normal(2, 3, 4, 32, seed=53)
    for name, view in input_views(src, device):
        cache = torch.zeros(2, 3, 6, 32, device=device)
        expected = torch.zeros(2, 3, 6, 32)
        expected[:, :, 1:5] = view.cpu()
        assert_bytes(ops.kv_cache_update_(cache, view, 1), expected, name)


def test_empty(device: str) -> None:
    cache = torch.ones(2, 3, 4, 8, device=device)
    ops.kv_cache_update_(cache, torch.zeros(2, 3, 0, 8, device=device), 4)
    assert cache.cpu().eq(1).all()
    none = torch.ones(0, 3, 4, 8, device=device)
    ops.kv_cache_update_(none, torch.zeros(0, 3, 2, 8, device=device), 0)
    position = torch.zeros(0, dtype=torch.int64, device=device)
    ops.kv_cache_update_(none, torch.zeros(0, 3, 2, 8, device=device), position)


def test_takes_no_part_in_autograd(device: str) -> None:
    """Writing a key that requires grad leaves the cache a plain buffer, without a graph."""
    cache = torch.zeros(1, 1, 4, 8, device=device)
    src = torch.ones(1, 1, 1, 8, device=device, requires_grad=True)
    ops.kv_cache_update_(cache, src, 0)
    ops.kv_cache_update_(cache, src, torch.tensor(1, device=device))
    assert not cache.requires_grad and cache.grad_fn is None
    assert cache.cpu()[0, 0, :, 0].tolist() == [1, 1, 0, 0]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_write(device: str, data: st.DataObject) -> None:
    batch, capacity = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    tokens = data.draw(st.integers(0, capacity))
    room = capacity - tokens
    rows = data.draw(st.lists(st.integers(0, room), min_size=batch, max_size=batch))
    layout = data.draw(st.sampled_from(LAYOUTS))
    both = twin(NONE, (batch, 2, capacity, 8), torch.float16, device, layout)
    src = normal(batch, 2, tokens, 8, dtype=torch.float16, seed=capacity)
    ops.kv_cache_update_(both.packed.codes, src.to(device), torch.tensor(rows, device=device))
    reference.kv_cache_update_(both.cpu_packed.codes, src, torch.tensor(rows))
    both.check()
