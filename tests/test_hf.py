"""transformers: the quantised cache against a dense cache that holds its dequantised values."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402
from transformers.cache_utils import (  # noqa: E402
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from torch_kvq import ops  # noqa: E402
from torch_kvq.codebooks import hadamard_signs  # noqa: E402
from torch_kvq.formats import KVFormat  # noqa: E402
from torch_kvq.hf import KVQCache, use  # noqa: E402

FORMATS = [("int8", None), ("int4-rot", None), ("int8", "int4-g32"), ("tq4", "q4_0")]


class _Requantised:
    """A dense layer that keeps what our cache would decode, and returns a prefill as it came."""

    formats: tuple[KVFormat, KVFormat]

    def update(self, key_states, value_states, *args, **kwargs):
        exact = self.get_seq_length() == 0 and key_states.shape[2] > 1
        stored = []
        for side, fmt, x in zip("kv", self.formats, (key_states, value_states), strict=True):
            encoder = "unbiased" if side == "k" and fmt.family == "turboquant" else "default"
            signs = hadamard_signs(x.shape[-1], device=x.device) if fmt.rotate else None
            stored.append(ops.qdq(x, fmt, signs=signs, encoder=encoder))
        kept = super().update(*stored, *args, **kwargs)
        return (key_states, value_states) if exact else kept


class _FullLayer(_Requantised, DynamicLayer):
    pass


class _SlidingLayer(_Requantised, DynamicSlidingWindowLayer):
    pass


def dense_reference(config, k_format, v_format):
    """A dense Cache with the layers of DynamicCache(config), each holding dequantised values."""
    formats = (KVFormat.parse(k_format), KVFormat.parse(v_format or k_format))
    layers = []
    for layer in DynamicCache(config=config).layers:
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        made = _SlidingLayer(layer.sliding_window) if sliding else _FullLayer()
        made.formats = formats
        layers.append(made)
    return Cache(layers=layers)


def tiny_config(name: str, **extra):
    """A random-weight model of four layers, GQA 2:1, head_dim 64."""
    common = dict(
        vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, name)(**{**common, **extra})


TINY = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 64}),
}


@pytest.fixture(scope="module", params=TINY)
def tiny_model(request, device):
    name, extra = TINY[request.param]
    config = tiny_config(name, **extra)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)
    for parameter in model.parameters():  # random, but far from uniform predictions
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def trained(code_model, device):
    model = AutoModelForCausalLM.from_pretrained(code_model, dtype=torch.float32)
    return model.eval().to(device), AutoTokenizer.from_pretrained(code_model)


def generate(model, inputs, cache, implementation, **options):
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    options["use_cache"] = True  # code-28m's generation_config.json says false
    with torch.no_grad():
        return model.generate(**inputs, past_key_values=cache, **options)


def dense_implementation(model) -> str:
    """eager where sdpa cannot do the model's softcap."""
    return "eager" if getattr(model.config, "attn_logit_softcapping", None) else "sdpa"


def both(model, inputs, k_format, v_format, **options):
    config = model.config
    ours = generate(model, inputs, KVQCache(config, k_format, v_format), "kvq", **options)
    dense = dense_reference(config, k_format, v_format)
    theirs = generate(model, inputs, dense, dense_implementation(model), **options)
    return ours, theirs


def prompt_tokens(model, rows=1, length=12, padded=False):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            ids[row, : 3 * row] = 0
            mask[row, : 3 * row] = 0
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize("k_format,v_format", FORMATS)
def test_tiny_models_greedy(tiny_model, k_format, v_format):
    ours, theirs = both(tiny_model, prompt_tokens(tiny_model), k_format, v_format)
    assert torch.equal(ours, theirs)


def test_tiny_models_left_padded_batch(tiny_model):
    inputs = prompt_tokens(tiny_model, rows=3, padded=True)
    ours, theirs = both(tiny_model, inputs, "int8", "int4-rot")
    assert torch.equal(ours, theirs)


def test_tiny_models_chunked_prefill(tiny_model):
    inputs = prompt_tokens(tiny_model, length=31)
    ours, theirs = both(tiny_model, inputs, "int8", "int4-rot", prefill_chunk_size=7)
    assert torch.equal(ours, theirs)


def test_tiny_models_two_turns(tiny_model):
    results = []
    for ours in (True, False):
        config = tiny_model.config
        cache = KVQCache(config, "int8") if ours else dense_reference(config, "int8", None)
        implementation = "kvq" if ours else dense_implementation(tiny_model)
        inputs = prompt_tokens(tiny_model)
        first = generate(tiny_model, inputs, cache, implementation, max_new_tokens=9)
        more = torch.cat([first, prompt_tokens(tiny_model, length=5)["input_ids"]], dim=1)
        second = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        results.append(generate(tiny_model, second, cache, implementation))
    assert torch.equal(*results)


def test_beam_search(tiny_model):
    inputs = prompt_tokens(tiny_model, rows=2)
    ours, theirs = both(tiny_model, inputs, "int8", None, num_beams=3)
    assert torch.equal(ours, theirs)


def test_prompt_lookup_crops_exactly(tiny_model):
    inputs = prompt_tokens(tiny_model)
    config = tiny_model.config
    plain = generate(tiny_model, inputs, KVQCache(config, "int8"), "kvq")
    lookup = generate(
        tiny_model, inputs, KVQCache(config, "int8"), "kvq", prompt_lookup_num_tokens=3
    )
    assert torch.equal(plain, lookup)


