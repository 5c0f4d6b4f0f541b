// Packed rows to bfloat16 for the processor's dot products of pairs (vdpbf16ps): a 32-bit lane
// holds two numbers that are multiplied and added together. For columns they are two values of a
// token, for rows a value of two tokens. What a code stands for comes from a table, so there is one
// unpacker per code size and order. Exact but for codebooks, which round as a bfloat16 cache would.
#pragma once

#include "attention_unpack.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
#define KVQ_BFLOAT_PAIRS 1

#include <array>
#include <cmath>

namespace kvq::cpu::KVQ_ISA {

/// How the numbers of 8-bit codes come in pairs of opposite sign, which halves their tables.
enum class Symmetry {
  none,
  sign,    ///< bit 7 is the number's sign
  mirror,  ///< code c's number is code 255 - c's, negated
};

/// How codes are stored, apart from what they stand for.
struct Coding {
  int bits;
  bool halves = false;  ///< as value_index
  Symmetry symmetry = Symmetry::none;
};

/// The bfloat16 numbers of all codes, in units of `unit`. Codes of up to 6 bits index `word` with
/// whatever bits are above them, so it repeats. For codes of 8 bits the bytes of their numbers are
/// looked up one by one; where there is a symmetry the first half of the table is the positive one.
struct PairTable {
  alignas(64) uint16_t word[64];
  alignas(64) uint8_t low[256], high[256];
  float unit = 1;
};

/// Factor for a codebook that makes its entries lie close to bfloat16 numbers, and on the whole
/// neither above nor below them: an error that all entries shared would change every score.
template <int Bits>
float codebook_factor(float& unit) {
  const float* entries = kvq_codebook(Bits);
  constexpr int kEntries = 1 << Bits;
  float best = 1, least = __builtin_inff();
  for (int step = 0; step < 256; ++step) {
    const float factor = 1 + static_cast<float>(step) / 256;
    float products = 0, squares = 0, total = 0;
    const auto visit = [&](auto f) KVQ_INLINE {
      for (int i = kEntries / 2; i < kEntries; ++i) {
        // How often a normal variable falls to this entry.
        const float gap = entries[i + 1 < kEntries ? i + 1 : i] - entries[i - 1];
        f(gap * std::exp(-entries[i] * entries[i] / 2), entries[i],
          bfloat_to_float(float_to_bfloat(entries[i] * factor)));
      }
    };
    visit([&](float often, float x, float rounded) {
      products += often * x * rounded;
      squares += often * rounded * rounded;
    });
    const float fit = products / squares;
    visit([&](float often, float x, float rounded) {
      total += often * (fit * rounded - x) * (fit * rounded - x);
    });
    if (total < least) {
      least = total;
      best = factor;
      unit = fit;
    }
  }
  return best;
}

template <KvqFamily Family, int Bits>
const PairTable& pair_table(Symmetry symmetry = Symmetry::none) {
  static const PairTable table = [symmetry] {
    PairTable made{};
    float factor = 1;
    if constexpr (Family == KVQ_FAMILY_TURBOQUANT) factor = codebook_factor<Bits>(made.unit);
    const auto value = [factor](int code) -> float {
      switch (Family) {
        case KVQ_FAMILY_FP8_E4M3:
          return fp8_values<E4M3>()[code];
        case KVQ_FAMILY_FP8_E5M2:
          return fp8_values<E5M2>()[code];
        case KVQ_FAMILY_Q8_0:
          return static_cast<int8_t>(code);
        case KVQ_FAMILY_Q4_0:
          return static_cast<float>(code - 8);
        case KVQ_FAMILY_TURBOQUANT:
          return kvq_codebook(Bits)[code] * factor;
        default:
          return static_cast<float>(code) - ((1 << Bits) - 1) * 0.5f;
      }
    };
    const int first = symmetry == Symmetry::mirror ? 128 : 0;
    for (int i = 0; i < 256; ++i) {
      const uint16_t number = float_to_bfloat(value((first + i) % (1 << Bits)));
      if (i < 64) made.word[i] = number;
      made.low[i] = static_cast<uint8_t>(number);
      made.high[i] = static_cast<uint8_t>(number >> 8);
    }
    return made;
  }();
  return table;
}

/// The numbers of 32 codes of up to 6 bits, each in the low bits of its 16-bit lane.
template <int Bits>
class WordLookup {
 public:
  explicit WordLookup(const PairTable& table)
      : first_(load_int(table.word)), second_(load_int(table.word + 32)) {}
  I operator()(I codes) const {
    return Bits <= 5 ? _mm512_permutexvar_epi16(codes, first_)
                     : _mm512_permutex2var_epi16(first_, codes, second_);
  }

