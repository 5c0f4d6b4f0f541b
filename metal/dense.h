// Format none: values kept as they are, in the dtype of the cache.
#pragma once

#include "common.h"

/// What a lane has of a row in one pass, as it lies in memory.
struct DenseRow {
  uint words[KVQ_WIDTH];
  int dtype;
};

struct Dense : NoTable {
  using Row = DenseRow;

  static void encode(thread float* x, thread const Place& at, thread const Target& out, int, int,
                     threadgroup float*) {
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (KVQ_SPAN * pass >= at.dim) continue;
      KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
        if (!at.holds(pass, eight)) continue;
        thread const float* v = x + KVQ_WIDTH * pass + eight;
        const int first = at.element(pass, eight);
        if (out.codes_dtype == KVQ_FLOAT16) {
          store8((device half*)out.codes + first, true, v, out.saturate);
        } else if (out.codes_dtype == KVQ_BFLOAT16) {
          store8((device bfloat*)out.codes + first, true, v);
        } else {
          store8((device float*)out.codes + first, true, v);
        }
      }
    }
  }

  static DenseRow load(thread const Source& in, thread const Place& at, int pass, int, int) {
    DenseRow row;
    row.dtype = in.codes_dtype;
    KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
      KVQ_UNROLL for (int i = 0; i < 8; ++i) row.words[eight + i] = 0u;
      if (!at.holds(pass, eight)) continue;
      const int first = at.element(pass, eight);
      if (in.codes_dtype == KVQ_FLOAT32) {
        load_words((const device float*)in.codes + first, true, row.words + eight);
      } else {
        load_words((const device ushort*)in.codes + first, true, row.words + eight);
      }
    }
    return row;
  }

  static void decode(thread const DenseRow& row, thread const Place&, int, thread float* y) {
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      thread const uint* words = row.words + i / 8 * 8;
      y[i] = row.dtype == KVQ_FLOAT16    ? value_at<half>(words, i % 8)
             : row.dtype == KVQ_BFLOAT16 ? value_at<bfloat>(words, i % 8)
                                         : value_at<float>(words, i % 8);
    }
  }

  /// Stores a row of any length from threadgroup memory.
  static void store_row(threadgroup const float* row, uint lane, int n, thread const Target& out) {
    for (int i = int(lane); i < n; i += 32) {
      const int64_t at = i * out.codes_step;
      if (out.codes_dtype == KVQ_FLOAT16) {
        ((device half*)out.codes)[at] = out.saturate ? to_dtype<half>(row[i]) : half(row[i]);
      } else if (out.codes_dtype == KVQ_BFLOAT16) {
        ((device bfloat*)out.codes)[at] = bfloat(row[i]);
      } else {
        ((device float*)out.codes)[at] = row[i];
      }
    }
  }
};
