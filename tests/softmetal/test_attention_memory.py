"""Memory of attention of many queries on Metal: what the host code allocates for a call."""

from __future__ import annotations

import pytest
import torch

from torch_kvq.formats import KVFormat

from . import install, reset_stats, stats

DIM, ROWS = 64, 32  # head size; (query, head) rows that a threadgroup of the prefill kernel serves
INT8 = KVFormat("int8", 64)
PAGE = 4096


@pytest.fixture(autouse=True)
def product(soft: None) -> None:
    install()


def allocated(tokens: int, queries: int, heads: int, groups: int) -> tuple[int, int]:
    """(bytes that a call allocates at its peak, of those what it returns).

    The sequence fills the cache; that only its last tokens are seen, which the host code does not
    know, saves the emulator work.
    """
    packed = INT8.empty(1, groups, tokens, DIM, dtype=torch.float16, device="mps")
    for part in packed:
        part[:, :, -64:] = 0
    query = torch.ones(1, heads, queries, DIM, dtype=torch.float16, device="mps")
    length = torch.tensor(tokens, device="mps")
    start = torch.tensor(tokens - 64, device="mps")

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.kvq.attention(
            query, *packed, *packed, length, *(INT8.name, INT8.group_size) * 2, kv_start=start
        )

    call()
    torch.mps.synchronize()
    before = stats()["buffer_bytes"]
    reset_stats()
    out, lse = call()
    torch.mps.synchronize()
    peak, returned = (stats()[key] - before for key in ("peak_buffer_bytes", "buffer_bytes"))
    assert out.isfinite().all() and lse[..., -64:].isfinite().all()
    return peak, returned


def most_threadgroups() -> int:
    """Up to which the tuning table has calls of many rows split their tokens."""
    *_, entry = torch.ops.kvq_metal.tuning().split()
    return int(entry.partition(":")[2].split(",")[1])


def test_prefill_allocates_the_same_for_any_number_of_tokens() -> None:
    """Enough threadgroups of rows: tokens are not split, nothing but the result is allocated."""
    heads, queries = 16, most_threadgroups() * ROWS // 16
    outputs = heads * queries * (2 * DIM + 4)
    for tokens in (1024, 2048, 65536):
        peak, returned = allocated(tokens, queries, heads=heads, groups=8)
        assert outputs <= returned <= outputs + 2 * PAGE
        assert peak == returned


@pytest.mark.parametrize("queries", [33, 100])
def test_workspace_of_split_tokens_is_bounded(queries: int) -> None:
    """Few threadgroups of rows: each split of the tokens keeps its sums for the merge pass. There
    are no more splits than the tuning table's threadgroups, however many tokens."""
    bound = most_threadgroups() * ROWS * (DIM + 2) * 4
    workspace = []
    for tokens in (1 << 12, 1 << 17, 1 << 19):
        peak, returned = allocated(tokens, queries, heads=2, groups=1)
        workspace.append(peak - returned)
    assert 0 < workspace[0] < workspace[1] <= bound + PAGE
    assert workspace[1] == workspace[2]


def test_the_matrix_kernel_splits_long_sequences() -> None:
    """However many threadgroups there are: its sums are of 32,768 tokens at most."""
    workspace = []
    for tokens in (1 << 12, 1 << 15, 1 << 17):
        peak, returned = allocated(tokens, queries=8, heads=512, groups=32)
        workspace.append(peak - returned)
    assert workspace[:2] == [0, 0]
    assert workspace[2] >= 4 * 8 * 512 * (DIM + 2) * 4
