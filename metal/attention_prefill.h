// Attention of many queries on packed rows. A threadgroup serves 32 (query, head) rows of one KV
// head, eight for each of its simdgroups, and walks over the tokens in tiles: a tile of keys is
// dequantised into threadgroup memory, multiplied with the queries by simdgroup_matrix, then the
// same memory takes the tile of values. Tiles that no row sees are not visited. What it needs does
// not depend on the number of tokens.
#pragma once

#include <metal_simdgroup_matrix>

#include "attention_common.h"

/// A maximum is replaced only by one this much larger: rescaling the output is rare then, and a
/// weight of at most e^8 costs no precision.
#define KVQ_RESCALE 8.0f

/// Most float products that a score sums in a row. Adding them all one after the other is the
/// largest error of float attention; float16 and bfloat16 lose more by rounding their operands.
#define KVQ_SUMMED_IN_A_ROW 32

/// float to T for a tile; a finite value too large for float16 saturates, NaN and infinity stay.
template <typename T>
inline T kvq_narrow(float x) {
  return T(x);
}
template <>
inline half kvq_narrow<half>(float x) {
  return half(fabs(x) < INFINITY ? clamp(x, -65504.0f, 65504.0f) : x);
}

/// Dequantises tokens [t, t + TOKENS) of one head to tile[TOKENS][STRIDE]; zeros past the end.
template <typename T, typename F, uint DIM, uint TOKENS, uint STRIDE, bool ALIGNED>
inline void kvq_fill_tile(KvqRows from, uint magic, thread const KvqTokens& tokens, uint t,
                          threadgroup T* tile, threadgroup const float* table, uint thread_index) {
  constexpr uint chunk_size = kvq_power(DIM, kvq_least(F::kMaxChunk, 16));
  constexpr uint chunks = DIM / chunk_size;
  constexpr uint bytes = chunk_size * F::kBits / 8;
  constexpr uint unpack = chunk_size % 8 == 0 ? 8 : chunk_size;
  for (uint i = thread_index; i < TOKENS * chunks; i += KVQ_ATTENTION_THREADS) {
    const uint token = i / chunks, chunk = i % chunks;
    threadgroup T* row = tile + token * STRIDE;
    if (t + token >= tokens.end) {
      KVQ_UNROLL for (uint e = 0; e < chunk_size; ++e) {
        row[F::template element<chunk_size>(chunk, e)] = T(0.0f);
      }
      continue;
    }
    const KvqRows packed = from.row(kvq_slot(tokens, t + token));
    uint words[(bytes + 3) / 4];
    kvq_load<bytes, kvq_alignment<F, ALIGNED>(bytes)>(
        packed.codes + F::template offset<chunk_size>(chunk), words);
    const float2 scale =
        F::template scale_bias<chunk_size>(packed.codes, packed.scales, packed.biases, chunk);
    KVQ_UNROLL for (uint e = 0; e < chunk_size; e += unpack) {
      float c[unpack];
      F::template unpack<unpack>(words, e, table, magic, c);
      KVQ_UNROLL for (uint j = 0; j < unpack; ++j) {
        const float x = fma(scale.x * F::factor(e + j), c[j], scale.y);
        row[F::template element<chunk_size>(chunk, e + j)] = kvq_narrow<T>(x);
      }
    }
  }
}

