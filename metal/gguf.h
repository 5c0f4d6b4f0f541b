// GGUF q8_0 and q4_0 blocks of 32: bytes equal to the gguf package's quantize
// (reference._encode_gguf). A block starts with its float16 scale, at any byte address.
#pragma once

#include "common.h"

inline ushort block_scale(float d) {
  const float rounded = round_scale(d, KVQ_FLOAT16);
  return is_nan(rounded) ? ushort(0x7e00) : as_type<ushort>(half(rounded));
}

inline float load_block_scale(const device uchar* block) {
  return float(as_type<half>(ushort(uint(block[0]) | (uint(block[1]) << 8))));
}

/// Blocks whose codes are zero bytes: with a NaN, or a scale so small that 1 / d overflows.
inline bool is_blank(bool has_nan, float inverse) {
  return has_nan || (as_type<uint>(inverse) & 0x7fffffffu) == 0x7f800000u;
}

/// Eight bytes at an even address, or at any.
inline uint2 load_eight(const device uchar* from, bool even) {
  uint2 bytes = uint2(0u, 0u);
  KVQ_UNROLL for (int i = 0; i < 4; ++i) {
    const uint pair = even ? uint(reinterpret_cast<const device ushort*>(from)[i])
                           : uint(from[2 * i]) | (uint(from[2 * i + 1]) << 8);
    if (i < 2) {
      bytes.x |= pair << (16 * i);
    } else {
      bytes.y |= pair << (16 * (i - 2));
    }
  }
  return bytes;
}

