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
  const int64_t lanes = (head_dim + 31) / 32 * 2;
  return format.is_none() || lanes > kLanes ? 1 : kLanes / lanes;
}

/// Times that a simdgroup takes its number of vectors: with many tokens several, which share the
/// work of finding a head's rows. Kernels of format none have no such loop (steps_of in
/// metal/common.h).
inline int32_t steps_for(const Side& side, int64_t tokens) {
  const int64_t vectors = vectors_per_simdgroup(side.format, side.head_dim);
  return !side.format.is_none() && tokens >= 32 * vectors ? 4 : 1;
}

/// Threadgroup memory of a simdgroup that writes: a row of format none; TurboQuant's vectors, 32
/// elements every 36 floats (metal/turboquant.h); rows of blocks (metal/gguf.h).
inline int64_t row_floats(const Side& side) {
  const int64_t vectors = vectors_per_simdgroup(side.format, side.head_dim);
  const int64_t blocks = vectors * ((side.head_dim + 31) / 32);
  switch (side.format.family) {
    case KVQ_FAMILY_NONE:
      return side.head_dim;
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
  return !side.format.is_none() && side.head_dim % 16 == 0 && rows_aligned(dense, 16) &&
         rows_aligned(codes, gguf ? blocks : sixteen & -sixteen) &&
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
