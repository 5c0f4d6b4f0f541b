// Products with Q4_K weights. One vector x: its values are put in the order in which the codes'
// nibbles lie, and a super-block's scales apply to sums of 32 products. Two to eight vectors: each
// super-block is decoded once, to the values that dequantize gives, and serves them all.
#include "q4_k_block.h"
#include "q4_k_integers.h"
#include "simd.h"
#include "tables.h"

namespace kvq::cpu::KVQ_ISA {
namespace {

constexpr int kSize = KVQ_Q4_K_SIZE;

inline const KvqQ4KBlock* row_of(const Q4KProductArgs& args, int64_t n) {
  return reinterpret_cast<const KvqQ4KBlock*>(args.blocks + n * args.row_stride);
}

inline void minus_sums(const float* x, float* out) {
  for (int j = 0; j < kSubBlocks; ++j) {
    Lanes sum = load_lanes(x + 32 * j) + load_lanes(x + 32 * j + 16);
    out[j] = -sum32({sum, Lanes{}});
  }
}

/// Results of a range of rows of w, written in the output's dtype.
template <typename Dot>
inline void each_row(const Q4KProductArgs& args, int64_t begin, int64_t end, const Dot& dot) {
  constexpr int64_t kChunk = 64;
  const int64_t size = dtype_size(args.dtype);
  float out[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = std::min(kChunk, end - first);
    for (int64_t i = 0; i < count; ++i) out[i] = dot(row_of(args, first + i));
    store_row(out, args.dtype, count, args.out + first * size, /*saturate=*/false);
  }
}

// Floats. Lane i of 32-bit words holds bytes 4i to 4i + 3 of the codes; its nibble k belongs to
// sub-block k % 2 of the 32 bytes, element 4i + k / 2.

template <int K>
inline F nibble(I words) {
#if defined(__AVX512F__)
  const F values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(shift_right<4 * K>(words), values);  // the low four bits choose
#else
  return to_float(bit_and(shift_right<4 * K>(words), splat_int(15)));
#endif
}

/// Parts of a super-block's codes, each a register of words; the first is word part * kWidth.
constexpr int kParts = 32 / kWidth;

/// Where Q4KFloats holds the values of these words' nibbles 0; those of nibbles k lie 16 k further.
constexpr int place(int word) { return word / 16 * 128 + word % 16; }

/// A super-block's scales times d and minima times dmin.
class Steps {
 public:
  explicit Steps(const KvqQ4KBlock& block) {
    const SixBits six = unpack_six_bits(block.scales);
    const float d = half_to_float(block.d), dmin = half_to_float(block.dmin);
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(six.words));
    steps_ =
        to_float(_mm512_cvtepu8_epi32(bytes)) * _mm512_mask_blend_ps(0xff00, splat(d), splat(dmin));
#else
    for (int j = 0; j < kSubBlocks; ++j) {
      steps_[j] = d * static_cast<float>(six.scales()[j]);
      steps_[j + kSubBlocks] = dmin * static_cast<float>(six.minima()[j]);
    }
#endif
  }

  /// The scale of sub-block J in every lane; where a register holds 64 bytes of codes, in its
  /// first half, and that of sub-block J + 2 in the other. J + 8: the minimum of sub-block J.
  template <int J>
  F lanes() const {
#if defined(__AVX512F__)
    const I which = _mm512_mask_blend_epi32(0xff00, splat_int(J), splat_int(J + 2));
    return _mm512_permutexvar_ps(which, steps_);
#else
    return splat(steps_[J]);
#endif
  }

  /// total plus the lanes of minima times minus the sums of x.
  F add_minima(F total, const Q4KFloats& x) const {
#if defined(__AVX512F__)
    return fma(steps_, load(x.minus_sums), total);
#else
    for (int j = kSubBlocks; j < 2 * kSubBlocks; j += kWidth) {
      total = fma(load(steps_ + j), load(x.minus_sums + j), total);
    }
    return total;
#endif
  }

