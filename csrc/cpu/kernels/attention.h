// The arguments of the CPU attention kernels. Few query rows: attention on packed codes, task by
// task, then attention_merge where tokens were split, by blocks of rows. Many: attention_unpack by
// (block of 64 tokens, KV head, K or V), a dense attention of torch's, attention_gather by (block
// of 16 queries, head).
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
  float* partial = nullptr;  ///< splits > 1: [tasks, partial_size()]

  int64_t tasks() const { return groups * splits * batch * row_blocks; }
  int64_t value_slabs() const { return (v.layout.head_dim + 31) / 32; }
  /// Floats of a task's result: [value_slabs][block_rows][32] sums of weighted values, then
  /// [block_rows] maxima and [block_rows] sums of weights; a whole number of cache lines.
  int64_t partial_size() const { return (block_rows * (value_slabs() * 32 + 2) + 15) / 16 * 16; }
};

/// A tile of tokens of one batch row, unpacked for a dense attention, and what that attention gave.
struct AttentionTile {
  int64_t batch_row = 0;
  int64_t first_group = 0;  ///< the KV heads [first_group, first_group + groups), as are all of
  int64_t groups = 0;       ///< this struct's G and their query heads H
  int64_t position = 0;     ///< of the first token
  int64_t tokens = 0;
  int64_t capacity = 0;    ///< tokens there is room for
  char* keys = nullptr;    ///< [G, capacity, width] of the query's dtype, as stored (rotated)
  char* values = nullptr;  ///< likewise
  int64_t width = 0;       ///< at least D and Dv; what is beyond them is left alone

  int64_t first_query = 0;
  int64_t queries = 0;
  const char* out = nullptr;   ///< the dense result, of the query's dtype; strides in bytes
  const float* lse = nullptr;  ///< its log-sum-exps; strides in elements
  int64_t out_head_stride = 0;
  int64_t out_query_stride = 0;
  int64_t lse_head_stride = 0;
  int64_t lse_query_stride = 0;
  float* so_far = nullptr;  ///< [H, queries, slabs of Dv * 32 + 1]: earlier tiles, then lse
  bool first = true;        ///< no tile came before
  bool last = true;         ///< none comes after: out and lse are written
};

/// Queries that attention_gather takes together: torch's result has heads next to each other.
constexpr int64_t kGatherQueries = 16;

constexpr int64_t kMaxBlockRows = 64;
/// Query rows of a task live on its stack, as its sums do: at most this many floats each.
constexpr int64_t kMaxBlockFloats = 16384;

/// Query rows of a task for these head sizes.
inline int64_t attention_block_rows(int64_t rows, int64_t k_dim, int64_t v_dim) {
  const int64_t widest = ((k_dim > v_dim ? k_dim : v_dim) + 31) / 32 * 32;
  int64_t block = kMaxBlockFloats / widest;
  block = block < kMaxBlockRows ? block : kMaxBlockRows;
  return rows < block ? rows : block;
}

}  // namespace kvq::cpu