 private:
  I first_, second_;
};

/// The numbers of 64 codes of 8 bits: those of the low 8 bytes of every 128 bits, then the others.
template <Symmetry Kind>
class ByteLookup {
  static constexpr int kParts = Kind == Symmetry::none ? 4 : 2;

 public:
  explicit ByteLookup(const PairTable& table) {
    for (int i = 0; i < kParts; ++i) {
      low_[i] = load_int(table.low + 64 * i);
      high_[i] = load_int(table.high + 64 * i);
    }
  }
  [[gnu::always_inline]] void operator()(I codes, I& first, I& second) const {
    I low, high;
    if constexpr (Kind == Symmetry::none) {
      const __mmask64 upper = _mm512_movepi8_mask(codes);
      low = _mm512_mask_blend_epi8(upper, part(low_, codes), part(low_ + 2, codes));
      high = _mm512_mask_blend_epi8(upper, part(high_, codes), part(high_ + 2, codes));
    } else {
      const I sign = splat_int(0x80808080), others = splat_int(0x7f7f7f7f);
      const bool mirrors = Kind == Symmetry::mirror;
      const I index =
          mirrors ? _mm512_min_epu8(bit_xor(codes, sign), bit_xor(codes, others)) : codes;
      low = part(low_, index);
      // high | (mirrors ? ~codes : codes) & sign
      high = _mm512_ternarylogic_epi32(part(high_, index), codes, sign, mirrors ? 0xf2 : 0xf8);
    }
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }

 private:
  /// By the low 7 bits of each code.
  static I part(const I* table, I codes) {
    return _mm512_permutex2var_epi8(table[0], codes, table[1]);
  }
  I low_[kParts], high_[kParts];
};

template <Coding C>
using Lookup = std::conditional_t<C.bits == 8, ByteLookup<C.symmetry>, WordLookup<C.bits>>;

/// Lists of lanes or bytes for the permutations below: f(i) for each i.
template <typename T, typename Function>
constexpr auto make_list(Function f) {
  struct {
    alignas(64) T at[64 / sizeof(T)];
  } list{};
  for (int i = 0; i < static_cast<int>(64 / sizeof(T)); ++i) list.at[i] = static_cast<T>(f(i));
  return list;
}

inline F pair_dot(I a, I b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

// ---- Columns: out[pair of values][token].

/// Which values make up the pairs, in order. Pairs are codes that a shift brings to the same place
/// of a word's halves: for sizes that divide 16, of one word; for others, of halves of the slab.
template <Coding C>
constexpr auto pair_order() {
  std::array<uint16_t, kSlab> order{};
  constexpr int kShifts = C.bits == 8 ? 1 : 16 / C.bits;
  for (int pair = 0; pair < kSlab / 2; ++pair) {
    int first = 2 * pair, second = 2 * pair + 1;
    if (16 % C.bits == 0 && C.bits != 8) {
      first = pair / kShifts * 2 * kShifts + pair % kShifts;
      second = first + kShifts;
    } else if (C.bits != 8) {
      first = pair;
      second = pair + kSlab / 2;
    }
    order[2 * pair] = static_cast<uint16_t>(value_index<C.halves>(first));
    order[2 * pair + 1] = static_cast<uint16_t>(value_index<C.halves>(second));
  }
  return order;
}

/// 16 bits from each half of the slab's stream of Bits words: unit Index of either, in a lane.
template <int Bits, int Index>
[[gnu::always_inline]] inline I stream_unit(const I* words) {
  constexpr int kLow = Index, kHigh = Bits + Index;
  const I low = words[kLow / 2], high = words[kHigh / 2];
  if constexpr (kLow % 2 == 0 && kHigh % 2 == 1)
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
  if constexpr (kLow % 2 == 1 && kHigh % 2 == 0) return _mm512_shrdi_epi32(low, high, 16);
  if constexpr (kLow % 2 == 0) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, shift_left<16>(high));
  }
  return _mm512_mask_blend_epi16(0xaaaaaaaa, shift_right<16>(low), high);
}

