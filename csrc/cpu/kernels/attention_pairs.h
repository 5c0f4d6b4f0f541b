// Packed rows to bfloat16 for the processor's dot products of pairs (vdpbf16ps): a 32-bit lane
// holds two numbers that are multiplied and added together. For columns they are two values of a
// token, for rows a value of two tokens. What a code stands for comes from a table, so there is one
// unpacker per code size and order. Exact but for codebooks, which round as a bfloat16 cache would.
#pragma once

#include "attention_unpack.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
#define KVQ_BFLOAT_PAIRS 1

#include <array>

namespace kvq::cpu::KVQ_ISA {

/// The bfloat16 numbers of all codes. Codes of up to 6 bits index `word` with whatever bits are
/// above them, so it repeats; codes of 8 bits look up the bytes of their number one by one.
struct PairTable {
  alignas(64) uint16_t word[64];
  alignas(64) uint8_t low[256], high[256];
};

template <KvqFamily Family, int Bits>
const PairTable& pair_table() {
  static const PairTable table = [] {
    const auto value = [](int code) -> float {
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
          return codebook(Bits)[code];
        default:
          return static_cast<float>(code) - affine_centre(Bits);
      }
    };
    PairTable made{};
    for (int i = 0; i < 256; ++i) {
      const uint16_t number = float_to_bfloat(value(i % (1 << Bits)));
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

/// One byte of the numbers of 64 codes of 8 bits.
class ByteLookup {
 public:
  explicit ByteLookup(const uint8_t* table) {
    for (int i = 0; i < 4; ++i) part_[i] = load_int(table + 64 * i);
  }
  I operator()(I codes, __mmask64 upper) const {
    return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part_[0], codes, part_[1]),
                                  _mm512_permutex2var_epi8(part_[2], codes, part_[3]));
  }

 private:
  I part_[4];
};

/// Lists of lanes or bytes for the permutations below: f(i) for each i.
template <typename T, typename Function>
constexpr auto make_list(Function f) {
  struct {
    alignas(64) T at[64 / sizeof(T)];
  } list{};
  for (int i = 0; i < static_cast<int>(64 / sizeof(T)); ++i) list.at[i] = static_cast<T>(f(i));
  return list;
}

/// Numbers of 64 codes of 8 bits, two vectors. From::code(i) says which code number i is.
template <typename From>
class ByteNumbers {
 public:
  explicit ByteNumbers(const PairTable& table) : low_(table.low), high_(table.high) {}
  void operator()(I codes, I& first, I& second) const {
    static constexpr auto kFirst = make_list<uint8_t>([](int i) { return pick(i / 2, i % 2); });
    static constexpr auto kSecond =
        make_list<uint8_t>([](int i) { return pick(32 + i / 2, i % 2); });
    const __mmask64 upper = _mm512_movepi8_mask(codes);
    const I low = low_(codes, upper), high = high_(codes, upper);
    first = _mm512_permutex2var_epi8(low, load_int(kFirst.at), high);
    second = _mm512_permutex2var_epi8(low, load_int(kSecond.at), high);
  }

