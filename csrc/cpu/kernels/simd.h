// One vector type per instruction set: F holds kWidth floats, I as many 32-bit integers. AVX-512,
// AVX2 and NEON by intrinsics where the compiler's own vector extension would not do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 mistakes its own _mm512_undefined_epi32 for a bug (GCC PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "convert.h"

namespace kvq::cpu::KVQ_ISA {

/// For lambdas that must not become calls: what they capture would have to live in memory.
#define KVQ_INLINE __attribute__((always_inline))

/// Calls f with std::integral_constant 0 .. N-1: a loop whose index is a constant.
template <int N, typename Function>
[[gnu::always_inline]] inline void unroll(Function&& f) {
  [&]<int... Index>(std::integer_sequence<int, Index...>) {
    (f(std::integral_constant<int, Index>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

#if defined(__AVX512F__)

using F = __m512;
using I = __m512i;
constexpr int kWidth = 16;
constexpr int kRegisters = 32;

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline I load_int(const void* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F splat(float x) { return _mm512_set1_ps(x); }
inline I splat_int(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F minimum(F a, F b) { return _mm512_min_ps(a, b); }
inline F maximum(F a, F b) { return _mm512_max_ps(a, b); }
inline F square_root(F x) { return _mm512_sqrt_ps(x); }
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline F as_float(I x) { return _mm512_castsi512_ps(x); }
inline I as_int(F x) { return _mm512_castps_si512(x); }
inline I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
inline I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
inline I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
template <int N>
inline I shift_left(I x) {
  return _mm512_slli_epi32(x, N);
}
template <int N>
inline I shift_right(I x) {
  return _mm512_srli_epi32(x, N);
}
template <int N>
inline I shift_right_signed(I x) {
  return _mm512_srai_epi32(x, N);
}
inline I shift_right_lanes(I x, I n) { return _mm512_srlv_epi32(x, n); }
inline I round_to_int(F x) { return _mm512_cvtps_epi32(x); }
inline I truncate_to_int(F x) { return _mm512_cvttps_epi32(x); }
inline F select_less(F a, F b, F then, F otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
}
inline bool any_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }
inline bool any_unordered(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }
inline F gather(const float* table, I index) { return _mm512_i32gather_ps(index, table, 4); }
inline F half_lanes(I x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
inline F load_halves(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline void unzip(F a, F b, F& even, F& odd) {
  const I lanes = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = _mm512_permutex2var_ps(a, lanes, b);
  odd = _mm512_permutex2var_ps(a, add_int(lanes, splat_int(1)), b);
}
inline float sum(F x) { return _mm512_reduce_add_ps(x); }
inline float largest(F x) { return _mm512_reduce_max_ps(x); }
inline F zip_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
inline F zip_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
inline F zip_pairs_low(F a, F b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
inline F zip_pairs_high(F a, F b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
/// Lane i: the largest of the lanes of part[i / 4] that have place i % 4 in their 128 bits.
inline F largest_of_quarters(const F (&part)[4]) {
  const auto fold = [](F a, F b) {
    return maximum(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const F a = fold(part[0], part[1]), b = fold(part[2], part[3]);
  return maximum(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
inline F select_equal(F a, F b, F then, F otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), otherwise, then);
}
inline void store_halves(void* p, F x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__)

using F = __m256;
using I = __m256i;
constexpr int kWidth = 8;
constexpr int kRegisters = 16;

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F splat(float x) { return _mm256_set1_ps(x); }
inline I splat_int(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F minimum(F a, F b) { return _mm256_min_ps(a, b); }
inline F maximum(F a, F b) { return _mm256_max_ps(a, b); }
inline F square_root(F x) { return _mm256_sqrt_ps(x); }
inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }
inline F as_float(I x) { return _mm256_castsi256_ps(x); }
inline I as_int(F x) { return _mm256_castps_si256(x); }
inline I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
inline I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
inline I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
inline I sub_int(I a, I b) { return _mm256_sub_epi32(a, b); }
template <int N>
inline I shift_left(I x) {
  return _mm256_slli_epi32(x, N);
}
template <int N>
inline I shift_right(I x) {
  return _mm256_srli_epi32(x, N);
}
template <int N>
inline I shift_right_signed(I x) {
  return _mm256_srai_epi32(x, N);
}
inline I shift_right_lanes(I x, I n) { return _mm256_srlv_epi32(x, n); }
inline I round_to_int(F x) { return _mm256_cvtps_epi32(x); }
inline I truncate_to_int(F x) { return _mm256_cvttps_epi32(x); }
inline F select_less(F a, F b, F then, F otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline bool any_less(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0; }
inline bool any_unordered(F a, F b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
}
inline F gather(const float* table, I index) { return _mm256_i32gather_ps(table, index, 4); }
/// Lanes hold a float16 in their low half and zeros above.
inline F half_lanes(I x) {
  const __m256i packed = _mm256_packus_epi32(x, x);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
inline F load_halves(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline void unzip(F a, F b, F& even, F& odd) {
  const auto in_order = [](F x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  };
  even = in_order(_mm256_shuffle_ps(a, b, 0x88));
  odd = in_order(_mm256_shuffle_ps(a, b, 0xdd));
}
inline float sum(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline F zip_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
inline F zip_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
inline F zip_pairs_low(F a, F b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
inline F zip_pairs_high(F a, F b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
inline F largest_of_quarters(const F (&part)[2]) {
  return maximum(_mm256_permute2f128_ps(part[0], part[1], 0x20),
                 _mm256_permute2f128_ps(part[0], part[1], 0x31));
}
inline F select_equal(F a, F b, F then, F otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
inline void store_halves(void* p, F x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else  // NEON, and what every x86-64 has

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
constexpr int kWidth = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

inline F load(const float* p) {
  F x;
  std::memcpy(&x, p, 16);
  return x;
}
inline I load_int(const void* p) {
  I x;
  std::memcpy(&x, p, 16);
  return x;
}
inline void store(float* p, F x) { std::memcpy(p, &x, 16); }
inline F splat(float x) { return F{x, x, x, x}; }
inline I splat_int(uint32_t x) { return I(U{x, x, x, x}); }
inline F fma(F a, F b, F c) {
#if defined(__aarch64__)
  return F(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}
inline F minimum(F a, F b) { return a < b ? a : b; }
inline F maximum(F a, F b) { return a > b ? a : b; }
inline F square_root(F x) {
  return F{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
}
inline F to_float(I x) { return __builtin_convertvector(x, F); }
inline F as_float(I x) { return F(x); }
inline I as_int(F x) { return I(x); }
inline I bit_and(I a, I b) { return a & b; }
inline I bit_or(I a, I b) { return a | b; }
inline I bit_xor(I a, I b) { return a ^ b; }
inline I add_int(I a, I b) { return I(U(a) + U(b)); }
template <int N>
inline I shift_left(I x) {
  return I(U(x) << N);
}
template <int N>
inline I shift_right(I x) {
  return I(U(x) >> N);
}
template <int N>
inline I shift_right_signed(I x) {
  return x >> N;
}
inline I shift_right_lanes(I x, I n) { return I(U(x) >> U(n)); }
inline I round_to_int(F x) {
#if defined(__aarch64__)
  return I(vcvtnq_s32_f32(float32x4_t(x)));
#else
  return I(_mm_cvtps_epi32(__m128(x)));
#endif
}
inline I truncate_to_int(F x) { return __builtin_convertvector(x, I); }
inline F select_less(F a, F b, F then, F otherwise) { return a < b ? then : otherwise; }
inline bool any_less(F a, F b) {
  const I less = a < b;
  return (less[0] | less[1] | less[2] | less[3]) != 0;
}
inline bool any_unordered(F a, F b) {
  const I nan = (a != a) | (b != b);
  return (nan[0] | nan[1] | nan[2] | nan[3]) != 0;
}
inline F gather(const float* table, I index) {
  return F{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
/// Lanes hold a float16 in their low half and zeros above.
inline F half_lanes(I x) {
#if defined(__aarch64__)
  return F(vcvt_f32_f16(float16x4_t(vmovn_u32(uint32x4_t(x)))));
#else
  F y;
  for (int i = 0; i < 4; ++i) y[i] = half_to_float(static_cast<uint16_t>(x[i]));
  return y;
#endif
}
inline F load_halves(const void* p) {
  uint16_t x[4];
  std::memcpy(x, p, sizeof x);
  return F{half_to_float(x[0]), half_to_float(x[1]), half_to_float(x[2]), half_to_float(x[3])};
}
inline void unzip(F a, F b, F& even, F& odd) {
  even = F{a[0], a[2], b[0], b[2]};
  odd = F{a[1], a[3], b[1], b[3]};
}
inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline F zip_low(F a, F b) { return F{a[0], b[0], a[1], b[1]}; }
inline F zip_high(F a, F b) { return F{a[2], b[2], a[3], b[3]}; }
inline F zip_pairs_low(F a, F b) { return F{a[0], a[1], b[0], b[1]}; }
inline F zip_pairs_high(F a, F b) { return F{a[2], a[3], b[2], b[3]}; }
inline F largest_of_quarters(const F (&part)[1]) { return part[0]; }
inline F select_equal(F a, F b, F then, F otherwise) { return a == b ? then : otherwise; }
inline void store_halves(void* p, F x) {
  const uint16_t halves[4] = {float_to_half(x[0]), float_to_half(x[1]), float_to_half(x[2]),
                              float_to_half(x[3])};
  std::memcpy(p, halves, sizeof halves);
}
inline float largest(F x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}

#endif

// load_halves: kWidth float16 numbers. unzip: the lanes with even and odd numbers of a, then b.
// zip_low, zip_high: of every 128 bits, the lanes of a's and b's lower (upper) half in turn.

#if defined(__AVX512F__)
/// 16 entries by the low 4 bits of each lane, whatever the other bits hold.
inline F permute(F table, I index) { return _mm512_permutexvar_ps(index, table); }
/// 32 entries, 64 entries.
inline F permute(F a, F b, I index) { return _mm512_permutex2var_ps(a, index, b); }
inline F permute(F a, F b, F c, F d, I index) {
  const __mmask16 high = _mm512_test_epi32_mask(index, splat_int(32));
  return _mm512_mask_blend_ps(high, permute(a, b, index), permute(c, d, index));
}
inline I increment_less(I x, F a, F b) {
  return _mm512_mask_add_epi32(x, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x, splat_int(1));
}
#elif defined(__AVX2__)
/// 8 entries by the low 3 bits of each lane, whatever the other bits hold.
inline F permute(F table, I index) { return _mm256_permutevar8x32_ps(table, index); }
inline I increment_less(I x, F a, F b) {
  return _mm256_sub_epi32(x, as_int(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
}
#endif

/// Lane i takes lane i ^ Distance, for a power of two below kWidth.
template <int Distance>
inline F swap(F x) {
#if defined(__AVX512F__)
  if constexpr (Distance == 1) return _mm512_permute_ps(x, 0xb1);
  if constexpr (Distance == 2) return _mm512_permute_ps(x, 0x4e);
  return _mm512_shuffle_f32x4(x, x, Distance == 4 ? 0xb1 : 0x4e);
#elif defined(__AVX2__)
  if constexpr (Distance == 1) return _mm256_permute_ps(x, 0xb1);
  if constexpr (Distance == 2) return _mm256_permute_ps(x, 0x4e);
  return _mm256_permute2f128_ps(x, x, 1);
#else
  constexpr int D = Distance;
  return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D);
#endif
}

/// Lane i of every 128 bits: the largest of rows[i]'s lanes in the same 128 bits.
[[gnu::always_inline]] inline F largest_in_quarters(const F (&rows)[4]) {
  const F a = maximum(zip_low(rows[0], rows[1]), zip_high(rows[0], rows[1]));
  const F b = maximum(zip_low(rows[2], rows[3]), zip_high(rows[2], rows[3]));
  return maximum(zip_pairs_low(a, b), zip_pairs_high(a, b));
}

/// kWidth numbers of a dtype.
inline F load_as(KvqDtype dtype, const char* p) {
  if (dtype == KVQ_FLOAT16) return load_halves(p);
  if (dtype == KVQ_FLOAT32) {
    float x[kWidth];
    std::memcpy(x, p, sizeof x);
    return load(x);
  }
#if defined(__AVX512F__)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return as_float(shift_left<16>(_mm512_cvtepu16_epi32(x)));
#elif defined(__AVX2__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return as_float(shift_left<16>(_mm256_cvtepu16_epi32(x)));
#else
  uint16_t x[kWidth];
  std::memcpy(x, p, sizeof x);
  return F{bfloat_to_float(x[0]), bfloat_to_float(x[1]), bfloat_to_float(x[2]),
           bfloat_to_float(x[3])};
#endif
}

/// kWidth floats to bfloat16, rounded to nearest even; a NaN stays one.
inline void store_bfloat(char* p, F x) {
  const I bits = as_int(x);
  const I odd = bit_and(shift_right<16>(bits), splat_int(1));
  I rounded = shift_right<16>(add_int(add_int(bits, splat_int(0x7fff)), odd));
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_blend_epi32(nan, rounded, splat_int(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#elif defined(__AVX2__)
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  rounded = as_int(_mm256_blendv_ps(as_float(rounded), as_float(splat_int(0x7fc0)), nan));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  rounded = x == x ? rounded : splat_int(0x7fc0);
  for (int i = 0; i < 4; ++i) {
    const auto half = static_cast<uint16_t>(rounded[i]);
    std::memcpy(p + 2 * i, &half, 2);
  }
#endif
}

/// kWidth floats as numbers of a dtype, rounded to nearest even.
inline void store_as(KvqDtype dtype, char* p, F x) {
  if (dtype == KVQ_FLOAT16) return store_halves(p, x);
  if (dtype == KVQ_BFLOAT16) return store_bfloat(p, x);
  std::memcpy(p, &x, sizeof x);
}

// F is a vector of the compiler's in every instruction set: + - * / are its own.

/// y * 2^n for whole n in [-126, 127] (AVX-512: any).
inline F scale_by_power(F y, F n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, n);
#else
  return y * as_float(shift_left<23>(add_int(round_to_int(n), splat_int(127))));
#endif
}

/// The nearest whole number.
inline F rounded(F x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return to_float(round_to_int(x));
#endif
}

/// e^x to about one unit in the last place for x up to 88; 0 below -87, NaN stays NaN.
inline F exponential(F x) {
  const F lowest = splat(-87.0f);
  // The operand order keeps NaN: the second operand comes back.
  const F bounded = maximum(lowest, x);
  const F n = rounded(bounded * splat(1.44269504f));
  F r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  F y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y * r, r, r + splat(1.0f));
  return select_less(x, lowest, splat(0.0f), scale_by_power(y, n));
}

/// tanh(x), accurate to a few units in the last place also where x is small; NaN stays NaN.
inline F hyperbolic_tangent(F x) {
  const F magnitude = maximum(splat(0.0f) - x, x);
  const F square = x * x;
  F small = splat(-5.70498872745e-3f);
  small = fma(small, square, splat(2.06390887954e-2f));
  small = fma(small, square, splat(-5.37397155531e-2f));
  small = fma(small, square, splat(1.33314422036e-1f));
  small = fma(small, square, splat(-3.33332819422e-1f));
  small = fma(small * square, x, x);
  const F e = exponential(minimum(splat(40.0f), magnitude + magnitude));
  const F large = splat(1.0f) - splat(2.0f) / (e + splat(1.0f));
  const F wide = select_less(x, splat(0.0f), splat(0.0f) - large, large);
  return select_less(splat(0.625f), magnitude, wide, small);
}

}  // namespace kvq::cpu::KVQ_ISA
