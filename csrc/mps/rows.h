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

/// Most simdgroups in a threadgroup.
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

/// Vectors of a packed format that a simdgroup takes at once (metal/common.h); one of format none.
inline int64_t vectors_per_simdgroup(const Format& format, int64_t head_dim) {
  return format.is_none() || head_dim > 256 ? 1 : 256 / head_dim;
}

/// Times that a simdgroup takes its number of vectors: with many tokens several, which share the
/// work of finding a head's rows. Kernels of format none and with a rotation have no such loop
/// (steps_of in metal/common.h).
inline int32_t steps_for(const Side& side, int64_t tokens) {
  const int64_t vectors = vectors_per_simdgroup(side.format, side.head_dim);
  const bool loops =
      !side.format.is_none() && !side.signs && side.format.family != KVQ_FAMILY_TURBOQUANT;
  return loops && tokens >= 32 * vectors ? 4 : 1;
}

/// Simdgroups that the tokens of a head take.
inline int64_t simdgroups_for(int64_t tokens, int64_t vectors, int64_t steps) {
  return (tokens + vectors * steps - 1) / (vectors * steps);
}

/// Whether rows of the tensor start at multiples of so many bytes, a power of two.
inline bool rows_aligned(const at::Tensor& t, int64_t bytes) {
  int64_t elements = t.storage_offset();
  for (int64_t dim = 0; dim + 1 < t.dim(); ++dim) elements |= t.size(dim) > 1 ? t.stride(dim) : 0;
  return elements * t.element_size() % bytes == 0;
}

/// The function constant `wide`: whether the kernels may access eight elements of a row at once.
inline bool is_wide(const Side& side, const at::Tensor& dense, const at::Tensor& codes) {
  const bool gguf = side.format.family == KVQ_FAMILY_Q8_0 || side.format.family == KVQ_FAMILY_Q4_0;
  return !side.format.is_none() && rows_aligned(dense, 16) &&
         rows_aligned(codes, gguf ? 2 : side.format.bits & -side.format.bits) &&
         (!side.signs || rows_aligned(*side.signs, 16)) &&
         (!side.mean || rows_aligned(*side.mean, 16));
}

/// Gives the launch its grid, `vectors` * `rows` simdgroups, and the threadgroup memory in which
/// each keeps `floats` values.
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
