"""The strict check: what Metal does not allow, and what the subset leaves out, is refused; the
rest is not."""

# ruff: noqa: E501  (a table of one-line sources)
from __future__ import annotations

from pathlib import Path

import pytest

from . import requirements, toolchain

SAMPLES = Path(__file__).parent / "samples"
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = "[[kernel]] void k(device float* a [[buffer(0)]], uint t [[thread_position_in_grid]])"
STRUCT = "struct S { float a; float get() const { return a; } };\n"
QUALIFIED = "struct S { float a; float get() const device { return a; } float get() const thread { return a; } };\n"

# text, what an objection must hold
REFUSED = {
    "device_to_threadgroup": (
        "void f(device float* p) { threadgroup float* q = p; }",
        "cannot initialize",
    ),
    "device_to_thread": ("void f(device float* p) { thread float* q = p; }", "cannot initialize"),
    "pointer_parameter": ("float f(float* p) { return *p; }", "without an address space"),
    "pointer_variable": (
        "void f() { float a[2]; float* q = a; *q = 1; }",
        "without an address space",
    ),
    "reference_parameter": ("float f(float& p) { return p; }", "without an address space"),
    "pointer_field": ("struct P { float* a; };", "without an address space"),
    "pointer_result": ("float* f(thread float* a) { return a; }", "without an address space"),
    "cast_between_spaces": (
        "void f(device float* p) { threadgroup float* q = (threadgroup float*)p; }",
        "address space",
    ),
    "reinterpret_between_spaces": (
        "void f(device float* p) { constant float* q = reinterpret_cast<constant float*>(p); }",
        "not allowed",
    ),
    "cast_without_space": (
        "void g(thread uint* a) { a[0] = 1; } void f() { uint x[2]; g((uint*)x); }",
        "without an address space",
    ),
    "assignment_between_spaces": (
        "void f(threadgroup float* a, device float* b) { a = b; }",
        "address space",
    ),
    "write_to_constant": ("void f(constant float* p) { p[0] = 1.0f; }", "not assignable"),
    "method_on_device_object": (
        STRUCT + "float f(device S* s) { return s->get(); }",
        "object parameter",
    ),
    "double": ("void f(device float* p) { double d = 1; p[0] = float(d); }", "double"),
    "bare_literal": ("void f(device float* p) { p[0] = p[0] * 1.5; }", "literal without f or h"),
    "bare_exponent": ("float f() { return 1e3; }", "literal without f or h"),
    "min_of_int_and_uint": ("int f(int a, uint b) { return int(min(a, b)); }", "ambiguous"),
    "min_with_literal": ("uint f(uint a) { return min(a, 3); }", "ambiguous"),
    "max_of_half_and_float": ("float f(half h) { return max(h, 0.0f); }", "ambiguous"),
    "clamp_mixed": ("float f(float x) { return clamp(x, 0, 1.0f); }", "ambiguous"),
    "exp_of_int": ("float f(int a) { return exp(a); }", "ambiguous"),
    "half_from_float": ("void f(float a) { half h = a; }", "implicit conversion"),
    "bfloat_from_float": ("void f(float a) { bfloat h = a; }", "implicit conversion"),
    "uchar_from_uint": ("void f(uint a) { uchar h = a; }", "implicit conversion"),
    "half4_from_float4": ("void f(float4 a) { half4 h = a; }", "cannot initialize"),
    "float4_from_uint4": ("void f(uint4 a) { float4 h = a; }", "cannot initialize"),
    "half4_times_float": ("void f(half4 a, float b) { half4 c = a * b; }", "implicit conversion"),
    "buffer_index_31": (
        "[[kernel]] void k(device float* a [[buffer(31)]]) { a[0] = 1.0f; }",
        "beyond 30",
    ),
    "buffer_index_twice": (
        "[[kernel]] void k(device float* a [[buffer(0)]], device float* b [[buffer(0)]]) {}",
        "twice",
    ),
    "threadgroup_memory": (
        KERNEL
        + "{ threadgroup float s[8000]; threadgroup half4 q[200]; s[t] = 1.0f; q[t] = half4(half(1)); a[t] = s[t]; }",
        "33600 bytes of threadgroup memory",
    ),
    "threadgroup_memory_of_an_instance": (
        "template <typename T, int N> "
        + KERNEL
        + "{ threadgroup T s[N]; s[t] = T(1); a[t] = float(s[t]); }\n"
        + 'template [[host_name("x")]] [[kernel]] decltype(k<half, 16385>) k<half, 16385>;',
        "32770 bytes of threadgroup memory",
    ),
    "threadgroup_outside_a_kernel": ("void f() { threadgroup float s[4]; }", "outside a kernel"),
    "kernel_with_a_result": (
        "[[kernel]] int k(device float* a [[buffer(0)]]) { return 1; }",
        "must return void",
    ),
    "unknown_attribute": (
        "[[kernel]] void k(uint t [[thread_position_on_grid]]) {}",
        "not supported",
    ),
    "signed_position": ("[[kernel]] void k(int t [[thread_position_in_grid]]) {}", "unsigned"),
    "position_without_attribute": ("[[kernel]] void k(uint t) {}", "without attribute"),
    "atomic_of_64_bits": (
        "void f(device atomic<ulong>* p) { atomic_fetch_add_explicit(p, 1ul, memory_order_relaxed); }",
        "32 bits",
    ),
    "recursion": ("int f(int n) { return n ? f(n - 1) : 0; }", "recursion"),
    "virtual": ("struct S { virtual void g() {} };", "virtual"),
    "new": ("void f() { thread int* p = new int; }", "allocation"),
    "throw": ("void f() { throw 1; }", "exceptions"),
    "goto": ("void f() { goto a; a: ; }", "goto"),
    "asm": ('void f() { asm("nop"); }', "assembly"),
    "typeid": ("struct A {}; void f() { A a; typeid(a); }", "run-time types"),
    "global_variable": ("float g = 1.0f;", "constant address space"),
    "static_variable": ("void f() { static int n = 0; ++n; }", "static variable"),
    "lambda": ("int f() { auto l = [](int a) { return a; }; return l(1); }", "lambda"),
    "function_pointer": ("void f(int x) { int (*g)(int) = nullptr; }", "function pointer"),
    "variable_length_array": ("void f(int n) { int a[n]; a[0] = 1; }", "variable length"),
    "constexpr_if": (
        "template <typename T> float f(T a) { if constexpr (sizeof(T) == 4) return 1.0f; return 0.0f; }",
        "17",
    ),
    "structured_binding": (
        "struct P { int a, b; }; int f() { P p = {1, 2}; auto [x, y] = p; return x + y; }",
        "17",
    ),
    "standard_header": ("#include <vector>", "vector"),
    "shadowed_name": ("float f(float a) { { float a = 1.0f; return a; } return a; }", "shadows"),
}
ACCEPTED = {
    "struct_copy_from_device": STRUCT + "float f(device S* q) { S p = *q; return p.get(); }",
    "struct_copy_from_constant": STRUCT + "float f(constant S& q) { S p = q; return p.a; }",
    "struct_copy_to_device": STRUCT + "void f(device S* q, thread S& p) { q[1] = p; }",
    "qualified_method": QUALIFIED + "float f(device S* s) { return s->get(); }",
    "cast_with_thread": "void g(thread uint* a) { a[0] = 1; } void f() { ushort x[2]; g((thread uint*)x); }",
    "hexadecimal": "uint f() { return 0x1e3u + 0xfeu; }",
    "half_literal": "half f(half a) { return a * 1.5h; }",
    "min_of_equal_types": "uint f(uint a, int b) { return min(a, 3u) + uint(max(b, 3)); }",
    "overload_on_space": "float f(device float* p) { return *p; } float f(threadgroup float* p) { return *p; }",
    "threadgroup_memory_of_32_KB": KERNEL
    + "{ threadgroup float s[8192]; s[t] = 1.0f; a[t] = s[t]; }",
    "buffer_index_30": "[[kernel]] void k(device float* a [[buffer(30)]]) { a[0] = 1.0f; }",
    "array_reference": "float f(thread const float (&a)[4]) { return a[1]; }",
    "constant_table": "constant float table[2] = {1.0f, 2.0f};\nfloat f(uint i) { return table[i]; }",
}


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    requirements.require(requirements.missing_for_strict_check())


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    text, message = REFUSED[case]
    problems = toolchain.strict_check(HEAD + text + "\n")
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case: str) -> None:
    assert toolchain.strict_check(HEAD + ACCEPTED[case] + "\n") == []


def test_an_objection_names_file_and_line() -> None:
    problems = toolchain.strict_check(
        '#line 40 "rows.metal"\n' + HEAD + "\nfloat f(float* p) { return *p; }\n"
    )
    assert problems == ["rows.metal:43: p: pointer or reference without an address space"]
