// TurboQuant: a rotated vector as Lloyd-Max codes and one norm (reference._encode_turboquant).
#pragma once

#include "../csrc/shared/codebook.h"
#include "common.h"

/// Floats between the starts of a vector's blocks of 32 in threadgroup memory: lanes that store
/// four at a time meet a bank twice at most.
#define KVQ_TQ_STRIDE 36

struct TurboQuant {
  using Row = Packed;

  /// A cell (torch_kvq/codebooks.py); of few bits only.
  static uint encoder_entry(uint lane, int bits) {
    return bits == 2   ? kvq_cells_2[lane]
           : bits == 3 ? kvq_cells_3[lane]
           : bits == 4 ? kvq_cells_4[lane]
                       : 0u;
  }

  /// A centroid of a codebook that fits.
  static uint decoder_entry(uint lane, int bits) {
    return bits > 5 ? 0u : as_type<uint>(kvq_codebook(bits)[lane & ((1u << bits) - 1u)]);
  }

  static int row_floats(int dim) { return (dim + 31) / 32 * KVQ_TQ_STRIDE; }

  /// Lane j's sum of elements j, j + 32, ... of a vector, or of their squares.
  static float sum_lane(threadgroup const float* row, thread const Place& at, bool squares) {
    const int lane = int(at.lane);
    float sum = 0.0f;
    KVQ_UNROLL for (int i = 0; i < 2 * KVQ_SPAN; i += 32) {
      if (i >= at.dim) continue;
      if (i + 32 > at.dim && i + lane >= at.dim) continue;
      const float value = row[i / 32 * KVQ_TQ_STRIDE + lane];
      const float term = squares ? value * value : value;
      sum += term;
    }
    return sum;
  }

  /// Sum of the lane's vector, or of its squares, in the order that reference._sum32 states.
  static float sum_row(threadgroup const float* rows, thread const Place& at, bool squares) {
    const int vectors = vectors_per_simdgroup(at.dim), row = row_floats(at.dim);
    if (vectors > 8 || vectors * lanes_of(at.dim) != 32) {
      float mine = 0.0f;
      for (int vector = 0; vector < vectors; ++vector) {
        const float sum = sum32(sum_lane(rows + vector * row, at, squares));
        mine = vector == at.vector ? sum : mine;
      }
      return mine;
    }
    // At each distance a lane hands over the half of the vectors that are not its own.
    float sums[8];
    KVQ_UNROLL for (int vector = 0; vector < 8; ++vector) {
      if (vector < vectors) sums[vector] = sum_lane(rows + vector * row, at, squares);
    }
    int distance = 16;
    if (vectors >= 8) {
      KVQ_UNROLL for (int i = 0; i < 4; ++i) sums[i] = fold(sums[i], sums[i + 4], at.lane, 16);
      distance = 8;
    }
    if (vectors >= 4) {
      KVQ_UNROLL for (int i = 0; i < 2; ++i) {
        sums[i] = fold(sums[i], sums[i + 2], at.lane, distance);
      }
      distance /= 2;
    }
    if (vectors >= 2) {
      sums[0] = fold(sums[0], sums[1], at.lane, distance);
      distance /= 2;
    }
    KVQ_UNROLL for (int d = 16; d > 0; d /= 2) {
      if (d <= distance) sums[0] += simd_shuffle_xor(sums[0], ushort(d));
    }
    return sums[0];
  }

  /// The lower lanes' sum of both lanes' `low`, the upper lanes' of `high`.
  static float fold(float low, float high, uint lane, int distance) {
    const bool upper = (lane & uint(distance)) != 0u;
    return (upper ? high : low) + simd_shuffle_xor(upper ? low : high, ushort(distance));
  }

