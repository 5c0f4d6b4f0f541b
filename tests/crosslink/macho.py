"""Reads from a Mach-O file which symbols it imports, and from which library."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

MAGIC_64 = 0xFEEDFACF
LC_SYMTAB = 0x2
LC_LOAD_DYLIBS = {0xC, 0x80000018, 0x8000001F}  # load, weak, re-export
N_STAB = 0xE0
N_TYPE = 0x0E
N_UNDF = 0x0
N_EXT = 0x01
# Library ordinals that name no library.
SPECIAL_ORDINALS = {0: "self", 0xFE: "dynamic lookup", 0xFF: "executable"}


class Import(NamedTuple):
    symbol: str
    library: str  # install name, or one of SPECIAL_ORDINALS


def imports(path: Path) -> list[Import]:
    """The undefined symbols of a thin 64-bit Mach-O file, in its symbol table's order."""
    data = path.read_bytes()
    magic, _, _, _, commands, _, _, _ = struct.unpack_from("<8I", data)
    if magic != MAGIC_64:
        raise ValueError(f"{path} is no thin 64-bit Mach-O file")
    libraries: list[str] = []
    symbols: list[tuple[int, int, str]] = []
    offset = 32
    for _ in range(commands):
        kind, size = struct.unpack_from("<2I", data, offset)
        if kind in LC_LOAD_DYLIBS:
            (name,) = struct.unpack_from("<I", data, offset + 8)
            libraries.append(data[offset + name : offset + size].split(b"\0")[0].decode())
        elif kind == LC_SYMTAB:
            symbols = undefined(data, *struct.unpack_from("<4I", data, offset + 8))
        offset += size
    found = []
    for _, description, symbol in symbols:
        ordinal = description >> 8
        library = SPECIAL_ORDINALS.get(ordinal) or libraries[ordinal - 1]
        found.append(Import(symbol, library))
    return found


def undefined(data: bytes, table: int, count: int, strings: int, _: int) -> list[tuple]:
    """(type, description, name) of the symbol table's undefined external entries."""
    found = []
    for name, kind, _, description, _ in struct.iter_unpack(
        "<IBBHQ", data[table : table + 16 * count]
    ):
        if kind & N_STAB or kind & N_TYPE != N_UNDF or not kind & N_EXT:
            continue
        start = strings + name
        found.append((kind, description, data[start : data.index(b"\0", start)].decode()))
    return found
