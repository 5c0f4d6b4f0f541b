// Packed rows to floats, 32 values ("a slab") of up to 64 tokens at a time. Two orders: columns
// (token in the lane, for scores) and rows (value in the lane, for sums of values). Scales and
// biases are not applied here: what comes out is the bare code, codebook entry or number.
//
// Every format but q4_0 stores codes of Bits bits as one stream, least significant bit first, so
// there is one unpacker per order; a Map turns a code into a float.
#pragma once

#include "fp8.h"
#include "kernels.h"
#include "simd.h"
#include "turboquant.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kBlockTokens = 64;

// ---- Maps: F operator()(I x).

/// Where in a 32-bit lane a map wants the code.
enum class Place {
  low,    ///< in the low bits, anything above
  clean,  ///< in the low bits, zeros above
  top,    ///< in the high bits, anything below
};

/// The code itself, minus half of Twice.
template <int Bits, int Twice>
struct Integer {
#if defined(__AVX512F__)
  static_assert(Bits <= 4);
  static constexpr Place kPlace = Place::low;
  F entries;
  Integer() {
    float table[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      table[i] = static_cast<float>(i % (1 << Bits)) - Twice * 0.5f;
    }
    entries = load(table);
  }
  F operator()(I x) const { return permute(entries, x); }
#else
  static constexpr Place kPlace = Place::clean;
  F operator()(I x) const { return to_float(x) - splat(Twice * 0.5f); }
#endif
};

/// Two's complement bytes, after every byte was xored with Flip: 0x80 makes an unsigned byte minus
/// 128 of it.
template <uint8_t Flip>
struct SignedByte {
  static constexpr Place kPlace = Place::top;
  static constexpr uint8_t kFlip = Flip;
  F operator()(I x) const { return to_float(shift_right_signed<24>(x)); }
};

/// An 8-bit float's bits moved into a float32's fields; the product repairs the exponent, of
/// subnormals too. NaN and infinity: see repair_fp8.
template <typename Format>
struct Fp8 {
  static constexpr Place kPlace = Place::top;
  static constexpr int kExponentBits = 7 - Format::kMantissa;
  static constexpr uint32_t kFields = 0x80000000u | (0x7fu << (23 - Format::kMantissa));
  F operator()(I x) const {
    const I moved = shift_right_signed<8 - kExponentBits>(x);
    const uint32_t power = uint32_t(127 + 127 - Format::kBias) << 23;
    return as_float(bit_and(moved, splat_int(kFields))) * splat(float_of(power));
  }
};

template <int Bits>
struct Codebook {
#if defined(__AVX512F__)
  static constexpr int kEntries = 1 << Bits, kVectors = (kEntries + 15) / 16;
  static constexpr Place kPlace = Bits == 8 ? Place::clean : Place::low;
  F entries[kVectors < 4 ? kVectors : 4];
  Codebook() {
    for (int v = 0; v < (kVectors < 4 ? kVectors : 4); ++v) {
      float table[16];
      for (int i = 0; i < 16; ++i) table[i] = kvq_codebook(Bits)[(v * 16 + i) % kEntries];
      entries[v] = load(table);
    }
  }
  F operator()(I x) const {
    if constexpr (Bits <= 4) return permute(entries[0], x);
    if constexpr (Bits == 5) return permute(entries[0], entries[1], x);
    if constexpr (Bits == 6) return permute(entries[0], entries[1], entries[2], entries[3], x);
    return gather(kvq_codebook(Bits), x);
  }
#elif defined(__AVX2__)
  static constexpr Place kPlace = Bits > 4 ? Place::clean : Place::low;
  F low = load_entries(0), high = load_entries(8);
  static F load_entries(int first) {
    float table[8];
    for (int i = 0; i < 8; ++i) table[i] = kvq_codebook(Bits)[(first + i) % (1 << Bits)];
    return load(table);
  }
  F operator()(I x) const {
    if constexpr (Bits <= 3) return permute(low, x);
    if constexpr (Bits == 4) {
      return _mm256_blendv_ps(permute(low, x), permute(high, x), as_float(shift_left<28>(x)));
    }
    return gather(kvq_codebook(Bits), x);
  }
#elif defined(__aarch64__)
  static constexpr Place kPlace = Place::clean;
  F operator()(I x) const {
    if constexpr (Bits > 6) return gather(kvq_codebook(Bits), x);
    // Byte look-up: the four bytes of entry i are bytes 4i .. 4i + 3 of the table.
    const auto* bytes = reinterpret_cast<const uint8_t*>(kvq_codebook(Bits));
    const U index = U(x) * 0x04040404u + 0x03020100u;
    uint8x16_t lookup = uint8x16_t(index), y = vdupq_n_u8(0);
    constexpr int kBytes = 4 << Bits;
    if constexpr (kBytes == 16) {
      y = vqtbl1q_u8(vld1q_u8(bytes), lookup);
    } else if constexpr (kBytes == 32) {
      y = vqtbl2q_u8(vld1q_u8_x2(bytes), lookup);
    } else {
      for (int i = 0; i < kBytes / 64; ++i) {
        y = vqtbx4q_u8(y, vld1q_u8_x4(bytes + 64 * i), lookup);
        lookup = vsubq_u8(lookup, vdupq_n_u8(64));
      }
    }
    return F(y);
  }
#else
  static constexpr Place kPlace = Place::clean;
  F operator()(I x) const { return gather(kvq_codebook(Bits), x); }
#endif
};

