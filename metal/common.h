// What the kernels of packed rows share: exact arithmetic, dtypes, and how work is laid out.
//
// Layout: two lanes share 32 elements of a vector; of each 16 the first lane holds the first 8, its
// neighbour the next 8. So lanes side by side access memory side by side, a lane has one group, and
// a simdgroup takes several vectors of up to 256 elements. A vector of more than 512 is taken in
// passes of 512. Groups, blocks of 32 and Hadamard blocks begin at multiples of their size, so that
// shuffles by a power of two stay inside. Rows of format none and vectors of the hadamard op may
// have any length: where they are not wide, lane j works on elements j, j + 32, ... (dense.h,
// fwht.h).
//
// Exactness: codes, scales and biases equal torch_kvq/reference.py byte for byte, which wants one
// rounding per written operation, so no contraction to fma and no fast math. NaN is told by its
// bits. (Metal may flush float32 subnormals to zero: there alone results may differ.)
#pragma once

#include <metal_stdlib>

#include "../csrc/shared/params.h"

#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)

using namespace metal;

inline bool is_nan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }

/// x within [-limit, limit]; NaN stays NaN.
inline float bound(float x, float limit) { return x > limit ? limit : (x < -limit ? -limit : x); }

/// Rounded to what a scale of this dtype stores: saturating, with one NaN.
inline float round_scale(float x, int dtype) {
  if (is_nan(x)) {
    return as_type<float>(0x7fc00000u);
  }
  if (dtype == KVQ_FLOAT16) {
    return float(half(bound(x, KVQ_F16_MAX)));
  }
  if (dtype == KVQ_BFLOAT16) {
    const uint u = as_type<uint>(x);
    return as_type<float>((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
  }
  return x;
}

/// x comes from round_scale.
inline void store_scale(device uchar* scales, int i, int dtype, float x) {
  if (dtype == KVQ_FLOAT16) {
    ((device ushort*)scales)[i] = is_nan(x) ? ushort(0x7e00) : as_type<ushort>(half(x));
  } else if (dtype == KVQ_BFLOAT16) {
    ((device ushort*)scales)[i] = ushort(as_type<uint>(x) >> 16);
  } else {
    ((device float*)scales)[i] = x;
  }
}

inline float load_float(const device uchar* p, int64_t i, int dtype) {
  if (dtype == KVQ_FLOAT16) {
    return float(((const device half*)p)[i]);
  }
  if (dtype == KVQ_BFLOAT16) {
    return as_type<float>(uint(((const device ushort*)p)[i]) << 16);
  }
  return ((const device float*)p)[i];
}

/// A float32 value as T; a finite one too large for half saturates.
template <typename T>
inline T to_dtype(float x) {
  return T(x);
}
template <>
inline half to_dtype<half>(float x) {
  return half(bound(x, KVQ_F16_MAX));
}

/// Where one vector is packed to.
struct Target {
  device uchar* codes;
  device uchar* scales;
  device uchar* biases;
  int64_t codes_step;
  int scale_dtype;
  int codes_dtype;
  bool unbiased;  ///< KVQ_ENCODER_UNBIASED
  bool saturate;  ///< format none: values too large for float16 saturate
};

/// Where one vector is unpacked from.
struct Source {
  const device uchar* codes;
  const device uchar* scales;
  const device uchar* biases;
  int scale_dtype;
  int codes_dtype;
};

/// Elements of a lane in one pass over a vector, elements of such a pass, and most passes:
/// registers are arrays of KVQ_VALUES elements, indexed by constants.
#define KVQ_WIDTH 16
#define KVQ_SPAN 512
#define KVQ_PASSES 2
#define KVQ_VALUES 32
#define KVQ_UNROLL _Pragma("clang loop unroll(full)")
/// Unrolling would take registers for nothing.
#define KVQ_ROLLED _Pragma("clang loop unroll(disable)")

/// The lane's part of a vector.
struct Place {
  int dim;      ///< elements of the vector
  int first;    ///< the lane's first element; of pass p, first + KVQ_SPAN * p
  int vector;   ///< number of the vector among those of the simdgroup
  uint lane;    ///< in the simdgroup
  bool odd;     ///< second of the two lanes that share 32 elements
  bool exists;  ///< whether the simdgroup takes so many vectors
  bool active;  ///< whether there is such a vector
  bool wide;    ///< rows start at addresses that vector accesses need
  uint table;   ///< the lane's entry of the codec's table

  /// First of the lane's elements in a pass: of the first eight, or of the second, 16 further on.
  int element(int pass, int eight) const thread { return first + KVQ_SPAN * pass + 2 * eight; }
  bool holds(int pass, int eight) const thread {
    return active && (is_filled() || element(pass, eight) < dim);
  }

  /// First of the 16 neighbouring elements whose codes the lane loads and stores.
  int sixteen(int pass) const thread { return first + KVQ_SPAN * pass + (odd ? 8 : 0); }
  bool packs(int pass) const thread { return active && (is_filled() || sixteen(pass) < dim); }

  /// Whether every lane of a vector has 16 of its elements.
  bool is_filled() const thread { return dim % 32 == 0 && dim <= KVQ_SPAN; }
};

inline int lanes_of(int dim) { return (dim + 31) / 32 * 2; }

/// Number of the thread's simdgroup in its row of the grid (csrc/mps/rows.h).
inline int simdgroup_in_row(uint3 at) { return int(at.x / 32u); }

/// Vectors that a simdgroup takes at once (csrc/mps/rows.h).
inline int vectors_per_simdgroup(int dim) { return lanes_of(dim) > 32 ? 1 : 32 / lanes_of(dim); }

/// Whether a simdgroup takes a row of format none of any length (csrc/mps/rows.h).
inline bool takes_any_row(int family, bool wide) { return family == KVQ_FAMILY_NONE && !wide; }

inline Place place_of(int dim, uint lane, bool wide) {
  const int lanes = min(lanes_of(dim), 32);
  Place at;
  at.dim = dim;
  at.vector = int(lane) / lanes;
  at.lane = lane;
  at.odd = (lane & 1u) != 0u;
  at.first = (int(lane) - at.vector * lanes) / 2 * 32 + (at.odd ? 8 : 0);
  at.exists = vectors_per_simdgroup(dim) * lanes == 32 || at.vector < vectors_per_simdgroup(dim);
  at.active = at.exists;
  at.wide = wide;
  at.table = 0u;
  return at;
}

/// Eight values as they lie in memory: in as many words as they take.
inline void load_words(const device float* from, bool wide, thread uint* words) {
  if (wide) {
    KVQ_UNROLL for (int i = 0; i < 2; ++i) {
      const uint4 v = reinterpret_cast<const device uint4*>(from)[i];
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) words[i] = as_type<uint>(from[i]);
  }
}
inline void load_words(const device ushort* from, bool wide, thread uint* words) {
  if (wide) {
    const uint4 v = *reinterpret_cast<const device uint4*>(from);
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  } else {
    KVQ_UNROLL for (int i = 0; i < 4; ++i) {
      words[i] = uint(from[2 * i]) | (uint(from[2 * i + 1]) << 16);
    }
  }
}
inline void load_words(const device half* from, bool wide, thread uint* words) {
  load_words(reinterpret_cast<const device ushort*>(from), wide, words);
}
inline void load_words(const device bfloat* from, bool wide, thread uint* words) {
  load_words(reinterpret_cast<const device ushort*>(from), wide, words);
}

/// Value i of them.
template <typename T>
inline float value_at(thread const uint* words, int i) {
  return as_type<float>(words[i]);
}
template <>
inline float value_at<half>(thread const uint* words, int i) {
  return float(as_type<half>(ushort(words[i / 2] >> (16 * (i % 2)) & 0xffffu)));
}
template <>
inline float value_at<bfloat>(thread const uint* words, int i) {
  return as_type<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
}

template <typename T>
inline void load8(const device T* from, bool wide, thread float* x) {
  uint words[8];
  load_words(from, wide, words);
  KVQ_UNROLL for (int i = 0; i < 8; ++i) x[i] = value_at<T>(words, i);
}

inline void store8(device float* to, bool wide, thread const float* x, bool = true) {
  if (wide) {
    KVQ_UNROLL for (int i = 0; i < 2; ++i) {
      reinterpret_cast<device float4*>(to)[i] =
          float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    }
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) to[i] = x[i];
  }
}
/// float32 values as half; those that are too large saturate, or become infinite.
inline void store8(device half* to, bool wide, thread const float* x, bool saturate = true) {
  float largest = 0.0f;
  KVQ_UNROLL for (int i = 0; i < 8; ++i) largest = max(largest, fabs(x[i]));
  const bool saturates = saturate && largest > KVQ_F16_MAX;
  uint words[4];
  KVQ_UNROLL for (int i = 0; i < 4; ++i) {
    words[i] = as_type<uint>(half2(half(x[2 * i]), half(x[2 * i + 1])));
  }
  if (saturates) {
    KVQ_UNROLL for (int i = 0; i < 4; ++i) {
      words[i] = as_type<uint>(
          half2(half(bound(x[2 * i], KVQ_F16_MAX)), half(bound(x[2 * i + 1], KVQ_F16_MAX))));
    }
  }
  if (wide) {
    *reinterpret_cast<device uint4*>(to) = uint4(words[0], words[1], words[2], words[3]);
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) {
      reinterpret_cast<device ushort*>(to)[i] = ushort(words[i / 2] >> (16 * (i % 2)));
    }
  }
}
inline void store8(device bfloat* to, bool wide, thread const float* x, bool = true) {
  ushort bits[8];
  KVQ_UNROLL for (int i = 0; i < 8; ++i) bits[i] = as_type<ushort>(bfloat(x[i]));
  if (wide) {
    uint words[4];
    KVQ_UNROLL for (int i = 0; i < 4; ++i) {
      words[i] = uint(bits[2 * i]) | (uint(bits[2 * i + 1]) << 16);
    }
    *reinterpret_cast<device uint4*>(to) = uint4(words[0], words[1], words[2], words[3]);
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) reinterpret_cast<device ushort*>(to)[i] = bits[i];
  }
}

