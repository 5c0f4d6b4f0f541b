// kvq_quantize_*: x [B, G, L, D] into packed slots. A simdgroup takes neighbouring tokens; grid:
// as many simdgroups as they need, G, B. Also kv_cache_update_, which is format none.
#pragma once

#include "rows.h"

constant bool kvq_rotate [[function_constant(0)]];
constant bool kvq_centre [[function_constant(1)]];
constant int kvq_head_dim [[function_constant(2)]];
constant bool kvq_wide [[function_constant(3)]];
constant int kvq_scale_dtype [[function_constant(4)]];

template <typename T, typename Codec, int Family, int Bits, int Group>
[[kernel]] void kvq_quantize(
    const device T* x [[buffer(0)]], device uchar* codes [[buffer(1)]],
    device uchar* scales [[buffer(2)]], device uchar* biases [[buffer(3)]],
    const device int* position [[buffer(4)]], const device float* signs [[buffer(5)]],
    const device float* mean [[buffer(6)]], constant KvqWriteParams& params [[buffer(7)]],
    threadgroup float* rows [[threadgroup(0)]], uint3 at [[thread_position_in_grid]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constant KvqWriteSide& side = params.side[0];
  const int b = int(group.z), g = int(group.y);
  const Slots slots = slots_of(params, position, b, side.capacity);
  Place place = place_of(kvq_head_dim, lane, kvq_wide);
  place.table = Codec::encoder_entry(lane, Bits);
  const int vectors = vectors_per_simdgroup(kvq_head_dim);
  const bool exists = place.vector < vectors;
  const int steps = steps_of(Family, params.steps);
  const int t = simdgroup_in_row(at) * steps * vectors + place.vector;
  const device T* from = x + (b * side.x.batch + g * side.x.head + t * side.x.token);
  const Target head =
      target_of(codes, scales, biases, side, b, g, kvq_scale_dtype, false, kvq_rotate);
  Cursor cursor = cursor_at(head, slots, side, t, false);
  place.active = exists && cursor.writes(slots);
  Loaded next = load_lanes(from, place);
  KVQ_ROLLED for (int step = 1;; ++step) {
    float v[KVQ_VALUES];
    const Place here = place;
    const Target out = cursor.target;
    const Loaded loaded = next;
    // The next vectors are on their way while these are encoded.
    if (step < steps) {
      advance(cursor, slots, side, vectors, false);
      from += vectors * side.x.token;
      place.active = exists && cursor.writes(slots);
      next = load_lanes(from, place);
    }
    prepare_lanes<T>(loaded, signs, mean + kvq_head_dim * g, here, side.norm,
                     Family == KVQ_FAMILY_TURBOQUANT || kvq_rotate, kvq_rotate, kvq_centre, v);
    Codec::encode(v, here, out, Bits, Group, rows + int(simdgroup) * params.row);
    if (step >= steps) break;
  }
}

/// Format none: one simdgroup per vector.
template <typename T>
[[kernel]] void kvq_quantize_none(
    const device T* x [[buffer(0)]], device uchar* codes [[buffer(1)]],
    device uchar* scales [[buffer(2)]], device uchar* biases [[buffer(3)]],
    const device int* position [[buffer(4)]], const device float* signs [[buffer(5)]],
    const device float* mean [[buffer(6)]], constant KvqWriteParams& params [[buffer(7)]],
    threadgroup float* rows [[threadgroup(0)]], uint3 at [[thread_position_in_grid]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constant KvqWriteSide& side = params.side[0];
  const int b = int(group.z), g = int(group.y), t = simdgroup_in_row(at);
  const Slots slots = slots_of(params, position, b, side.capacity);
  const Target head =
      target_of(codes, scales, biases, side, b, g, kvq_scale_dtype, true, kvq_rotate);
  const Cursor cursor = cursor_at(head, slots, side, t, true);
  if (cursor.writes(slots)) {
    copy_row(x + (b * side.x.batch + g * side.x.head + t * side.x.token), signs,
             mean + g * side.head_dim, side, rows + int(simdgroup) * params.row, lane, kvq_rotate,
             kvq_centre, cursor.target);
  }
}
