"""How long a library takes to compile, which a user's machine does when it is first used."""

from __future__ import annotations

import resource
import uuid

import pytest

from .. import toolchain

SECONDS = 2.0


def check_compile_time(name: str, text: str) -> None:
    """Fails if clang takes longer here, three times: a neighbour on its core slows it, too."""
    toolchain.compile_library(text)  # builds the emulator's own parts, too
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        toolchain.compile_library(f"{text}// {uuid.uuid4()}\n")
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        if seconds < SECONDS:
            return
    pytest.fail(f"{name}: {seconds:.2f} s of clang")
