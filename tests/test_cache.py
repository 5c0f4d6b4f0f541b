"""QuantizedKVCache: what it holds, what attention reads from it, and exact rollback."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from torch_kvq import KVFormat, QuantizedKVCache, ops, reference
from torch_kvq.codebooks import hadamard_signs

B, G, H, D = 2, 2, 4, 64


def tokens(count: int, seed: int = 0, heads: int = G, size: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, heads, count, size, generator=generator)


def make(device: str, **options) -> QuantizedKVCache:
    return QuantizedKVCache(
        B, G, D, device=device, **{"k_format": "int8", "v_format": "int4-rot", **options}
    )


def append(cache: QuantizedKVCache, key: torch.Tensor, value: torch.Tensor):
    return cache.append(key.to(cache.device), value.to(cache.device))


def decoded(x: torch.Tensor, spec: str, side: str) -> torch.Tensor:
    """What a cache of this format returns for x, from the reference."""
    fmt = KVFormat.parse(spec)
    signs = hadamard_signs(x.shape[-1]) if fmt.rotate else None
    encoder = "unbiased" if side == "k" and fmt.family == "turboquant" else "default"
    return reference.qdq(x, fmt.name, fmt.group_size, signs=signs, encoder=encoder)


def dense_attention(query, key, value, **options) -> torch.Tensor:
    empty = key.new_empty(*key.shape[:3], 0)
    out, _ = reference.attention(
        query, key, empty, empty, value, empty, empty, key.shape[2], "none", 0, "none", 0, **options
    )
    return out


def state(cache: QuantizedKVCache) -> list[torch.Tensor]:
    """The packed rows of the valid tokens that a query may still see, oldest first."""
    length = cache.length
    first = max(0, length - cache.window) if cache.ring else 0
    slots = torch.arange(first, length) % max(cache.capacity, 1)
    return [t.cpu()[:, :, slots] for t in (*cache.keys, *cache.values)]


def assert_same_state(a: QuantizedKVCache, b: QuantizedKVCache) -> None:
    assert a.length == b.length
    for x, y in zip(state(a), state(b), strict=True):
        assert torch.equal(x, y)


KINDS = {
    "growing": {"block_size": 4},
    "static": {"capacity": 64},
    "ring": {"window": 8, "rollback_tokens": 6},
    "static_ring": {"window": 8, "rollback_tokens": 6, "capacity": 64},
    "windows": {"sink_tokens": 3, "recent_tokens": 5, "rollback_tokens": 6, "block_size": 4},
    "static_windows": {
        "sink_tokens": 3,
        "recent_tokens": 5,
        "rollback_tokens": 6,
        "capacity": 64,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_decode_matches_the_dequantised_values(kind, device):
    """Token by token after a prefill, attention equals dense attention on what the cache holds."""
    cache = make(device, **KINDS[kind])
    key, value = tokens(20), tokens(20, 1)
    append(cache, key[:, :, :6], value[:, :, :6])
    window = cache.window
    sink, recent = cache.sink_tokens, cache.recent_tokens
    for step in range(6, 20):
        append(cache, key[:, :, step : step + 1], value[:, :, step : step + 1])
        query = tokens(1, 100 + step, heads=H)
        out = cache.attend(query.to(device)).cpu()
        position = torch.arange(step + 1)
        exact = (position < sink) | (position > step - recent)
        stored = [
            torch.where(exact[:, None], x[:, :, : step + 1], decoded(x[:, :, : step + 1], f, s))
            for x, f, s in ((key, "int8", "k"), (value, "int4-rot", "v"))
        ]
        expected = dense_attention(query, *stored, window=window)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["growing", "static_ring", "windows"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_of_other_dtypes(cache_dtype, kind, device):
    """They are quantised as they are, in the cache's scales; attention's dtype is the query's."""
    key, value = tokens(9), tokens(9, 1).bfloat16()
    cache = make(device, dtype=cache_dtype, **KINDS[kind])
    for start, end in ((0, 6), (6, 8), (8, 9)):
        view = append(cache, key[:, :, start:end], value[:, :, start:end])
        query = tokens(end - start, 2, heads=H).to(cache_dtype)
        assert cache.attend(query.to(device), view).dtype == cache_dtype
    scales = cache.scale_dtype
    packed = (
        ops.quantize(key, "int8", scale_dtype=scales),
        ops.quantize(value, "int4-rot", scale_dtype=scales),
    )
    slots = torch.arange(9) % cache.capacity
    for side, expected in zip((cache.keys, cache.values), packed, strict=True):
        for held, wanted in zip(side, expected, strict=True):
            assert torch.equal(held.cpu()[:, :, slots], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_attends_to_the_exact_tokens(kind, device):
    cache = make(device, **KINDS[kind])
    key, value, query = tokens(20), tokens(20, 1), tokens(20, 2, heads=H)
    view = append(cache, key, value)
    assert view.fresh
    out = cache.attend(query.to(device), view).cpu()
    expected = dense_attention(query, key, value, window=cache.window)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["ring", "static_ring"])
