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
  const Kind kind = {Family,          Bits,       Group,      kvq_head_dim,
                     kvq_scale_dtype, kvq_rotate, kvq_centre, kvq_wide};
  write_tokens<T, EncoderOf<Codec>>(x, codes, scales, biases, signs, mean, position, params,
                                    params.side[0], rows + int(simdgroup) * params.row,
                                    int(group.z), int(group.y), simdgroup_in_row(at), lane,
                                    kind.any_row() ? 1 : params.steps, kind);
}
