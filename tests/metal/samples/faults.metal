// One planted fault per kernel, and clean controls. test_faults.py says which build must see which.
#include <metal_stdlib>
using namespace metal;

#define ARGS device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint t [[thread_index_in_threadgroup]]
#define GROUP 128

// ---- controls

[[kernel]] void ok_reduce(ARGS) {
  threadgroup float s[GROUP];
  s[t] = x[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint k = GROUP / 2; k > 0; k >>= 1) {
    if (t < k) s[t] += s[t + k];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (t == 0) y[0] = s[0];
}

[[kernel]] void ok_simdgroup_barrier(ARGS) {
  threadgroup float s[GROUP];
  s[t] = x[t];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = s[t ^ 1];
}

[[kernel]] void ok_device_barrier(ARGS) {
  y[t] = x[t];
  threadgroup_barrier(mem_flags::mem_device);
  const float other = y[GROUP - 1 - t];
  threadgroup_barrier(mem_flags::mem_device);
  y[t] = other;
}

[[kernel]] void ok_same_value(ARGS) {  // all threads store the same
  threadgroup float s[1];
  s[0] = 3.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = s[0];
}

[[kernel]] void ok_atomics(ARGS) {
  threadgroup atomic_uint count;
  if (t == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = float(atomic_load_explicit(&count, memory_order_relaxed));
}

[[kernel]] void ok_uniform_simdgroups(ARGS) {  // whole simdgroups take their own way
  if (t / 32 != 1) y[t] = simd_sum(x[t]);
  else y[t] = 0.0f;
}

[[kernel]] void ok_stack_array(ARGS) {
  float a[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  y[t] = a[t & 3];
}

// ---- out of bounds

[[kernel]] void write_past_end(ARGS) { y[t + 1] = 1.0f; }
[[kernel]] void write_far_past_end(ARGS) { y[t == 77 ? 60000 : t] = 0.0f; }
[[kernel]] void read_past_end(ARGS) { y[t] = x[t + 1]; }
[[kernel]] void read_before_start(ARGS) { y[t] = x[int(t) - 1]; }
[[kernel]] void write_before_start(ARGS) { y[int(t) - 1] = x[t]; }
[[kernel]] void vector_past_end(ARGS) { *(device float4*)(y + 4 * t) = float4(1.0f); }
[[kernel]] void past_threadgroup_array(ARGS) {
  threadgroup float s[GROUP];
  s[t + (x[0] > 0.0f ? 1 : 0)] = 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = s[t];
}
[[kernel]] void past_threadgroup_argument(ARGS, threadgroup float* s [[threadgroup(0)]]) {
  s[t + 1] = x[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = s[t + 1];
}
[[kernel]] void past_stack_array(ARGS) {
  float a[4];
  for (int i = 0; i < 4; ++i) a[i] = x[i];
  thread float* p = a;
  y[t] = p[x[0] > 0.0f ? 4 : 0];
}
constant float table[4] = {1.0f, 2.0f, 3.0f, 4.0f};
[[kernel]] void past_constant_array(ARGS) {
  constant float* p = table;
  y[t] = p[x[0] > 0.0f ? 4 : 0];
}
[[kernel]] void endless_stack(ARGS) {
  float a[65536];
  for (uint i = 0; i < 65536; ++i) a[i] = x[i & 63];
  y[t] = a[uint(x[0]) + t] + a[t * 8];
}

// ---- races

[[kernel]] void missing_barrier(ARGS) {
  threadgroup float s[GROUP];
  s[t] = 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  s[t] = x[t];
  y[t] = s[GROUP - 1 - t];
}
[[kernel]] void missing_barrier_in_loop(ARGS) {
  threadgroup float s[GROUP];
  for (uint i = 0; i < 2; ++i) {
    s[t] = x[t] + float(i);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[t] = s[GROUP - 1 - t];
  }
}
[[kernel]] void wrong_flags(ARGS) {
  threadgroup float s[GROUP];
  s[t] = x[t];
  threadgroup_barrier(mem_flags::mem_device);
  y[t] = s[GROUP - 1 - t];
}
[[kernel]] void wrong_flags_device(ARGS) {
  y[t] = x[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float other = y[GROUP - 1 - t];
  threadgroup_barrier(mem_flags::mem_device);
  y[t] = other;
}
[[kernel]] void simd_sum_is_no_fence(ARGS) {
  threadgroup float s[GROUP];
  s[t] = x[t];
  const float u = simd_sum(1.0f);
  y[t] = s[t ^ 1] * u;
}
[[kernel]] void simdgroup_barrier_is_too_small(ARGS) {
  threadgroup float s[GROUP];
  s[t] = x[t];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = s[GROUP - 1 - t];
}
[[kernel]] void two_threadgroups(ARGS) { y[t] = x[t]; }
[[kernel]] void vector_race(ARGS) {  // 32 bytes at once
  threadgroup ulong4 s[GROUP];
  s[t] = ulong4(ulong(t));
  y[t] = float(s[t ^ 64].x) + x[t];
}
[[kernel]] void byte_race(ARGS) {  // neighbours in one word are no race, the same byte is
  threadgroup uchar s[GROUP];
  s[t] = uchar(t);
  s[t / 2] = uchar(t + 1);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = float(s[t]) + x[t];
}
struct Pair {
  float a[6];
};
[[kernel]] void struct_race(ARGS) {  // a copy of a whole struct
  threadgroup Pair s[GROUP];
  for (uint i = 0; i < 6; ++i) s[t].a[i] = x[t];
  Pair p = s[GROUP - 1 - t];
  y[t] = p.a[5];
}
[[kernel]] void atomic_against_plain(ARGS) {
  device atomic_uint* count = (device atomic_uint*)y;
  if (t == 5) y[0] = x[0];
  else atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
}

// ---- other memory faults

[[kernel]] void uninitialised(ARGS) {
  threadgroup float s[GROUP];
  if (t < GROUP / 2) s[t] = x[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = s[t];
}
[[kernel]] void write_to_const(ARGS) { *(device float*)(x + t) = y[t] + 5.0f; }
[[kernel]] void misaligned(ARGS) {
  device const uchar* bytes = (device const uchar*)x;
  const half4 h = *(device const half4*)(bytes + 2 * (t & 7));
  y[t] = float(h.x);
}
[[kernel]] void too_much_threadgroup_memory(ARGS, threadgroup float* s [[threadgroup(0)]]) {
  threadgroup float big[GROUP * 60];
  big[t] = x[t];
  s[t] = big[t];
  y[t] = s[t];
}

// ---- undefined arithmetic

[[kernel]] void shift_too_far(ARGS) { y[t] = float(1u << (t + 1)) + x[t]; }
[[kernel]] void divide_by_zero(ARGS) { y[t] = float(100 / int(t - 7u)) + x[t]; }
[[kernel]] void signed_overflow(ARGS) { y[t] = float(2147483600 + int(t)) + x[t]; }

// ---- divergence

[[kernel]] void half_at_barrier(ARGS) {
  if (t < 64) threadgroup_barrier(mem_flags::mem_none);
  y[t] = x[t];
}
[[kernel]] void two_barriers(ARGS) {
  if (t < 64) {
    threadgroup_barrier(mem_flags::mem_none);
  } else {
    threadgroup_barrier(mem_flags::mem_none);
  }
  y[t] = x[t];
}
[[kernel]] void return_before_barrier(ARGS) {
  if (t >= 100) return;
  threadgroup_barrier(mem_flags::mem_none);
  y[t] = x[t];
}
[[kernel]] void loop_of_barriers(ARGS) {
  for (uint i = 0; i < 1 + t / 32; ++i) threadgroup_barrier(mem_flags::mem_none);
  y[t] = x[t];
}
[[kernel]] void simd_sum_in_branch(ARGS) {
  float a = 0.0f;
  if (t & 1) a = simd_sum(x[t]);
  y[t] = a;
}
[[kernel]] void return_before_simd_sum(ARGS) {
  if (t == 3) return;
  y[t] = simd_sum(x[t]);
}
[[kernel]] void different_simd_functions(ARGS) {
  y[t] = t & 1 ? simd_sum(x[t]) : simd_max(x[t]);
}
[[kernel]] void barrier_against_simd_sum(ARGS) {
  if (t & 1) threadgroup_barrier(mem_flags::mem_none);
  else y[t] = simd_sum(x[t]);
}

// ---- function constants

constant bool flag [[function_constant(0)]];
[[kernel]] void unset_constant(ARGS) { y[t] = flag ? x[t] : 0.0f; }
