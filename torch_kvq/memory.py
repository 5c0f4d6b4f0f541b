"""Where a cache's storage comes from."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

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
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)
    if total < MAPPED_BYTES or not maps(device):
        return [torch.zeros(*shape, dtype=dtype, device=device) for shape, dtype in specs]
    return _mapped(specs)


def reserved(*specs: tuple[Sequence[int], torch.dtype]) -> list[torch.Tensor] | None:
    """The same on the CPU for storage of which most may never be used; None where it costs.

    It is nothing but address space until it is written to, unless the system counts what it has
    promised (Linux with vm.overcommit_memory = 2) or limits a process's addresses (RLIMIT_AS).
    """
    if not _addresses_are_free():
        return None
    try:
        return _mapped(specs, sparse=True)
    except (OSError, OverflowError):
        return None


def _mapped(
    specs: Sequence[tuple[Sequence[int], torch.dtype]], sparse: bool = False
) -> list[torch.Tensor]:
    offsets, total = [], 0
    for shape, dtype in specs:
        offsets.append(total)
        total += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    pages = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sparse and hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)  # the first token of each head would take 2 MiB
    made = []
    for (shape, dtype), offset in zip(specs, offsets, strict=True):
        if count := math.prod(shape):
            x = torch.frombuffer(pages, dtype=dtype, count=count, offset=offset)
            made.append(x.resize_(shape))  # not a view: that is two tensors
        else:
            made.append(torch.empty(shape, dtype=dtype))
    return made


@cache
def _addresses_are_free() -> bool:
    try:
        import resource

        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            return False
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2"
    except (ImportError, AttributeError):
        return False
    except OSError:  # not Linux
        return True


def maps(device: torch.device | str | None) -> bool:
    """Whether storage for this device comes from mappings.

    Not while something traces, nor for another device, the default one included.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    where = torch.get_default_device() if device is None else torch.device(device)
    return where.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS")
