// Kernels of the demo op: the runtime and the device are tested with them, not the product.
#include <metal_stdlib>
#include "demo.h"
using namespace metal;

constant bool negate [[function_constant(0)]];
constant uint extra_rounds [[function_constant(1)]];

/// y = x * scale + bias, on a strided row.
template <typename T>
kernel void scale(device const T* x [[buffer(0)]],
                  device T* y [[buffer(1)]],
                  device const float* bias [[buffer(2)]],
                  constant ScaleParams& params [[buffer(3)]],
                  uint index [[thread_position_in_grid]]) {
  float value = float(x[index * params.stride]) * params.scale;
  if (params.has_bias != 0) value += bias[index];
  for (uint i = 0; i < extra_rounds; ++i) value *= params.scale;
  y[index] = T(negate ? -value : value);
}

#define INSTANTIATE_SCALE(name, type)                                                      \
  template [[host_name("demo_scale_" #name)]] kernel void scale<type>(                     \
      device const type*, device type*, device const float*, constant ScaleParams&, uint);

INSTANTIATE_SCALE(float, float)
INSTANTIATE_SCALE(half, half)
INSTANTIATE_SCALE(bfloat, bfloat)

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

/// Sum of the partial sums; the second pass of demo::sum.
kernel void demo_merge_sum(device const float* partial [[buffer(0)]],
                           device float* total [[buffer(1)]],
                           constant SumParams& params [[buffer(2)]]) {
  float sum = 0.0f;
  for (uint i = 0; i < params.count; ++i) sum += partial[i];
  total[0] = sum;
}
