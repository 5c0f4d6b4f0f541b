"""Writes metal_libraries.h: the .metal files, flattened, as the strings the host runtime compiles.

setup.py uses it on macOS, tests/softmetal on Linux. By hand: ``python embed.py metal/ out.h``
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
DELIMITER = "kvqmetal"


def find(name: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {name!r} in {', '.join(map(str, folders))}")


def flatten(path: Path, include: Sequence[Path] = (), seen: set[Path] | None = None) -> str:
    """The text of a .metal file with its quoted includes put in, each file once.

    #line directives keep the names and lines of the files in the Metal compiler's messages.
    """
    seen = set() if seen is None else seen
    seen.add(path.resolve())
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if PRAGMA_ONCE.match(line):
            lines.append("")
        elif match := INCLUDE.match(line):
            found = find(match.group(1), [path.parent, *include])
            if found.resolve() not in seen:
                lines += [flatten(found, include, seen), f'#line {number + 1} "{path.name}"']
            else:
                lines.append("")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def as_string(source: str) -> str:
    if f"){DELIMITER}" in source:
        raise ValueError("the source holds the delimiter of its own string")
    return f'R"{DELIMITER}({source}){DELIMITER}"'


def header(libraries: dict[str, str], compile_metal: Callable[[str], bytes] | None = None) -> str:
    """The generated header for libraries given as name: source.

    With `compile_metal` it also holds what that makes of each source, a metallib.
    """
    blobs: list[str] = []
    entries: list[str] = []
    for name, source in sorted(libraries.items()):
        metallib = "nullptr, 0"
        if compile_metal is not None:
            data = ", ".join(map(str, compile_metal(source)))
            blobs.append(f"inline constexpr unsigned char k_{name}[] = {{{data}}};")
            metallib = f"k_{name}, sizeof(k_{name})"
        entries.append(f'    {{"{name}", {as_string(source)}, {metallib}}},')
    lines = [
        "// Generated from the .metal files. Do not edit.",
        "#pragma once",
        "",
        "namespace kvq::runtime {",
        *blobs,
        "inline constexpr EmbeddedLibrary kEmbeddedLibraries[] = {",
        *entries,
        "    {nullptr, nullptr, nullptr, 0},",
        "};",
        "}  // namespace kvq::runtime",
        "",
    ]
    return "\n".join(lines)


def embed(
    folder: Path,
    output: Path,
    include: Sequence[Path] = (),
    compile_metal: Callable[[str], bytes] | None = None,
) -> None:
    """Writes the header for every .metal file of a folder, unless it is there already."""
    libraries = {path.stem: flatten(path, include) for path in folder.glob("*.metal")}
    text = header(libraries, compile_metal)
    if not output.exists() or output.read_text() != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


if __name__ == "__main__":
    embed(Path(sys.argv[1]), Path(sys.argv[2]))
