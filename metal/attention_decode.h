// Attention of few queries on packed rows. A threadgroup serves R (query, head) rows of one KV
// head, so that packed codes are read once for them all, and one split of the tokens.
//
// Each of its simdgroups takes blocks of 32 tokens on its own:
//  1. scores: LPR lanes share a token's key; each lane dots its chunks of LPR keys with the
//     queries (in threadgroup memory, read once for the LPR keys). A butterfly that halves the
//     keys a lane keeps at every step leaves lane i with the scores of token i.
//  2. softmax with one token a lane: one maximum per block, one exponential per score.
//  3. values: a lane owns columns and runs over the tokens; weights come from threadgroup memory.
// Scales and biases stay out of the inner loops: dot(q, s c + b) = s dot(q, c) + b sum(q).
#pragma once

#include "attention_common.h"

/// Shape of the score phase.
template <typename F, uint D>
struct KvqKeyShape {
  KVQ_CONST uint kChunk = kvq_power(D, F::kMaxChunk);     ///< elements of a chunk
  KVQ_CONST uint kChunks = D / kChunk;                    ///< chunks of a row
  KVQ_CONST uint kLanes = kvq_power(kChunks, 4);          ///< lanes that share a row
  KVQ_CONST uint kTurns = kChunks / kLanes;               ///< chunks of a lane
  KVQ_CONST uint kBytes = kChunk * F::kBits / 8;          ///< bytes of a chunk
  KVQ_CONST uint kWords = (kBytes + 3) / 4;               ///< words of a chunk
  KVQ_CONST uint kUnpack = kChunk % 4 == 0 ? 4 : kChunk;  ///< elements at a time
};

/// Shape of the value phase.
template <typename F, uint DV, uint R>
struct KvqValueShape {
  KVQ_CONST uint kWanted = R <= 2 ? 32 : R == 4 ? 16 : 8;  ///< R * kWanted sums a lane: 64 at most
  KVQ_CONST uint kChunk = kvq_value_chunk(DV, kvq_least(F::kMaxChunk, kWanted));
  KVQ_CONST uint kLanes = DV / kChunk;  ///< lanes that share a row
  KVQ_CONST uint kRows = 32 / kLanes;   ///< rows that a simdgroup reads at once
  KVQ_CONST uint kBytes = kChunk * F::kBits / 8;
  KVQ_CONST uint kWords = (kBytes + 3) / 4;
  KVQ_CONST uint kUnpack = kChunk % 8 == 0 ? 8 : kChunk;
  KVQ_CONST uint kInFlight =
      kvq_least(4, 32 / kRows);  ///< rows that a lane loads before it uses one
};

/// Queries in threadgroup memory: per chunk [kChunk][R], padded against bank conflicts.
template <typename F, uint D, uint R>
struct KvqQueryTile {
  typedef KvqKeyShape<F, D> K;
  KVQ_CONST uint kVectors = (K::kUnpack * R + 3) / 4;  ///< float4s of kUnpack elements
  KVQ_CONST uint kStride = (K::kChunk / K::kUnpack) * kVectors + 1;
  KVQ_CONST uint kSize = K::kChunks * kStride;  ///< float4s
  static inline uint index(uint chunk, uint i, uint r) {
    return (chunk * kStride + i / K::kUnpack * kVectors) * 4 + i % K::kUnpack * R + r;
  }
};

/// One step of kvq_transpose_sum: lanes HALF apart share 2 HALF sums out among themselves.
template <uint HALF>
inline void kvq_halve_sums(thread float* x, uint lane) {
  const bool upper = (lane & HALF) != 0;
  KVQ_UNROLL for (uint i = 0; i < HALF; ++i) {
    const float low = x[i], high = x[i + HALF];
    x[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, ushort(HALF));
  }
}