template <typename T, typename KF, typename VF, uint D, uint DV, bool ALIGNED>
[[kernel, max_total_threads_per_threadgroup(KVQ_ATTENTION_THREADS)]] void kvq_attention_prefill(
    KVQ_ATTENTION_BUFFERS(T), uint3 position [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint simdgroups = KVQ_ATTENTION_THREADS / 32;
  constexpr uint dim = kvq_most(D, DV);
  constexpr uint block = sizeof(T) * dim <= 512 ? 32 : 16;  // tokens of a tile
  constexpr uint stride = dim + 8;                          // of the tile, padded
  constexpr uint score_stride = block + 4, weight_stride = block + 8;
  constexpr uint score_step = sizeof(T) == 4 ? KVQ_SUMMED_IN_A_ROW : D;
  constexpr uint tile_bytes = block * stride * sizeof(T);
  constexpr uint stage_bytes = 8 * kvq_most(DV * sizeof(float), (D + 8) * sizeof(T));
  threadgroup float4 memory[kvq_most(tile_bytes, stage_bytes) / 16];
  threadgroup float scores[KVQ_PREFILL_ROWS * score_stride];
  threadgroup T weights[KVQ_PREFILL_ROWS * weight_stride];
  threadgroup float mean_score[KVQ_PREFILL_ROWS], row_m[KVQ_PREFILL_ROWS], row_l[KVQ_PREFILL_ROWS];
  threadgroup float k_table[kvq_most(KF::kTable, 1)], v_table[kvq_most(VF::kTable, 1)];
  threadgroup T* tile = reinterpret_cast<threadgroup T*>(memory);
  // Eight rows: before the first tile of queries, after the last of sums.
  threadgroup T* query_tile = reinterpret_cast<threadgroup T*>(memory);
  threadgroup float* stage = reinterpret_cast<threadgroup float*>(memory);

  const uint split = position.x, first_row = position.y * KVQ_PREFILL_ROWS;
  const uint batch = position.z / p.groups, group = position.z % p.groups;
  const uint repeat = p.repeat, all_rows = p.queries * repeat;
  const long length = kvq_bound(kv_length, p.kv_length, batch);
  const KvqSpan span = kvq_row_span(p, length, kvq_bound(kv_start, p.kv_start, batch),
                                    kvq_bound(kv_end, p.kv_end, batch));
  const KvqTokens tokens =
      kvq_tokens(p, span, length, first_row / repeat,
                 (min(first_row + KVQ_PREFILL_ROWS, all_rows) - 1) / repeat, split, block);

  kvq_fill_table<KF>(k_table, thread_index);
  kvq_fill_table<VF>(v_table, thread_index);

  // Queries, eight rows at a time.
  simdgroup_matrix<T, 8, 8> q[D / 8];
  for (uint s = 0; s < simdgroups; ++s) {
    typedef KvqQueries<T, D, 8> Queries;
    Queries queries;
    queries.load(p, query, k_signs, batch, group, first_row + 8 * s, simdgroup, lane);
    KvqLaneRow<D> own[Queries::kRows];
    float mean[Queries::kRows];
    queries.get(1.0f, p.k.centred != 0, k_mean + ulong(group) * D, lane, own, mean);
    KVQ_UNROLL for (uint j = 0; j < Queries::kRows; ++j) {
      const uint r = simdgroup * Queries::kRows + j;
      if (lane == 0) mean_score[8 * s + r] = mean[j];
      KVQ_UNROLL for (uint i = 0; i < KvqLaneRow<D>::kCount; ++i) {
        if (!KvqLaneRow<D>::has(i, lane)) continue;
        query_tile[r * (D + 8) + 32 * i + lane] = kvq_narrow<T>(own[j].x[i]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (s == simdgroup) {
      KVQ_UNROLL for (uint i = 0; i < D / 8; ++i) simdgroup_load(q[i], query_tile + 8 * i, D + 8);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // In the softmax four lanes share a row.
  const uint my_row = 8 * simdgroup + lane / 4;
  const KvqRow row = kvq_row(repeat, group, min(first_row + my_row, all_rows - 1));
  const KvqSpan seen_span = kvq_query_span(p, span, length, row.query);
  const uint row_first = uint(clamp(seen_span.first - tokens.first, 0l, long(tokens.count)));
  const uint row_last = uint(clamp(seen_span.last - tokens.first, 0l, long(tokens.count)));
  const uint any_first = simd_min(row_first), any_last = simd_max(row_last);
  const uint all_first = simd_max(row_first), all_last = simd_min(row_last);
  const long mask_row =
      long(batch) * p.mask_batch + long(row.head) * p.mask_head + long(row.query) * p.mask_query;
  const long mask_origin = kvq_mask_origin(p, tokens, length);
  const float row_mean = p.k.centred != 0 ? p.scale * mean_score[my_row] : 0.0f;

  const KvqRows keys = kvq_rows(p.k, k_codes, k_scales, k_biases, batch, group);
  const KvqRows values = kvq_rows(p.v, v_codes, v_scales, v_biases, batch, group);
  threadgroup float* my_scores = scores + 8 * simdgroup * score_stride;
  threadgroup T* my_weights = weights + 8 * simdgroup * weight_stride;

  simdgroup_matrix<float, 8, 8> o[DV / 8];
  KVQ_UNROLL for (uint i = 0; i < DV / 8; ++i) o[i] =
      make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  float m = KVQ_LOWEST, l = 0.0f;

  for (uint t = tokens.begin; t < tokens.end; t += block) {
    kvq_fill_tile<T, KF, D, block, stride, ALIGNED>(keys, p.magic, tokens, t, tile, k_table,
                                                    thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const bool active = t < any_last && t + block > any_first;
    if (active) {
      float score[block / 4];
      KVQ_UNROLL for (uint d = 0; d < D; d += score_step) {
        for (uint j = 0; j < block; j += 8) {
          simdgroup_matrix<float, 8, 8> s = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
          KVQ_UNROLL for (uint i = d; i < kvq_least(d + score_step, D); i += 8) {
            simdgroup_matrix<T, 8, 8> key;
            simdgroup_load(key, tile + j * stride + i, stride, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(s, q[i / 8], key, s);
          }
          simdgroup_store(s, my_scores + j, score_stride);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        KVQ_UNROLL for (uint j = 0; j < block / 4; ++j) {
          const float part = my_scores[lane / 4 * score_stride + lane % 4 + 4 * j];
          score[j] = d == 0 ? part : score[j] + part;
        }
        // Scores are in registers: their place serves the next sum, then to scale the output.
        simdgroup_barrier(mem_flags::mem_threadgroup);
      }

      const bool plain = p.softcap == 0.0f && p.mask_kind == KVQ_MASK_NONE && t >= all_first &&
                         t + block <= min(all_last, tokens.end);
      bool seen[block / 4];
      float highest = KVQ_LOWEST;
      KVQ_UNROLL for (uint j = 0; j < block / 4; ++j) {
        const uint column = lane % 4 + 4 * j, token = t + column;
        score[j] = fma(p.scale, score[j], row_mean);
        seen[j] = true;
        if (!plain) {
          seen[j] = token < tokens.end && token >= row_first && token < row_last;
          score[j] =
              kvq_finish_score(kvq_shaping(p), mask, mask_row,
                               mask_origin + long(min(token, tokens.end - 1)), score[j], seen[j]);
        }
        highest = max(highest, seen[j] ? score[j] : KVQ_LOWEST);
      }
      highest = max(highest, simd_shuffle_xor(highest, ushort(1)));
      highest = max(highest, simd_shuffle_xor(highest, ushort(2)));
      const bool grows = highest > m + KVQ_RESCALE;
      if (simd_max(grows ? 1u : 0u) != 0) {
        const float kept = grows ? kvq_exp(m - highest) : 1.0f;
        m = grows ? highest : m;
        l *= kept;
        for (uint i = 0; i < DV / 8; ++i) {
          simdgroup_store(o[i], my_scores, score_stride);
          simdgroup_barrier(mem_flags::mem_threadgroup);
          my_scores[lane / 4 * score_stride + lane % 4] *= kept;
          my_scores[lane / 4 * score_stride + lane % 4 + 4] *= kept;
          simdgroup_barrier(mem_flags::mem_threadgroup);
          // The next store needs no barrier: a lane stores the elements that it loads here.
          simdgroup_load(o[i], my_scores, score_stride);
        }
      }
      KVQ_UNROLL for (uint j = 0; j < block / 4; ++j) {
        const float weight = seen[j] ? kvq_exp(score[j] - m) : 0.0f;
        l += weight;
        my_weights[lane / 4 * weight_stride + lane % 4 + 4 * j] = T(weight);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    kvq_fill_tile<T, VF, DV, block, stride, ALIGNED>(values, p.magic, tokens, t, tile, v_table,
                                                     thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (active) {
      for (uint j = 0; j < block; j += 8) {
        simdgroup_matrix<T, 8, 8> weight;
        simdgroup_load(weight, my_weights + j, weight_stride);
        KVQ_UNROLL for (uint i = 0; i < DV / 8; ++i) {
          simdgroup_matrix<T, 8, 8> value;
          simdgroup_load(value, tile + j * stride + 8 * i, stride);
          simdgroup_multiply_accumulate(o[i], weight, value, o[i]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  l += simd_shuffle_xor(l, ushort(1));
  l += simd_shuffle_xor(l, ushort(2));
  if (lane % 4 == 0) {
    row_m[my_row] = m;
    row_l[my_row] = l;
  }
  for (uint s = 0; s < simdgroups; ++s) {
    if (s == simdgroup) {
      KVQ_UNROLL for (uint i = 0; i < DV / 8; ++i) simdgroup_store(o[i], stage + 8 * i, DV);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    kvq_write_rows<T, DV, 8>(p, stage, DV, row_m + 8 * s, row_l + 8 * s, first_row + 8 * s, batch,
                             group, split, sinks, v_signs, v_mean, out, lse, partial, simdgroup,
                             lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
