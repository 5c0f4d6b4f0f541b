// Argument checks shared by the CPU and the MPS kernels. Everything is checked before anything is
// touched. A message names the op, the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "format.h"

namespace kvq {

struct Packed {
  at::Tensor codes, scales, biases;
};

/// The per-side arguments of quantize, append_, dequantize and attention, checked.
struct Side {
  Format format;
  KvqEncoder encoder = KVQ_ENCODER_DEFAULT;
  int64_t head_dim = 0;
  std::optional<at::Tensor> signs;  ///< float32 [D], contiguous
  std::optional<at::Tensor> mean;   ///< float32 [G, D], contiguous
};

/// Largest head size any kernel handles.
constexpr int64_t kMaxHeadDim = 1024;

/// x is a float tensor of rank 4 on `device`.
void check_input(const char* op, const char* argument, const at::Tensor& x, c10::Device device);

/// codes, scales and biases belong together and to the format; rows are contiguous.
void check_packed(const char* op, const char* prefix, const Packed& packed, const Format& format);

/// Signs are float32 [D], means float32 [G, D], on `device`; both come back contiguous.
void check_rotation_and_mean(const char* op, const char* prefix, Side& side, int64_t heads,
                             const std::optional<at::Tensor>& signs,
                             const std::optional<at::Tensor>& mean, c10::Device device);

/// x [B, G, L, D] fits into packed [B, G, S, row].
void check_append(const char* op, const char* prefix, const at::Tensor& x, const Packed& packed,
                  const Format& format);

/// An integer tensor of shape [] or [B] on `device`.
void check_positions(const char* op, const char* argument, const at::Tensor& position,
                     int64_t batch, c10::Device device);

/// Every position + tokens lies within the capacity (any position >= 0 in a ring).
void check_capacity(const char* op, at::IntArrayRef positions, int64_t tokens, int64_t capacity,
                    bool ring);

/// An argument and its name.
struct Named {
  const char* name;
  const at::Tensor& tensor;
};

/// No tensor that is written shares memory with itself, another written one, or an input.
void check_no_overlap(const char* op, c10::ArrayRef<Named> written, c10::ArrayRef<Named> read);

/// [start, start + length) lies within the capacity; returns length.
int64_t check_range(const char* op, int64_t start, std::optional<int64_t> length, int64_t capacity);

/// Checked arguments of mlx_native_dequantize.
struct MlxNative {
  Side side;            ///< head_dim and signs
  at::Tensor codebook;  ///< float32 [2^bits], contiguous
  int64_t tokens = 0;
};

MlxNative check_mlx_native(const at::Tensor& codes, const at::Tensor& norms, int64_t bits,
                           const std::optional<at::Tensor>& codebook, double scale_factor_d512,
                           const std::optional<at::Tensor>& signs, int64_t start,
                           std::optional<int64_t> length);

}  // namespace kvq
