// Packing the tokens of a head: shared by quantize and append.
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
  int turn;          ///< first token that goes to the beginning of a ring
};

inline Slots slots_of(constant KvqWriteParams& params, const device int* position, int b,
                      int64_t capacity) {
  int64_t first = params.position;
  if (params.position_bytes == 8) {
    first = ((const device int64_t*)position)[b * params.position_stride];
  } else if (params.position_bytes == 4) {
    first = position[b * params.position_stride];
  }
  const bool ring = params.ring != 0;
  const int tokens = params.tokens;
  Slots slots;
  slots.capacity = capacity;
  slots.begin = 0;
  slots.end = tokens;
  slots.turn = 0x7fffffff;
  if (first < 0 || first > (ring ? 0x7fffffffffffffff - tokens : capacity)) {
    slots.end = 0;
    first = 0;
  }
  if (ring && slots.end > 0) {
    slots.begin = capacity < tokens ? tokens - int(capacity) : 0;
    first = capacity > 0 ? (first + slots.begin) % capacity : 0;
    if (capacity - first < tokens) slots.turn = slots.begin + int(capacity - first);
  } else if (capacity - first < slots.end) {
    slots.end = int(capacity - first);
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

/// The signs of a lane's elements, as sign bits to flip: of values, or of pairs as `Loaded` has
/// them.
template <typename T>
inline Loaded load_flips(const device float* signs, thread const Place& at, bool as_loaded) {
  Loaded flips;
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (KVQ_SPAN * pass >= at.dim) continue;
    KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
      thread uint* words = flips.words + KVQ_WIDTH * pass + eight;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) words[i] = 0u;
      if (!at.is_filled() && at.element(pass, eight) >= at.dim) continue;
      load_words(signs + at.element(pass, eight), at.wide, words);
      KVQ_UNROLL for (int i = 0; i < 8; ++i) words[i] &= 0x80000000u;
      if (as_loaded && sizeof(T) == 2) {
        KVQ_UNROLL for (int i = 0; i < 4; ++i) words[i] = (words[2 * i] >> 16) | words[2 * i + 1];
      }
    }
  }
  return flips;
}

/// Whether any of a lane's values may exceed KVQ_ROTATED_LIMIT.
template <typename T>
inline bool exceeds_limit(thread const uint*, thread const float* v) {
  return lane_peak(v) > KVQ_ROTATED_LIMIT;
}
/// Of half only infinities do, whose sums are none or NaN. (That of large values may be infinite,
/// too: these stay as they are.)
template <>
inline bool exceeds_limit<half>(thread const uint* words, thread const float*) {
  half2 sum = as_type<half2>(words[0]) + as_type<half2>(words[8]);
  KVQ_UNROLL for (int i = 1; i < 4; ++i) {
    sum += as_type<half2>(words[i]);
    sum += as_type<half2>(words[i + 8]);
  }
  const uint both = as_type<uint>(sum);
  return (both & 0x7c00u) == 0x7c00u || (both & 0x7c000000u) == 0x7c000000u;
}

/// x, centred, bounded and rotated, in the lanes' registers: what the encoders see. Zeros where
/// there is no such element.
template <typename T>
inline void prepare_lanes(thread const Loaded& x, thread const Loaded& flips,
                          const device float* mean, thread const Place& at, float norm,
                          bool bounded, bool rotate, bool centre, thread float* v) {
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (KVQ_SPAN * pass >= at.dim) continue;
    thread float* part = v + KVQ_WIDTH * pass;
    uint words[KVQ_WIDTH];
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      const uint flip = rotate && !centre ? flips.words[KVQ_WIDTH * pass + i] : 0u;
      words[i] = x.words[KVQ_WIDTH * pass + i] ^ flip;
    }
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      part[i] = value_at<T>(words + i / 8 * 8, i % 8);
    }
    if (centre) {
      KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
        if (!at.holds(pass, eight)) continue;
        float other[8];
        load8(mean + at.element(pass, eight), at.wide, other);
        KVQ_UNROLL for (int i = 0; i < 8; ++i) part[eight + i] -= other[i];
      }
    }
    if (bounded && (centre ? exceeds_limit<float>(words, part) : exceeds_limit<T>(words, part))) {
      KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) part[i] = bound(part[i], KVQ_ROTATED_LIMIT);
    }
    if (rotate && centre) {
      KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
        part[i] = as_type<float>(as_type<uint>(part[i]) ^ flips.words[KVQ_WIDTH * pass + i]);
      }
    }
  }
  if (rotate) fwht_lanes(v, at, norm);
}

/// What is known of a side when its kernel is compiled.
struct Kind {
  int family;
  int bits;
  int group;
  int dim;
  int scale_dtype;
  bool rotate;
  bool centre;
  bool wide;

