"""Calibration on the mathematics that torch's Metal kernels are made of: c10/metal/*.h of the
installed torch, compiled unmodified, against torch on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from . import emulator, toolchain  # noqa: E402
from .test_torch_kernels import DTYPES, INCLUDE  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (INCLUDE / "c10/metal/special_math.h").exists(),
    reason="this torch does not ship its Metal kernels",
)

#: Function of c10/metal: torch's, and the range it is tried on.
UNARY: dict[str, tuple[Callable, float, float]] = {
    "erf": (torch.erf, -4, 4),
    "erfc": (torch.erfc, -3, 3),
    "erfinv": (torch.erfinv, -0.99, 0.99),
    "erfcx": (torch.special.erfcx, -2, 30),
    "log_gamma": (torch.lgamma, 0.1, 20),
    "digamma": (torch.digamma, 0.1, 20),
    "trigamma": (lambda x: torch.polygamma(1, x), 0.1, 20),
    "i0": (torch.special.i0, -10, 10),
    "i0e": (torch.special.i0e, -20, 20),
    "i1": (torch.special.i1, -10, 10),
    "i1e": (torch.special.i1e, -20, 20),
    "sinc": (torch.sinc, -5, 5),
    "entr": (torch.special.entr, 0.01, 5),
    "spherical_bessel_j0": (torch.special.spherical_bessel_j0, 0.1, 20),
    "bessel_j0_forward": (torch.special.bessel_j0, 0.1, 20),
    "bessel_j1_forward": (torch.special.bessel_j1, 0.1, 20),
    "bessel_y0_forward": (torch.special.bessel_y0, 0.1, 20),
    "bessel_y1_forward": (torch.special.bessel_y1, 0.1, 20),
    "modified_bessel_i0_forward": (torch.special.modified_bessel_i0, 0.1, 10),
    "modified_bessel_i1_forward": (torch.special.modified_bessel_i1, 0.1, 10),
    "modified_bessel_k0_forward": (torch.special.modified_bessel_k0, 0.1, 10),
    "modified_bessel_k1_forward": (torch.special.modified_bessel_k1, 0.1, 10),
    "scaled_modified_bessel_k0_forward": (torch.special.scaled_modified_bessel_k0, 0.1, 20),
    "scaled_modified_bessel_k1_forward": (torch.special.scaled_modified_bessel_k1, 0.1, 20),
}
BINARY: dict[str, tuple[Callable, float, float]] = {
    "igamma": (torch.special.gammainc, 0.2, 12),
    "igammac": (torch.special.gammaincc, 0.2, 12),
    "zeta": (torch.special.zeta, 1.1, 8),
    "xlogy": (torch.special.xlogy, 0.1, 9),
    "xlog1py": (torch.special.xlog1py, 0.1, 9),
    "logaddexp": (torch.logaddexp, -5, 5),
    "logaddexp2": (torch.logaddexp2, -5, 5),
    "remainder": (torch.remainder, -9, 7),
    "fmod": (torch.fmod, -9, 7),
}


def library(body: str, mode: str = "fast", only: str | None = None) -> emulator.Library:
    headers = "indexing igamma special_math random reduction_utils error atomic expm1f".split()
    text = "#include <metal_stdlib>\nusing namespace metal;\n"
    text += "".join(f"#include <c10/metal/{header}.h>\n" for header in headers)
    # Never written: only its folder matters.
    source = toolchain.flatten_text(text + body, INCLUDE / "math.metal", [INCLUDE])
    return emulator.load(source, mode, only=only)


def functions() -> str:
    """A functor for each function, and torch's own kernels over them."""
    text = ""
    for name in UNARY:
        text += f"struct {name}_functor {{ template <typename T> inline T operator()(const T x) "
        text += f"{{ return T(c10::metal::{name}(x)); }} }};\n"
        text += "".join(f"REGISTER_UNARY_OP({name}, {t}, {t});\n" for t in DTYPES)
    for name in BINARY:
        text += f"struct {name}_functor {{ template <typename T> inline T operator()(const T a, "
        text += f"const T b) {{ return T(c10::metal::{name}(a, b)); }} }};\n"
        text += "".join(f"REGISTER_BINARY_OP({name}, {t}, {t});\n" for t in DTYPES)
    return text


def compare(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    eps = torch.finfo(DTYPES[dtype]).eps
    rtol = 3e-5 if dtype == "float" else 2 * eps
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=max(1e-6, eps / 50))


HALVES = [pytest.param(t, marks=pytest.mark.slow) for t in ("half", "bfloat")]