struct Half {
  static constexpr Place kPlace = Place::clean;
  F operator()(I x) const { return half_lanes(x); }
};
struct Bfloat {
  static constexpr Place kPlace = Place::top;
  F operator()(I x) const { return as_float(bit_and(x, splat_int(0xffff0000u))); }
};
struct Single {
  static constexpr Place kPlace = Place::top;
  F operator()(I x) const { return as_float(x); }
};

/// Asks for the next block while this one is unpacked, a few lines at a time: many at once stall.
struct Ahead {
  const uint8_t* from = nullptr;  ///< what this slab asks for; null: nothing
  int64_t token_bytes = 0;        ///< of it, per token unpacked
  bool large = false;             ///< whether blocks crowd each other out of the first-level cache

  /// The share of tokens [first, first + count). Inline: GCC takes a call that only prefetches for
  /// one without effect, and drops it.
  [[gnu::always_inline]] void ask(int first, int count) const {
    if (!from) return;
    const int64_t begin = (first * token_bytes + 63) & -64, end = (first + count) * token_bytes;
    if (large) {
      for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(from + i, 0, 2);
    } else {
      for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(from + i);
    }
  }
};

// ---- Columns.

#if defined(__AVX2__)
/// Words 32-bit words (at most 4) from p, exactly; the rest is zero.
template <int Words>
inline __m128i load_words(const uint8_t* p) {
  if constexpr (Words == 4) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (Words == 3) {
    return _mm_maskload_epi32(reinterpret_cast<const int*>(p), _mm_setr_epi32(-1, -1, -1, 0));
  }
  if constexpr (Words == 2) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_loadu_si32(p);
}
#endif

#if defined(__AVX512F__)
/// Words 32-bit words of 4 rows, every fourth of 16, 128 bits each.
template <int Words>
[[gnu::always_inline]] inline I load_every_fourth(const uint8_t* const* row, int64_t offset) {
  __m512i x = _mm512_castsi128_si512(load_words<Words>(row[0] + offset));
  x = _mm512_inserti32x4(x, load_words<Words>(row[4] + offset), 1);
  x = _mm512_inserti32x4(x, load_words<Words>(row[8] + offset), 2);
  return _mm512_inserti32x4(x, load_words<Words>(row[12] + offset), 3);
}
#endif

/// Words 32-bit words at the same offset of kWidth rows, transposed: out[w] holds word w of each.
template <int Words>
[[gnu::always_inline]] inline void load_columns(const uint8_t* const* row, int64_t offset, I* out) {
#if defined(__AVX512F__)
  const I a = load_every_fourth<Words>(row, offset), b = load_every_fourth<Words>(row + 1, offset);
  const I c = load_every_fourth<Words>(row + 2, offset);
  const I d = load_every_fourth<Words>(row + 3, offset);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab, cd);
  if constexpr (Words > 1) out[1] = _mm512_unpackhi_epi64(ab, cd);
  if constexpr (Words > 2) {
    const __m512i ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
    out[2] = _mm512_unpacklo_epi64(ab2, cd2);
    if constexpr (Words > 3) out[3] = _mm512_unpackhi_epi64(ab2, cd2);
  }
