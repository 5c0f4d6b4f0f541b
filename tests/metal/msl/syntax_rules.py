"""Rules of the strict check that need the syntax tree: read with libclang through clang.cindex."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import requirements

_DEBIAN = Path("/usr/lib/python3/dist-packages/clang")


@functools.cache
def _cindex() -> ModuleType:
    """clang.cindex: installed, or that of the Debian package, which a virtual environment does
    not see."""
    if importlib.util.find_spec("clang") is None:
        spec = importlib.util.spec_from_file_location(
            "clang", _DEBIAN / "__init__.py", submodule_search_locations=[str(_DEBIAN)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["clang"] = package
        spec.loader.exec_module(package)
    import clang.cindex as cindex

    cindex.Config.set_library_file(requirements.libclang())
    return cindex


def check_syntax(text: str, flags: list[str]) -> list[str]:
    """Objections to a translated source."""
    with tempfile.TemporaryDirectory() as scratch:
        unit = Path(scratch) / "kernels.cpp"
        unit.write_text(text)
        arguments = [f for f in flags if f not in ("-Werror", "-x", "c++")]
        tree = _cindex().Index.create().parse(str(unit), ["-x", "c++", *arguments])
        return _Rules(tree, text, str(unit)).run()


def _kind(type_: Any) -> Any:
    """The kind of a type; half and bfloat have none in clang.cindex."""
    try:
        return type_.kind
    except ValueError:
        return None


class _Rules:
    def __init__(self, tree: Any, text: str, path: str) -> None:
        self.cindex = _cindex()
        self.kind = self.cindex.CursorKind
        self.tree, self.text, self.path = tree, text, path
        self.problems: list[str] = []
        self.calls: dict[str, set[str]] = {}
        self.names: dict[str, str] = {}

    def run(self) -> list[str]:
        for cursor in self.tree.cursor.get_children():
            if cursor.location.file is not None and cursor.location.file.name == self.path:
                self._visit(cursor, None)
        self._recursion()
        return self.problems

    def _object(self, cursor: Any, message: str) -> None:
        name = f"{cursor.spelling}: " if cursor.spelling else ""
        self.problems.append(f"{self._place(cursor)}: {name}{message}")

    def _place(self, cursor: Any) -> str:
        """File and line that the user sees: from the last line marker before the cursor."""
        before = self.text[: cursor.location.offset]
        markers = list(
            re.finditer(r'^#\s*(?:line\s+)?(\d+)\s+"([^"]*)"[^\n]*\n', before, flags=re.M)
        )
        if not markers:
            return f"source:{cursor.location.line}"
        line = int(markers[-1].group(1)) + before[markers[-1].end() :].count("\n")
        return f"{Path(markers[-1].group(2)).name}:{line}"

    def _visit(self, cursor: Any, function: str | None) -> None:
        kind, kinds = cursor.kind, self.kind
        if kind in (kinds.FUNCTION_DECL, kinds.FUNCTION_TEMPLATE, kinds.CXX_METHOD):
            function = cursor.get_usr()
            self.calls.setdefault(function, set())
            self.names[function] = cursor.spelling
            self._result(cursor)
        if kind in (kinds.VAR_DECL, kinds.PARM_DECL, kinds.FIELD_DECL):
            self._pointer(cursor)
        if kind == kinds.VAR_DECL:
            self._variable(cursor, function)
        if kind in (
            kinds.CSTYLE_CAST_EXPR,
            kinds.CXX_REINTERPRET_CAST_EXPR,
            kinds.CXX_STATIC_CAST_EXPR,
        ):
            self._cast(cursor)
        if kind == kinds.LAMBDA_EXPR:
            self._object(cursor, "lambda")
        if kind == kinds.CALL_EXPR and function and cursor.referenced is not None:
            self.calls[function].add(cursor.referenced.get_usr())
        for child in cursor.get_children():
            self._visit(child, function)

    def _is_plain(self, pointee: Any) -> bool:
        return pointee.get_address_space() == 0

    def _pointer(self, cursor: Any) -> None:
        kinds = self.cindex.TypeKind
        type_ = cursor.type
        if _kind(type_) not in (kinds.POINTER, kinds.LVALUEREFERENCE):
            return
        pointee = type_.get_pointee()
        if _kind(pointee.get_canonical()) in (kinds.FUNCTIONPROTO, kinds.FUNCTIONNOPROTO):
            self._object(cursor, "function pointer")
        elif self._is_plain(pointee) and not re.search(
            r"\b(MSL_thread|auto)\b", self._declaration(cursor)
        ):
            self._object(cursor, "pointer or reference without an address space")

    def _declaration(self, cursor: Any) -> str:
        """From the start of the declaration to the name; the brackets of T (&a)[N] are part of
        it."""
        piece = self.text[max(0, cursor.location.offset - 240) : cursor.location.offset]
        piece = re.sub(r"\(\s*([*&]\s*)$", r" \1", piece)
        depth, i = 0, len(piece) - 1
        while i >= 0:
            c = piece[i]
            if c == ">":
                depth += 1
            elif c == "<":
                depth -= 1
                if depth < 0:
                    break
            elif c in ";{}(" or (c == "," and depth == 0):
                break
            i -= 1
        return piece[i + 1 :]

    def _variable(self, cursor: Any, function: str | None) -> None:
        kinds = self.cindex.TypeKind
        type_ = cursor.type
        if type_.spelling in ("double", "long double"):
            self._object(cursor, "double")
        while _kind(type_) in (kinds.CONSTANTARRAY, kinds.INCOMPLETEARRAY):
            type_ = type_.get_array_element_type()
        space = type_.get_address_space()
        if function is None and cursor.semantic_parent.kind in (
            self.kind.TRANSLATION_UNIT,
            self.kind.NAMESPACE,
        ):
            if space != 2 and not cursor.spelling.startswith("msl_"):
                self._object(cursor, "a variable of the program is in the constant address space")
        elif (
            cursor.storage_class == self.cindex.StorageClass.STATIC
            and space != 3
            and function is not None
        ):
            self._object(cursor, "static variable in a function")
        elif space == 3 and function is not None:
            before = self.text[: cursor.location.offset]
            if not self._in_kernel(function, before):
                self._object(cursor, "threadgroup variable outside a kernel")

    def _in_kernel(self, function: str, before: str) -> bool:
        name = re.escape(self.names[function])
        return re.search(rf"\bMSL_KERNEL_FN\b[^;{{}}]*\b{name}\s*\(", before) is not None

    def _cast(self, cursor: Any) -> None:
        kinds = self.cindex.TypeKind
        if _kind(cursor.type) != kinds.POINTER:
            return
        target = cursor.type.get_pointee()
        operand = list(cursor.get_children())[-1].type
        if _kind(operand) == kinds.POINTER:
            source_space = operand.get_pointee().get_address_space()
        elif _kind(operand) in (kinds.CONSTANTARRAY, kinds.INCOMPLETEARRAY):
            source_space = operand.get_array_element_type().get_address_space()
        else:
            source_space = target.get_address_space()
        if source_space != target.get_address_space():
            self._object(cursor, "cast from one address space to another")
        elif self._is_plain(target):
            written = self.text[cursor.extent.start.offset : cursor.extent.end.offset]
            if "MSL_thread" not in re.split(r"[)>]", written)[0]:
                self._object(cursor, "cast to a pointer without an address space")

    def _result(self, cursor: Any) -> None:
        kinds = self.cindex.TypeKind
        type_ = cursor.result_type
        if _kind(type_) in (kinds.POINTER, kinds.LVALUEREFERENCE) and self._is_plain(
            type_.get_pointee()
        ):
            if "MSL_thread" not in self._declaration(cursor):
                self._object(cursor, "returns a pointer or reference without an address space")

    def _recursion(self) -> None:
        for start in self.calls:
            todo, seen = list(self.calls[start]), set()
            while todo:
                called = todo.pop()
                if called == start:
                    self.problems.append(f"{self.names[start]}: recursion")
                    break
                if called not in seen:
                    seen.add(called)
                    todo.extend(self.calls.get(called, ()))
