"""nbytes is what is allocated, and what is allocated stays below a dense cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_cache import KINDS, make, tokens
from tests.test_serialization import anonymous_bytes
from torch_kvq import KVFormat, QuantizedKVCache, memory, ops
from torch_kvq.memory import zeros

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "memory.json"


def allocated(fn: Callable[[], object]) -> tuple[int, object]:
    """Bytes that a call allocates on the CPU and does not free, and what it returns."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = fn()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), kept


@pytest.mark.parametrize(
    "k_format,v_format", [("int8", "int4-rot"), ("tq3", "q4_0"), ("none",) * 2]
)
@pytest.mark.parametrize("kind", KINDS)
def test_nbytes_is_what_is_allocated(kind, k_format, v_format, monkeypatch):
    """After a prompt, a chunk and steps that make it grow; the allocator is asked."""
    monkeypatch.setattr(memory, "MAPPED_BYTES", 1 << 40)  # which does not count mapped pages
    key, value = tokens(60), tokens(60, 1)
    shared = ops.default_signs(64, torch.device("cpu")).data_ptr()  # by all growing caches

    def fill() -> QuantizedKVCache:
        options = {**KINDS[kind], **({"capacity": 64} if "capacity" in KINDS[kind] else {})}
        cache = make("cpu", k_format=k_format, v_format=v_format, dtype=torch.float32, **options)
        for start, end in ((0, 30), (30, 37), *((i, i + 1) for i in range(37, 60))):
            cache.append(key[:, :, start:end], value[:, :, start:end])
        return cache

    net, cache = allocated(fill)
    assert isinstance(cache, QuantizedKVCache) and cache.length == 60
    assert cache.nbytes == net
    storages = {b.untyped_storage().data_ptr(): b.untyped_storage() for b in cache.buffers()}
    storages.pop(shared, None)
    assert cache.nbytes == sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("max_cache_len", [None, 64])
def test_nbytes_of_a_model_cache(max_cache_len):
    """Full, sliding, exact and transformers' own layers."""
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    from tests.test_serialization_hf import build, generate, prompt
    from torch_kvq.hf import KVQCache, KVQLayer

    for name in ("gemma2", "qwen3_next") if max_cache_len is None else ("gemma2",):
        model = build(name, "cpu")
        cache = KVQCache(model.config, "int8", skip_layers=[0], max_cache_len=max_cache_len)
        empty = cache.nbytes
        generate(model, prompt(model), cache)
        total = 0
        for layer in cache.layers:
            held = layer.cache.buffers() if isinstance(layer, KVQLayer) else []
            if not isinstance(layer, KVQLayer):
                states = (layer.conv_states, layer.recurrent_states)
                held = [t for s in states for t in (s.values() if isinstance(s, dict) else s)]
            total += sum(t.untyped_storage().nbytes() for t in held)
        assert cache.nbytes == total > empty


def test_unused_capacity_is_not_resident():
    """On the CPU a static cache takes memory as it fills; nbytes is what it may take."""
    before = anonymous_bytes()
    cache = QuantizedKVCache(1, 8, 128, k_format="int8", capacity=1 << 16)
    assert cache.nbytes > 140 << 20
    assert anonymous_bytes() - before < 8 << 20
    key = torch.randn(1, 8, 1 << 13, 128)
    cache.append(key, key)
    packed = sum(t[:, :, : 1 << 13].nbytes for t in (*cache.keys, *cache.values))
    assert packed <= anonymous_bytes() - before < packed + key.nbytes + (24 << 20)
    assert not cache.k_codes[:, :, 1 << 13 :].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.bfloat16])
def test_zeros(dtype):
    """Small and mapped ones: shape, dtype, writable, storages of their own, no file, no process."""
    for shapes in (((3, 0, 5), (2, 3, 4)), ((3, 1, 1 << 15), (2, 0, 1), (7, 3), (5, 1 << 10))):
        made = zeros(*((shape, dtype) for shape in shapes))
        for x, shape in zip(made, shapes, strict=True):
            assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x.any()
            assert x.untyped_storage().nbytes() == x.numel() * x.itemsize
            assert x.data_ptr() % 64 == 0 and x.storage_offset() == 0 and not x._is_view()
        for number, x in enumerate(made):
            x.fill_(number + 1)
        for number, x in enumerate(made):
            assert x.clone().eq(number + 1).all() and x[1:].eq(number + 1).all()
    with torch.device("meta"):
        assert zeros(((8, 1 << 15), dtype))[0].device.type == "meta"
    compiled = torch.compile(
        lambda: zeros(((8, 1 << 15), dtype))[0], backend="eager", fullgraph=True
    )
    assert not compiled().any()


GROUPED = ("int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2")
ALL = [*(f"{name}-g{group}" for name in GROUPED for group in (32, 64, 128))]
ALL += ["int4-g32-rot", "int8-rot", "q8_0", "q4_0", "tq2", "tq3", "tq4", "tq5", "tq6", "tq8"]


