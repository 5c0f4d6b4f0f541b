// Kernels for host code that misuses them.
#include <metal_stdlib>
using namespace metal;

struct Params {
  float scale;
  uint count;
};

kernel void scale(device const float* x [[buffer(0)]],
                  device float* y [[buffer(1)]],
                  constant Params& params [[buffer(2)]],
                  uint index [[thread_position_in_grid]]) {
  y[index] = x[index] * params.scale;
}

kernel void scratch(device float* y [[buffer(0)]],
                    threadgroup float* memory [[threadgroup(0)]],
                    uint index [[thread_index_in_threadgroup]]) {
  memory[index] = float(index);
  y[index] = memory[index];
}

kernel void far_write(device float* y [[buffer(0)]], uint index [[thread_position_in_grid]]) {
  y[index + 1000000u] = 1.0f;
}

kernel void data_race(device float* y [[buffer(0)]], uint index [[thread_position_in_grid]]) {
  y[0] = float(index);
}
