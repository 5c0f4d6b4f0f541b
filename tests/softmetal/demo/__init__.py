"""Ops written as those of the product are, to test the host runtime and the device with."""

from __future__ import annotations

from types import ModuleType

from .. import HERE, ROOT, load_host_code


def load(*, metallib: bool = False) -> ModuleType:
    """torch.ops.kvq_demo; install() has been called."""
    import torch

    folder = HERE / "demo"
    sources = [folder / "demo.mm", ROOT / "csrc" / "mps" / "runtime.mm"]
    load_host_code("kvq_demo", sources, folder, [ROOT / "csrc", folder], metallib=metallib)

    @torch.library.register_fake("kvq_demo::scale")
    def scale(x, factor, bias=None, negate=False, extra_rounds=0):
        return x.new_empty(x.shape)

    @torch.library.register_fake("kvq_demo::sum")
    def total(x):
        return x.new_empty(())

    return torch.ops.kvq_demo
