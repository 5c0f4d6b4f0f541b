// A kernel that needs function constants.
#include <metal_stdlib>
using namespace metal;

constant float factor [[function_constant(0)]];
constant bool negate [[function_constant(1)]];

kernel void specialized(device float* y [[buffer(0)]], uint index [[thread_position_in_grid]]) {
  y[index] = negate ? -factor : factor;
}
