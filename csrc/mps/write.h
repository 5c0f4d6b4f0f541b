// Quantising into slots: checks, parameters and launches of quantize, quantize_into_, append_ and
// kv_cache_update_.
#pragma once

#include "rows.h"

namespace kvq::mps {

/// Slots start at `tensor`, [] or [B] on the device, or at `value` where there is no tensor.
struct Position {
  at::Tensor tensor;
  int64_t value = 0;

  /// For check_capacity. What a tensor holds only the GPU knows: the kernels skip bad slots.
  std::vector<int64_t> known() const { return {tensor.defined() ? 0 : value}; }
};

constexpr const char* kNames[] = {"codes", "scales", "biases"};
constexpr const char* kKeyNames[] = {"k_codes", "k_scales", "k_biases"};
constexpr const char* kValueNames[] = {"v_codes", "v_scales", "v_biases"};

/// One side of a write, as the caller gave it.
struct SideArguments {
  const char* prefix;             ///< "k_", "v_" or ""
  const char* const (&names)[3];  ///< of the tensors that are written
  const char* name;               ///< of the tensor to write into them
  Packed packed;
  at::Tensor x;
  std::string_view format;
  int64_t group_size;
  OptionalTensor signs;
  OptionalTensor mean;
  std::string_view encoder;
};

/// One side of a write, checked.
struct Write {
  Side side;
  Packed packed;
  at::Tensor x;  ///< rows contiguous
  KvqDtype dtype;
  bool wide;  ///< is_wide
};

Side check_side(const char* op, const char* prefix, const at::Tensor& x, std::string_view format,
                int64_t group_size, std::string_view encoder, const OptionalTensor& signs,
                const OptionalTensor& mean);

/// Rows of x made contiguous where they are not.
Write make_write(const char* op, const Packed& packed, const at::Tensor& x, Side side);

/// Everything the CPU ops check, in the same order.
std::vector<Write> check_writes(const char* op, const std::vector<SideArguments>& sides,
                                const Position& position, bool ring);

/// Parameters of one side, or of K and V.
KvqWriteParams write_params(std::initializer_list<const Write*> writes, const Position& position,
                            bool ring);

/// The kernel of the side's own format.
runtime::Launch write_launch(const Write& write, const Position& position, bool ring);

/// Contiguous packed tensors for x, and the write that fills them.
Write empty_write(const char* op, const at::Tensor& x, std::string_view format, int64_t group_size,
                  const OptionalTensor& signs, const OptionalTensor& mean, std::string_view encoder,
                  std::optional<at::ScalarType> scale_dtype);

}  // namespace kvq::mps
