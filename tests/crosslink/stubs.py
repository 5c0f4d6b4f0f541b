"""Text stubs (.tbd) of Apple's libraries, holding what torch's own dylibs prove to exist."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .macho import Import, imports

METAL = "/System/Library/Frameworks/Metal.framework/Versions/A/Metal"
FOUNDATION = "/System/Library/Frameworks/Foundation.framework/Versions/C/Foundation"
# Install name: path of the stub.
LIBRARIES = {
    METAL: "Metal.framework/Metal.tbd",
    FOUNDATION: "Foundation.framework/Foundation.tbd",
    "/usr/lib/libobjc.A.dylib": "libobjc.tbd",
    "/usr/lib/libc++.1.dylib": "libc++.tbd",
}
# CPython's symbols, which an extension module leaves to the interpreter.
PYTHON = "@rpath/Python"
PYTHON_STUB = "libpython.tbd"
# Public API that torch happens not to use.
DOCUMENTED = {
    METAL: ["_OBJC_CLASS_$_MTLFunctionConstantValues"],  # since macOS 10.12
}
CLASS = "_OBJC_CLASS_$_"


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def text(install_name: str, symbols: set[str]) -> str:
    classes = {name.removeprefix(CLASS) for name in symbols if name.startswith(CLASS)}
    plain = {name for name in symbols if not name.startswith("_OBJC_")}
    return (
        "--- !tapi-tbd\n"
        "tbd-version: 4\n"
        "targets: [ arm64-macos ]\n"
        f"install-name: '{install_name}'\n"
        "exports:\n"
        "  - targets: [ arm64-macos ]\n"
        f"    symbols: [ {quoted(plain)} ]\n"
        f"    objc-classes: [ {quoted(classes)} ]\n"
        "...\n"
    )


def library_of(found: Import) -> str | None:
    if found.library == "dynamic lookup" and found.symbol.startswith(("_Py", "__Py")):
        return PYTHON
    return found.library if found.library in LIBRARIES else None


def write_stubs(dylibs: Iterable[Path], folder: Path) -> None:
    """Writes a stub of each of Apple's libraries that our code links to."""
    symbols: dict[str, set[str]] = defaultdict(set)
    for dylib in dylibs:
        for found in imports(dylib):
            if library := library_of(found):
                symbols[library].add(found.symbol)
    for library, names in DOCUMENTED.items():
        symbols[library].update(names)
    for library, path in (LIBRARIES | {PYTHON: PYTHON_STUB}).items():
        stub = folder / path
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(text(library, symbols[library]))
