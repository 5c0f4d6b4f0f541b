"""transformers' models at toy size, and the dense cache that a quantised one is compared with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from torch_kvq import ops
from torch_kvq.codebooks import hadamard_signs
from torch_kvq.hf import CACHE_ARGUMENT, KVQCache, KVQLayer

WINDOW = 8
_COMMON = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
_HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
#: {name: (config class, its own arguments)}
TINY = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {**_HYBRID, "query_pre_attn_scalar": 64}),
    "gemma3": ("Gemma3TextConfig", {**_HYBRID, "query_pre_attn_scalar": 64}),
    "phi3": ("Phi3Config", {"hidden_size": 256}),
    "gpt_oss": ("GptOssConfig", {**_HYBRID, **_EXPERTS}),
    "mixtral": ("MixtralConfig", _EXPERTS),
}


def tiny_config(name: str = "llama", **extra: object):
    kind, own = TINY[name]
    return getattr(transformers, kind)(**{**_COMMON, **own, **extra})


def tiny_model(name: str, device: str = "cpu", seed: int = 0, **extra: object):
    """Random weights, but far from uniform predictions."""
    torch.manual_seed(seed)
    config = tiny_config(name, **extra)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "sinks"):
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def tokens(rows: int = 1, length: int = 12, *, seed: int = 5, vocabulary: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (rows, length), generator=generator)


def prompt(rows: int = 1, length: int = 12, *, padded: bool = False, device: str = "cpu") -> dict:
    ids = tokens(rows, length)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            ids[row, : 3 * row] = 0
            mask[row, : 3 * row] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def dense_implementation(model: torch.nn.Module) -> str:
    """eager where transformers has no sdpa for the model (softcap, sinks)."""
    return "sdpa" if model._supports_sdpa else "eager"


class Tape:
    """The keys and values that went into a KVQCache, in order, layer by layer."""

    def __init__(self, cache: KVQCache) -> None:
        self.layers: list[deque] = []
        for layer in cache.layers:
            self.layers.append(deque())
            layer.update = self._recording(layer.update, self.layers[-1])

    @staticmethod
    def _recording(update: Callable, calls: deque) -> Callable:
        def recorded(key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object):
            calls.append((key.detach().clone(), value.detach().clone()))
            return update(key, value, *args, **kwargs)

        return recorded

    def is_played(self) -> bool:
        return not any(self.layers)


class _Dequantised:
    """A dense layer that holds what a KVQLayer would decode, and returns a prefill as it came.

    It takes its keys and values from the tape of the quantised run, after comparing them with
    those that it is given: a value on the edge between two codes must not fall to different sides
    in the two runs, whose attention sums in different orders. Quantised and exact rows are kept
    side by side, for the precision windows.
    """

    ours: KVQLayer
    calls: deque
    #: leading padding tokens of each row, [B]: what they compute is nobody's business
    padding: torch.Tensor | None

    def update(self, key, value, *args, **kwargs):
        assert self.calls, "the dense run goes on where the quantised one had stopped"
        expected = self.calls.popleft()
        past, count = int(self.get_seq_length()), key.shape[2]
        real = slice(None)
        if self.padding is not None:
            real = torch.arange(past, past + count, device=key.device) >= self.padding[:, None]
        for name, given, taped in zip(("keys", "values"), (key, value), expected, strict=True):
            assert given.shape == taped.shape, f"{name} of another step"
            given, taped = given.transpose(1, 2)[real], taped.transpose(1, 2)[real]
            torch.testing.assert_close(given, taped, rtol=2e-4, atol=2e-4)
        formats = self.ours.cache.k_format, self.ours.cache.v_format
        stored = []
        for side, fmt, x in zip("kv", formats, expected, strict=True):
            encoder = "unbiased" if side == "k" and fmt.family == "turboquant" else "default"
            signs = hadamard_signs(x.shape[-1], device=x.device) if fmt.rotate else None
            stored.append(torch.cat([ops.qdq(x, fmt, signs=signs, encoder=encoder), x], dim=-1))
        kept = super().update(*stored, *args, **kwargs)
        if past == 0 and count > 1:
            return expected
        return tuple(self._read(x, past + count) for x in kept)

    def _read(self, x: torch.Tensor, length: int) -> torch.Tensor:
        quantised, exact = x.chunk(2, dim=-1)
        position = torch.arange(length - x.shape[2], length, device=x.device)
        cache = self.ours.cache
        chosen = position < cache.sink_tokens
        if cache.recent_tokens:
            chosen |= position >= length - cache.recent_tokens
        return torch.where(chosen[:, None], exact, quantised)


class _FullLayer(_Dequantised, DynamicLayer):
    pass


class _SlidingLayer(_Dequantised, DynamicSlidingWindowLayer):
    pass


def dense_twin(ours: KVQCache, tape: Tape, config, padding: torch.Tensor | None = None) -> Cache:
    """The Cache of DynamicCache(config)'s layers, each holding what ``ours`` decodes."""
    layers = []
    for layer, twin, calls in zip(
        DynamicCache(config=config).layers, ours.layers, tape.layers, strict=True
    ):
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        made = _SlidingLayer(layer.sliding_window) if sliding else _FullLayer()
        made.ours, made.calls, made.padding = twin, calls, padding
        layers.append(made)
    return Cache(layers=layers)


@contextmanager
def attention(model: torch.nn.Module, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def generate(model, inputs: dict, cache: Cache, implementation: str, **options: object):
    """Greedy unless said; code-28m's generation_config.json says use_cache=False."""
    given = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    given |= {CACHE_ARGUMENT: cache, **options}
    torch.manual_seed(11)
    with attention(model, implementation), torch.no_grad():
        return model.generate(**inputs, **given)
