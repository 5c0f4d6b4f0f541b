// dequantize on MPS: any range of slots in one dispatch.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "read.h"

namespace kvq::mps {

runtime::Launch read_launch(const Packed& packed, const Side& side, const at::Tensor& out,
                            int64_t start) {
  const auto& [codes, scales, biases] = packed;
  KvqReadParams params{};
  params.codes = strides_of(codes);
  params.scales = strides_of(scales);
  params.biases = strides_of(biases);
  params.start = start;
  params.tokens = static_cast<int32_t>(out.size(2));
  params.heads = static_cast<int32_t>(codes.size(1));
  params.head_dim = static_cast<int32_t>(side.head_dim);
  params.block = hadamard_block(side.head_dim);
  params.norm = hadamard_norm(side.head_dim);
  params.scale_dtype = float_dtype("dequantize", "scales", scales.scalar_type());
  if (side.format.is_none()) {
    params.codes_dtype = float_dtype("dequantize", "codes", codes.scalar_type());
  }
  const bool wide = is_wide(side, out, codes);
  params.steps = steps_for(side, out.size(2), out.size(0) * out.size(1), wide, kReadSteps);
  const KernelName name =
      dequantize_kernel(float_dtype("dequantize", "dtype", out.scalar_type()), side.format);
  runtime::Launch launch{
      .library = name.library,
      .kernel = name.kernel,
      .constants = {{"kvq_rotate", side.signs.has_value()},
                    {"kvq_centre", side.mean.has_value()},
                    {"kvq_head_dim", static_cast<int32_t>(side.head_dim)},
                    {"kvq_wide", wide},
                    {"kvq_scale_dtype", params.scale_dtype}},
      .buffers = {codes, scales, biases, or_none(side.signs), or_none(side.mean), out},
      .params = params,
  };
  lay_out(launch, simdgroups_for(out.size(2), vectors_of(side, wide), params.steps), out.size(1),
          out.size(0), takes_any_row(side.format, wide) ? side.head_dim : 0);
  return launch;
}

namespace {

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& biases,
                      c10::string_view format, int64_t group_size, const OptionalTensor& signs,
                      const OptionalTensor& mean, std::optional<at::ScalarType> dtype,
                      int64_t start, std::optional<int64_t> length) {
  const char* op = "dequantize";
  const Packed packed{codes, scales, biases};
  Side side{Format::parse(op, format, group_size)};
  check_packed(op, "", packed, side.format);
  side.head_dim = side.format.head_dim(codes.size(3));
  check_rotation_and_mean(op, "", side, codes.size(1), signs, mean, codes.device());
  const int64_t tokens = check_range(op, start, length, codes.size(2));
  const auto out_dtype = dtype.value_or(at::kFloat);
  float_dtype(op, "dtype", out_dtype);
  at::Tensor out = at::empty({codes.size(0), codes.size(1), tokens, side.head_dim},
                             codes.options().dtype(out_dtype));
  runtime::dispatch(read_launch(packed, side, out, start));
  return out;
}

TORCH_LIBRARY_IMPL(kvq, MPS, m) { m.impl("dequantize", TORCH_FN(dequantize)); }

}  // namespace
}  // namespace kvq::mps
