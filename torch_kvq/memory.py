"""Where a cache's storage comes from."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

#: Less than this comes from PyTorch's allocator.
MAPPED_BYTES = 1 << 14
#: Of each tensor in a mapping, as PyTorch aligns its own.
_ALIGNMENT = 64


def zeros(
    *specs: tuple[Sequence[int], torch.dtype], device: torch.device | str | None = None
) -> list[torch.Tensor]:
    """Zero tensors of these shapes and dtypes, for storage that lives long.

    On the CPU they come from one mapping of pages straight from the system, zero and not resident
    before something is written to them: capacity that is not used yet costs nothing. And they stay
    out of malloc's heap, where they would lie between a forward pass's intermediates and keep their
    holes resident. Each has a storage of its own.
    """
    offsets, total = [], 0
    for shape, dtype in specs:
        offsets.append(total)
        total += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    if total < MAPPED_BYTES or not _may_map(device):
        return [torch.zeros(*shape, dtype=dtype, device=device) for shape, dtype in specs]
    pages = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made = []
    for (shape, dtype), offset in zip(specs, offsets, strict=True):
        if count := math.prod(shape):
            x = torch.frombuffer(pages, dtype=dtype, count=count, offset=offset)
            made.append(x.resize_(shape))  # not a view: that is two tensors
        else:
            made.append(torch.empty(shape, dtype=dtype))
    return made


def _may_map(device: torch.device | str | None) -> bool:
    """Not while something traces, nor for another device, the default one included."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    where = torch.get_default_device() if device is None else torch.device(device)
    return where.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS")
