// <metal_math>, <metal_geometric>: overload sets over float and half vectors, as in metal_stdlib,
// so that a call that is ambiguous there is ambiguous here. bfloat has no overloads of its own
// there; outside the strict check it is taken through float, by templates that give way to any
// overload that a source adds.
#pragma once
#pragma clang system_header
#include "traits.h"

namespace msl_scalar {  // one function per name, on float
#define MSL_BUILTIN1(name) \
  MSL_INLINE float name(float x) { return __builtin_##name##f(x); }
#define MSL_BUILTIN2(name) \
  MSL_INLINE float name(float x, float y) { return __builtin_##name##f(x, y); }
#ifdef __NVPTX__
// Subnormals are flushed, as on Apple's GPUs.
MSL_INLINE float exp2(float x) { return __nvvm_ex2_approx_ftz_f(x); }
MSL_INLINE float exp(float x) { return __nvvm_ex2_approx_ftz_f(x * M_LOG2E_F); }
MSL_INLINE float log2(float x) { return __nvvm_lg2_approx_ftz_f(x); }
MSL_INLINE float log(float x) { return __nvvm_lg2_approx_ftz_f(x) * M_LN2_F; }
MSL_INLINE float rsqrt(float x) { return __nvvm_rsqrt_approx_f(x); }
MSL_INLINE float sqrt(float x) { return __nvvm_sqrt_rn_f(x); }
MSL_INLINE float sin(float x) { return __nvvm_sin_approx_f(x); }
MSL_INLINE float cos(float x) { return __nvvm_cos_approx_f(x); }
MSL_INLINE float tan(float x) { return sin(x) / cos(x); }
MSL_INLINE float log10(float x) { return log2(x) * (M_LN2_F * M_LOG10E_F); }
MSL_INLINE float pow(float x, float y) { return exp2(y * log2(x)); }
MSL_INLINE float tanh(float x) {
  float r;
  __asm__("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#else
MSL_BUILTIN1(exp2)
MSL_BUILTIN1(exp)
MSL_BUILTIN1(log2)
MSL_BUILTIN1(log)
MSL_BUILTIN1(sqrt)
MSL_INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
MSL_BUILTIN1(sin)
MSL_BUILTIN1(cos)
MSL_BUILTIN1(tan)
MSL_BUILTIN1(log10)
MSL_BUILTIN2(pow)
MSL_BUILTIN1(tanh)
#endif
MSL_INLINE float exp10(float x) { return pow(10.0f, x); }
MSL_BUILTIN1(sinh)
MSL_BUILTIN1(cosh)
MSL_BUILTIN1(asin)
MSL_BUILTIN1(acos)
MSL_BUILTIN1(atan)
MSL_BUILTIN1(asinh)
MSL_BUILTIN1(acosh)
MSL_BUILTIN1(atanh)
MSL_BUILTIN1(floor)
MSL_BUILTIN1(ceil)
MSL_BUILTIN1(trunc)
MSL_BUILTIN1(round)
MSL_BUILTIN1(rint)
MSL_BUILTIN1(fabs)
MSL_INLINE float sinpi(float x) { return sin(x * M_PI_F); }
MSL_INLINE float cospi(float x) { return cos(x * M_PI_F); }
MSL_INLINE float tanpi(float x) { return tan(x * M_PI_F); }
MSL_INLINE float fract(float x) {
  float f = x - __builtin_floorf(x);
  return f < 0x1.fffffep-1f ? f : 0x1.fffffep-1f;
}
MSL_INLINE float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f; }
MSL_INLINE float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
MSL_INLINE float powr(float x, float y) { return pow(x, y); }
MSL_BUILTIN2(atan2)
MSL_BUILTIN2(fmod)
MSL_BUILTIN2(copysign)
MSL_BUILTIN2(fmin)
MSL_BUILTIN2(fmax)
MSL_BUILTIN2(fdim)
MSL_BUILTIN2(nextafter)
MSL_INLINE float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
MSL_INLINE float divide(float x, float y) { return x / y; }
MSL_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MSL_INLINE float mix(float a, float b, float t) { return a + (b - a) * t; }
MSL_INLINE float fmax3(float a, float b, float c) { return fmax(fmax(a, b), c); }
MSL_INLINE float fmin3(float a, float b, float c) { return fmin(fmin(a, b), c); }
MSL_INLINE float fmedian3(float a, float b, float c) {
  return fmax(fmin(a, b), fmin(fmax(a, b), c));
}
MSL_INLINE float smoothstep(float e0, float e1, float x) {
  float t = saturate((x - e0) / (e1 - e0));
  return t * t * (3.0f - 2.0f * t);
}
MSL_INLINE float clamp(float x, float low, float high) { return fmin(fmax(x, low), high); }
}  // namespace msl_scalar

template <class V, class F, class... A>
MSL_INLINE V msl_map(F f, V x, A... more) {
  if constexpr (!msl_traits<V>::is_vector) {
    return (V)f((float)x, (float)more...);
  } else {
    V r = x;
    for (int i = 0; i < msl_traits<V>::size; ++i)
      r[i] = (msl_element<V>)f((float)x[i], (float)more[i]...);
    return r;
  }
}

#define MSL_MATH1(M)                                                                             \
  M(exp)                                                                                         \
  M(exp2)                                                                                        \
  M(exp10) M(log) M(log2) M(log10) M(sqrt) M(rsqrt) M(sin) M(cos) M(tan) M(sinh) M(cosh) M(tanh) \
      M(asin) M(acos) M(atan) M(asinh) M(acosh) M(atanh) M(sinpi) M(cospi) M(tanpi) M(floor)     \
          M(ceil) M(trunc) M(round) M(rint) M(fabs) M(fract) M(sign) M(saturate)
#define MSL_MATH2(M) \
  M(pow) M(powr) M(atan2) M(fmod) M(copysign) M(fmin) M(fmax) M(fdim) M(nextafter) M(step) M(divide)
#define MSL_MATH3(M) M(fma) M(mix) M(fmax3) M(fmin3) M(fmedian3) M(smoothstep)

#define MSL_LIFT(name, ...) [](auto... a) { return msl_scalar::name(a...); }
#define MSL_FLOAT_VECTORS(M, name) \
  M(name, float)                   \
  M(name, float2)                  \
  M(name, float3) M(name, float4) M(name, half) M(name, half2) M(name, half3) M(name, half4)
#define MSL_OVERLOAD1(name, T) \
  MSL_INLINE T name(T x) { return msl_map<T>(MSL_LIFT(name), x); }
#define MSL_OVERLOAD2(name, T) \
  MSL_INLINE T name(T x, T y) { return msl_map<T>(MSL_LIFT(name), x, y); }
#define MSL_OVERLOAD3(name, T) \
  MSL_INLINE T name(T x, T y, T z) { return msl_map<T>(MSL_LIFT(name), x, y, z); }
#if defined(MSL_STRICT)
#define MSL_BFLOAT1(name)
#define MSL_BFLOAT2(name)
#define MSL_BFLOAT3(name)
#else
#define MSL_ONLY_BFLOAT class T, class = enable_if_t<is_same_v<msl_element<T>, bfloat>>
#define MSL_BFLOAT1(name)                 \
  template <MSL_ONLY_BFLOAT>              \
  MSL_INLINE T name(T x) {                \
    return msl_map<T>(MSL_LIFT(name), x); \
  }
#define MSL_BFLOAT2(name)                    \
  template <MSL_ONLY_BFLOAT>                 \
  MSL_INLINE T name(T x, T y) {              \
    return msl_map<T>(MSL_LIFT(name), x, y); \
  }
#define MSL_BFLOAT3(name)                       \
  template <MSL_ONLY_BFLOAT>                    \
  MSL_INLINE T name(T x, T y, T z) {            \
    return msl_map<T>(MSL_LIFT(name), x, y, z); \
  }
#endif
#define MSL_DEFINE1(name) MSL_FLOAT_VECTORS(MSL_OVERLOAD1, name) MSL_BFLOAT1(name)
#define MSL_DEFINE2(name) MSL_FLOAT_VECTORS(MSL_OVERLOAD2, name) MSL_BFLOAT2(name)
#define MSL_DEFINE3(name) MSL_FLOAT_VECTORS(MSL_OVERLOAD3, name) MSL_BFLOAT3(name)

// A vector and a scalar: the scalar is spread.
#define MSL_SPREAD(name)                                                             \
  template <class T, int N, class U, class = enable_if_t<!msl_traits<U>::is_vector>> \
  MSL_INLINE msl_vector<T, N> name(msl_vector<T, N> x, U y) {                        \
    return name(x, msl_vector<T, N>((T)y));                                          \
  }
#define MSL_SINCOS(T)              \
  MSL_INLINE T sincos(T x, T& c) { \
    c = cos(x);                    \
    return sin(x);                 \
  }

namespace metal {
#define MSL_DEFINE_ALL                                                                       \
  MSL_MATH1(MSL_DEFINE1)                                                                     \
  MSL_MATH2(MSL_DEFINE2)                                                                     \
  MSL_MATH3(MSL_DEFINE3)                                                                     \
  MSL_SPREAD(pow)                                                                            \
  MSL_SPREAD(fmod)                                                                           \
  MSL_SPREAD(fmin)                                                                           \
  MSL_SPREAD(fmax)                                                                           \
  MSL_SINCOS(float)                                                                          \
  MSL_SINCOS(float2)                                                                         \
  MSL_SINCOS(float3) MSL_SINCOS(float4) MSL_SINCOS(half) MSL_SINCOS(half2) MSL_SINCOS(half3) \
      MSL_SINCOS(half4) template <class T, int N>                                            \
      MSL_INLINE msl_vector<T, N> mix(msl_vector<T, N> a, msl_vector<T, N> b, T t) {         \
    return a + (b - a) * t;                                                                  \
  }

MSL_DEFINE_ALL
// The variants differ in speed and rounding on a GPU; all are exact here.
namespace fast {
MSL_DEFINE_ALL
}
namespace precise {
MSL_DEFINE_ALL
}

#define MSL_INTEGER_VECTORS(M, T) M(T) M(T##2) M(T##3) M(T##4)
#define MSL_ALL_FLOAT_VECTORS(M) MSL_INTEGER_VECTORS(M, float) MSL_INTEGER_VECTORS(M, half)

#define MSL_INTEGER_MINMAX(T)                                               \
  MSL_INLINE T min(T a, T b) { return __builtin_elementwise_min(a, b); }    \
  MSL_INLINE T max(T a, T b) { return __builtin_elementwise_max(a, b); }    \
  MSL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  MSL_INLINE T min3(T a, T b, T c) { return min(min(a, b), c); }            \
  MSL_INLINE T max3(T a, T b, T c) { return max(max(a, b), c); }            \
  MSL_INLINE T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }
#define MSL_SCALAR_MINMAX(T)                                                          \
  MSL_INLINE constexpr T min(T a, T b) { return b < a ? b : a; }                      \
  MSL_INLINE constexpr T max(T a, T b) { return a < b ? b : a; }                      \
  MSL_INLINE constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  MSL_INLINE constexpr T min3(T a, T b, T c) { return min(min(a, b), c); }            \
  MSL_INLINE constexpr T max3(T a, T b, T c) { return max(max(a, b), c); }            \
  MSL_INLINE constexpr T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }
#define MSL_FLOAT_MINMAX(T)                                                         \
  MSL_INLINE T min(T a, T b) { return msl_map<T>(MSL_LIFT(fmin), a, b); }           \
  MSL_INLINE T max(T a, T b) { return msl_map<T>(MSL_LIFT(fmax), a, b); }           \
  MSL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }         \
  MSL_INLINE T min3(T a, T b, T c) { return min(min(a, b), c); }                    \
  MSL_INLINE T max3(T a, T b, T c) { return max(max(a, b), c); }                    \
  MSL_INLINE T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); } \
  MSL_INLINE T abs(T x) { return msl_map<T>(MSL_LIFT(fabs), x); }
