// How the attention kernels read packed rows: one struct per format family.
//
// A lane takes a chunk of N neighbouring elements (in storage order), as raw words, and unpacks
// a few at a time. To save instructions a value comes out as value(i) * 2^k with k known at
// compile time: factor(i) undoes it, folded into the query or into the final output. Affine codes
// are centred (code - 2^(bits-1)), so that a dot product cancels no more than one with the
// dequantised values; scale_bias() gives the bias that goes with centred codes.
#pragma once

#include <metal_stdlib>

#include "../csrc/shared/attention_params.h"
#include "../csrc/shared/codebooks.h"

using namespace metal;

#define KVQ_CONST static constant constexpr const
#define KVQ_UNROLL _Pragma("clang loop unroll(full)")

/// 2^23, the float whose last mantissa bit is worth 1: OR-ing an integer into its bits adds it.
#define KVQ_MAGIC 8388608u

constexpr uint kvq_least(uint a, uint b) { return a < b ? a : b; }
constexpr uint kvq_most(uint a, uint b) { return a < b ? b : a; }

/// Largest power of two that divides x, at most limit (a power of two).
constexpr uint kvq_power(uint x, uint limit) {
  uint power = limit;
  while (x % power != 0) power /= 2;
  return power;
}

/// Copies BYTES bytes from an address that is a multiple of ALIGN into words, with the widest loads
/// that this allows.
template <uint BYTES, uint ALIGN>
inline void kvq_load(device const uchar* from, thread uint* words) {
  if (ALIGN % 16 == 0) {
    KVQ_UNROLL for (uint i = 0; i < BYTES / 16; ++i) {
      const uint4 v = reinterpret_cast<device const uint4*>(from)[i];
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  } else if (ALIGN % 8 == 0) {
    KVQ_UNROLL for (uint i = 0; i < BYTES / 8; ++i) {
      const uint2 v = reinterpret_cast<device const uint2*>(from)[i];
      words[2 * i] = v.x;
      words[2 * i + 1] = v.y;
    }
  } else if (ALIGN % 4 == 0) {
    KVQ_UNROLL for (uint i = 0; i < BYTES / 4; ++i) {
      words[i] = reinterpret_cast<device const uint*>(from)[i];
    }
  } else if (ALIGN % 2 == 0) {
    KVQ_UNROLL for (uint i = 0; i < BYTES / 2; ++i) {
      const uint v = uint(reinterpret_cast<device const ushort*>(from)[i]);
      words[i / 2] = i % 2 == 0 ? v : words[i / 2] | (v << 16);
    }
  } else {
    KVQ_UNROLL for (uint i = 0; i < BYTES; ++i) {
      const uint v = uint(from[i]);
      words[i / 4] = i % 4 == 0 ? v : words[i / 4] | (v << (8 * (i % 4)));
    }
  }
}

/// Codes of BITS bits, centred, still scaled by 1 / factor.
template <uint BITS>
struct KvqInPlace {
  /// Bit at which code e of eight stays in the float's mantissa, after a shift of its word. Shifts
  /// bring no code to bit 0: compilers make that an extraction of its own.
  static constexpr uint place(uint e) { return e * BITS % 32 - shift(e); }
  static constexpr uint shift(uint e) {
    return BITS == 8 ? (e % 4 < 2 ? 0 : 12) : BITS == 4 ? (e < 5 ? 0 : 16) : 0;
  }
  static inline float factor(uint e) { return as_type<float>((127u - place(e % 8)) << 23); }
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, uint flip, uint magic,
                            thread float* c) {
    KVQ_UNROLL for (uint j = 0; j < E; ++j) {
      const uint e = (i + j) % 8;
      const uint word =
          (words[(i + j) * BITS / 32] ^ flip) >> (BITS == 2 ? 2 * (i / 8 % 2 * 8) : 0);
      const uint mask = ((1u << BITS) - 1) << place(e);
      c[j] = as_type<float>(((word >> shift(e)) & mask) | magic) -
             float(KVQ_MAGIC + (1u << (BITS - 1 + place(e))));
    }
  }
};

