"""Side-by-side timing: ours and the peer take turns in one process, on caches that rotate.

A cache that stays in the last-level cache tells nothing about decoding a real model, whose other
layers evict it: every call gets the next of several copies, together larger than that cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

#: Copies of an operand are made until they exceed this many bytes together.
ROTATION_BYTES = 256 * 2**20
MAX_COPIES = 24


def copies(nbytes: int) -> int:
    """How many copies of an operand of this size to rotate through."""
    return max(1, min(MAX_COPIES, -(-ROTATION_BYTES // max(nbytes, 1))))


@dataclass
class Timing:
    """Milliseconds per call."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """(90th - 10th percentile) / median."""
        return (self.high - self.low) / self.median


def _summary(samples: list[float]) -> Timing:
    samples = sorted(samples)
    at = lambda q: samples[min(len(samples) - 1, int(q * len(samples)))]  # noqa: E731
    return Timing(statistics.median(samples), at(0.1), at(0.9))


def interleaved(
    functions: dict[str, Callable[[int], object]],
    *,
    budget_s: float = 4.0,
    min_rounds: int = 5,
    max_rounds: int = 20_000,
    pause_s: float = 0.0,
) -> dict[str, Timing]:
    """Time each f(round) in turn, round after round, until the budget is spent.

    pause_s: idle time before every call.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():  # touch the memory, build what is built lazily
        function(0)
        function(1)
    start = time.perf_counter()
    for number in range(max_rounds):
        if number >= min_rounds and time.perf_counter() - start > budget_s:
            break
        for name, function in functions.items():
            if pause_s:
                time.sleep(pause_s)
            began = time.perf_counter()
            function(number)
            samples[name].append((time.perf_counter() - began) * 1e3)
    return {name: _summary(values) for name, values in samples.items()}
