"""Peak memory of a prefill and a few decode steps, with this package's caches and transformers'.

    python benchmarks/memory.py [--tokens 1024 ... 32768] [--caches ...] [--plot-only]

A Llama of small random weights whose layers cache what Qwen2.5-1.5B's do: 2 KV heads, head size
128, bfloat16; 8 layers, 8 KiB a token. Every point is a process of its own: it loads the model,
runs a short prompt through the same kind of cache, hands free memory back, notes its resident
bytes, and then reads the peak of its resident bytes after the whole prompt in one forward pass and
``NEW_TOKENS`` steps. What is reported is the difference of the two: the cache and everything that
lived for a moment beside it. Linux only: the peak is reset through /proc/self/clear_refs.

Writes results/memory.json and results/memory.svg. Fails if a cache of this package needs more than
the smaller of the dense ones at any length.

With ``--default-malloc RUNS`` malloc is as the system has it: its heap keeps holes, and a peak is
one of a distribution. Every run is a process that loads everything and forks one for each point,
in random order; what is compared, and written to results/memory-malloc.json, is every length's
median and spread.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
NEW_TOKENS = 16
WARM_UP = 64
MODEL = dict(
    vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=8,
    num_attention_heads=2, num_key_value_heads=2, head_dim=128, max_position_embeddings=65536,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
DENSE = ("DynamicCache", "StaticCache")
#: Of this package, growing and static; then transformers' own.
OURS = {
    "int8/int4-rot": ("int8", "int4-rot"),
    "int4-rot": ("int4-rot", "int4-rot"),
}
CACHES = (
    *DENSE,
    "QuantizedCache (quanto, 4 bits)",
    *OURS,
    "int8/int4-rot, static",
)


def make_cache(name: str, config: Any, length: int) -> Any:
    """The cache of this name for ``length`` tokens."""
    from transformers import DynamicCache, QuantizedCache, StaticCache

    from torch_kvq.hf import KVQCache

    if name == "DynamicCache":
        return DynamicCache(config=config)
    if name == "StaticCache":
        return StaticCache(config=config, max_cache_len=length)
    if name.startswith("QuantizedCache"):
        return QuantizedCache("quanto", config, nbits=4)
    kind, _, static = name.partition(", ")
    return KVQCache(config, *OURS[kind], max_cache_len=length if static else None)


def cache_bytes(cache: Any) -> int | None:
    """Bytes that the cache itself holds, where it can be asked."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    layers = [layer for layer in cache.layers if not hasattr(layer, "_quantized_keys")]
    if len(layers) < len(cache.layers):
        return None
    return sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))


def resident(field: str) -> int:
    """VmRSS, what is resident now, or VmHWM, the most since the last reset; bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def run(model: Any, cache: Any, tokens: int) -> None:
    """A prompt of ``tokens`` tokens in one pass, and NEW_TOKENS greedy steps."""
    import torch

    from torch_kvq.hf import CACHE_ARGUMENT

    ids = torch.randint(2, 250, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(NEW_TOKENS + 1):
            out = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            del out


def measure(name: str, tokens: int) -> dict[str, Any]:
    """One point, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import torch_kvq.hf  # noqa: F401  (registers "kvq")

    torch.manual_seed(0)
    ours = name.partition(", ")[0] in OURS
    config = LlamaConfig(**MODEL, attn_implementation="kvq" if ours else "sdpa")
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    run(model, make_cache(name, config, WARM_UP + NEW_TOKENS), WARM_UP)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base, start = resident("VmRSS"), time.perf_counter()
    cache = make_cache(name, config, tokens + NEW_TOKENS)
    run(model, cache, tokens)
    return {
        "cache": name,
        "tokens": tokens,
        "peak_bytes": resident("VmHWM") - base,
        "cache_bytes": cache_bytes(cache),
        "seconds": round(time.perf_counter() - start, 2),
    }


def point(name: str, tokens: int) -> dict[str, Any]:
    """One point, in a process of its own."""
    command = [sys.executable, __file__, "--point", name, str(tokens)]
    # Freed tensors go back to the system at once, as on a fresh heap: otherwise the peak depends
    # on what fragments are left, by some 10 MiB from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} at {tokens} tokens failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def forked_points(names: list[str], lengths: list[int]) -> None:
    """Every point in a process forked from this one; prints a line of JSON for each."""
    import torch
    import transformers  # noqa: F401

    import torch_kvq.hf  # noqa: F401

    torch.set_num_threads(1)
    points = [(name, tokens) for name in names for tokens in lengths]
    random.shuffle(points)
    for name, tokens in points:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                print(json.dumps(measure(name, tokens)), flush=True)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{name} at {tokens} tokens failed")


