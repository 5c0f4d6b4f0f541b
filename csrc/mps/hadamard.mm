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
  const KvqHadamardParams params{static_cast<int32_t>(side.head_dim), hadamard_block(side.head_dim),
                                 hadamard_norm(side.head_dim)};
  const KernelName name = hadamard_kernel(dtype);
  runtime::Launch launch{
      .library = name.library,
      .kernel = name.kernel,
      .constants = {{"kvq_signs", side.signs.has_value()}, {"kvq_inverse", inverse}},
      .buffers = {source, or_none(side.signs), out},
      .params = params,
  };
  lay_out(launch, source.numel() / side.head_dim, 1, 1, side.head_dim);
  runtime::dispatch(launch);
  return out;
}

TORCH_LIBRARY_IMPL(kvq, MPS, m) { m.impl("hadamard", TORCH_FN(hadamard)); }

}  // namespace
}  // namespace kvq::mps
