// Kernels of kvq_demo::scale: the runtime and the device are tested with them.
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
