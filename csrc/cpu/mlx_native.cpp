// mlx_native_dequantize on the CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "parallel.h"
#include "rows.h"

namespace kvq::cpu {
namespace {

at::Tensor mlx_native_dequantize(const at::Tensor& codes, const at::Tensor& norms, int64_t bits,
                                 const std::optional<at::Tensor>& codebook,
                                 double scale_factor_d512, const std::optional<at::Tensor>& signs,
                                 bool rotate_back, int64_t start, std::optional<int64_t> length) {
  const MlxNative checked =
      check_mlx_native(codes, norms, bits, codebook, scale_factor_d512, signs, start, length);
  at::Tensor out = at::empty({codes.size(0), codes.size(1), checked.tokens, checked.side.head_dim},
                             norms.options());
  MlxNativeArgs args;
  args.codes = rows_of(codes);
  args.norms = rows_of(norms);
  args.out = rows_of(out);
  args.bits = static_cast<int>(bits);
  args.head_dim = checked.side.head_dim;
  args.heads = codes.size(1);
  args.start = start;
  args.tokens = checked.tokens;
  args.codebook = checked.codebook.const_data_ptr<float>();
  args.scale_factor_d512 = static_cast<float>(scale_factor_d512);
  args.signs = data_or_null(checked.side.signs);
  args.rotate_back = rotate_back;
  parallel_for(codes.size(0) * codes.size(1) * checked.tokens, 128,
               [&](int64_t begin, int64_t end) { kernels().mlx_native(args, begin, end); });
  return out;
}

TORCH_LIBRARY_IMPL(kvq, CPU, m) {
  m.impl("mlx_native_dequantize", TORCH_FN(mlx_native_dequantize));
}

}  // namespace
}  // namespace kvq::cpu
