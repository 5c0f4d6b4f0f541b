"""Writes the prompt caches of this folder with mlx-lm itself:

    for version in 0.26.0 0.31.1 0.32.2; do
        pip install mlx-lm==$version && python tests/data/mlx_lm/make.py
    done

Each is the embedded model's cache of one prompt, and what mlx-lm goes on to generate from it.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as caches
from mlx_lm.utils import load_model

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[2] / "torch_kvq" / "data" / "tiny-2m"
PROMPT, NEW = 24, 16
#: (bits, group size, layers left unquantised) of each version's file.
KINDS = {"0.26": (2, 32, []), "0.31": (4, 64, []), "0.32": (8, 32, [1])}


def main() -> None:
    mx.set_default_device(mx.cpu)
    release = version("mlx-lm").rpartition(".")[0]
    bits, group_size, dense = KINDS[release]
    model = load_model(MODEL)[0]
    model.set_dtype(mx.float32)
    ids = np.fromfile(MODEL / "heldout-tokens.u16", dtype="<u2")[:PROMPT].tolist()
    # Room for 32 tokens instead of 256 keeps the files small.
    caches.KVCache.step = caches.QuantizedKVCache.step = 32
    cache = caches.make_prompt_cache(model)
    model(mx.array([ids[:-1]]), cache=cache)
    cache = [
        layer if i in dense else layer.to_quantized(group_size=group_size, bits=bits)
        for i, layer in enumerate(cache)
    ]
    path = HERE / f"prompt-{release}.safetensors"
    caches.save_prompt_cache(str(path), cache, {"model": "tiny-2m"})
    cache = caches.load_prompt_cache(str(path))
    tokens, logits = list(ids), []
    for _ in range(NEW):
        logits.append(np.array(model(mx.array([tokens[-1:]]), cache=cache)[0, -1]))
        tokens.append(int(logits[-1].argmax()))
    about = {"bits": bits, "group_size": group_size, "dense": dense, "tokens": tokens}
    about["first_logits"] = [round(float(x), 4) for x in logits[0][:64]]
    path.with_suffix(".json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