/// Eight codes as a stream of bits, least significant first.
inline uint2 pack8(thread const uint* codes, int bits) {
  uint2 stream = uint2(0u, 0u);
  KVQ_UNROLL for (int i = 0; i < 8; ++i) {
    const int at = i * bits;
    if (at < 32) {
      stream.x |= codes[i] << at;
    } else {
      stream.y |= codes[i] << (at - 32);
    }
    if (at < 32 && at + bits > 32) stream.y |= codes[i] >> (32 - at);
  }
  return stream;
}

/// Added to a float, this leaves the nearest whole number, negative ones too, in the sum's last
/// bits.
#define KVQ_MAGIC 12582912.0f

/// Eight whole floats of 0 to 2^bits - 1, bits a power of two: sums of up to 16 bits are exact.
inline uint2 pack8(thread const float* codes, int bits) {
  const int each = 16 / bits;
  uint parts[4];
  KVQ_UNROLL for (int part = 0; part < 4; ++part) {
    parts[part] = 0u;
    if (part * each >= 8) continue;
    float sum = KVQ_MAGIC;
    KVQ_UNROLL for (int i = 0; i < 8; ++i) {
      if (i < each) sum = fma(codes[part * each + i], float(1 << (bits * i)), sum);
    }
    parts[part] = as_type<uint>(sum) & 0xffffu;
  }
  return uint2(parts[0] | (parts[1] << 16), parts[2] | (parts[3] << 16));
}

