// Merges the splits of the decode and prefill kernels: one threadgroup per row of out.
#include "attention_common.h"

/// Largest head size (kMaxHeadDim in csrc/check.h).
#define KVQ_MERGE_DIM 1024

/// Some splits' sums of some columns: of a lane four columns, 32 apart, of every fourth split.
struct KvqMergePart {
  KVQ_CONST uint kSimdgroups = KVQ_ATTENTION_THREADS / 32;
  KVQ_CONST uint kSplits = 16, kColumns = 4;
  float x[kSplits][kColumns];

  void load(device const float* from, uint dim, uint splits, uint split, uint column) thread {
    KVQ_UNROLL for (uint j = 0; j < kSplits; ++j) {
      KVQ_UNROLL for (uint i = 0; i < kColumns; ++i) {
        x[j][i] = from[min(split + j * kSimdgroups, splits - 1) * (dim + 2) +
                       min(column + 32 * i, dim - 1)];
      }
    }
  }
};

template <typename T>
[[kernel, max_total_threads_per_threadgroup(KVQ_ATTENTION_THREADS)]] void kvq_attention_merge(
    device const float* partial [[buffer(0)]], device const float* sinks [[buffer(1)]],
    device const float* v_signs [[buffer(2)]], device const float* v_mean [[buffer(3)]],
    device T* out [[buffer(4)]], device float* lse [[buffer(5)]],
    constant KvqAttentionParams& p [[buffer(6)]], uint3 position [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  typedef KvqMergePart Part;
  constexpr uint at_once = 32 * Part::kColumns, step = Part::kSimdgroups * Part::kSplits;
  threadgroup float x[KVQ_MERGE_DIM];
  threadgroup float share[KVQ_ATTENTION_MAX_SPLITS];
  threadgroup float sums[Part::kSimdgroups][at_once];
  const uint dim = p.value_dim, query = position.x, head = position.y, batch = position.z;
  const uint splits = p.splits;
  const ulong number = (ulong(batch) * p.heads + head) * p.queries + query;
  device const float* from = partial + number * splits * (dim + 2);

  // All that there is to read is asked for at once, if that is not too much.
  Part part;
  part.load(from, dim, splits, simdgroup, lane);
  constexpr uint rounds = KVQ_ATTENTION_MAX_SPLITS / 32;
  float split_m[rounds], split_l[rounds], m = KVQ_LOWEST, l = 0.0f;
  KVQ_UNROLL for (uint i = 0; i < rounds; ++i) {
    const uint s = min(32 * i + lane, splits - 1);
    split_m[i] = from[s * (dim + 2) + dim];
    split_l[i] = from[s * (dim + 2) + dim + 1];
  }
  KVQ_UNROLL for (uint i = 0; i < rounds; ++i) m = max(m, split_m[i]);
  m = simd_max(m);
  KVQ_UNROLL for (uint i = 0; i < rounds; ++i) {
    const uint s = 32 * i + lane;
    const float kept = s < splits ? kvq_exp(split_m[i] - m) : 0.0f;
    if (s < splits) l = fma(split_l[i], kept, l);
    if (simdgroup == 0) share[s] = kept;
  }
  l = simd_sum(l);
  const float3 end = kvq_end_row(m, l, p.has_sinks != 0, p.has_sinks != 0 ? sinks[head] : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint first = 0; first < dim; first += at_once) {
    float sum[Part::kColumns];
    KVQ_UNROLL for (uint i = 0; i < Part::kColumns; ++i) sum[i] = 0.0f;
    for (uint s = simdgroup; s < splits; s += step) {
      if (s != simdgroup || first != 0) part.load(from, dim, splits, s, first + lane);
      KVQ_UNROLL for (uint j = 0; j < Part::kSplits; ++j) {
        const uint split = s + j * Part::kSimdgroups;
        const float weight = share[min(split, splits - 1)];
        KVQ_UNROLL for (uint i = 0; i < Part::kColumns; ++i) {
          sum[i] = fma(weight, split < splits ? part.x[j][i] : 0.0f, sum[i]);
        }
      }
    }
    if (first != 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    KVQ_UNROLL for (uint i = 0; i < Part::kColumns; ++i) sums[simdgroup][32 * i + lane] = sum[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = thread_index; d < min(at_once, dim - first); d += KVQ_ATTENTION_THREADS) {
      float all = 0.0f;
      KVQ_UNROLL for (uint s = 0; s < Part::kSimdgroups; ++s) all += sums[s][d];
      x[first + d] = all;
    }
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
