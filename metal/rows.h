// Reading a vector to be packed, and finding where it goes: shared by quantize and append.
#pragma once

#include "dense.h"
#include "fwht.h"

/// Where the tokens of one batch row go: nowhere, out of range (the host cannot know without
/// waiting for the GPU) or where a later token of the same call overwrites one.
struct Slots {
  int64_t first;     ///< slot of token `begin`
  int64_t capacity;  ///< slots of the cache
  int begin;         ///< first token that is written
  int end;           ///< one past the last
  bool ring;
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
  slots.end = params.tokens;
  if (first < 0 || first > (slots.ring ? 0x7fffffffffffffff - params.tokens : capacity)) {
    slots.end = 0;
    first = 0;
  }
  if (slots.ring && slots.end > 0) {
    slots.begin = capacity < params.tokens ? params.tokens - int(capacity) : 0;
    first = capacity > 0 ? (first + slots.begin) % capacity : 0;
  }
  slots.first = first;
  return slots;
}

/// What a lane has of a vector, as it lies in memory: eight words for eight values.
struct Loaded {
  uint words[KVQ_VALUES];
};

template <typename T>
inline Loaded load_lanes(const device T* x, thread const Place& at) {
  Loaded loaded;
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (KVQ_SPAN * pass >= at.dim) continue;
    KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
      thread uint* words = loaded.words + KVQ_WIDTH * pass + eight;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) words[i] = 0u;
      if (at.holds(pass, eight)) load_words(x + at.element(pass, eight), at.wide, words);
    }
  }
  return loaded;
}

/// x, centred, bounded and rotated, in the lanes' registers: what the encoders see. Zeros where
/// there is no such element.
template <typename T>
inline void prepare_lanes(thread const Loaded& x, const device float* signs,
                          const device float* mean, thread const Place& at, float norm,
                          bool bounded, bool rotate, bool centre, thread float* v) {
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (KVQ_SPAN * pass >= at.dim) continue;
    KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
      thread float* part = v + KVQ_WIDTH * pass + eight;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) {
        part[i] = value_at<T>(x.words + KVQ_WIDTH * pass + eight, i);
      }
      if (!at.holds(pass, eight)) continue;
      const int first = at.element(pass, eight);
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
  }
  if (rotate) fwht_lanes(v, at, norm);
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

/// Where a lane's next vector goes. Tokens come in order, so that addresses take a sum each, until
/// a ring wraps.
struct Cursor {
  int64_t slot;
  int t;
  Target target;

  bool writes(thread const Slots& slots) const thread {
    return t >= slots.begin && t < slots.end && slot < slots.capacity;
  }
};

inline void move(thread Cursor& cursor, constant KvqWriteSide& side, int64_t slots, bool dense) {
  const int64_t scale_size = cursor.target.scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size = !dense ? 1 : cursor.target.codes_dtype == KVQ_FLOAT32 ? 4 : 2;
  cursor.slot += slots;
  cursor.target.codes += code_size * (slots * side.codes.token);
  cursor.target.scales += scale_size * (slots * side.scales.token);
  cursor.target.biases += scale_size * (slots * side.biases.token);
}

inline void wrap(thread Cursor& cursor, thread const Slots& slots, constant KvqWriteSide& side,
                 bool dense) {
  if (slots.ring && cursor.slot >= slots.capacity) move(cursor, side, -slots.capacity, dense);
}

/// Of token t.
inline Cursor cursor_at(thread const Target& head, thread const Slots& slots,
                        constant KvqWriteSide& side, int t, bool dense) {
  Cursor cursor;
  cursor.slot = 0;
  cursor.t = t;
  cursor.target = head;
  move(cursor, side, slots.first + (t - slots.begin), dense);
  wrap(cursor, slots, side, dense);
  return cursor;
}

inline void advance(thread Cursor& cursor, thread const Slots& slots, constant KvqWriteSide& side,
                    int tokens, bool dense) {
  cursor.t += tokens;
  move(cursor, side, tokens, dense);
  wrap(cursor, slots, side, dense);
}

/// Slot 0 of a head.
inline Target target_of(device uchar* codes, device uchar* scales, device uchar* biases,
                        constant KvqWriteSide& side, int b, int g, int scale_dtype, bool dense,
                        bool rotate) {
  const int64_t scale_size = scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size = !dense ? 1 : side.codes_dtype == KVQ_FLOAT32 ? 4 : 2;
  Target out;
  out.codes = codes + code_size * (b * side.codes.batch + g * side.codes.head);
  out.scales = scales + scale_size * (b * side.scales.batch + g * side.scales.head);
  out.biases = biases + scale_size * (b * side.biases.batch + g * side.biases.head);
  out.codes_step = side.codes_step;
  out.scale_dtype = scale_dtype;
  out.codes_dtype = side.codes_dtype;
  out.unbiased = side.encoder == KVQ_ENCODER_UNBIASED;
  out.saturate = rotate;
  return out;
}
