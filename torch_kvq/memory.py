"""Where a cache's storage comes from."""

from __future__ import annotations

import math
import mmap

import torch

#: Smaller tensors come from PyTorch's allocator.
MAPPED_BYTES = 1 << 16


def zeros(
    *shape: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> torch.Tensor:
    """torch.zeros for storage that lives long.

    On the CPU its pages come straight from the system, zero and not resident before something is
    written to them: capacity that is not used yet costs nothing. And it stays out of malloc's heap,
    where it would lie between a forward pass's intermediates and keep their holes resident.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < MAPPED_BYTES or not _may_map(device):
        return torch.zeros(*shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(*shape)


def _may_map(device: torch.device | str | None) -> bool:
    """Not while something traces, nor for another device, the default one included."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    where = torch.get_default_device() if device is None else torch.device(device)
    return where.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS")
