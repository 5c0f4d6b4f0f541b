// The checks of the Q4_K ops: the same on every device.
#pragma once

#include "check.h"
#include "shared/q4_k.h"

namespace kvq {

/// Values [..., K] to quantise; K must be a multiple of 256.
void check_q4_k_values(const char* op, const char* argument, const at::Tensor& x);

/// Blocks [..., K / 256 * 144] to dequantise. Returns K.
int64_t check_q4_k_blocks(const char* op, const at::Tensor& blocks);

/// Checked arguments of q4_k_gemv and q4_k_matmul.
struct Q4KProduct {
  at::Tensor x;             ///< contiguous
  at::Tensor blocks;        ///< rows are contiguous
  int64_t byte_offset = 0;  ///< of the first row, from the first byte of `blocks`
  int64_t row_stride = 0;   ///< bytes between rows
  int64_t m = 0, n = 0, k = 0;
  std::vector<int64_t> out_shape;  ///< [..., n]
};

Q4KProduct check_q4_k_product(const char* op, const at::Tensor& x, const at::Tensor& blocks,
                              int64_t byte_offset, std::optional<int64_t> rows);

/// check_q4_k_product, and x is one vector.
Q4KProduct check_q4_k_gemv(const at::Tensor& x, const at::Tensor& blocks, int64_t byte_offset,
                           std::optional<int64_t> rows);

}  // namespace kvq
