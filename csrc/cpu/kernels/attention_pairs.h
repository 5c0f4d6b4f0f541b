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

/// Numbers of 64 codes of 8 bits, two vectors. From[i] says which code number i of the result is.
template <typename From>
class ByteNumbers {
 public:
  explicit ByteNumbers(const PairTable& table) : low_(table.low), high_(table.high) {}
  void operator()(I codes, uint32_t* first, uint32_t* second) const {
    static constexpr auto kFirst = make_list<uint8_t>([](int i) { return pick(i / 2, i % 2); });
    static constexpr auto kSecond =
        make_list<uint8_t>([](int i) { return pick(32 + i / 2, i % 2); });
    const __mmask64 upper = _mm512_movepi8_mask(codes);
    const I low = low_(codes, upper), high = high_(codes, upper);
    _mm512_storeu_si512(first, _mm512_permutex2var_epi8(low, load_int(kFirst.at), high));
    _mm512_storeu_si512(second, _mm512_permutex2var_epi8(low, load_int(kSecond.at), high));
  }

 private:
  static constexpr int pick(int number, int byte) { return From::code(number) + 64 * byte; }
  ByteLookup low_, high_;
};

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

template <int Bits>
void pair_columns(const PairTable& table, const uint8_t* const* rows, int64_t offset,
                  const Ahead& ahead, uint32_t* out) {
  for (int t = 0; t < kBlockTokens; t += kWidth) {
    for (int i = 0; ahead.from && i < kWidth; i += ahead.every) ahead.ask(t + i);
    I words[Bits];
    unroll<(Bits + 3) / 4>([&](auto chunk) {
      constexpr int kFirst = chunk * 4, kWords = Bits - kFirst < 4 ? Bits - kFirst : 4;
      load_columns<kWords>(rows + t, offset + 4 * kFirst, words + kFirst);
    });
    uint32_t* to = out + t;
    const auto put = [&](I numbers) {
      _mm512_storeu_si512(to, numbers);
      to += kBlockTokens;
    };
    if constexpr (Bits == 16) {
      for (const I& word : words) put(word);
    } else if constexpr (Bits == 8) {
      const ByteNumbers<ColumnBytes> numbers(table);
      for (int w = 0; w < 8; ++w, to += 2 * kBlockTokens) numbers(words[w], to, to + kBlockTokens);
    } else if constexpr (16 % Bits == 0) {
      const WordLookup<Bits> lookup(table);
      unroll<Bits>([&](auto w) {
        unroll<16 / Bits>([&](auto s) { put(lookup(_mm512_srli_epi16(words[w], s * Bits))); });
      });
    } else {
      const WordLookup<Bits> lookup(table);
      I units[Bits + 1];
      unroll<Bits>([&](auto u) { units[u] = stream_unit<Bits, u>(words); });
      units[Bits] = splat_int(0);
      unroll<16>([&](auto code) {
        constexpr int kUnit = code * Bits / 16, kShift = code * Bits % 16;
        put(lookup(_mm512_shrdi_epi16(units[kUnit], units[kUnit + 1], kShift)));
      });
    }
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

/// tokens must be even; rows has as many.
template <int Bits, bool Halves = false>
void pair_rows(const PairTable& table, const uint8_t* const* rows, int64_t offset, int tokens,
               const Ahead& ahead, uint32_t* out) {
  int asked = ahead.from ? 0 : tokens;
  for (int t = 0; t < tokens; t += 2, out += kSlab) {
    for (; asked < t + 2 && asked < tokens; asked += ahead.every) ahead.ask(asked);
    const I first = load_slab<Bits>(rows[t] + offset);
    const I second = load_slab<Bits>(rows[t + 1] + offset);
    if constexpr (Bits == 16) {
      static constexpr auto kLow = make_list<uint16_t>([](int i) { return i / 2 + i % 2 * 32; });
      static constexpr auto kHigh =
          make_list<uint16_t>([](int i) { return 16 + i / 2 + i % 2 * 32; });
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, load_int(kLow.at), second));
      _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(first, load_int(kHigh.at), second));
    } else if constexpr (Bits == 8) {
      const ByteNumbers<TokenBytes> numbers(table);
      const I both = _mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1);
      numbers(both, out, out + 16);
    } else {
      using Bytes = RowBytes<Bits, Halves>;
      const WordLookup<Bits> lookup(table);
      unroll<2>([&](auto half) {
        static constexpr auto kBytes = Bytes::template bytes<half>();
        static constexpr auto kShifts = Bytes::template shifts<half>();
        const I bytes = _mm512_permutex2var_epi8(first, load_int(kBytes.at), second);
        const I codes = _mm512_multishift_epi64_epi8(load_int(kShifts.at), bytes);
        _mm512_storeu_si512(out + 16 * half, lookup(codes));
      });
    }
  }
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

 private:
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
    order_ = kOrder.data();
    slab_bytes_ = 4 * Bits;
    header_ = header;
  }

  const PairTable* table_;
  void (*columns_)(const PairTable&, const uint8_t* const*, int64_t, const Ahead&, uint32_t*);
  void (*rows_)(const PairTable&, const uint8_t* const*, int64_t, int, const Ahead&, uint32_t*);
  const uint16_t* order_;
  int slab_bytes_;  ///< codes of 32 values
  int header_;      ///< bytes before them (a GGUF block's scale)
};

}  // namespace kvq::cpu::KVQ_ISA
#endif
