// mlx_native_dequantize on MPS.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rows.h"

namespace kvq::mps {
namespace {

at::Tensor mlx_native_dequantize(const at::Tensor& codes, const at::Tensor& norms, int64_t bits,
                                 const OptionalTensor& codebook, double scale_factor_d512,
                                 const OptionalTensor& signs, bool rotate_back, int64_t start,
                                 std::optional<int64_t> length) {
  const MlxNative checked =
      check_mlx_native(codes, norms, bits, codebook, scale_factor_d512, signs, start, length);
  const int64_t head_dim = checked.side.head_dim;
  at::Tensor out =
      at::empty({codes.size(0), codes.size(1), checked.tokens, head_dim}, norms.options());
  KvqMlxNativeParams params{};
  params.codes = strides_of(codes);
  params.norms = strides_of(norms);
  params.start = start;
  params.tokens = static_cast<int32_t>(checked.tokens);
  params.heads = static_cast<int32_t>(codes.size(1));
  params.head_dim = static_cast<int32_t>(head_dim);
  params.bits = static_cast<int32_t>(bits);
  params.block = hadamard_block(head_dim);
  params.norm = hadamard_norm(head_dim);
  params.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  params.divisor = static_cast<float>(scale_factor_d512);
  const KernelName name = mlx_native_kernel();
  runtime::Launch launch{
      .library = name.library,
      .kernel = name.kernel,
      .constants = {{"kvq_signs", checked.side.signs.has_value()}, {"kvq_rotate", rotate_back}},
      .buffers = {codes, norms, checked.codebook, or_none(checked.side.signs), out},
      .params = params,
  };
  lay_out(launch, checked.tokens, codes.size(1), codes.size(0), head_dim);
  runtime::dispatch(launch);
  return out;
}

TORCH_LIBRARY_IMPL(kvq, MPS, m) {
  m.impl("mlx_native_dequantize", TORCH_FN(mlx_native_dequantize));
}

}  // namespace
}  // namespace kvq::mps