/// Two float16 of 1024, whose last mantissa bit is worth 1. Made from what the kernel reads from
/// memory, so that it stays in a register.
inline uint kvq_half_magic(uint magic) { return magic ^ (KVQ_MAGIC_BITS ^ 0x64006400u); }

/// Fields of BITS bits, out[j] from bit j * BITS of either 16-bit half of x: whole numbers,
/// centred, as exact float16. magic: kvq_half_magic, with the bits to flip flipped.
template <uint BITS>
struct KvqHalves {
  static inline void split(uint x, uint magic, thread half2* out) {
    constexpr uint mask = ((1u << BITS) - 1) * 0x00010001u;
    KVQ_UNROLL for (uint j = 0; j < 16 / BITS; ++j) {
      constexpr uint fields = 8 / BITS;  // of a byte
      const uint place = j % fields * BITS;
      const uint bits = ((j < fields ? x : x >> 8) & (mask << place)) ^ magic;
      const half share = as_type<half>(ushort((15 - place) << 10));  // 2^-place
      const half centre = half(1024u >> place) + half(1u << (BITS - 1));
      out[j] = as_type<half2>(bits) * half2(share) - half2(centre);  // exact, step by step
    }
  }
};

/// As many fields as F::split makes of a word: pairs from one row, columns from two.
template <typename F, uint BITS, uint N>
struct KvqSplit {
  KVQ_CONST uint kFields = 16 / BITS;
  static inline void pairs(thread const uint* words, uint magic, thread half2* out) {
    KVQ_UNROLL for (uint i = 0; i < N / 2; i += kFields) {
      F::split(words[i / kFields], magic, out + i);
    }
  }
  static inline void columns(thread const uint* a, thread const uint* b, uint magic,
                             thread half2* out) {
    KVQ_UNROLL for (uint i = 0; i < N; i += kFields) {
      const ushort2 x = as_type<ushort2>(a[i / kFields / 2]);
      const ushort2 y = as_type<ushort2>(b[i / kFields / 2]);
      const uint k = i / kFields % 2;
      F::split(as_type<uint>(ushort2(x[k], y[k])), magic, out + i);
    }
  }
  /// Which of a chunk's elements is in half k of pair i.
  static constexpr uint element(uint i, uint k) {
    return i / kFields * 2 * kFields + i % kFields + k * kFields;
  }
};

/// What most formats have in common.
struct KvqPlain {
  KVQ_CONST uint kMaxChunk = 32;  ///< most elements of a chunk
  KVQ_CONST uint kAlign = 16;     ///< most that chunks are aligned to within a row
  KVQ_CONST bool kBiased = false;
  KVQ_CONST uint kTable = 0;        ///< entries of the codebook
  KVQ_CONST uint kHalfTable = 0;    ///< entries of the codebook in float16
  KVQ_CONST uint kCopies = 1;       ///< of them, side by side, so that lanes find their banks free
  KVQ_CONST uint kGroup = 0;        ///< elements that share a scale; 0: the row
  KVQ_CONST bool kHalfway = false;  ///< chunks begin at words and halfway between two
  static inline float entry(uint) { return 0.0f; }
  static inline uint half_entry(uint) { return 0u; }
  static inline float factor(uint) { return 1.0f; }
  /// Element of the row that comes i-th in a chunk.
  template <uint N>
  static inline uint element(uint chunk, uint i) {
    return chunk * N + i;
  }
};

/// Number i of an array of S. Words are taken apart by shifts: of a vector's elements the compiler
/// makes registers of their own, where the word is loaded, and so waits for it there.
inline float kvq_number(thread const uint* words, uint i, float) {
  return as_type<float>(words[i]);
}
inline float kvq_number(thread const uint* words, uint i, half) {
  return float(as_type<half>(ushort(words[i / 2] >> (i % 2 * 16))));
}
inline float kvq_number(thread const uint* words, uint i, bfloat) {
  return as_type<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
}

