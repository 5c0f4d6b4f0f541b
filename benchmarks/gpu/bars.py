"""What is asked of the kernels: shares of copy and read bandwidth, times faster than the best dense
attention, instructions a packed byte."""

from __future__ import annotations

#: (heads per KV head 1, 4, 8) of a format, times faster than dense.
ATTENTION = {
    "int8-g64": (1.7, 1.7, 1.3),
    "int4-g64": (2.8, 2.0, 1.5),
    "int4-g64-rot": (2.8, 2.0, 1.5),
    "tq4": (2.2, 1.7, 1.2),
    "fp8_e4m3-g64": (1.5, 1.4, 1.1),
    "q8_0": (1.5, 1.4, 1.1),
    "q4_0": (1.5, 1.4, 1.1),
}
#: Several query tokens, int4: heads per KV head 1 and 4.
SEVERAL_QUERIES = {1: 1.5, 4: 1.2}
#: Most instructions a packed byte, by format and heads per KV head.
INSTRUCTIONS = {
    ("int4-g64", 1): 9.0,
    ("int4-g64", 4): 16.0,
    ("int8-g64", 4): 8.0,
    ("tq4", 4): 20.0,
}
#: Of copy bandwidth.
CODECS = {"quantize": 0.60, "append": 0.60, "dequantize": 0.75}
#: Of read bandwidth, on packed bytes.
Q4_K = 0.60


def attention(row: dict) -> float | None:
    """The ratio asked of an attention row."""
    repeat = row["heads_per_kv_head"]
    if row["queries"] > 1:
        return SEVERAL_QUERIES.get(repeat) if row["format"].startswith("int4") else None
    asked = dict(zip((1, 4, 8), ATTENTION.get(row["format"], ()), strict=False))
    return asked.get(repeat)


def verdict(value: float, bar: float | None, *, at_most: bool = False) -> str:
    """The bar, marked where it is missed."""
    if bar is None:
        return "-"
    met = value <= bar if at_most else value >= bar
    return f"{bar:g}" if met else f"{bar:g} MISSED"
