"""nbytes is what is allocated, and what is allocated stays below a dense cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.test_cache import KINDS, make, tokens
from tests.test_serialization import anonymous_bytes
from torch_kvq import QuantizedKVCache, memory
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
    """Small and mapped ones: shape, dtype, writable, and no file or process shares them."""
    for shape in ((3, 0, 5), (2, 3, 4), (3, 1, 1 << 15)):
        x = zeros(*shape, dtype=dtype)
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x.any()
        assert x.untyped_storage().nbytes() == x.numel() * x.itemsize
        x.fill_(1)
        assert x.clone().eq(1).all() and x[1:].eq(1).all()
    with torch.device("meta"):
        assert zeros(8, 1 << 15, dtype=dtype).device.type == "meta"
    compiled = torch.compile(
        lambda: zeros(8, 1 << 15, dtype=dtype), backend="eager", fullgraph=True
    )
    assert not compiled().any()


def test_a_growing_cache_stays_below_a_dense_one():
    """Step by step at 6.5 bits of bfloat16's 16: from 70 tokens on, with the slack of growth."""
    cache = QuantizedKVCache(1, 8, 128, k_format="int8", v_format="int4-rot", dtype=torch.bfloat16)
    key = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16)
    copied = 0
    for length in range(1, 2049):
        before = cache.capacity
        cache.append(key, key)
        copied += before if cache.capacity != before else 0
        dense = 2 * 8 * 128 * 2 * length
        assert length < 70 or cache.nbytes < dense
        assert length < 1024 or cache.nbytes < 0.5 * dense
    assert copied < 10 * 2048  # linear in the length


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
