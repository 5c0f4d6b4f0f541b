// hadamard on the CPU.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "parallel.h"
#include "rows.h"

namespace kvq::cpu {
namespace {

at::Tensor hadamard(const at::Tensor& x, const std::optional<at::Tensor>& signs, bool inverse) {
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
  HadamardArgs args;
  args.x = source.const_data_ptr();
  args.out = out.data_ptr();
  args.dtype = dtype;
  args.head_dim = side.head_dim;
  args.signs = data_or_null(side.signs);
  args.inverse = inverse;
  parallel_for(source.numel() / side.head_dim, 256,
               [&](int64_t begin, int64_t end) { kernels().hadamard(args, begin, end); });
  return out;
}

TORCH_LIBRARY_IMPL(kvq, CPU, m) { m.impl("hadamard", TORCH_FN(hadamard)); }

}  // namespace
}  // namespace kvq::cpu