/// 8 16-bit units at the same offset of kWidth rows: each 128 bits of out[u] hold unit 2u of 4
/// rows, then unit 2u + 1 of them.
[[gnu::always_inline]] inline void load_units(const uint8_t* const* row, int64_t offset, I* out) {
  const I a = load_every_fourth<4>(row, offset), b = load_every_fourth<4>(row + 1, offset);
  const I c = load_every_fourth<4>(row + 2, offset), d = load_every_fourth<4>(row + 3, offset);
  const I ab = _mm512_unpacklo_epi16(a, b), cd = _mm512_unpacklo_epi16(c, d);
  const I ab2 = _mm512_unpackhi_epi16(a, b), cd2 = _mm512_unpackhi_epi16(c, d);
  out[0] = _mm512_unpacklo_epi32(ab, cd);
  out[1] = _mm512_unpackhi_epi32(ab, cd);
  out[2] = _mm512_unpacklo_epi32(ab2, cd2);
  out[3] = _mm512_unpackhi_epi32(ab2, cd2);
}

/// Calls sink(pair, numbers of kWidth tokens) for each pair of a slab.
template <Coding C>
class PairColumns {
  static constexpr int kBits = C.bits;

 public:
  explicit PairColumns(const PairTable& table) : lookup_(table) {}

  template <typename Sink>
  [[gnu::always_inline]] void operator()(const uint8_t* const* rows, int64_t offset,
                                         const Sink& sink) const {
    if constexpr (kBits == 8) {
      unroll<2>([&](auto part) KVQ_INLINE {
        I units[4];
        load_units(rows, offset + 16 * part, units);
        unroll<4>([&](auto u) KVQ_INLINE {
          I first, second;
          lookup_(units[u], first, second);
          sink(std::integral_constant<int, 8 * part + 2 * u>{}, first);
          sink(std::integral_constant<int, 8 * part + 2 * u + 1>{}, second);
        });
      });
    } else {
      I words[kBits];
      unroll<(kBits + 3) / 4>([&](auto part) KVQ_INLINE {
        constexpr int kFirst = part * 4, kWords = kBits - kFirst < 4 ? kBits - kFirst : 4;
        load_columns<kWords>(rows, offset + 4 * kFirst, words + kFirst);
      });
      pairs_of(words, sink);
    }
  }

 private:
  template <typename Sink>
  [[gnu::always_inline]] void pairs_of(const I* words, const Sink& sink) const {
    if constexpr (kBits == 16) {
      unroll<16>([&](auto pair) KVQ_INLINE { sink(pair, words[pair]); });
    } else if constexpr (16 % kBits == 0) {
      unroll<16>([&](auto pair) KVQ_INLINE {
        constexpr int kShift = pair % (16 / kBits) * kBits;
        sink(pair, lookup_(_mm512_srli_epi16(words[pair * kBits / 16], kShift)));
      });
    } else {
      I units[kBits + 1];
      unroll<kBits>([&](auto u) KVQ_INLINE { units[u] = stream_unit<kBits, u>(words); });
      units[kBits] = splat_int(0);
      unroll<16>([&](auto pair) KVQ_INLINE {
        constexpr int kUnit = pair * kBits / 16, kShift = pair * kBits % 16;
        sink(pair, lookup_(_mm512_shrdi_epi16(units[kUnit], units[kUnit + 1], kShift)));
      });
    }
  }

  Lookup<C> lookup_;
};

template <Coding C>
void pair_columns(const PairTable& table, const uint8_t* const* rows, int64_t offset,
                  const Ahead& ahead, uint32_t* out) {
  const PairColumns<C> columns(table);
  for (int t = 0; t < kBlockTokens; t += kWidth) {
    ahead.ask(t, kWidth);
    columns(rows + t, offset, [&](int pair, I numbers) KVQ_INLINE {
      _mm512_storeu_si512(out + pair * kBlockTokens + t, numbers);
    });
  }
}

