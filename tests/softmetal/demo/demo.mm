// The demo ops, written as an op of the product is: checks, output, launch.
#include "demo.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "mps/runtime.h"

namespace {

using namespace kvq;

constexpr int64_t kThreads = 256;

const char* type_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float";
    case at::kHalf:
      return "half";
    case at::kBFloat16:
      return "bfloat";
    default:
      TORCH_CHECK_TYPE(false, "[demo.scale] x must be float32, float16 or bfloat16, got ", dtype);
  }
}

at::Tensor scale(const at::Tensor& x, double factor, const std::optional<at::Tensor>& bias,
                 bool negate, int64_t extra_rounds) {
  TORCH_CHECK_VALUE(x.dim() == 1, "[demo.scale] x must have 1 dimension, got ", x.dim());
  const int64_t count = x.size(0);
  at::Tensor y = at::empty({count}, x.options());
  const ScaleParams params{static_cast<float>(factor), static_cast<uint>(x.stride(0)),
                           bias.has_value()};
  runtime::dispatch({
      .library = "demo",
      .kernel = std::string("demo_scale_") + type_name(x.scalar_type()),
      .constants = {{"negate", negate}, {"extra_rounds", static_cast<uint32_t>(extra_rounds)}},
      .buffers = {x, y, bias.value_or(at::Tensor())},
      .params = params,
      .threads = {count},
      .threads_per_threadgroup = {kThreads},
  });
  return y;
}

at::Tensor sum(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "[demo.sum] x must be contiguous");
  const int64_t groups = (x.numel() + kThreads - 1) / kThreads;
  at::Tensor partial = at::empty({groups}, x.options());
  at::Tensor total = at::empty({}, x.options());
  const runtime::Launch partial_pass{
      .library = "sum",
      .kernel = "demo_partial_sum",
      .buffers = {x, partial},
      .params = SumParams{static_cast<uint>(x.numel())},
      .threadgroups = {groups},
      .threads_per_threadgroup = {kThreads},
      .threadgroup_memory = {kThreads * 4},
  };
  const runtime::Launch merge_pass{
      .library = "sum",
      .kernel = "demo_merge_sum",
      .buffers = {partial, total},
      .params = SumParams{static_cast<uint>(groups)},
      .threads = {1},
      .threads_per_threadgroup = {1},
  };
  runtime::dispatch({partial_pass, merge_pass});
  return total;
}

/// A kernel template that is instantiated for the call.
at::Tensor add(const at::Tensor& x, int64_t number) {
  at::Tensor y = at::empty_like(x);
  const std::string function = "demo_add<" + std::to_string(number) + ">";
  const std::string name = "demo_add_" + std::to_string(number);
  runtime::dispatch({
      .library = "sum",
      .kernel = name,
      .instantiation = "template [[host_name(\"" + name + "\")]] [[kernel]] decltype(" + function +
                       ") " + function + ";\n",
      .buffers = {x, y},
      .threads = {x.numel()},
      .threads_per_threadgroup = {kThreads},
  });
  return y;
}

std::vector<std::string> kernels(const std::string& library) {
  return runtime::kernel_names(library);
}

/// A launch as the test asks for it, to try what the runtime refuses.
void launch(const at::Tensor& x, const std::string& library, std::string kernel,
            at::IntArrayRef threads, at::IntArrayRef threads_per_threadgroup,
            at::IntArrayRef threadgroup_memory, int64_t byte_offset) {
  const auto size = [](at::IntArrayRef extents) {
    return extents.empty() ? runtime::Size{} : runtime::Size{extents[0], extents[1], extents[2]};
  };
  runtime::dispatch({
      .library = library.c_str(),
      .kernel = std::move(kernel),
      .buffers = {{x, byte_offset}, x},
      .params = SumParams{1},
      .threads = size(threads),
      .threads_per_threadgroup = size(threads_per_threadgroup),
      .threadgroup_memory = threadgroup_memory.vec(),
  });
}

/// A kernel of a library whose source does not compile.
void broken() { runtime::pipeline("broken", "demo_broken"); }

TORCH_LIBRARY(kvq_demo, m) {
  m.def("scale(Tensor x, float factor, Tensor? bias=None, bool negate=False, "
        "int extra_rounds=0) -> Tensor");
  m.def("sum(Tensor x) -> Tensor");
  m.def("add(Tensor x, int number) -> Tensor");
  m.def("only_schema(Tensor x) -> Tensor");
  m.def("launch(Tensor x, str library, str kernel, int[] threads, int[] threads_per_threadgroup, "
        "int[] threadgroup_memory, int byte_offset) -> ()");
  m.def("kernels(str library) -> str[]", kernels);
  m.def("broken() -> ()", broken);
}

TORCH_LIBRARY_IMPL(kvq_demo, MPS, m) {
  m.impl("scale", scale);
  m.impl("sum", sum);
  m.impl("add", add);
  m.impl("launch", launch);
}

}  // namespace