def default_malloc(runs: int, names: list[str], lengths: list[int], path: Path) -> list[str]:
    """Medians and spreads under the system's malloc; returns where ours is above DynamicCache."""
    command = [sys.executable, __file__, "--forked", "--caches", *names, "--tokens"]
    peaks: dict[tuple[str, int], list[int]] = {}
    for _ in range(runs):
        done = subprocess.run(
            [*command, *map(str, lengths)], stdout=subprocess.PIPE, text=True, check=True
        )
        for one in map(json.loads, done.stdout.splitlines()):
            peaks.setdefault((one["cache"], one["tokens"]), []).append(one["peak_bytes"])
    found = [
        {"cache": name, "tokens": tokens, "peak_bytes": sorted(values)}
        for (name, tokens), values in sorted(peaks.items())
    ]
    path.write_text(json.dumps({"model": MODEL, "points": found}) + "\n")
    problems = []
    for (name, tokens), values in sorted(peaks.items(), key=lambda item: item[0][::-1]):
        low, middle, high = (v / 2**20 for v in (min(values), median(values), max(values)))
        print(f"{tokens:>6,} {name:24} median {middle:6.1f} MiB, {low:.1f} to {high:.1f}")
        dense = peaks.get(("DynamicCache", tokens))
        if name not in DENSE and dense and median(values) > median(dense):
            problems.append(f"{name}, {tokens:,}")
    return problems


def above_dense(points: list[dict[str, Any]]) -> list[str]:
    """Where a cache of this package needs more than the smaller dense one."""
    found = []
    peaks = {(p["cache"], p["tokens"]): p["peak_bytes"] for p in points}
    for (name, tokens), peak in peaks.items():
        if name.partition(", ")[0] not in OURS:
            continue
        dense = min(peaks.get((kind, tokens), float("inf")) for kind in DENSE)
        if peak > dense:
            found.append(f"{name}, {tokens:,}: {peak / 2**20:.1f} MiB, dense {dense / 2**20:.1f}")
    return found


def table(points: list[dict[str, Any]], show: Callable[[dict[str, Any]], str]) -> str:
    """A row per cache, a column per length."""
    lengths = sorted({p["tokens"] for p in points})
    cells = {(p["cache"], p["tokens"]): show(p) for p in points}
    names = [name for name in CACHES if any(p["cache"] == name for p in points)]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{n:>10,}" for n in lengths)]
    lines += [
        name.ljust(width) + "".join(f"{cells.get((name, n), ''):>10}" for n in lengths)
        for name in names
    ]
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Peak bytes against length."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "kvq", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name in CACHES:
        own = [p for p in found["points"] if p["cache"] == name]
        points = sorted((p["tokens"], p["peak_bytes"]) for p in own)
        if not points or name.endswith(", static"):
            continue
        style = {"linestyle": "--"} if name in DENSE else {}
        if name.startswith("QuantizedCache"):
            style = {"linestyle": ":"}
        x, y = zip(*points, strict=True)
        axes.plot(x, [v / 2**20 for v in y], marker="o", markersize=3, label=name, **style)
    lengths = sorted({p["tokens"] for p in found["points"]})
    axes.set_xticks(lengths[-4:], [f"{n // 1024}k" for n in lengths[-4:]])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("peak memory of prefill and decode, MiB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    lines = (line.rstrip() for line in drawn.getvalue().splitlines())
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--caches", nargs="+", default=CACHES, choices=CACHES, metavar="CACHE")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plot-only", action="store_true", help="draw the picture again")
    parser.add_argument("--default-malloc", type=int, metavar="RUNS")
    parser.add_argument("--forked", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(args.point[0], int(args.point[1]))))
        return 0
    if args.forked:
        forked_points(list(args.caches), list(args.tokens))
        return 0
    if args.default_malloc:
        path = args.output.with_name("memory-malloc.json")
        problems = default_malloc(args.default_malloc, list(args.caches), list(args.tokens), path)
        print("\n".join(["above DynamicCache:", *problems]) if problems else "never above it")
        return 1 if problems else 0
    if not args.plot_only:
        import torch
        import transformers

        about = {
            "model": MODEL,
            "new_tokens": NEW_TOKENS,
            "dtype": "bfloat16",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        kept = {}
        if args.output.exists():
            before = json.loads(args.output.read_text())
            if about.items() <= before.items():  # points of the same model and versions stay
                kept = {(p["cache"], p["tokens"]): p for p in before["points"]}
        for tokens in args.tokens:
            for name in args.caches:
                kept[name, tokens] = one = point(name, tokens)
                print(f"{name}, {tokens:,}: {one['peak_bytes'] / 2**20:.1f} MiB", flush=True)
                text = json.dumps({**about, "points": list(kept.values())}, indent=1)
                args.output.write_text(text + "\n")
    found = json.loads(args.output.read_text())
    plot(found, args.output.with_suffix(".svg"))
    print("peak MiB\n" + table(found["points"], lambda p: f"{p['peak_bytes'] / 2**20:.1f}"))
    problems = above_dense(found["points"])
    print("\n".join(["above the dense caches:", *problems]) if problems else "never above dense")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
