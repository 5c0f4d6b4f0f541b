"""Decode steps of a whole cache and of a whole model, for run.py."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleaved

from torch_kvq import QuantizedKVCache

MODEL = Path(__file__).resolve().parents[2] / "shared" / "models" / "code-28m"

#: Of a length, in a linear row.
LAYERS = 4


class GrowingCache:
    """A QuantizedKVCache filled to T tokens, and one step of it."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype, tokens: int) -> None:
        self.cache = QuantizedKVCache(
            args.batch, args.kv_heads, args.head_dim,
            k_format=args.format, v_format=args.v_format or args.format, dtype=dtype,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        chunk = torch.randn(args.batch, args.kv_heads, 1024, args.head_dim, generator=generator)
        self.chunk = chunk.to(dtype)
        self.query = torch.randn(
            args.batch, args.heads, 1, args.head_dim, generator=generator
        ).to(dtype)  # fmt: skip
        self.append(tokens)

    def append(self, tokens: int) -> None:
        while tokens > 0:
            part = self.chunk[:, :, :tokens]
            self.cache.append(part, part)
            tokens -= part.shape[2]

    def step(self, turn: int = 0) -> torch.Tensor:
        new = self.chunk[:, :, turn % 1024 : turn % 1024 + 1]
        return self.cache.attend(self.query, self.cache.append(new, new))

    def to_next_growth(self, left: int) -> None:
        """Fill up so that ``left`` more tokens fit without growing."""
        self.append(self.cache.capacity - self.cache.length - left)

    def check(self) -> None:
        out = self.step()
        key, value = self.cache.dequantized()
        expected = F.scaled_dot_product_attention(
            self.query.float(), key.float(), value.float(), enable_gqa=True
        )
        error = (out.float() - expected).norm() / expected.norm()
        assert error < 2e-2, f"attention is wrong by {error:.2e}"


class DenseCache(GrowingCache):
    """The same step of a dense cache that grows by torch.cat, as transformers' DynamicCache."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype, tokens: int) -> None:
        self.tokens = tokens
        super().__init__(args, dtype, 0)
        shape = (args.batch, args.kv_heads, tokens, args.head_dim)
        self.key, self.value = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        self.folded = self.query.view(args.batch, args.kv_heads, -1, args.head_dim)

    def step(self, turn: int = 0) -> torch.Tensor:
        new = self.chunk[:, :, turn % 1024 : turn % 1024 + 1]
        key, value = torch.cat((self.key, new), 2), torch.cat((self.value, new), 2)
        return F.scaled_dot_product_attention(self.folded, key, value)


def step_row(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """One step, append and attend, at T tokens; and the step in which the cache grows."""
    ours = GrowingCache(args, dtype, args.tokens)
    ours.check()
    peer = DenseCache(args, dtype, args.tokens)
    times = interleaved({"ours": ours.step, "peer": peer.step}, budget_s=args.budget)
    ours.to_next_growth(8)
    around = []
    for turn in range(16):
        began = time.perf_counter()
        ours.step(turn)
        around.append((time.perf_counter() - began) * 1e3)
    return {"times": times, "growth_step_ms": round(max(around), 4)}


def linear_row(args: argparse.Namespace, dtype: torch.dtype, lengths: list[int]) -> dict:
    """Steps at several lengths against the straight line through them, at the worst of them.

    Caches of a length step one after the other, as a model's layers do: a single one would find its
    code, too, evicted by the longest of the others.
    """
    steps: dict[str, Callable[[int], Any]] = {}
    for tokens in lengths:
        caches = [GrowingCache(args, dtype, tokens) for _ in range(LAYERS)]
        caches[0].check()
        steps[str(tokens)] = lambda turn, caches=caches: [cache.step(turn) for cache in caches]
    times = interleaved(steps, budget_s=args.budget)
    measured = {t: times[str(t)].median / LAYERS for t in lengths}
    # Least squares of relative errors: every length counts alike.
    weight = {t: 1 / ms**2 for t, ms in measured.items()}
    total = sum(weight.values())
    mean_t = sum(weight[t] * t for t in lengths) / total
    mean_ms = sum(weight[t] * measured[t] for t in lengths) / total
    slope = sum(weight[t] * (t - mean_t) * (measured[t] - mean_ms) for t in lengths)
    slope /= sum(weight[t] * (t - mean_t) ** 2 for t in lengths)
    line = {t: mean_ms + slope * (t - mean_t) for t in lengths}
    worst = max(lengths, key=lambda t: abs(line[t] / measured[t] - 1))
    return {
        "tokens": worst,
        "ours_ms": round(measured[worst], 5),
        "peer_ms": round(line[worst], 5),
        "ratio": round(line[worst] / measured[worst], 3),
        "spread": round(max(t.spread for t in times.values()), 3),
        "steps_ms": {str(t): round(ms, 4) for t, ms in measured.items()},
        "us_per_1000_tokens": round(slope * 1e6, 2),
    }


# -- a whole model -----------------------------------------------------------------------------


def model_path(given: str | None) -> Path:
    path = Path(given or os.environ.get("KVQ_TEST_MODEL") or MODEL)
    if not path.exists():
        raise SystemExit(f"--op model needs a model: --model or KVQ_TEST_MODEL ({path} is missing)")
    return path


class AttentionClock:
    """Seconds spent in a model's cache updates and attention calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return call

    @contextmanager
    def watch(self, model: Any, cache: Any) -> Iterator[None]:
        """The cache's update and the model's attention function, timed."""
        from transformers import AttentionInterface, AttentionMaskInterface

        name = model.config._attn_implementation
        AttentionInterface.register("timed", self.timed(AttentionInterface()[name]))
        AttentionMaskInterface.register("timed", AttentionMaskInterface()[name])
        cache.update = self.timed(cache.update)
        model.set_attn_implementation("timed")
        try:
            yield
        finally:
            del cache.update
            model.set_attn_implementation(name)


class ModelSteps:
    """A model with a cache of T tokens that decodes token after token."""

    def __init__(self, kind: str, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        from torch_kvq.hf import CACHE_ARGUMENT

        dtype = torch.float32 if kind == "dynamic-fp32" else torch.bfloat16
        path = model_path(args.model)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.argument = CACHE_ARGUMENT
        self.model.set_attn_implementation("kvq" if kind == "ours" else "sdpa")
        self.cache = self.make_cache(kind, args)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.prompt = torch.randint(vocabulary, (1, args.tokens), generator=generator)
        with torch.no_grad():
            self.logits = self.model(
                self.prompt, **{self.argument: self.cache}, use_cache=True, logits_to_keep=1
            ).logits
        self.token = self.prompt[:, -1:]

    def make_cache(self, kind: str, args: argparse.Namespace) -> Any:
        from transformers import DynamicCache, QuantizedCache

        from torch_kvq.hf import KVQCache

        if kind == "ours":
            return KVQCache(self.model.config, args.format, args.v_format or args.format)
        if kind == "quanto":
            try:
                import optimum.quanto  # noqa: F401
            except ImportError:
                raise SystemExit("--peer quanto needs optimum-quanto") from None
            return QuantizedCache("quanto", self.model.config, nbits=4)
        return DynamicCache(config=self.model.config)

    def step(self, turn: int = 0) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(self.token, **{self.argument: self.cache}, use_cache=True)
        return out.logits

    def attention_share(self, steps: int = 10) -> float:
        clock = AttentionClock()
        shares = []
        with clock.watch(self.model, self.cache):
            for _ in range(steps):
                clock.seconds, began = 0.0, time.perf_counter()
                self.step()
                shares.append(clock.seconds / (time.perf_counter() - began))
        return statistics.median(shares)


def model_row(args: argparse.Namespace) -> dict:
    """A decode step of a model, ours against one of transformers' caches; attention's share."""
    import torch_kvq.hf  # noqa: F401  (registers "kvq")

    ours, peer = ModelSteps("ours", args), ModelSteps(args.peer, args)
    a, b = ours.step().float().log_softmax(-1), peer.step().float().log_softmax(-1)
    kld = (b.exp() * (b - a)).sum(-1).mean().item()
    assert kld < 0.5, f"the logits differ: KLD {kld:.3f}"
    times = interleaved({"ours": ours.step, "peer": peer.step}, budget_s=args.budget)
    config = ours.model.config
    return {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "times": times,
        "attention_share": round(ours.attention_share(), 3),
        "peer_attention_share": round(peer.attention_share(), 3),
        "kld": round(kld, 5),
    }
