"""Runs every planted fault in a forked child and prints, as JSON, how each ended.

Run with ``python -m``. Torch and the device are loaded once; a child starts with no thread of the
device running yet.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import TypedDict

from .. import install
from . import load

TIMEOUT_SECONDS = 60


class Outcome(TypedDict):
    """How a child ended: signal number, or 0 with the message of what it raised."""

    signal: int
    status: int
    output: str


def in_child(work: Callable[[], object]) -> Outcome:
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 2)
            signal.alarm(TIMEOUT_SECONDS)
            try:
                work()
            except RuntimeError as error:
                os.write(2, str(error).encode())
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        log.seek(0)
        return {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            "status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
            "output": log.read().decode(errors="replace"),
        }


def main() -> None:
    install(product=False)
    ops = load()
    import torch

    def run(fault: str) -> None:
        x = torch.arange(8.0).to("mps")
        y = ops.run(x, fault)
        if fault == "none" and not torch.equal(y.cpu(), torch.arange(8.0) * 2):
            raise RuntimeError("the control gave a wrong result")
        torch.mps.synchronize()

    names = ops.names()
    names.insert(0, names.pop(names.index("none")))  # compiles the library for all others
    outcomes = {name: in_child(lambda name=name: run(name)) for name in names}
    outcomes["without_pool"] = in_child(ops.without_pool)
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
