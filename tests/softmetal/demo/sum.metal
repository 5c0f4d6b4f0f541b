// Kernels of kvq_demo::sum, which takes two passes.
#include <metal_stdlib>
#include "demo.h"
using namespace metal;

/// Sums of each threadgroup's part of x.
kernel void demo_partial_sum(device const float* x [[buffer(0)]],
                             device float* partial [[buffer(1)]],
                             constant SumParams& params [[buffer(2)]],
                             threadgroup float* scratch [[threadgroup(0)]],
                             uint group [[threadgroup_position_in_grid]],
                             uint thread_index [[thread_index_in_threadgroup]],
                             uint threads [[threads_per_threadgroup]]) {
  const uint index = group * threads + thread_index;
  scratch[thread_index] = index < params.count ? x[index] : 0.0f;
  for (uint step = threads / 2; step > 0; step /= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < step) scratch[thread_index] += scratch[thread_index + step];
  }
  if (thread_index == 0) partial[group] = scratch[0];
}

/// Sum of the partial sums; the second pass.
kernel void demo_merge_sum(device const float* partial [[buffer(0)]],
                           device float* total [[buffer(1)]],
                           constant SumParams& params [[buffer(2)]]) {
  float sum = 0.0f;
  for (uint i = 0; i < params.count; ++i) sum += partial[i];
  total[0] = sum;
}

/// x + N; compiled for the N that a launch instantiates.
template <int N>
kernel void demo_add(device const float* x [[buffer(0)]],
                     device float* y [[buffer(1)]],
                     uint index [[thread_position_in_grid]]) {
  y[index] = x[index] + float(N);
}
