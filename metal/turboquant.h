// TurboQuant: a rotated vector as Lloyd-Max codes and one norm (reference._encode_turboquant).
#pragma once

#include "../csrc/shared/codebooks.h"
#include "common.h"

inline constant float* codebook_of(int bits) {
  switch (bits) {
    case 2:
      return kvq_codebook_2;
    case 3:
      return kvq_codebook_3;
    case 4:
      return kvq_codebook_4;
    case 5:
      return kvq_codebook_5;
    case 6:
      return kvq_codebook_6;
    default:
      return kvq_codebook_8;
  }
}

inline constant float* boundaries_of(int bits) {
  switch (bits) {
    case 2:
      return kvq_boundaries_2;
    case 3:
      return kvq_boundaries_3;
    case 4:
      return kvq_boundaries_4;
    case 5:
      return kvq_boundaries_5;
    case 6:
      return kvq_boundaries_6;
    default:
      return kvq_boundaries_8;
  }
}

struct TurboQuant {
  static void encode(threadgroup float* row, uint lane, int n, thread const Target& out, int bits,
                     int) {
    float squares = 0.0f;
    for (int i = int(lane); i < n; i += 32) {
      const float square = row[i] * row[i];
      squares += square;
    }
    squares = sum32(squares);
    const float mean_square = squares / float(n);
    float norm = round_scale(precise::sqrt(mean_square), out.scale_dtype);
    const bool has_nan = is_nan(norm);
    const float divisor = norm == 0.0f ? 1.0f : norm;
    constant float* centroids = codebook_of(bits);
    constant float* edges = boundaries_of(bits);
    float dot = 0.0f;
    for (int i = int(lane); i < n; i += 32) {
      const float z = row[i] / divisor;
      int code = 0;  // how many boundaries lie below z
      for (int step = 1 << (bits - 1); step > 0; step /= 2) {
        code += z > edges[code + step - 1] ? step : 0;
      }
      code = has_nan ? 0 : code;
      const float product = row[i] * centroids[code];
      dot += product;
      row[i] = float(code);
    }
    if (out.unbiased) {
      dot = sum32(dot);
      norm = dot > 0.0f && !has_nan ? round_scale(squares / dot, out.scale_dtype) : norm;
    }
    if (lane == 0) {
      store_scale(out.scales, 0, out.scale_dtype, norm);
    }
    pack_row(row, lane, n, bits, out.codes);
  }

  static void decode(thread const Source& in, int i, int bits, int, thread float* y) {
    const float norm = load_float(in.scales, 0, in.scale_dtype);
    const uint codes = unpack4(in.codes, i, bits);
    for (int j = 0; j < 4; ++j) {
      y[j] = codebook_of(bits)[code_at(codes, j, bits)] * norm;
    }
  }
};
