"""Repairs after a failed compilation: what Metal allows and C++ does not.

Metal copies structs from and to any address space, and calls address-space-qualified methods.
clang in C++ mode says exactly where it will not; there the expression is wrapped in msl_flat,
which refers to the same object. Metal also takes {x, y} for an argument that is a vector."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_RANGES = """
    -fdiagnostics-print-source-range-info -fno-caret-diagnostics -ferror-limit=0
    -Xclang -fno-diagnostics-use-presumed-location
    """.split()
_ERROR = re.compile(
    r"^(?P<file>[^\n:]*):(?P<line>\d+):(?P<column>\d+):"
    r"(?P<ranges>(?:\{[^}]*\})*):? error: (?P<message>.*)$"
)
_RANGE = re.compile(r"\{(\d+):(\d+)-(\d+):(\d+)\}")
_KINDS = (
    "no matching constructor for initialization of",
    "no viable overloaded",
    "no viable conversion from",
    "no viable constructor copying",
    "cannot initialize object parameter of type",
    "no matching conversion for",
    "no matching member function for call to",
    "no matching function for call to",
    "cannot initialize a variable of type",
    "cannot initialize a parameter of type",
    "cannot initialize return object of type",
    "invalid operands to binary expression",
    "changes address space of pointer",
    "to an object of address space",
    "binding reference of type",
    "cannot bind reference",
    "no viable function",
    "incompatible operand types",
)
_COPIES = (
    "no matching constructor for initialization of",
    "no viable overloaded '='",
    "no viable constructor copying",
    "incompatible operand types",
)
_SPACES = re.compile(
    r"__global|__local|__constant|MSL_(device|constant|threadgroup)|address_space\(|address space"
)


def compile_with_repairs(
    command: list[str], text: str, unit: Path, copies_only: bool = False
) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Runs the compiler on `unit`, repairing as long as that helps. Returns the text and the last
    result, whose messages have lines of the text itself."""
    while True:
        unit.write_text(text)
        result = subprocess.run([*command, *_RANGES], capture_output=True, text=True)
        if result.returncode == 0:
            return text, result
        repaired = repair(text, result.stderr, str(unit), copies_only)
        if repaired == text:
            return text, result
        text = repaired


def repair(text: str, diagnostics: str, file: str, copies_only: bool = False) -> str:
    """The text with msl_flat around each expression that an error blames on its address space.

    With copies_only, calls of methods stay errors: Metal allows them only on methods qualified
    with the address space."""
    errors = _errors(diagnostics, file)
    listed = _vector_arguments(text, errors)
    if listed != text:  # offsets have moved: the rest is for the next turn
        return listed
    wraps: set[tuple[int, int]] = set()
    starts = _line_starts(text)
    for ranges, column, line, message, notes in errors:
        if not any(kind in message for kind in _KINDS) or not _SPACES.search(message + notes):
            continue
        if copies_only and not any(kind in message for kind in _COPIES):
            continue
        for range_ in _expressions(text, starts, message, line, column, ranges):
            wraps.add(range_)
    return _apply(text, wraps)


def _errors(diagnostics: str, file: str) -> list[tuple[list[tuple[int, ...]], int, int, str, str]]:
    """Errors in `file`: ranges, column, line, message, and the notes that follow."""
    found: list[tuple[list[tuple[int, ...]], int, int, str, str]] = []
    for line in diagnostics.splitlines():
        match = _ERROR.match(line)
        if match:
            ranges = [tuple(int(n) for n in r) for r in _RANGE.findall(match["ranges"])]
            here = match["file"] == file
            message = match["message"] if here else ""
            found.append((ranges, int(match["column"]), int(match["line"]), message, ""))
        elif found and ": note: " in line:
            ranges, column, number, message, notes = found[-1]
            if message == "" and file in line and "in instantiation of" in line:
                # The error is in a header of the shim; the place that asked for it is ours.
                place = re.match(r"[^\n:]*:(\d+):(\d+):((?:\{[^}]*\})*)", line)
                if place:
                    own = [tuple(int(n) for n in r) for r in _RANGE.findall(place[3])]
                    found[-1] = (own, int(place[2]), int(place[1]), message, notes)
                    continue
            found[-1] = (ranges, column, number, message, notes + line + "\n")
    return [error for error in found if error[3]]


_LIST_FOR_VECTOR = re.compile(
    r"cannot convert initializer list argument to '[^']*'(?: \(aka 'msl_vector<(\w+), (\d)>'\))"
)


def _vector_arguments(
    text: str, errors: list[tuple[list[tuple[int, ...]], int, int, str, str]]
) -> str:
    """The text with the lists among the arguments of refused calls made vectors."""
    starts = _line_starts(text)
    braces: dict[int, str] = {}
    for _, column, line, _, notes in errors:
        vector = _LIST_FOR_VECTOR.search(notes)
        if vector is None:
            continue
        element, size = vector.groups()
        open_, depth = text.find("(", starts[line - 1] + column - 1), 0
        for at in range(open_, len(text)):
            if text[at] in "([{":
                depth += 1
                if text[at] == "{" and depth == 2 and text[open_:at].rstrip()[-1] in "(,":
                    braces[at] = f"msl_make<metal::vec<{element}, {size}>>("
            elif text[at] in ")]}":
                depth -= 1
                if text[at] == "}" and depth == 1:
                    braces[at] = ")"
            if depth == 0:
                break
    for at in sorted(braces, reverse=True):
        text = text[:at] + braces[at] + text[at + 1 :]
    return text


def _line_starts(text: str) -> list[int]:
    starts = [0]
    for match in re.finditer("\n", text):
        starts.append(match.end())
    return starts


def _expressions(
    text: str,
    starts: list[int],
    message: str,
    line: int,
    column: int,
    ranges: list[tuple[int, ...]],
) -> list[tuple[int, int]]:
    """Which stretches of the text to wrap."""

    def offset(row: int, col: int) -> int:
        return starts[row - 1] + col - 1

    spans = [(offset(a, b), offset(c, d)) for a, b, c, d in ranges]
    at = offset(line, column)
    if "object parameter" in message:
        # Points at the object: object.method() or pointer->method().
        span = next((s for s in spans if s[0] == at), spans[0] if spans else None)
        end = span[1] if span else _primary_end(text, at)
        return [(at, end)]
    if (
        "no matching constructor" in message
        or "no viable constructor" in message
        or "no viable conversion" in message
    ):
        return [s for s in spans if s[0] != at] or spans[-1:]
    return spans


def _primary_end(text: str, at: int) -> int:
    match = re.compile(r"[A-Za-z_]\w*(?:\[[^\]]*\])*").match(text, at)
    return match.end() if match else at


def _apply(text: str, wraps: set[tuple[int, int]]) -> str:
    inserts: list[tuple[int, int, str]] = []
    for begin, end in wraps:
        piece = text[begin:end]
        if (
            not piece.strip()
            or "{" in piece
            or "msl_flat(" in (piece[:9], text[max(0, begin - 9) : begin])
        ):
            continue
        # pointer->method() : the object is what the pointer points to
        if text[end : end + 2] == "->":
            inserts += [(begin, 1, "(&msl_flat(*("), (end, 0, ")))")]
        else:
            inserts += [(begin, 1, "msl_flat("), (end, 0, ")")]
    # At one offset closing comes before opening.
    for position, _, piece in sorted(inserts, key=lambda item: (item[0], item[1]), reverse=True):
        text = text[:position] + piece + text[position:]
    return text