/// All scales of a row of D elements, in groups of GROUP, as words: loaded at once, read later.
template <typename S, uint D, uint GROUP, bool ALIGNED>
struct KvqScales {
  KVQ_CONST uint kBytes = D / GROUP * sizeof(S);
  KVQ_CONST uint kWords = (kBytes + 3) / 4;
  static inline void load(device const uchar* from, thread uint* words) {
    kvq_load<kBytes, ALIGNED ? kvq_power(kBytes, 16) : uint(sizeof(S))>(from, words);
  }
};

/// int8, int4, int2: value = scale * code + bias.
template <uint BITS, uint GROUP, typename S>
struct KvqAffine : KvqPlain {
  KVQ_CONST uint kBits = BITS;
  KVQ_CONST uint kGroup = GROUP;
  KVQ_CONST bool kBiased = true;
  template <uint N>
  static inline uint offset(uint chunk) {
    return chunk * (N * BITS / 8);
  }
  template <uint N>
  static inline float2 scale_bias(device const uchar*, device const uchar* scales,
                                  device const uchar* biases, uint chunk) {
    const uint group = chunk * N / GROUP;
    const float scale = float(reinterpret_cast<device const S*>(scales)[group]);
    const float bias = float(reinterpret_cast<device const S*>(biases)[group]);
    return float2(scale, fma(scale, float(1u << (BITS - 1)), bias));
  }
  template <uint D, bool ALIGNED>
  struct Scales : KvqScales<S, D, GROUP, ALIGNED> {
    typedef KvqScales<S, D, GROUP, ALIGNED> Row;
    KVQ_CONST uint kWords = 2 * Row::kWords;
    static inline void load(device const uchar*, device const uchar* scales,
                            device const uchar* biases, thread uint* words) {
      Row::load(scales, words);
      Row::load(biases, words + Row::kWords);
    }
    static inline float2 get(thread const uint* words, uint group) {
      const float scale = kvq_number(words, group, S(0));
      const float bias = kvq_number(words + Row::kWords, group, S(0));
      return float2(scale, fma(scale, float(1u << (BITS - 1)), bias));
    }
  };
  static inline float factor(uint i) { return KvqInPlace<BITS>::factor(i); }
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float*, uint magic,
                            thread float* c) {
    KvqInPlace<BITS>::template unpack<E>(words, i, 0u, magic, c);
  }
  static inline void split(uint x, uint magic, thread half2* out) {
    KvqHalves<BITS>::split(x, magic, out);
  }
  /// The N elements of a chunk, two and two, in float16.
  template <uint N>
  static inline void pairs(thread const uint* words, threadgroup const uint*, uint magic,
                           thread half2* out) {
    KvqSplit<KvqAffine, BITS, N>::pairs(words, magic, out);
  }
  template <uint N>
  static constexpr uint pair_element(uint i, uint k) {
    return KvqSplit<KvqAffine, BITS, N>::element(i, k);
  }
  /// The N elements of the same chunk of two rows, out[e] = (a's, b's).
  template <uint N>
  static inline void columns(thread const uint* a, thread const uint* b, threadgroup const uint*,
                             uint magic, thread half2* out) {
    KvqSplit<KvqAffine, BITS, N>::columns(a, b, magic, out);
  }
};