/// Code i of eight.
inline uint code_at(uint2 stream, int i, int bits) {
  const int at = i * bits;
  const uint low = at < 32 ? stream.x >> at : stream.y >> (at - 32);
  const bool both = at < 32 && at + bits > 32;
  return (both ? low | (stream.y << (32 - at)) : low) & ((1u << bits) - 1u);
}

/// Code i of eight as a float: in the last bits of 2^23 it counts as it is. Where it lies k bits
/// further up it counts 2^k times as much, so that most need no shift. (Bits: a power of two.) Of a
/// code's bits, `width` from `skip` on may be meant.
inline float float_of_code(uint2 stream, int i, int bits, int skip = 0, int width = 0) {
  const int from = i * bits / 16 * 16, at = i * bits - from + skip;
  const uint word = from < 32 ? stream.x : stream.y;
  const uint part = from % 32 == 0 ? word : word >> 16;
  const uint placed = (part & (((1u << (width > 0 ? width : bits)) - 1u) << at)) | 0x4b000000u;
  return fma(as_type<float>(placed), 1.0f / float(1 << at), -8388608.0f / float(1 << at));
}

/// The codes of a lane's first eight elements, and of the second: pieces of a row.
struct Pieces {
  uint2 piece[2];
};

/// What a lane has loaded of a packed vector.
struct Packed {
  Pieces codes;
  float scale;
  float bias;
};

inline Pieces no_pieces() {
  Pieces pieces;
  pieces.piece[0] = uint2(0u, 0u);
  pieces.piece[1] = uint2(0u, 0u);
  return pieces;
}

inline Packed nothing() {
  Packed packed;
  packed.codes = no_pieces();
  packed.scale = 0.0f;
  packed.bias = 0.0f;
  return packed;
}

