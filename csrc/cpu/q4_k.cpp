// q4_k_quantize, q4_k_dequantize, q4_k_gemv and q4_k_matmul on the CPU.
#include "kernels/q4_k.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../q4_k_check.h"
#include "parallel.h"

namespace kvq::cpu {
namespace {

/// Values of the dequantised tile that a product of many rows keeps: 4 MiB of float32.
constexpr int64_t kTileValues = int64_t{1} << 20;
/// Bytes of blocks below which a further thread is not worth waking.
constexpr int64_t kGrainBytes = 1 << 15;

at::Tensor q4_k_quantize(const at::Tensor& w) {
  check_q4_k_values("q4_k_quantize", "w", w);
  const at::Tensor source = w.contiguous();
  std::vector<int64_t> shape = w.sizes().vec();
  shape.back() = shape.back() / KVQ_Q4_K_SIZE * KVQ_Q4_K_BYTES;
  at::Tensor blocks = at::empty(shape, w.options().dtype(at::kByte));
  Q4KCodecArgs args;
  args.in = source.const_data_ptr();
  args.out = blocks.data_ptr();
  args.dtype = float_dtype("q4_k_quantize", "w", w.scalar_type());
  parallel_for(source.numel() / KVQ_Q4_K_SIZE, 8,
               [&](int64_t begin, int64_t end) { kernels().q4_k->quantize(args, begin, end); });
  return blocks;
}

void dequantize_into(const void* blocks, void* out, KvqDtype dtype, int64_t count) {
  Q4KCodecArgs args;
  args.in = blocks;
  args.out = out;
  args.dtype = dtype;
  parallel_for(count, 64,
               [&](int64_t begin, int64_t end) { kernels().q4_k->dequantize(args, begin, end); });
}

at::Tensor q4_k_dequantize(const at::Tensor& blocks, std::optional<at::ScalarType> dtype) {
  const char* op = "q4_k_dequantize";
  const int64_t k = check_q4_k_blocks(op, blocks);
  const KvqDtype out_dtype = float_dtype(op, "dtype", dtype.value_or(at::kFloat));
  const at::Tensor source = blocks.contiguous();
  std::vector<int64_t> shape = blocks.sizes().vec();
  shape.back() = k;
  at::Tensor out = at::empty(shape, blocks.options().dtype(dtype.value_or(at::kFloat)));
  dequantize_into(source.const_data_ptr(), out.data_ptr(), out_dtype,
                  source.numel() / KVQ_Q4_K_BYTES);
  return out;
}

/// `count` values in memory that `owner` keeps.
template <typename T>
T* workspace(at::Tensor& owner, int64_t count) {
  owner = at::empty({count * static_cast<int64_t>(sizeof(T))}, at::kByte);
  return static_cast<T*>(owner.data_ptr());
}

/// One to eight rows of x: every super-block is decoded once.
at::Tensor multiply_few(const Q4KProduct& product, KvqDtype dtype, bool exact) {
  at::Tensor out = at::empty(product.out_shape, product.x.options());
  Q4KProductArgs args;
  args.blocks = static_cast<const char*>(product.blocks.const_data_ptr()) + product.byte_offset;
  args.row_stride = product.row_stride;
  args.columns = product.k / KVQ_Q4_K_SIZE;
  args.x = product.x.const_data_ptr();
  args.dtype = dtype;
  args.rows = product.m;
  args.out = static_cast<char*>(out.data_ptr());
  args.out_stride = product.n;
  const Q4KKernels& kernel = *kernels().q4_k;
  at::Tensor integers, floats;
  auto run = kernel.multiply;
  bool ready = false;
  if (product.m == 1 && !exact) {
    args.integers = workspace<Q4KIntegers>(integers, args.columns);
    run = kernel.gemv_integers;
    ready = kernel.to_integers(args);
  }
  if (!ready) {
    args.floats = workspace<Q4KFloats>(floats, product.m * args.columns);
    kernel.to_floats(args);
    run = product.m == 1 ? kernel.gemv_floats : kernel.multiply;
  }
  const int64_t row = args.columns * KVQ_Q4_K_BYTES;
  parallel_for(product.n, std::max<int64_t>(1, kGrainBytes / row),
               [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return out;
}

/// Many rows of x: tiles of w are dequantised into a workspace of bounded size.
at::Tensor multiply_many(const Q4KProduct& product) {
  const int64_t columns = product.k / KVQ_Q4_K_SIZE;
  const at::Tensor x = product.x.view({product.m, product.k}).to(at::kFloat);
  const int64_t tile = std::clamp<int64_t>(kTileValues / product.k, 1, product.n);
  const at::Tensor w = at::empty({tile, product.k}, x.options());
  at::Tensor out = at::empty({product.m, product.n}, x.options());
  const auto* blocks =
      static_cast<const char*>(product.blocks.const_data_ptr()) + product.byte_offset;
  const bool dense = product.row_stride == columns * KVQ_Q4_K_BYTES;
  for (int64_t first = 0; first < product.n; first += tile) {
    const int64_t rows = std::min(tile, product.n - first);
    for (int64_t row = 0; row < rows; row += dense ? rows : 1) {
      dequantize_into(blocks + (first + row) * product.row_stride,
                      w.data_ptr<float>() + row * product.k, KVQ_FLOAT32,
                      columns * (dense ? rows : 1));
    }
    at::Tensor part = out.narrow(1, first, rows);
    at::mm_out(part, x, w.narrow(0, 0, rows).t());
  }
  return out.to(product.x.scalar_type()).view(product.out_shape);
}

at::Tensor multiply(const char* op, const Q4KProduct& product, bool exact) {
  const KvqDtype dtype = float_dtype(op, "x", product.x.scalar_type());
  if (product.m == 0 || product.n == 0 || product.k == 0) {
    return at::zeros(product.out_shape, product.x.options());
  }
  return product.m <= kQ4KMaxRows ? multiply_few(product, dtype, exact) : multiply_many(product);
}

at::Tensor q4_k_gemv(const at::Tensor& x, const at::Tensor& blocks, int64_t byte_offset,
                     std::optional<int64_t> rows, bool exact) {
  return multiply("q4_k_gemv", check_q4_k_gemv(x, blocks, byte_offset, rows), exact);
}

at::Tensor q4_k_matmul(const at::Tensor& x, const at::Tensor& blocks, int64_t byte_offset,
                       std::optional<int64_t> rows, bool exact) {
  const char* op = "q4_k_matmul";
  return multiply(op, check_q4_k_product(op, x, blocks, byte_offset, rows), exact);
}

TORCH_LIBRARY_IMPL(kvq, CPU, m) {
  m.impl("q4_k_quantize", TORCH_FN(q4_k_quantize));
  m.impl("q4_k_dequantize", TORCH_FN(q4_k_dequantize));
  m.impl("q4_k_gemv", TORCH_FN(q4_k_gemv));
  m.impl("q4_k_matmul", TORCH_FN(q4_k_matmul));
}

}  // namespace
}  // namespace kvq::cpu