/// GGUF blocks of 32: a float16 scale, then the codes; value = scale * (code - 2^(bits-1)).
template <uint BITS>
struct KvqGguf : KvqPlain {
  KVQ_CONST uint kBits = BITS;
  KVQ_CONST uint kGroup = 32;
  KVQ_CONST uint kBlock = 2 + 4 * BITS;
  KVQ_CONST uint kAlign = 2;
  KVQ_CONST bool kHalfway = true;
  /// q4_0's byte j holds elements j and j + 16.
  template <uint N>
  static inline uint element(uint chunk, uint i) {
    if (BITS == 8) return chunk * N + i;
    const uint within = chunk % (32 / N) * (N / 2) + i / 8 * 4 + i % 8 / 2 + i % 2 * 16;
    return chunk * N / 32 * 32 + within;
  }
  template <uint N>
  static inline uint offset(uint chunk) {
    return chunk * N / 32 * kBlock + 2 + chunk % (32 / N) * (N * BITS / 8);
  }
  template <uint N>
  static inline float2 scale_bias(device const uchar* codes, device const uchar*,
                                  device const uchar*, uint chunk) {
    device const uchar* block = codes + chunk * N / 32 * kBlock;
    return float2(float(as_type<half>(ushort(uint(block[0]) | (uint(block[1]) << 8)))), 0.0f);
  }
  template <uint D, bool>
  struct Scales {
    KVQ_CONST uint kWords = D / 32;
    static inline void load(device const uchar* codes, device const uchar*, device const uchar*,
                            thread uint* words) {
      KVQ_UNROLL for (uint i = 0; i < kWords; ++i) kvq_load<2, 2>(codes + i * kBlock, words + i);
    }
    static inline float2 get(thread const uint* words, uint group) {
      return float2(float(as_type<half>(ushort(words[group]))), 0.0f);
    }
  };
  static inline float factor(uint i) { return KvqInPlace<BITS>::factor(i); }
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float*, uint magic,
                            thread float* c) {
    // q8_0's bytes are signed: flipping the top bit makes them excess-128.
    KvqInPlace<BITS>::template unpack<E>(words, i, BITS == 8 ? 0x80808080u : 0u, magic, c);
  }
  static inline void split(uint x, uint magic, thread half2* out) {
    KvqHalves<BITS>::split(x, BITS == 8 ? magic ^ 0x00800080u : magic, out);
  }
  /// The N elements of a chunk, two and two, in float16.
  template <uint N>
  static inline void pairs(thread const uint* words, threadgroup const uint*, uint magic,
                           thread half2* out) {
    KvqSplit<KvqGguf, BITS, N>::pairs(words, magic, out);
  }
  template <uint N>
  static constexpr uint pair_element(uint i, uint k) {
    return KvqSplit<KvqGguf, BITS, N>::element(i, k);
  }
  /// The N elements of the same chunk of two rows, out[e] = (a's, b's).
  template <uint N>
  static inline void columns(thread const uint* a, thread const uint* b, threadgroup const uint*,
                             uint magic, thread half2* out) {
    KvqSplit<KvqGguf, BITS, N>::columns(a, b, magic, out);
  }
};

