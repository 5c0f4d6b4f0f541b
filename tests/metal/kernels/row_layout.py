"""How the kernels of packed rows are laid out: csrc/mps/rows.h in Python."""

from __future__ import annotations

import torch

from torch_kvq.formats import KVFormat

WRITE_STEPS, READ_STEPS, ENOUGH_SIMDGROUPS = 8, 4, 1024


def vectors_per_simdgroup(head_dim: int) -> int:
    lanes = -(-head_dim // 32) * 2
    return 1 if lanes > 32 else 32 // lanes


def takes_any_row(fmt: KVFormat, wide: bool) -> bool:
    return fmt.family == "none" and not wide


def vectors_of(fmt: KVFormat, head_dim: int, wide: bool) -> int:
    """Vectors of a side that a simdgroup takes at once."""
    return 1 if takes_any_row(fmt, wide) else vectors_per_simdgroup(head_dim)


def steps_for(fmt: KVFormat, tokens: int, heads: int, head_dim: int, wide: bool, most: int) -> int:
    """Times that a simdgroup does so; `heads`: of all batch rows."""
    if takes_any_row(fmt, wide):
        return 1
    each, steps = tokens // vectors_of(fmt, head_dim, wide), 1
    while 2 * steps <= min(most, each) and each * heads >= 2 * steps * ENOUGH_SIMDGROUPS:
        steps *= 2
    return steps


def row_floats(fmt: KVFormat, head_dim: int, wide: bool) -> int:
    """Threadgroup memory of a simdgroup that writes."""
    if fmt.family == "none":
        return 0 if wide else head_dim
    blocks = vectors_per_simdgroup(head_dim) * -(-head_dim // 32)
    return {"turboquant": 36 * blocks, "gguf": (34 * blocks + 3) // 4}.get(fmt.family, 0)


def is_aligned(t: torch.Tensor | None, size: int) -> bool:
    """Whether rows start at multiples of so many bytes."""
    if t is None:
        return True
    strides = [stride for stride, n in zip(t.stride()[:-1], t.shape, strict=False) if n > 1]
    return all(n * t.element_size() % size == 0 for n in (t.storage_offset(), *strides))


def is_wide(
    fmt: KVFormat,
    dense: torch.Tensor,
    codes: torch.Tensor,
    signs: torch.Tensor | None,
    mean: torch.Tensor | None,
) -> bool:
    head_dim = dense.shape[3]
    blocks = 4 if head_dim % 64 == 0 else 2
    size = blocks if fmt.family == "gguf" else 2 * fmt.bits & -(2 * fmt.bits)
    return (
        head_dim % 16 == 0
        and head_dim <= 1024
        and (codes.shape[3] <= 1 or codes.stride(3) == 1)
        and is_aligned(codes, 16 if fmt.family == "none" else size)
        and all(is_aligned(t, 16) for t in (dense, signs, mean))
    )
