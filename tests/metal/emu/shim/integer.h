// <metal_integer>, <metal_relational>, <metal_pack>.
#pragma once
#pragma clang system_header
#include "math.h"

namespace metal {

template <class V, class F>
MSL_INLINE constexpr auto msl_bool_map(V x, F f) {
  if constexpr (!msl_traits<V>::is_vector)
    return (bool)f(x);
  else
    return msl_bools_of<msl_traits<V>::size>([&](int i) { return f((msl_element<V>)x[i]); });
}
template <class V>
MSL_INLINE auto isnan(V x) {
  return msl_bool_map(x, [](auto v) { return v != v; });
}
template <class V>
MSL_INLINE auto isinf(V x) {
  return msl_bool_map(x, [](auto v) { return __builtin_fabsf((float)v) == INFINITY; });
}
template <class V>
MSL_INLINE auto isfinite(V x) {
  return msl_bool_map(x, [](auto v) { return __builtin_fabsf((float)v) < INFINITY; });
}
template <class V>
MSL_INLINE auto isnormal(V x) {
  return msl_bool_map(x, [](auto v) {
    float m = __builtin_fabsf((float)v);
    return m < INFINITY && m >= (float)numeric_limits<decltype(v)>::min();
  });
}
template <class V>
MSL_INLINE auto signbit(V x) {
  return msl_bool_map(x, [](auto v) { return __builtin_signbit((float)v) != 0; });
}
template <class T>
MSL_INLINE constexpr bool isunordered(T x, T y) {
  return x != x || y != y;
}
template <class T>
MSL_INLINE constexpr bool isordered(T x, T y) {
  return x == x && y == y;
}
MSL_INLINE constexpr bool any(bool a) { return a; }
MSL_INLINE constexpr bool all(bool a) { return a; }
template <int N>
MSL_INLINE bool any(msl_bools<N> a) {
  bool r = false;
  for (int i = 0; i < N; ++i) r |= a[i];
  return r;
}
template <int N>
MSL_INLINE bool all(msl_bools<N> a) {
  bool r = true;
  for (int i = 0; i < N; ++i) r &= a[i];
  return r;
}
template <class T, int N>
MSL_INLINE bool any(msl_vector<T, N> mask) {
  return any(msl_bools<N>(mask));
}
template <class T, int N>
MSL_INLINE bool all(msl_vector<T, N> mask) {
  return all(msl_bools<N>(mask));
}

// select: the type comes from the first two arguments, which may be a vector
// and a scalar.
template <class A, class B>
using msl_selected = conditional_t<
    is_vector<A>::value, A,
    conditional_t<is_vector<B>::value, B, decltype(true ? declval<A>() : declval<B>())>>;
template <class A, class B>
MSL_INLINE constexpr remove_reference_t<msl_selected<A, B>> select(A a, B b, bool c) {
  typedef remove_reference_t<msl_selected<A, B>> R;
  return c ? (R)b : (R)a;
}
template <class T, int N>
MSL_INLINE msl_vector<T, N> select(msl_vector<T, N> a, msl_vector<T, N> b, msl_bools<N> c) {
  for (int i = 0; i < N; ++i) a[i] = c[i] ? b[i] : a[i];
  return a;
}
template <class T, int N, class M>
MSL_INLINE msl_vector<T, N> select(msl_vector<T, N> a, msl_vector<T, N> b, msl_vector<M, N> c) {
  for (int i = 0; i < N; ++i) a[i] = c[i] ? b[i] : a[i];
  return a;
}

template <class V, class F, class... A>
MSL_INLINE constexpr V msl_integer_map(F f, V x, A... more) {
  static_assert(is_integral<V>::value, "a function of integers");
  if constexpr (!msl_traits<V>::is_vector) {
    return (V)f(x, more...);
  } else {
    V r = x;
    for (int i = 0; i < msl_traits<V>::size; ++i)
      r[i] = (msl_element<V>)f((msl_element<V>)x[i], (msl_element<V>)more[i]...);
    return r;
  }
}
template <class T>
MSL_INLINE constexpr ulong msl_bits_of(T x) {
  return (ulong)x & (~0ul >> (64 - 8 * sizeof(T)));
}
#define MSL_INTEGER_ABS(T) \
  MSL_INLINE T abs(T x) { return __builtin_elementwise_abs(x); }
MSL_INTEGER_VECTORS(MSL_INTEGER_ABS, char)
MSL_INTEGER_VECTORS(MSL_INTEGER_ABS, short)
MSL_INTEGER_VECTORS(MSL_INTEGER_ABS, int)
MSL_INTEGER_VECTORS(MSL_INTEGER_ABS, long)
#define MSL_UNSIGNED_ABS(T) \
  MSL_INLINE T abs(T x) { return x; }
MSL_INTEGER_VECTORS(MSL_UNSIGNED_ABS, uchar)
MSL_INTEGER_VECTORS(MSL_UNSIGNED_ABS, ushort)
MSL_INTEGER_VECTORS(MSL_UNSIGNED_ABS, uint)
MSL_INTEGER_VECTORS(MSL_UNSIGNED_ABS, ulong)

template <class V>
MSL_INLINE constexpr V popcount(V x) {
  return msl_integer_map([](auto v) { return __builtin_popcountll(msl_bits_of(v)); }, x);
}
template <class V>
MSL_INLINE constexpr V clz(V x) {
  return msl_integer_map(
      [](auto v) -> int {
        const int bits = 8 * sizeof(v);
        return v ? __builtin_clzll(msl_bits_of(v)) - (64 - bits) : bits;
      },
      x);
}
template <class V>
MSL_INLINE constexpr V ctz(V x) {
  return msl_integer_map(
      [](auto v) -> int { return v ? __builtin_ctzll((ulong)v) : int(8 * sizeof(v)); }, x);
}
template <class V>
MSL_INLINE constexpr V reverse_bits(V x) {
  return msl_integer_map(
      [](auto v) { return __builtin_bitreverse64(msl_bits_of(v)) >> (64 - 8 * sizeof(v)); }, x);
}
template <class V>
MSL_INLINE constexpr V rotate(V x, V n) {
  return msl_integer_map(
      [](auto v, auto k) {
        const uint bits = 8 * sizeof(v), by = (uint)k & (bits - 1);
        return by ? msl_bits_of(v) << by | msl_bits_of(v) >> (bits - by) : msl_bits_of(v);
      },
      x, n);
}
template <class T>
MSL_INLINE constexpr T extract_bits(T x, uint offset, uint count) {
  const uint bits = 8 * sizeof(T);
  if (count == 0) return T(0);
  return (T)((T)(msl_bits_of(x) << (bits - offset - count)) >> (bits - count));
}
template <class T>
MSL_INLINE constexpr T insert_bits(T base, T insert, uint offset, uint count) {
  const ulong mask = count >= 8 * sizeof(T) ? ~0ul : ((1ul << count) - 1) << offset;
  return (T)((msl_bits_of(base) & ~mask) | ((msl_bits_of(insert) << offset) & mask));
}
template <class T>
MSL_INLINE constexpr T msl_high_half(T a, T b) {
  if constexpr (sizeof(T) == 8 && is_signed<T>::value)
    return (T)((__int128)a * b >> 64);
  else if constexpr (sizeof(T) == 8)
    return (T)((unsigned __int128)a * b >> 64);
  else
    return (T)((long)a * (long)b >> (8 * sizeof(T)));
}
template <class V>
MSL_INLINE constexpr V mulhi(V a, V b) {
  return msl_integer_map([](auto x, auto y) { return msl_high_half(x, y); }, a, b);
}
template <class V>
MSL_INLINE constexpr V madhi(V a, V b, V c) {
  return mulhi(a, b) + c;
}
template <class V>
MSL_INLINE V addsat(V a, V b) {
  return msl_integer_map(
      [](auto x, auto y) {
        decltype(x) r;
        typedef numeric_limits<decltype(x)> L;
        return __builtin_add_overflow(x, y, &r) ? (y < 0 ? L::min() : L::max()) : r;
      },
      a, b);
}
template <class V>
MSL_INLINE V subsat(V a, V b) {
  return msl_integer_map(
      [](auto x, auto y) {
        decltype(x) r;
        typedef numeric_limits<decltype(x)> L;
        return __builtin_sub_overflow(x, y, &r) ? (L::is_signed && y < 0 ? L::max() : L::min()) : r;
      },
      a, b);
}
template <class V>
MSL_INLINE V madsat(V a, V b, V c) {
  return msl_integer_map(
      [](auto x, auto y, auto z) {
        typedef decltype(x) T;
        typedef conditional_t<is_signed<T>::value, __int128, unsigned __int128> Wide;
        typedef numeric_limits<T> L;
        const Wide r = (Wide)x * (Wide)y + (Wide)z;  // fits
        return r<(Wide)L::min() ? L::min() : r>(Wide) L::max() ? L::max() : (T)r;
      },
      a, b, c);
}
template <class V>
MSL_INLINE constexpr V hadd(V a, V b) {
  return (a >> 1) + (b >> 1) + (a & b & V(1));
}
template <class V>
MSL_INLINE constexpr V rhadd(V a, V b) {
  return (a >> 1) + (b >> 1) + ((a | b) & V(1));
}
template <class V>
MSL_INLINE V absdiff(V a, V b) {
  return max(a, b) - min(a, b);
}
#define MSL_MUL24(T)                                       \
  MSL_INLINE constexpr T mul24(T a, T b) { return a * b; } \
  MSL_INLINE constexpr T mad24(T a, T b, T c) { return a * b + c; }
MSL_MUL24(int)
MSL_MUL24(uint)

// ---- pack and unpack
template <int N, class T>
MSL_INLINE uint msl_pack(msl_vector<float, N> x, float scale, float low) {
  uint r = 0;
  for (int i = 0; i < N; ++i) {
    const int code = (int)__builtin_rintf(msl_scalar::clamp(x[i], low, 1.0f) * scale);
    r |= (uint)(code & (int)(0xffffffffu >> (32 - 8 * sizeof(T)))) << (8 * sizeof(T) * i);
  }
  return r;
}
template <int N, class T>
MSL_INLINE msl_vector<float, N> msl_unpack(uint x, float scale) {
  msl_vector<float, N> r = msl_vector<float, N>(0.0f);
  for (int i = 0; i < N; ++i) {
    const float v = (float)(T)(x >> (8 * sizeof(T) * i)) / scale;
    r[i] = v < -1.0f ? -1.0f : v;
  }
  return r;
}
MSL_INLINE uint pack_float_to_unorm4x8(float4 x) { return msl_pack<4, uchar>(x, 255.0f, 0.0f); }
MSL_INLINE uint pack_float_to_snorm4x8(float4 x) { return msl_pack<4, char>(x, 127.0f, -1.0f); }
MSL_INLINE uint pack_float_to_unorm2x16(float2 x) { return msl_pack<2, ushort>(x, 65535.0f, 0.0f); }
MSL_INLINE uint pack_float_to_snorm2x16(float2 x) { return msl_pack<2, short>(x, 32767.0f, -1.0f); }
MSL_INLINE float4 unpack_unorm4x8_to_float(uint x) { return msl_unpack<4, uchar>(x, 255.0f); }
MSL_INLINE float4 unpack_snorm4x8_to_float(uint x) { return msl_unpack<4, char>(x, 127.0f); }
MSL_INLINE float2 unpack_unorm2x16_to_float(uint x) { return msl_unpack<2, ushort>(x, 65535.0f); }
MSL_INLINE float2 unpack_snorm2x16_to_float(uint x) { return msl_unpack<2, short>(x, 32767.0f); }
#define MSL_PACK_HALF(kind, N)                                            \
  MSL_INLINE uint pack_half_to_##kind(half##N x) {                        \
    return pack_float_to_##kind(__builtin_convertvector(x, float##N));    \
  }                                                                       \
  MSL_INLINE half##N unpack_##kind##_to_half(uint x) {                    \
    return __builtin_convertvector(unpack_##kind##_to_float(x), half##N); \
  }
MSL_PACK_HALF(unorm4x8, 4)
MSL_PACK_HALF(snorm4x8, 4)
MSL_PACK_HALF(unorm2x16, 2)
MSL_PACK_HALF(snorm2x16, 2)

}  // namespace metal
