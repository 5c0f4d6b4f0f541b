// From checked tensors to kernel parameters and launches: what the ops of packed rows share.
#pragma once

#include <algorithm>
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

/// Vectors that a simdgroup takes at once (metal/common.h).
inline int64_t vectors_per_simdgroup(int64_t head_dim) {
  const int64_t lanes = (head_dim + 31) / 32 * 2;
  return lanes > kLanes ? 1 : kLanes / lanes;
}

/// Whether a simdgroup takes a row of format none of any length (metal/common.h). `wide`: see
/// is_wide.
inline bool takes_any_row(const Format& format, bool wide) { return format.is_none() && !wide; }

/// Vectors of a side that a simdgroup takes at once.
inline int64_t vectors_of(const Side& side, bool wide) {
  return takes_any_row(side.format, wide) ? 1 : vectors_per_simdgroup(side.head_dim);
}

/// Most times that a simdgroup takes its number of vectors, and the simdgroups that are enough for
/// a GPU: with fewer, none takes several.
constexpr int64_t kWriteSteps = 8;
constexpr int64_t kReadSteps = 4;
constexpr int64_t kEnoughSimdgroups = 1024;

/// Times that a simdgroup takes its number of vectors, at most `most`: several share the work of
/// finding a head's rows. `heads`: of all batch rows.
inline int32_t steps_for(const Side& side, int64_t tokens, int64_t heads, bool wide, int64_t most) {
  if (takes_any_row(side.format, wide)) return 1;
  const int64_t each = tokens / vectors_of(side, wide);
  int64_t steps = 1;
  while (2 * steps <= std::min(most, each) && each * heads >= 2 * steps * kEnoughSimdgroups) {
    steps *= 2;
  }
  return static_cast<int32_t>(steps);
}

/// Threadgroup memory of a simdgroup that writes: a row of format none of any length;
/// TurboQuant's vectors, 32 elements every 36 floats (metal/turboquant.h); rows of blocks
/// (metal/gguf.h).
inline int64_t row_floats(const Side& side, bool wide) {
  const int64_t vectors = vectors_of(side, wide), blocks = vectors * ((side.head_dim + 31) / 32);
  switch (side.format.family) {
    case KVQ_FAMILY_NONE:
      return wide ? 0 : side.head_dim;
    case KVQ_FAMILY_TURBOQUANT:
      return blocks * 36;
    case KVQ_FAMILY_Q8_0:
    case KVQ_FAMILY_Q4_0:
      return (blocks * 34 + 3) / 4;
    default:
      return 0;
  }
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

/// The function constant `wide`: whether the kernels may access sixteen elements of a row at once.
inline bool is_wide(const Side& side, const at::Tensor& dense, const at::Tensor& codes) {
  const bool gguf = side.format.family == KVQ_FAMILY_Q8_0 || side.format.family == KVQ_FAMILY_Q4_0;
  const int64_t blocks = side.head_dim % 64 == 0 ? 4 : 2;  // what rows of blocks are multiples of
  const int64_t sixteen = 2 * side.format.bits;            // bytes of sixteen codes
  const int64_t packed = gguf ? blocks : sixteen & -sixteen;
  const bool whole = codes.size(3) <= 1 || codes.stride(3) == 1;
  return side.head_dim % 16 == 0 && side.head_dim <= kMaxHeadDim && rows_aligned(dense, 16) &&
         whole && rows_aligned(codes, side.format.is_none() ? 16 : packed) &&
         (!side.signs || rows_aligned(*side.signs, 16)) &&
         (!side.mean || rows_aligned(*side.mean, 16));
}

/// Gives the launch its grid, `simdgroups` of each head of each batch row, and the threadgroup
/// memory in which each keeps `floats` values.
inline void lay_out(runtime::Launch& launch, int64_t simdgroups, int64_t heads, int64_t batch,
                    int64_t floats) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(simdgroups <= kMost / kLanes && heads <= kMost && batch <= kMost,
                    "[kvq.metal] kernel ", launch.kernel,
                    " handles at most 2^26 - 1 simdgroups of 2^31 - 1 heads and batch rows, got ",
                    simdgroups, ", ", heads, " and ", batch);
  launch.threads = {kLanes * simdgroups, heads, batch};
  if (simdgroups == 0 || heads == 0 || batch == 0) return;
  const auto& pipeline = runtime::pipeline(launch.library, launch.kernel, launch.constants);
  const int64_t together =
      std::max<int64_t>(1, std::min({kSimdgroups, simdgroups, pipeline.max_threads / kLanes}));
  launch.threads_per_threadgroup = {kLanes * together, 1, 1};
  launch.threadgroup_memory = {(together * std::max<int64_t>(floats, 1) * 4 + 15) / 16 * 16};
}

}  // namespace kvq::mps
