"""Writes ops.md, the reference, from the docstrings: python docs/make_reference.py"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from torch_kvq import KVFormat, Packed, Q4KLinear, QuantizedKVCache, hf, hf_export, interop, ops

PAGE = Path(__file__).resolve().parent / "ops.md"
HEAD = """# Ops reference

<!-- Written by docs/make_reference.py from the docstrings; tests/test_docs.py compares. -->
"""
SECTIONS = ("Args", "Returns", "Raises")


def markdown(docstring: str) -> str:
    """A docstring of this package, reST marks and Google sections, as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.cleandoc(docstring))
    text = re.sub(r"``([^`]+)``", r"`\1`", text).replace("::\n", ":\n")
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
            lines += [f"**{section}**", ""]
        elif section and line and not line.startswith(" "):
            section = ""
            lines.append(line)
        elif section and re.match(r"    \S", line):
            entry = line.strip()
            name = re.match(r"([\w, ]+): (.*)", entry)
            if section != "Returns" and name:
                entry = f"- `{name[1]}`: {name[2]}" if name[2] else f"- `{name[1]}`"
            lines.append(entry)
        elif section and line:
            lines.append("  " + line.strip())
        else:
            lines.append(line)
    return "\n".join(lines).strip()


def parameter(p: inspect.Parameter) -> str:
    """As it is written in the source, on every version of Python."""
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    text = f"{stars}{p.name}: {annotation(p.annotation)}"
    if p.default is p.empty:
        return text
    default = f'"{p.default}"' if isinstance(p.default, str) else repr(p.default)
    return f"{text} = {default}"


def annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def signature(name: str, thing: Any) -> str:
    """The call, with one parameter a line where it does not fit into 100 columns."""
    found = inspect.signature(thing)
    parts: list[str] = []
    for p in found.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(parameter(p))
    answer = "" if inspect.isclass(thing) else f" -> {annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){answer}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){answer}"


def entry(name: str, thing: Any, level: str = "###") -> str:
    return (
        f"{level} {name}\n\n```text\n{signature(name, thing)}\n```\n\n{markdown(thing.__doc__)}\n"
    )


def functions(module: Any) -> Iterator[tuple[str, FunctionType]]:
    """A module's own public functions, in the order of its source."""
    for name, thing in vars(module).items():
        own = inspect.isfunction(thing) and thing.__module__ == module.__name__
        if own and not name.startswith("_") and thing.__doc__:
            yield name, thing


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """A class's own public methods and properties, then those of its bases in this package."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("torch_kvq")]
    members = {name: thing for base in reversed(own) for name, thing in vars(base).items()}
    ordered = [name for base in own for name in vars(base)]
    for name in dict.fromkeys(ordered):
        thing = members[name]
        called = thing.fget if isinstance(thing, property) else getattr(kind, name)
        if not name.startswith("_") and callable(called) and called.__doc__:
            yield name, thing if isinstance(thing, property) else called


def class_entry(kind: type) -> str:
    text = entry(kind.__name__, kind, "##")
    for name, thing in methods(kind):
        if isinstance(thing, property):
            text += f"\n### {kind.__name__}.{name}\n\n{markdown(thing.__doc__)}\n"
        else:
            text += "\n" + entry(f"{kind.__name__}.{name}", thing)
    return text


def page() -> str:
    parts = [HEAD, "## torch_kvq.ops\n\n" + markdown(ops.__doc__ or "") + "\n"]
    parts += [entry(f"ops.{name}", thing) for name, thing in functions(ops)]
    parts.append(f"### Packed\n\n{markdown(Packed.__doc__ or '')}\n")
    parts += [class_entry(kind) for kind in (KVFormat, QuantizedKVCache, Q4KLinear, hf.KVQCache)]
    parts.append(entry("hf.use", hf.use))
    parts.append(class_entry(hf_export.DecodeStep))
    parts.append(entry("hf_export.package", hf_export.package))
    parts.append("## torch_kvq.interop\n\n" + markdown(interop.__doc__ or "") + "\n")
    parts += [entry(f"interop.{name}", thing) for name, thing in functions(interop)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
