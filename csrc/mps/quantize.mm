// quantize, quantize_into_ and qdq on MPS.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "read.h"
#include "write.h"

namespace kvq::mps {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize(const at::Tensor& x,
                                                        c10::string_view format, int64_t group_size,
                                                        const OptionalTensor& signs,
                                                        const OptionalTensor& mean,
                                                        c10::string_view encoder,
                                                        std::optional<at::ScalarType> scale_dtype) {
  const Write write =
      empty_write("quantize", x, format, group_size, signs, mean, encoder, scale_dtype);
  runtime::dispatch(write_launch(write, {}, /*ring=*/false));
  return {write.packed.codes, write.packed.scales, write.packed.biases};
}

at::Tensor qdq(const at::Tensor& x, c10::string_view format, int64_t group_size,
               const OptionalTensor& signs, const OptionalTensor& mean, c10::string_view encoder,
               std::optional<at::ScalarType> scale_dtype) {
  const Write write = empty_write("qdq", x, format, group_size, signs, mean, encoder, scale_dtype);
  at::Tensor out = at::empty(x.sizes(), x.options());
  runtime::dispatch({write_launch(write, {}, /*ring=*/false),
                     read_launch(write.packed, write.side, out, /*start=*/0)});
  return out;
}

void write_one(const SideArguments& side, const Position& position, bool ring) {
  const auto writes = check_writes("quantize_into_", {side}, position, ring);
  runtime::dispatch(write_launch(writes[0], position, ring));
}

void quantize_into(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& biases,
                   const at::Tensor& x, const at::Tensor& position, c10::string_view format,
                   int64_t group_size, const OptionalTensor& signs, const OptionalTensor& mean,
                   c10::string_view encoder, bool ring) {
  check_input("quantize_into_", "x", x, kDevice);
  check_positions("quantize_into_", "position", position, x.size(0), kDevice);
  write_one({"", kNames, "x", {codes, scales, biases}, x, format, group_size, signs, mean, encoder},
            {position}, ring);
}

void quantize_into_at(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& biases,
                      const at::Tensor& x, int64_t position, c10::string_view format,
                      int64_t group_size, const OptionalTensor& signs, const OptionalTensor& mean,
                      c10::string_view encoder, bool ring) {
  check_input("quantize_into_", "x", x, kDevice);
  write_one({"", kNames, "x", {codes, scales, biases}, x, format, group_size, signs, mean, encoder},
            {at::Tensor(), position}, ring);
}

TORCH_LIBRARY_IMPL(kvq, MPS, m) {
  m.impl("quantize", TORCH_FN(quantize));
  m.impl("quantize_into_", TORCH_FN(quantize_into));
  m.impl("quantize_into_.int", TORCH_FN(quantize_into_at));
  m.impl("qdq", TORCH_FN(qdq));
}

}  // namespace
}  // namespace kvq::mps