/// Puts the lane's part of a block together: its scale and, of each lane, eight bytes of codes, or
/// eight and the eight 16 further on. Where rows are whole words at multiples of four bytes, they
/// go through threadgroup memory, so that neighbouring lanes store neighbouring words.
template <int Bytes>
inline void store_block(thread const Place& at, int pass, thread const Target& out,
                        threadgroup float* rows, float d, uint2 first, uint2 second) {
  const int offset = at.element(pass, 0) / 32 * Bytes, mine = offset + 2 + at.first % 32;
  const uint parts[4] = {first.x, first.y, second.x, second.y};
  constexpr int count = Bytes == 34 ? 8 : 4;
  if (at.wide && at.dim % 64 == 0) {
    const int bytes = at.dim / 32 * Bytes, lanes = lanes_of(at.dim) > 32 ? 32 : lanes_of(at.dim);
    threadgroup uint* words =
        reinterpret_cast<threadgroup uint*>(rows) + at.vector * (at.dim / 32 * Bytes / 4);
    threadgroup ushort* row = reinterpret_cast<threadgroup ushort*>(words);
    const bool exists = at.exists && (at.is_filled() || at.element(pass, 0) < at.dim);
    if (exists) {
      if (!at.odd) row[offset / 2] = block_scale(d);
      KVQ_UNROLL for (int i = 0; i < count; ++i) {
        row[mine / 2 + (i < 4 ? i : i + 4)] = ushort(parts[i / 2] >> (16 * (i % 2)));
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (KVQ_SPAN * (pass + 1) >= at.dim) {
      const int lane = int(at.lane) - at.vector * lanes;
      KVQ_UNROLL for (int i = 0; i < 9; ++i) {
        const int word = lane + i * lanes;
        if (4 * i * lanes < bytes && at.active && 4 * word < bytes) {
          reinterpret_cast<device uint*>(out.codes)[word] = words[word];
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    return;
  }
  if (!at.holds(pass, 0)) return;
  device uchar* to = out.codes + mine;
  KVQ_UNROLL for (int i = 0; i < 2 * count; ++i) {
    const uchar byte = uchar(parts[i / 4] >> (8 * (i % 4)));
    const int place = i < 8 ? i : i + 8;
    if (at.wide) {
      if (i % 2 == 0) {
        reinterpret_cast<device ushort*>(to)[place / 2] =
            ushort(parts[i / 4] >> (8 * (i % 4)) & 0xffffu);
      }
    } else {
      to[place] = byte;
    }
  }
  if (!at.odd) {
    const ushort scale = block_scale(d);
    out.codes[offset] = uchar(scale & 0xffu);
    out.codes[offset + 1] = uchar(scale >> 8);
  }
}

struct Q8_0 : NoTable {
  static void encode(thread float* x, thread const Place& at, thread const Target& out, int, int,
                     threadgroup float* rows) {
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (KVQ_SPAN * pass >= at.dim) continue;
      thread float* v = x + KVQ_WIDTH * pass;
      const float largest = group_max(bounded_peak(v), 32 / KVQ_WIDTH);
      const bool has_nan = largest > KVQ_LIMIT;
      const float d = has_nan ? NAN : largest / 127.0f;
      float inverse = d == 0.0f ? 0.0f : 1.0f / d;
      if (is_blank(has_nan, inverse)) {
        inverse = 0.0f;
        KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) v[i] = 0.0f;
      }
      uint codes[KVQ_WIDTH];
      KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
        const float scaled = v[i] * inverse;
        // Half away from zero: the float before 0.5 is what leaves 0.49999997 at 0.
        codes[i] = uint(int(scaled + copysign(0.49999997f, scaled))) & 0xffu;
      }
      store_block<34>(at, pass, out, rows, d, pack8(codes, 8), pack8(codes + 8, 8));
    }
  }

  static Packed load(thread const Source& in, thread const Place& at, int pass, int, int) {
    const device uchar* block = in.codes + at.element(pass, 0) / 32 * 34;
    Packed packed = nothing();
    if (at.holds(pass, 0)) {
      packed.scale = load_block_scale(block);
      KVQ_UNROLL for (int i = 0; i < 2; ++i) {
        packed.codes.piece[i] = load_eight(block + 2 + at.first % 32 + 16 * i, at.wide);
      }
    }
    return packed;
  }

  static void decode(thread const Packed& packed, thread const Place&, int, thread float* y) {
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      const uint2 codes = packed.codes.piece[i / 8] ^ 0x80808080u;
      y[i] = (float_of_code(codes, i % 8, 8) - 128.0f) * packed.scale;
    }
  }
};

struct Q4_0 : NoTable {
  /// The block's first value of largest magnitude; bounds the values. Infinite where one is NaN.
  static float peak_of(thread float* v, thread const Place& at) {
    const float low = group_min(lane_min(v), 32 / KVQ_WIDTH);
    const float high = group_max(lane_max(v), 32 / KVQ_WIDTH);
    // Of zeros, too, the first one's sign counts.
    const bool is_plain =
        !may_be_special(v) && low >= -KVQ_LIMIT && high <= KVQ_LIMIT && low != -high;
    if (!simd_any(!is_plain)) return high > -low ? high : low;
    const float largest = group_max(bounded_peak(v), 32 / KVQ_WIDTH);
    // The sign of the first value of that magnitude.
    int first_at = 64;
    KVQ_UNROLL for (int i = KVQ_WIDTH - 1; i >= 0; --i) {
      const int mine = 2 * (at.first % 32 + (i < 8 ? i : i + 8)) + int(as_type<uint>(v[i]) >> 31);
      first_at = fabs(v[i]) == largest ? mine : first_at;
    }
    first_at = min(first_at, simd_shuffle_xor(first_at, ushort(1)));
    return first_at % 2 == 1 ? -largest : largest;
  }

  static void encode(thread float* x, thread const Place& at, thread const Target& out, int, int,
                     threadgroup float* rows) {
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (KVQ_SPAN * pass >= at.dim) continue;
      thread float* v = x + KVQ_WIDTH * pass;
      const float peak = peak_of(v, at);
      const bool has_nan = fabs(peak) > KVQ_LIMIT;
      const float d = has_nan ? NAN : peak * -0.125f;
      float inverse = d == 0.0f ? 0.0f : 1.0f / d;
      const bool blank = is_blank(has_nan, inverse);
      // A byte has the codes of two elements, 16 apart: those of the lane's first eight and second.
      uint codes[8];
      KVQ_UNROLL for (int i = 0; i < 8; ++i) {
        uint both[2];
        KVQ_UNROLL for (int half_of = 0; half_of < 2; ++half_of) {
          const float scaled =
              v[i + 8 * half_of] * inverse;  // rounded before the sum, as ggml's is
          both[half_of] = uint(min(max(scaled + 8.5f, 0.0f), 15.0f));
        }
        codes[i] = both[0] | (both[1] << 4);
      }
      const uint2 bytes = blank ? uint2(0u, 0u) : pack8(codes, 8);
      store_block<18>(at, pass, out, rows, d, bytes, uint2(0u, 0u));
    }
  }

  static Packed load(thread const Source& in, thread const Place& at, int pass, int, int) {
    const device uchar* block = in.codes + at.element(pass, 0) / 32 * 18;
    Packed packed = nothing();
    if (at.holds(pass, 0)) {
      packed.scale = load_block_scale(block);
      packed.codes.piece[0] = load_eight(block + 2 + at.first % 32, at.wide);
    }
    return packed;
  }

  static void decode(thread const Packed& packed, thread const Place&, int, thread float* y) {
    const uint2 pairs = packed.codes.piece[0];
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      y[i] = (float_of_code(pairs, i % 8, 8, i < 8 ? 0 : 4, 4) - 8.0f) * packed.scale;
    }
  }
};
