"""transformers: what the matrix of tests/test_hf_matrix.py does not ask."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import DynamicCache  # noqa: E402

from tests.hf_helpers import (  # noqa: E402
    TINY,
    WINDOW,
    dense_implementation,
    generate,
    prompt,
    tiny_config,
    tiny_model,
    tokens,
)
from torch_kvq.hf import CACHE_ARGUMENT, KVQCache, fit_group, use  # noqa: E402


@pytest.fixture(scope="module")
def llama(device):
    return tiny_model("llama", device)


@pytest.fixture(scope="module")
def mistral(device):
    return tiny_model("mistral", device)


def layer_state(cache: KVQCache) -> list[torch.Tensor]:
    return [buffer.clone() for layer in cache.layers for buffer in layer.cache.buffers()]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_plain_cache_under_our_attention(name, device):
    """A dense cache with attn_implementation="kvq" gives what the dense implementation gives."""
    model = tiny_model(name, device)
    for inputs in (prompt(device=device), prompt(rows=3, padded=True, device=device)):
        for options in ({}, {"prefill_chunk_size": 7}):
            results = [
                generate(model, inputs, DynamicCache(config=model.config), attention, **options)
                for attention in ("kvq", dense_implementation(model))
            ]
            assert torch.equal(*results)


def test_a_handle_under_another_attention_is_refused(llama, device):
    for implementation in ("sdpa", "eager"):
        cache = KVQCache(llama.config, "int8", carrier="handle")
        with pytest.raises(TypeError, match=r"\[kvq.hf\].*attn_implementation=\"kvq\""):
            generate(llama, prompt(device=device), cache, implementation)
    with pytest.raises(ValueError, match=r"\[kvq.hf\] carrier must be one of .* got 'view'"):
        KVQCache(llama.config, carrier="view")


def test_the_carrier_follows_the_attention_implementation(llama, device):
    inputs = prompt(device=device)
    results = [generate(llama, inputs, KVQCache(llama.config), name) for name in ("kvq", "sdpa")]
    assert torch.equal(*results)


def test_use_makes_generate_quantise(device):
    model = tiny_model("llama", device)
    inputs = prompt(device=device)
    expected = generate(model, inputs, KVQCache(model.config, "int8"), "kvq")
    assert use(model, "int8") is model
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    for none_given in ({}, {CACHE_ARGUMENT: None}, {"past_key_values": None}):
        out = model.generate(**inputs, **options, return_dict_in_generate=True, **none_given)
        assert isinstance(getattr(out, CACHE_ARGUMENT), KVQCache)
        assert torch.equal(out.sequences, expected)
    mine = KVQCache(model.config, "int8")
    assert torch.equal(model.generate(**inputs, **options, **{CACHE_ARGUMENT: mine}), expected)
    assert mine.get_seq_length() == expected.shape[1] - 1


def test_refused_models():
    with pytest.raises(ValueError, match=r"\[kvq.hf\] encoder-decoder"):
        KVQCache(transformers.T5Config())
    for config in (transformers.DeepseekV2Config(), transformers.DeepseekV3Config()):
        with pytest.raises(ValueError, match=r"\[kvq.hf\] deepseek_v\d uses multi-head latent"):
            KVQCache(config)


def test_misuse_is_refused_with_a_sentence(llama, device):
    """When the cache is made, where it can be known then."""
    config = llama.config
    for error, make, message in (
        (ValueError, lambda: KVQCache(config, "int7"), r"unknown format 'int7'"),
        (ValueError, lambda: KVQCache(config, layer_formats={0: ("int8", "q4")}), r"format 'q4'"),
        (ValueError, lambda: KVQCache(config, max_cache_len=0), r"must be a positive int .* got 0"),
        (ValueError, lambda: KVQCache(config, max_cache_len=12.5), r"max_cache_len .* got 12.5"),
        (TypeError, lambda: KVQCache(llama), r"\[kvq.hf\] config must be .* got LlamaForCausalLM"),
    ):
        with pytest.raises(error, match=message):
            make()
    cache = KVQCache(tiny_config("llama", num_hidden_layers=1), "int8")
    with pytest.raises(IndexError, match=r"\[kvq.hf\] layer 1 of a model .* made for 1 layers"):
        generate(llama, prompt(device=device), cache, "kvq")
    cache = KVQCache(config, "int8")
    generate(llama, prompt(device=device), cache, "kvq")
    before = layer_state(cache)
    for rows, dtype, error, message in (
        (2, torch.float32, ValueError, r"\[kvq.append\] key must be \[1, 2, 1, 64\], got \[2, "),
        (1, torch.float64, TypeError, r"float32, float16 or bfloat16"),
    ):
        if device == "mps" and dtype == torch.float64:
            continue  # torch has none there
        token = torch.zeros(rows, 2, 1, 64, dtype=dtype, device=device)
        with pytest.raises(error, match=message):
            cache.update(token, token, 0)
    token = torch.zeros(1, 2, 1, 64, device="meta")
    with pytest.raises(ValueError, match=r"must be on one device"):
        cache.update(token, token, 0)
    assert all(map(torch.equal, layer_state(cache), before))


def test_group_fits_the_head_size():
    assert str(fit_group("int4", 96)) == "int4-g32"
    assert str(fit_group("int4-rot", 128)) == "int4-g64-rot"
    assert str(fit_group("int4-g128", 128)) == "int4-g128"


def test_skip_layers_and_layer_formats():
    config = tiny_config("llama", num_hidden_layers=4)
    formats = {1: ("tq4", "q8_0"), -2: ("int2", "none")}
    cache = KVQCache(config, "int4", skip_layers=[0, -1], layer_formats=formats)
    named = [(str(layer.k_format), str(layer.v_format)) for layer in cache.layers]
    assert named == [("none", "none"), ("tq4", "q8_0"), ("int2", "none"), ("none", "none")]
    for options in ({"skip_layers": [4]}, {"layer_formats": {-5: ("int8", "int8")}}):
        with pytest.raises(IndexError, match=r"\[kvq.hf\] layer -?\d is not one of the model's 4"):
            KVQCache(config, "int4", **options)


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_ring_holds_its_window_and_no_more(mistral, device, kind):
    """Memory is bounded by the window: the same after 400 tokens as when the ring was full."""
    rollback = 4
    static = {"max_cache_len": 512} if kind == "static" else {}
    cache = KVQCache(mistral.config, "int8", "int4", rollback_tokens=rollback, **static)
    sizes = []
    for _ in range(8):
        ids = tokens(1, 50).to(device)
        with torch.no_grad():
            mistral(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
        sizes.append(cache.nbytes)
    assert int(cache.get_seq_length()) == 400
    assert len(set(sizes)) == 1
    # int8 and int4 groups of 64 in one K and one V row of head size 64: 64 + 32 bytes of codes, a
    # float32 scale and bias each
    row = 2 * (64 + 32 + 4 * 4)
    per_layer = (WINDOW + rollback) * row + (8 if kind == "static" else 0)
    assert sizes[-1] == 2 * per_layer


def test_hybrid_layers_have_storage_of_their_own_kind(device):
    model = tiny_model("gemma3", device)
    cache = KVQCache(model.config, "int8", rollback_tokens=4)
    generate(model, prompt(length=40, device=device), cache, "kvq")
    sliding, full = (layer.cache for layer in cache.layers)
    assert cache.is_sliding == [True, False]
    assert sliding.ring and sliding.capacity == WINDOW + 4
    assert not full.ring and full.capacity >= 55


@pytest.mark.parametrize("name", TINY)
def test_beyond_the_static_capacity(name, device):
    """generate() stops with a sentence, and the cache is as good as before the step it refused."""
    model = tiny_model(name, device)
    inputs = prompt(length=10, device=device)
    cache = KVQCache(model.config, "int8", max_cache_len=14)
    if all(cache.is_sliding):  # rings, which hold 14 tokens and go on
        growing = KVQCache(model.config, "int8")
        ids = generate(model, inputs, growing, "kvq")
        assert torch.equal(generate(model, inputs, cache, "kvq"), ids)
        return
    with pytest.raises(IndexError, match=r"\[kvq.append\] 14 tokens \+ 1 exceed the capacity 14"):
        generate(model, inputs, cache, "kvq")
    assert int(cache.get_seq_length()) == 14
    short = KVQCache(model.config, "int8", max_cache_len=14)
    ids = generate(model, inputs, short, "kvq", max_new_tokens=5)
    assert all(map(torch.equal, layer_state(cache), layer_state(short)))
    cache.crop(-2)
    more = {"input_ids": ids[:, :13], "attention_mask": torch.ones_like(ids[:, :13])}
    assert torch.equal(generate(model, more, cache, "kvq", max_new_tokens=2), ids)


def test_use_refuses_what_the_static_capacity_cannot_hold(device):
    """Before the first token is computed, and before a cache of the user's is touched."""
    model = use(tiny_model("llama", device), "int8", max_cache_len=14)
    inputs = prompt(length=10, device=device)
    options = {"do_sample": False, "pad_token_id": 0}
    message = r"\[kvq.hf\] 10 tokens \+ max_new_tokens 6 need a cache of 15, max_cache_len is 14"
    model.forward = None  # nothing may run
    for given in (
        {"max_new_tokens": 6},
        {"max_length": 16},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=6)},
        {"max_new_tokens": 6, CACHE_ARGUMENT: KVQCache(model.config, max_cache_len=14)},
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **options, **given)
    del model.forward
    assert model.generate(**inputs, **options, max_new_tokens=5).shape == (1, 15)