  /// Puts the lanes' values where sum_row reads them, zeros of vectors that are not there, too.
  static void put(threadgroup float* rows, thread const Place& at, thread const float* x) {
    // Blocks of a simdgroup's vectors lie one after the other, two lanes each.
    threadgroup float* mine = rows + int(at.lane / 2u) * KVQ_TQ_STRIDE + (at.odd ? 8 : 0);
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
        if (KVQ_SPAN * pass >= at.dim) continue;
        if (!at.exists || (!at.is_filled() && at.element(pass, eight) >= at.dim)) continue;
        threadgroup float* to = mine + KVQ_SPAN / 32 * KVQ_TQ_STRIDE * pass + 2 * eight;
        KVQ_UNROLL for (int i = 0; i < 8; i += 4) {
          thread const float* v = x + KVQ_WIDTH * pass + eight + i;
          *reinterpret_cast<threadgroup float4*>(to + i) = float4(v[0], v[1], v[2], v[3]);
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  /// How many boundaries lie below z. They are symmetric: the magnitude is compared with one of the
  /// two positive ones around it, as integers, in which one equal to a negative z's counts, too. Up
  /// to 6 bits the lanes hold them, `mine` of each, else memory.
  static uint code_of(float z, uint mine, constant float* edges, int bits) {
    const uint half_of = 1u << (bits - 1), most = 2u * half_of - 1u;
    constant float* rank = kvq_rank(bits);
    const float x = min(fabs(z), edges[most - 1u]);
    float index = fma(rank[2], x, rank[1]);
    if (bits == 8) index = fma(fma(fma(rank[4], x, rank[3]), x, rank[2]), x, rank[1]);
    const uint nearest = as_type<uint>(fma(index, x, rank[0] + KVQ_MAGIC)) & (half_of - 1u);
    const uint edge = bits <= 6 ? simd_shuffle(mine, ushort(nearest))
                                : as_type<uint>(edges[half_of - 1u + nearest]);
    const bool above = z > 0.0f;
    const uint magnitude = (as_type<uint>(z) & 0x7fffffffu) + (above ? 0u : 1u);
    const uint code = half_of + nearest - (edge < magnitude ? 0u : 1u);
    return above ? code : most - code;
  }

  static void encode_any(thread const float* x, thread const Place& at, int bits, float divisor,
                         int scale_dtype, thread uint* codes) {
    constant float* edges = kvq_boundaries(bits);
    const uint half_of = 1u << (bits - 1);
    const uint mine =
        bits <= 6 ? as_type<uint>(edges[half_of - 1u + (at.lane & (half_of - 1u))]) : 0u;
    const Divisor by = divisor_of(divisor, scale_dtype, 9.765625e-4f);  // norms are below 2^62
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      codes[i] = code_of(by.divide(x[i]), mine, edges, bits);
    }
  }

  /// Codes of few bits by the table of cells. Where a value is so near a boundary that roundings
  /// decide, or is NaN, the simdgroup starts over.
  static void encode_pass(thread const float* x, thread const Place& at, int bits, float divisor,
                          int scale_dtype, thread uint* codes) {
    bool is_plain = bits <= 4 && is_plain_divisor(divisor);
    if (bits <= 4) {
      const float inverse = 1.0f / divisor;
      KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
        const float z = x[i] * inverse;
        const uint cell = as_type<uint>(fma(clamp(z, -3.8f, 3.8f), 4.0f, KVQ_MAGIC)) & 31u;
        const uint edge = simd_shuffle(at.table, ushort(cell));
        const float above = z - as_type<float>(edge);
        is_plain = is_plain && fabs(above) >= 1e-5f;
        codes[i] = (edge & 15u) - (as_type<uint>(above) >> 31);
      }
    }
    if (simd_any(!is_plain)) encode_any(x, at, bits, divisor, scale_dtype, codes);
  }

  static void encode(thread float* x, thread const Place& at, thread const Target& out, int bits,
                     int, threadgroup float* rows) {
    put(rows, at, x);
    const float squares = sum_row(rows, at, true);
    const float mean_square = squares / float(at.dim);
    float norm = round_scale(precise::sqrt(mean_square), out.scale_dtype);
    const bool has_nan = is_nan(norm);
    const float divisor = norm == 0.0f ? 1.0f : norm;
    constant float* centroids = kvq_codebook(bits);
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (KVQ_SPAN * pass >= at.dim) continue;
      thread float* v = x + KVQ_WIDTH * pass;
      uint codes[KVQ_WIDTH];
      encode_pass(v, at, bits, divisor, out.scale_dtype, codes);
      Pieces pieces;
      KVQ_UNROLL for (int i = 0; i < 2; ++i) pieces.piece[i] = pack8(codes + 8 * i, bits);
      if (has_nan) pieces = no_pieces();
      pieces = exchanged(pieces, at, bits);
      if (at.packs(pass)) {
        const int first = at.sixteen(pass);
        store_codes(out.codes + first / 8 * bits, bits, first + 8 < at.dim,
                    alignment(bits, at.wide), pieces);
      }
      if (out.unbiased) {
        KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) v[i] *= centroids[codes[i]];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // the squares have been read
    if (out.unbiased) {
      put(rows, at, x);
      const float dot = sum_row(rows, at, false);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      norm = dot > 0.0f && !has_nan ? round_scale(squares / dot, out.scale_dtype) : norm;
    }
    if (at.active && at.first == 0) store_scale(out.scales, 0, out.scale_dtype, norm);
  }

  static Packed load(thread const Source& in, thread const Place& at, int pass, int bits, int) {
    const int first = at.sixteen(pass);
    Packed packed = nothing();
    if (at.packs(pass)) {
      packed.codes = load_codes(in.codes + first / 8 * bits, bits, first + 8 < at.dim,
                                alignment(bits, at.wide));
    }
    if (at.active) packed.scale = load_float(in.scales, 0, in.scale_dtype);
    return packed;
  }

  static void decode(thread const Packed& packed, thread const Place& at, int bits,
                     thread float* y) {
    const Pieces codes = exchanged(packed.codes, at, bits);
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      const uint code = code_at(codes.piece[i / 8], i % 8, bits);
      const float centroid = bits > 5 ? kvq_codebook(bits)[code]
                                      : as_type<float>(simd_shuffle(at.table, ushort(code)));
      y[i] = centroid * packed.scale;
    }
  }
};
