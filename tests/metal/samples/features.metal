// What Metal sources use: each kernel writes y[t] for 64 threads from x[t]; test_features.py knows the answers.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

#define IO device const float* x [[buffer(0)]], device float* y [[buffer(1)]]
#define ARGS IO, uint t [[thread_position_in_grid]]

// ---- vectors

[[kernel]] void swizzles(ARGS) {
  float4 v = float4(x[t], 1.0f, 2.0f, 3.0f);
  v.xy = v.wz;
  v.zw += float2(10.0f, 20.0f);
  y[t] = v.x * 1000.0f + v.y * 100.0f + v.z + v.w;
}
[[kernel]] void constructors(ARGS) {
  const float2 a = float2(x[t], 2.0f);
  const float4 v = float4(a, a) + float4(1.0f, a, 3.0f) + float4(float3(1.0f), a.x) + float4{1.0f, 2.0f, 3.0f, 4.0f};
  const half4 h(half(1), half(2), half(3), half(4));
  y[t] = v.x + v.y + v.z + v.w + float(h.w);
}
[[kernel]] void conversions(ARGS) {
  const int4 i = int4(float4(x[t]) * 4.0f - 2.0f);
  const float4 f = (float4)i;
  const uchar4 c = uchar4(uint4(250u, 251u, 252u, 253u));
  const char4 s = as_type<char4>(c);
  y[t] = f.x + float(int4(s).y) + float(uint4(c).z);
}
[[kernel]] void comparisons(ARGS) {
  const float4 v = float4(x[t], 0.25f, 0.75f, 2.0f);
  const bool4 b = v > 0.5f;
  const float4 ones = float4(v > 0.5f);
  const int4 counts = int4(v <= 0.5f);
  y[t] = float(any(b)) + 2.0f * float(all(b)) + 4.0f * ones.z + 8.0f * float(counts.y) + (b.w ? 16.0f : 0.0f) +
         select(v, -v, v > 1.0f).w + float(any(b && !b));
}
template <typename T>
vec<T, 4> twice(vec<T, 4> v) {
  return vec<T, 4>(v.x, v.yz, T(v.w)) * T(2);
}
template <typename T>
struct Types {
  using four = vec<T, 4>;
  typedef vec<T, 2> two;
};
[[kernel]] void templated_vectors(ARGS) {
  const half4 h = twice<half>(half4(float4(x[t])));
  const typename Types<float>::four f = Types<float>::four(h) + static_cast<Types<float>::four>(h);
  const auto g = Types<float>::two(f.xy);
  y[t] = f.x + g.y;
}
[[kernel]] void packed3(ARGS) {
  device packed_float3* p = (device packed_float3*)(y + t / 3 * 3);
  if (t % 3 == 0 && t < 63) {
    const packed_float3 a = packed_float3(float3(x[t], x[t + 1], x[t + 2]));
    *p = a;
    p[0] = float3(p[0]) * 2.0f + p->x;
  }
  if (t == 63) y[t] = 0.0f;
}
[[kernel]] void matrices(ARGS) {
  float4x4 m = float4x4(2.0f);
  m[1] = float4(x[t]);
  m[2][3] = 5.0f;
  const float4 v = m * float4(1.0f, 2.0f, 3.0f, 4.0f);
  y[t] = v.x + v.y + v.z + v.w + transpose(m)[3].z;
}

// ---- numbers

[[kernel]] void half_and_bfloat(ARGS) {
  half h = half(x[t]);
  h = h * 2.5h + 1h;
  bfloat b = bfloat(x[t]) * bfloat(3.0f);
  b += bfloat(h);
  y[t] = float(h) + float(b);
}
[[kernel]] void integers(ARGS) {
  const uint u = as_type<uint>(x[t]);
  y[t] = float(popcount(u)) + float(clz(u)) + float(ctz(u | 1u)) + float(extract_bits(u, 23u, 8u)) +
         float(rotate(u, 8u) & 255u) + float(reverse_bits(uchar(3))) + float(mulhi(u, 2u)) + float(abs(int(t) - 32)) +
         float(insert_bits(0u, 3u, 4u, 2u)) + float(addsat(uchar(250), uchar(10))) + float(absdiff(3, 10));
}
[[kernel]] void mathematics(ARGS) {
  const float v = x[t];
  y[t] = exp(v) + exp2(v) + log(v) + sqrt(v) + rsqrt(v) + sin(v) + cos(v) + tanh(v) + pow(v, 2.0f) + fma(v, v, v) +
         clamp(v, 0.25f, 0.5f) + mix(v, 1.0f, 0.5f) + rint(v * 10.0f) + fract(v) + sign(v) + fast::exp(v) +
         precise::log2(v) + max3(v, 0.1f, 0.2f) + ldexp(v, 3) + step(0.5f, v) + smoothstep(0.0f, 1.0f, v);
}
[[kernel]] void limits(ARGS) {
  y[t] = numeric_limits<float>::max() > 3.0e38f && numeric_limits<half>::max() == half(65504.0f) &&
                 numeric_limits<uchar>::max() == 255 && numeric_limits<int>::lowest() == INT_MIN
             ? x[t]
             : 0.0f;
}

