// The compiler builtins under metal_stdlib, for sources that add overloads of their own on top of
// them.
#pragma once
#pragma clang system_header
#include "matrix.h"

#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0
#define __METAL_MAYBE_FAST_MATH__ 1

#define MSL_BUILTIN_MATH1(name)               \
  template <class T>                          \
  MSL_INLINE T __metal_##name(T x, int = 0) { \
    return metal::name(x);                    \
  }
#define MSL_BUILTIN_MATH2(name)                    \
  template <class T>                               \
  MSL_INLINE T __metal_##name(T x, T y, int = 0) { \
    return metal::name(x, y);                      \
  }
#define MSL_BUILTIN_MATH3(name)                         \
  template <class T>                                    \
  MSL_INLINE T __metal_##name(T x, T y, T z, int = 0) { \
    return metal::name(x, y, z);                        \
  }
MSL_MATH1(MSL_BUILTIN_MATH1)
MSL_MATH2(MSL_BUILTIN_MATH2)
MSL_MATH3(MSL_BUILTIN_MATH3)
template <class T>
MSL_INLINE T __metal_clamp(T x, T low, T high, int = 0) {
  return metal::clamp(x, low, high);
}
template <class T>
MSL_INLINE T __metal_fclamp(T x, T low, T high, int = 0) {
  return metal::clamp(x, low, high);
}
template <class T>
MSL_INLINE T __metal_ldexp(T x, int e, int = 0) {
  return metal::ldexp(x, e);
}
template <class T>
MSL_INLINE int __metal_ilogb(T x, int = 0) {
  return metal::ilogb(x);
}
template <class T>
MSL_INLINE T __metal_modf(T x, T* whole, int = 0) {
  return metal::modf(x, *whole);
}
template <class T>
MSL_INLINE T __metal_frexp(T x, int* e, int = 0) {
  return metal::frexp(x, *e);
}
template <class T>
MSL_INLINE T __metal_sincos(T x, T* c, int = 0) {
  return metal::sincos(x, *c);
}
#define MSL_BUILTIN_TEST(name)                   \
  template <class T>                             \
  MSL_INLINE bool __metal_##name(T x, int = 0) { \
    return metal::name(x);                       \
  }
MSL_BUILTIN_TEST(isnan)
MSL_BUILTIN_TEST(isinf)
MSL_BUILTIN_TEST(isfinite)
MSL_BUILTIN_TEST(isnormal)
MSL_BUILTIN_TEST(signbit)
MSL_INLINE ushort __metal_get_simdgroup_size(ushort) { return 32; }

#define MSL_BUILTIN_SIMD(name)                 \
  template <class T>                           \
  MSL_INLINE T __metal_##name(T x, MSL_SITE) { \
    return metal::name(x, MSL_PASS_SITE);      \
  }
#define MSL_BUILTIN_LANE(name)                           \
  template <class T>                                     \
  MSL_INLINE T __metal_##name(T x, ushort i, MSL_SITE) { \
    return metal::name(x, i, MSL_PASS_SITE);             \
  }
#define MSL_BUILTIN_FILL(name)                                                  \
  template <class T>                                                            \
  MSL_INLINE T __metal_##name(T x, T fill, ushort i, ushort modulo, MSL_SITE) { \
    return metal::name(x, fill, i, modulo, MSL_PASS_SITE);                      \
  }
MSL_BUILTIN_SIMD(simd_sum)
MSL_BUILTIN_SIMD(simd_product)
MSL_BUILTIN_SIMD(simd_max)
MSL_BUILTIN_SIMD(simd_min)
MSL_BUILTIN_SIMD(simd_and)
MSL_BUILTIN_SIMD(simd_or)
MSL_BUILTIN_SIMD(simd_xor)
MSL_BUILTIN_SIMD(simd_broadcast_first)
MSL_BUILTIN_SIMD(simd_prefix_inclusive_sum)
MSL_BUILTIN_SIMD(simd_prefix_exclusive_sum)
MSL_BUILTIN_SIMD(simd_prefix_inclusive_product)
MSL_BUILTIN_SIMD(simd_prefix_exclusive_product)
MSL_BUILTIN_SIMD(quad_sum)
MSL_BUILTIN_SIMD(quad_max)
MSL_BUILTIN_SIMD(quad_min)
MSL_BUILTIN_LANE(simd_shuffle)
MSL_BUILTIN_LANE(simd_broadcast)
MSL_BUILTIN_LANE(simd_shuffle_xor)
MSL_BUILTIN_LANE(simd_shuffle_up)
MSL_BUILTIN_LANE(simd_shuffle_down)
MSL_BUILTIN_LANE(simd_shuffle_rotate_up)
MSL_BUILTIN_LANE(simd_shuffle_rotate_down)
MSL_BUILTIN_LANE(quad_shuffle)
MSL_BUILTIN_LANE(quad_broadcast)
MSL_BUILTIN_LANE(quad_shuffle_xor)
MSL_BUILTIN_LANE(quad_shuffle_up)
MSL_BUILTIN_LANE(quad_shuffle_down)
MSL_BUILTIN_FILL(simd_shuffle_and_fill_up)
MSL_BUILTIN_FILL(simd_shuffle_and_fill_down)
