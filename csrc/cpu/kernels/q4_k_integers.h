// A row of Q4_K super-blocks times 16-bit integers (Q4KIntegers), for AVX-512, AVX2 and NEON with
// dot products. A code times a byte of x, summed over two, fits in 16 bits; times its scale and
// summed over a super-block in 32, and so does 256 times the high bytes' sum plus the low bytes'.
#pragma once

#include "q4_k_block.h"
#include "simd.h"

namespace kvq::cpu::KVQ_ISA {

/// The slots in which the values of sub-blocks lie in Q4KIntegers.
#if defined(__AVX512F__)
constexpr int kSlots[kSubBlocks] = {0, 2, 1, 3, 4, 6, 5, 7};
#else
constexpr int kSlots[kSubBlocks] = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

#if defined(__AVX512F__) || defined(__AVX2__)

constexpr bool kHasIntegers = true;

/// dmin times the minima times minus the sums of x.
inline __m256 add_minima(__m256 total, const SixBits& six, float dmin, const Q4KIntegers& x) {
  const __m256 minima = _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(six.minima()))));
  return _mm256_fmadd_ps(minima * _mm256_load_ps(x.minus_sums), _mm256_set1_ps(dmin), total);
}

#endif

#if defined(__AVX512F__)

inline __m512i dot_scaled(__m512i total, __m512i codes, const int8_t* x, __m512i scale) {
  const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_load_si512(x));
  return _mm512_add_epi32(total, _mm512_madd_epi16(pairs, scale));
}

inline float dot_integers(const KvqQ4KBlock* row, const Q4KIntegers* x, int64_t columns) {
  const __m512i mask = _mm512_set1_epi8(15);
  __m512 total = _mm512_setzero_ps();
  __m256 offsets = _mm256_setzero_ps();
  for (int64_t b = 0; b < columns; ++b) {
    const KvqQ4KBlock& block = row[b];
    const SixBits six = unpack_six_bits(block.scales);
    const __m512i scales = _mm512_castsi128_si512(
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(six.scales()))));
    __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
    unroll<4>([&](auto i) {  // two sub-blocks, both in the low or both in the high nibbles
      constexpr int kFirst = i / 2 * 4 + i % 2;
      const __m512i bytes = _mm512_loadu_si512(block.codes + i / 2 * 64);
      const __m512i codes = _mm512_and_si512(i % 2 ? _mm512_srli_epi16(bytes, 4) : bytes, mask);
      const __m512i which = _mm512_mask_blend_epi16(0xffff0000u, _mm512_set1_epi16(kFirst),
                                                    _mm512_set1_epi16(kFirst + 2));
      const __m512i scale = _mm512_permutexvar_epi16(which, scales);
      high = dot_scaled(high, codes, x[b].high + 64 * i, scale);
      low = dot_scaled(low, codes, x[b].low + 64 * i, scale);
    });
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    total = _mm512_fmadd_ps(whole, _mm512_set1_ps(half_to_float(block.d) * x[b].scale), total);
    offsets = add_minima(offsets, six, half_to_float(block.dmin), x[b]);
  }
  return sum(_mm512_add_ps(total, _mm512_zextps256_ps512(offsets)));
}

#elif defined(__AVX2__)

inline __m256i dot_scaled(__m256i total, __m256i codes, const int8_t* x, __m256i scale) {
  const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(x));
  return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, values), scale));
}

inline float dot_integers(const KvqQ4KBlock* row, const Q4KIntegers* x, int64_t columns) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256 total = _mm256_setzero_ps(), offsets = _mm256_setzero_ps();
  for (int64_t b = 0; b < columns; ++b) {
    const KvqQ4KBlock& block = row[b];
    const SixBits six = unpack_six_bits(block.scales);
    const __m256i scales = _mm256_broadcastsi128_si256(
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(six.scales()))));
    __m256i high = _mm256_setzero_si256(), low = _mm256_setzero_si256();
    unroll<kSubBlocks>([&](auto j) {
      const __m256i bytes =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.codes + j / 2 * 32));
      const __m256i codes = _mm256_and_si256(j % 2 ? _mm256_srli_epi16(bytes, 4) : bytes, mask);
      constexpr int kBytes = (2 * j + 1) << 8 | 2 * j;  // of the scale
      const __m256i scale = _mm256_shuffle_epi8(scales, _mm256_set1_epi16(kBytes));
      high = dot_scaled(high, codes, x[b].high + 32 * j, scale);
      low = dot_scaled(low, codes, x[b].low + 32 * j, scale);
    });
    const __m256 whole = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(high, 8), low));
    total = _mm256_fmadd_ps(whole, _mm256_set1_ps(half_to_float(block.d) * x[b].scale), total);
    offsets = add_minima(offsets, six, half_to_float(block.dmin), x[b]);
  }
  return sum(total + offsets);
}

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr bool kHasIntegers = true;

inline float dot_integers(const KvqQ4KBlock* row, const Q4KIntegers* x, int64_t columns) {
  const int32x4_t zero = vdupq_n_s32(0);
  float32x4_t total = vdupq_n_f32(0);
  for (int64_t b = 0; b < columns; ++b) {
    const KvqQ4KBlock& block = row[b];
    const SixBits six = unpack_six_bits(block.scales);
    int32x4_t high = zero, low = zero;
    unroll<16>([&](auto i) {  // half a sub-block
      constexpr int kSub = i / 2;
      const uint8x16_t bytes = vld1q_u8(block.codes + kSub / 2 * 32 + i % 2 * 16);
      const int8x16_t codes =
          vreinterpretq_s8_u8(kSub % 2 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
      const int32_t scale = six.scales()[kSub];
      high = vmlaq_n_s32(high, vdotq_s32(zero, codes, vld1q_s8(x[b].high + 16 * i)), scale);
      low = vmlaq_n_s32(low, vdotq_s32(zero, codes, vld1q_s8(x[b].low + 16 * i)), scale);
    });
    const float32x4_t whole = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low));
    total = vfmaq_n_f32(total, whole, half_to_float(block.d) * x[b].scale);
    const uint16x8_t minima = vmovl_u8(vld1_u8(six.minima()));
    const float dmin = half_to_float(block.dmin);
    for (int half = 0; half < 2; ++half) {
      const uint16x4_t narrow = half ? vget_high_u16(minima) : vget_low_u16(minima);
      const float32x4_t values = vcvtq_f32_u32(vmovl_u16(narrow));
      total = vfmaq_n_f32(total, vmulq_f32(values, vld1q_f32(x[b].minus_sums + 4 * half)), dmin);
    }
  }
  return vaddvq_f32(total);
}

#else

constexpr bool kHasIntegers = false;

inline float dot_integers(const KvqQ4KBlock*, const Q4KIntegers*, int64_t) { return 0; }

#endif

}  // namespace kvq::cpu::KVQ_ISA