def test_a_chunk_longer_than_the_ring_sees_its_whole_window(kind, device):
    cache = make(device, **KINDS[kind])
    key, value = tokens(40), tokens(40, 1)
    append(cache, key[:, :, :10], value[:, :, :10])
    view = append(cache, key[:, :, 10:], value[:, :, 10:])
    query = tokens(30, 2, heads=H)
    out = cache.attend(query.to(device), view).cpu()
    stored = decoded(key, "int8", "k"), decoded(value, "int4-rot", "v")
    expected = dense_attention(query, *stored, window=8)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)
    assert cache.capacity == 14
    with pytest.raises(ValueError, match=r"\[kvq.attend\] 30 queries reach further back"):
        cache.attend(query.to(device))


@pytest.mark.parametrize("capacity", [None, 64])
def test_a_chunk_longer_than_the_ring_sees_its_recent_tokens_exact(capacity, device):
    """As a cache that keeps every token packed, with the same recent ones exact."""
    ring = make(device, window=8, rollback_tokens=6, capacity=capacity, recent_tokens=5)
    everything = make(device, recent_tokens=5)
    for number, count in enumerate((4, 17, 12, 1)):
        key, value = tokens(count, number), tokens(count, 10 + number)
        views = [append(cache, key, value) for cache in (ring, everything)]
        query = tokens(count, 20 + number, heads=H).to(device)
        out = ring.attend(query, views[0])
        expected = everything.attend(query, views[1], window=8)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)
    assert ring.length == 34 and ring.capacity == 14


