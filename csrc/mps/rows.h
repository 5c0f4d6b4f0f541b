// From checked tensors to kernel parameters and launches: what the ops of packed rows share.
#pragma once

#include <cmath>
#include <limits>

#include "../check.h"
#include "../shared/params.h"
#include "names.h"
#include "runtime.h"

namespace kvq::mps {

using OptionalTensor = std::optional<at::Tensor>;

/// Torch knows one MPS device.
inline const at::Device kDevice{at::kMPS, 0};

/// Simdgroups in a threadgroup; each works on one vector.
constexpr int64_t kSimdgroups = 4;
constexpr int64_t kLanes = 32;

inline KvqStrides strides_of(const at::Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

inline int32_t hadamard_block(int64_t head_dim) {
  return static_cast<int32_t>(head_dim & -head_dim);
}

inline float hadamard_norm(int64_t head_dim) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(hadamard_block(head_dim))));
}

inline at::Tensor or_none(const OptionalTensor& t) { return t ? *t : at::Tensor(); }

/// Gives the launch its grid, one simdgroup per vector (vectors * rows of them), and the
/// threadgroup memory in which each keeps `floats` values.
inline void lay_out(runtime::Launch& launch, int64_t vectors, int64_t rows, int64_t floats) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(vectors <= kMost && rows <= kMost, "[kvq.metal] kernel ", launch.kernel,
                    " handles at most 2^31 - 1 vectors per row and rows, got ", vectors, " and ",
                    rows);
  launch.threads = {kLanes, vectors, rows};
  if (vectors == 0 || rows == 0) return;
  const auto& pipeline = runtime::pipeline(launch.library, launch.kernel, launch.constants);
  const int64_t simdgroups =
      std::max<int64_t>(1, std::min({kSimdgroups, vectors, pipeline.max_threads / kLanes}));
  launch.threads_per_threadgroup = {kLanes, simdgroups, 1};
  launch.threadgroup_memory = {(simdgroups * floats * 4 + 15) / 16 * 16};
}

}  // namespace kvq::mps
