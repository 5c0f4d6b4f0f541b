// The products of a slab with every query row, and what their operands are made of.
#pragma once

#include "attention.h"
#include "attention_pairs.h"

namespace kvq::cpu::KVQ_ISA {

/// Vectors of a tile next to each other: as many as the registers hold for 4 rows.
constexpr int kScoreVectors = kRegisters == 32 ? 4 : 2;
constexpr int kValueVectors = kRegisters == 32 && kWidth == 4 ? 4 : 2;
constexpr int kValueRows = kRegisters == 32 && kWidth == 16 ? 8 : 4;

/// Operands in float32.
struct Floats {
  using Unpacker = FloatUnpacker;
  using Element = float;
  using Vector = F;
  static constexpr int kPerLane = 1;     ///< numbers in an element
  static constexpr bool kFuses = false;  ///< whether Unpacker may multiply as it unpacks

  static Vector load(const Element* p) { return KVQ_ISA::load(p); }
  static Vector splat(Element x) { return KVQ_ISA::splat(x); }
  static F dot(Vector a, Vector b, F c) { return fma(a, b, c); }
  /// 32 numbers of a query.
  static void store_query(const Unpacker&, const float* q, Element* out) {
    std::memcpy(out, q, kSlab * sizeof(float));
  }
  /// The block's 64 weights times scale (where there is one).
  static void store_weights(const float* weights, const float* scale, Element* out) {
    for (int t = 0; t < kBlockTokens; t += kWidth) {
      const F w = load(weights + t);
      store(out + t, scale ? w * load(scale + t) : w);
    }
  }
};

#if defined(KVQ_BFLOAT_PAIRS)
/// Operands in pairs of bfloat16, sums in float32: for bfloat16 queries, whose dense attention
/// rounds its weights and its cache the same way.
struct Pairs {
  using Unpacker = PairUnpacker;
  using Element = uint32_t;
  using Vector = I;
  static constexpr int kPerLane = 2;
  static constexpr bool kFuses = true;

  static bool hold(const AttentionArgs& args) {
    return args.dtype == KVQ_BFLOAT16 && Unpacker::holds(args.k.layout) &&
           Unpacker::holds(args.v.layout);
  }
  static Vector load(const Element* p) { return load_int(p); }
  static Vector splat(Element x) { return splat_int(x); }
  static F dot(Vector a, Vector b, F c) { return pair_dot(a, b, c); }
  static void store_query(const Unpacker& unpacker, const float* q, Element* out) {
    unpacker.arrange((I)_mm512_cvtne2ps_pbh(KVQ_ISA::load(q + kWidth), KVQ_ISA::load(q)), out);
  }
  static void store_weights(const float* weights, const float* scale, Element* out) {
    for (int t = 0; t < kBlockTokens; t += 2 * kWidth) {
      F low = KVQ_ISA::load(weights + t), high = KVQ_ISA::load(weights + t + kWidth);
      if (scale) {
        low = low * KVQ_ISA::load(scale + t);
        high = high * KVQ_ISA::load(scale + t + kWidth);
      }
      _mm512_storeu_si512(out + t / 2, (I)_mm512_cvtne2ps_pbh(high, low));
    }
  }
};
#endif

/// scores[m][64] += (q[m] . columns) * scale + q_sum[m] * bias, of one slab.
template <typename Operand, int Rows, bool Scale, bool Bias>
void score_tile(const typename Operand::Element* columns, const typename Operand::Element* q,
                const float* scale, const float* bias, const float* q_sum, float* scores) {
  constexpr int kVectors = kScoreVectors, kDepth = kSlab / Operand::kPerLane;
  // One row's sums are too few to keep the multipliers busy: take even and odd values apart.
  constexpr int kChains = Rows == 1 ? 2 : 1;
  for (int t = 0; t < kBlockTokens; t += kVectors * kWidth) {
    F sums[kChains][Rows][kVectors];
    for (auto& chain : sums) {
      for (auto& row : chain) {
        for (F& x : row) x = splat(0.0f);
      }
    }
    for (int d = 0; d < kDepth; d += kChains) {
      for (int c = 0; c < kChains; ++c) {
        typename Operand::Vector k[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          k[v] = Operand::load(columns + (d + c) * kBlockTokens + t + v * kWidth);
        }
        for (int m = 0; m < Rows; ++m) {
          const auto query = Operand::splat(q[m * kDepth + d + c]);
          for (int v = 0; v < kVectors; ++v) {
            sums[c][m][v] = Operand::dot(k[v], query, sums[c][m][v]);
          }
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const int at = t + v * kWidth;
      for (int m = 0; m < Rows; ++m) {
        float* s = scores + m * kBlockTokens + at;
        F product = sums[0][m][v];
        for (int c = 1; c < kChains; ++c) product = product + sums[c][m][v];
        F x = load(s);
        x = Scale ? fma(product, load(scale + at), x) : x + product;
        if constexpr (Bias) x = fma(load(bias + at), splat(q_sum[m]), x);
        store(s, x);
      }
    }
  }
}

/// sums[m][32] += weights[m] . values, of one slab. tokens is a multiple of 4 elements.
template <typename Operand, int Rows>
void value_tile(const typename Operand::Element* values, const typename Operand::Element* weights,
                int tokens, float* sums) {
  constexpr int kChains = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  constexpr int kVectors = kValueVectors, kElements = kBlockTokens / Operand::kPerLane;
  for (int d = 0; d < kSlab; d += kVectors * kWidth) {
    F acc[kChains][Rows][kVectors];
    for (int m = 0; m < Rows; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        acc[0][m][v] = load(sums + m * kSlab + d + v * kWidth);
        for (int c = 1; c < kChains; ++c) acc[c][m][v] = splat(0.0f);
      }
    }
    for (int t = 0; t < tokens / Operand::kPerLane; t += kChains) {
      for (int c = 0; c < kChains; ++c) {
        typename Operand::Vector x[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          x[v] = Operand::load(values + (t + c) * kSlab + d + v * kWidth);
        }
        for (int m = 0; m < Rows; ++m) {
          const auto weight = Operand::splat(weights[m * kElements + t + c]);
          for (int v = 0; v < kVectors; ++v) {
            acc[c][m][v] = Operand::dot(x[v], weight, acc[c][m][v]);
          }
        }
      }
    }
    for (int m = 0; m < Rows; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        F x = acc[0][m][v];
        for (int c = 1; c < kChains; ++c) x = x + acc[c][m][v];
        store(sums + m * kSlab + d + v * kWidth, x);
      }
    }
  }
}

/// Calls f(std::integral_constant<int, 8, 4, 2 or 1>, first row) until every row is done.
template <int Most, typename Function>
void for_row_tiles(int64_t rows, const Function& f) {
  int64_t r = 0;
  for (; r + Most <= rows; r += Most) f(std::integral_constant<int, Most>{}, r);
  if (Most > 4 && r + 4 <= rows) f(std::integral_constant<int, 4>{}, r), r += 4;
  if (r + 2 <= rows) f(std::integral_constant<int, 2>{}, r), r += 2;
  if (r < rows) f(std::integral_constant<int, 1>{}, r);
}

}  // namespace kvq::cpu::KVQ_ISA