/// Sums COUNT values over groups of COUNT lanes: lane i of a group gets everybody's x[i].
template <uint COUNT>
inline float kvq_transpose_sum(thread float* x, uint lane) {
  static_assert(COUNT <= 4, "more lanes than steps");
  if (COUNT == 4) kvq_halve_sums<2>(x, lane);
  if (COUNT >= 2) kvq_halve_sums<1>(x, lane);
  return x[0];
}

/// Sums over the ROWS groups of LANES lanes; right in the first of them.
template <uint LANES, uint ROWS>
inline float kvq_sum_rows(float x, uint lane) {
  if (LANES * ROWS == 32 && (LANES & (LANES - 1)) == 0) {
    KVQ_UNROLL for (uint step = LANES; step < 32; step *= 2) x += simd_shuffle_xor(x, ushort(step));
    return x;
  }
  float sum = x;
  KVQ_UNROLL for (uint i = 1; i < ROWS; ++i) {
    sum += simd_shuffle(x, ushort(min(lane + i * LANES, 31u)));
  }
  return sum;
}

template <typename T, typename KF, typename VF, uint D, uint DV, uint R, bool ALIGNED>
[[kernel, max_total_threads_per_threadgroup(KVQ_ATTENTION_THREADS)]] void kvq_attention_decode(
    KVQ_ATTENTION_BUFFERS(T), uint3 position [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  typedef KvqKeyShape<KF, D> K;
  typedef KvqValueShape<VF, DV, R> V;
  typedef KvqQueryTile<KF, D, R> Q;
  constexpr uint simdgroups = KVQ_ATTENTION_THREADS / 32;
  // Products of a chunk are the longest sums: of float queries they would be the largest error.
  constexpr uint sums = sizeof(T) == 4 && R <= 4 && K::kUnpack % 2 == 0 ? 2 : 1;
  constexpr uint tile_size = kvq_most(Q::kSize, (R * kvq_most(D, DV) + 3) / 4);
  threadgroup float4 tile[tile_size];  // queries; before that and at the end plain rows
  threadgroup float query_sum[K::kChunks * R];
  threadgroup float mean_score[R];
  threadgroup uint row_first[R], row_last[R];
  threadgroup float weights[simdgroups][32 * R];
  threadgroup float group_m[simdgroups][R], group_l[simdgroups][R];
  threadgroup float row_m[R], row_l[R];
  threadgroup float k_table[kvq_most(KF::kTable, 1)], v_table[kvq_most(VF::kTable, 1)];
  threadgroup float* rows = reinterpret_cast<threadgroup float*>(tile);

  const uint split = position.x, first_row = position.y * R;
  const uint batch = position.z / p.groups, group = position.z % p.groups;
  const uint repeat = p.heads / p.groups, all_rows = p.queries * repeat;
  const long length = kvq_bound(kv_length, p.kv_length, batch);
  const KvqSpan span = kvq_row_span(p, length, kvq_bound(kv_start, p.kv_start, batch),
                                    kvq_bound(kv_end, p.kv_end, batch));
  const KvqTokens tokens =
      kvq_tokens(p, span, length, first_row / repeat, (min(first_row + R, all_rows) - 1) / repeat,
                 split, 32 * simdgroups);

  kvq_fill_table<KF>(k_table, thread_index);
  kvq_fill_table<VF>(v_table, thread_index);

  // Queries, scaled and rotated. Rows past the last repeat it; they are not written out.
  for (uint i = thread_index; i < R * D; i += KVQ_ATTENTION_THREADS) {
    const KvqRow row = kvq_row(p, group, min(first_row + i / D, all_rows - 1));
    const long from = long(batch) * p.query_batch + long(row.head) * p.query_head +
                      long(row.query) * p.query_token;
    rows[i] = float(query[from + i % D]) * p.scale;
  }
  if (thread_index < R) {
    const KvqRow row = kvq_row(p, group, min(first_row + thread_index, all_rows - 1));
    const KvqSpan seen = kvq_query_span(p, span, length, row.query);
    row_first[thread_index] = uint(clamp(seen.first - tokens.first, 0l, long(tokens.count)));
    row_last[thread_index] = uint(clamp(seen.last - tokens.first, 0l, long(tokens.count)));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint r = simdgroup; r < R; r += simdgroups) {
    float sum = 0.0f;
    if (p.k.centred != 0) {
      for (uint d = lane; d < D; d += 32) sum += rows[r * D + d] * k_mean[ulong(group) * D + d];
    }
    sum = simd_sum(sum);
    if (lane == 0) mean_score[r] = sum;
  }
  if (p.k.rotated != 0) {
    kvq_rotate(rows, D, R, k_signs, false, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  // From plain rows to the order of the packed codes, in place: through registers.
  constexpr uint per_thread = (R * D + KVQ_ATTENTION_THREADS - 1) / KVQ_ATTENTION_THREADS;
  float mine[per_thread];
  KVQ_UNROLL for (uint j = 0; j < per_thread; ++j) {
    const uint i = thread_index + j * KVQ_ATTENTION_THREADS;
    const uint chunk = i / R / K::kChunk;
    if (i < R * D)
      mine[j] = rows[i % R * D + KF::template element<K::kChunk>(chunk, i / R % K::kChunk)];
  }
  if (KF::kBiased) {
    for (uint i = thread_index; i < K::kChunks * R; i += KVQ_ATTENTION_THREADS) {
      float sum = 0.0f;
      for (uint d = 0; d < K::kChunk; ++d) sum += rows[i % R * D + i / R * K::kChunk + d];
      query_sum[i] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  KVQ_UNROLL for (uint j = 0; j < per_thread; ++j) {
    const uint i = thread_index + j * KVQ_ATTENTION_THREADS;
    const uint e = i / R % K::kChunk;
    if (i < R * D) rows[Q::index(i / R / K::kChunk, e, i % R)] = mine[j] * KF::factor(e);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Tokens in [all_first, all_last) are seen by every row.
  uint all_first = 0, all_last = tokens.count;
  KVQ_UNROLL for (uint r = 0; r < R; ++r) {
    all_first = max(all_first, row_first[r]);
    all_last = min(all_last, row_last[r]);
  }
  const bool shaped = p.softcap > 0.0f || p.mask_kind != KVQ_MASK_NONE;
  const long mask_origin = kvq_mask_origin(p, tokens, length);

  const KvqRows keys = kvq_rows(p.k, k_codes, k_scales, k_biases, batch, group);
  const KvqRows values = kvq_rows(p.v, v_codes, v_scales, v_biases, batch, group);
  const uint magic = p.magic;
  const uint k_lane = lane % K::kLanes;
  // Lanes past the last whole row help with none: their weight is 0.
  const uint v_row = lane / V::kLanes, v_chunk = lane % V::kLanes;
  threadgroup float* w = weights[simdgroup];

  float m[R], l[R], o[R][V::kChunk], o_bias[R];
  KVQ_UNROLL for (uint r = 0; r < R; ++r) {
    m[r] = KVQ_LOWEST;
    l[r] = o_bias[r] = 0.0f;
    KVQ_UNROLL for (uint i = 0; i < V::kChunk; ++i) o[r][i] = 0.0f;
  }

  for (uint t = tokens.begin + simdgroup * 32; t < tokens.end; t += simdgroups * 32) {
    // 1. Scores.
    float score[R][K::kLanes];
    KVQ_UNROLL for (uint r = 0; r < R; ++r) {
      KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) score[r][u] = 0.0f;
    }
    uint slot[K::kLanes];
    KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
      slot[u] = kvq_slot(tokens, min(t + lane / K::kLanes * K::kLanes + u, tokens.end - 1));
    }
    for (uint turn = 0; turn < K::kTurns; ++turn) {
      const uint chunk = turn * K::kLanes + k_lane;
      uint words[K::kLanes][K::kWords];
      float2 scale[K::kLanes];
      KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
        const KvqRows key = keys.row(slot[u]);
        kvq_load<K::kBytes, kvq_alignment<KF, ALIGNED>(K::kBytes)>(
            key.codes + KF::template offset<K::kChunk>(chunk), words[u]);
        scale[u] = KF::template scale_bias<K::kChunk>(key.codes, key.scales, key.biases, chunk);
      }
      float dot[K::kLanes][sums * R];
      KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
        KVQ_UNROLL for (uint r = 0; r < sums * R; ++r) dot[u][r] = 0.0f;
      }
      KVQ_UNROLL for (uint i = 0; i < K::kChunk; i += K::kUnpack) {
        float c[K::kLanes][K::kUnpack];
        KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
          KF::template unpack<K::kUnpack>(words[u], i, k_table, magic, c[u]);
        }
        KVQ_UNROLL for (uint j = 0; j < Q::kVectors; ++j) {
          const float4 q = tile[chunk * Q::kStride + i / K::kUnpack * Q::kVectors + j];
          KVQ_UNROLL for (uint e = 4 * j; e < kvq_least(4 * j + 4, K::kUnpack * R); ++e) {
            KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
              const uint at = e % (sums * R);
              dot[u][at] = fma(q[e % 4], c[u][e / R], dot[u][at]);
            }
          }
        }
      }
      KVQ_UNROLL for (uint r = 0; r < R; ++r) {
        const float sum = KF::kBiased ? query_sum[chunk * R + r] : 0.0f;
        KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
          if (sums == 2) dot[u][r] += dot[u][(sums - 1) * R + r];
          score[r][u] = fma(scale[u].x, dot[u][r], score[r][u]);
          if (KF::kBiased) score[r][u] = fma(scale[u].y, sum, score[r][u]);
        }
      }
    }

    // 2. Softmax: token t + lane.
    const bool plain = !shaped && t >= all_first && t + 32 <= min(all_last, tokens.end);
    float s[R];
    uint seen = (1u << R) - 1;  // bit r: row r sees token t + lane
    KVQ_UNROLL for (uint r = 0; r < R; ++r) {
      s[r] = kvq_transpose_sum<K::kLanes>(score[r], lane) + mean_score[r];
    }
    if (!plain) {
      const uint token = t + lane;
      // Of a token past the end the last one's mask is read, which is there.
      const long column = mask_origin + long(min(token, tokens.end - 1));
      KVQ_UNROLL for (uint r = 0; r < R; ++r) {
        bool visible = token < tokens.end && token >= row_first[r] && token < row_last[r];
        const KvqRow row = kvq_row(p, group, min(first_row + r, all_rows - 1));
        s[r] = kvq_finish_score(kvq_shaping(p), mask, kvq_mask_row(p, batch, row), column, s[r],
                                visible);
        if (!visible) seen &= ~(1u << r);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    KVQ_UNROLL for (uint r = 0; r < R; ++r) {
      const bool visible = (seen >> r & 1) != 0;
      const float highest = max(m[r], simd_max(visible ? s[r] : KVQ_LOWEST));
      if (highest > m[r]) {
        const float kept = kvq_exp(m[r] - highest);
        m[r] = highest;
        l[r] *= kept;
        o_bias[r] *= kept;
        KVQ_UNROLL for (uint i = 0; i < V::kChunk; ++i) o[r][i] *= kept;
      }
      const float weight = visible ? kvq_exp(s[r] - m[r]) : 0.0f;
      l[r] += weight;
      w[lane * R + r] = weight;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    // 3. Values.
    for (uint j = 0; j < 32 && t + j < tokens.end; j += V::kRows * V::kInFlight) {
      uint words[V::kInFlight][V::kWords];
      float2 scale[V::kInFlight];
      KVQ_UNROLL for (uint u = 0; u < V::kInFlight; ++u) {
        const uint at = min(j + u * V::kRows + v_row, 31u);
        const KvqRows value = values.row(kvq_slot(tokens, min(t + at, tokens.end - 1)));
        kvq_load<V::kBytes, kvq_alignment<VF, ALIGNED>(V::kBytes)>(
            value.codes + VF::template offset<V::kChunk>(v_chunk), words[u]);
        scale[u] =
            VF::template scale_bias<V::kChunk>(value.codes, value.scales, value.biases, v_chunk);
      }
      if (t + 32 > tokens.end) {
        // Tokens past the end repeat the last one: 0 times its infinity would be NaN.
        KVQ_UNROLL for (uint u = 0; u < V::kInFlight; ++u) {
          if (t + j + u * V::kRows + v_row >= tokens.end) {
            KVQ_UNROLL for (uint i = 0; i < V::kWords; ++i) words[u][i] = 0;
            scale[u] = float2(0.0f);
          }
        }
      }
      KVQ_UNROLL for (uint u = 0; u < V::kInFlight; ++u) {
        const uint row = j + u * V::kRows + v_row;
        const bool counts = V::kRows * V::kLanes == 32 && 32 % (V::kRows * V::kInFlight) == 0
                                ? true
                                : row < 32 && v_row < V::kRows;
        float scaled[R];
        KVQ_UNROLL for (uint r = 0; r < R; ++r) {
          const float weight = counts ? w[min(row, 31u) * R + r] : 0.0f;
          scaled[r] = weight * scale[u].x;
          if (VF::kBiased) o_bias[r] = fma(weight, scale[u].y, o_bias[r]);
        }
        KVQ_UNROLL for (uint i = 0; i < V::kChunk; i += V::kUnpack) {
          float c[V::kUnpack];
          VF::template unpack<V::kUnpack>(words[u], i, v_table, magic, c);
          KVQ_UNROLL for (uint e = 0; e < V::kUnpack; ++e) {
            KVQ_UNROLL for (uint r = 0; r < R; ++r) {
              o[r][i + e] = fma(scaled[r], c[e], o[r][i + e]);
            }
          }
        }
      }
    }
  }

  // Sum over the simdgroups, in turn, into plain rows.
  KVQ_UNROLL for (uint r = 0; r < R; ++r) {
    const float sum = simd_sum(l[r]);
    if (lane == 0) {
      group_m[simdgroup][r] = m[r];
      group_l[simdgroup][r] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index < R) {
    float highest = KVQ_LOWEST, sum = 0.0f;
    for (uint s = 0; s < simdgroups; ++s) highest = max(highest, group_m[s][thread_index]);
    for (uint s = 0; s < simdgroups; ++s) {
      sum += group_l[s][thread_index] * kvq_exp(group_m[s][thread_index] - highest);
    }
    row_m[thread_index] = highest;
    row_l[thread_index] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  KVQ_UNROLL for (uint r = 0; r < R; ++r) {
    const float kept = kvq_exp(m[r] - row_m[r]);
    KVQ_UNROLL for (uint i = 0; i < V::kChunk; ++i) {
      float x = o[r][i] * VF::factor(i);
      if (VF::kBiased) x += o_bias[r];
      o[r][i] = kvq_sum_rows<V::kLanes, V::kRows>(x * kept, lane);
    }
  }
  for (uint s = 0; s < simdgroups; ++s) {
    if (s == simdgroup && v_row == 0) {
      KVQ_UNROLL for (uint r = 0; r < R; ++r) {
        KVQ_UNROLL for (uint i = 0; i < V::kChunk; ++i) {
          const uint at = r * DV + VF::template element<V::kChunk>(v_chunk, i);
          rows[at] = s == 0 ? o[r][i] : rows[at] + o[r][i];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  kvq_write_rows<T, DV>(p, rows, row_m, row_l, R, first_row, batch, group, split, sinks, v_signs,
                        v_mean, out, lse, partial, thread_index);
}