// ---- memory

struct Block {
  half scale;
  uchar codes[16];
  float get(uint i) const device { return float(scale) * float(codes[i]); }
  float get(uint i) const thread { return float(scale) * float(codes[i]); }
};
[[kernel]] void struct_copies(ARGS, device Block* blocks [[buffer(2)]], constant Block& other [[buffer(3)]]) {
  Block b = blocks[t];
  const Block c = other;
  b.codes[1] += c.codes[0];
  blocks[t] = b;
  y[t] = blocks[t].get(1) + b.get(2) + x[t];
}
constant float codebook[4] = {0.5f, 1.5f, 2.5f, 3.5f};
constant float4 vectors[2] = {float4(1.0f, 2.0f, 3.0f, 4.0f), float4(5.0f)};
float lookup(constant float* table, uint i) { return table[i]; }
[[kernel]] void constants(ARGS) { y[t] = lookup(codebook, t & 3) + vectors[t & 1].y + x[t]; }
float which(device const float*) { return 1.0f; }
float which(threadgroup float*) { return 2.0f; }
float which(thread float*) { return 3.0f; }
float which(constant float*) { return 4.0f; }
[[kernel]] void overloads_on_space(ARGS) {
  threadgroup float s[64];
  float a[1] = {x[t]};
  s[t] = a[0];
  y[t] = which(x) + 10.0f * which(s) + 100.0f * which(a) + 1000.0f * which(codebook);
}
void scale_all(thread float (&a)[4], float by) {
  for (uint i = 0; i < 4; ++i) a[i] *= by;
}
[[kernel]] void array_references(ARGS) {
  float a[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  scale_all(a, x[t]);
  array<float, 3> b = {1.0f, 2.0f, 3.0f};
  b[1] = a[3];
  y[t] = a[0] + b[1] + float(b.size());
}
[[kernel]] void threadgroup_arguments(ARGS, threadgroup float* a [[threadgroup(0)]], threadgroup half4* b [[threadgroup(1)]]) {
  a[t] = x[t];
  b[t] = half4(half(x[t]));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = a[63 - t] + float(b[t ^ 1].w);
}
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(N * 32)]] void templated_threadgroup(IO, uint t [[thread_index_in_threadgroup]]) {
  threadgroup vec<T, 2> pairs[N * 32], more[2][N];
  alignas(16) threadgroup T plain[N * 32];
  pairs[t] = vec<T, 2>(T(x[t]), T(1));
  plain[t] = T(2);
  if (t < 2 * N) more[t / N][t % N] = vec<T, 2>(T(t));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = float(pairs[t ^ 1].x) + float(plain[63 - t]) + float(more[1][N - 1].y);
}
template [[host_name("templated_threadgroup_half_2")]] [[kernel]] decltype(templated_threadgroup<half, 2>)
    templated_threadgroup<half, 2>;

// ---- simdgroups