/// scores[m][64] += (q[m] . columns) * scale + q_sum[m] * bias without the way through memory.
/// scale and bias may be null.
template <Coding C, int Rows>
void pair_scores(const PairTable& table, const uint8_t* const* rows, int64_t offset,
                 const Ahead& ahead, const uint32_t* q, const float* scale, const float* bias,
                 const float* q_sum, float* scores) {
  constexpr int kPairs = kSlab / 2, kChains = Rows == 1 ? 8 : Rows == 2 ? 4 : 2;
  const PairColumns<C> columns(table);
  for (int t = 0; t < kBlockTokens; t += kWidth) {
    ahead.ask(t, kWidth);
    F sums[Rows][kChains];
    unroll<Rows * kChains>([&](auto i)
                               KVQ_INLINE { sums[i / kChains][i % kChains] = splat(0.0f); });
    columns(rows + t, offset, [&](auto pair, I numbers) KVQ_INLINE {
      unroll<Rows>([&](auto m) KVQ_INLINE {
        F& x = sums[m][pair % kChains];
        x = pair_dot(numbers, splat_int(q[m * kPairs + pair]), x);
      });
    });
    unroll<Rows>([&](auto m) KVQ_INLINE {
      F product = sums[m][0];
      unroll<kChains - 1>([&](auto c) KVQ_INLINE { product = product + sums[m][c + 1]; });
      F x = load(scores + m * kBlockTokens + t);
      x = scale ? fma(product, load(scale + t), x) : x + product;
      if (bias) x = fma(load(bias + t), splat(q_sum[m]), x);
      store(scores + m * kBlockTokens + t, x);
    });
  }
}

// ---- Rows: out[pair of tokens][value].

/// Which values the lanes of a pair of rows hold.
template <Coding C>
constexpr auto row_order() {
  std::array<uint32_t, kSlab> order{};
  for (int i = 0; i < kSlab; ++i) {
    const int vector = i / 16, part = i % 16 / 4, lane = i % 4;
    if (C.bits == 16) {
      order[i] = part * 8 + vector * 4 + lane;
    } else if (C.bits == 8) {
      order[i] = part % 2 * 16 + part / 2 * 8 + vector * 4 + lane;
    } else {
      order[i] = value_index<C.halves>(2 * (i % 16) + vector);
    }
  }
  return order;
}

/// For codes of up to 6 bits: lane i takes codes 2i and 2i + 1 of both rows, in 16 bits each.
template <int Bits>
struct RowLanes {
  static constexpr int first_bit(int lane) { return 2 * lane * Bits; }
  static constexpr auto kBytes = make_list<uint8_t>([](int i) {
    const int at = first_bit(i / 4) / 8 + i % 2;
    return (at < 4 * Bits ? at : 4 * Bits - 1) + i % 4 / 2 * 64;
  });
  template <int Odd>
  static constexpr auto shifts() {
    return make_list<uint16_t>([](int i) { return first_bit(i / 2) % 8 + Odd * Bits; });
  }
  template <int Odd>
  static I codes(I lanes) {
    if constexpr (Bits == 4) return Odd ? _mm512_srli_epi16(lanes, 4) : lanes;
    static constexpr auto kShifts = shifts<Odd>();
    return _mm512_srlv_epi16(lanes, load_int(kShifts.at));
  }
};

