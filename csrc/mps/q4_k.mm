// q4_k_quantize, q4_k_dequantize, q4_k_gemv and q4_k_matmul on MPS.
#include "../shared/q4_k.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../q4_k_check.h"
#include "rows.h"

namespace kvq::mps {
namespace {

bool is_aligned(const at::Tensor& t, int64_t bytes) {
  return t.storage_offset() * t.element_size() % bytes == 0;
}

/// Contiguous, and at a multiple of `bytes` of its storage.
at::Tensor aligned(const at::Tensor& t, int64_t bytes) {
  const at::Tensor dense = t.contiguous();
  return is_aligned(dense, bytes) ? dense : dense.clone();
}

/// One simdgroup for each of `count` pieces of work.
void launch_simdgroups(runtime::Launch launch, int64_t count) {
  lay_out(launch, count, 1, 1, 0);
  launch.threadgroup_memory.clear();
  runtime::dispatch(launch);
}

at::Tensor q4_k_quantize(const at::Tensor& w) {
  check_q4_k_values("q4_k_quantize", "w", w);
  const at::Tensor source = w.contiguous();
  std::vector<int64_t> shape = w.sizes().vec();
  shape.back() = shape.back() / KVQ_Q4_K_SIZE * KVQ_Q4_K_BYTES;
  at::Tensor blocks = at::empty(shape, w.options().dtype(at::kByte));
  const KernelName name =
      q4_k_kernel("quantize", float_dtype("q4_k_quantize", "w", w.scalar_type()));
  launch_simdgroups({.library = name.library, .kernel = name.kernel, .buffers = {source, blocks}},
                    source.numel() / KVQ_Q4_K_SIZE);
  return blocks;
}

at::Tensor q4_k_dequantize(const at::Tensor& blocks, std::optional<at::ScalarType> dtype) {
  const char* op = "q4_k_dequantize";
  std::vector<int64_t> shape = blocks.sizes().vec();
  shape.back() = check_q4_k_blocks(op, blocks);
  const at::ScalarType out_dtype = dtype.value_or(at::kFloat);
  const KernelName name = q4_k_kernel("dequantize", float_dtype(op, "dtype", out_dtype));
  const at::Tensor source = aligned(blocks, 2);
  at::Tensor out = at::empty(shape, blocks.options().dtype(out_dtype));
  launch_simdgroups({.library = name.library, .kernel = name.kernel, .buffers = {source, out}},
                    source.numel() / KVQ_Q4_K_BYTES);
  return out;
}

at::Tensor multiply(const char* op, Q4KProduct product) {
  const KvqDtype dtype = float_dtype(op, "x", product.x.scalar_type());
  if (product.m == 0 || product.n == 0 || product.k == 0) {
    return at::zeros(product.out_shape, product.x.options());
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(product.k <= kMost && product.m <= kMost && product.n <= kMost, "[kvq.", op,
                    "] x's rows, its columns and the rows of blocks must be below 2^31, got ",
                    product.m, ", ", product.k, " and ", product.n);
  const int64_t row = product.k / KVQ_Q4_K_SIZE * KVQ_Q4_K_BYTES;
  if (!is_aligned(product.blocks, 2) || product.row_stride % 2 != 0) {
    product.blocks = product.blocks.clone(at::MemoryFormat::Contiguous);
    product.row_stride = row;
  }
  const at::Tensor x = aligned(product.x, 16);
  at::Tensor out = at::empty(product.out_shape, x.options());
  KvqQ4KParams params{};
  params.row_stride = product.row_stride;
  params.columns = static_cast<int32_t>(product.k / KVQ_Q4_K_SIZE);
  params.m = static_cast<int32_t>(product.m);
  params.n = static_cast<int32_t>(product.n);
  params.magic = 0x4b000000;
  const bool few = product.m <= KVQ_Q4_K_FEW;
  const KernelName name = q4_k_kernel(product.m == 1 ? "gemv" : few ? "few" : "matmul", dtype);
  runtime::Launch launch{
      .library = name.library,
      .kernel = name.kernel,
      .constants = {{"kvq_aligned",
                     (product.blocks.storage_offset() + product.byte_offset) % 16 == 0 &&
                         product.row_stride % 16 == 0},
                    {"kvq_vectors", static_cast<int32_t>(few ? product.m : 0)}},
      .buffers = {x, {product.blocks, product.byte_offset}, out},
      .params = params,
  };
  if (few) {
    const int64_t rows = product.m == 1 ? KVQ_Q4_K_GEMV_ROWS : KVQ_Q4_K_FEW_ROWS;
    launch_simdgroups(std::move(launch), (product.n + rows - 1) / rows);
  } else {
    launch.threadgroups = {(product.n + KVQ_Q4_K_TILE_N - 1) / KVQ_Q4_K_TILE_N,
                           (product.m + KVQ_Q4_K_TILE_M - 1) / KVQ_Q4_K_TILE_M};
    launch.threads_per_threadgroup = {KVQ_Q4_K_TILE_THREADS};
    runtime::dispatch(launch);
  }
  return out;
}

// Every product multiplies x as it is: `exact` changes nothing.
at::Tensor q4_k_gemv(const at::Tensor& x, const at::Tensor& blocks, int64_t byte_offset,
                     std::optional<int64_t> rows, bool /*exact*/) {
  return multiply("q4_k_gemv", check_q4_k_gemv(x, blocks, byte_offset, rows));
}

at::Tensor q4_k_matmul(const at::Tensor& x, const at::Tensor& blocks, int64_t byte_offset,
                       std::optional<int64_t> rows, bool /*exact*/) {
  const char* op = "q4_k_matmul";
  return multiply(op, check_q4_k_product(op, x, blocks, byte_offset, rows));
}

TORCH_LIBRARY_IMPL(kvq, MPS, m) {
  m.impl("q4_k_quantize", TORCH_FN(q4_k_quantize));
  m.impl("q4_k_dequantize", TORCH_FN(q4_k_dequantize));
  m.impl("q4_k_gemv", TORCH_FN(q4_k_gemv));
  m.impl("q4_k_matmul", TORCH_FN(q4_k_matmul));
}

}  // namespace
}  // namespace kvq::mps
