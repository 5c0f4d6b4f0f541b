"""The rows that ``run.py --all`` runs, each as changes of run.py's defaults."""

from __future__ import annotations

from typing import Any

THREADS = (1, 2)
#: Every format once; K and V alike.
FORMATS = (
    "int8-g32", "int8-g64", "int4-g64", "int4-g64-rot", "int2-g64", "fp8_e4m3-g64",
    "fp8_e5m2-g64", "q8_0", "q4_0", "tq2", "tq3", "tq4", "tq5", "tq6", "tq8",
)  # fmt: skip
#: Tokens of the plot and of the linear row.
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PLOTTED = ("int8-g32", "int4-g64", "q4_0", "tq4", "fp8_e4m3-g64")

Row = dict[str, Any]


def decode() -> list[Row]:
    """One decode step at 16,384 tokens: every format, the other peers, other shapes."""
    rows: list[Row] = [{"format": f} for f in FORMATS]
    rows += [{"peer": peer} for peer in ("torch-gqa", "torch-fp32", "mlx")]
    rows += [{"format": "int8-g64", "peer": "mlx"}]
    rows += [{"format": "int8-g64", "v_format": "int4-g64"}]
    rows += [{"tokens": 1024}]
    rows += [{"kv_heads": 32, "tokens": 4096}, {"head_dim": 64}, {"head_dim": 256}]
    rows += [{"batch": 4, "ragged": True, "tokens": 4096}]
    return rows


def queries() -> list[Row]:
    """Several queries: speculative verification, and a prefill."""
    rows: list[Row] = [
        {"queries": q, "peer": p} for q in (4, 16) for p in ("torch-folded", "one-query")
    ]
    prefill = {"queries": 2048, "tokens": 2048, "peer": "torch-fp32", "dtype": "float32"}
    return [*rows, prefill]


def lengths() -> list[Row]:
    """One decode step against T, per format and peer: the plot."""
    rows: list[Row] = [{"format": f, "tokens": t} for f in PLOTTED for t in LENGTHS]
    rows += [
        {"peer": p, "tokens": t} for p in ("torch-gqa", "torch-fp32") for t in LENGTHS if t <= 32768
    ]
    return rows


def append() -> list[Row]:
    """One token of K and V into the cache."""
    rows: list[Row] = [
        {"op": "append", "format": f, "peer": "index-copy", "tokens": 4096} for f in FORMATS
    ]
    rows += [{"op": "kv_cache_update", "peer": "index-copy", "tokens": 4096}]
    return rows


def codec() -> list[Row]:
    """512 tokens of K and V to packed; K back to dense; the other dense ops."""
    quantize = {"op": "quantize", "tokens": 512}
    rows: list[Row] = [
        {**quantize, "format": f, "peer": "mlx"} for f in ("int8-g64", "int4-g64", "int2-g64")
    ]
    rows += [{**quantize, "format": f, "peer": "gguf"} for f in ("q8_0", "q4_0")]
    rows += [{**quantize, "format": f, "peer": "memcpy"} for f in FORMATS]
    dequantize = {"op": "dequantize", "tokens": 4096}
    rows += [{**dequantize, "format": f, "peer": "memcpy"} for f in FORMATS]
    rows += [{**dequantize, "format": "int4-g64", "peer": "mlx"}]
    rows += [{**dequantize, "format": "q4_0", "peer": "gguf"}]
    rows += [
        {"op": op, "peer": "memcpy", "tokens": 4096}
        for op in ("qdq", "hadamard", "mlx_native_dequantize")
    ]
    return rows


def steps() -> list[Row]:
    """Steps of a cache that grows by itself."""
    line = {"op": "linear", "peer": "line", "tokens": LENGTHS[-1]}
    rows: list[Row] = [{**line, "format": f} for f in ("int4-g64", "int8")]
    rows += [{"op": "step", "peer": "torch-cat", "tokens": t} for t in (1024, 4096, 16384, 65536)]
    return rows


def model() -> list[Row]:
    """A decode step of a whole model at 3,500 tokens."""
    peers = ("dynamic-bf16", "dynamic-fp32", "quanto")
    return [{"op": "model", "peer": peer, "tokens": 3500, "format": "int4"} for peer in peers]


def q4_k() -> list[Row]:
    """Products and codecs of Q4_K weights."""
    products = ("torch-bf16", "torch-fp32", "ggml")
    rows: list[Row] = [{"op": "q4_k_gemv", "peer": p} for p in products]
    rows += [{"op": "q4_k_gemv", "peer": p, "exact": True} for p in products]
    rows += [{"op": "q4_k_matmul", "peer": p, "queries": 16} for p in products]
    rows += [{"op": op, "peer": "memcpy"} for op in ("q4_k_quantize", "q4_k_dequantize")]
    return rows


#: Section: its rows; each is run with every number of threads.
TABLE = {
    function.__name__: function
    for function in (decode, queries, lengths, append, codec, steps, model, q4_k)
}


def rows_of(sections: list[str]) -> list[tuple[str, Row]]:
    """(section, changes of the defaults) of every row, for every number of threads."""
    return [
        (name, {**row, "threads": threads})
        for name in sections
        for threads in (THREADS if name != "lengths" else (1,))
        for row in TABLE[name]()
    ]
