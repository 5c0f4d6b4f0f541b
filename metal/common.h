// What the kernels of packed rows share: exact arithmetic, dtypes, and how work is laid out.
//
// Layout: one simdgroup works on one vector of D elements. Lane j owns elements j, j + 32,
// j + 64, ..., which it keeps in its simdgroup's row of threadgroup memory: registers that can be
// indexed, so that one kernel serves every D. Only pack_row reads what other lanes wrote.
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

/// The row's n codes, small whole numbers, as a dense stream of bits, least significant first.
inline void pack_row(const threadgroup float* row, uint lane, int n, int bits,
                     device uchar* codes) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int byte = int(lane); byte < n * bits / 8; byte += 32) {
    int i = byte * 8 / bits;
    uint stream = uint(row[i]) >> (byte * 8 - i * bits);
    for (int filled = (i + 1) * bits - byte * 8; filled < 8; filled += bits) {
      stream |= uint(row[++i]) << filled;
    }
    codes[byte] = uchar(stream & 0xffu);
  }
}

/// Codes i to i + 3 of a dense stream of bits, for i a multiple of 4; 3 bits: of 8 per 3 bytes.
inline uint unpack4(const device uchar* codes, int i, int bits) {
  const int first = i * bits;
  uint stream = 0u;
  for (int byte = first >> 3; byte <= (first + 4 * bits - 1) >> 3; ++byte) {
    const int shift = byte * 8 - first;
    stream |= shift < 0 ? uint(codes[byte]) >> -shift : uint(codes[byte]) << shift;
  }
  return stream;
}

inline uint code_at(uint stream, int j, int bits) {
  return (stream >> (j * bits)) & ((1u << bits) - 1u);
}

/// Sum over a simdgroup in the order reference._sum32 states; all lanes get it.
inline float sum32(float x) {
  for (ushort distance = 16; distance > 0; distance /= 2) {
    x += simd_shuffle_xor(x, distance);
  }
  return x;
}
