// The interface of the Q4_K kernels: plain pointers and strides, no torch.
#pragma once

#include "../../shared/q4_k.h"
#include "kernels.h"

namespace kvq::cpu {

/// Quantise (values to blocks) or dequantise (blocks to values): contiguous vectors of 256 values.
struct Q4KCodecArgs {
  const void* in = nullptr;
  void* out = nullptr;
  KvqDtype dtype = KVQ_FLOAT32;  ///< of the values
};

/// Most rows of x that one pass over the weights serves.
constexpr int64_t kQ4KMaxRows = 8;

/// 256 values of x as 16-bit integers, x = scale * (256 * high + low), in the order in which the
/// instruction set's kernel reads them.
struct alignas(64) Q4KIntegers {
  int8_t high[KVQ_Q4_K_SIZE];
  int8_t low[KVQ_Q4_K_SIZE];
  float minus_sums[8];  ///< minus the sums of x itself, per sub-block
  float scale;
};

/// 256 values of x, in the order in which the kernel reads them.
struct alignas(64) Q4KFloats {
  float x[KVQ_Q4_K_SIZE];
  float minus_sums[16];  ///< eight zeros, then minus the sums of x per sub-block
};

/// out[m, n] = sum over k of x[m, k] * w[n, k].
struct Q4KProductArgs {
  const char* blocks = nullptr;
  int64_t row_stride = 0;           ///< bytes between rows of w
  int64_t columns = 0;              ///< super-blocks in a row of w, K / 256
  const void* x = nullptr;          ///< [M, K], contiguous
  KvqDtype dtype = KVQ_FLOAT32;     ///< of x and out
  int64_t rows = 1;                 ///< M, at most kQ4KMaxRows
  char* out = nullptr;              ///< [M, N], contiguous
  int64_t out_stride = 0;           ///< N
  Q4KIntegers* integers = nullptr;  ///< [columns]; M = 1
  Q4KFloats* floats = nullptr;      ///< [M, columns]
};

/// [begin, end) counts super-blocks in the codecs, rows of w in the products.
struct Q4KKernels {
  void (*quantize)(const Q4KCodecArgs&, int64_t begin, int64_t end);
  void (*dequantize)(const Q4KCodecArgs&, int64_t begin, int64_t end);
  /// x to args.integers; false where this instruction set has no integer kernel, or a value is
  /// infinite, NaN, or too small: then the floats serve.
  bool (*to_integers)(const Q4KProductArgs&);
  /// x to args.floats.
  void (*to_floats)(const Q4KProductArgs&);
  void (*gemv_integers)(const Q4KProductArgs&, int64_t begin, int64_t end);
  void (*gemv_floats)(const Q4KProductArgs&, int64_t begin, int64_t end);
  void (*multiply)(const Q4KProductArgs&, int64_t begin, int64_t end);
};

}  // namespace kvq::cpu
