// Merges the splits of the decode and prefill kernels: one threadgroup per row of out.
#include "attention_common.h"

/// Largest head size (kMaxHeadDim in csrc/check.h).
#define KVQ_MERGE_DIM 1024

template <typename T>
[[kernel, max_total_threads_per_threadgroup(KVQ_ATTENTION_THREADS)]] void kvq_attention_merge(
    device const float* partial [[buffer(0)]], device const float* sinks [[buffer(1)]],
    device const float* v_signs [[buffer(2)]], device const float* v_mean [[buffer(3)]],
    device T* out [[buffer(4)]], device float* lse [[buffer(5)]],
    constant KvqAttentionParams& p [[buffer(6)]], uint3 position [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float x[KVQ_MERGE_DIM];
  threadgroup float share[KVQ_ATTENTION_MAX_SPLITS];
  const uint dim = p.value_dim, query = position.x, head = position.y, batch = position.z;
  const ulong number = (ulong(batch) * p.heads + head) * p.queries + query;
  device const float* from = partial + number * p.splits * (dim + 2);

  float m = KVQ_LOWEST;
  for (uint s = lane; s < p.splits; s += 32) m = max(m, from[s * (dim + 2) + dim]);
  m = simd_max(m);
  float l = 0.0f;
  for (uint s = lane; s < p.splits; s += 32) {
    l += from[s * (dim + 2) + dim + 1] * kvq_exp(from[s * (dim + 2) + dim] - m);
  }
  l = simd_sum(l);
  const float3 end = kvq_end_row(m, l, p.has_sinks != 0, p.has_sinks != 0 ? sinks[head] : 0.0f);
  if (thread_index < p.splits) {
    share[thread_index] = kvq_exp(from[thread_index * (dim + 2) + dim] - m);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint d = thread_index; d < dim; d += KVQ_ATTENTION_THREADS) {
    float sum = 0.0f;
    for (uint s = 0; s < p.splits; ++s) sum += from[s * (dim + 2) + d] * share[s];
    x[d] = sum;
  }
  if (p.v.rotated != 0) kvq_rotate(x, dim, 1, v_signs, true, thread_index);
  const uint group = head / (p.heads / p.groups);
  for (uint d = thread_index; d < dim; d += KVQ_ATTENTION_THREADS) {
    float y = end.x * x[d];
    if (p.v.centred != 0) y += end.y * v_mean[ulong(group) * dim + d];
    out[number * dim + d] = T(y);
  }
  if (thread_index == 0) lse[number] = end.z;
}

#define KVQ_INSTANTIATE(T)                                                                      \
  template [[host_name("kvq_attention_merge_" #T)]] [[kernel]] decltype(kvq_attention_merge<T>) \
      kvq_attention_merge<T>;
KVQ_INSTANTIATE(float)
KVQ_INSTANTIATE(half)
KVQ_INSTANTIATE(bfloat)
