"""The kernels' parameter structs, read from csrc/shared."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("params.h", "attention_params.h")
_TYPES = {"int64_t": "i8", "int32_t": "i4", "uint32_t": "u4", "float": "f4"}


@functools.cache
def structs() -> dict[str, np.dtype]:
    """Every struct of the shared headers as a numpy dtype."""
    found: dict[str, np.dtype] = {}
    for header in HEADERS:
        text = (ROOT / "csrc" / "shared" / header).read_text()
        for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.S | re.M):
            fields: list[tuple] = []
            members = re.findall(r"^ +(?:struct )?(\w+) (\w+)(?:\[(\d+)\])?;", body, re.M)
            for kind, field, count in members:
                dtype = found[kind] if kind in found else np.dtype(_TYPES[kind])
                fields.append((field, dtype, (int(count),)) if count else (field, dtype))
            found[name] = np.dtype(fields, align=True)
    return found


@functools.cache
def constant(header: str, name: str) -> int:
    """A whole number that a shared header defines."""
    text = (ROOT / "csrc" / "shared" / header).read_text()
    return int(re.findall(rf"^#define {name} (\d+)", text, re.M)[0])


def make(name: str, **values: object) -> np.ndarray:
    """A zeroed struct with these fields set."""
    params = np.zeros((), structs()[name])
    for field, value in values.items():
        params[field] = value
    return params
