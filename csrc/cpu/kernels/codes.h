// What the encoders share: a batch of rows, the ranges of their groups, scales, and codes from
// integers to bits. Every operation rounds once, as reference.py says, so that codes are the same
// on every processor.
//
// A row's own chain from range to scale to code is longer than what a processor holds in flight:
// each step is done for all groups of a batch before the next, a group in a lane where it can.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int64_t kMaxHeadDim = 1024;
constexpr int kSlab = 32;
constexpr int kBatchValues = 2048;  // at most
constexpr int kBatchGroups = kBatchValues / kSlab;
constexpr int kBatchRows = kBatchGroups;
constexpr int kBatchPadding = 64;

/// Centred and rotated rows, one after the other, and where their packed forms go.
struct Batch {
  float* y = nullptr;  ///< encoders may change it, and read kBatchPadding past the last
  int rows = 0;
  int precision = 24;    ///< significant bits of y's numbers, at most
  bool saturate = true;  ///< format none: what is too large for float16 stays finite
  char* codes[kBatchRows];
  char* scales[kBatchRows];
  char* biases[kBatchRows];
  const char* next[kBatchRows];  ///< where the next batch's rows come from
  int64_t next_bytes = 0;        ///< of a row

  /// Asks for row r of the next batch. Encoders do it row by row as they write codes: many at once
  /// stall, and the processor's own prefetching stops where loads do.
  [[gnu::always_inline]] void ask_next(int r) const {
    for (int64_t i = 0; i < next_bytes; i += 64) __builtin_prefetch(next[r] + i);
  }

  uint8_t* bytes(int row) const { return reinterpret_cast<uint8_t*>(codes[row]); }
};

/// One number per group of a batch, row after row.
using GroupValues = float[kBatchGroups];

/// Calls f(k) for every kWidth of groups.
template <typename Function>
[[gnu::always_inline]] inline void each_vector(int groups, const Function& f) {
  for (int k = 0; k < groups; k += kWidth) f(k);
}

/// The larger magnitude of a range's ends; never a negative zero.
inline F magnitude(F low, F high) { return maximum(high, splat(0.0f) - low); }

/// Ranges of groups that hold NaN, which become NaN, or numbers beyond the limit, which are
/// clamped.
inline void clamp_ranges(float* y, int group, int groups, float limit, GroupValues& low,
                         GroupValues& high) {
  for (int k = 0; k < groups; ++k, y += group) {
    low[k] = INFINITY, high[k] = -INFINITY;
    bool nan = false;
    for (int i = 0; i < group; ++i) {
      nan |= y[i] != y[i];
      y[i] = y[i] > limit ? limit : y[i] < -limit ? -limit : y[i];
      low[k] = y[i] < low[k] ? y[i] : low[k];
      high[k] = y[i] > high[k] ? y[i] : high[k];
    }
    low[k] += 0.0f;  // one zero
    if (nan) low[k] = high[k] = NAN;
  }
}

template <int Group>
void group_ranges(float* y, int groups, float limit, GroupValues& low, GroupValues& high) {
  const int padded = (groups + kWidth - 1) / kWidth * kWidth;
  std::fill(y + groups * Group, y + padded * Group, 0.0f);
  bool nan = false, beyond = false;
  for (int k = 0; k < groups; k += kWidth) {
    F below[kWidth / 4], above[kWidth / 4];
    unroll<kWidth / 4>([&](auto i) KVQ_INLINE {
      F least[4], greatest[4];
      unroll<4>([&](auto j) KVQ_INLINE {
        const float* p = y + (k + 4 * i + j) * Group;
        unroll<Group / (2 * kWidth)>([&](auto pair) KVQ_INLINE {
          const F a = load(p + 2 * pair * kWidth), b = load(p + (2 * pair + 1) * kWidth);
          nan |= any_unordered(a, b);
          least[j] = pair ? minimum(least[j], minimum(a, b)) : minimum(a, b);
          greatest[j] = pair ? maximum(greatest[j], maximum(a, b)) : maximum(a, b);
        });
        least[j] = splat(0.0f) - least[j];
      });
      below[i] = largest_in_quarters(least);
      above[i] = largest_in_quarters(greatest);
    });
    const F lowest = splat(0.0f) - largest_of_quarters(below);
    const F highest = largest_of_quarters(above);
    beyond |= any_less(splat(limit), magnitude(lowest, highest));
    store(low + k, lowest);
    store(high + k, highest);
  }
  if (nan || beyond) [[unlikely]]
    clamp_ranges(y, Group, groups, limit, low, high);
}