/// fp8_e4m3 (EXPONENT = 4) and fp8_e5m2 (EXPONENT = 5): a float16 with fewer bits, times a scale.
template <uint EXPONENT, uint GROUP, typename S>
struct KvqFp8 : KvqPlain {
  KVQ_CONST uint kBits = 8;
  KVQ_CONST uint kGroup = GROUP;
  template <uint N>
  static inline uint offset(uint chunk) {
    return chunk * N;
  }
  template <uint N>
  static inline float2 scale_bias(device const uchar*, device const uchar* scales,
                                  device const uchar*, uint chunk) {
    const float scale = float(reinterpret_cast<device const S*>(scales)[chunk * N / GROUP]);
    // e4m3 read with float16's exponent is 2^8 too small.
    return float2(EXPONENT == 4 ? 256.0f * scale : scale, 0.0f);
  }
  template <uint D, bool ALIGNED>
  struct Scales : KvqScales<S, D, GROUP, ALIGNED> {
    static inline void load(device const uchar*, device const uchar* scales, device const uchar*,
                            thread uint* words) {
      KvqScales<S, D, GROUP, ALIGNED>::load(scales, words);
    }
    static inline float2 get(thread const uint* words, uint group) {
      const float scale = kvq_number(words, group, S(0));
      return float2(EXPONENT == 4 ? 256.0f * scale : scale, 0.0f);
    }
  };
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float*, uint,
                            thread float* c) {
    KVQ_UNROLL for (uint k = 0; k < E / 4; ++k) {
      half2 out[2];
      split(words[i / 4 + k], 0u, out);
      const float2 a = float2(out[0]), b = float2(out[1]);
      c[4 * k] = a.x;
      c[4 * k + 1] = b.x;
      c[4 * k + 2] = a.y;
      c[4 * k + 3] = b.y;
    }
  }
  /// Bytes 0 and 2, then bytes 1 and 3, each as two float16.
  static inline void split(uint w, uint, thread half2* out) {
    uint even, odd;
    if (EXPONENT == 4) {
      // e4m3's NaN, 0x7F, is the one code whose low seven bits carry. Bit 14, which no other
      // code has use for, makes it float16's.
      const uint nan = (w & 0x7F7F7F7Fu) + 0x01010101u;
      even = ((w << 7) & 0x3F803F80u) | ((w << 8) & 0x80008000u) | ((nan << 7) & 0x40004000u);
      odd = ((w >> 1) & 0x3F803F80u) | (w & 0x80008000u) | ((nan >> 1) & 0x40004000u);
    } else {
      even = (w << 8) & 0xFF00FF00u;
      odd = w & 0xFF00FF00u;
    }
    out[0] = as_type<half2>(even);
    out[1] = as_type<half2>(odd);
  }
  /// The N elements of a chunk, two and two, in float16.
  template <uint N>
  static inline void pairs(thread const uint* words, threadgroup const uint*, uint magic,
                           thread half2* out) {
    KvqSplit<KvqFp8, 8, N>::pairs(words, magic, out);
  }
  template <uint N>
  static constexpr uint pair_element(uint i, uint k) {
    return KvqSplit<KvqFp8, 8, N>::element(i, k);
  }
  /// The N elements of the same chunk of two rows, out[e] = (a's, b's).
  template <uint N>
  static inline void columns(thread const uint* a, thread const uint* b, threadgroup const uint*,
                             uint magic, thread half2* out) {
    KvqSplit<KvqFp8, 8, N>::columns(a, b, magic, out);
  }
};

