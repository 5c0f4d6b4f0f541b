"""What each cache format costs in quality, on a trained model and held-out text.

    python benchmarks/quality.py [--model FOLDER] [--formats int8 int8/int4-rot ...]

Every position attends to quantised keys and values, its own included: one forward pass per window
in which each layer's K and V are replaced by ops.qdq of them. A short text through the real packed
cache must give the same KLD within a tenth (not bit for bit: a difference in the last place of a
sum moves values across the format's rounding boundaries). The model runs in float32, so that
nothing but the cache's loss is measured, and scales are float16, as half and bfloat16 caches store
them. Writes results/quality.json, from which README's quality column is made.

The model's folder holds heldout-tokens.u16 (uint16 token ids). Without --model it is
KVQ_TEST_MODEL, else ../shared/models/code-28m next to the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from torch_kvq import ops
from torch_kvq.cli import models
from torch_kvq.cli.quality import Quality, QualityMeter
from torch_kvq.cli.terminal import Progress, table
from torch_kvq.formats import KVFormat
from torch_kvq.hf import CACHE_ARGUMENT, KVQCache, fit_group

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
BF16 = "bf16"
FORMATS = (
    BF16, "int8", "q8_0", "tq8", "fp8_e4m3", "int8/int4-rot", "tq6", "tq5", "int4-g32-rot",
    "int4-rot", "q4_0-rot", "int4", "q4_0", "tq4", "tq3", "int2-g32-rot", "tq2",
)  # fmt: skip
SCALES = torch.float16
CHECKED = ("int8", "int8/int4-rot", "tq4")
CHECK_TOKENS = 200


class QdqLayer(DynamicLayer):
    """A dense layer that holds what a cache of the format would decode."""

    def __init__(self, name: str) -> None:
        super().__init__()
        k_format, _, v_format = name.partition("/")
        self.sides = (k_format, v_format or k_format)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = qdq(key_states, self.sides[0], "unbiased")
        return super().update(key, qdq(value_states, self.sides[1], "default"), *args, **kwargs)


def qdq(x: torch.Tensor, spec: str, turboquant_encoder: str) -> torch.Tensor:
    """As a QuantizedKVCache encodes this side."""
    if spec == BF16:
        return x.bfloat16().to(x.dtype)
    fmt = fit_group(spec, x.shape[-1])
    encoder = turboquant_encoder if fmt.family == "turboquant" else "default"
    return ops.qdq(x, fmt, encoder=encoder, scale_dtype=SCALES)


def replaced_logits(model: Any, ids: torch.Tensor, name: str | None) -> torch.Tensor:
    """Logits [N, vocabulary] of one forward pass; exact without a name."""
    layers = model.config.num_hidden_layers
    cache = Cache(layers=[QdqLayer(name) if name else DynamicLayer() for _ in range(layers)])
    model.set_attn_implementation("sdpa")
    return model(ids[None], **{CACHE_ARGUMENT: cache}, use_cache=True).logits[0]


def packed_logits(model: Any, ids: torch.Tensor, name: str) -> torch.Tensor:
    """The same through a packed cache: one token first, or a prefill would attend to exact K, V."""
    k_format, _, v_format = name.partition("/")
    cache = KVQCache(model.config, k_format, v_format or None, scale_dtype=SCALES)
    model.set_attn_implementation("kvq")
    chunks = [ids[:1], *ids[1:].split(32)]
    outputs = [model(c[None], **{CACHE_ARGUMENT: cache}, use_cache=True).logits[0] for c in chunks]
    return torch.cat(outputs)


def check_against_packed_cache(model: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
    """KLD from the exact model both ways; ends the run where they differ by more than a tenth."""
    found = []
    exact = replaced_logits(model, ids, None)
    for name in CHECKED:
        klds = []
        for logits in (replaced_logits(model, ids, name), packed_logits(model, ids, name)):
            meter = QualityMeter()
            meter.add(exact, logits, ids[1:])
            klds.append(meter.result().kld)
        found.append({"format": name, "kld_qdq": klds[0], "kld_packed_cache": klds[1]})
        if not abs(klds[0] - klds[1]) <= 0.1 * klds[0]:
            sys.exit(f"quality.py: qdq under sdpa and the packed cache disagree: {found[-1]}")
    return found


def measure(
    model: Any, windows: Sequence[torch.Tensor], names: Sequence[str]
) -> dict[str, Quality]:
    meters = {name: QualityMeter() for name in names}
    with Progress(len(windows) * (len(names) + 1)) as progress:
        for window in windows:
            progress.stage("exact")
            exact = replaced_logits(model, window, None)
            progress.advance()
            for name in names:
                progress.stage(name)
                meters[name].add(exact, replaced_logits(model, window, name), window[1:])
                progress.advance()
    return {name: meter.result() for name, meter in meters.items()}


def bits(name: str, head_dim: int) -> float:
    """Bits per element of a half-precision cache, mean of K and V."""
    if name == BF16:
        return 16.0
    k_format, _, v_format = name.partition("/")
    sides = [fit_group(side, head_dim) for side in (k_format, v_format or k_format)]
    return sum(side.bits_per_element(head_dim) for side in sides) / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("KVQ_TEST_MODEL", ROOT.parent / "shared" / "models" / "code-28m")
    parser.add_argument("--model", type=Path, default=Path(default))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--window", type=int, default=2048, help="tokens of one window")
    parser.add_argument("--windows", type=int, default=8, help="how many windows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args()
    if not (args.model / models.HELD_OUT).is_file():
        sys.exit(f"quality.py: no {models.HELD_OUT} in {args.model}; name a model with --model")
    for name in args.formats:
        for side in name.split("/"):
            if side != BF16:
                KVFormat.parse(side)
    loaded = models.load(str(args.model), "cpu", "float32")
    # Windows spread over the whole text.
    text = loaded.held_out(1 << 30)
    pieces = [piece for piece in text.split(args.window) if len(piece) == args.window]
    windows = pieces[:: max(len(pieces) // args.windows, 1)][: args.windows]
    head_dim = loaded.model.config.head_dim
    with torch.inference_mode():
        agreement = check_against_packed_cache(loaded.model, windows[0][:CHECK_TOKENS])
        quality = measure(loaded.model, windows, args.formats)
    found = {
        "model": args.model.name,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "head_dim": head_dim,
        "window": args.window,
        "windows": len(windows),
        "tokens": sum(map(len, windows)),
        "torch": torch.__version__,
        "check": {"tokens": CHECK_TOKENS, "rows": agreement},
        "rows": [
            {"format": name, "bits_per_element": bits(name, head_dim), **asdict(quality[name])}
            for name in args.formats
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['model']}, {found['tokens']:,} held-out tokens, windows of {args.window:,}")
    rows = [
        (
            row["format"],
            f"{row['bits_per_element']:.2f}",
            f"{row['ppl_ratio']:.4f}",
            f"{row['kld']:.1e}",
            f"{100 * row['same_top']:.1f} %",
        )
        for row in found["rows"]
    ]
    print(table(("format", "bits/element", "PPL ratio", "KLD nats/token", "same top"), rows))


if __name__ == "__main__":
    main()