/// The least and the greatest element of every group of 32, 64 or 128; both NaN where one is. y is
/// clamped to the limit, and padded with zeros to kWidth groups. A least that is zero is +0.
inline void group_ranges(float* y, int group, int groups, float limit, GroupValues& low,
                         GroupValues& high) {
  switch (group) {
    case 32:
      return group_ranges<32>(y, groups, limit, low, high);
    case 64:
      return group_ranges<64>(y, groups, limit, low, high);
    default:
      return group_ranges<128>(y, groups, limit, low, high);
  }
}

/// x as a scale of this dtype: finite numbers stay finite.
inline F round_scale(F x, KvqDtype dtype) {
  if (dtype == KVQ_FLOAT32) return x;
  if (dtype == KVQ_FLOAT16) {  // the order of operands keeps NaN
    x = maximum(splat(-KVQ_F16_MAX), minimum(splat(KVQ_F16_MAX), x));
  }
  char stored[sizeof(F)];
  store_as(dtype, stored, x);
  return load_as(dtype, stored);
}

/// The same, and 1 for what would be 0.
inline F round_divisor(F x, KvqDtype dtype) {
  x = round_scale(x, dtype);
  return select_equal(x, splat(0.0f), splat(1.0f), x);
}

/// Scales that are numbers of the dtype, per_row of them to each row.
inline void store_scales(const GroupValues& values, KvqDtype dtype, int per_row, int rows,
                         char* const* out) {
  const int size = dtype_size(dtype), bytes = per_row * size;
  char stored[kBatchGroups * sizeof(float)];
  each_vector(rows * per_row, [&](int k) { store_as(dtype, stored + k * size, load(values + k)); });
  const char* from = stored;
  for (int r = 0; r < rows; ++r, from += bytes) {
    if (bytes == 4) {
      std::memcpy(out[r], from, 4);
    } else {
      for (int i = 0; i < bytes; i += 2) std::memcpy(out[r] + i, from + i, 2);
    }
  }
}

/// x / divisor, correctly rounded, for a divisor that is a float16; reciprocal is 1 / divisor.
///
/// A divisor of 11 significant bits leaves every quotient at least 2^-36 of itself away from where
/// its rounding changes. One correction is good to 2^-45: it cannot fall on the wrong side.
inline F quotient(F x, F divisor, F reciprocal) {
#if defined(__FMA__) || defined(__aarch64__)
  const F q = x * reciprocal;
  return fma(fma(q, splat(0.0f) - divisor, x), reciprocal, q);
#else
  return x / divisor;
#endif
}

/// x within [low, high]; NaN becomes low.
inline F bounded(F x, float low, float high) {
  return minimum(maximum(x, splat(low)), splat(high));
}

// ---- Codes.

/// 8 codes of Bits bits in Bits bytes, the first in the lowest bits.
template <int Bits>
inline void pack8(const uint8_t* q, uint8_t* out) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(q[i]) << (i * Bits);
  for (int i = 0; i < Bits; ++i) out[i] = static_cast<uint8_t>(word >> (8 * i));
}

#if defined(__AVX512VBMI__)
/// Where _mm512_packus_epi32, four of each operand in turn, has put 32 values: their low bytes, of
/// every value or of the first of each two.
constexpr std::array<uint8_t, 64> packed_order(int step) {
  std::array<uint8_t, 64> order{};
  for (int i = 0; i < kSlab; i += step) {
    order[i / step] = static_cast<uint8_t>(i % 16 / 4 * 16 + i / 16 * 8 + i % 4 * 2);
  }
  return order;
}
#endif

#if defined(__AVX2__)

/// The low bytes of kWidth integers.
inline void store_bytes(uint8_t* out, I x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x));
#else
  const __m256i bytes = _mm256_shuffle_epi8(x, _mm256_set1_epi32(0x0c080400));
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi32(low, high));
#endif
}

/// 32 bytes, in order.
using Bytes = __m256i;

inline Bytes load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

/// 32 integers as bytes; negative ones, and what no integer holds, as 0. They are at most 255.
inline Bytes narrow(const I* x) {
#if defined(__AVX512VBMI__)
  alignas(64) static constexpr auto kOrder = packed_order(1);
  const __m512i words = _mm512_packus_epi32(x[0], x[1]);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi8(load_int(kOrder.data()), words));
