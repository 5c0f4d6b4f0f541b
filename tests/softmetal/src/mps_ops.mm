// The aten ops that an mps tensor needs natively; all other aten ops run on the CPU.
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "mps_stream.h"
#include "softmetal.h"

namespace softmetal {
namespace {

using at::Tensor;

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype != at::kDouble && dtype != at::kComplexDouble,
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
                   "support float64. Please use float32 instead.");
}

constexpr c10::DispatchKeySet kMpsKey(c10::DispatchKey::MPS);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> memory_format) {
  const auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_generic(size, allocator(), kMpsKey, type, memory_format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_strided_generic(size, stride, allocator(), kMpsKey, type);
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  if (self.numel() == 0) return self;
  Stream::instance().synchronize();
  Tensor to = self.is_mps() ? host_alias(self) : self;
  to.copy_(source.is_mps() ? host_alias(source) : source);
  Stream::instance().leave_encoder_open();
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_(target, self, non_blocking);
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size,
                      std::optional<at::MemoryFormat> memory_format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (memory_format) impl->empty_tensor_restride(*memory_format);
  const size_t bytes = at::detail::computeStorageNbytes(self.sizes(), self.strides(),
                                                        self.element_size(), self.storage_offset());
  auto storage = self.storage();
  if (bytes > storage.nbytes()) {
    auto grown = allocator()->allocate(bytes);
    if (storage.nbytes() > 0) {
      allocator()->copy_data(grown.get(), storage.data(), storage.nbytes());
    }
    storage.set_data_ptr(std::move(grown));
    storage.set_nbytes(bytes);
  }
  return self;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  Tensor target = to;
  if (target.sizes() != self.sizes()) resize_(target, self.sizes(), std::nullopt);
  return copy_(target, self, false);
}

at::Scalar local_scalar_dense(const Tensor& self) { return self.cpu().item(); }

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                    at::IntArrayRef stride) {
  at::native::checkSetStorage(self, source, offset, size, stride);
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(
      size, stride.empty() && !size.empty() ? at::detail::defaultStrides(size) : stride.vec());
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, source, 0, {elements}, {1});
}

/// Torch's composite version asks a table of a CPU build for the best kernel on mps, and fails.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value,
                 const std::optional<Tensor>& mask, double dropout, bool causal,
                 std::optional<double> scale, bool gqa) {
  std::optional<Tensor> added = mask;
  if (mask && mask->scalar_type() == at::kBool) {  // the math version only adds
    const double hidden = -std::numeric_limits<double>::infinity();
    added = at::zeros_like(*mask, query.options()).masked_fill_(mask->logical_not(), hidden);
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, added, dropout,
                                                            causal, std::nullopt, scale, gqa));
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  // An op of ours that lacks an MPS kernel must raise, not run somewhere else.
  TORCH_CHECK_NOT_IMPLEMENTED(name.rfind("aten::", 0) == 0, "Could not run '", name,
                              "' with arguments from the 'MPS' backend: it has no MPS kernel");
  ++counters().fallbacks;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, MPS, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("scaled_dot_product_attention", attention);
}

TORCH_LIBRARY_IMPL(aten, AutogradMPS, m) { m.impl("scaled_dot_product_attention", attention); }

}  // namespace
}  // namespace softmetal
