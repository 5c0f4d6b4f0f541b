"""Kernel functions: their parameters, their instantiations, and the entry points written for
them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .lexer import Source, string_value

POSITIONS = frozenset(
    """thread_position_in_grid thread_position_in_threadgroup threadgroup_position_in_grid
    threads_per_threadgroup dispatch_threads_per_threadgroup threadgroups_per_grid
    threads_per_grid grid_size grid_origin thread_index_in_threadgroup thread_index_in_simdgroup
    simdgroup_index_in_threadgroup simdgroups_per_threadgroup dispatch_simdgroups_per_threadgroup
    threads_per_simdgroup thread_execution_width thread_index_in_quadgroup
    quadgroup_index_in_threadgroup quadgroups_per_threadgroup""".split()
)
#: A name with its namespaces: "a :: b ::", "f".
_QUALIFIED = re.compile(r"((?:::\s*)?(?:\w+\s*::\s*)*)(\w+)")
_CAST = re.compile(r"static_cast<[^>]*>\(")


def _base(expression: str) -> re.Match[str] | None:
    """The template of an instance, or the function that is chosen by its parameters."""
    cast = _CAST.match(expression)
    return _QUALIFIED.match(expression, cast.end() if cast else 0)


@dataclass
class Parameter:
    name: str
    attribute: str  # "buffer", "threadgroup" or one of POSITIONS
    index: str  # an expression; "-1" for positions
    condition: str | None  # function constant under which the buffer exists
    declaration: str


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    is_template: bool
    max_threads: str | None
    template_parameters: list[tuple[str, bool]] = field(default_factory=list)  # kind, has default
    threads_of: str = ""  # the struct with max_threads of a template

    def takes(self, arguments: list[str]) -> bool:
        """Whether the template may have these arguments: how many, and no value for a type."""
        parameters = self.template_parameters
        needed = sum(not has_default for _, has_default in parameters)
        return needed <= len(arguments) <= len(parameters) and not any(
            kind == "type" and re.match(r"[\d'-]|(true|false)$", argument)
            for (kind, _), argument in zip(parameters, arguments, strict=False)
        )


@dataclass
class Instance:
    """A kernel that a host can ask for by name."""

    host_name: str
    literal: str
    expression: str  # of the function: name, or name<arguments>
    kernel: Kernel
    id: str
    scope: str  # enclosing namespaces, "a::b::"
    uses: list[str] = field(default_factory=list)  # function constants


def find_kernels(
    source: Source, target: str, only: str | None
) -> tuple[dict[str, Kernel], list[Instance]]:
    """Records every kernel, takes its attributes out of the text, and writes an entry point after
    each kernel and in the place of each explicit instantiation."""
    finder = _Finder(source, target, only)
    finder.run()
    return finder.kernels, finder.instances


class _Finder:
    def __init__(self, source: Source, target: str, only: str | None) -> None:
        self.source, self.target = source, target
        self.only = re.compile(only) if only else None
        self.kernels: dict[str, Kernel] = {}
        self.overloads: dict[str, list[Kernel]] = {}
        self.instances: list[Instance] = []
        self.scopes: list[tuple[str, int]] = []  # open namespaces: name, index of their }

    def run(self) -> None:
        source, i = self.source, 0
        while i < len(source.code):
            while self.scopes and i > self.scopes[-1][1]:
                self.scopes.pop()
            if source.is_(i, "namespace"):
                i = self._namespace(i)
            elif source.is_(i, "template") and not source.is_(i + 1, "<"):
                i = self._instantiation(i)
            elif source.is_attribute(i) or source.is_(i, "kernel"):
                i = self._declaration(i)
            i += 1
        source.compact()

    def _namespace(self, i: int) -> int:
        source, j = self.source, i + 1
        while source.is_name(j) or source.is_(j, "::"):
            j += 1
        if source.is_(j, "{"):
            self.scopes.append((source.text(i + 1, j).replace(" ", ""), source.closing(j)))
            return j
        return i

    def _skip_attributes(self, i: int) -> tuple[int, list[tuple[int, int]]]:
        """Past attributes and the word kernel from i on; also the ranges of the attributes."""
        source, ranges = self.source, []
        while True:
            if source.is_attribute(i):
                end = source.closing(i)
                ranges.append((i, end + 1))
                i = end + 1
            elif source.is_(i, "kernel"):
                ranges.append((i, i + 1))
                i += 1
            else:
                return i, ranges

    def _names(self, start: int, stop: int) -> set[str]:
        return {t.text for t in self.source.code[start:stop] if t.kind == "name"}

    def _declaration(self, i: int) -> int:
        """`[[kernel, ...]] void f(...) {`, `kernel [[...]] void f(...) {`."""
        source = self.source
        after, ranges = self._skip_attributes(i)
        words = set().union(*(self._names(a, b) for a, b in ranges))
        if "kernel" not in words:
            return source.closing(i)
        if words & {"vertex", "fragment"}:
            raise source.fail(i, "only compute kernels run here")
        while source.is_(after, "static", "inline", "METAL_FUNC", "__attribute__"):
            after += 1
        if not source.is_(after, "void"):
            raise source.fail(i, "a kernel must return void")
        name_at = after + 1
        if not source.is_(name_at + 1, "("):
            for a, b in ranges:
                source.erase(a, b)
            return name_at  # an explicit specialisation: the primary template has been read
        open_, name = name_at + 1, source.code[name_at].text
        close = source.closing(open_)
        body, late = self._skip_attributes(close + 1)
        max_threads = self._max_threads(ranges + late)
        if source.is_(body, ";"):  # a declaration alone
            for a, b in ranges + late:
                source.erase(a, b)
            source.code[after].prefix += "MSL_KERNEL_FN "
            return body
        if not source.is_(body, "{"):
            raise source.fail(name_at, f"kernel {name}: body expected")
        header_at = self._template_header(i)
        parameters = [self._parameter(name, a, b, []) for a, b in source.split(open_ + 1, close)]
        self._number(name, name_at, parameters)
        kernel = Kernel(name, parameters, header_at is not None, max_threads)
        self.kernels[name] = kernel
        same_name = self.overloads.setdefault(name, [])
        kernel.threads_of = f"msl_threads_of_{name}" + (f"_{len(same_name)}" if same_name else "")
        same_name.append(kernel)
        for a, b in ranges + late:
            source.erase(a, b)
        source.code[after].prefix += "MSL_KERNEL_FN "
        if header_at is not None:
            kernel.template_parameters = self._template_parameters(header_at)
        if header_at is not None and max_threads:
            template = re.sub(r"\bstatic\b|\binline\b", "", source.text(header_at, i))
            source.code[header_at].prefix = (
                f"{template} struct {kernel.threads_of} "
                f"{{ static constexpr uint value = ({max_threads}); }}; "
                + source.code[header_at].prefix
            )
        end = source.closing(body)
        if header_at is None:
            # Qualified, as metal:: may have the same name.
            own = "::" + "".join(f"{space}::" for space, _ in self.scopes if space) + name
            source.code[end].suffix += self._entry(name, f'"{name}"', own, kernel)
        return body

    def _template_header(self, i: int) -> int | None:
        """Index of `template` of the declaration that contains token i, or None."""
        source, j = self.source, i - 1
        while j >= 0 and not source.is_(j, ";", "}", "{"):
            if source.is_(j, "template"):
                return j if source.is_(j + 1, "<") and not source.is_(j + 2, ">") else None
            j -= 1
        return None

    def _template_parameters(self, header_at: int) -> list[tuple[str, bool]]:
        source = self.source
        end = source.closing_angle(header_at + 1)
        if end is None:
            return []
        return [
            (
                "type" if source.is_(a, "typename", "class") else "value",
                any(source.is_(j, "=") for j in range(a, b)),
            )
            for a, b in source.split(header_at + 2, end)
        ]

    def _max_threads(self, ranges: list[tuple[int, int]]) -> str | None:
        source = self.source
        for a, b in ranges:
            for j in range(a, b):
                if source.is_(j, "max_total_threads_per_threadgroup"):
                    return source.text(j + 2, source.closing(j + 1))
        return None

    def _parameter(self, kernel: str, start: int, stop: int, _: list[Parameter]) -> Parameter:
        source = self.source
        attributes: dict[str, str] = {}
        name_at, i = None, start
        while i < stop:
            if source.is_attribute(i):
                name_at = i - 1 if name_at is None else name_at
                end = source.closing(i)
                for a, _ in source.split(i + 2, end - 1):
                    argument = (
                        source.text(a + 2, source.closing(a + 1)) if source.is_(a + 1, "(") else ""
                    )
                    attributes[source.code[a].text] = argument
                i = end
            i += 1
        name_at = stop - 1 if name_at is None else name_at
        is_array = source.is_(name_at, "]")
        while source.is_(name_at, "]"):
            name_at = source.opening(name_at) - 1
        name = source.code[name_at].text
        declaration = source.text(start, name_at + 1)
        condition = attributes.pop("function_constant", None)
        for harmless in (
            "access",
            "raster_order_group",
            "maybe_unused",
            "alignas",
            "max_total_threads_per_threadgroup",
        ):
            attributes.pop(harmless, None)
        if not attributes:
            if not is_array and not re.search(r"[*&]", declaration):
                raise source.fail(
                    start, f"kernel {kernel}: parameter without attribute: {declaration}"
                )
            return Parameter(name, "buffer", "", condition, declaration)
        if len(attributes) != 1:
            raise source.fail(
                start, f"kernel {kernel}: attributes not understood: {', '.join(attributes)}"
            )
        ((attribute, index),) = attributes.items()
        if attribute not in ("buffer", "threadgroup") and attribute not in POSITIONS:
            raise source.fail(start, f"kernel {kernel}: [[{attribute}]] is not supported")
        return Parameter(name, attribute, index or "-1", condition, declaration)

    def _number(self, kernel: str, at: int, parameters: list[Parameter]) -> None:
        """Gives buffers without an index the next free one and refuses an index used twice."""
        for attribute in ("buffer", "threadgroup"):
            used: set[str] = set()
            for p in parameters:
                if p.attribute != attribute:
                    continue
                if p.index == "":
                    p.index = str(max((int(u, 0) for u in used if u.isdigit()), default=-1) + 1)
                if p.index in used and not p.condition:
                    raise self.source.fail(
                        at, f"kernel {kernel}: {attribute}({p.index}) is used twice"
                    )
                used.add(p.index)

    def _instantiation(self, i: int) -> int:
        """`template [[host_name("x")]] [[kernel]] decltype(f<T>) f<T>;` and its other forms."""
        source = self.source
        after, ranges = self._skip_attributes(i + 1)
        words = set().union(*(self._names(a, b) for a, b in ranges)) if ranges else set()
        if "kernel" not in words and "host_name" not in words:
            return i
        end = after
        while not source.is_(end, ";"):
            end = source.closing(end) + 1 if source.is_(end, "(", "[", "{") else end + 1
        host_name = self._host_name(ranges)
        expression = self._instance_expression(after, end)
        base = _base(expression)
        kernel = self._template(base.group(2), expression) if base else None
        if kernel is None:
            raise source.fail(i, f"instantiation of an unknown kernel: {expression}")
        host_name = host_name if host_name is not None else base.group(2)
        if self.only and not self.only.search(host_name):
            source.erase(i, end + 1)
            return end
        entry = self._entry(host_name, '"' + host_name + '"', expression, kernel)
        if self.target == "strict":
            for a, b in ranges:
                source.erase(a, b)
            for j in range(after, end):  # attributes of the repeated parameters
                if source.is_attribute(j) and source.code[j].text:
                    source.erase(j, source.closing(j) + 1)
        else:
            source.erase(i, end + 1)
            source.code[end].text = ";"
        source.code[end].suffix += entry
        return end

    def _template(self, name: str, expression: str) -> Kernel | None:
        """The kernel of that name which an instance is of."""
        found = self.overloads.get(name, [])
        instance = Source(expression)
        angle = next((i for i, t in enumerate(instance.code) if t.text == "<"), None)
        if len(found) < 2 or angle is None or _CAST.match(expression):
            return found[-1] if found else None
        end = instance.closing_angle(angle) or len(instance.code)
        arguments = [instance.text(a, b) for a, b in instance.split(angle + 1, end)]
        return next((k for k in reversed(found) if k.takes(arguments)), found[-1])

    def _host_name(self, ranges: list[tuple[int, int]]) -> str | None:
        source = self.source
        for a, b in ranges:
            for j in range(a, b):
                if source.is_(j, "host_name"):
                    return string_value(source.text(j + 1, source.closing(j + 1) + 1))
        return None

    def _instance_expression(self, start: int, end: int) -> str:
        source = self.source
        if source.is_(start, "decltype"):  # decltype(f<T>) f<T>
            return source.text(source.closing(start + 1) + 1, end)
        if source.is_(start, "void"):  # void f<T>(parameters) or void f(parameters)
            j = start + 1
            while not source.is_(j, "(", "<"):
                j += 1
            if source.is_(j, "<"):
                close = source.closing_angle(j)
                if close is None:
                    raise source.fail(start, "template arguments not understood")
                return source.text(start + 1, close + 1)
            parts = source.split(j + 1, source.closing(j))
            types = ", ".join(self._parameter_type(a, b) for a, b in parts)
            return f"static_cast<void (*)({types})>({source.text(start + 1, j)})"
        return source.text(start + 1, end)  # alias f<T>

    def _parameter_type(self, start: int, stop: int) -> str:
        source = self.source
        for i in range(start, stop):
            if source.is_attribute(i):
                stop = i
                break
        if (
            source.is_name(stop - 1)
            and stop - start > 1
            and not source.is_(stop - 2, "const", "device", "constant")
        ):
            stop -= 1
        return source.text(start, stop)

    def _entry(self, host_name: str, literal: str, expression: str, kernel: Kernel) -> str:
        """Text of the entry point, and the record of the instance."""
        id_ = f"{re.sub(r'[^0-9A-Za-z_]', '_', host_name)}"
        if any(other.id == id_ for other in self.instances):
            id_ = f"{id_}_{len(self.instances)}"
        scope = "".join(f"{name}::" for name, _ in self.scopes if name)
        self.instances.append(Instance(host_name, literal, expression, kernel, id_, scope))
        specs = ", ".join(f"msl_spec<msl_{p.attribute}, int({p.index})>" for p in kernel.parameters)
        specs = f"({specs})"
        function = re.sub(r"\b(device|constant|threadgroup|thread)\b", r"MSL_\1", expression)
        is_cast = _CAST.match(expression) is not None
        function = function if is_cast else f"&{function}"
        if self.target == "strict":
            return f" MSL_STRICT_KERNEL({id_}, ({function}), {specs})"
        if self.target == "ptx":
            return self._ptx_entry(id_, function, specs, kernel)
        named = ", ".join(
            "{{{}, {}}}".format(
                f'"{p.name}"',
                f"+[]() -> bool {{ return msl_constant_{p.condition}(); }}"
                if p.condition
                else "nullptr",
            )
            for p in kernel.parameters
        )
        threads = "EMU_MAX_THREADS"
        # The arguments of a template that its parameters choose are not known here.
        if kernel.max_threads and not (kernel.is_template and is_cast):
            threads = kernel.max_threads
            if kernel.is_template:
                arguments = expression[expression.index("<") :] if "<" in expression else "<>"
                scope = _base(expression).group(1)
                threads = f"{scope}{kernel.threads_of}{arguments}::value"
        return (
            f" MSL_KERNEL({id_}, ({function}), {specs}, {named or '{nullptr, nullptr}'})"
            f" static constexpr uint msl_threads_{id_} = {threads};"
        )

    def _ptx_entry(self, id_: str, function: str, specs: str, kernel: Kernel) -> str:
        def count(attribute: str) -> int:
            indices = [int(p.index, 0) for p in kernel.parameters if p.attribute == attribute]
            return max(indices, default=-1) + 1

        buffers = [f"b{n}" for n in range(count("buffer"))]
        offsets = [f"o{n}" for n in range(count("threadgroup"))]
        parameters = [f"MSL_device void* {b}" for b in buffers] + [f"uint {o}" for o in offsets]
        return (
            f" MSL_PTX_KERNEL({id_}, ({function}), {specs}, ({', '.join(parameters)}), "
            f"({', '.join(buffers) or 'nullptr'}), ({', '.join(offsets) or '0u'}))"
        )


def function_constant_uses(source: Source, constants: list[str]) -> Callable[[str], list[str]]:
    """A function from an instantiation to the function constants that it reaches: by the calls
    that stand for them, through the names of functions, types and constants."""
    bodies: dict[str, set[str]] = {}
    begin, i, code = 0, 0, source.code
    while i < len(code):
        text = code[i].text
        if text == "(":
            i = source.closing(i)
        elif text in (";", "{", "}"):
            is_scope = source.is_(begin, "namespace", "extern")
            end = source.closing(i) if text == "{" and not is_scope else i
            names = set()
            for token in code[begin : end + 1]:
                names.update(re.findall(r"[A-Za-z_]\w*", token.text))
            for name in _declared(source, begin, i):
                bodies.setdefault(name, set()).update(names)
            begin = end + 1
            i = end
        i += 1

    def reach(expression: str) -> list[str]:
        todo = set(re.findall(r"[A-Za-z_]\w*", expression))
        seen: set[str] = set()
        while todo:
            name = todo.pop()
            seen.add(name)
            todo |= bodies.get(name, set()) - seen
        return [c for c in constants if {f"msl_constant_{c}", f"msl_defined_{c}"} & seen]

    return reach


def _declared(source: Source, start: int, stop: int) -> list[str]:
    """Names that the declaration at start..stop declares, outside its template and parameters."""
    names, i = [], start
    while i <= stop:
        token = source.code[i]
        if token.text.startswith("MSL_INLINE"):
            names += re.findall(r"msl_constant_\w+", token.text)
        elif token.text == "<":
            i = source.closing_angle(i) or i
        elif token.kind == "name" and (
            source.is_(i + 1, "(", "=", "{", ":", "[")
            or source.is_(i - 1, "struct", "class", "using", "enum")
        ):
            names.append(token.text)
        if source.is_(i, "("):
            i = source.closing(i)
        i += 1
    return names