#elif defined(__AVX512F__)
  const __m256i bytes = _mm512_cvtepi16_epi8(_mm512_packus_epi32(x[0], x[1]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
#else
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packus_epi32(x[0], x[1]), _mm256_packus_epi32(x[2], x[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
}

/// The 32 codes of Bits bits as a stream of 4 * Bits bytes, the first in the lowest bits.
template <int Bits>
inline void pack(Bytes x, uint8_t* out) {
  const auto pairs = [&] {  // of codes, in 16 bits each
    return _mm256_maddubs_epi16(x, _mm256_set1_epi16(static_cast<int16_t>(1 | 256 << Bits)));
  };
  if constexpr (Bits == 8) {
    std::memcpy(out, &x, sizeof x);
  } else if constexpr (Bits == 4) {
    const __m256i bytes = _mm256_packus_epi16(pairs(), pairs());
    const __m128i y = _mm256_castsi256_si128(_mm256_permute4x64_epi64(bytes, 0x08));
    std::memcpy(out, &y, sizeof y);
  } else {
    __m256i y = _mm256_madd_epi16(pairs(), _mm256_set1_epi32(1 | 65536 << 2 * Bits));
    // Every 32 bits hold four codes in their low end: two of them meet in the middle of 64.
    y = _mm256_sllv_epi32(y, _mm256_set1_epi64x(32 - 4 * Bits));
    y = _mm256_srli_epi64(y, 32 - 4 * Bits);
    alignas(16) static constexpr auto kPick = [] {  // the low Bits bytes of both 64
      std::array<uint8_t, 16> pick{};
      for (int i = 0; i < 16; ++i) {
        pick[i] = static_cast<uint8_t>(i < Bits ? i : i < 2 * Bits ? i + 8 - Bits : 0x80);
      }
      return pick;
    }();
    const __m128i pick = _mm_load_si128(reinterpret_cast<const __m128i*>(kPick.data()));
    y = _mm256_shuffle_epi8(y, _mm256_broadcastsi128_si256(pick));
    const __m128i first = _mm256_castsi256_si128(y), second = _mm256_extracti128_si256(y, 1);
    std::memcpy(out, &first, 2 * Bits);
    std::memcpy(out + 2 * Bits, &second, 2 * Bits);
  }
}

#else

inline void store_bytes(uint8_t* out, I x) {
  for (int i = 0; i < kWidth; ++i) out[i] = static_cast<uint8_t>(x[i]);
}

struct Bytes {
  uint8_t byte[kSlab];
};

inline Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Bytes narrow(const I* x) {
  Bytes out;
  for (int j = 0; j < kSlab / kWidth; ++j) {
    const I v = bit_and(x[j], bit_xor(shift_right_signed<31>(x[j]), splat_int(~0u)));
    for (int i = 0; i < kWidth; ++i) out.byte[j * kWidth + i] = static_cast<uint8_t>(v[i]);
  }
  return out;
}

template <int Bits>
inline void pack(const Bytes& x, uint8_t* out) {
  if constexpr (Bits == 8) {
    std::memcpy(out, &x, sizeof x);
  } else {
    for (int i = 0; i < kSlab; i += 8, out += Bits) pack8<Bits>(x.byte + i, out);
  }
}

#endif

/// 32 integers, kWidth by of(index of their first), as codes of Bits bits.
template <int Bits, typename Function>
[[gnu::always_inline]] inline void store_codes(uint8_t* out, const Function& of) {
  I x[kSlab / kWidth];
  unroll<kSlab / kWidth>([&](auto j) KVQ_INLINE { x[j] = of(j * kWidth); });
#if defined(__AVX512VBMI__)
  if constexpr (Bits == 4) {  // two codes meet before they are narrowed and put in order, at once
    alignas(64) static constexpr auto kOrder = packed_order(2);
    const __m512i words = _mm512_packus_epi32(x[0], x[1]);
    const __m512i pairs = _mm512_madd_epi16(words, splat_int(1 | 16 << 16));
    const __m512i bytes = _mm512_permutexvar_epi8(load_int(kOrder.data()), pairs);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(bytes));
    return;
  }
#endif
  pack<Bits>(narrow(x), out);
}

}  // namespace kvq::cpu::KVQ_ISA
