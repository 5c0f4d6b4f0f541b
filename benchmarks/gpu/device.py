"""Launching the cubins' kernels on torch tensors, and timing by device events."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the tests launch on the emulator
#: Spun through before a timed call, so that the host has queued it when the clock starts.
LEAD_CYCLES = 400_000


class Kernels:
    """The kernels of a build; modules are loaded on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict] = json.loads((folder / "manifest.json").read_text())["kernels"]
        self._modules: dict = {}
        self._functions: dict = {}
        self._params: dict[bytes, torch.Tensor] = {}
        self._nothing = torch.zeros(256, dtype=torch.uint8, device=DEVICE)

    def find(self, **wanted: object) -> dict:
        """The one row with these values."""
        found = self.select(**wanted)
        if not found:
            raise LookupError(f"no kernel with {wanted} in {self.folder}")
        return found[0]

    def select(self, **wanted: object) -> list[dict]:
        """All rows with these values."""
        return [r for r in self.rows if all(r.get(key) == value for key, value in wanted.items())]

    def _function(self, row: dict):  # type: ignore[no-untyped-def]
        key = row["cubin"], row["kernel"]
        if key not in self._functions:
            import cupy

            if row["cubin"] not in self._modules:
                path = self.folder / row["cubin"]
                self._modules[row["cubin"]] = cupy.RawModule(path=str(path))
            self._functions[key] = self._modules[row["cubin"]].get_function(row["kernel"])
        return self._functions[key]

    def upload(self, params: np.ndarray) -> torch.Tensor:
        """A parameter struct in device memory."""
        data = params.tobytes()
        if data not in self._params:
            self._params[data] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(DEVICE)
        return self._params[data]

    def prepare(
        self,
        row: dict,
        grid: Sequence[int],
        block: Sequence[int],
        buffers: Sequence[torch.Tensor | None],
        params: np.ndarray | None,
        shared: int | None = None,
    ) -> Callable[[], None]:
        """A call that launches the kernel; a buffer may be None. `params` follow the buffers.
        `shared`: bytes of the kernel's one threadgroup argument."""
        import cupy

        function = self._function(row)
        held = [self._nothing if b is None or b.numel() == 0 else b for b in buffers]
        if params is not None:
            held.append(self.upload(params))
        arguments = tuple(np.uint64(b.data_ptr()) for b in held)
        if shared is not None:
            arguments += (np.uint32(0),)
        grid, block = ((*map(int, size), 1, 1)[:3] for size in (grid, block))

        def launch() -> None:
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
            function(grid, block, arguments, shared_mem=shared or 0, stream=stream)

        launch.held = held  # type: ignore[attr-defined]  # alive as long as the call
        return launch


def time_calls(
    calls: dict[str, Callable[[], object]], repeats: int = 30, flush: torch.Tensor | None = None
) -> dict[str, float]:
    """Median microseconds of each call, in turn, round after round.

    `flush` is read before every call: with more bytes than the L2 cache holds, each call finds it
    cold.
    """
    for call in calls.values():
        call()
        call()
    events: dict[str, list] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(LEAD_CYCLES)
            if flush is not None:
                flush.sum()
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e3
        for name, pairs in events.items()
    }


def bandwidth() -> dict[str, float]:
    """GB/s of a large copy (bytes read plus bytes written) and of a large read."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = time_calls(
        {"copy": lambda: target.copy_(source), "read": lambda: source.view(torch.float32).amax()}
    )
    size = source.numel()
    return {
        "copy_gbps": 2 * size / times["copy"] / 1e3,
        "read_gbps": size / times["read"] / 1e3,
    }


def machine() -> dict[str, object]:
    """The card and the versions of what ran on it."""
    import cupy

    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cupy": cupy.__version__,
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
    }


def to_device(x):  # type: ignore[no-untyped-def]
    """Tensors, and tuples of them, on the GPU; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(to_device(t) for t in x)
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x