 private:
#if defined(__AVX512F__)
  F steps_;
#else
  float steps_[2 * kSubBlocks];
#endif
};

inline float dot_floats(const KvqQ4KBlock* row, const Q4KFloats* x, int64_t columns) {
  F total = splat(0);
  for (int64_t b = 0; b < columns; ++b) {
    const Steps steps(row[b]);
    total = steps.add_minima(total, x[b]);
    unroll<kParts>([&](auto part) {
      constexpr int kFirst = part * kWidth;
      const I words = load_int(row[b].codes + 4 * kFirst);
      F sums[2] = {splat(0), splat(0)};
      unroll<8>([&](auto k) {
        sums[k % 2] = fma(nibble<k>(words), load(x[b].x + place(kFirst) + 16 * k), sums[k % 2]);
      });
      unroll<2>([&](auto odd) {
        total = fma(sums[odd], steps.template lanes<kFirst / 8 * 2 + odd>(), total);
      });
    });
  }
  return sum(total);
}

/// The weights of a super-block, in the order of Q4KFloats.
inline void decode_in_order(const KvqQ4KBlock& block, float* w) {
  const Steps steps(block);
  unroll<kParts>([&](auto part) {
    constexpr int kFirst = part * kWidth, kSub = kFirst / 8 * 2;
    const I words = load_int(block.codes + 4 * kFirst);
    const F scales[] = {steps.template lanes<kSub>(), steps.template lanes<kSub + 1>()};
    const F minima[] = {steps.template lanes<kSub + 8>(), steps.template lanes<kSub + 9>()};
    unroll<8>([&](auto k) {
      store(w + place(kFirst) + 16 * k, nibble<k>(words) * scales[k % 2] - minima[k % 2]);
    });
  });
}

/// R rows of w with M vectors x: R super-blocks are decoded, then each value of x is read once.
template <int M, int R>
inline void multiply_rows(const Q4KProductArgs& args, int64_t n) {
  alignas(64) float w[R][kSize];
  F totals[R][M];
  unroll<R>([&](auto r) { unroll<M>([&](auto m) { totals[r][m] = splat(0); }); });
  for (int64_t b = 0; b < args.columns; ++b) {
    unroll<R>([&](auto r) { decode_in_order(row_of(args, n + r)[b], w[r]); });
    for (int i = 0; i < kSize; i += kWidth) {
      unroll<M>([&](auto m) {
        const F value = load(args.floats[m * args.columns + b].x + i);
        unroll<R>([&](auto r) { totals[r][m] = fma(load(w[r] + i), value, totals[r][m]); });
      });
    }
  }
  unroll<R>([&](auto r) {
    unroll<M>([&](auto m) {
      const float out = sum(totals[r][m]);
      const int64_t i = m * args.out_stride + n + r;
      store_row(&out, args.dtype, 1, args.out + i * dtype_size(args.dtype), /*saturate=*/false);
    });
  });
}

/// Sums that are kept in registers at once.
constexpr int kSums = kRegisters / 2;

template <int M>
void multiply(const Q4KProductArgs& args, int64_t begin, int64_t end) {
  constexpr int kRows = M <= kSums / 4 ? 4 : M <= kSums / 2 ? 2 : 1;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) multiply_rows<M, kRows>(args, n);
  for (; n < end; ++n) multiply_rows<M, 1>(args, n);
}

}  // namespace

bool q4_k_to_integers(const Q4KProductArgs& args) {
  if constexpr (!kHasIntegers) return false;
  constexpr float kLargest = 32512;  // 127 * 256: the high byte's range
  constexpr float kMagic = 12582912.0f;
  for (int64_t b = 0; b < args.columns; ++b) {
    float y[kSize];
    load_row(static_cast<const char*>(args.x) + b * kSize * dtype_size(args.dtype), args.dtype,
             kSize, y);
    Lanes top{}, unordered{};
    for (int i = 0; i < kSize; i += kLanes) {
      const Lanes v = load_lanes(y + i);
      top = larger(v < Lanes{} ? -v : v, top);
      unordered = unordered + v * 0.0f;
    }
    const float largest = largest_lane(top), nan = sum32({unordered, Lanes{}});
    if (nan != 0 || (largest > 0 && largest < 1e-30f)) return false;
    const float inverse = largest > 0 ? kLargest / largest : 0.0f;
    Q4KIntegers& out = args.integers[b];
    out.scale = largest / kLargest;
    minus_sums(y, out.minus_sums);
    for (int j = 0; j < kSubBlocks; ++j) {
      int8_t* high = out.high + 32 * kSlots[j];
      int8_t* low = out.low + 32 * kSlots[j];
      for (int i = 0; i < 32; ++i) {
        const float whole = (y[32 * j + i] * inverse + kMagic) - kMagic;  // to nearest
        const int q = static_cast<int>(whole), top_byte = (q + 128) >> 8;
        high[i] = static_cast<int8_t>(top_byte);
        low[i] = static_cast<int8_t>(q - 256 * top_byte);
      }
    }
  }
  return true;
}

void q4_k_to_floats(const Q4KProductArgs& args) {
  const int64_t bytes = kSize * dtype_size(args.dtype);
  const char* x = static_cast<const char*>(args.x);
  for (int64_t b = 0; b < args.rows * args.columns; ++b) {
    float y[kSize];
    load_row(x + b * bytes, args.dtype, kSize, y);
    Q4KFloats& out = args.floats[b];
    std::fill_n(out.minus_sums, kSubBlocks, 0.0f);
    minus_sums(y, out.minus_sums + kSubBlocks);
    for (int i = 0; i < kSize; ++i) {
      const int chunk = i / 64, odd = i / 32 % 2, word = i % 32 / 4, k = i % 4 * 2 + odd;
      out.x[chunk / 2 * 128 + k * 16 + chunk % 2 * 8 + word] = y[i];
    }
  }
}

void q4_k_gemv_integers(const Q4KProductArgs& args, int64_t begin, int64_t end) {
  if constexpr (kHasIntegers) {
    each_row(args, begin, end, [&](const KvqQ4KBlock* row) {
      return dot_integers(row, args.integers, args.columns);
    });
  }
}

void q4_k_gemv_floats(const Q4KProductArgs& args, int64_t begin, int64_t end) {
  each_row(args, begin, end,
           [&](const KvqQ4KBlock* row) { return dot_floats(row, args.floats, args.columns); });
}

void q4_k_multiply(const Q4KProductArgs& args, int64_t begin, int64_t end) {
  constexpr void (*kMultiply[])(const Q4KProductArgs&, int64_t, int64_t) = {
      multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>};
  kMultiply[args.rows - 2](args, begin, end);
}

}  // namespace kvq::cpu::KVQ_ISA
