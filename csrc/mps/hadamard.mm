// hadamard on MPS.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "rows.h"

namespace kvq::mps {
namespace {

at::Tensor hadamard(const at::Tensor& x, const OptionalTensor& signs, bool inverse) {
  const char* op = "hadamard";
  const KvqDtype dtype = float_dtype(op, "x", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1, "[kvq.hadamard] x must have at least 1 dimension");
  Side side;
  side.head_dim = x.size(-1);
  TORCH_CHECK_VALUE(side.head_dim > 0 && side.head_dim <= kMaxHeadDim,
                    "[kvq.hadamard] the last dimension must be in [1, ", kMaxHeadDim, "], got ",
                    side.head_dim);
  check_rotation_and_mean(op, "", side, 0, signs, std::nullopt, x.device());
  const at::Tensor source = x.contiguous();
  at::Tensor out = at::empty_like(source);
  const int64_t vectors = source.numel() / side.head_dim;
  const KvqHadamardParams params{vectors, static_cast<int32_t>(side.head_dim),
                                 hadamard_block(side.head_dim), hadamard_norm(side.head_dim)};
  const bool wide = side.head_dim % 16 == 0 && rows_aligned(source, 16) &&
                    (!side.signs || rows_aligned(*side.signs, 16));
  const int64_t together = wide ? vectors_per_simdgroup(side.head_dim) : 1;
  const KernelName name = hadamard_kernel(dtype);
  runtime::Launch launch{
      .library = name.library,
      .kernel = name.kernel,
      .constants = {{"kvq_signs", side.signs.has_value()},
                    {"kvq_inverse", inverse},
                    {"kvq_head_dim", static_cast<int32_t>(side.head_dim)},
                    {"kvq_wide", wide}},
      .buffers = {source, or_none(side.signs), out},
      .params = params,
  };
  lay_out(launch, (vectors + together - 1) / together, 1, 1, wide ? 0 : side.head_dim);
  runtime::dispatch(launch);
  return out;
}

TORCH_LIBRARY_IMPL(kvq, MPS, m) { m.impl("hadamard", TORCH_FN(hadamard)); }

}  // namespace
}  // namespace kvq::mps