/// TurboQuant: a dense stream of codebook indices, one scale a row.
template <uint BITS, typename S>
struct KvqTurbo : KvqPlain {
  KVQ_CONST uint kBits = BITS;
  KVQ_CONST uint kTable = 1u << BITS;
  KVQ_CONST uint kHalfTable = BITS == 4 ? 256 : kTable;  ///< of 4 bits: for two codes at once
  KVQ_CONST uint kCopies = BITS == 4 ? 8 : 1;
  static inline float entry(uint i) {
    return BITS == 2   ? kvq_codebook_2[i]
           : BITS == 3 ? kvq_codebook_3[i]
           : BITS == 4 ? kvq_codebook_4[i]
           : BITS == 5 ? kvq_codebook_5[i]
           : BITS == 6 ? kvq_codebook_6[i]
                       : kvq_codebook_8[i];
  }
  template <uint N>
  static inline uint offset(uint chunk) {
    return chunk * (N * BITS / 8);
  }
  template <uint N>
  static inline float2 scale_bias(device const uchar*, device const uchar* scales,
                                  device const uchar*, uint) {
    return float2(float(reinterpret_cast<device const S*>(scales)[0]), 0.0f);
  }
  template <uint D, bool ALIGNED>
  struct Scales : KvqScales<S, D, D, ALIGNED> {
    static inline void load(device const uchar*, device const uchar* scales, device const uchar*,
                            thread uint* words) {
      KvqScales<S, D, D, ALIGNED>::load(scales, words);
    }
    static inline float2 get(thread const uint* words, uint) {
      return float2(kvq_number(words, 0, S(0)), 0.0f);
    }
  };
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float* table, uint,
                            thread float* c) {
    KVQ_UNROLL for (uint e = 0; e < E; ++e) { c[e] = table[code(words, i + e)]; }
  }
  static inline uint half_entry(uint i) {
    const uint low = uint(as_type<ushort>(half(entry(i % kTable))));
    return BITS == 4 ? low | (uint(as_type<ushort>(half(entry(i / kTable)))) << 16) : low;
  }
  static inline uint code(thread const uint* words, uint e) {
    const uint bit = e * BITS;
    uint code = words[bit / 32] >> (bit % 32);
    if (bit % 32 + BITS > 32) code |= words[bit / 32 + 1] << (32 - bit % 32);
    return code & ((1u << BITS) - 1);
  }
  template <uint N>
  static inline void pairs(thread const uint* words, threadgroup const uint* table, uint,
                           thread half2* out) {
    KVQ_UNROLL for (uint i = 0; i < N / 2; ++i) {
      out[i] = as_type<half2>(BITS == 4 ? table[((words[i / 4] >> (i % 4 * 8)) & 0xFFu) * kCopies]
                                        : table[code(words, 2 * i)] |
                                              (table[code(words, 2 * i + 1)] << 16));
    }
  }
  template <uint N>
  static constexpr uint pair_element(uint i, uint k) {
    return 2 * i + k;
  }
  template <uint N>
  static inline void columns(thread const uint* a, thread const uint* b,
                             threadgroup const uint* table, uint, thread half2* out) {
    if (BITS == 4) {
      KVQ_UNROLL for (uint i = 0; i < N; i += 8) {
        const uint x = a[i / 8], y = b[i / 8];
        const uint even = (x & 0x0F0F0F0Fu) | ((y << 4) & 0xF0F0F0F0u);
        const uint odd = ((x >> 4) & 0x0F0F0F0Fu) | (y & 0xF0F0F0F0u);
        KVQ_UNROLL for (uint e = 0; e < kvq_least(8, N); e += 2) {
          out[i + e] = as_type<half2>(table[((even >> (e * 4)) & 0xFFu) * kCopies]);
          out[i + e + 1] = as_type<half2>(table[((odd >> (e * 4)) & 0xFFu) * kCopies]);
        }
      }
    } else {
      KVQ_UNROLL for (uint e = 0; e < N; ++e) {
        out[e] = as_type<half2>(table[code(a, e)] | (table[code(b, e)] << 16));
      }
    }
  }
};

/// Rows kept as they are, in S.
template <typename S>
struct KvqDense : KvqPlain {
  KVQ_CONST uint kBits = 8 * sizeof(S);
  KVQ_CONST uint kMaxChunk = 32 / sizeof(S);
  template <uint N>
  static inline uint offset(uint chunk) {
    return chunk * (N * uint(sizeof(S)));
  }
  template <uint N>
  static inline float2 scale_bias(device const uchar*, device const uchar*, device const uchar*,
                                  uint) {
    return float2(1.0f, 0.0f);
  }
  template <uint D, bool>
  struct Scales {
    KVQ_CONST uint kWords = 1;
    static inline void load(device const uchar*, device const uchar*, device const uchar*,
                            thread uint*) {}
    static inline float2 get(thread const uint*, uint) { return float2(1.0f, 0.0f); }
  };
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float*, uint,
                            thread float* c) {
    KVQ_UNROLL for (uint e = 0; e < E; ++e) { c[e] = kvq_number(words, i + e, S(0)); }
  }
  /// float16 rows only.
  static inline void split(uint x, uint, thread half2* out) { out[0] = as_type<half2>(x); }
  /// The N elements of a chunk, two and two, in float16.
  template <uint N>
  static inline void pairs(thread const uint* words, threadgroup const uint*, uint magic,
                           thread half2* out) {
    KvqSplit<KvqDense, 16, N>::pairs(words, magic, out);
  }
  template <uint N>
  static constexpr uint pair_element(uint i, uint k) {
    return KvqSplit<KvqDense, 16, N>::element(i, k);
  }
  /// The N elements of the same chunk of two rows, out[e] = (a's, b's).
  template <uint N>
  static inline void columns(thread const uint* a, thread const uint* b, threadgroup const uint*,
                             uint magic, thread half2* out) {
    KvqSplit<KvqDense, 16, N>::columns(a, b, magic, out);
  }
};

