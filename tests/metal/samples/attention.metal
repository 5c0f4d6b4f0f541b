// A sample for the emulator's own tests: attention of one query over int4 keys and values, one threadgroup for a head.
#include <metal_stdlib>
using namespace metal;

struct Params {
  uint length;  ///< tokens in the cache
  uint group;   ///< values for one scale
  float scale;  ///< of the scores
};

constant constexpr uint D = 128;

inline float4 unpack(uint word, float scale, float zero) {
  const float4 codes = float4(uint4(word & 15u, (word >> 4) & 15u, (word >> 8) & 15u, (word >> 12) & 15u));
  return fma(codes, float4(scale), float4(zero));
}

template <typename T, uint SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS * 32)]] void attention(
    device const T* query [[buffer(0)]],
    device const uchar* keys [[buffer(1)]],
    device const half* key_scales [[buffer(2)]],
    device const half* key_zeros [[buffer(3)]],
    device const uchar* values [[buffer(4)]],
    device const half* value_scales [[buffer(5)]],
    device const half* value_zeros [[buffer(6)]],
    device T* out [[buffer(7)]],
    constant Params& p [[buffer(8)]],
    uint head [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float maxima[SIMDGROUPS], sums[SIMDGROUPS];
  threadgroup float4 partial[SIMDGROUPS][32];
  const uint groups = D / p.group;
  const uint group = lane * 4 / p.group;
  device const T* q = query + head * D + lane * 4;
  const float4 qv = float4(float(q[0]), float(q[1]), float(q[2]), float(q[3])) * p.scale;
  float m = -INFINITY;
  float l = 0.0f;
  float4 o = float4(0.0f);
  for (uint t = simdgroup; t < p.length; t += SIMDGROUPS) {
    const uint row = head * p.length + t;
    const uint kw = *(device const ushort*)(keys + ulong(row) * (D / 2) + lane * 2);
    const float4 k = unpack(kw, float(key_scales[row * groups + group]), float(key_zeros[row * groups + group]));
    const float score = simd_sum(dot(qv, k));
    const float new_m = max(m, score);
    const float old = exp(m - new_m);
    const float weight = exp(score - new_m);
    const uint vw = *(device const ushort*)(values + ulong(row) * (D / 2) + lane * 2);
    const float4 v = unpack(vw, float(value_scales[row * groups + group]), float(value_zeros[row * groups + group]));
    o = o * old + weight * v;
    l = l * old + weight;
    m = new_m;
  }
  // The second pass over the same memory makes the first barrier of a pair matter as well.
  for (uint pass = 0; pass < 2; ++pass) {
    if (lane == 0) {
      maxima[simdgroup] = m;
      sums[simdgroup] = l;
    }
    partial[simdgroup][lane] = o;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float all_m = maxima[0];
    for (uint i = 1; i < SIMDGROUPS; ++i) all_m = max(all_m, maxima[i]);
    float all_l = 0.0f;
    float4 all_o = float4(0.0f);
    for (uint i = 0; i < SIMDGROUPS; ++i) {
      const float c = exp(maxima[i] - all_m);
      all_l += sums[i] * c;
      all_o += partial[i][lane] * c;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    m = simdgroup == 0 ? all_m : -INFINITY;
    l = simdgroup == 0 ? all_l : 0.0f;
    o = simdgroup == 0 ? all_o : float4(0.0f);
  }
  if (simdgroup == 0) {
    device T* y = out + head * D + lane * 4;
    o /= l;
    y[0] = T(o.x);
    y[1] = T(o.y);
    y[2] = T(o.z);
    y[3] = T(o.w);
  }
}

#define INSTANTIATE(T) \
  template [[host_name("attention_" #T)]] [[kernel]] decltype(attention<T, 4>) attention<T, 4>;
INSTANTIATE(float)
INSTANTIATE(half)
INSTANTIATE(bfloat)
