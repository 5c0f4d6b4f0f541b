"""The contract of transformers' cache layers, method by method, on every kind of layer."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: E402

from tests.hf_helpers import (  # noqa: E402
    WINDOW,
    generate,
    prompt,
    tiny_config,
    tiny_model,
)
from torch_kvq.hf import CACHE_ARGUMENT, KVQCache, KVQLayer  # noqa: E402

ROLLBACK = 6
LAYERS = {
    "growing": {},
    "static": {"max_cache_len": 64},
    "ring": {"sliding_window": WINDOW},
    "static_ring": {"sliding_window": WINDOW, "max_cache_len": 64},
    "windows": {"sink_tokens": 2, "recent_tokens": 3},
}


def states(count: int, rows: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, rows, 2, count, 64, generator=generator)
    return key, value


@pytest.fixture(params=LAYERS)
def layer(request) -> KVQLayer:
    return make(request.param)


def make(kind: str, carrier: str = "tensor") -> KVQLayer:
    options = {"rollback_tokens": ROLLBACK, "carrier": carrier, **LAYERS[kind]}
    return KVQLayer("int8", "q4_0", **options)


def feed(layer: KVQLayer, count: int, device: str, rows: int = 2, seed: int = 0):
    return layer.update(*(x.to(device) for x in states(count, rows, seed)))


def dense_layer(layer: KVQLayer):
    return DynamicSlidingWindowLayer(layer.window) if layer.is_sliding else DynamicLayer()


def held(layer: KVQLayer) -> list[torch.Tensor]:
    """What attention can see: K and V of every valid position, and the length."""
    cache = layer.cache
    length = cache.length
    first = max(length - (layer.window if layer.is_sliding else length), 0)
    seen = [cache.dense(side, first, length - first) for side in "kv"]
    return [*seen, torch.tensor(length)]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


def test_update_returns_the_rows_it_announced(layer, device):
    """In the order of a dense layer, in whose place it stands."""
    dense = dense_layer(layer)
    for step, count in enumerate((5, 1, 4, 12, 1, 1)):
        rows, offset = layer.get_mask_sizes(count)
        expected, _ = dense.update(*(x.to(device) for x in states(count, seed=step)))
        keys, values = feed(layer, count, device, seed=step)
        assert keys.shape == (2, 2, rows, 64) and values.shape == keys.shape
        valid = slice(0, None) if layer.max_cache_len is None else slice(0, expected.shape[2])
        got = keys.dequantize()[:, :, valid] if layer.max_cache_len else keys.dequantize()
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) < 0.05  # int8
        assert offset + expected.shape[2] == int(layer.get_seq_length())


def test_get_seq_length(layer, device):
    assert layer.get_seq_length() == 0
    for total in (5, 6, 16, 17):
        feed(layer, total - int(layer.get_seq_length()), device)
        assert int(layer.get_seq_length()) == total
    assert isinstance(layer.get_seq_length(), torch.Tensor) == (layer.max_cache_len is not None)


def test_get_mask_sizes(layer, device):
    """What transformers' own layers announce, but for a static layer's unused slots."""
    dense = dense_layer(layer)
    for count in (1, 5):
        for step, appended in enumerate((0, 3, 1, 10)):
            if appended:
                feed(layer, appended, device, seed=step)
                dense.update(*(x.to(device) for x in states(appended, seed=step)))
            expected = (64, 0) if layer.max_cache_len and not layer.is_sliding else None
            if appended or expected:
                assert layer.get_mask_sizes(count) == (expected or dense.get_mask_sizes(count))
        layer.reset()
        dense = dense_layer(layer)


def test_get_max_length(layer):
    expected = {"growing": -1, "static": 64, "ring": WINDOW, "static_ring": WINDOW, "windows": -1}
    assert layer.get_max_length() == expected[kind_of(layer)]


def kind_of(layer: KVQLayer) -> str:
    given = {"sliding_window": layer.window or None, "max_cache_len": layer.max_cache_len}
    given |= {name: layer.options.get(name) for name in ("sink_tokens", "recent_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    return next(kind for kind, options in LAYERS.items() if options == given)


def check_goes_on(layer: KVQLayer, device: str) -> None:
    """After the 20 tokens of seed 0: one more leaves what it leaves where nothing was cropped."""
    twin = make(kind_of(layer))
    feed(twin, 20, device)
    for each in (layer, twin):
        feed(each, 1, device, seed=2)
    assert same(held(layer), held(twin))


def test_crop(layer, device):
    """Exact: as if the tokens had never been; and only what has been and is still held."""
    layer.crop(0)  # nothing there yet
    feed(layer, 20, device)
    before = held(layer)
    feed(layer, 4, device, seed=1)
    layer.crop(torch.tensor(-4))  # as transformers 5.14 does
    assert same(held(layer), before)
    layer.crop(0)
    assert same(held(layer), before)
    with pytest.raises(ValueError, match=r"\[kvq.crop\] expected a negative number .* got 3"):
        layer.crop(3)
    with pytest.raises((IndexError, RuntimeError), match=r"\[kvq.crop\] cannot drop 21 tokens"):
        layer.crop(-21)
    assert same(held(layer), before)
    check_goes_on(layer, device)


def test_reset(layer, device):
    feed(layer, 20, device)
    pointer = layer.cache.k_codes.data_ptr()
    layer.reset()
    assert int(layer.get_seq_length()) == 0
    again = make(kind_of(layer))
    for one in (layer, again):
        feed(one, 7, device, seed=3)
    assert same(held(layer), held(again))
    if layer.is_compileable:  # compiled code holds on to the storage
        assert layer.cache.k_codes.data_ptr() == pointer


def test_reorder_cache(layer, device):
    feed(layer, 20, device, rows=3)
    pointer = layer.cache.k_codes.data_ptr()
    keys, values, length = held(layer)
    order = torch.tensor([2, 0, 2])
    layer.reorder_cache(order.to(device))
    assert same(held(layer), [keys[order], values[order], length])
    if layer.is_compileable:
        assert layer.cache.k_codes.data_ptr() == pointer


def test_batch_repeat_interleave(layer, device):
    feed(layer, 20, device)
    keys, values, length = held(layer)
    layer.batch_repeat_interleave(3)
    assert layer.batch_size == 6
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    assert same(held(layer), [keys[rows], values[rows], length])
    feed(layer, 1, device, rows=6)


def test_batch_select_indices(layer, device):
    feed(layer, 20, device, rows=4)
    keys, values, length = held(layer)
    layer.batch_select_indices(torch.tensor([3, 1], device=device))
    assert layer.batch_size == 2
    assert same(held(layer), [keys[[3, 1]], values[[3, 1]], length])
    chosen = torch.tensor([False, True], device=device)
    layer.batch_select_indices(chosen)
    assert same(held(layer), [keys[[1]], values[[1]], length])
    feed(layer, 1, device, rows=1)


def test_methods_before_the_first_update(layer):
    layer.reset()
    layer.crop(0)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.offload()
    layer.prefetch()
    assert not layer.is_initialized and layer.get_seq_length() == 0


def test_is_compileable(layer):
    assert layer.is_compileable == (layer.max_cache_len is not None)
    config = tiny_config("gemma3")
    assert not KVQCache(config).is_compileable
    assert KVQCache(config, max_cache_len=32).is_compileable


def test_is_croppable(layer):
    assert layer.is_croppable
    assert KVQCache(tiny_config("gemma3")).is_croppable


def test_activate_past_recording(layer, device):
    """From then on crop goes back over everything since the last crop, however much that is."""
    feed(layer, 20, device)
    layer.activate_past_recording()
    before = held(layer)
    for step in range(3):
        feed(layer, ROLLBACK, device, seed=step)
    if layer.max_cache_len is not None and layer.is_sliding:
        with pytest.raises(RuntimeError, match=r"overwritten; give the cache more rollback_tokens"):
            layer.crop(-3 * ROLLBACK)
        return
    layer.crop(-3 * ROLLBACK)
    assert same(held(layer), before)
    check_goes_on(layer, device)


def test_offload_and_prefetch(layer, device):
    feed(layer, 20, device)
    before = held(layer)
    layer.offload()
    assert layer.cache.device.type == "cpu"
    layer.prefetch()
    assert layer.cache.device.type == device
    assert same(held(layer), before)


def test_early_initialization(device):
    """As export needs it: storage before the first token."""
    cache = KVQCache(tiny_config("gemma3"), "int8", max_cache_len=32)
    cache.early_initialization(2, 2, 64, torch.bfloat16, torch.device(device))
    assert cache.is_initialized and cache.batch_size == 2
    assert [layer.cache.dtype for layer in cache.layers] == [torch.bfloat16] * 2
    assert int(cache.get_seq_length()) == 0


def test_many_drafted_tokens(device):
    """Prompt lookup with more candidates than a ring's rollback: nothing is lost."""
    model = tiny_model("mistral", device)
    inputs = prompt(length=24, device=device)
    inputs["input_ids"][:, 12:] = inputs["input_ids"][:, :12]
    plain = generate(model, inputs, KVQCache(model.config, "int8"), "kvq", max_new_tokens=30)
    cache = KVQCache(model.config, "int8", rollback_tokens=2)
    options = {"prompt_lookup_num_tokens": 10, "max_new_tokens": 30}
    assert torch.equal(generate(model, inputs, cache, "kvq", **options), plain)


def test_output_holds_the_cache(device):
    model = tiny_model("llama", device)
    cache = KVQCache(model.config)
    out = model(prompt(device=device)["input_ids"], **{CACHE_ARGUMENT: cache}, use_cache=True)
    assert getattr(out, CACHE_ARGUMENT) is cache
