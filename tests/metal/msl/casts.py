"""Constructors and casts of vectors: T(a, b), T{a, b}, (T)x and static_cast<T>(x) become
msl_make<T>(...). What is made from a comparison of vectors has false and true.

clang's ext vectors have no constructors, and a C-style cast between two of equal size
reinterprets the bits. T is a vector, or a template parameter or alias that may name one."""

from __future__ import annotations

from .lexer import Source

_ELEMENTS = "float half bfloat char uchar short ushort int uint long ulong bool".split()
# half and bfloat: clang has no conversion between them.
VECTORS = (
    frozenset(f"{t}{n}" for t in _ELEMENTS for n in "234")
    | {"half", "bfloat"}
    | {f"{t}_t{n}" for t in ("uint8", "int8", "uint16", "int16", "uint32", "int32") for n in "24"}
)
_SCALARS = frozenset(
    (*_ELEMENTS, "unsigned", "signed", "size_t", "uint8_t", "int8_t", "uint16_t", "int16_t")
)
_KEYWORDS = frozenset(("return", "else", "case", "do", "co_return"))
_RELATIONS = frozenset(("<", ">", "<=", ">=", "==", "!=", "&&", "||"))
_UNARY = frozenset(("-", "+", "!", "~", "*", "&", "++", "--"))


def rewrite_casts(source: Source) -> None:
    _Casts(source).run()