/// What the address of a chunk of `bytes` bytes is a multiple of.
template <typename F, bool ALIGNED>
constexpr uint kvq_alignment(uint bytes) {
  return ALIGNED ? kvq_power(bytes, F::kAlign) : 1;
}

/// A chunk of N elements of a row of D, as it was loaded: nothing is done with it, or waits for it,
/// before get(). Rows of chunks that begin halfway between words are loaded by words all the same,
/// from half a word before the chunk, or a whole one.
template <typename F, uint D, uint N, bool ALIGNED>
struct KvqChunk {
  KVQ_CONST uint kBytes = N * F::kBits / 8;
  /// Every second block begins halfway: the last does not, so that none is read past its end.
  KVQ_CONST bool kHalfway = F::kHalfway && ALIGNED && D % 64 == 0 && kBytes % 4 == 0;
  KVQ_CONST bool kScaled = kHalfway && N == F::kGroup;  ///< its scale comes with it
  KVQ_CONST uint kCodes = (kBytes + 3) / 4;             ///< words of codes
  KVQ_CONST uint kWords = kCodes + (kHalfway ? 1 : 0);
  uint words[kWords];

  /// `from`: where the chunk begins, `at` bytes into its row.
  void load(device const uchar* from, uint at) thread {
    if (kHalfway) {
      kvq_load<4 * kWords, 4>(from - (at % 4 == 2 ? 2 : 4), words);
    } else {
      kvq_load<kBytes, kvq_alignment<F, ALIGNED>(kBytes)>(from, words);
    }
  }
  void get(uint at, thread uint* codes) const thread {
    KVQ_UNROLL for (uint i = 0; i < kCodes; ++i) {
      codes[i] = !kHalfway     ? words[i]
                 : at % 4 == 2 ? (words[i] >> 16) | (words[i + 1] << 16)
                               : words[i + 1];
    }
  }
  float2 scale(uint at) const thread {
    return float2(float(as_type<half>(ushort(words[0] >> (at % 4 == 2 ? 0 : 16)))), 0.0f);
  }
  void clear() thread { KVQ_UNROLL for (uint i = 0; i < kWords; ++i) words[i] = 0; }
};

/// Smallest multiple of step that divides d into at most 32 chunks.
constexpr uint kvq_wide_chunk(uint d, uint step) {
  uint chunk = step;
  while (d % chunk != 0 || d / chunk > 32) chunk += step;
  return chunk;
}

/// Elements a lane takes when one simdgroup must cover a row of d: about `wanted`.
constexpr uint kvq_value_chunk(uint d, uint wanted) {
  return d / kvq_power(d, wanted) <= 32 ? kvq_power(d, wanted)
                                        : kvq_wide_chunk(d, d % 8 == 0 ? 8 : 1);
}

/// Copies a codebook into threadgroup memory, where divergent look-ups are cheap.
template <typename F>
inline void kvq_fill_table(threadgroup float* table, uint thread_index) {
  for (uint i = thread_index; i < F::kTable; i += KVQ_ATTENTION_THREADS) {
    table[i] = F::entry(i);
  }
}
template <typename F>
inline void kvq_fill_half_table(threadgroup uint* table, uint thread_index) {
  for (uint i = thread_index; i < F::kHalfTable * F::kCopies; i += KVQ_ATTENTION_THREADS) {
    table[i] = F::half_entry(i / F::kCopies);
  }
}
