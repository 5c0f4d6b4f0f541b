"""What the commands print with: tables, a progress bar, one-sentence errors."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from types import TracebackType


class CommandError(Exception):
    """Ends a command with one sentence on stderr and exit status 1."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        indent
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


class Progress:
    """A progress bar on stderr; silent where stderr is no terminal.

    Use it as a context manager; the bar is erased at the end.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.label = total, 0, ""
        self._stream = sys.stderr
        self._shown = -1
        self._active = self._stream.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def stage(self, label: str) -> None:
        """Name what is being done now."""
        self.label, self._shown = label, -1
        self._draw()

    def advance(self, steps: int = 1) -> None:
        self.done = min(self.done + steps, self.total)
        self._draw()

    def _draw(self) -> None:
        percent = 100 * self.done // max(self.total, 1)
        if not self._active or percent == self._shown:
            return
        self._shown = percent
        width = 30
        filled = width * self.done // max(self.total, 1)
        line = f"[{'#' * filled}{'.' * (width - filled)}] {percent:3d} %  {self.label}"
        self._stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
