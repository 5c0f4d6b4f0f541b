// Refused by every Metal compiler.
#include <metal_stdlib>
using namespace metal;

kernel void demo_broken(device float* y [[buffer(0)]]) {
  y[0] = no_such_function(1.0f);
}
