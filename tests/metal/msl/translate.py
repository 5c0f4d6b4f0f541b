"""Metal Shading Language to C++ for the shim in emu/shim.

The input is preprocessed and self-contained. Each pass edits tokens in place; C++ deduces every
type, so a pass needs to know names and positions only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from .casts import rewrite_casts
from .kernels import Instance, Kernel, find_kernels, function_constant_uses
from .lexer import Source, TranslationError

Target = Literal["emulator", "strict", "ptx"]
SPACES = ("device", "constant", "threadgroup", "thread")


@dataclass
class FunctionConstant:
    """One [[function_constant(index)]]; optional where the source asks whether it is defined."""

    name: str
    type: str
    index: int
    is_optional: bool = False


@dataclass
class Translation:
    """The C++ text, and what it declares."""

    text: str
    kernels: dict[str, Kernel]
    instances: list[Instance]
    constants: list[FunctionConstant] = field(default_factory=list)


def translate(
    preprocessed: str, target: Target = "emulator", only: str | None = None
) -> Translation:
    """Translates a source. `only` keeps the instantiations whose host_name it matches."""
    source = Source(preprocessed)
    _coherent(source)
    constants = _function_constants(source)
    derived = _derived_constants(source, {c.name for c in constants})
    kernels, instances = find_kernels(source, target, only)
    _replace_constants(source, {c.name for c in constants} | derived)
    optional = {
        t.text[len("msl_defined_") :] for t in source.code if t.text.startswith("msl_defined_")
    }
    for constant in constants:
        constant.is_optional = constant.name in optional
    uses = function_constant_uses(source, [c.name for c in constants])
    for instance in instances:
        conditions = [
            f"msl_constant_{p.condition}" for p in instance.kernel.parameters if p.condition
        ]
        instance.uses = uses(" ".join((instance.expression, *conditions)))
    _attributes(source)
    _decay_array_parameters(source)
    _threadgroup_variables(source)
    _constant_objects(source)
    _method_qualifiers(source)
    rewrite_casts(source)
    _literals(source)
    for token in source.code:
        if token.kind == "name" and token.text in SPACES:
            token.text = "MSL_" + token.text
    text = source.render() + "\n"
    if target == "emulator":
        text += _tables(instances, constants)
    return Translation(text, kernels, instances, constants)


def _coherent(source: Source) -> None:
    """`device coherent(device) T*` of Metal 3.2: memory is coherent here."""
    for i, token in enumerate(source.code):
        if token.text == "coherent" and (
            source.is_(i - 1, *SPACES, "const") or source.is_(i + 1, *SPACES)
        ):
            source.erase(i, source.closing(i + 1) + 1 if source.is_(i + 1, "(") else i + 1)
    source.compact()


_QUALIFIERS = ("constant", "static", "const", "constexpr", "extern")


def _function_constants(source: Source) -> list[FunctionConstant]:
    """`constant T name [[function_constant(n)]];` becomes a macro of the shim."""
    found, code = [], source.code
    i = 0
    while i < len(code):
        if source.is_attribute(i) and source.is_(i + 2, "function_constant"):
            begin = i
            while begin > 0 and not code[begin - 1].text.endswith((";", "{", "}", "(", ",")):
                begin -= 1
            words = [t.text for t in code[begin : i - 1]]
            end = source.closing(i)
            if "constant" not in words or not source.is_(end + 1, ";"):
                i = end + 1  # the condition of a buffer
                continue
            expression = source.text(i + 4, source.closing(i + 3))
            if not re.fullmatch(r"[\s\d+*()xXa-fA-FuU-]+", expression):
                raise source.fail(i, f"function_constant({expression}): the index is not a number")
            index = int(
                eval(re.sub(r"(?<=\d)[uU]", "", expression), {"__builtins__": {}})
            )  # digits and operators only
            kind = " ".join(w for w in words if w and w not in _QUALIFIERS)
            constant = FunctionConstant(code[i - 1].text, kind, index)
            found.append(constant)
            source.erase(begin, end + 2)
            code[begin].text = f"MSL_FUNCTION_CONSTANT({kind}, {constant.name}, {constant.index});"
            i = end + 1
        i += 1
    source.compact()
    return found


def _derived_constants(source: Source, names: set[str]) -> set[str]:
    """`constant T name = expression of function constants;` is evaluated when it is used, as they
    change by launch."""
    derived: set[str] = set()
    if not names:
        return derived
    begin, i = 0, 0
    while i < len(source.code):
        text = source.code[i].text
        if text in ("(", "["):
            i = source.closing(i)
        elif text == "{":
            if not _opens_namespace(source, i):
                i = source.closing(i)
            begin = i + 1
        elif text == "}" or text.startswith("MSL_FUNCTION_CONSTANT("):
            begin = i + 1
        elif text == ";":
            head = [t.text for t in source.code[begin:i]]
            if "constant" in head and "=" in head and names & set(head[head.index("=") :]):
                equals = begin + head.index("=")
                kind = [t for t in head[: head.index("=") - 1] if t not in _QUALIFIERS]
                name = source.code[equals - 1].text
                derived.add(name)
                names = names | {name}
                for token in source.code[begin:equals]:
                    token.text = ""
                source.code[
                    begin
                ].text = f"MSL_INLINE {' '.join(kind)} msl_constant_{name}() {{ return ("
                source.code[equals].text = " "
                source.code[i].text = "); }"
            begin = i + 1
        i += 1
    source.compact()
    return derived


def _opens_namespace(source: Source, i: int) -> bool:
    """Whether the { at i opens a namespace or extern "C" block."""
    j = i - 1
    while j >= 0 and (source.is_name(j) or source.is_(j, "::")) and not source.is_(j, "namespace"):
        j -= 1
    return source.is_(j, "namespace") or (j >= 0 and source.code[j].kind == "string")


def _replace_constants(source: Source, names: set[str]) -> None:
    """Uses of function constants become calls that know whether there is a value."""
    if not names:
        return
    code = source.code
    declared: set[str] = set()
    hidden: dict[
        str, int
    ] = {}  # a parameter or variable of the same name hides the constant up to here
    for i, token in enumerate(code):
        if token.text.startswith(("MSL_FUNCTION_CONSTANT(", "MSL_INLINE ")):
            declared |= names & set(re.findall(r"\w+", token.text.replace("msl_constant_", " ")))
        if token.kind != "name":
            continue
        if token.text == "is_function_constant_defined":
            name = code[i + 2].text
            token.text = f"msl_defined_{name}"
            source.erase(i + 1, i + 4)
        elif token.text in names and not source.is_(i - 1, ".", "->"):
            if _declares(source, i):
                hidden[token.text] = _scope_end(source, i)
            elif token.text in declared and i > hidden.get(token.text, -1):
                token.text = f"msl_constant_{token.text}()"
    source.compact()


def _declares(source: Source, i: int) -> bool:
    """Whether the name at i is being declared: it follows a type."""
    if source.is_name(i - 1):
        return not source.is_(i - 1, "return", "else", "case")
    return (
        source.is_(i - 1, "*", "&")
        and source.is_(i + 1, ",", ")", "=", "[")
        and source.is_name(i - 2)
    )


def _scope_end(source: Source, i: int) -> int:
    """Index of the } that ends the scope of what is declared at i."""
    depth, j = 0, i
    while j > 0:
        j -= 1
        depth += {")": 1, "}": 1, "]": 1, "(": -1, "{": -1, "[": -1}.get(source.code[j].text, 0)
        if depth < 0:
            break
    if not source.is_(j, "("):
        return source.closing(j) if source.is_(j, "{") else len(source.code)
    end = source.closing(j)
    while not source.is_(end, "{", ";"):
        end = source.closing(end) + 1 if source.is_(end, "(", "[") else end + 1
    return source.closing(end) if source.is_(end, "{") else end


def _attributes(source: Source) -> None:
    """Attributes that remain mean nothing to the emulator (unroll hints, positions repeated on
    helper functions)."""
    i = 0
    while i < len(source.code):
        if source.is_attribute(i):
            end = source.closing(i)
            source.erase(i, end + 1)
            i = end
        i += 1
    source.compact()


def _decay_array_parameters(source: Source) -> None:
    """Parameter `constant T name[N]` to `constant T* name`: clang checks the address space before
    the array decays."""
    code = source.code
    for i, token in enumerate(code):
        if token.text not in ("device", "constant", "threadgroup"):
            continue
        if not source.is_(i - 1, "(", ",", "const"):
            continue
        j = i + 1
        while source.is_name(j) or source.is_(j, "::", "<"):
            if source.is_(j, "<"):
                end = source.closing_angle(j)
                if end is None:
                    break
                j = end
            j += 1
        if j - i >= 3 and source.is_(j, "[") and source.is_name(j - 1):
            end = source.closing(j)
            if source.is_(end + 1, ",", ")"):
                code[j - 1].prefix += "*"
                source.erase(j, end + 1)
    source.compact()


def _threadgroup_variables(source: Source) -> None:
    """`threadgroup T a[N], b;` in a function body to one MSL_THREADGROUP((T), name, (dimensions))
    each."""
    code = source.code
    for i, token in enumerate(code):
        if token.text not in ("threadgroup", "alignas") or not (
            i == 0 or source.is_(i - 1, "{", "}", ";", ":")
        ):
            continue
        end = i
        while not source.is_(end, ";"):
            end = source.closing(end) + 1 if source.is_(end, "[", "(", "{") else end + 1
            if end >= len(code):
                raise source.fail(i, "threadgroup declaration without an end")
        outside, j = [], i
        while j < end:
            if source.is_(j, "["):
                j = source.closing(j)
            elif source.is_(j, "alignas") and source.is_(j + 1, "("):
                j = source.closing(j + 1)
            else:
                outside.append(code[j].text)
            j += 1
        if "threadgroup" not in outside or {"*", "&", "("} & set(outside):
            continue
        if "=" in outside or "{" in outside:
            raise source.fail(i, "a threadgroup variable takes no initialiser")
        parts = source.split(i, end)
        first = parts[0][0]
        name = parts[0][1] - 1
        while source.is_(name, "]"):
            name = source.opening(name) - 1
        kind = re.sub(r"\b(threadgroup|volatile|static)\b", "", source.text(first, name))
        kind = re.sub(r"alignas\s*\(([^)]*)\)", r"__attribute__((aligned(\1)))", kind).strip()
        declarations = []
        for k, (start, stop) in enumerate(parts):
            at = name if k == 0 else start
            declarations.append(
                f"MSL_THREADGROUP(({kind}), {code[at].text}, ({source.text(at + 1, stop)}))"
            )
        source.erase(i, end)
        code[i].text = "; ".join(declarations)
    source.compact()


def _constant_objects(source: Source) -> None:
    """`constant T name(arguments);` of a class: its constructor would have to be qualified, so it
    loses the space."""
    for i, token in enumerate(source.code):
        if token.text != "constant" or not (i == 0 or source.is_(i - 1, ";", "}", "{", "static")):
            continue
        j = i + 1
        while source.is_name(j) or source.is_(j, "::"):
            j += 1
        if (
            source.is_(j, "(")
            and j - i >= 3
            and source.is_(source.closing(j) + 1, ";")
            and not source.is_(j - 2, "::")
        ):
            token.text = "const" if source.is_(i - 1, "static") else "static const"


def _method_qualifiers(source: Source) -> None:
    """`void f() const device {`: C++ has no address space on methods. The qualifier goes, and of
    overloads that differ in nothing else the first stays; calls on objects elsewhere are wrapped
    in msl_flat (toolchain.repair)."""
    code = source.code
    seen: set[tuple[int, str]] = set()
    for i, token in enumerate(code):
        if token.text not in SPACES or not source.is_(
            i + 1, "{", ":", ";", "const", "volatile", "="
        ):
            continue
        close = i - 1
        while source.is_(close, "const", "volatile"):
            close -= 1
        if not source.is_(close, ")"):
            continue
        begin = source.opening(close)
        while begin > 0 and not source.is_(begin - 1, ";", "{", "}", ":"):
            begin -= 1
        scope, depth = begin, 0
        while scope > 0:
            scope -= 1
            depth += {"}": 1, "{": -1}.get(code[scope].text, 0)
            if depth < 0:
                break
        end = i + 1
        while not source.is_(end, "{", ";"):
            end = source.closing(end) + 1 if source.is_(end, "(") else end + 1
        if source.is_(end, "{"):
            end = source.closing(end)
        is_const = any(t.text == "const" for t in code[close : i + 2])
        plain = " ".join(t.text for t in code[begin : close + 1] if t.text not in SPACES)
        token.text = "MSL_QUALIFIED_METHOD"
        if (scope, f"{plain} {is_const}") in seen:
            source.erase(begin, end + 1)
            code[end].text = ";"  # where the next declaration starts
        seen.add((scope, f"{plain} {is_const}"))
    source.compact()


_DOUBLE = re.compile(
    r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|0[xX][\da-fA-F.]+[pP][+-]?\d+"
)

_FUNCTION_NAMES = ("__func__", "__FUNCTION__", "__PRETTY_FUNCTION__")


def _literals(source: Source) -> None:
    """Literals of half and bfloat: 1.0h, 0x1p-3h, 2bf. Those without a suffix are float: clang's
    option for that does not outlive the instantiation of a template. Strings and names of
    functions, which are in the constant address space."""
    for i, token in enumerate(source.code):
        if token.kind == "string" and source.is_(i - 1, "(", ","):
            j = i
            while j > 0 and not source.is_(j, "(", ";", "{"):
                j = source.opening(j) - 1 if source.is_(j, ")", "]", "}") else j - 1
            if not source.is_(j - 1, "static_assert"):
                token.text = f"(MSL_constant char*)(ulong){token.text}"
        elif token.text in _FUNCTION_NAMES:
            token.text = f"(MSL_constant char*)(ulong){token.text}"
        if token.kind == "number" and _DOUBLE.fullmatch(token.text):
            token.suffix = "f" + token.suffix
        match = (
            re.fullmatch(r"(\d[\w.]*|\.\d[\w.+-]*|\d[\w.+-]*?)(h|H|bf|BF)", token.text)
            if token.kind == "number"
            else None
        )
        if not match or (token.text[:2] in ("0x", "0X") and "p" not in token.text.lower()):
            continue
        value, suffix = match.groups()
        is_integer = re.fullmatch(r"\d+", value) is not None
        kind = "half" if suffix in ("h", "H") else "bfloat"
        token.text = f"(({kind}){value}{'.0' if is_integer else ''}f)"


def _tables(instances: list[Instance], constants: list[FunctionConstant]) -> str:
    """The tables that the runtime reads."""
    order = {c.name: n for n, c in enumerate(constants)}
    lines = []
    for instance in instances:
        uses = ", ".join(f"{order[name]}u" for name in instance.uses) or "0u"
        lines.append(f"static const uint msl_uses_{instance.id}[] = {{{uses}}};")
    lines.append("const emu_kernel_entry emu_kernel_table[] = {")
    for instance in instances:
        scope, id_ = instance.scope, instance.id
        params = f"{scope}msl_params_{id_}"
        lines.append(
            f"  {{{{{instance.literal}, {params}.param, {params}.count, "
            f"(uint)({scope}msl_threads_{id_}), msl_uses_{id_}, {len(instance.uses)}u}}, "
            f"{scope}msl_run_{id_}, {params}.condition}},"
        )
    if not instances:
        lines.append("  {}")
    lines.append("};")
    lines.append(f"const uint emu_kernel_count = {len(instances)};")
    lines.append("const emu_constant_entry emu_constant_table[] = {")
    for c in constants:
        lines.append(
            f'  {{{{"{c.name}", "{c.type}", {c.index}u, (uint)sizeof(msl_value_{c.name})}}, '
            f"(void*)&msl_value_{c.name}, &msl_defined_{c.name}, {str(c.is_optional).lower()}}},"
        )
    if not constants:
        lines.append("  {}")
    lines.append("};")
    lines.append(f"const uint emu_constant_count = {len(constants)};")
    return "\n".join(lines) + "\n"


__all__ = ["FunctionConstant", "Translation", "TranslationError", "translate"]
