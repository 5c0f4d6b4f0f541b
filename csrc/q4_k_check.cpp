#include "q4_k_check.h"

namespace kvq {
namespace {

int64_t row_bytes(int64_t k) { return k / KVQ_Q4_K_SIZE * KVQ_Q4_K_BYTES; }

void check_bytes(const char* op, const at::Tensor& blocks) {
  TORCH_CHECK_TYPE(blocks.scalar_type() == at::kByte, "[kvq.", op, "] blocks must be uint8, got ",
                   blocks.scalar_type());
}

}  // namespace

void check_q4_k_values(const char* op, const char* argument, const at::Tensor& x) {
  float_dtype(op, argument, x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1, "[kvq.", op, "] ", argument, " must have at least 1 dimension");
  TORCH_CHECK_VALUE(x.size(-1) % KVQ_Q4_K_SIZE == 0, "[kvq.", op, "] ", argument,
                    "'s last dimension must be a multiple of 256, got ", x.size(-1));
}

int64_t check_q4_k_blocks(const char* op, const at::Tensor& blocks) {
  check_bytes(op, blocks);
  TORCH_CHECK_VALUE(blocks.dim() >= 1, "[kvq.", op, "] blocks must have at least 1 dimension");
  TORCH_CHECK_VALUE(blocks.size(-1) % KVQ_Q4_K_BYTES == 0, "[kvq.", op,
                    "] blocks' last dimension must be a multiple of 144 bytes, got ",
                    blocks.size(-1));
  return blocks.size(-1) / KVQ_Q4_K_BYTES * KVQ_Q4_K_SIZE;
}

Q4KProduct check_q4_k_product(const char* op, const at::Tensor& x, const at::Tensor& blocks,
                              int64_t byte_offset, std::optional<int64_t> rows) {
  check_q4_k_values(op, "x", x);
  check_bytes(op, blocks);
  TORCH_CHECK_VALUE(blocks.device() == x.device(), "[kvq.", op, "] blocks must be on ", x.device(),
                    ", got ", blocks.device());
  TORCH_CHECK_VALUE(byte_offset >= 0 && byte_offset % 2 == 0, "[kvq.", op,
                    "] byte_offset must be even and not negative, got ", byte_offset);
  TORCH_CHECK_VALUE(!rows || *rows >= 0, "[kvq.", op, "] rows must not be negative, got ",
                    rows.value_or(0));
  Q4KProduct out;
  out.k = x.size(-1);
  out.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) out.m *= x.size(i);
  const int64_t row = row_bytes(out.k);
  if (blocks.dim() == 2 && byte_offset == 0 && !rows) {
    TORCH_CHECK_VALUE(blocks.size(1) == row, "[kvq.", op, "] blocks must have rows of ", row,
                      " bytes for K = ", out.k, ", got ", blocks.size(1));
    out.n = blocks.size(0);
    out.blocks = blocks.stride(1) == 1 || row == 0 ? blocks : blocks.contiguous();
    out.row_stride = out.blocks.stride(0);
  } else {
    TORCH_CHECK_VALUE(blocks.is_contiguous(), "[kvq.", op,
                      "] blocks read at a byte_offset must be contiguous, got strides ",
                      blocks.strides());
    TORCH_CHECK_VALUE(byte_offset <= blocks.numel(), "[kvq.", op, "] byte_offset ", byte_offset,
                      " lies beyond the ", blocks.numel(), " bytes of blocks");
    const int64_t bytes = blocks.numel() - byte_offset;
    TORCH_CHECK_VALUE(rows || row > 0, "[kvq.", op, "] rows must be given where K is 0");
    TORCH_CHECK_VALUE(rows || bytes % row == 0, "[kvq.", op, "] blocks must hold whole rows of ",
                      row, " bytes from byte_offset ", byte_offset, " on, or rows be given; got ",
                      bytes, " bytes");
    out.n = rows ? *rows : bytes / row;
    TORCH_CHECK_VALUE(row == 0 || out.n <= bytes / row, "[kvq.", op, "] ", out.n, " rows of ", row,
                      " bytes from byte_offset ", byte_offset, " on do not fit into the ",
                      blocks.numel(), " bytes of blocks");
    out.blocks = blocks;
    out.byte_offset = byte_offset;
    out.row_stride = row;
  }
  out.x = x.contiguous();
  out.out_shape = x.sizes().vec();
  out.out_shape.back() = out.n;
  return out;
}

Q4KProduct check_q4_k_gemv(const at::Tensor& x, const at::Tensor& blocks, int64_t byte_offset,
                           std::optional<int64_t> rows) {
  Q4KProduct out = check_q4_k_product("q4_k_gemv", x, blocks, byte_offset, rows);
  TORCH_CHECK_VALUE(out.m == 1, "[kvq.q4_k_gemv] x must be one vector, got shape ", x.sizes(),
                    ": q4_k_matmul takes any number");
  return out;
}

}  // namespace kvq
