"""A long cache on the CPU grows within address space that it has reserved: it copies nothing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

from tests.test_cache import assert_same_state
from tests.test_serialization import anonymous_bytes
from torch_kvq import QuantizedKVCache, memory, storage
from torch_kvq.storage import room

FORMATS = {"k_format": "int8", "v_format": "int4-rot"}
MIB = 1 << 20


@pytest.fixture(autouse=True)
def reserves(device):
    if device != "cpu":
        pytest.skip("only the CPU's storage is reserved")
    if not memory._addresses_are_free():
        pytest.skip("this system counts reserved addresses")


def tokens(count: int, seed: int = 0, batch: int = 1, heads: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, count, 128, generator=generator).bfloat16()


def make(batch: int = 1, heads: int = 2, **options) -> QuantizedKVCache:
    return QuantizedKVCache(batch, heads, 128, **{**FORMATS, "dtype": torch.bfloat16, **options})


def filled(*chunks: int, batch: int = 1, heads: int = 2, **options) -> QuantizedKVCache:
    cache = make(batch, heads, **options)
    for seed, count in enumerate(chunks):
        cache.append(tokens(count, seed, batch, heads), tokens(count, seed + 50, batch, heads))
    return cache


def packed(cache: QuantizedKVCache) -> list[torch.Tensor]:
    return [t for t in (*cache.keys, *cache.values) if t.shape[3]]


def pointers(cache: QuantizedKVCache) -> list[int]:
    return [t.data_ptr() for t in packed(cache)]


def without_reserve(monkeypatch, *chunks: int, **options) -> QuantizedKVCache:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "reserved", lambda *specs: None)
        return filled(*chunks, **options)


@pytest.mark.parametrize("formats", [("int8", "int4-rot"), ("tq3", "q4_0"), ("fp8_e4m3", "none")])
def test_growing_moves_nothing(formats, monkeypatch):
    """The same slots, bytes, nbytes and outputs as of a cache that is copied when it grows."""
    chunks = 3000, 600, 1, 900, 2000, 1
    options = {"k_format": formats[0], "v_format": formats[1]}
    cache, found = make(**options), []
    for seed, count in enumerate(chunks):
        view = cache.append(tokens(count, seed), tokens(count, seed + 50))
        found.append((cache.capacity, pointers(cache)))
    assert len({capacity for capacity, _ in found}) > 3
    assert all(at == found[0][1] for _, at in found)
    copied = without_reserve(monkeypatch, *chunks, **options)
    assert_same_state(cache, copied)
    assert cache.capacity == copied.capacity and cache.nbytes == copied.nbytes
    assert all(room(t) >= 1 << 17 for t in packed(cache))
    assert all(room(t) == copied.capacity for t in packed(copied))
    query = tokens(1, 9, heads=8)
    assert torch.equal(cache.attend(query, view), copied.attend(query))


def test_short_caches_reserve_nothing():
    """Where a page for each head of each buffer would be much."""
    cache = filled(500)
    assert all(room(t) == cache.capacity for t in packed(cache))
    cache.append(tokens(1000), tokens(1000))
    assert all(room(t) > 1 << 17 for t in packed(cache))


def test_a_view_of_a_shorter_cache_stays_good():
    cache = filled(2000, 1)
    view, query = cache.view(), tokens(1, 9, heads=8)
    before = cache.attend(query, view)
    cache.append(tokens(1500, 3), tokens(1500, 4))
    assert view.keys.codes.shape[2] < cache.capacity
    assert torch.equal(cache.attend(query, view), before)


def test_what_is_reserved_is_not_resident():
    """A page at most for each head of each buffer above what the tokens take."""
    before = anonymous_bytes()
    key = tokens(1024, heads=8)
    cache = make(heads=8)
    for _ in range(16):
        cache.append(key, key)
    used = sum(t[:, :, : cache.length].nbytes for t in packed(cache))
    assert sum(t.untyped_storage().nbytes() for t in packed(cache)) > 200 * MIB
    assert 24 * MIB < used <= anonymous_bytes() - before < used * 17 // 16 + key.nbytes + 8 * MIB
    assert used <= cache.nbytes <= used * 9 // 8


COPIES: dict[str, Callable[[QuantizedKVCache], QuantizedKVCache]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "share_memory": lambda cache: copy.deepcopy(cache).share_memory(),
    "select": lambda cache: select(copy.copy(cache)),
}


def select(cache: QuantizedKVCache) -> QuantizedKVCache:
    cache._buffers = dict(cache._buffers)  # the original keeps its own
    cache.select(torch.tensor([0]))
    return cache


@pytest.mark.parametrize("how", COPIES)
def test_copies_hold_the_slots_alone(how):
    cache = filled(2000, 700, heads=8)
    before = anonymous_bytes()
    other = COPIES[how](cache)
    assert anonymous_bytes() - before < 4 * cache.nbytes + 8 * MIB
    assert all(room(t) == cache.capacity for t in packed(other))
    assert_same_state(cache, other)
    other._host = copy.copy(cache._host)
    for one in (cache, other):
        one.append(tokens(900, 3, heads=8), tokens(900, 4, heads=8))
    assert_same_state(cache, other)


def test_shared_in_place_and_moved():
    """share_memory() takes the slots; what moves nothing leaves the storage where it is."""
    cache = filled(2000)
    before, kept = pointers(cache), filled(2000)
    assert pointers(cache.to("cpu")) == pointers(cache.eval()) == before
    cache.share_memory()
    assert all(t.is_shared() and room(t) == cache.capacity for t in packed(cache))
    assert_same_state(cache, kept)


def test_a_shallow_copy_shares_the_storage():
    cache = filled(2000)
    assert pointers(copy.copy(cache)) == pointers(cache)


def test_files_hold_the_tokens_alone(tmp_path):
    cache = filled(2000, 700)
    cache.save(tmp_path / "cache.kvq")
    file = io.BytesIO()
    torch.save(cache, file)
    for size in ((tmp_path / "cache.kvq").stat().st_size, file.tell()):
        assert size < cache.nbytes + 65536
    loaded = QuantizedKVCache.load(tmp_path / "cache.kvq")
    assert_same_state(cache, loaded)
    assert all(room(t) > 1 << 17 for t in packed(loaded))


def test_rows_change_places(monkeypatch):
    """Beam search: the storage stays, and its reserve untouched."""
    cache = filled(2000, batch=3)
    copied = without_reserve(monkeypatch, 2000, batch=3)
    before, resident = pointers(cache), anonymous_bytes()
    for one in (cache, copied):
        one.reorder(torch.tensor([2, 0, 0]))
        one.append(tokens(800, 3, 3), tokens(800, 4, 3))
    assert pointers(cache) == before
    assert anonymous_bytes() - resident < 3 * cache.nbytes + 8 * MIB
    assert_same_state(cache, copied)
    cache.crop(1000)
    cache.repeat_interleave(2)
    assert cache.batch_size == 6 and cache.length == 1800
    cache.reset()
    cache.append(tokens(5, 1, 6), tokens(5, 2, 6))
    assert cache.length == 5


def test_a_ring_reserves_its_size(monkeypatch):
    chunks = 2000, 900, 1, 900, 900, 900
    options = {"window": 3000, "rollback_tokens": 40}
    cache, found = make(**options), []
    for seed, count in enumerate(chunks):
        cache.append(tokens(count, seed), tokens(count, seed + 50))
        found.append(pointers(cache))
    assert all(at == found[0] for at in found)
    assert cache.capacity == 3040 and all(room(t) == 3040 for t in packed(cache))
    copied = without_reserve(monkeypatch, *chunks, **options)
    assert_same_state(cache, copied)
    query = tokens(1, 9, heads=8)
    assert torch.equal(cache.attend(query), copied.attend(query))


def test_more_than_was_reserved(monkeypatch):
    """Then everything moves once, to eight times as much."""
    monkeypatch.setattr(storage, "_RESERVED_TOKENS", 1024)
    chunks = [500] * 60
    cache, found = make(), []
    for seed, count in enumerate(chunks):
        cache.append(tokens(count, seed), tokens(count, seed + 50))
        found.append(tuple(pointers(cache)))
    assert 2 <= len(set(found)) <= 4
    assert_same_state(cache, without_reserve(monkeypatch, *chunks))


@pytest.mark.parametrize("refusal", ["addresses", "too much", "no room at all"])
def test_where_addresses_cannot_be_reserved(refusal, monkeypatch):
    """Less of them, or none: the cache grows by copying."""
    if refusal == "addresses":
        monkeypatch.setattr(memory, "_addresses_are_free", lambda: False)
    elif refusal == "too much":
        monkeypatch.setattr(storage, "_RESERVED_TOKENS", 1 << 55)
    else:
        mapped = memory._mapped

        def refuse(specs, sparse=False):
            if sparse:
                raise OSError
            return mapped(specs)

        monkeypatch.setattr(memory, "_mapped", refuse)
    cache = filled(2000, 900)
    reserved = all(room(t) > 8 * cache.capacity for t in packed(cache))
    assert reserved == (refusal == "too much")
    monkeypatch.undo()
    assert_same_state(cache, filled(2000, 900))


def test_counted_addresses_are_left_alone(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 40, resource.RLIM_INFINITY))
    assert not memory._addresses_are_free.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(memory.Path, "read_text", lambda self: "2\n")
    assert not memory._addresses_are_free.__wrapped__()


def test_growing_under_inference_mode():
    with torch.inference_mode():
        cache = filled(2000, 900)
    cache.append(tokens(900, 2), tokens(900, 52))
    assert_same_state(cache, filled(2000, 900, 900))
