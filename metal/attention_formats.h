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
  /// Bit at which code e of eight stays in the float's mantissa.
  static constexpr uint place(uint e) {
    return BITS == 8 ? 8 * (e % 2) : BITS == 4 ? 4 * (e < 5 ? e : e - 5) : BITS * e;
  }
  static constexpr uint shift(uint e) {
    return BITS == 8 ? 16 * (e % 4 / 2) : BITS == 4 ? (e < 5 ? 0 : 20) : 0;
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

/// What most formats have in common.
struct KvqPlain {
  KVQ_CONST uint kMaxChunk = 32;  ///< most elements of a chunk
  KVQ_CONST uint kAlign = 16;     ///< most that chunks are aligned to within a row
  KVQ_CONST bool kBiased = false;
  KVQ_CONST uint kTable = 0;  ///< entries of the codebook
  static inline float entry(uint) { return 0.0f; }
  static inline float factor(uint) { return 1.0f; }
  /// Element of the row that comes i-th in a chunk.
  template <uint N>
  static inline uint element(uint chunk, uint i) {
    return chunk * N + i;
  }
};

/// int8, int4, int2: value = scale * code + bias.
template <uint BITS, uint GROUP, typename S>
struct KvqAffine : KvqPlain {
  KVQ_CONST uint kBits = BITS;
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
  static inline float factor(uint i) { return KvqInPlace<BITS>::factor(i); }
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float*, uint magic,
                            thread float* c) {
    KvqInPlace<BITS>::template unpack<E>(words, i, 0u, magic, c);
  }
};

/// GGUF blocks of 32: a float16 scale, then the codes; value = scale * (code - 2^(bits-1)).
template <uint BITS>
struct KvqGguf : KvqPlain {
  KVQ_CONST uint kBits = BITS;
  KVQ_CONST uint kBlock = 2 + 4 * BITS;
  KVQ_CONST uint kAlign = 2;
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
  static inline float factor(uint i) { return KvqInPlace<BITS>::factor(i); }
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float*, uint magic,
                            thread float* c) {
    // q8_0's bytes are signed: flipping the top bit makes them excess-128.
    KvqInPlace<BITS>::template unpack<E>(words, i, BITS == 8 ? 0x80808080u : 0u, magic, c);
  }
};

/// fp8_e4m3 (EXPONENT = 4) and fp8_e5m2 (EXPONENT = 5): a float16 with fewer bits, times a scale.
template <uint EXPONENT, uint GROUP, typename S>
struct KvqFp8 : KvqPlain {
  KVQ_CONST uint kBits = 8;
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
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float*, uint,
                            thread float* c) {
    KVQ_UNROLL for (uint k = 0; k < E / 4; ++k) {
      const uint w = words[i / 4 + k];
      uint even, odd;  // bytes 0 and 2, bytes 1 and 3, each as two float16
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
      const float2 a = float2(as_type<half2>(even)), b = float2(as_type<half2>(odd));
      c[4 * k] = a.x;
      c[4 * k + 1] = b.x;
      c[4 * k + 2] = a.y;
      c[4 * k + 3] = b.y;
    }
  }
};

/// TurboQuant: a dense stream of codebook indices, one scale a row.
template <uint BITS, typename S>
struct KvqTurbo : KvqPlain {
  KVQ_CONST uint kBits = BITS;
  KVQ_CONST uint kTable = 1u << BITS;
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
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float* table, uint,
                            thread float* c) {
    KVQ_UNROLL for (uint e = 0; e < E; ++e) {
      const uint bit = (i + e) * BITS;
      uint code = words[bit / 32] >> (bit % 32);
      if (bit % 32 + BITS > 32) code |= words[bit / 32 + 1] << (32 - bit % 32);
      c[e] = table[code & ((1u << BITS) - 1)];
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
  template <uint E>
  static inline void unpack(thread const uint* words, uint i, threadgroup const float*, uint,
                            thread float* c) {
    KVQ_UNROLL for (uint e = 0; e < E; ++e) { c[e] = value(words, i + e, S(0)); }
  }

 private:
  static inline float value(thread const uint* words, uint i, float) {
    return as_type<float>(words[i]);
  }
  static inline float value(thread const uint* words, uint i, half) {
    return float(as_type<half>(ushort(words[i / 2] >> (16 * (i % 2)))));
  }
  static inline float value(thread const uint* words, uint i, bfloat) {
    return as_type<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
  }
};

constexpr uint kvq_least(uint a, uint b) { return a < b ? a : b; }
constexpr uint kvq_most(uint a, uint b) { return a < b ? b : a; }

/// Largest power of two that divides x, at most limit (a power of two).
constexpr uint kvq_power(uint x, uint limit) {
  uint power = limit;
  while (x % power != 0) power /= 2;
  return power;
}

/// What the address of a chunk of `bytes` bytes is a multiple of.
template <typename F, bool ALIGNED>
constexpr uint kvq_alignment(uint bytes) {
  return ALIGNED ? kvq_power(bytes, F::kAlign) : 1;
}

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
