// Merges the splits of the decode and prefill kernels: one threadgroup per row of out, of one
// simdgroup where few splits make that quicker (merge_threads in csrc/mps/attention.mm).
#include "attention_common.h"

/// Largest head size (kMaxHeadDim in csrc/check.h).
#define KVQ_MERGE_DIM 1024

/// Some splits' sums of some columns: of a lane four columns, 32 apart, of every `step`-th split.
struct KvqMergePart {
  KVQ_CONST uint kSplits = 16, kColumns = 4;
  float x[kSplits][kColumns];

  void load(device const float* from, uint dim, uint splits, uint split, uint step,
            uint column) thread {
    KVQ_UNROLL for (uint j = 0; j < kSplits; ++j) {
      if (j % 4 == 0 && split + j * step >= splits) break;
      KVQ_UNROLL for (uint i = 0; i < kColumns; ++i) {
        x[j][i] =
            from[min(split + j * step, splits - 1) * (dim + 2) + min(column + 32 * i, dim - 1)];
      }
    }
  }
};

/// Block Walsh-Hadamard transform of `dim` floats, orthonormal. All threads of the threadgroup call
/// it, each after writing x[thread_index + n * threads], and find the result there.
inline void kvq_transform(threadgroup float* x, uint dim, uint thread_index, uint threads) {
  const uint block = dim & (0u - dim);
  for (uint first = 0; first < dim; first += threads) {
    const uint i = first + thread_index;
    float v = i < dim ? x[i] : 0.0f;
    for (uint step = 1; step < min(block, 32u); step *= 2) {
      v = fma(v, (thread_index & step) != 0 ? -1.0f : 1.0f, simd_shuffle_xor(v, ushort(step)));
    }
    if (i < dim) x[i] = v * (1.0f / sqrt(float(block)));
  }
  for (uint step = 32; step < block; step *= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index; i < dim / 2; i += threads) {
      const uint j = 2 * i - i % step;  // i / step * 2 * step + i % step
      const float a = x[j], b = x[j + step];
      x[j] = a + b;
      x[j + step] = a - b;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(KVQ_ATTENTION_THREADS)]] void kvq_attention_merge(
    device const float* partial [[buffer(0)]], device const float* sinks [[buffer(1)]],
    device const float* v_signs [[buffer(2)]], device const float* v_mean [[buffer(3)]],
    device T* out [[buffer(4)]], device float* lse [[buffer(5)]],
    constant KvqAttentionParams& p [[buffer(6)]], uint3 position [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  typedef KvqMergePart Part;
  constexpr uint at_once = 32 * Part::kColumns, most = KVQ_ATTENTION_THREADS / 32;
  const uint threads = 32 * simdgroups;
  threadgroup float x[KVQ_MERGE_DIM];
  threadgroup float share[KVQ_ATTENTION_MAX_SPLITS];
  threadgroup float sums[most][at_once];
  const uint dim = p.value_dim, query = position.x, head = position.y, batch = position.z;
  const uint splits = p.splits;
  const ulong number = (ulong(batch) * p.heads + head) * p.queries + query;
  device const float* from = partial + number * splits * (dim + 2);

  // All that there is to read is asked for at once, if that is not too much.
  float signs[Part::kColumns];
  if (p.v.rotated != 0) {
    KVQ_UNROLL for (uint i = 0; i < Part::kColumns; ++i) {
      signs[i] = v_signs[min(thread_index + i * threads, dim - 1)];
    }
  }
  constexpr uint rounds = KVQ_ATTENTION_MAX_SPLITS / 32;
  float split_m[rounds], split_l[rounds], m = KVQ_LOWEST, l = 0.0f;
  KVQ_UNROLL for (uint i = 0; i < rounds; ++i) {
    const uint s = min(32 * i + lane, splits - 1);
    split_m[i] = from[s * (dim + 2) + dim];
    split_l[i] = from[s * (dim + 2) + dim + 1];
  }
  Part part;
  part.load(from, dim, splits, simdgroup, simdgroups, lane);
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
    for (uint s = simdgroup; s < splits; s += simdgroups * Part::kSplits) {
      if (s != simdgroup || first != 0) part.load(from, dim, splits, s, simdgroups, first + lane);
      KVQ_UNROLL for (uint j = 0; j < Part::kSplits; ++j) {
        const uint split = s + j * simdgroups;
        const float weight = share[min(split, splits - 1)];
        KVQ_UNROLL for (uint i = 0; i < Part::kColumns; ++i) {
          sum[i] = fma(weight, split < splits ? part.x[j][i] : 0.0f, sum[i]);
        }
      }
    }
    if (first != 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    KVQ_UNROLL for (uint i = 0; i < Part::kColumns; ++i) sums[simdgroup][32 * i + lane] = sum[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = thread_index; d < min(at_once, dim - first); d += threads) {
      float all = 0.0f;
      KVQ_UNROLL for (uint s = 0; s < most; ++s) {
        if (s < simdgroups) all += sums[s][d];
      }
      x[first + d] = all;
    }
  }
  if (p.v.rotated != 0) kvq_transform(x, dim, thread_index, threads);
  const uint group = head / p.repeat;
  KVQ_UNROLL for (uint i = 0; i < KVQ_MERGE_DIM / 32; ++i) {
    const uint d = thread_index + i * threads;
    if (d >= dim) break;
    float y = x[d];
    if (p.v.rotated != 0) y *= i < Part::kColumns ? signs[i] : v_signs[d];
    y *= end.x;
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
