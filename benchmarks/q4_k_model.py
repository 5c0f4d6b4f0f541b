"""A whole model with Q4_K weights and an int4 cache: quality, memory, speed.

    python benchmarks/q4_k_model.py [--model FOLDER] [--threads 1] [--json]

Every linear layer whose input size is a multiple of 256 becomes a Q4KLinear; embeddings and norms
stay as they are. Four models are compared: dense or Q4_K weights, dense or quantised cache.

Quality: KL divergence from the dense model with a dense cache on held-out text, every position
reading the keys and values that the cache holds. Memory: bytes of the linear layers and of the
cache. Speed: greedy decoding after a prompt, the four models in turn, median over rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from torch_kvq import Q4KLinear
from torch_kvq.cli import models
from torch_kvq.cli.quality import QualityMeter
from torch_kvq.cli.terminal import table
from torch_kvq.hf import CACHE_ARGUMENT, KVQCache

ROOT = Path(__file__).resolve().parents[1]
DENSE = "dense"
#: Tokens of a forward pass in which quality is measured.
CHUNK = 32


def with_q4_k(model: nn.Module) -> nn.Module:
    """A copy of the model with Q4KLinear layers."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.in_features % 256 == 0:
                setattr(module, name, Q4KLinear.from_linear(child))
    return model


def linear_bytes(model: nn.Module) -> int:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Q4KLinear)]
    tensors = [t for m in layers for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)


class Variant:
    """A model and the cache it runs with."""

    def __init__(self, model: Any, cache: str) -> None:
        self.model, self.cache = model, cache

    def new_cache(self) -> Any:
        self.model.set_attn_implementation("sdpa" if self.cache == DENSE else "kvq")
        config = self.model.config
        return DynamicCache(config=config) if self.cache == DENSE else KVQCache(config, self.cache)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[N, vocabulary]; one token first, or a prefill would attend to exact keys and values."""
        cache = self.new_cache()
        chunks = [ids[:1], *ids[1:].split(CHUNK)]
        step = lambda c: self.model(c[None], **{CACHE_ARGUMENT: cache}, use_cache=True)  # noqa: E731
        return torch.cat([step(c).logits[0].float() for c in chunks])

    def decode(self, prompt: torch.Tensor, tokens: int) -> tuple[float, int]:
        """Tokens per second after the prompt, and the cache's bytes at the end."""
        cache = self.new_cache()
        out = self.model(prompt[None], **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self.model(token, **{CACHE_ARGUMENT: cache}, use_cache=True)
        seconds = time.perf_counter() - began
        return tokens / seconds, cache_bytes(cache)


def cache_bytes(cache: Any) -> int:
    if isinstance(cache, KVQCache):
        return cache.nbytes
    return sum(t.numel() * t.element_size() for l in cache.layers for t in (l.keys, l.values))  # noqa: E741


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    loaded = models.load(str(args.model), "cpu", args.dtype)
    dense = loaded.model
    q4_k = with_q4_k(dense)
    variants = {
        (weights, cache): Variant(model, cache)
        for weights, model in (("dense", dense), ("Q4_K", q4_k))
        for cache in (DENSE, args.cache)
    }
    text = loaded.held_out(1 << 30)
    windows = list(text[: args.windows * args.window].split(args.window))
    meters = {name: QualityMeter() for name in variants}
    for window in windows:
        exact = variants["dense", DENSE].logits(window)
        for name, variant in variants.items():
            meters[name].add(exact, variant.logits(window), window[1:])
    speeds: dict[tuple[str, str], list[float]] = {name: [] for name in variants}
    sizes = {}
    for number in range(args.rounds + 1):
        for name, variant in variants.items():
            speed, sizes[name] = variant.decode(text[: args.prompt], args.tokens)
            if number:  # the first round warms up
                speeds[name].append(speed)
    rows = []
    for name, variant in variants.items():
        quality = meters[name].result()
        rows.append(
            {
                "weights": name[0],
                "cache": name[1],
                "kld": quality.kld,
                "same_top": quality.same_top,
                "ppl_ratio": quality.ppl_ratio,
                "linear_mib": round(linear_bytes(variant.model) / 2**20, 2),
                "cache_mib": round(sizes[name] / 2**20, 2),
                "tokens_per_s": round(statistics.median(speeds[name]), 1),
                "spread": round((max(speeds[name]) - min(speeds[name])) / max(speeds[name]), 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("KVQ_TEST_MODEL", ROOT.parent / "shared" / "models" / "code-28m")
    parser.add_argument("--model", type=Path, default=Path(default))
    parser.add_argument("--cache", default="int4", help="format of the quantised cache")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window", type=int, default=512, help="tokens of a held-out window")
    parser.add_argument("--windows", type=int, default=4, help="how many windows")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before decoding")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if not (args.model / models.HELD_OUT).is_file():
        sys.exit(f"q4_k_model.py: no {models.HELD_OUT} in {args.model}; name a model with --model")
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        rows = measure(args)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        table(
            (
                "weights",
                "cache",
                "KLD nats/token",
                "same top",
                "linear MiB",
                "cache MiB",
                "tokens/s",
            ),
            [
                (
                    row["weights"],
                    row["cache"],
                    f"{row['kld']:.1e}",
                    f"{100 * row['same_top']:.1f} %",
                    f"{row['linear_mib']:.1f}",
                    f"{row['cache_mib']:.2f}",
                    f"{row['tokens_per_s']:.0f}",
                )
                for row in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