#elif defined(__AVX2__)
  const auto two = [&](int t) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_words<Words>(row[t] + offset)),
                                   load_words<Words>(row[t + 4] + offset), 1);
  };
  const __m256i a = two(0), b = two(1), c = two(2), d = two(3);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  out[0] = _mm256_unpacklo_epi64(ab, cd);
  if constexpr (Words > 1) out[1] = _mm256_unpackhi_epi64(ab, cd);
  if constexpr (Words > 2) {
    const __m256i ab2 = _mm256_unpackhi_epi32(a, b), cd2 = _mm256_unpackhi_epi32(c, d);
    out[2] = _mm256_unpacklo_epi64(ab2, cd2);
    if constexpr (Words > 3) out[3] = _mm256_unpackhi_epi64(ab2, cd2);
  }
#else
  uint32_t word[4][4] = {};
  for (int t = 0; t < 4; ++t) std::memcpy(word[t], row[t] + offset, 4 * Words);
  for (int w = 0; w < Words; ++w) {
    out[w] = I(U{word[0][w], word[1][w], word[2][w], word[3][w]});
  }
#endif
}

/// Code number Index of the stream in words, at the place the map wants it.
template <int Bits, int Index, Place Where>
[[gnu::always_inline]] inline I extract(const I* words) {
  constexpr int kWord = Index * Bits / 32, kShift = Index * Bits % 32;
  constexpr int kAbove = 32 - kShift - Bits;  // bits above the code in its word
  I x = words[kWord];
  if constexpr (Where == Place::top && kAbove >= 0) {
    if constexpr (kAbove > 0) x = shift_left<kAbove>(x);
    return x;
  }
  if constexpr (kShift > 0) x = shift_right<kShift>(x);
  if constexpr (kAbove < 0) x = bit_or(x, shift_left<32 - kShift>(words[kWord + 1]));
  if constexpr (Where == Place::clean && kAbove != 0) {
    x = bit_and(x, splat_int((1u << Bits) - 1));
  }
  return x;
}

/// A code in the low bits, anything above it, moved to the place the map wants it.
template <int Bits, Place Where>
inline I placed(I x) {
  if constexpr (Bits == 32 || Where == Place::low) return x;
  if constexpr (Where == Place::top) return shift_left<32 - Bits>(x);
  return bit_and(x, splat_int((1u << Bits % 32) - 1));
}

/// Which value of its slab a code is: q4_0 keeps value j in the low and j + 16 in the high half.
template <bool Halves>
constexpr int value_index(int code) {
  return Halves ? code / 2 + code % 2 * 16 : code;
}

/// out[value][token] of 64 rows.
template <int Bits, typename Map, bool Halves = false>
void unpack_columns(const uint8_t* const* rows, int64_t offset, const Ahead& ahead, float* out) {
  const Map map;
  for (int t = 0; t < kBlockTokens; t += kWidth) {
    ahead.ask(t, kWidth);
    I words[Bits];
    unroll<(Bits + 3) / 4>([&](auto chunk) {
      constexpr int kFirst = chunk * 4, kWords = Bits - kFirst < 4 ? Bits - kFirst : 4;
      load_columns<kWords>(rows + t, offset + 4 * kFirst, words + kFirst);
    });
    if constexpr (requires { Map::kFlip; }) {
      for (I& word : words) word = bit_xor(word, splat_int(Map::kFlip * 0x01010101u));
    }
    unroll<kSlab>([&](auto code) {
      const I x = extract<Bits, code, Map::kPlace>(words);
      store(out + value_index<Halves>(code) * kBlockTokens + t, map(x));
    });
  }
}

// ---- Rows.

