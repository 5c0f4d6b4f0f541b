"""The strict check: what a Metal compiler would object to, and the subset of Metal that this
project keeps to.

Four sources of objections: the translation; clang with address spaces and Metal's overload sets
(no conversions between address spaces, no ambiguous calls); rules on tokens; rules on the syntax
tree (syntax_rules.py)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from .. import requirements
from .kernels import Instance
from .lexer import Source
from .repair import compile_with_repairs
from .translate import TranslationError, translate

_SHIM = Path(__file__).resolve().parent.parent / "emu" / "shim" / "entry.h"
_BASE = [
    "-nostdinc",
    "-nostdinc++",
    "-fno-exceptions",
    "-fno-rtti",
    "-fsigned-char",
    "-DMSL_STRICT",
    "-x",
    "c++",
]
_BASE += ["-Xclang", "-cl-single-precision-constant", "-ferror-limit=0", "-Wno-unknown-pragmas"]
_METAL = ["-std=c++17", "-w"]
_SUBSET = """
    -std=c++14 -Werror=c++17-extensions -Wall -Wextra -Werror -Wvla -Wshadow -Wconversion
    -Wfloat-conversion -Waddress-of-packed-member -Wno-unused -Wno-unused-parameter
    -Wno-sign-conversion -Wno-implicit-int-float-conversion -Wno-undefined-internal
    -Wno-undefined-inline -Wno-duplicate-decl-specifier -Wno-ignored-qualifiers -Wno-sign-compare
    """.split()
MAX_THREADGROUP_BYTES = 32768

# Words that Metal has no use for, and those that the subset avoids.
_NOT_METAL = {
    "double": "Metal has no double",
    "virtual": "Metal has no virtual functions",
    "new": "Metal has no allocation",
    "delete": "Metal has no allocation",
    "throw": "Metal has no exceptions",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "goto": "Metal has no goto",
    "asm": "Metal has no assembly",
    "__asm__": "Metal has no assembly",
    "dynamic_cast": "Metal has no run-time types",
    "typeid": "Metal has no run-time types",
    "thread_local": "Metal has no thread_local",
    "wchar_t": "Metal has no wchar_t",
}
_NOT_SUBSET = {
    "union": "the subset has no unions",
    "printf": "the subset has no output",
    "register": "the subset has no register",
    "thread_elements": "the layout of a simdgroup_matrix over lanes is not documented",
}
# The one place that may use it: this function's kernel finds the layout out, and is tested under
# several (tests/metal/kernels/test_attention_kernels.py, test_any_layout_of_matrices).
_FINDS_LAYOUT = "kvq_elements"


def lint(preprocessed: str, subset: bool) -> list[str]:
    """Objections to a preprocessed source, as "place: message"."""
    problems = _tokens(preprocessed, subset)
    try:
        translation = translate(preprocessed, "strict")
    except TranslationError as error:
        return [*problems, str(error)]
    text, messages = _compile(translation.text, subset)
    problems += messages
    if subset and requirements.missing_for_strict_check() is None:
        from .syntax_rules import check_syntax

        problems += check_syntax(text, [*_BASE, *_SUBSET, "-include", str(_SHIM)])
    if not messages:
        problems += _threadgroup_memory(text, translation.instances)
    return list(dict.fromkeys(problems))


def _tokens(preprocessed: str, subset: bool) -> list[str]:
    banned = {**_NOT_METAL, **(_NOT_SUBSET if subset else {})}
    problems = []
    function = ""
    for token in Source(preprocessed).code:
        if token.kind == "name" and token.text == _FINDS_LAYOUT:
            function = token.text
        elif token.text == "}":
            function = ""
        if token.text == "thread_elements" and function == _FINDS_LAYOUT:
            continue
        if token.kind == "name" and token.text in banned:
            problems.append(f"{token.where}: {token.text}: {banned[token.text]}")
        elif subset and token.kind == "number" and _is_bare_float(token.text):
            problems.append(f"{token.where}: {token.text}: literal without f or h")
    return problems


def _is_bare_float(text: str) -> bool:
    if text[:2] in ("0x", "0X"):
        return "p" in text.lower() and text[-1] not in "fFhH"
    return re.search(r"[.eE]", text) is not None and text[-1] not in "fFhH"


def _compile(text: str, subset: bool) -> tuple[str, list[str]]:
    """The text with legal copies of structs repaired, and the compiler's objections."""
    compiler = requirements.clang()
    if compiler is None:
        raise RuntimeError(requirements.missing_for_emulator())
    qualified = "MSL_QUALIFIED_METHOD" in text
    with tempfile.TemporaryDirectory() as scratch:
        unit = Path(scratch) / "kernels.cpp"
        command = [
            compiler,
            *(_SUBSET if subset else _METAL),
            *_BASE,
            "-fsyntax-only",
            "-include",
            str(_SHIM),
            str(unit),
        ]
        text, result = compile_with_repairs(command, text, unit, copies_only=not qualified)
        if result.returncode == 0:
            return text, []
        result = subprocess.run(
            [*command, "-fno-caret-diagnostics"], capture_output=True, text=True
        )
        errors = re.findall(r"^(.*?:\d+):\d+: (?:fatal )?error: (.*)$", result.stderr, flags=re.M)
        messages = [f"{Path(place).name}: {message}" for place, message in errors]
        return text, messages or [result.stderr.strip() or "does not compile"]


