"""Barrier mutation: takes each barrier out of a source in turn. The race build must object to
every one.

    survivors = mutate.survivors(source, run)      # run(library) launches kernels of the race build

A barrier whose removal nobody sees is either not needed or not tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import emulator

_BARRIER = re.compile(r"\b(threadgroup|simdgroup)_barrier\s*\([^;]*\)\s*;")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


@dataclass
class Mutant:
    """A source without one of its barriers."""

    place: str  # file:line of the barrier
    barrier: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """One mutant for each barrier of a flattened source. Lines stay where they are."""
    blanked = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), source)
    for match in _BARRIER.finditer(blanked):
        head, barrier = source[: match.start()], source[match.start() : match.end()]
        yield Mutant(
            _place(head),
            barrier,
            head + ";" + re.sub(r"[^\n]", "", barrier) + source[match.end() :],
        )


def _place(head: str) -> str:
    file, line = "source", head.count("\n") + 1
    for marker in re.finditer(r'^#line (\d+) "([^"]*)"\n', head, flags=re.M):
        file, line = marker.group(2), int(marker.group(1)) + head[marker.end() :].count("\n")
    return f"{file}:{line}"


def survivors(
    source: str,
    run: Callable[[emulator.Library], None],
    *,
    defines: dict[str, str] | None = None,
    only: str | None = None,
) -> list[Mutant]:
    """The mutants that `run` does not fault on. `run` gets a library of the race build and must
    launch every kernel that holds a barrier, with sizes for which it matters."""
    left = []
    for mutant in mutants(source):
        library = emulator.load(mutant.source, "race", defines=defines, only=only)
        try:
            run(library)
        except emulator.KernelFault:
            continue
        left.append(mutant)
    return left