/// kWidth bytes at p, one to a lane; with kWidth 4, other bytes above them.
inline I byte_lanes(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  uint32_t word;
  std::memcpy(&word, p, 4);
  return shift_right_lanes(splat_int(word), I{0, 8, 16, 24});
#endif
}

/// kWidth bytes at p, each xored with Flip, sign extended.
template <uint8_t Flip>
inline I signed_byte_lanes(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(Flip))));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(Flip))));
#else
  return shift_right_signed<24>(shift_left<24>(bit_xor(byte_lanes(p), splat_int(Flip))));
#endif
}

/// N bytes at p as a number, by whole loads: a copy into a wider variable would stall on its way
/// back from memory.
template <int N>
inline uint64_t load_bytes(const uint8_t* p) {
  constexpr int kWhole = N >= 4 ? 4 : N >= 2 ? 2 : 1;
  if constexpr (N == 8) {
    uint64_t x;
    std::memcpy(&x, p, 8);
    return x;
  } else if constexpr (N > kWhole) {
    return load_bytes<kWhole>(p) | load_bytes<N - kWhole>(p + kWhole) << 8 * kWhole;
  } else {
    std::conditional_t<N == 4, uint32_t, std::conditional_t<N == 2, uint16_t, uint8_t>> x;
    std::memcpy(&x, p, N);
    return x;
  }
}

/// spread of codes of 2 to 6 and 16 bits.
template <int Bits>
[[gnu::always_inline]] inline void spread_stream(const uint8_t* p, I* out) {
#if defined(__AVX512F__)
  for (int j = 0; j < 2; ++j, p += 2 * Bits) {
    if constexpr (Bits == 16) {
      out[j] = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    } else if constexpr (Bits == 4) {
      const I shifts = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
      const I low = _mm512_broadcastd_epi32(_mm_loadu_si32(p));
      const I both = _mm512_mask_broadcastd_epi32(low, 0xff00, _mm_loadu_si32(p + 4));
      out[j] = shift_right_lanes(both, shifts);
    } else if constexpr (Bits == 2) {
      const I shifts = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
      out[j] = shift_right_lanes(_mm512_broadcastd_epi32(_mm_loadu_si32(p)), shifts);
    } else {
      alignas(64) static constexpr auto kPick = [] {
        struct {
          uint8_t byte[64];
          uint32_t shift[16];
        } pick{};
        for (int i = 0; i < 16; ++i) {
          pick.byte[4 * i] = static_cast<uint8_t>(i * Bits / 8);
          pick.byte[4 * i + 1] = static_cast<uint8_t>(i * Bits / 8 + 1);
          pick.byte[4 * i + 2] = pick.byte[4 * i + 3] = 0x80;
          pick.shift[i] = i * Bits % 8;
        }
        return pick;
      }();
      const __m128i bytes = _mm_maskz_loadu_epi8((1 << 2 * Bits) - 1, p);
      const I spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), load_int(kPick.byte));
      out[j] = shift_right_lanes(spread, load_int(kPick.shift));
    }
  }
#elif defined(__AVX2__)
  for (int j = 0; j < 4; ++j, p += Bits) {
    if constexpr (Bits == 16) {
      out[j] = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else {
      const uint64_t word = load_bytes<Bits>(p);
      const auto low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 4 * Bits);
      const I shifts =
          Bits <= 4 ? _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits,
                                        7 * Bits)
                    : _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 0, Bits, 2 * Bits, 3 * Bits);
      I both = splat_int(low);
      if constexpr (Bits > 4) both = _mm256_inserti128_si256(both, _mm_set1_epi32(int(high)), 1);
      out[j] = shift_right_lanes(both, shifts);
    }
  }
#else
  for (int j = 0; j < 8; j += 2, p += Bits) {
    if constexpr (Bits == 16) {
      uint16_t x[8];
      std::memcpy(x, p, 16);
      out[j] = I{x[0], x[1], x[2], x[3]};
      out[j + 1] = I{x[4], x[5], x[6], x[7]};
    } else {
      const uint64_t word = load_bytes<Bits>(p);
      const I shifts{0, Bits, 2 * Bits, 3 * Bits};
      out[j] = shift_right_lanes(splat_int(static_cast<uint32_t>(word)), shifts);
      out[j + 1] = shift_right_lanes(splat_int(static_cast<uint32_t>(word >> 4 * Bits)), shifts);
    }
  }
