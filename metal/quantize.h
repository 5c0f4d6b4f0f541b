// kvq_quantize_*: x [B, G, L, D] into packed slots. A simdgroup takes neighbouring tokens; grid: 32
// lanes, as many simdgroups as they need, B * G rows. Also kv_cache_update_, which is format none.
#pragma once

#include "rows.h"

constant bool kvq_rotate [[function_constant(0)]];
constant bool kvq_centre [[function_constant(1)]];
constant int kvq_head_dim [[function_constant(2)]];
constant bool kvq_wide [[function_constant(3)]];

template <typename T, typename Codec, int Family, int Bits, int Group>
[[kernel]] void kvq_quantize(
    const device T* x [[buffer(0)]], device uchar* codes [[buffer(1)]],
    device uchar* scales [[buffer(2)]], device uchar* biases [[buffer(3)]],
    const device int* position [[buffer(4)]], const device float* signs [[buffer(5)]],
    const device float* mean [[buffer(6)]], constant KvqWriteParams& params [[buffer(7)]],
    threadgroup float* rows [[threadgroup(0)]], uint3 at [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constant KvqWriteSide& side = params.side[0];
  const int b = int(at.z) / side.heads, g = int(at.z) % side.heads;
  const Slots slots = slots_of(params, position, b, side.capacity);
  Place place = place_of(kvq_head_dim, lane, kvq_wide);
  const int vectors = vectors_per_simdgroup(kvq_head_dim);
  const bool exists = place.vector < vectors;
  const int steps = steps_of(Family, kvq_rotate, params.steps);
  int t = int(at.y) * steps * vectors + place.vector;
  const device T* from = x + (b * side.x.batch + g * side.x.head + t * side.x.token);
  const Target head = target_of(codes, scales, biases, side, b, g, false, kvq_rotate);
  KVQ_ROLLED for (int step = 0; step < steps; ++step) {
    const int64_t slot = exists ? slots.of(t) : -1l;
    place.active = slot >= 0;
    const Target out = slot_target(head, side, slot, false);
    float v[8 * KVQ_PASSES];
    load_lanes(from, signs, mean + kvq_head_dim * g, place, side.block, side.norm,
               Family == KVQ_FAMILY_TURBOQUANT || kvq_rotate, kvq_rotate, kvq_centre, v);
    Codec::encode(v, place, out, Bits, Group, rows + int(simdgroup) * params.row);
    t += vectors;
    from += vectors * side.x.token;
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
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constant KvqWriteSide& side = params.side[0];
  const int b = int(at.z) / side.heads, g = int(at.z) % side.heads, t = int(at.y);
  const int64_t slot = slots_of(params, position, b, side.capacity).of(t);
  if (slot >= 0) {
    const Target head = target_of(codes, scales, biases, side, b, g, true, kvq_rotate);
    const Target out = slot_target(head, side, slot, true);
    copy_row(x + (b * side.x.batch + g * side.x.head + t * side.x.token), signs,
             mean + g * side.head_dim, side, rows + int(simdgroup) * params.row, lane, kvq_rotate,
             kvq_centre, out);
  }
}