@pytest.mark.parametrize("dtype", ["float", *HALVES])
def test_functions(dtype: str) -> None:
    metal = library(functions(), only=f"_dense_{dtype}_{dtype}$")
    count = 200
    for name, (function, low, high) in (UNARY | BINARY).items():
        if dtype != "float" and name.endswith(("_forward", "igamma", "igammac")):
            continue  # these compute in the element's own type
        x = torch.linspace(low, high, count).to(DTYPES[dtype])
        out = torch.zeros_like(x)
        kernel = f"{name}_dense_{dtype}_{dtype}"
        if name in UNARY:  # four elements a thread
            metal.launch(kernel, count // 4, 1, [out, x, np.uint32(count)])
            want = function(x.double())
        else:
            y = x.flip(0).roll(count // 3).abs()
            metal.launch(kernel, count, 1, [out, x, y])
            want = function(x.double(), y.double())
        eps = torch.finfo(DTYPES[dtype]).eps
        torch.testing.assert_close(
            out.double(), want, rtol=max(3e-5, 2 * eps), atol=max(3e-6, eps / 10),
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


REDUCTIONS = """
template <typename T>
kernel void reduce(device T* x [[buffer(0)]], device T* out [[buffer(1)]],
                   device int* where [[buffer(2)]], uint i [[thread_position_in_threadgroup]],
                   uint n [[threads_per_threadgroup]]) {
  using A = c10::metal::opmath_t<T>;
  threadgroup A sums[32];
  threadgroup T values[32];
  threadgroup int places[32];
  const A sum = c10::metal::threadgroup_sum(sums, x[i], i, n);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const T high = c10::metal::threadgroup_max(values, x[i], i, n);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const T low = c10::metal::threadgroup_min(values, x[i], i, n);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int at = c10::metal::threadgroup_argmax(values, places, x[i], int(i), i, n);
  if (i == 0) {
    out[0] = T(sum);
    out[1] = high;
    out[2] = low;
    where[0] = at;
  }
}
#define REDUCE(T) \
  template [[host_name("reduce_" #T)]] kernel void reduce(device T*, device T*, device int*, uint, \
                                                          uint);
REDUCE(float) REDUCE(half) REDUCE(bfloat) REDUCE(int)

template <typename T>
kernel void add_at(device c10::metal::AtomicType_t<T>* out [[buffer(0)]],
                   constant T* x [[buffer(1)]],
                   device c10::metal::ErrorMessages* errors [[buffer(2)]],
                   uint i [[thread_position_in_grid]]) {
  c10::metal::AtomicType<T>::atomic_add(out, i % 3, x[i]);
  if (i == 7) TORCH_REPORT_ERROR(errors, "index ", -int(i), " out of range");
}
#define ADD_AT(T)                           \
  template [[host_name("add_at_" #T)]] kernel void add_at<T>(device c10::metal::AtomicType_t<T>*, \
      constant T*, device c10::metal::ErrorMessages*, uint);
ADD_AT(float) ADD_AT(half) ADD_AT(bfloat) ADD_AT(long) ADD_AT(uchar)

kernel void draw(device float* out [[buffer(0)]], constant long& seed [[buffer(1)]],
                 uint i [[thread_position_in_grid]]) {
  out[2 * i] = c10::metal::rand(seed, i);
  out[2 * i + 1] = c10::metal::randn(seed, i);
}
"""
MORE = {"int": torch.int32, "long": torch.int64, "uchar": torch.uint8}
MODES = ["fast", pytest.param("race", marks=pytest.mark.slow)]


@pytest.mark.parametrize("mode", MODES)
def test_reductions(mode: str) -> None:
    metal = library(REDUCTIONS, mode)
    for name in ("float", "half", "bfloat", "int"):  # those of long read inactive lanes
        dtype = (DTYPES | MORE)[name]
        x = (torch.randn(100, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
        out, where = torch.zeros(3, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        # The last step of a reduction is one of as many lanes as there are simdgroups.
        metal.launch(f"reduce_{name}", 1, 100, [x, out, where], partial_simd=True)
        assert out[1] == x.max() and out[2] == x.min() and x[where[0]] == x.max(), name
        torch.testing.assert_close(out[:1], x.double().sum()[None].to(dtype), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_atomics_and_error_messages(mode: str) -> None:
    metal = library(REDUCTIONS, mode)
    message = np.dtype(
        [("file", "S128"), ("func", "S128"), ("message", "S250"), ("line", "u4")], align=True
    )
    for name in ("float", "half", "bfloat", "long", "uchar"):
        x = torch.arange(12).to((DTYPES | MORE)[name])
        out, errors = torch.zeros(4, dtype=x.dtype), np.zeros(4 + 30 * message.itemsize, np.uint8)
        metal.launch(f"add_at_{name}", 1, 12, [out, x, errors])
        assert out.tolist() == [18, 22, 26, 0], name
        assert errors[:4].view(np.uint32)[0] == 1
        first = errors[4 : 4 + message.itemsize].view(message)[0]
        assert first["message"] == b"index -7 out of range" and first["func"] == b"add_at"


def test_random_numbers() -> None:
    out = np.zeros((2000, 2), np.float32)
    library(REDUCTIONS).launch("draw", 2000, 1, [out, np.int64(3)])
    assert 0 <= out[:, 0].min() and out[:, 0].max() < 1
    assert abs(out[:, 0].mean() - 0.5) < 0.03 and abs(out[:, 0].std() - 12**-0.5) < 0.03
    assert abs(out[:, 1].mean()) < 0.1 and abs(out[:, 1].std() - 1) < 0.1