def random_edits(draw_steps, limit: int):
    """(appended count, cropped count) pairs that a cache of these limits accepts."""
    return st.lists(
        st.tuples(st.integers(1, draw_steps), st.integers(0, limit)), min_size=1, max_size=6
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(edits=random_edits(5, 5), seed=st.integers(0, 3))
def test_rollback_leaves_no_trace(kind, edits, seed, device):
    """append, crop, append, ... equals one append of the tokens that were kept: bytes, outputs."""
    cache = make(device, **KINDS[kind])
    kept_key, kept_value = tokens(0), tokens(0)
    for number, (count, dropped) in enumerate(edits):
        key, value = tokens(count, 10 * seed + number), tokens(count, 1000 + number)
        append(cache, key, value)
        kept_key, kept_value = (
            torch.cat([old, new], 2) for old, new in ((kept_key, key), (kept_value, value))
        )
        dropped = min(dropped, count)
        cache.crop(dropped)
        left = kept_key.shape[2] - dropped
        kept_key, kept_value = kept_key[:, :, :left], kept_value[:, :, :left]
    fresh = make(device, **KINDS[kind])
    append(fresh, kept_key, kept_value)
    assert_same_state(cache, fresh)
    # One more token, so that both are read.
    for each in (cache, fresh):
        append(each, tokens(1, 77), tokens(1, 78))
    query = tokens(1, 79, heads=H).to(device)
    assert torch.equal(cache.attend(query), fresh.attend(query))
    assert_same_state(cache, fresh)


def test_rollback_past_the_ring_is_refused_unchanged(device):
    for kind in ("ring", "windows"):
        cache = make(device, **KINDS[kind])
        append(cache, tokens(30), tokens(30, 1))
        before = state(cache)
        with pytest.raises(RuntimeError, match=r"\[kvq.crop\] cannot drop 12 tokens.*rollback"):
            cache.crop(12)
        assert cache.length == 30
        assert all(map(torch.equal, before, state(cache)))
        cache.crop(5)
        assert cache.length == 25


def test_crop_errors(device):
    cache = make(device)
    append(cache, tokens(4), tokens(4, 1))
    with pytest.raises(IndexError, match=r"\[kvq.crop\] cannot drop 5 tokens of 4"):
        cache.crop(5)
    with pytest.raises(IndexError, match=r"must not be negative, got -1"):
        cache.crop(-1)
    assert cache.length == 4


def test_static_overflow_is_refused_unchanged(device):
    cache = make(device, capacity=8)
    append(cache, tokens(6), tokens(6, 1))
    before = state(cache)
    with pytest.raises(IndexError, match=r"\[kvq.append\] 6 tokens \+ 3 exceed the capacity 8"):
        append(cache, tokens(3), tokens(3))
    assert cache.length == 6
    assert all(map(torch.equal, before, state(cache)))


def test_append_errors(device):
    cache = make(device)
    for key, value, message in (
        (tokens(2, heads=4), tokens(2), r"key must be \[2, 2, 2, 64\], got \[2, 4, 2, 64\]"),
        (tokens(2), tokens(3), r"value must be \[2, 2, 2, 64\], got \[2, 2, 3, 64\]"),
        (tokens(2, size=32), tokens(2), r"key must be .* got \[2, 2, 2, 32\]"),
    ):
        with pytest.raises(ValueError, match=rf"\[kvq.append\] {message}"):
            append(cache, key, value)
    assert cache.length == 0


@pytest.mark.parametrize(
    "options,message",
    [
        ({"k_format": "int5"}, r"unknown format 'int5'"),
        ({"k_format": "int4-g48"}, r"group_size must be 32, 64 or 128, got 48"),
        ({"k_format": "int4-g128"}, r"needs head_dim to be a positive multiple of 128, got 64"),
        ({"window": -1}, r"window must not be negative, got -1"),
        ({"window": 4, "sink_tokens": 1}, r"sink_tokens leave a sliding window"),
        ({"dtype": torch.float64}, r"dtype must be float32, float16 or bfloat16"),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make("cpu", **options)


def test_update_returns_dequantised_tokens(device):
    for kind in ("growing", "ring", "windows"):
        cache = make(device, **KINDS[kind])
        key, value = tokens(12), tokens(12, 1)
        append(cache, key[:, :, :9], value[:, :, :9])
        got = cache.update(key[:, :, 9:].to(device), value[:, :, 9:].to(device))
        position = torch.arange(12)
        exact = (position < cache.sink_tokens) | (position >= 12 - cache.recent_tokens)
        for x, spec, side, ours in ((key, "int8", "k", got[0]), (value, "int4-rot", "v", got[1])):
            expected = torch.where(exact[:, None], x, decoded(x, spec, side))
            assert torch.equal(ours.cpu(), expected[:, :, -ours.shape[2] :])


def test_rows_of_different_lengths(device):
    """Right-padded rows: what lies beyond a row's length never matters."""
    cache = make(device, capacity=16)
    key, value = tokens(6), tokens(6, 1)
    lengths = torch.tensor([6, 4], device=device)
    cache.append(key.to(device), value.to(device), lengths=lengths)
    append(cache, tokens(1, 5), tokens(1, 6))
    query = tokens(1, 2, heads=H)
    out = cache.attend(query.to(device)).cpu()
    for row, length in enumerate((6, 4)):
        k = torch.cat([key[row : row + 1, :, :length], tokens(1, 5)[row : row + 1]], 2)
        v = torch.cat([value[row : row + 1, :, :length], tokens(1, 6)[row : row + 1]], 2)
        stored = decoded(k, "int8", "k"), decoded(v, "int4-rot", "v")
        expected = dense_attention(query[row : row + 1], *stored)
        torch.testing.assert_close(out[row : row + 1], expected, rtol=2e-5, atol=2e-6)
    with pytest.raises(ValueError, match="rows of different lengths need a static capacity"):
        make(device).append(key.to(device), value.to(device), lengths=lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_reorder_select_repeat(kind, device):
    cache = make(device, **KINDS[kind])
    append(cache, tokens(9), tokens(9, 1))
    before = state(cache)
    cache.reorder(torch.tensor([1, 1]))
    assert all(torch.equal(a[[1, 1]], b) for a, b in zip(before, state(cache), strict=True))
    cache.repeat_interleave(2)
    assert cache.batch_size == 4
    cache.select(torch.tensor([0, 3]))
    assert cache.batch_size == 2
    assert all(torch.equal(a[[1, 1]], b) for a, b in zip(before, state(cache), strict=True))
    append(cache, tokens(1, 3), tokens(1, 4))
    assert cache.length == 10


def test_nbytes_counts_what_is_allocated(device):
    cache = QuantizedKVCache(1, 2, 128, k_format="int4", capacity=100, dtype=torch.bfloat16)
    row = 64 + 2 * (2 + 2)  # codes, then two groups' float16 scales and biases
    assert cache.nbytes == 2 * 2 * 100 * row + 8
    growing = make(device)
    empty = growing.nbytes
    append(growing, tokens(10), tokens(10))
    assert growing.nbytes > empty


def test_half_and_to_do_not_damage_it(device):
    cache = make(device, k_mean=torch.ones(G, D))
    append(cache, tokens(5), tokens(5, 1))
    before = state(cache)
    dtypes = [b.dtype for b in cache.buffers()]
    module = torch.nn.Sequential(cache)
    module.half().bfloat16().float().to(device)
    assert [b.dtype for b in cache.buffers()] == dtypes
    assert all(map(torch.equal, before, state(cache)))
    assert not module.state_dict()


def test_means_are_free(device):
    """A large per-channel offset costs no accuracy when it is the mean."""
    offset = 20 * torch.randn(G, D, generator=torch.Generator().manual_seed(3))
    key, value, query = tokens(40), tokens(40, 1), tokens(1, 2, heads=H)
    plain, centred = make(device, k_format="int4"), make(device, k_format="int4", k_mean=offset)
    append(plain, key, value)
    append(centred, key + offset[:, None], value)
    torch.testing.assert_close(
        centred.attend(query.to(device)), plain.attend(query.to(device)), rtol=1e-4, atol=1e-5
    )


def test_reset_and_repr(device):
    cache = make(device, capacity=8, recent_tokens=2)
    append(cache, tokens(8), tokens(8))
    cache.reset()
    assert cache.length == 0
    append(cache, tokens(8, 4), tokens(8, 5))
    assert repr(cache) == (
        "QuantizedKVCache(2, 2, 64, k=int8-g64, v=int4-g64-rot, dtype=torch.float32, "
        "capacity=8, recent_tokens=2)"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_caches(dtype, device):
    cache = make(device, dtype=dtype)
    key, value = tokens(30).to(dtype), tokens(30, 1).to(dtype)
    append(cache, key, value)
    assert cache.k_scales.dtype == torch.float16
    query = tokens(1, 2, heads=H).to(dtype)
    out = cache.attend(query.to(device)).cpu()
    assert out.dtype == dtype
    stored = [x.float().cpu() for x in cache.dequantized()]
    expected = dense_attention(query.float(), *stored)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=1e-2)


def test_different_value_size(device):
    cache = QuantizedKVCache(B, G, D, value_dim=128, k_format="int8", v_format="tq4", device=device)
    key, value, query = tokens(10), tokens(10, 1, size=128), tokens(1, 2, heads=H)
    append(cache, key, value)
    out = cache.attend(query.to(device)).cpu()
    expected = dense_attention(query, decoded(key, "int8", "k"), decoded(value, "tq4", "v"))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["static", "static_ring", "static_windows"])
def test_compiles_to_one_graph(kind, device):
    """A static cache's step compiles once, and gives eager's bytes and outputs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, eager = make(device, **KINDS[kind]), make(device, **KINDS[kind])

    @torch.compile(fullgraph=True, backend=counter)
    def step(query, key, value):
        return compiled.attend(query, compiled.append(key, value))

    for cache in (compiled, eager):
        append(cache, tokens(5), tokens(5, 1))
    for number in range(12):
        query, key, value = (
            tokens(1, 10 * number + i, heads=h).to(device) for i, h in ((0, H), (1, G), (2, G))
        )
        ours = step(query, key, value)
        assert torch.equal(ours, eager.attend(query, eager.append(key, value)))
    assert counter.frame_count == 1
    assert_same_state(compiled, eager)


def test_compiled_steps_past_the_capacity(device):
    """On the CPU the step that does not fit is refused; on MPS, which no step waits for, the cache
    says so when it is asked next. Nothing that was stored is lost."""
    torch._dynamo.reset()
    cache, full = make(device, capacity=6), make(device, capacity=6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, key, value):
        return cache.attend(query, cache.append(key, value))

    def inputs(seed):
        return [tokens(1, seed + i, heads=h).to(device) for i, h in ((0, H), (1, G), (2, G))]

    for each in (cache, full):
        append(each, tokens(5), tokens(5, 1))
    step(*inputs(10))
    full.append(*inputs(10)[1:])
    if device == "cpu":
        with pytest.raises(IndexError, match=r"position 6 \+ 1 tokens exceed the capacity 6"):
            step(*inputs(20))
    else:
        for seed in (20, 30):
            step(*inputs(seed))
        message = r"compiled steps went on to 8 tokens; those past the capacity 6 were not stored"
        for ask in (lambda: cache.length, lambda: cache.append(*inputs(40)[1:])):
            with pytest.raises(IndexError, match=message):
                ask()
        cache.crop(2)
    assert_same_state(cache, full)
    with pytest.raises(IndexError, match=r"6 tokens \+ 1 exceed the capacity 6"):
        cache.append(*inputs(50)[1:])
    cache.crop(1)
    full.crop(1)
    assert torch.equal(step(*inputs(60)), full.attend(inputs(60)[0], full.append(*inputs(60)[1:])))


def test_ops_and_cache_agree(device):
    """append_ by hand on the cache's buffers equals append."""
    cache = make(device, capacity=8)
    append(cache, tokens(3), tokens(3, 1))
    by_hand = make(device, capacity=8)
    ops.append_(
        by_hand.keys,
        by_hand.values,
        tokens(3).to(device),
        tokens(3, 1).to(device),
        0,
        "int8",
        "int4-rot",
    )
    for a, b in zip((*cache.keys, *cache.values), (*by_hand.keys, *by_hand.values), strict=True):
        assert torch.equal(a, b)