/// A row's slab, no byte beyond it.
template <int Bits>
inline I load_slab(const uint8_t* p) {
  if constexpr (Bits == 16) {
    return load_int(p);
  } else if constexpr (Bits == 8) {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  } else if constexpr (Bits == 4) {
    return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else {
    return _mm512_castsi256_si512(_mm256_maskz_loadu_epi8((1u << 4 * Bits) - 1, p));
  }
}

/// Two rows' slabs to the 32 values' pairs, in row_order.
template <Coding C>
class PairRows {
 public:
  explicit PairRows(const PairTable& table) : lookup_(table) {}

  [[gnu::always_inline]] void operator()(const uint8_t* row, const uint8_t* next_row, I& low,
                                         I& high) const {
    const I first = load_slab<C.bits>(row), second = load_slab<C.bits>(next_row);
    if constexpr (C.bits == 16) {
      low = _mm512_unpacklo_epi16(first, second);
      high = _mm512_unpackhi_epi16(first, second);
    } else if constexpr (C.bits == 8) {
      const __m256i a = _mm512_castsi512_si256(first), b = _mm512_castsi512_si256(second);
      const I bytes = _mm512_castsi256_si512(_mm256_unpacklo_epi8(a, b));
      lookup_(_mm512_inserti64x4(bytes, _mm256_unpackhi_epi8(a, b), 1), low, high);
    } else {
      using Lanes = RowLanes<C.bits>;
      const I lanes = _mm512_permutex2var_epi8(first, load_int(Lanes::kBytes.at), second);
      low = lookup_(Lanes::template codes<0>(lanes));
      high = lookup_(Lanes::template codes<1>(lanes));
    }
  }

 private:
  Lookup<C> lookup_;
};

/// tokens must be a multiple of 2 (pair_sums: of 8); rows has as many.
template <Coding C>
void pair_rows(const PairTable& table, const uint8_t* const* rows, int64_t offset, int tokens,
               const Ahead& ahead, uint32_t* out) {
  const PairRows<C> pairs(table);
  for (int t = 0; t < tokens; t += 2, out += kSlab) {
    ahead.ask(t, 2);
    I low, high;
    pairs(rows[t] + offset, rows[t + 1] + offset, low, high);
    _mm512_storeu_si512(out, low);
    _mm512_storeu_si512(out + kWidth, high);
  }
}

/// sums[m][32] += weights[m] . values without the way through memory.
template <Coding C, int Rows>
void pair_sums(const PairTable& table, const uint8_t* const* rows, int64_t offset, int tokens,
               const Ahead& ahead, const uint32_t* weights, float* sums) {
  // Few rows are few sums, which would wait for each other: take tokens apart.
  constexpr int kPairs = 4, kChains = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  const PairRows<C> pairs(table);
  F acc[kChains][Rows][2];
  unroll<kChains * Rows * 2>([&](auto i) KVQ_INLINE {
    constexpr int kRow = i / 2 % Rows, kVector = i % 2;
    acc[i / 2 / Rows][kRow][kVector] =
        i / 2 < Rows ? load(sums + kRow * kSlab + kVector * kWidth) : splat(0.0f);
  });
  for (int64_t t = 0; t < tokens; t += 2 * kPairs) {
    ahead.ask(t, 2 * kPairs);
    unroll<kPairs>([&](auto pair) KVQ_INLINE {
      I low, high;
      pairs(rows[t + 2 * pair] + offset, rows[t + 2 * pair + 1] + offset, low, high);
      unroll<Rows>([&](auto m) KVQ_INLINE {
        const I weight = splat_int(weights[m * kBlockTokens / 2 + t / 2 + pair]);
        F(&sum)[2] = acc[pair % kChains][m];
        sum[0] = pair_dot(low, weight, sum[0]);
        sum[1] = pair_dot(high, weight, sum[1]);
      });
    });
  }
  unroll<Rows * 2>([&](auto i) KVQ_INLINE {
    constexpr int kRow = i / 2, kVector = i % 2;
    F x = acc[0][kRow][kVector];
    unroll<kChains - 1>([&](auto c) KVQ_INLINE { x = x + acc[c + 1][kRow][kVector]; });
    store(sums + kRow * kSlab + kVector * kWidth, x);
  });
}

// ---- What attention_side.h sees.

class PairUnpacker {
 public:
  using Element = uint32_t;

  explicit PairUnpacker(const Layout& layout) { choose(layout); }

  /// Whether this layout's numbers are bfloat16 numbers, or codes that a table makes into them.
  static bool holds(const Layout& layout) {
    return layout.family != KVQ_FAMILY_NONE || layout.codes_dtype == KVQ_BFLOAT16;
  }

  int slab_bytes() const { return slab_bytes_; }
  int slab_stride() const { return slab_bytes_ + header_; }
  int64_t offset(int64_t slab) const { return header_ + slab * slab_stride(); }

  /// 32 bfloat16 numbers of a query in the order of columns' pairs.
  void arrange(I query, uint32_t* out) const {
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(load_int(order_), query));
  }
  void columns(const uint8_t* const* rows, int64_t offset, const Ahead& ahead,
               uint32_t* out) const {
    columns_(*table_, rows, offset, ahead, out);
  }
  /// Tokens up to padded_tokens(tokens) are unpacked too.
  void rows(const uint8_t* const* rows, int64_t offset, int tokens, const Ahead& ahead,
            uint32_t* out) const {
    rows_(*table_, rows, offset, padded_tokens(tokens), ahead, out);
  }
  static constexpr int padded_tokens(int tokens) { return (tokens + 7) & ~7; }
  /// Puts 32 sums of rows in the order of values.
  void restore(float* sums) const {
    const F low = load(sums), high = load(sums + kWidth);
    store(sums, _mm512_permutex2var_ps(low, load_int(places_), high));
    store(sums + kWidth, _mm512_permutex2var_ps(low, load_int(places_ + kWidth), high));
  }

  /// What an affine code stands for is the code minus this.
  static constexpr float centre(int bits) { return ((1 << bits) - 1) * 0.5f; }
  /// What scales are to be multiplied by.
  float unit() const { return table_->unit; }

  /// Whether scores and sums are there for this many query rows.
  static bool fuses(int64_t rows) { return rows <= 8 && (rows & (rows - 1)) == 0; }
  /// As pair_scores and pair_sums.
  void scores(int64_t query_rows, const uint8_t* const* rows, int64_t offset, const Ahead& ahead,
              const uint32_t* q, const float* scale, const float* bias, const float* q_sum,
              float* scores) const {
    scores_[log2(query_rows)](*table_, rows, offset, ahead, q, scale, bias, q_sum, scores);
  }
  void sums(int64_t query_rows, const uint8_t* const* rows, int64_t offset, int tokens,
            const Ahead& ahead, const uint32_t* weights, float* sums) const {
    sums_[log2(query_rows)](*table_, rows, offset, padded_tokens(tokens), ahead, weights, sums);
  }

 private:
  static int log2(int64_t rows) { return rows == 8 ? 3 : static_cast<int>(rows / 2); }

  void choose(const Layout& layout) {
    constexpr Symmetry kSign = Symmetry::sign, kMirror = Symmetry::mirror;
    switch (layout.family) {
      case KVQ_FAMILY_AFFINE:
        if (layout.bits == 8) return set<Coding{8, false, kMirror}, KVQ_FAMILY_AFFINE>();
        if (layout.bits == 4) return set<Coding{4}, KVQ_FAMILY_AFFINE>();
        return set<Coding{2}, KVQ_FAMILY_AFFINE>();
      case KVQ_FAMILY_FP8_E4M3:
        return set<Coding{8, false, kSign}, KVQ_FAMILY_FP8_E4M3>();
      case KVQ_FAMILY_FP8_E5M2:
        return set<Coding{8, false, kSign}, KVQ_FAMILY_FP8_E5M2>();
      case KVQ_FAMILY_Q8_0:
        return set<Coding{8}, KVQ_FAMILY_Q8_0>(2);
      case KVQ_FAMILY_Q4_0:
        return set<Coding{4, true}, KVQ_FAMILY_Q4_0>(2);
      case KVQ_FAMILY_TURBOQUANT:
        switch (layout.bits) {
          case 2:
            return set<Coding{2}, KVQ_FAMILY_TURBOQUANT>();
          case 3:
            return set<Coding{3}, KVQ_FAMILY_TURBOQUANT>();
          case 4:
            return set<Coding{4}, KVQ_FAMILY_TURBOQUANT>();
          case 5:
            return set<Coding{5}, KVQ_FAMILY_TURBOQUANT>();
          case 6:
            return set<Coding{6}, KVQ_FAMILY_TURBOQUANT>();
          default:
            return set<Coding{8, false, kMirror}, KVQ_FAMILY_TURBOQUANT>();
        }
      case KVQ_FAMILY_NONE:
        return set<Coding{16}, KVQ_FAMILY_NONE>();
    }
  }

  template <Coding C, KvqFamily Family>
  void set(int header = 0) {
    static constexpr auto kOrder = pair_order<C>();
    static constexpr auto kPlaces = [] {
      std::array<uint32_t, kSlab> places{};
      for (int i = 0; i < kSlab; ++i) places[row_order<C>()[i]] = i;
      return places;
    }();
    // Numbers of 16 bits are not looked up, in any table.
    constexpr int kTableBits = C.bits == 16 ? 2 : C.bits;
    table_ = &pair_table<Family, kTableBits>(C.symmetry);
    columns_ = pair_columns<C>;
    rows_ = pair_rows<C>;
    unroll<4>([&](auto i) KVQ_INLINE {
      scores_[i] = pair_scores<C, 1 << i>;
      sums_[i] = pair_sums<C, 1 << i>;
    });
    order_ = kOrder.data();
    places_ = kPlaces.data();
    slab_bytes_ = 4 * C.bits;
    header_ = header;
  }

  const PairTable* table_;
  void (*columns_)(const PairTable&, const uint8_t* const*, int64_t, const Ahead&, uint32_t*);
  void (*rows_)(const PairTable&, const uint8_t* const*, int64_t, int, const Ahead&, uint32_t*);
  decltype(&pair_scores<Coding{4}, 1>) scores_[4];  ///< for 1, 2, 4, 8 query rows
  decltype(&pair_sums<Coding{4}, 1>) sums_[4];      ///< likewise
  const uint16_t* order_;
  const uint32_t* places_;
  int slab_bytes_;  ///< codes of 32 values
  int header_;      ///< bytes before them (a GGUF block's scale)
};

}  // namespace kvq::cpu::KVQ_ISA
#endif