 private:
  static constexpr int pick(int number, int byte) { return From::code(number) + 64 * byte; }
  ByteLookup low_, high_;
};

inline F pair_dot(I a, I b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

// ---- Columns: out[pair of values][token].

/// Which values make up the pairs, in order. Pairs are codes that a shift brings to the same place
/// of a word's halves: for sizes that divide 16, of one word; for others, of halves of the slab.
template <int Bits, bool Halves>
constexpr auto pair_order() {
  std::array<uint16_t, kSlab> order{};
  constexpr int kShifts = Bits == 8 ? 1 : 16 / Bits;
  for (int pair = 0; pair < kSlab / 2; ++pair) {
    int first = 2 * pair, second = 2 * pair + 1;
    if (16 % Bits == 0 && Bits != 8) {
      first = pair / kShifts * 2 * kShifts + pair % kShifts;
      second = first + kShifts;
    } else if (Bits != 8) {
      first = pair;
      second = pair + kSlab / 2;
    }
    order[2 * pair] = static_cast<uint16_t>(value_index<Halves>(first));
    order[2 * pair + 1] = static_cast<uint16_t>(value_index<Halves>(second));
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

struct ColumnBytes {
  /// Bytes are [token][4 values]; results [2 values][token].
  static constexpr int code(int number) {
    return number % 32 / 2 * 4 + number / 32 * 2 + number % 2;
  }
};

/// Calls sink(pair, numbers of kWidth tokens) for each pair of a slab.
template <int Bits>
class PairColumns {
 public:
  explicit PairColumns(const PairTable& table) : numbers_(table) {}

  template <typename Sink>
  [[gnu::always_inline]] void operator()(const uint8_t* const* rows, int64_t offset,
                                         const Sink& sink) const {
    I words[Bits];
    unroll<(Bits + 3) / 4>([&](auto chunk) {
      constexpr int kFirst = chunk * 4, kWords = Bits - kFirst < 4 ? Bits - kFirst : 4;
      load_columns<kWords>(rows, offset + 4 * kFirst, words + kFirst);
    });
    if constexpr (Bits == 16) {
      unroll<16>([&](auto pair) { sink(pair, words[pair]); });
    } else if constexpr (Bits == 8) {
      unroll<8>([&](auto w) {
        I first, second;
        numbers_(words[w], first, second);
        sink(std::integral_constant<int, 2 * w>{}, first);
        sink(std::integral_constant<int, 2 * w + 1>{}, second);
      });
    } else if constexpr (16 % Bits == 0) {
      unroll<16>([&](auto pair) {
        constexpr int kShift = pair % (16 / Bits) * Bits;
        sink(pair, numbers_(_mm512_srli_epi16(words[pair * Bits / 16], kShift)));
      });
    } else {
      I units[Bits + 1];
      unroll<Bits>([&](auto u) { units[u] = stream_unit<Bits, u>(words); });
      units[Bits] = splat_int(0);
      unroll<16>([&](auto pair) {
        constexpr int kUnit = pair * Bits / 16, kShift = pair * Bits % 16;
        sink(pair, numbers_(_mm512_shrdi_epi16(units[kUnit], units[kUnit + 1], kShift)));
      });
    }
  }

 private:
  std::conditional_t<Bits == 8, ByteNumbers<ColumnBytes>, WordLookup<Bits>> numbers_;
};

template <int Bits>
void pair_columns(const PairTable& table, const uint8_t* const* rows, int64_t offset,
                  const Ahead& ahead, uint32_t* out) {
  const PairColumns<Bits> columns(table);
  for (int t = 0; t < kBlockTokens; t += kWidth) {
    ahead.ask(t, kWidth);
    columns(rows + t, offset, [&](int pair, I numbers) {
      _mm512_storeu_si512(out + pair * kBlockTokens + t, numbers);
    });
  }
}

/// scores[m][64] += (q[m] . columns) * scale + q_sum[m] * bias without the way through memory.
/// scale and bias may be null.
template <int Bits, int Rows>
void pair_scores(const PairTable& table, const uint8_t* const* rows, int64_t offset,
                 const Ahead& ahead, const uint32_t* q, const float* scale, const float* bias,
                 const float* q_sum, float* scores) {
  constexpr int kPairs = kSlab / 2, kChains = Rows == 1 ? 8 : Rows == 2 ? 4 : 2;
  const PairColumns<Bits> columns(table);
  for (int t = 0; t < kBlockTokens; t += kWidth) {
    ahead.ask(t, kWidth);
    F sums[Rows][kChains];
    unroll<Rows * kChains>([&](auto i) { sums[i / kChains][i % kChains] = splat(0.0f); });
    columns(rows + t, offset, [&](auto pair, I numbers) {
      unroll<Rows>([&](auto m) {
        F& x = sums[m][pair % kChains];
        x = pair_dot(numbers, splat_int(q[m * kPairs + pair]), x);
      });
    });
    unroll<Rows>([&](auto m) {
      F product = sums[m][0];
      unroll<kChains - 1>([&](auto c) { product = product + sums[m][c + 1]; });
      F x = load(scores + m * kBlockTokens + t);
      x = scale ? fma(product, load(scale + t), x) : x + product;
      if (bias) x = fma(load(bias + t), splat(q_sum[m]), x);
      store(scores + m * kBlockTokens + t, x);
    });
  }
}

// ---- Rows: out[pair of tokens][value].

/// Bytes of two rows' slabs, and the places of their codes in them, for lanes [16 * Half, + 16) of
/// the pair's 32: a qword of the result has two values of either token.
template <int Bits, bool Halves>
struct RowBytes {
  static constexpr int code(int value) {
    if (!Halves) return value;
    return value < kSlab / 2 ? 2 * value : 2 * (value - kSlab / 2) + 1;
  }
  /// Number i of half h is value h * 16 + i / 2 of token i % 2.
  static constexpr int first_bit(int half, int i) { return code(half * 16 + i / 2) * Bits; }

  template <int Half>
  static constexpr auto bytes() {
    return make_list<uint8_t>([](int byte) {
      const int i = byte / 2, at = first_bit(Half, i) / 8 + byte % 2;
      return (at < 4 * Bits ? at : 4 * Bits - 1) + i % 2 * 64;
    });
  }
  template <int Half>
  static constexpr auto shifts() {
    return make_list<uint8_t>(
        [](int byte) { return byte / 2 % 4 * 16 + first_bit(Half, byte / 2) % 8; });
  }
};

struct TokenBytes {
  /// Bytes are [2 tokens][32 values]; results [value][2 tokens].
  static constexpr int code(int number) { return number / 2 + number % 2 * 32; }
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

/// Two rows' slabs to the 32 values' pairs.
template <int Bits, bool Halves>
class PairRows {
 public:
  explicit PairRows(const PairTable& table) : numbers_(table) {}

  [[gnu::always_inline]] void operator()(const uint8_t* row, const uint8_t* next_row, I& low,
                                         I& high) const {
    const I first = load_slab<Bits>(row), second = load_slab<Bits>(next_row);
    if constexpr (Bits == 16) {
      static constexpr auto kLow = make_list<uint16_t>([](int i) { return i / 2 + i % 2 * 32; });
      static constexpr auto kHigh =
          make_list<uint16_t>([](int i) { return 16 + i / 2 + i % 2 * 32; });
      low = _mm512_permutex2var_epi16(first, load_int(kLow.at), second);
      high = _mm512_permutex2var_epi16(first, load_int(kHigh.at), second);
    } else if constexpr (Bits == 8) {
      numbers_(_mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1), low, high);
    } else {
      low = half<0>(first, second);
      high = half<1>(first, second);
    }
  }

 private:
  template <int Half>
  I half(I first, I second) const {
    static constexpr auto kBytes = RowBytes<Bits, Halves>::template bytes<Half>();
    static constexpr auto kShifts = RowBytes<Bits, Halves>::template shifts<Half>();
    const I bytes = _mm512_permutex2var_epi8(first, load_int(kBytes.at), second);
    return numbers_(_mm512_multishift_epi64_epi8(load_int(kShifts.at), bytes));
  }

  std::conditional_t<Bits == 8, ByteNumbers<TokenBytes>, WordLookup<Bits>> numbers_;
};

/// tokens must be a multiple of 2 (pair_sums: of 8); rows has as many.
template <int Bits, bool Halves>
void pair_rows(const PairTable& table, const uint8_t* const* rows, int64_t offset, int tokens,
               const Ahead& ahead, uint32_t* out) {
  const PairRows<Bits, Halves> pairs(table);
  for (int t = 0; t < tokens; t += 2, out += kSlab) {
    ahead.ask(t, 2);
    I low, high;
    pairs(rows[t] + offset, rows[t + 1] + offset, low, high);
    _mm512_storeu_si512(out, low);
    _mm512_storeu_si512(out + kWidth, high);
  }
}

/// sums[m][32] += weights[m] . values without the way through memory.
template <int Bits, bool Halves, int Rows>
void pair_sums(const PairTable& table, const uint8_t* const* rows, int64_t offset, int tokens,
               const Ahead& ahead, const uint32_t* weights, float* sums) {
  // Few rows are few sums, which would wait for each other: take tokens apart.
  constexpr int kPairs = 4, kChains = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  const PairRows<Bits, Halves> pairs(table);
  F acc[kChains][Rows][2];
  unroll<kChains * Rows * 2>([&](auto i) {
    constexpr int kRow = i / 2 % Rows, kVector = i % 2;
    acc[i / 2 / Rows][kRow][kVector] =
        i / 2 < Rows ? load(sums + kRow * kSlab + kVector * kWidth) : splat(0.0f);
  });
  for (int64_t t = 0; t < tokens; t += 2 * kPairs) {
    ahead.ask(t, 2 * kPairs);
    unroll<kPairs>([&](auto pair) {
      I low, high;
      pairs(rows[t + 2 * pair] + offset, rows[t + 2 * pair + 1] + offset, low, high);
      unroll<Rows>([&](auto m) {
        const I weight = splat_int(weights[m * kBlockTokens / 2 + t / 2 + pair]);
        F(&sum)[2] = acc[pair % kChains][m];
        sum[0] = pair_dot(low, weight, sum[0]);
        sum[1] = pair_dot(high, weight, sum[1]);
      });
    });
  }
  unroll<Rows * 2>([&](auto i) {
    constexpr int kRow = i / 2, kVector = i % 2;
    F x = acc[0][kRow][kVector];
    unroll<kChains - 1>([&](auto c) { x = x + acc[c + 1][kRow][kVector]; });
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
    switch (layout.family) {
      case KVQ_FAMILY_AFFINE:
        if (layout.bits == 8) return set<8>(pair_table<KVQ_FAMILY_AFFINE, 8>());
        if (layout.bits == 4) return set<4>(pair_table<KVQ_FAMILY_AFFINE, 4>());
        return set<2>(pair_table<KVQ_FAMILY_AFFINE, 2>());
      case KVQ_FAMILY_FP8_E4M3:
        return set<8>(pair_table<KVQ_FAMILY_FP8_E4M3, 8>());
      case KVQ_FAMILY_FP8_E5M2:
        return set<8>(pair_table<KVQ_FAMILY_FP8_E5M2, 8>());
      case KVQ_FAMILY_Q8_0:
        return set<8>(pair_table<KVQ_FAMILY_Q8_0, 8>(), 2);
      case KVQ_FAMILY_Q4_0:
        return set<4, true>(pair_table<KVQ_FAMILY_Q4_0, 4>(), 2);
      case KVQ_FAMILY_TURBOQUANT:
        switch (layout.bits) {
          case 2:
            return set<2>(pair_table<KVQ_FAMILY_TURBOQUANT, 2>());
          case 3:
            return set<3>(pair_table<KVQ_FAMILY_TURBOQUANT, 3>());
          case 4:
            return set<4>(pair_table<KVQ_FAMILY_TURBOQUANT, 4>());
          case 5:
            return set<5>(pair_table<KVQ_FAMILY_TURBOQUANT, 5>());
          case 6:
            return set<6>(pair_table<KVQ_FAMILY_TURBOQUANT, 6>());
          default:
            return set<8>(pair_table<KVQ_FAMILY_TURBOQUANT, 8>());
        }
      case KVQ_FAMILY_NONE:
        return set<16>(pair_table<KVQ_FAMILY_AFFINE, 2>());  // not looked at
    }
  }

  template <int Bits, bool Halves = false>
  void set(const PairTable& table, int header = 0) {
    static constexpr auto kOrder = pair_order<Bits, Halves>();
    table_ = &table;
    columns_ = pair_columns<Bits>;
    rows_ = pair_rows<Bits, Halves>;
    unroll<4>([&](auto i) {
      scores_[i] = pair_scores<Bits, 1 << i>;
      sums_[i] = pair_sums<Bits, Halves, 1 << i>;
    });
    order_ = kOrder.data();
    slab_bytes_ = 4 * Bits;
    header_ = header;
  }

  const PairTable* table_;
  void (*columns_)(const PairTable&, const uint8_t* const*, int64_t, const Ahead&, uint32_t*);
  void (*rows_)(const PairTable&, const uint8_t* const*, int64_t, int, const Ahead&, uint32_t*);
  decltype(&pair_scores<4, 1>) scores_[4];     ///< for 1, 2, 4, 8 query rows
  decltype(&pair_sums<4, false, 1>) sums_[4];  ///< likewise
  const uint16_t* order_;
  int slab_bytes_;  ///< codes of 32 values
  int header_;      ///< bytes before them (a GGUF block's scale)
};

}  // namespace kvq::cpu::KVQ_ISA
#endif
