// From tensors to the kernels' plain pointers.
#pragma once

#include "../check.h"
#include "kernels/kernels.h"

namespace kvq::cpu {

inline Rows rows_of(const at::Tensor& t) {
  const int64_t size = t.element_size();
  return {static_cast<char*>(t.data_ptr()), t.stride(0) * size, t.stride(1) * size,
          t.stride(2) * size};
}

inline const float* data_or_null(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

inline kvq::cpu::Packed packed_rows(const char* op, const kvq::Packed& packed,
                                    const Format& format) {
  kvq::cpu::Packed out;
  out.layout.family = format.family;
  out.layout.bits = format.bits;
  out.layout.group = format.group;
  out.layout.head_dim = format.head_dim(packed.codes.size(3));
  out.layout.scale_dtype = float_dtype(op, "scales", packed.scales.scalar_type());
  if (format.is_none()) {
    out.layout.codes_dtype = float_dtype(op, "codes", packed.codes.scalar_type());
  }
  out.codes = rows_of(packed.codes);
  out.scales = rows_of(packed.scales);
  out.biases = rows_of(packed.biases);
  return out;
}

/// A [] or [B] integer CPU tensor as B values.
inline std::vector<int64_t> position_values(const at::Tensor& position, int64_t batch) {
  if (position.scalar_type() == at::kLong && (batch == 1 || position.dim() == 0)) {
    return std::vector<int64_t>(batch, *position.const_data_ptr<int64_t>());
  }
  const at::Tensor wide = position.to(at::kLong).expand({batch}).contiguous();
  const auto* data = wide.const_data_ptr<int64_t>();
  return {data, data + batch};
}

}  // namespace kvq::cpu