#endif
}

/// The 32 codes at p in order, kWidth to a vector; bits above a code are left as they are.
template <int Bits>
[[gnu::always_inline]] inline void spread(const uint8_t* p, I* out) {
  if constexpr (Bits == 8 || Bits == 32) {
    for (int j = 0; j < kSlab / kWidth; ++j) {
      out[j] = Bits == 8 ? byte_lanes(p + j * kWidth) : load_int(p + j * 4 * kWidth);
    }
  } else {
    spread_stream<Bits>(p, out);
  }
}

/// q4_0's 16 bytes: low halves are values 0 .. 15, high halves 16 .. 31.
[[gnu::always_inline]] inline void spread_halves(const uint8_t* p, I* out) {
  constexpr int kVectors = kSlab / kWidth / 2;
  for (int j = 0; j < kVectors; ++j) {
    out[j] = byte_lanes(p + j * kWidth);
    out[j + kVectors] = shift_right<4>(out[j]);
  }
}

/// out[token][value] of the first tokens rows.
template <int Bits, typename Map, bool Halves = false>
void unpack_rows(const uint8_t* const* rows, int64_t offset, int tokens, const Ahead& ahead,
                 float* out) {
  const Map map;
  for (int t = 0; t < tokens; ++t, out += kSlab) {
    if (t % 4 == 0) ahead.ask(t, 4);
    if constexpr (requires { Map::kFlip; }) {
      for (int j = 0; j < kSlab; j += kWidth) {
        store(out + j, to_float(signed_byte_lanes<Map::kFlip>(rows[t] + offset + j)));
      }
      continue;
    }
    I codes[kSlab / kWidth];
    if constexpr (Halves) {
      spread_halves(rows[t] + offset, codes);
    } else {
      spread<Bits>(rows[t] + offset, codes);
    }
    for (int j = 0; j < kSlab / kWidth; ++j) {
      store(out + j * kWidth, map(placed<Bits, Map::kPlace>(codes[j])));
    }
  }
}

/// Fp8 maps codes of NaN and infinity to numbers; this puts them right. They are rare: the
/// encoder never writes them.
template <typename Format>
inline bool has_special(uint64_t codes) {
  // A carry out of the exponent and mantissa (e4m3: NaN only) or the exponent alone (e5m2).
  constexpr uint64_t kOnes = 0x0101010101010101;
  constexpr uint64_t kField = Format::kBias == 15 ? 0x7c : 0x7f;
  constexpr uint64_t kUnit = Format::kBias == 15 ? 0x04 : 0x01;
  return ((codes & (kField * kOnes)) + kUnit * kOnes) & (0x80 * kOnes);
}

template <typename Format, typename Position>
inline void repair_fp8(const uint8_t* const* rows, int64_t offset, int tokens, float* out,
                       const Position& position) {
  for (int t = 0; t < tokens; ++t) {
    const uint8_t* codes = rows[t] + offset;
    bool special = false;
    for (int i = 0; i < kSlab; i += 8) {
      uint64_t word;
      std::memcpy(&word, codes + i, 8);
      special |= has_special<Format>(word);
    }
    if (!special) continue;
    for (int i = 0; i < kSlab; ++i) out[position(t, i)] = fp8_values<Format>()[codes[i]];
  }
}

template <typename Format>
void unpack_fp8_columns(const uint8_t* const* rows, int64_t offset, const Ahead& ahead,
                        float* out) {
  unpack_columns<8, Fp8<Format>>(rows, offset, ahead, out);
  repair_fp8<Format>(rows, offset, kBlockTokens, out,
                     [](int t, int i) { return i * kBlockTokens + t; });
}

template <typename Format>
void unpack_fp8_rows(const uint8_t* const* rows, int64_t offset, int tokens, const Ahead& ahead,
                     float* out) {
  unpack_rows<8, Fp8<Format>>(rows, offset, tokens, ahead, out);
  repair_fp8<Format>(rows, offset, tokens, out, [](int t, int i) { return t * kSlab + i; });
}