@pytest.mark.parametrize("k_format", ALL)
def test_a_growing_cache_is_never_above_a_dense_one(k_format):
    """At every length from 1 on, every packed format, every head size, one KV head: what is
    allocated, room to grow included, is below what DynamicCache holds."""
    fmt = KVFormat.parse(k_format)
    multiple = fmt.group_size or fmt.layout.multiple
    for size in (d for d in (64, 80, 96, 128, 192, 256) if d % multiple == 0):
        for v_format in {k_format, "tq4"}:
            cache = QuantizedKVCache(
                1, 1, size, k_format=k_format, v_format=v_format, dtype=torch.bfloat16
            )
            assert cache.nbytes == 0
            token = torch.zeros(1, 1, 1, size, dtype=torch.bfloat16)
            moved = 0
            for length in range(1, 301):
                before = cache.capacity
                cache.append(token, token)
                moved += before if cache.capacity != before else 0
                assert cache.nbytes <= 2 * 2 * size * length, (size, v_format, length)
            assert moved < 4 * 300  # growing copies little


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    k_format=st.sampled_from(ALL[1:2] + ALL[-8:]),
    v_format=st.sampled_from(["int4-g64-rot", "q4_0", "tq3", "none"]),
    batch=st.integers(1, 3),
)
def test_chunks_and_crops_stay_below_a_dense_cache(chunks, k_format, v_format, batch):
    """Whatever comes at once, also next to values that are not packed at all."""
    cache = QuantizedKVCache(
        batch, 2, 64, k_format=k_format, v_format=v_format, dtype=torch.bfloat16
    )
    for count in chunks:
        token = torch.zeros(batch, 2, count, 64, dtype=torch.bfloat16)
        cache.append(token, token)
        assert cache.nbytes <= batch * 2 * 2 * 2 * 64 * cache.length


def test_where_a_cache_is_above_a_dense_one():
    """By no more than this: tokens that are not packed at all grow by an eighth, exact windows are
    kept beside the packed tokens, means are float32 rows, a short ring has rollback_tokens more."""
    token = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    row = 2 * 2 * 128
    options = {"k_format": "int8", "v_format": "int4-rot", "dtype": torch.bfloat16}
    plain = QuantizedKVCache(1, 1, 128, **{**options, "k_format": "none", "v_format": "none"})
    windows = QuantizedKVCache(
        1, 1, 128, **options, sink_tokens=4, recent_tokens=32, rollback_tokens=16
    )
    means = QuantizedKVCache(1, 1, 128, **options, k_mean=torch.zeros(1, 128))
    ring = QuantizedKVCache(1, 1, 128, **options, window=64)
    for length in range(1, 301):
        for cache in (plain, windows, means, ring):
            cache.append(token, token)
        assert plain.nbytes <= row * (length + length // 8)
        assert windows.nbytes <= row * (length + 52)
        assert length < 150 or windows.nbytes < row * length
        assert means.nbytes <= row * length + 4 * 128
        assert length < 5 or means.nbytes < row * length
        assert ring.nbytes <= row * min(length, 63)  # what a dense sliding layer holds


def test_a_long_cache_grows_by_an_eighth():
    cache = QuantizedKVCache(1, 8, 128, k_format="int8", v_format="int4-rot", dtype=torch.bfloat16)
    key = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16)
    copied = 0
    for length in range(1, 2049):
        before = cache.capacity
        cache.append(key, key)
        copied += before if cache.capacity != before else 0
        dense = 2 * 8 * 128 * 2 * length
        assert length < 1024 or cache.nbytes < 0.5 * dense
    assert copied < 10 * 2048  # linear in the length


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_a_model_cache_is_never_above_dynamic_cache(name):
    """Against transformers' own, layer for layer, token by token from the first on."""
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    from transformers import DynamicCache

    from tests.hf_helpers import tiny_config
    from torch_kvq.hf import KVQCache

    config = tiny_config(name)
    config.dtype = torch.bfloat16
    caches = KVQCache(config, rollback_tokens=1), DynamicCache(config=config)
    token = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    for length in range(1, 301):
        for cache in caches:
            for layer in range(len(cache.layers)):
                cache.update(token, token, layer)
        held = [t for layer in caches[1].layers for t in (layer.keys, layer.values)]
        assert caches[0].nbytes <= sum(t.nbytes for t in held), length


def test_the_measured_peaks_stay_below_the_dense_caches():
    """What benchmarks/memory.py measured and docs/ shows."""
    found = json.loads(RESULTS.read_text())
    peaks = {(p["cache"], p["tokens"]): p["peak_bytes"] for p in found["points"]}
    lengths = sorted({length for _, length in peaks})
    assert lengths == [1024 * 2**i for i in range(6)]
    for (name, length), peak in peaks.items():
        if name.startswith(("int", "tq")):
            dense = [peaks[kind, length] for kind in ("DynamicCache", "StaticCache")]
            assert peak < min(dense), (name, length)
    assert RESULTS.with_suffix(".svg").is_file()