  bool any_row() const thread { return takes_any_row(family, wide); }
  int vectors() const thread { return any_row() ? 1 : vectors_per_simdgroup(dim); }
};

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
  Dense::store_row(row, lane, n, out);
}

/// Bytes from slot to slot.
struct SlotBytes {
  int64_t codes;
  int64_t scales;
  int64_t biases;
};

inline SlotBytes slot_bytes(constant KvqWriteSide& side, int64_t code_size, int64_t scale_size) {
  SlotBytes bytes;
  bytes.codes = code_size * side.codes.token;
  bytes.scales = scale_size * side.scales.token;
  bytes.biases = scale_size * side.biases.token;
  return bytes;
}

inline void move(thread Target& target, thread const SlotBytes& bytes, int64_t slots) {
  target.codes += slots * bytes.codes;
  target.scales += slots * bytes.scales;
  target.biases += slots * bytes.biases;
}

/// Slot 0 of a head.
inline Target target_of(device uchar* codes, device uchar* scales, device uchar* biases,
                        constant KvqWriteSide& side, int b, int g, int64_t code_size,
                        int64_t scale_size, int scale_dtype, bool rotate) {
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

/// Packs a head's tokens of simdgroup number `simdgroup`, `steps` times as many as it takes at
/// once. Encoder: table_entry and encode of the side's codec.
template <typename T, typename Encoder>
inline void write_tokens(const device T* x, device uchar* codes, device uchar* scales,
                         device uchar* biases, const device float* signs, const device float* mean,
                         const device int* position, constant KvqWriteParams& params,
                         constant KvqWriteSide& side, threadgroup float* row, int b, int g,
                         int simdgroup, uint lane, int steps, thread const Kind& kind) {
  const int64_t scale_size = kind.scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size =
      kind.family != KVQ_FAMILY_NONE ? 1 : (side.codes_dtype == KVQ_FLOAT32 ? 4 : 2);
  const int vectors = kind.vectors();
  const Slots slots = slots_of(params, position, b, side.capacity);
  const SlotBytes bytes = slot_bytes(side, code_size, scale_size);
  Place place = place_of(kind.any_row() ? 32 : kind.dim, lane, kind.wide);
  place.table = Encoder::table_entry(kind, lane);
  const bool exists = g < side.heads && (kind.any_row() || place.exists);
  int t = simdgroup * steps * vectors + (kind.any_row() ? 0 : place.vector), turn = slots.turn;
  const device T* from = x + (b * side.x.batch + g * side.x.head + t * side.x.token);
  Target next_target = target_of(codes, scales, biases, side, b, g, code_size, scale_size,
                                 kind.scale_dtype, kind.rotate);
  move(next_target, bytes, slots.first + (t - slots.begin));
  mean += kind.dim * g;
  if (kind.any_row()) {
    if (t >= turn) move(next_target, bytes, -slots.capacity);
    if (exists && t >= slots.begin && t < slots.end) {
      copy_row(from, signs, mean, side, row, lane, kind.rotate, kind.centre, next_target);
    }
    return;
  }
  const int64_t x_step = vectors * side.x.token;
  const float norm = side.norm;
  Loaded flips;
  if (kind.rotate) flips = load_flips<T>(signs, place, !kind.centre);
  place.active = exists && t >= slots.begin && t < slots.end;
  Loaded next = load_lanes(from, place);
  KVQ_ROLLED for (int step = 1;; ++step) {
    // Tokens come in order, so that addresses take a sum each, until a ring begins again.
    if (t >= turn) {
      move(next_target, bytes, -slots.capacity);
      turn = 0x7fffffff;
    }
    float v[KVQ_VALUES];
    const Place here = place;
    const Loaded loaded = next;
    const Target out = next_target;
    // The next vectors are on their way while these are encoded.
    if (step < steps) {
      t += vectors;
      from += x_step;
      move(next_target, bytes, vectors);
      place.active = exists && t >= slots.begin && t < slots.end;
      next = load_lanes(from, place);
    }
    prepare_lanes<T>(loaded, flips, mean, here, norm,
                     kind.rotate || kind.family == KVQ_FAMILY_TURBOQUANT, kind.rotate, kind.centre,
                     v);
    Encoder::encode(kind, v, here, out, row);
    if (step >= steps) break;
  }
}

/// The encoder of one codec.
template <typename Codec>
struct EncoderOf {
  static uint table_entry(thread const Kind& kind, uint lane) {
    return Codec::encoder_entry(lane, kind.bits);
  }
  static void encode(thread const Kind& kind, thread float* x, thread const Place& at,
                     thread const Target& out, threadgroup float* row) {
    Codec::encode(x, at, out, kind.bits, kind.group, row);
  }
};
