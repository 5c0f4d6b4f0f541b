// What the kernels of packed rows share: exact arithmetic, dtypes, and how work is laid out.
//
// Layout: a lane holds 8 neighbouring elements of a vector (kvq_head_dim / 8 lanes a vector, so a
// simdgroup takes several vectors of up to 128 elements), and of one longer than 256 the 8 elements
// 256 further on, too. Groups, blocks of 32 and Hadamard blocks begin at multiples of their size,
// so that shuffles by a power of two stay inside. Rows of format none and vectors of the hadamard
// op may have any length: there lane j works on elements j, j + 32, ... (dense.h, fwht.h).
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

/// Passes over a vector: registers are arrays of KVQ_PASSES * 8 elements, indexed by constants.
#define KVQ_PASSES 4
#define KVQ_UNROLL _Pragma("clang loop unroll(full)")
/// Unrolling would take registers for nothing.
#define KVQ_ROLLED _Pragma("clang loop unroll(disable)")

/// The lane's part of a vector.
struct Place {
  int dim;      ///< elements of the vector
  int first;    ///< the lane's first element; of pass p, first + 256 * p
  int vector;   ///< number of the vector among those of the simdgroup
  uint lane;    ///< in the simdgroup
  bool active;  ///< whether there is such a vector
  bool wide;    ///< rows start at addresses that vector accesses need

  bool holds(int pass) const thread { return active && first + 256 * pass < dim; }
};

/// Vectors that a simdgroup takes at once (csrc/mps/rows.h).
inline int vectors_per_simdgroup(int dim) { return dim % 8 != 0 || dim > 256 ? 1 : 256 / dim; }

/// Times that a simdgroup takes its number of vectors, of which `wanted` is the host's choice.
/// Rotation needs the registers that a loop would take (csrc/mps/rows.h).
inline int steps_of(int family, bool rotate, int wanted) {
  return rotate || family == KVQ_FAMILY_TURBOQUANT || family == KVQ_FAMILY_NONE ? 1 : wanted;
}

inline Place place_of(int dim, uint lane, bool wide) {
  const int lanes = dim > 256 ? 32 : dim / 8;
  Place at;
  at.dim = dim;
  at.vector = int(lane) / lanes;
  at.first = (int(lane) - at.vector * lanes) * 8;
  at.lane = lane;
  at.active = at.vector < vectors_per_simdgroup(dim);
  at.wide = wide;
  return at;
}

inline void load8(const device float* from, bool wide, thread float* x) {
  if (wide) {
    KVQ_UNROLL for (int i = 0; i < 2; ++i) {
      const float4 v = reinterpret_cast<const device float4*>(from)[i];
      x[4 * i] = v.x;
      x[4 * i + 1] = v.y;
      x[4 * i + 2] = v.z;
      x[4 * i + 3] = v.w;
    }
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) x[i] = from[i];
  }
}
inline float float_of_half(uint bits) { return float(as_type<half>(ushort(bits & 0xffffu))); }
inline float float_of_bfloat(uint bits) { return as_type<float>(bits << 16); }
inline void load8(const device half* from, bool wide, thread float* x) {
  if (wide) {
    const uint4 v = *reinterpret_cast<const device uint4*>(from);
    const uint words[4] = {v.x, v.y, v.z, v.w};
    KVQ_UNROLL for (int i = 0; i < 8; ++i) x[i] = float_of_half(words[i / 2] >> (16 * (i % 2)));
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) x[i] = float(from[i]);
  }
}
inline void load8(const device bfloat* from, bool wide, thread float* x) {
  if (wide) {
    const uint4 v = *reinterpret_cast<const device uint4*>(from);
    const uint words[4] = {v.x, v.y, v.z, v.w};
    KVQ_UNROLL for (int i = 0; i < 8; ++i) x[i] = float_of_bfloat(words[i / 2] >> (16 * (i % 2)));
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) x[i] = float(from[i]);
  }
}