// ---- What attention_side.h sees.

/// How one side's rows are laid out in slabs, and how to unpack one to floats.
class FloatUnpacker {
 public:
  using Element = float;

  explicit FloatUnpacker(const Layout& layout) { choose(layout); }

  int slab_bytes() const { return slab_bytes_; }
  int slab_stride() const { return slab_bytes_ + header_; }
  int64_t offset(int64_t slab) const { return header_ + slab * slab_stride(); }

  /// out[value][token], 64 tokens.
  void columns(const uint8_t* const* rows, int64_t offset, const Ahead& ahead, float* out) const {
    columns_(rows, offset, ahead, out);
  }
  /// out[token][value], then zeros up to padded_tokens(tokens).
  void rows(const uint8_t* const* rows, int64_t offset, int tokens, const Ahead& ahead,
            float* out) const {
    rows_(rows, offset, tokens, ahead, out);
    const int padding = padded_tokens(tokens) - tokens;
    std::memset(out + tokens * kSlab, 0, padding * kSlab * sizeof(float));
  }
  static constexpr int padded_tokens(int tokens) { return (tokens + 3) & ~3; }

  /// What an affine code stands for is the code minus this, given back in the bias: sums of codes
  /// that are all positive would be large numbers that cancel, and lose digits.
  static constexpr float centre(int bits) { return bits == 8 ? 128.0f : bits == 4 ? 7.5f : 1.5f; }
  /// What scales are to be multiplied by.
  static constexpr float unit() { return 1; }
  /// Puts 32 sums of rows in the order of values.
  static void restore(float*) {}

 private:
  void choose(const Layout& layout) {
    switch (layout.family) {
      case KVQ_FAMILY_AFFINE:
        // Codes minus centre.
        if (layout.bits == 8) return set<8, SignedByte<0x80>>();
        if (layout.bits == 4) return set<4, Integer<4, 15>>();
        return set<2, Integer<2, 3>>();
      case KVQ_FAMILY_FP8_E4M3:
        return set_to(unpack_fp8_columns<E4M3>, unpack_fp8_rows<E4M3>, 32, 0);
      case KVQ_FAMILY_FP8_E5M2:
        return set_to(unpack_fp8_columns<E5M2>, unpack_fp8_rows<E5M2>, 32, 0);
      case KVQ_FAMILY_Q8_0:
        return set<8, SignedByte<0>>(2);
      case KVQ_FAMILY_Q4_0:
        return set<4, Integer<4, 16>, true>(2);
      case KVQ_FAMILY_TURBOQUANT:
        switch (layout.bits) {
          case 2:
            return set<2, Codebook<2>>();
          case 3:
            return set<3, Codebook<3>>();
          case 4:
            return set<4, Codebook<4>>();
          case 5:
            return set<5, Codebook<5>>();
          case 6:
            return set<6, Codebook<6>>();
          default:
            return set<8, Codebook<8>>();
        }
      case KVQ_FAMILY_NONE:
        break;
    }
    if (layout.codes_dtype == KVQ_FLOAT32) return set<32, Single>();
    return layout.codes_dtype == KVQ_FLOAT16 ? set<16, Half>() : set<16, Bfloat>();
  }

  using Columns = void (*)(const uint8_t* const*, int64_t, const Ahead&, float*);
  using RowsOf = void (*)(const uint8_t* const*, int64_t, int, const Ahead&, float*);

  template <int Bits, typename Map, bool Halves = false>
  void set(int header = 0) {
    set_to(unpack_columns<Bits, Map, Halves>, unpack_rows<Bits, Map, Halves>, 4 * Bits, header);
  }
  void set_to(Columns columns, RowsOf rows, int slab_bytes, int header) {
    columns_ = columns;
    rows_ = rows;
    slab_bytes_ = slab_bytes;
    header_ = header;
  }

  Columns columns_;
  RowsOf rows_;
  int slab_bytes_;  ///< codes of 32 values
  int header_;      ///< bytes before them (a GGUF block's scale)
};

}  // namespace kvq::cpu::KVQ_ISA
