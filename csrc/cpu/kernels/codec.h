// Encode or decode vectors in any format.
#pragma once

#include "affine.h"
#include "decode.h"
#include "fp8.h"
#include "gguf.h"
#include "kernels.h"
#include "turboquant.h"

namespace kvq::cpu::KVQ_ISA {

/// Centred and rotated rows to their packed forms.
inline void encode_rows(const Batch& batch, const Layout& layout, KvqEncoder encoder) {
  switch (layout.family) {
    case KVQ_FAMILY_AFFINE:
      if (layout.bits == 8) return encode_affine<8>(batch, layout);
      if (layout.bits == 4) return encode_affine<4>(batch, layout);
      return encode_affine<2>(batch, layout);
    case KVQ_FAMILY_FP8_E4M3:
      return encode_fp8<E4M3>(batch, layout);
    case KVQ_FAMILY_FP8_E5M2:
      return encode_fp8<E5M2>(batch, layout);
    case KVQ_FAMILY_Q8_0:
      return encode_q8_0(batch, layout);
    case KVQ_FAMILY_Q4_0:
      return encode_q4_0(batch, layout);
    case KVQ_FAMILY_TURBOQUANT:
      switch (layout.bits) {
        case 2:
          return encode_turboquant<2>(batch, layout, encoder);
        case 3:
          return encode_turboquant<3>(batch, layout, encoder);
        case 4:
          return encode_turboquant<4>(batch, layout, encoder);
        case 5:
          return encode_turboquant<5>(batch, layout, encoder);
        case 6:
          return encode_turboquant<6>(batch, layout, encoder);
        default:
          return encode_turboquant<8>(batch, layout, encoder);
      }
    case KVQ_FAMILY_NONE:
      for (int r = 0; r < batch.rows; ++r) {
        store_row(batch.y + r * layout.head_dim, layout.codes_dtype, layout.head_dim,
                  batch.codes[r], batch.saturate);
      }
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
