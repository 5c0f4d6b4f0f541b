// TurboQuant: a rotated vector as Lloyd-Max codes and one norm (reference._encode_turboquant).
#pragma once

#include "../csrc/shared/codebook.h"
#include "common.h"

struct TurboQuant {
  /// Sum of the rows' values or their squares, of the lane's vector, in the order that
  /// reference._sum32 states.
  static float sum_row(threadgroup const float* rows, thread const Place& at, bool squares) {
    float mine = 0.0f;
    for (int vector = 0; vector < vectors_per_simdgroup(at.dim); ++vector) {
      float sum = 0.0f;
      for (int i = int(at.lane); i < at.dim; i += 32) {
        const float value = rows[vector * at.dim + i];
        const float term = squares ? value * value : value;
        sum += term;
      }
      sum = sum32(sum);
      mine = vector == at.vector ? sum : mine;
    }
    return mine;
  }

  /// Puts the lanes' values where sum_row reads them, zeros of vectors that are not there, too.
  static void put(threadgroup float* rows, thread const Place& at, thread const float* x) {
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (at.vector >= vectors_per_simdgroup(at.dim) || at.first + 256 * pass >= at.dim) continue;
      threadgroup float* to = rows + at.vector * at.dim + at.first + 256 * pass;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) to[i] = x[8 * pass + i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  /// How many boundaries lie below z. They are symmetric, so the magnitude is searched among the
  /// positive ones: as integers, in which one equal to a negative z's counts, too.
  static uint code_of(float z, constant float* edges, int bits) {
    const uint half_of = 1u << (bits - 1);
    const bool above = z > 0.0f;
    const uint magnitude = (as_type<uint>(z) & 0x7fffffffu) + (above ? 0u : 1u);
    uint below = 0u;
    KVQ_UNROLL for (int i = 2; i <= 8; ++i) {
      if (i > bits) continue;
      const uint step = half_of >> (i - 1);
      below += as_type<uint>(edges[half_of - 1u + below + step]) < magnitude ? step : 0u;
    }
    return above ? half_of + below : half_of - 1u - below;
  }

  static void encode(thread float* x, thread const Place& at, thread const Target& out, int bits,
                     int, threadgroup float* rows) {
    put(rows, at, x);
    const float squares = sum_row(rows, at, true);
    const float mean_square = squares / float(at.dim);
    float norm = round_scale(precise::sqrt(mean_square), out.scale_dtype);
    const bool has_nan = is_nan(norm);
    const float divisor = norm == 0.0f ? 1.0f : norm;
    const bool plain = is_plain_divisor(divisor);
    const float inverse = 1.0f / divisor;
    constant float* edges = kvq_boundaries(bits);
    uint2 streams[KVQ_PASSES];
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (256 * pass >= at.dim) continue;
      float z[8];
      if (plain) {
        KVQ_UNROLL for (int i = 0; i < 8; ++i) z[i] = quotient(x[8 * pass + i], divisor, inverse);
      } else {
        KVQ_UNROLL for (int i = 0; i < 8; ++i) z[i] = x[8 * pass + i] / divisor;
      }
      uint codes[8];
      KVQ_UNROLL for (int i = 0; i < 8; ++i) codes[i] = has_nan ? 0u : code_of(z[i], edges, bits);
      streams[pass] = pack8(codes, bits);
      if (!at.holds(pass)) continue;
      device uchar* to = out.codes + (at.first + 256 * pass) / 8 * bits;
      store_bytes(to, bits, alignment(bits, at.wide), streams[pass]);
    }
    if (out.unbiased) {
      constant float* centroids = kvq_codebook(bits);
      KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
        if (256 * pass >= at.dim) continue;
        KVQ_UNROLL for (int i = 0; i < 8; ++i) {
          x[8 * pass + i] *= centroids[code_at(streams[pass], i, bits)];
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);  // the squares have been read
      put(rows, at, x);
      const float dot = sum_row(rows, at, false);
      norm = dot > 0.0f && !has_nan ? round_scale(squares / dot, out.scale_dtype) : norm;
    }
    if (at.active && at.first == 0) store_scale(out.scales, 0, out.scale_dtype, norm);
  }

  static void decode(thread const Source& in, int i, int bits, int, bool wide, thread float* y) {
    const float norm = load_float(in.scales, 0, in.scale_dtype);
    const uint2 codes = load_bytes(in.codes + i / 8 * bits, bits, alignment(bits, wide));
    KVQ_UNROLL for (int j = 0; j < 8; ++j) y[j] =
        kvq_codebook(bits)[code_at(codes, j, bits)] * norm;
  }
};