def test_plain_cache_under_our_attention(tiny_model):
    """A dense cache with attn_implementation="kvq" gives what the dense implementation gives."""
    for inputs in (prompt_tokens(tiny_model), prompt_tokens(tiny_model, rows=3, padded=True)):
        for options in ({}, {"prefill_chunk_size": 7}):
            results = [
                generate(
                    tiny_model, inputs, DynamicCache(config=tiny_model.config), name, **options
                )
                for name in ("kvq", dense_implementation(tiny_model))
            ]
            assert torch.equal(*results)


def test_static_cache_gives_the_same_tokens(tiny_model):
    inputs = prompt_tokens(tiny_model)
    config = tiny_model.config
    growing = generate(tiny_model, inputs, KVQCache(config, "int8"), "kvq")
    static = generate(tiny_model, inputs, KVQCache(config, "int8", max_cache_len=96), "kvq")
    assert torch.equal(growing, static)


def test_static_decode_compiles_to_one_graph(device):
    """model.forward with a static cache: one graph over a whole generation, eager's tokens."""
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_config(tiny_config("LlamaConfig")).eval().to(device)
    inputs = prompt_tokens(model)
    expected = generate(model, inputs, KVQCache(model.config, "int8", "int4-rot"), "kvq")
    cache = KVQCache(model.config, "int8", "int4-rot", max_cache_len=64)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    with torch.no_grad():
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits
        out = [logits[:, -1:].argmax(-1)]
        while len(out) < 24:
            logits = step(input_ids=out[-1], past_key_values=cache, use_cache=True).logits
            out.append(logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat([inputs["input_ids"], *out], dim=1), expected)
    assert counter.frame_count == 1


def test_a_packed_cache_under_another_attention_is_refused(device):
    model = AutoModelForCausalLM.from_config(tiny_config("LlamaConfig")).eval().to(device)
    for implementation in ("sdpa", "eager"):
        cache = KVQCache(model.config, "int8")
        with pytest.raises(TypeError, match=r"\[kvq.hf\].*attn_implementation=\"kvq\""):
            generate(model, prompt_tokens(model), cache, implementation)


def test_use_makes_generate_quantise(device):
    model = AutoModelForCausalLM.from_config(tiny_config("LlamaConfig")).eval().to(device)
    inputs = prompt_tokens(model)
    expected = generate(model, inputs, KVQCache(model.config, "int8"), "kvq")
    assert use(model, "int8") is model
    out = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    assert isinstance(out.past_key_values, KVQCache)
    assert torch.equal(out.sequences, expected)


def test_skip_layers_and_layer_formats():
    config = tiny_config("LlamaConfig")
    cache = KVQCache(config, "int4", skip_layers=[0, -1], layer_formats={1: ("tq4", "q8_0")})
    formats = [(str(layer.k_format), str(layer.v_format)) for layer in cache.layers]
    assert formats == [("none", "none"), ("tq4", "q8_0"), ("int4", "int4"), ("none", "none")]


def test_refused_models():
    with pytest.raises(ValueError, match=r"\[kvq.hf\] encoder-decoder"):
        KVQCache(transformers.T5Config())
    with pytest.raises(ValueError, match=r"\[kvq.hf\] deepseek_v3 uses multi-head latent"):
        KVQCache(transformers.DeepseekV3Config())


def test_group_fits_the_head_size():
    from torch_kvq.hf import fit_group

    assert str(fit_group("int4", 96)) == "int4-g32"
    assert str(fit_group("int4-rot", 128)) == "int4-g64-rot"
    assert str(fit_group("int4-g128", 128)) == "int4-g128"


@pytest.mark.parametrize("k_format,v_format", FORMATS)
def test_trained_model_greedy(trained, k_format, v_format):
    model, tokenizer = trained
    inputs = tokenizer("def quicksort(items):\n", return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    ours, theirs = both(model, inputs, k_format, v_format, max_new_tokens=48)
    assert torch.equal(ours, theirs)


def trained_batch(tokenizer, device):
    prompts = ["import os\n\ndef main(", "class Point:\n    def", "x = ["]
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def test_trained_model_left_padded_batch(trained):
    model, tokenizer = trained
    ours, theirs = both(model, trained_batch(tokenizer, model.device), "int8", "int4-rot")
    assert torch.equal(ours, theirs)


def test_trained_model_chunked_prefill(trained):
    model, tokenizer = trained
    inputs = tokenizer("import sys\n" * 40, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    ours, theirs = both(model, inputs, "int4-rot", None, prefill_chunk_size=50)
    assert torch.equal(ours, theirs)


def test_trained_model_two_turns(trained):
    model, tokenizer = trained
    results = []
    for ours in (True, False):
        cache = (
            KVQCache(model.config, "int8", "int4-rot")
            if ours
            else dense_reference(model.config, "int8", "int4-rot")
        )
        implementation = "kvq" if ours else "sdpa"
        inputs = tokenizer("def add(a, b):\n", return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        first = generate(model, inputs, cache, implementation)
        turn = tokenizer("\n\ndef sub(a, b):\n", return_tensors="pt")["input_ids"]
        ids = torch.cat([first, turn.to(first.device)], dim=1)
        second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        results.append(generate(model, second, cache, implementation))
    assert torch.equal(*results)
