// Encode or decode one vector in any format.
#pragma once

#include "affine.h"
#include "decode.h"
#include "fp8.h"
#include "gguf.h"
#include "kernels.h"
#include "turboquant.h"

namespace kvq::cpu::KVQ_ISA {

/// Centred and rotated y (changed in place) to its packed row.
inline void encode_row(float* y, const Layout& layout, KvqEncoder encoder, char* codes,
                       char* scales, char* biases) {
  auto* bytes = reinterpret_cast<uint8_t*>(codes);
  switch (layout.family) {
    case KVQ_FAMILY_AFFINE:
      if (layout.bits == 8) return encode_affine<8>(y, layout, bytes, scales, biases);
      if (layout.bits == 4) return encode_affine<4>(y, layout, bytes, scales, biases);
      return encode_affine<2>(y, layout, bytes, scales, biases);
    case KVQ_FAMILY_FP8_E4M3:
      return encode_fp8<E4M3>(y, layout, bytes, scales);
    case KVQ_FAMILY_FP8_E5M2:
      return encode_fp8<E5M2>(y, layout, bytes, scales);
    case KVQ_FAMILY_Q8_0:
      return encode_q8_0(y, layout, bytes);
    case KVQ_FAMILY_Q4_0:
      return encode_q4_0(y, layout, bytes);
    case KVQ_FAMILY_TURBOQUANT:
      switch (layout.bits) {
        case 2:
          return encode_turboquant<2>(y, layout, encoder, bytes, scales);
        case 3:
          return encode_turboquant<3>(y, layout, encoder, bytes, scales);
        case 4:
          return encode_turboquant<4>(y, layout, encoder, bytes, scales);
        case 5:
          return encode_turboquant<5>(y, layout, encoder, bytes, scales);
        case 6:
          return encode_turboquant<6>(y, layout, encoder, bytes, scales);
        default:
          return encode_turboquant<8>(y, layout, encoder, bytes, scales);
      }
    case KVQ_FAMILY_NONE:
      return store_row(y, layout.codes_dtype, layout.head_dim, codes);
  }
}

/// A packed row to values in the stored (centred, rotated) domain.
inline void decode_row(const char* codes, const char* scales, const char* biases,
                       const Layout& layout, float* y) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
  switch (layout.family) {
    case KVQ_FAMILY_AFFINE:
      if (layout.bits == 8) return decode_affine<8>(bytes, scales, biases, layout, y);
      if (layout.bits == 4) return decode_affine<4>(bytes, scales, biases, layout, y);
      return decode_affine<2>(bytes, scales, biases, layout, y);
    case KVQ_FAMILY_FP8_E4M3:
      return decode_fp8<E4M3>(bytes, scales, layout, y);
    case KVQ_FAMILY_FP8_E5M2:
      return decode_fp8<E5M2>(bytes, scales, layout, y);
    case KVQ_FAMILY_Q8_0:
      return decode_q8_0(bytes, layout, y);
    case KVQ_FAMILY_Q4_0:
      return decode_q4_0(bytes, layout, y);
    case KVQ_FAMILY_TURBOQUANT:
      switch (layout.bits) {
        case 2:
          return decode_turboquant<2>(bytes, scales, layout, y);
        case 3:
          return decode_turboquant<3>(bytes, scales, layout, y);
        case 4:
          return decode_turboquant<4>(bytes, scales, layout, y);
        case 5:
          return decode_turboquant<5>(bytes, scales, layout, y);
        case 6:
          return decode_turboquant<6>(bytes, scales, layout, y);
        default:
          return decode_turboquant<8>(bytes, scales, layout, y);
      }
    case KVQ_FAMILY_NONE:
      return load_row(codes, layout.codes_dtype, layout.head_dim, y);
  }
}

}  // namespace kvq::cpu::KVQ_ISA