#define MSL_VECTOR_MINMAX(T) \
  MSL_INTEGER_MINMAX(T##2) MSL_INTEGER_MINMAX(T##3) MSL_INTEGER_MINMAX(T##4)
MSL_EACH_INTEGER(MSL_SCALAR_MINMAX)
MSL_EACH_INTEGER(MSL_VECTOR_MINMAX)
MSL_ALL_FLOAT_VECTORS(MSL_FLOAT_MINMAX)
// In namespaces fast and precise these take floats only.
namespace fast {
MSL_ALL_FLOAT_VECTORS(MSL_FLOAT_MINMAX)
}
namespace precise {
MSL_ALL_FLOAT_VECTORS(MSL_FLOAT_MINMAX)
}
MSL_SPREAD(min)
MSL_SPREAD(max)
template <class T, int N, class U, class W,
          class = enable_if_t<!msl_traits<U>::is_vector && !msl_traits<W>::is_vector>>
MSL_INLINE msl_vector<T, N> clamp(msl_vector<T, N> x, U low, W high) {
  return clamp(x, msl_vector<T, N>((T)low), msl_vector<T, N>((T)high));
}
#ifndef MSL_STRICT
template <MSL_ONLY_BFLOAT>
MSL_INLINE T min(T a, T b) {
  return msl_map<T>(MSL_LIFT(fmin), a, b);
}
template <MSL_ONLY_BFLOAT>
MSL_INLINE T max(T a, T b) {
  return msl_map<T>(MSL_LIFT(fmax), a, b);
}
template <MSL_ONLY_BFLOAT>
MSL_INLINE T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <MSL_ONLY_BFLOAT>
MSL_INLINE T abs(T x) {
  return msl_map<T>(MSL_LIFT(fabs), x);
}
#endif

#define MSL_LDEXP(T)                                                            \
  MSL_INLINE T ldexp(T x, int e) { return (T)__builtin_ldexpf((float)x, e); }   \
  MSL_INLINE T frexp(T x, int& e) { return (T)__builtin_frexpf((float)x, &e); } \
  MSL_INLINE int ilogb(T x) { return __builtin_ilogbf((float)x); }              \
  MSL_INLINE T modf(T x, T& whole) {                                            \
    whole = trunc(x);                                                           \
    return copysign(x - whole, x);                                              \
  }
MSL_LDEXP(float)
MSL_LDEXP(half)
template <class T, int N>
MSL_INLINE msl_vector<T, N> ldexp(msl_vector<T, N> x, msl_vector<int, N> e) {
  for (int i = 0; i < N; ++i) x[i] = ldexp((T)x[i], (int)e[i]);
  return x;
}
template <class T, int N>
MSL_INLINE msl_vector<T, N> frexp(msl_vector<T, N> x, msl_vector<int, N>& e) {
  for (int i = 0; i < N; ++i) {
    int exponent;
    x[i] = frexp((T)x[i], exponent);
    e[i] = exponent;
  }
  return x;
}
template <class T, int N>
MSL_INLINE msl_vector<int, N> ilogb(msl_vector<T, N> x) {
  msl_vector<int, N> e = msl_vector<int, N>(0);
  for (int i = 0; i < N; ++i) e[i] = ilogb((T)x[i]);
  return e;
}
template <class T, int N>
MSL_INLINE msl_vector<T, N> modf(msl_vector<T, N> x, msl_vector<T, N>& whole) {
  whole = trunc(x);
  return copysign(x - whole, x);
}

#define MSL_GEOMETRIC(T, V)                                                                     \
  MSL_INLINE T dot(V a, V b) {                                                                  \
    T r = a[0] * b[0];                                                                          \
    for (int i = 1; i < msl_traits<V>::size; ++i) r += a[i] * b[i];                             \
    return r;                                                                                   \
  }                                                                                             \
  MSL_INLINE T length_squared(V a) { return dot(a, a); }                                        \
  MSL_INLINE T length(V a) { return sqrt(dot(a, a)); }                                          \
  MSL_INLINE T distance(V a, V b) { return length(a - b); }                                     \
  MSL_INLINE T distance_squared(V a, V b) { return dot(a - b, a - b); }                         \
  MSL_INLINE V normalize(V a) { return a * rsqrt(dot(a, a)); }                                  \
  MSL_INLINE V faceforward(V n, V i, V reference) { return dot(reference, i) < T(0) ? n : -n; } \
  MSL_INLINE V reflect(V i, V n) { return i - n * (dot(n, i) * T(2)); }                         \
  MSL_INLINE V refract(V i, V n, T eta) {                                                       \
    const T d = dot(n, i), k = T(1) - eta * eta * (T(1) - d * d);                               \
    return k < T(0) ? V(T(0)) : i * eta - n * (eta * d + sqrt(k));                              \
  }
MSL_GEOMETRIC(float, float2)
MSL_GEOMETRIC(float, float3)
MSL_GEOMETRIC(float, float4)
MSL_GEOMETRIC(half, half2)
MSL_GEOMETRIC(half, half3)
MSL_GEOMETRIC(half, half4)
template <class T>
MSL_INLINE msl_vector<T, 3> cross(msl_vector<T, 3> a, msl_vector<T, 3> b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}
template <int N>
MSL_INLINE bfloat dot(msl_vector<bfloat, N> a, msl_vector<bfloat, N> b) {
  bfloat r = a[0] * b[0];
  for (int i = 1; i < N; ++i) r += a[i] * b[i];
  return r;
}
}  // namespace metal
