// Sixteen floats in the compiler's own vector extension: the same code for every instruction set,
// and one rounding per operation, which the encoders need (reference.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace kvq::cpu::KVQ_ISA {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t LaneMask __attribute__((vector_size(64)));
constexpr int kLanes = 16;

inline Lanes load_lanes(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store_lanes(float* p, Lanes x) { std::memcpy(p, &x, sizeof x); }

inline Lanes splat_lanes(float x) { return Lanes{} + x; }

/// Lane i takes lane i ^ Distance.
template <int Distance>
inline Lanes swap_lanes(Lanes x) {
  constexpr int D = Distance;
  return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D,
                                 8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
}

/// a where it is smaller, b otherwise (so b where a is NaN).
inline Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

inline float smallest_lane(Lanes x) {
  x = smaller(x, swap_lanes<8>(x));
  x = smaller(x, swap_lanes<4>(x));
  x = smaller(x, swap_lanes<2>(x));
  return smaller(x, swap_lanes<1>(x))[0];
}

inline float largest_lane(Lanes x) {
  x = larger(x, swap_lanes<8>(x));
  x = larger(x, swap_lanes<4>(x));
  x = larger(x, swap_lanes<2>(x));
  return larger(x, swap_lanes<1>(x))[0];
}

}  // namespace kvq::cpu::KVQ_ISA
