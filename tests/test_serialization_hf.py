"""A model's cache in a file: generation goes on as if it had never been saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from tests.test_serialization import COMPILES, check_refused, software  # noqa: E402
from torch_kvq import QuantizedKVCache  # noqa: E402
from torch_kvq.hf import KVQCache  # noqa: E402

COMMON = dict(
    vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 64}),
    # its linear layers keep transformers' own states
    "qwen3_next": (
        "Qwen3NextConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    ),
}  # fmt: skip
CACHES = {
    "growing": {},
    "static": {"max_cache_len": 96},
    "windows": {"sink_tokens": 3, "recent_tokens": 5},
    "skipped": {"skip_layers": [0, -1]},
    "layer formats": {"layer_formats": {1: ("tq4", "q8_0"), 3: ("none", "fp8_e4m3")}},
}
CASES = [("llama", kind) for kind in CACHES] + [
    (name, kind) for name in ("mistral", "gemma2") for kind in ("growing", "static", "skipped")
]
CASES += [("qwen3_next", "growing"), ("qwen3_next", "skipped")]


def build(name: str, device: str):
    kind, extra = CONFIGS[name]
    config = getattr(transformers, kind)(**{**COMMON, **extra})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # random, but far from uniform predictions
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    model = model.eval().to(device)
    model.set_attn_implementation("kvq")
    return model


def prompt(model, length: int = 12, rows: int = 2) -> torch.Tensor:
    ids = torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(5))
    return ids.to(model.device)


def generate(model, ids: torch.Tensor, cache: KVQCache) -> torch.Tensor:
    return generate_with_logits(model, ids, cache)[0]


def generate_with_logits(model, ids: torch.Tensor, cache: KVQCache) -> list[torch.Tensor]:
    """16 greedy tokens after ids, and the logits of each."""
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True,
            max_new_tokens=16, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return [out.sequences, torch.stack(out.logits)]


@pytest.mark.parametrize("name,kind", CASES)
def test_generation_goes_on(name, kind, device, tmp_path):
    if software(device) and (name, kind) not in (("llama", "static"), ("gemma2", "growing")):
        pytest.skip(COMPILES)
    model = build(name, device)
    cache = KVQCache(model.config, "int8", "int4-rot", **CACHES[kind])
    first = generate(model, prompt(model), cache)
    cache.save(tmp_path / "prompt.kvq")
    loaded = KVQCache.load(tmp_path / "prompt.kvq", model.config, device=device)
    assert loaded.get_seq_length() == cache.get_seq_length()
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    more = torch.cat([first, prompt(model, 5)], dim=1)
    expected = generate_with_logits(model, more, cache)
    actual = generate_with_logits(model, more, loaded)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_between_devices(device, tmp_path):
    model = build("gemma2", "cpu")
    cache = KVQCache(model.config, "int8", "int4-rot", recent_tokens=4)
    first = generate(model, prompt(model), cache)
    cache.save(tmp_path / "prompt.kvq")
    expected = generate(model, first, cache)
    other = build("gemma2", device)
    loaded = KVQCache.load(tmp_path / "prompt.kvq", other.config, device=device)
    assert torch.equal(generate(other, first.to(device), loaded).cpu(), expected)
    loaded = KVQCache.load(tmp_path / "prompt.kvq", other.config, device=device)
    loaded.save(tmp_path / "back.kvq")
    back = KVQCache.load(tmp_path / "back.kvq", model.config, device="cpu")
    assert torch.equal(generate(model, first, back), expected)


def test_before_the_first_token_and_after_a_reset(device, tmp_path):
    model = build("llama", device)
    expected = generate(model, prompt(model), KVQCache(model.config, "int8"))
    used = KVQCache(model.config, "int8", max_cache_len=64)
    generate(model, prompt(model, 7), used)
    used.reset()
    for cache in (KVQCache(model.config, "int8"), used):
        cache.save(tmp_path / "empty.kvq")
        loaded = KVQCache.load(tmp_path / "empty.kvq", model.config, device=device)
        assert torch.equal(generate(model, prompt(model), loaded), expected)


@pytest.fixture
def saved(tmp_path) -> Path:
    model = build("mistral", "cpu")
    cache = KVQCache(model.config, "int8", "int4-rot")
    generate(model, prompt(model), cache)
    cache.save(tmp_path / "prompt.kvq")
    return tmp_path / "prompt.kvq"


MISMATCHES = {
    "layers": ("mistral", {"num_hidden_layers": 6}, "was saved with a model whose num_hidden_layers"
               " is 4, this model's is 6"),
    "window": ("mistral", {"sliding_window": 16}, "was saved with a model whose sliding_window is "
               "8, this model's is 16"),
    "theta": ("mistral", {"rope_theta": 5e5}, "was saved with a model whose rope_parameters is "),
    "model": ("llama", {}, "was saved with a model whose .* is .*, this model's is "),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES)
def test_another_models_file_is_refused(case, saved):
    name, changed, message = MISMATCHES[case]
    kind, extra = CONFIGS[name]
    config = getattr(transformers, kind)(**{**COMMON, **extra, **changed})
    check_refused(saved, message, lambda path: KVQCache.load(path, config))


def test_what_does_not_matter_is_not_compared(saved):
    kind, extra = CONFIGS["mistral"]
    config = getattr(transformers, kind)(**{**COMMON, **extra, "use_cache": False})
    config._name_or_path, config.eos_token_id = "elsewhere", 3
    config._attn_implementation = "kvq"
    assert KVQCache.load(saved, config).get_seq_length() == 27


def test_kinds_are_not_confused(saved, tmp_path):
    check_refused(saved, r"holds a KVQCache; load it with KVQCache.load")
    QuantizedKVCache(1, 1, 64).save(tmp_path / "one.kvq")
    config = transformers.LlamaConfig(**COMMON)
    message = "holds a QuantizedKVCache; load it with QuantizedKVCache.load"
    check_refused(tmp_path / "one.kvq", message, lambda path: KVQCache.load(path, config))


def test_a_damaged_model_file_is_refused(saved):
    config = transformers.MistralConfig(**{**COMMON, "sliding_window": 8})
    whole = saved.read_bytes()
    for at in range(0, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[at] ^= 16
        saved.write_bytes(damaged)
        check_refused(saved, "(is|has|holds)", lambda path: KVQCache.load(path, config))


def test_trained_model_goes_on(code_model, device, tmp_path):
    if software(device):
        pytest.skip(COMPILES)
    model = transformers.AutoModelForCausalLM.from_pretrained(code_model, dtype=torch.bfloat16)
    model = model.eval().to(device)
    model.set_attn_implementation("kvq")
    tokenizer = transformers.AutoTokenizer.from_pretrained(code_model)
    ids = tokenizer("import sys\n\n\ndef main(", return_tensors="pt")["input_ids"].to(device)
    cache = KVQCache(model.config)
    first = generate(model, ids, cache)
    cache.save(tmp_path / "prompt.kvq")
    loaded = KVQCache.load(tmp_path / "prompt.kvq", model.config, device=device)
    assert torch.equal(generate(model, first, loaded), generate(model, first, cache))