/// Between the pieces of a lane's elements and those of 16 neighbouring ones, both ways: the two
/// lanes of 32 elements give each other what the other's row has.
inline Pieces exchanged(thread const Pieces& mine, thread const Place& at, int bits) {
  const uint2 send = at.odd ? mine.piece[0] : mine.piece[1];
  uint2 got = uint2(simd_shuffle_xor(send.x, ushort(1)), 0u);
  if (bits > 4) got.y = simd_shuffle_xor(send.y, ushort(1));
  Pieces pieces;
  pieces.piece[0] = at.odd ? got : mine.piece[0];
  pieces.piece[1] = at.odd ? mine.piece[1] : got;
  return pieces;
}

/// How sixteen codes of so many bits are aligned in a row that is.
inline int alignment(int bits, bool wide) {
  const int bytes = 2 * bits;
  return wide ? bytes & -bytes : 1;
}

/// Codes of 16 neighbouring elements, or of 8, as a stream of bytes in memory, `align` (1, 2, 4, 8
/// or 16) at a time.
inline void store_codes(device uchar* to, int bits, bool whole, int align,
                        thread const Pieces& pieces) {
  const uint2 a = pieces.piece[0], b = pieces.piece[1];
  const int shift = bits % 4 * 8;  // of the second piece in its first word
  uint words[4];
  if (bits <= 4) {
    words[0] = bits == 4 ? a.x : a.x | (b.x << shift);
    words[1] = bits == 4 ? b.x : b.x >> (32 - shift);
    words[2] = words[3] = 0u;
  } else {
    words[0] = a.x;
    words[1] = bits == 8 ? a.y : a.y | (b.x << shift);
    words[2] = bits == 8 ? b.x : (b.x >> (32 - shift)) | (b.y << shift);
    words[3] = bits == 8 ? b.y : b.y >> (32 - shift);
  }
  if (align == 16) {
    *reinterpret_cast<device uint4*>(to) = uint4(words[0], words[1], words[2], words[3]);
  } else if (align == 8) {
    *reinterpret_cast<device uint2*>(to) = uint2(words[0], words[1]);
  } else if (align == 4) {
    KVQ_UNROLL for (int i = 0; i < 4; ++i) {
      if (2 * i < bits) reinterpret_cast<device uint*>(to)[i] = words[i];
    }
  } else if (align == 2) {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) {
      const ushort part = ushort(words[i / 2] >> (16 * (i % 2)));
      if (i < bits) reinterpret_cast<device ushort*>(to)[i] = part;
    }
  } else {
    KVQ_UNROLL for (int i = 0; i < 16; ++i) {
      if (i < (whole ? 2 * bits : bits)) to[i] = uchar(words[i / 4] >> (8 * (i % 4)));
    }
  }
}
inline Pieces load_codes(const device uchar* from, int bits, bool whole, int align) {
  uint words[4] = {0u, 0u, 0u, 0u};
  if (align == 16) {
    const uint4 v = *reinterpret_cast<const device uint4*>(from);
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  } else if (align == 8) {
    const uint2 v = *reinterpret_cast<const device uint2*>(from);
    words[0] = v.x;
    words[1] = v.y;
  } else if (align == 4) {
    KVQ_UNROLL for (int i = 0; i < 4; ++i) {
      if (2 * i < bits) words[i] = reinterpret_cast<const device uint*>(from)[i];
    }
  } else if (align == 2) {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) {
      if (i >= bits) continue;
      words[i / 2] |= uint(reinterpret_cast<const device ushort*>(from)[i]) << (16 * (i % 2));
    }
  } else {
    KVQ_UNROLL for (int i = 0; i < 16; ++i) {
      if (i < (whole ? 2 * bits : bits)) words[i / 4] |= uint(from[i]) << (8 * (i % 4));
    }
  }
  const int shift = bits % 4 * 8;
  Pieces pieces = no_pieces();
  pieces.piece[0].x = words[0];
  if (bits == 4) {
    pieces.piece[1].x = words[1];
  } else if (bits < 4) {
    pieces.piece[1].x = (words[0] >> shift) | (words[1] << (32 - shift));
  } else if (bits == 8) {
    pieces.piece[0].y = words[1];
    pieces.piece[1] = uint2(words[2], words[3]);
  } else {
    pieces.piece[0].y = words[1];
    pieces.piece[1] = uint2((words[1] >> shift) | (words[2] << (32 - shift)),
                            (words[2] >> shift) | (words[3] << (32 - shift)));
  }
  return pieces;
}

/// Codecs without a table; those with one say the lane's entry, as a simdgroup holds it.
struct NoTable {
  using Row = Packed;  ///< what a lane loads of a vector, in one pass
  static uint encoder_entry(uint, int) { return 0u; }
  static uint decoder_entry(uint, int) { return 0u; }
};

