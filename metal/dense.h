// Format none: values kept as they are, in the dtype of the cache.
#pragma once

#include "common.h"

struct Dense {
  static void encode(threadgroup const float* row, uint lane, int n, thread const Target& out) {
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

  static float decode(thread const Source& in, int i) {
    return load_float(in.codes, i, in.codes_dtype);
  }
};
