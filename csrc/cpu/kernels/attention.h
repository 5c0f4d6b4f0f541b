// The arguments of the CPU attention kernels.
//
// A task is one (batch row, KV head, block of query rows, split of the tokens). Query rows are the
// heads of a KV head times the queries, query-major: row r is query r / heads_per_group of head
// r % heads_per_group of the group, so that each packed token is read once for all of them.
#pragma once

#include "kernels.h"

namespace kvq::cpu {

/// Dtypes of a mask.
enum class MaskKind { none, boolean, number };

struct AttentionMask {
  MaskKind kind = MaskKind::none;
  KvqDtype dtype = KVQ_FLOAT32;  ///< of a number mask
  const char* data = nullptr;
  int64_t batch_stride = 0;  ///< bytes, as the others; 0 where the mask is broadcast
  int64_t head_stride = 0;
  int64_t query_stride = 0;
  int64_t column_stride = 0;
  int64_t columns = 0;  ///< the last `columns` positions below kv_length
};

/// Positions a batch row has, before causality and window.
struct AttentionRow {
  int64_t length = 0;  ///< kv_length: query i sits at length - L + i
  int64_t begin = 0;   ///< first visible position
  int64_t end = 0;     ///< one past the last
};

struct AttentionArgs {
  Packed k;
  Packed v;
  Rows query;                          ///< [B, H, L, D], rows contiguous
  KvqDtype dtype = KVQ_FLOAT32;        ///< of query and out
  char* out = nullptr;                 ///< [B, H, L, Dv] contiguous
  float* lse = nullptr;                ///< [B, H, L] contiguous
  const AttentionRow* rows = nullptr;  ///< [B]
  int64_t batch = 0;                   ///< B
  int64_t groups = 0;                  ///< G
  int64_t heads_per_group = 0;         ///< H / G
  int64_t queries = 0;                 ///< L
  int64_t capacity = 0;                ///< S
  int64_t window = 0;                  ///< 0: none
  bool causal = true;
  bool ring = false;
  float scale = 1.0f;
  float softcap = 0.0f;  ///< 0: none
  AttentionMask mask;
  const float* sinks = nullptr;    ///< [H] or null
  const float* k_signs = nullptr;  ///< [D] or null
  const float* v_signs = nullptr;  ///< [Dv] or null
  const float* k_mean = nullptr;   ///< [G, D] or null
  const float* v_mean = nullptr;   ///< [G, Dv] or null

  int64_t block_rows = 1;  ///< query rows of a task; see attention_block_rows
  int64_t row_blocks = 1;
  int64_t splits = 1;
  int64_t split_tokens = 0;  ///< a multiple of 64
  float* partial = nullptr;  ///< splits > 1: [tasks, block_rows, partial_row()]

  int64_t tasks() const { return groups * splits * batch * row_blocks; }
  /// A partial row: the sums of weighted values (padded to slabs of 32), then maximum and sum.
  int64_t partial_row() const { return (v.layout.head_dim + 31) / 32 * 32 + 2; }
};

constexpr int64_t kMaxBlockRows = 64;
/// Query rows and sums of a task live on its stack: this many floats each.
constexpr int64_t kMaxBlockFloats = 16384;

/// Query rows of a task for these head sizes.
inline int64_t attention_block_rows(int64_t rows, int64_t k_dim, int64_t v_dim) {
  const int64_t widest = ((k_dim > v_dim ? k_dim : v_dim) + 31) / 32 * 32;
  int64_t block = kMaxBlockFloats / (widest + 2);
  block = block < kMaxBlockRows ? block : kMaxBlockRows;
  return rows < block ? rows : block;
}

}  // namespace kvq::cpu