[[kernel]] void simd_reductions(ARGS) {
  y[t] = simd_sum(x[t]) + simd_max(x[t]) + simd_min(x[t]) + simd_product(2.0f) * 1e-9f + float(simd_or(t)) + float(simd_and(t));
}
[[kernel]] void simd_shuffles(ARGS, uint lane [[thread_index_in_simdgroup]]) {
  y[t] = simd_shuffle(x[t], ushort(31 - lane)) + 2.0f * simd_shuffle_xor(x[t], 5) + 4.0f * simd_shuffle_down(x[t], 3) +
         8.0f * simd_shuffle_up(x[t], 2) + 16.0f * simd_broadcast(x[t], 7) + 32.0f * simd_shuffle_rotate_down(x[t], 9) +
         64.0f * simd_broadcast_first(x[t]) + 128.0f * simd_shuffle_and_fill_down(x[t], 0.5f, 4);
}
[[kernel]] void simd_scans(ARGS) {
  y[t] = simd_prefix_inclusive_sum(x[t]) + 100.0f * simd_prefix_exclusive_sum(x[t]) + simd_prefix_inclusive_product(1.0f);
}
[[kernel]] void simd_votes(ARGS) {
  const simd_vote v = simd_ballot(t % 3 == 0);
  y[t] = float(popcount(uint(simd_vote::vote_t(v)))) + float(v.any()) + float(v.all()) + 100.0f * float(simd_any(t == 40)) +
         1000.0f * float(simd_all(t < 32)) + 10000.0f * float(simd_is_first());
}
[[kernel]] void simd_vectors(ARGS) {
  const float4 v = simd_sum(float4(x[t], 1.0f, 2.0f, 3.0f));
  const half2 h = simd_shuffle_xor(half2(half(1), half(x[t])), 1);
  y[t] = v.x + v.w + float(h.y);
}
[[kernel]] void quads(ARGS) {
  y[t] = quad_sum(x[t]) + quad_max(x[t]) + quad_broadcast(x[t], 2) + quad_shuffle_xor(x[t], 1) +
         quad_prefix_exclusive_sum(x[t]) + float(quad_all(t < 16));
}
[[kernel]] void matrix_multiply(IO, threadgroup half* tile [[threadgroup(0)]], uint t [[thread_position_in_grid]],
                                uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  for (uint i = lane; i < 64; i += 32) tile[i] = half(x[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_half8x8 a, b;
  simdgroup_load(a, tile, 8);
  simdgroup_load(b, tile, 8, ulong2(0, 0), true);
  simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_multiply_accumulate(c, a, b, c);
  if (group == 0) simdgroup_store(c, y, 8);
}

// ---- atomics

[[kernel]] void atomics(ARGS, device atomic_uint* counts [[buffer(2)]], device atomic<float>* sum [[buffer(3)]]) {
  atomic_fetch_add_explicit(&counts[t % 4], t, memory_order_relaxed);
  atomic_fetch_max_explicit(&counts[4], t, memory_order_relaxed);
  atomic_fetch_add_explicit(sum, x[t], memory_order_relaxed);
  uint expected = 0;
  if (atomic_compare_exchange_weak_explicit(&counts[5], &expected, t + 1, memory_order_relaxed, memory_order_relaxed))
    atomic_store_explicit(&counts[6], t, memory_order_relaxed);
  y[t] = float(atomic_exchange_explicit(&counts[7], t, memory_order_relaxed) < 64u);
}

// ---- parameters

constant bool has_bias [[function_constant(0)]];
constant int scale [[function_constant(7)]];
constant int scale_or_three = is_function_constant_defined(scale) ? scale : 3;
[[kernel]] void function_constants(ARGS, device const float* bias [[buffer(2), function_constant(has_bias)]]) {
  y[t] = x[t] * float(scale_or_three);
  if (has_bias) y[t] += bias[t];
}
[[kernel]] void positions(IO, ushort2 p [[thread_position_in_grid]], uint3 g [[threadgroup_position_in_grid]],
                          uint3 size [[threads_per_threadgroup]], uint2 grid [[threads_per_grid]],
                          uint3 groups [[threadgroups_per_grid]], uint i [[thread_index_in_threadgroup]],
                          uint sg [[simdgroup_index_in_threadgroup]], uint n [[simdgroups_per_threadgroup]],
                          ushort3 local [[thread_position_in_threadgroup]]) {
  y[p.y * grid.x + p.x] = x[0] + float(g.x + 10 * g.y) + float(100 * size.x + 1000 * groups.x) + float(10000 * i) +
                          float(sg + n) * 0.25f + float(local.y) * 0.0625f;
}
[[kernel]] void unnumbered(device const float* x, device float* y, constant uint2& add, uint t [[thread_position_in_grid]]) {
  y[t] = x[t] + float(add.y);
}
typedef void (*Decoder)(device const float*, thread float&);
void decode_twice(device const float* p, thread float& r) { r = *p * 2.0f; }
template <typename T, void (*decode)(device const T*, thread T&)>
[[kernel]] void function_argument(device const T* x [[buffer(0)]], device T* y [[buffer(1)]], uint t [[thread_position_in_grid]]) {
  T r;
  decode(x + t, r);
  y[t] = r;
}
typedef decltype(function_argument<float, decode_twice>) function_argument_t;
template [[host_name("function_argument_float")]] kernel function_argument_t function_argument<float, decode_twice>;

namespace inner {
constant uint factor = 3;
template <typename T>
kernel void in_namespace(device const T* x [[buffer(0)]], device T* y [[buffer(1)]], uint t [[thread_position_in_grid]]) {
  y[t] = x[t] * T(factor);
}
template [[host_name("in_namespace_float")]] kernel void in_namespace<float>(
    device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint t [[thread_position_in_grid]]);
}  // namespace inner
