// TurboQuant: a rotated vector as Lloyd-Max codes and one norm (reference._encode_turboquant).
#pragma once

#include <cmath>
#include <cstdint>

#include "../../shared/codebooks.h"
#include "convert.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int64_t kMaxHeadDim = 1024;

inline const float* codebook(int bits) {
  switch (bits) {
    case 2:
      return kvq_codebook_2;
    case 3:
      return kvq_codebook_3;
    case 4:
      return kvq_codebook_4;
    case 5:
      return kvq_codebook_5;
    case 6:
      return kvq_codebook_6;
    default:
      return kvq_codebook_8;
  }
}

inline const float* boundaries(int bits) {
  switch (bits) {
    case 2:
      return kvq_boundaries_2;
    case 3:
      return kvq_boundaries_3;
    case 4:
      return kvq_boundaries_4;
    case 5:
      return kvq_boundaries_5;
    case 6:
      return kvq_boundaries_6;
    default:
      return kvq_boundaries_8;
  }
}

/// Sum of a[i] * b[i] in the order of reference._sum32: 32 lanes, then a butterfly.
inline float dot32(const float* a, const float* b, int64_t n) {
  float lane[32] = {};
  for (int64_t i = 0; i < n; i += 32) {
    const int64_t count = n - i < 32 ? n - i : 32;
    for (int64_t j = 0; j < count; ++j) lane[j] += a[i + j] * b[i + j];
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    for (int j = 0; j < distance; ++j) lane[j] += lane[j + distance];
  }
  return lane[0];
}

/// Dense LSB-first packing of 8 codes into Bits bytes.
template <int Bits>
inline void pack8(const uint8_t* q, uint8_t* out) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(q[i]) << (i * Bits);
  for (int i = 0; i < Bits; ++i) out[i] = static_cast<uint8_t>(word >> (8 * i));
}

template <int Bits>
inline void unpack8(const uint8_t* in, uint8_t* q) {
  uint64_t word = 0;
  for (int i = 0; i < Bits; ++i) word |= static_cast<uint64_t>(in[i]) << (8 * i);
  for (int i = 0; i < 8; ++i) q[i] = static_cast<uint8_t>(word >> (i * Bits)) & ((1 << Bits) - 1);
}

template <int Bits>
void encode_turboquant(const float* y, const Layout& layout, KvqEncoder encoder, uint8_t* codes,
                       char* scales) {
  const int64_t n = layout.head_dim;
  const float squares = dot32(y, y, n);
  const float norm =
      store_scale(scales, 0, layout.scale_dtype, std::sqrt(squares / static_cast<float>(n)));
  if (norm != norm) {
    std::memset(codes, 0, n * Bits / 8);
    return;
  }
  const float divisor = norm == 0 ? 1.0f : norm;
  const float* edge = boundaries(Bits);
  uint8_t q[kMaxHeadDim];
  for (int64_t i = 0; i < n; ++i) {
    const float z = y[i] / divisor;
    int code = 0;  // how many boundaries lie below z
    for (int step = 1 << (Bits - 1); step > 0; step /= 2) {
      code += z > edge[code + step - 1] ? step : 0;
    }
    q[i] = static_cast<uint8_t>(code);
  }
  for (int64_t i = 0; i < n; i += 8) pack8<Bits>(q + i, codes + i * Bits / 8);
  if (encoder == KVQ_ENCODER_UNBIASED) {
    float centroid[kMaxHeadDim];
    for (int64_t i = 0; i < n; ++i) centroid[i] = codebook(Bits)[q[i]];
    const float dot = dot32(y, centroid, n);
    if (dot > 0) store_scale(scales, 0, layout.scale_dtype, squares / dot);
  }
}

template <int Bits>
void decode_turboquant(const uint8_t* codes, const char* scales, const Layout& layout, float* y) {
  const float norm = load_scale(scales, 0, layout.scale_dtype);
  const float* table = codebook(Bits);
  for (int64_t i = 0; i < layout.head_dim; i += 8) {
    uint8_t q[8];
    unpack8<Bits>(codes + i * Bits / 8, q);
    for (int j = 0; j < 8; ++j) y[i + j] = table[q[j]] * norm;
  }
}

}  // namespace kvq::cpu::KVQ_ISA
