// Reading a vector to be packed, and finding where it goes: shared by quantize and append.
#pragma once

#include "fwht.h"

/// The slot of token t of batch row b, or -1 where nothing is written: out of range (the host
/// cannot know without waiting for the GPU), or overwritten by a later token of the same call.
inline int64_t slot_of(constant KvqWriteParams& params, const device int* position, int b, int t,
                       int64_t capacity) {
  int64_t first = params.position;
  if (params.position_bytes == 8) {
    first = ((const device int64_t*)position)[b * params.position_stride];
  } else if (params.position_bytes == 4) {
    first = position[b * params.position_stride];
  }
  if (first < 0 || first > 0x7fffffffffffffff - params.tokens) {
    return -1;
  }
  if (params.ring != 0) {
    return t + capacity < params.tokens ? -1 : (first + t) % capacity;
  }
  return first < capacity - t ? first + t : -1;
}

/// x, centred, bounded and rotated, into the simdgroup's row: what the encoders see.
template <typename T>
inline void load_row(const device T* x, const device float* signs, const device float* mean,
                     constant KvqWriteSide& side, threadgroup float* row, uint lane, bool bounded,
                     bool rotate, bool centre) {
  const int n = side.head_dim;
  for (int i = int(lane); i < n; i += 32) {
    float v = float(x[i]);
    if (centre) {
      v -= mean[i];
    }
    if (bounded) {
      v = bound(v, KVQ_ROTATED_LIMIT);
    }
    if (rotate) {
      v *= signs[i];
    }
    row[i] = v;
  }
  if (rotate) {
    fwht(row, lane, n, side.block, side.norm);
  }
}

inline Target target_of(device uchar* codes, device uchar* scales, device uchar* biases,
                        constant KvqWriteSide& side, int b, int g, int64_t slot, bool dense,
                        bool rotate) {
  const int64_t scale_size = side.scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size = !dense ? 1 : side.codes_dtype == KVQ_FLOAT32 ? 4 : 2;
  Target out;
  out.codes =
      codes + code_size * (b * side.codes.batch + g * side.codes.head + slot * side.codes.token);
  out.scales = scales + scale_size * (b * side.scales.batch + g * side.scales.head +
                                      slot * side.scales.token);
  out.biases = biases + scale_size * (b * side.biases.batch + g * side.biases.head +
                                      slot * side.biases.token);
  out.codes_step = side.codes_step;
  out.scale_dtype = side.scale_dtype;
  out.codes_dtype = side.codes_dtype;
  out.unbiased = side.encoder == KVQ_ENCODER_UNBIASED;
  out.saturate = rotate;
  return out;
}
