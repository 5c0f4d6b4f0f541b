// Reading a vector to be packed, and finding where it goes: shared by quantize and append.
#pragma once

#include "dense.h"
#include "fwht.h"

/// Where the tokens of one batch row go.
struct Slots {
  int64_t first;     ///< slot of token `begin`
  int64_t capacity;  ///< slots of the cache
  int begin;         ///< first token that is written
  int end;           ///< one past the last
  bool ring;

  /// The slot of a token, or -1 where nothing is written: out of range (the host cannot know
  /// without waiting for the GPU), or overwritten by a later token of the same call.
  int64_t of(int t) const thread {
    const int64_t slot = first + (t - begin);
    const int64_t inside = slot < capacity ? slot : (ring ? slot - capacity : -1l);
    return t >= begin && t < end ? inside : -1l;
  }
};

inline Slots slots_of(constant KvqWriteParams& params, const device int* position, int b,
                      int64_t capacity) {
  int64_t first = params.position;
  if (params.position_bytes == 8) {
    first = ((const device int64_t*)position)[b * params.position_stride];
  } else if (params.position_bytes == 4) {
    first = position[b * params.position_stride];
  }
  Slots slots;
  slots.ring = params.ring != 0;
  slots.capacity = capacity;
  slots.begin = 0;
  slots.end = first < 0 || first > 0x7fffffffffffffff - params.tokens ? 0 : params.tokens;
  if (slots.ring && slots.end > 0) {
    slots.begin = capacity < params.tokens ? params.tokens - int(capacity) : 0;
    first = capacity > 0 ? (first + slots.begin) % capacity : 0;
  }
  slots.first = first;
  return slots;
}

/// x, centred, bounded and rotated, into the lanes' registers: what the encoders see. Zeros where
/// there is no such element.
template <typename T>
inline void load_lanes(const device T* x, const device float* signs, const device float* mean,
                       thread const Place& at, int block, float norm, bool bounded, bool rotate,
                       bool centre, thread float* v) {
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (256 * pass >= at.dim) continue;
    thread float* part = v + 8 * pass;
    KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] = 0.0f;
    if (!at.holds(pass)) continue;
    const int first = at.first + 256 * pass;
    load8(x + first, at.wide, part);
    float other[8];
    if (centre) {
      load8(mean + first, at.wide, other);
      KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] -= other[i];
    }
    if (bounded) {
      float largest = 0.0f;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) largest = max(largest, fabs(part[i]));
      if (largest > KVQ_ROTATED_LIMIT) {
        KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] = bound(part[i], KVQ_ROTATED_LIMIT);
      }
    }
    if (rotate) {
      load8(signs + first, at.wide, other);
      KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] *= other[i];
    }
  }
  if (rotate) fwht_lanes(v, at, block, norm);
}

/// Writes a vector of format none, one simdgroup each, through its row of threadgroup memory.
template <typename T>
inline void copy_row(const device T* x, const device float* signs, const device float* mean,
                     constant KvqWriteSide& side, threadgroup float* row, uint lane, bool rotate,
                     bool centre, thread const Target& out) {
  const int n = side.head_dim;
  for (int i = int(lane); i < n; i += 32) {
    float v = float(x[i]);
    if (centre) {
      v -= mean[i];
    }
    if (rotate) {
      v = bound(v, KVQ_ROTATED_LIMIT);
      v *= signs[i];
    }
    row[i] = v;
  }
  if (rotate) {
    fwht(row, lane, n, side.block, side.norm);
  }
  Dense::encode(row, lane, n, out);
}

/// Slot 0 of a head.
inline Target target_of(device uchar* codes, device uchar* scales, device uchar* biases,
                        constant KvqWriteSide& side, int b, int g, bool dense, bool rotate) {
  const int64_t scale_size = side.scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size = !dense ? 1 : side.codes_dtype == KVQ_FLOAT32 ? 4 : 2;
  Target out;
  out.codes = codes + code_size * (b * side.codes.batch + g * side.codes.head);
  out.scales = scales + scale_size * (b * side.scales.batch + g * side.scales.head);
  out.biases = biases + scale_size * (b * side.biases.batch + g * side.biases.head);
  out.codes_step = side.codes_step;
  out.scale_dtype = side.scale_dtype;
  out.codes_dtype = side.codes_dtype;
  out.unbiased = side.encoder == KVQ_ENCODER_UNBIASED;
  out.saturate = rotate;
  return out;
}

inline Target slot_target(thread const Target& head, constant KvqWriteSide& side, int64_t slot,
                          bool dense) {
  const int64_t scale_size = head.scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size = !dense ? 1 : head.codes_dtype == KVQ_FLOAT32 ? 4 : 2;
  Target out = head;
  out.codes += code_size * (slot * side.codes.token);
  out.scales += scale_size * (slot * side.scales.token);
  out.biases += scale_size * (slot * side.biases.token);
  return out;
}