# ---- threadgroup memory: clang lays the variables of every instance out; their sizes are read
# from its output

_SIZES = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}


def _threadgroup_memory(text: str, instances: list[Instance]) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        unit = Path(scratch) / "kernels.cpp"
        unit.write_text(text)
        command = [
            requirements.clang() or "",
            *_METAL,
            *_BASE,
            "-S",
            "-emit-llvm",
            "-O0",
            "-Xclang",
            "-disable-llvm-passes",
        ]
        result = subprocess.run(
            [*command, "-include", str(_SHIM), str(unit), "-o", "-"], capture_output=True, text=True
        )
    if result.returncode:
        return []
    types = dict(re.findall(r'^(%"?[\w.:<>, ]+"?) = type (.*)$', result.stdout, flags=re.M))
    totals: dict[str, int] = {}
    pattern = (
        r'^@"?([\w.$]+)"? = [^\n]*addrspace\(3\) global (.*?) '
        r"(?:undef|zeroinitializer|poison)(?:, [^\n]*)?$"
    )
    for name, kind in re.findall(pattern, result.stdout, flags=re.M):
        local = re.match(r"_ZZ(.*)E\d*[A-Za-z_]\w*?(?:_\d+)?$", name)
        owner = local.group(1) if local else name
        totals[owner] = totals.get(owner, 0) + _size_of(kind, types)
    problems = []
    for owner, total in totals.items():
        if total > MAX_THREADGROUP_BYTES:
            base = next(
                (
                    i.kernel.name
                    for i in instances
                    if f"{len(i.kernel.name)}{i.kernel.name}" in owner
                ),
                owner,
            )
            problems.append(
                f"kernel {base}: {total} bytes of threadgroup memory, "
                f"the limit is {MAX_THREADGROUP_BYTES}"
            )
    return problems


def _size_of(kind: str, types: dict[str, str]) -> int:
    kind = kind.strip()
    array = re.match(r"\[(\d+) x (.*)\]$", kind)
    if array:
        return int(array.group(1)) * _size_of(array.group(2), types)
    vector = re.match(r"<(\d+) x (.*)>$", kind)
    if vector:
        lanes = int(vector.group(1))
        return (4 if lanes == 3 else lanes) * _size_of(vector.group(2), types)
    if kind in types:
        return _size_of(types[kind], types)
    if kind.startswith(("{", "<{")):
        body = kind.strip("<>").strip("{} ")
        fields, depth, begin = [], 0, 0
        for i, c in enumerate(body + ","):
            depth += (c in "[{<") - (c in "]}>")
            if c == "," and depth == 0:
                fields.append(body[begin:i])
                begin = i + 1
        return sum(_size_of(f, types) for f in fields if f.strip())
    integer = re.match(r"i(\d+)$", kind)
    return max(1, int(integer.group(1)) // 8) if integer else _SIZES.get(kind, 0)