/// Smallest and largest over aligned groups of lanes; NaN counts for nothing.
inline float group_min(float x, int lanes) {
  for (ushort distance = 1; int(distance) < lanes; distance *= 2) {
    x = min(x, simd_shuffle_xor(x, distance));
  }
  return x;
}
inline float group_max(float x, int lanes) {
  for (ushort distance = 1; int(distance) < lanes; distance *= 2) {
    x = max(x, simd_shuffle_xor(x, distance));
  }
  return x;
}

/// Smallest and largest of a lane's values, and largest magnitude; NaN counts for nothing.
inline float lane_min(thread const float* v) {
  float part[4] = {v[0], v[1], v[2], v[3]};
  KVQ_UNROLL for (int i = 4; i < KVQ_WIDTH; ++i) part[i % 4] = min(part[i % 4], v[i]);
  return min(min(part[0], part[1]), min(part[2], part[3]));
}
inline float lane_max(thread const float* v) {
  float part[4] = {v[0], v[1], v[2], v[3]};
  KVQ_UNROLL for (int i = 4; i < KVQ_WIDTH; ++i) part[i % 4] = max(part[i % 4], v[i]);
  return max(max(part[0], part[1]), max(part[2], part[3]));
}
inline float lane_peak(thread const float* v) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) part[i % 4] = max(part[i % 4], fabs(v[i]));
  return max(max(part[0], part[1]), max(part[2], part[3]));
}

/// Whether any of a lane's values is infinite or NaN. (The sum of finite ones may be, too.)
inline bool may_be_special(thread const float* v) {
  float part[4] = {v[0], v[1], v[2], v[3]};
  KVQ_UNROLL for (int i = 4; i < KVQ_WIDTH; ++i) part[i % 4] += v[i];
  const float sum = (part[0] + part[1]) + (part[2] + part[3]);
  return (as_type<uint>(sum) & 0x7f800000u) == 0x7f800000u;
}

/// Largest magnitude of a lane's values, which it bounds; infinite where one is NaN.
inline float bounded_peak(thread float* v) {
  float largest = lane_peak(v);
  if (may_be_special(v) || largest > KVQ_LIMIT) {
    largest = 0.0f;
    bool is_bad = false;
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      v[i] = bound(v[i], KVQ_LIMIT);
      is_bad = is_bad || is_nan(v[i]);
      largest = fabs(v[i]) > largest ? fabs(v[i]) : largest;
    }
    largest = is_bad ? INFINITY : largest;
  }
  return largest;
}

/// Divisors for which `quotient` is exact wherever a code can depend on it.
inline bool is_plain_divisor(float x) {
  return x >= 8.673617379884035e-19f && x <= 1.152921504606847e+18f;  // 2^-60 to 2^60
}

/// Whether at most 11 bits of it are set, as of a scale kept in 16 bits.
inline bool is_short_divisor(float x) { return (as_type<uint>(x) & 0x1fffu) == 0u; }

/// x / by, correctly rounded, from inverse = 1 / by: Markstein's sequence. For a short divisor one
/// correction does: what x lacks of by * q is exact then, and the quotient further (2^-36) from the
/// middle of two floats than the corrected one is from it (2^-47).
inline float quotient(float x, float by, float inverse, bool is_short) {
  const float q = x * inverse;
  const float better = fma(fma(-by, q, x), inverse, q);
  return is_short ? better : fma(fma(-by, better, x), inverse, better);
}

/// Divides by any scale: those beyond the range of `quotient` are brought into it, as is x, by a
/// power of two.
struct Divisor {
  float by;
  float inverse;
  float factor;
  bool is_short;

  float divide(float x) const thread { return quotient(x * factor, by, inverse, is_short); }
};

/// `down` is the power of two for large scales; no scale of dtype float16 needs one.
inline Divisor divisor_of(float scale, int dtype, float down) {
  const float up = 1.2379400392853803e27f;  // 2^90
  const bool is_plain = dtype == KVQ_FLOAT16 || is_plain_divisor(scale);
  Divisor divisor;
  divisor.factor = is_plain ? 1.0f : (scale < 1.0f ? up : down);
  divisor.by = scale * divisor.factor;
  divisor.inverse = 1.0f / divisor.by;
  divisor.is_short = dtype != KVQ_FLOAT32 || is_short_divisor(divisor.by);
  return divisor;
}

/// Sum over a simdgroup in the order reference._sum32 states; all lanes get it.
inline float sum32(float x) {
  for (ushort distance = 16; distance > 0; distance /= 2) {
    x += simd_shuffle_xor(x, distance);
  }
  return x;
}
