"""Host code with planted faults, and the driver that runs each in a process of its own."""

from __future__ import annotations

from types import ModuleType

from .. import HERE, ROOT, load_host_code


def load() -> ModuleType:
    """torch.ops.kvq_misuse; install() has been called."""
    import torch

    folder = HERE / "misuse"
    load_host_code("kvq_misuse", [folder / "misuse.mm"], folder, [ROOT / "csrc"])
    return torch.ops.kvq_misuse
