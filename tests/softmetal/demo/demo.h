// Parameters shared by the demo's kernels and its host code.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
using uint = uint32_t;
#endif

struct ScaleParams {
  float scale;    ///< factor
  uint stride;    ///< elements from one input element to the next
  uint has_bias;  ///< whether bias is to be read
};

struct SumParams {
  uint count;  ///< elements to add up
};
