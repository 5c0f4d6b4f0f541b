// kvq_quantize_*: x [B, G, L, D] into packed slots. One simdgroup per vector; grid: 32 lanes,
// L tokens, B * G rows. Also kv_cache_update_, which is format none.
#pragma once

#include "rows.h"

constant bool kvq_rotate [[function_constant(0)]];
constant bool kvq_centre [[function_constant(1)]];

template <typename T, typename Codec, int Family, int Bits, int Group>
[[kernel]] void kvq_quantize(
    const device T* x [[buffer(0)]], device uchar* codes [[buffer(1)]],
    device uchar* scales [[buffer(2)]], device uchar* biases [[buffer(3)]],
    const device int* position [[buffer(4)]], const device float* signs [[buffer(5)]],
    const device float* mean [[buffer(6)]], constant KvqWriteParams& params [[buffer(7)]],
    threadgroup float* rows [[threadgroup(0)]], uint3 at [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constant KvqWriteSide& side = params.side[0];
  const int b = int(at.z) / side.heads, g = int(at.z) % side.heads, t = int(at.y);
  const int64_t slot = slot_of(params, position, b, t, side.capacity);
  if (slot >= 0) {
    threadgroup float* row = rows + int(simdgroup) * params.row;
    load_row(x + (b * side.x.batch + g * side.x.head + t * side.x.token), signs,
             mean + g * side.head_dim, side, row, lane,
             Family == KVQ_FAMILY_TURBOQUANT || kvq_rotate, kvq_rotate, kvq_centre);
    const Target out =
        target_of(codes, scales, biases, side, b, g, slot, Family == KVQ_FAMILY_NONE, kvq_rotate);
    Codec::encode(row, lane, side.head_dim, out, Bits, Group);
  }
}