inline void store8(device float* to, bool wide, thread const float* x) {
  if (wide) {
    KVQ_UNROLL for (int i = 0; i < 2; ++i) {
      reinterpret_cast<device float4*>(to)[i] =
          float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    }
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) to[i] = x[i];
  }
}
/// Eight 16-bit values.
inline void store8(device ushort* to, bool wide, thread const ushort* x) {
  if (wide) {
    uint words[4];
    KVQ_UNROLL for (int i = 0; i < 4; ++i) words[i] = uint(x[2 * i]) | (uint(x[2 * i + 1]) << 16);
    *reinterpret_cast<device uint4*>(to) = uint4(words[0], words[1], words[2], words[3]);
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) to[i] = x[i];
  }
}
/// float32 values as half; finite ones that are too large saturate.
inline void store8(device half* to, bool wide, thread const float* x) {
  float largest = 0.0f;
  KVQ_UNROLL for (int i = 0; i < 8; ++i) largest = max(largest, fabs(x[i]));
  ushort bits[8];
  KVQ_UNROLL for (int i = 0; i < 8; ++i) bits[i] = as_type<ushort>(half(x[i]));
  if (largest > KVQ_F16_MAX) {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) {
      bits[i] = as_type<ushort>(half(bound(x[i], KVQ_F16_MAX)));
    }
  }
  store8(reinterpret_cast<device ushort*>(to), wide, bits);
}
inline void store8(device bfloat* to, bool wide, thread const float* x) {
  ushort bits[8];
  KVQ_UNROLL for (int i = 0; i < 8; ++i) bits[i] = as_type<ushort>(bfloat(x[i]));
  store8(reinterpret_cast<device ushort*>(to), wide, bits);
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

/// Code i of eight.
inline uint code_at(uint2 stream, int i, int bits) {
  const int at = i * bits;
  const uint low = at < 32 ? stream.x >> at : stream.y >> (at - 32);
  const bool both = at < 32 && at + bits > 32;
  return (both ? low | (stream.y << (32 - at)) : low) & ((1u << bits) - 1u);
}

/// A code as a float: in the last bits of 2^23 it counts as it is.
inline float float_of_code(uint code) { return as_type<float>(code | 0x4b000000u) - 8388608.0f; }

/// Bytes of a stream to and from memory, `align` bytes at a time (1, 2, 4 or 8).
inline void store_bytes(device uchar* to, int bytes, int align, uint2 stream) {
  if (align == 8) {
    *reinterpret_cast<device uint2*>(to) = stream;
  } else if (align == 4) {
    *reinterpret_cast<device uint*>(to) = stream.x;
  } else if (align == 2) {
    KVQ_UNROLL for (int i = 0; i < 4; ++i) {
      const uint word = i < 2 ? stream.x : stream.y;
      if (2 * i < bytes) reinterpret_cast<device ushort*>(to)[i] = ushort(word >> (16 * (i % 2)));
    }
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) {
      const uint word = i < 4 ? stream.x : stream.y;
      if (i < bytes) to[i] = uchar(word >> (8 * (i % 4)));
    }
  }
}
inline uint2 load_bytes(const device uchar* from, int bytes, int align) {
  uint2 stream = uint2(0u, 0u);
  if (align == 8) {
    stream = *reinterpret_cast<const device uint2*>(from);
  } else if (align == 4) {
    stream.x = *reinterpret_cast<const device uint*>(from);
  } else if (align == 2) {
    KVQ_UNROLL for (int i = 0; i < 4; ++i) {
      if (2 * i >= bytes) continue;
      const uint word = uint(reinterpret_cast<const device ushort*>(from)[i]) << (16 * (i % 2));
      stream.x |= i < 2 ? word : 0u;
      stream.y |= i < 2 ? 0u : word;
    }
  } else {
    KVQ_UNROLL for (int i = 0; i < 8; ++i) {
      if (i >= bytes) continue;
      const uint word = uint(from[i]) << (8 * (i % 4));
      stream.x |= i < 4 ? word : 0u;
      stream.y |= i < 4 ? 0u : word;
    }
  }
  return stream;
}
/// How eight codes of so many bits are aligned in a row that is.
inline int alignment(int bits, bool wide) { return wide ? bits & -bits : 1; }

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

/// Whether any of eight values is infinite or NaN. (The sum of finite ones may be infinite, too.)
inline bool may_be_special(thread const float* x) {
  float sum = 0.0f;
  KVQ_UNROLL for (int i = 0; i < 8; ++i) sum += x[i];
  return (as_type<uint>(sum) & 0x7f800000u) == 0x7f800000u;
}

/// Divisors for which `quotient` is exact wherever a code can depend on it.
inline bool is_plain_divisor(float x) {
  return x >= 8.673617379884035e-19f && x <= 1.152921504606847e+18f;  // 2^-60 to 2^60
}

/// x / by, correctly rounded, from inverse = 1 / by: Markstein's sequence.
inline float quotient(float x, float by, float inverse) {
  const float q = x * inverse;
  const float better = fma(fma(-by, q, x), inverse, q);
  return fma(fma(-by, better, x), inverse, better);
}

/// Sum over a simdgroup in the order reference._sum32 states; all lanes get it.
inline float sum32(float x) {
  for (ushort distance = 16; distance > 0; distance /= 2) {
    x += simd_shuffle_xor(x, distance);
  }
  return x;
}
