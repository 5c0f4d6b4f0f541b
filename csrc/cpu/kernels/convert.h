// float32 <-> float16, bfloat16, fp8, one value or a row at a time. Every conversion rounds to
// nearest even. Included per instruction set, inside namespace kvq::cpu::KVQ_ISA.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace kvq::cpu::KVQ_ISA {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 x;
  std::memcpy(&x, &h, 2);
  return x;
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return float_of(sign | bits_of(subnormal));
#endif
}

inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 h = x;
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
#else
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds at 2^-24
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
#endif
}

inline float bfloat_to_float(uint16_t b) { return float_of(uint32_t(b) << 16); }

inline uint16_t float_to_bfloat(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float load_float(const char* p, KvqDtype dtype) {
  if (dtype == KVQ_FLOAT32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  uint16_t u;
  std::memcpy(&u, p, 2);
  return dtype == KVQ_FLOAT16 ? half_to_float(u) : bfloat_to_float(u);
}

inline int dtype_size(KvqDtype dtype) { return dtype == KVQ_FLOAT32 ? 4 : 2; }

/// Round x to what a scale of this dtype stores, and store it: saturating, with one NaN.
inline float store_scale(char* p, int64_t i, KvqDtype dtype, float x) {
  if (dtype == KVQ_FLOAT32) {
    const float stored = x != x ? float_of(0x7fc00000) : x;
    std::memcpy(p + 4 * i, &stored, 4);
    return stored;
  }
  uint16_t u;
  if (dtype == KVQ_FLOAT16) {
    if (x > KVQ_F16_MAX) x = KVQ_F16_MAX;
    if (x < -KVQ_F16_MAX) x = -KVQ_F16_MAX;
    u = x != x ? uint16_t(0x7e00) : float_to_half(x);
  } else {
    u = float_to_bfloat(x);
  }
  std::memcpy(p + 2 * i, &u, 2);
  return dtype == KVQ_FLOAT16 ? half_to_float(u) : bfloat_to_float(u);
}

inline float load_scale(const char* p, int64_t i, KvqDtype dtype) {
  return load_float(p + i * dtype_size(dtype), dtype);
}

inline void load_row(const char* p, KvqDtype dtype, int64_t n, float* out) {
  if (dtype == KVQ_FLOAT32) {
    std::memcpy(out, p, 4 * n);
    return;
  }
  const auto* in = reinterpret_cast<const uint16_t*>(p);
  if (dtype == KVQ_BFLOAT16) {
    for (int64_t i = 0; i < n; ++i) out[i] = bfloat_to_float(in[i]);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  const int64_t whole = n & ~int64_t{7};
  for (; i < whole; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(h));
  }
#endif
  for (; i < n; ++i) out[i] = half_to_float(in[i]);
}

/// Cast a row; with saturate, what is too large for float16 becomes its largest finite value.
inline void store_row(const float* x, KvqDtype dtype, int64_t n, char* out, bool saturate = true) {
  if (dtype == KVQ_FLOAT32) {
    std::memcpy(out, x, 4 * n);
    return;
  }
  int64_t i = 0;
  const float largest = saturate ? KVQ_F16_MAX : float_of(0x7f800000);
#if defined(__F16C__)
  if (dtype == KVQ_FLOAT16) {
    const __m256 limit = _mm256_set1_ps(largest), low = _mm256_set1_ps(-largest);
    const int64_t whole = n & ~int64_t{7};
    for (; i < whole; i += 8) {
      // The operand order keeps NaN: min and max return their second operand then.
      const __m256 v = _mm256_max_ps(low, _mm256_min_ps(limit, _mm256_loadu_ps(x + i)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i),
                       _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < n; ++i) {
    float v = x[i];
    uint16_t u;
    if (dtype == KVQ_FLOAT16) {
      v = v > largest ? largest : v;
      v = v < -largest ? -largest : v;
      u = float_to_half(v);
    } else {
      u = float_to_bfloat(v);
    }
    std::memcpy(out + 2 * i, &u, 2);
  }
}

}  // namespace kvq::cpu::KVQ_ISA