class _Casts:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.parameters, self.aliases, self.alias_templates = self._declared_names()
        self.types = VECTORS | self.parameters | self.aliases

    def _declared_names(self) -> tuple[set[str], set[str], set[str]]:
        """Template type parameters, aliases, alias templates."""
        source, code = self.source, self.source.code
        parameters: set[str] = set()
        aliases: set[str] = set()
        templates = {"vec"}
        for i, token in enumerate(code):
            if (
                token.text in ("typename", "class")
                and source.is_name(i + 1)
                and source.is_(i + 2, ",", ">", "=")
            ):
                parameters.add(code[i + 1].text)
            elif token.text == "using" and source.is_name(i + 1) and source.is_(i + 2, "="):
                (templates if source.is_(i - 1, ">") else aliases).add(code[i + 1].text)
            elif token.text == "typedef":
                j = i
                while j < len(code) and not source.is_(j, ";", "{"):
                    j += 1
                if source.is_(j, ";") and source.is_name(j - 1):
                    aliases.add(code[j - 1].text)
        return parameters, aliases, templates

    def run(self) -> None:
        i = 0
        while i < len(self.source.code):
            token = self.source.code[i]
            if token.kind == "name":
                if token.text == "static_cast":
                    self._static_cast(i)
                elif token.text == "auto":
                    self._deduced(i)
                elif token.text in self.types:
                    self._constructor(i, i)
                elif token.text in self.alias_templates and self.source.is_(i + 1, "<"):
                    end = self.source.closing_angle(i + 1)
                    if end is not None:
                        self._constructor(i, end)
            elif token.text == "(":
                self._c_cast(i)
                if self.source.is_(i, "("):
                    self._component(i)
            i += 1

    def _type_range(self, start: int, stop: int) -> bool:
        """Whether start..stop-1 spells a type by value that may be a vector."""
        source = self.source
        while start < stop and source.is_(start, "const", "typename", "thread"):
            start += 1
        if stop - start < 1:
            return False
        last = stop - 1
        if source.is_(last, ">"):
            open_ = source.opening_angle(last)
            if open_ is None or open_ - 1 < start:
                return False
            last = open_ - 1
            known = source.code[last].text in self.alias_templates
        else:
            known = source.code[last].text in self.types
        return known and self._qualified_start(last) == start

    def _qualified_start(self, i: int) -> int:
        """Index of the first token of the qualified name that ends at i."""
        source = self.source
        while source.is_(i - 1, "::"):
            j = i - 2
            if source.is_(j, "template"):
                j -= 1
            if source.is_(j, ">"):
                open_ = source.opening_angle(j)
                if open_ is None:
                    return i
                j = open_ - 1
            if j < 0 or source.code[j].kind != "name" or source.code[j].text in _KEYWORDS:
                return i - 1
            i = j
        return i

    def _static_cast(self, i: int) -> None:
        source = self.source
        end = source.closing_angle(i + 1)
        if end is not None and source.is_(end + 1, "(") and self._type_range(i + 2, end):
            source.code[i].text = self._maker(end + 1)

    def _maker(self, paren: int) -> str:
        return "msl_make_from_comparison" if self._is_comparison(paren) else "msl_make"

    def _constructor(self, name: int, end: int) -> None:
        source, code = self.source, self.source.code
        start = self._qualified_start(name)
        if start > 0 and source.is_(start - 1, "typename"):
            start -= 1
        before = code[start - 1] if start > 0 else None
        is_vector = code[name].text in VECTORS or (code[name].text == "vec" and end > name)
        if source.is_name(end + 1) and source.is_(end + 2, "(") and is_vector:
            self._direct_initialisation(start, end)
        if before is not None:
            if before.kind == "name" and before.text not in _KEYWORDS:
                return
            if before.text in (".", "->", "~", "]"):
                return
        if source.is_(end + 1, "(") and self._is_call(end + 1, before):
            code[start].prefix += f"{self._maker(end + 1)}<"
            code[end].suffix += ">"
        elif source.is_(end + 1, "{") and len(source.split(end + 2, source.closing(end + 1))) > 1:
            if code[name].text in self.types - VECTORS:
                return  # may be a struct
            close = source.closing(end + 1)
            code[start].prefix += "msl_make<"
            code[end].suffix += ">"
            code[end + 1].text, code[close].text = "(", ")"

    def _is_call(self, paren: int, before: object) -> bool:
        """Whether T( starts an expression rather than a declarator such as T (&a)[4] or a
        function type T(T)."""
        source = self.source
        close = source.closing(paren)
        if source.is_(paren + 1, "*", "&") and source.is_(close + 1, "(", "["):
            return False
        if source.is_(
            paren + 1, "*", "&", "thread", "device", "threadgroup", "constant"
        ) and source.is_(paren + 2, ")"):
            return False
        inner = self.source.code[paren + 1].text
        is_type = (
            inner in self.types
            or inner in _SCALARS
            or inner in ("const", "thread", "device", "constant", "threadgroup")
        )
        if (
            is_type
            and source.is_(paren + 2, ",", ")", "*", "&")
            and getattr(before, "text", "") in ("<", ",", "=")
        ):
            return not source.is_(paren + 2, ")", ",")  # a function type as template argument
        return True

    def _direct_initialisation(self, start: int, end: int) -> None:
        """`float4 v(a, b), w(c);` inside a function body to `float4 v = msl_make<float4>(a, b),
        w = msl_make<float4>(c);`."""
        source, code = self.source, self.source.code
        first = code[end + 3]
        if first.kind == "name" and (
            source.is_name(end + 4)
            or first.text in ("const", "thread", "device", "constant", "threadgroup")
        ):
            return  # parameters of a function declaration
        if first.text in VECTORS | _SCALARS and not source.is_(end + 4, "("):
            return
        stop = end + 1
        while not source.is_(stop, ";"):
            if source.is_(stop, "(", "[", "{"):
                stop = source.closing(stop)
            elif source.is_(stop, "}", ")", "]") or stop + 1 == len(code):
                return
            stop += 1
        for name, after in source.split(end + 1, stop):
            paren = name + 1
            if source.is_(paren, "(") and source.closing(paren) == after - 1 > paren + 1:
                code[paren].prefix = f" = msl_make<{source.text(start, end + 1)}>"

    def _is_comparison(self, paren: int) -> bool:
        """Whether the only argument is a relation, or made of relations, at its top level."""
        return self._is_boolean(paren + 1, self.source.closing(paren))

    def _is_boolean(self, start: int, stop: int) -> bool:
        source = self.source
        i, found, bitwise = start, source.is_(start, "!"), False
        operands = True  # of &, | and ^: parentheses around relations
        while i < stop:
            text = source.code[i].text
            if text in ("(", "[", "{"):
                operands = operands and text == "(" and self._is_comparison(i)
                i = source.closing(i)
            elif text in (",", "?"):
                return False
            elif text == "<" and source.is_name(i - 1):
                end = source.closing_angle(i)
                if end is not None and end < stop and source.is_(end + 1, "(", "::", "{"):
                    i = end
                else:
                    found = True
            elif text == ">" and source.is_(i + 1, ">", ">="):
                operands = False  # a shift
                i += 1
            elif text in _RELATIONS:
                found = True
            elif text in ("&", "|", "^"):
                bitwise = True
            else:
                operands = False
            i += 1
        return found or (bitwise and operands)

    def _component(self, paren: int) -> None:
        """`(a < b).x` and `(a < b)[0]`: false and true, not clang's 0 and -1."""
        source, code = self.source, self.source.code
        before = code[paren - 1] if paren > 0 else None
        if before is not None and (
            (before.kind == "name" and before.text not in _KEYWORDS)
            or before.text in (")", "]", ">")
        ):
            return  # a call
        if source.is_(source.closing(paren) + 1, ".", "[") and self._is_comparison(paren):
            code[paren].prefix += "msl_compared"

    def _deduced(self, i: int) -> None:
        """`auto x = a < b;` likewise."""
        source, code = self.source, self.source.code
        if not (source.is_name(i + 1) and source.is_(i + 2, "=")):
            return
        stop = i + 3
        while stop < len(code) and not source.is_(stop, ";", ",", ")", "}"):
            stop = source.closing(stop) + 1 if source.is_(stop, "(", "[", "{") else stop + 1
        if source.is_(stop, ";") and self._is_boolean(i + 3, stop):
            code[i + 3].prefix += "msl_compared("
            code[stop - 1].suffix += ")"

    def _c_cast(self, i: int) -> None:
        """`(T)operand` to `msl_make<T>(operand)`."""
        source, code = self.source, self.source.code
        close = source.closing(i)
        if close == i + 1 or not self._type_range(i + 1, close):
            return
        before = code[i - 1] if i > 0 else None
        if before is not None:
            if before.kind in ("name", "number") and before.text not in _KEYWORDS:
                return
            if before.text in (")", "]"):
                return
        after = code[close + 1]
        if not (
            after.kind in ("name", "number") or after.text in ("(", "-", "+", "!", "~", "*", "&")
        ):
            return
        last = code[close - 1].text
        if after.text in ("-", "+", "*", "&") and last not in VECTORS and last != ">":
            if last not in self.parameters or after.text in ("*", "&"):
                return
        end = self._operand_end(close + 1)
        maker = "msl_make"
        if (
            after.text == "("
            and end == source.closing(close + 1)
            and self._is_comparison(close + 1)
        ):
            maker = "msl_make_from_comparison"
        code[i].text = f"{maker}<"
        code[close].text = ">("
        code[end].suffix += ")"

    def _operand_end(self, i: int) -> int:
        """Index of the last token of the unary expression at i."""
        source = self.source
        while True:
            if source.is_(i, *_UNARY):
                i += 1
                continue
            if source.is_(i, "("):
                close = source.closing(i)
                inner = source.code[i + 1].text
                names_type = self._type_range(i + 1, close) or (
                    close == i + 2 and inner in _SCALARS
                )
                follows = source.code[close + 1]
                if names_type and (follows.kind in ("name", "number") or follows.text == "("):
                    i = close + 1
                    continue
                i = close
            break
        while True:
            if source.is_(i + 1, "::") and source.is_name(i + 2):
                i += 2
            elif source.is_(i + 1, ".", "->"):
                i += 2
            elif source.is_(i + 1, "[", "("):
                i = source.closing(i + 1)
            elif source.is_(i + 1, "++", "--"):
                i += 1
            elif source.is_(i + 1, "<") and source.is_name(i):
                end = source.closing_angle(i + 1)
                if end is None or not source.is_(end + 1, "(", "::"):
                    return i
                i = end
            else:
                return i
