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

/// Elements of a row of D that share a scale.
template <typename F>
constexpr uint kvq_group_size(uint d) {
  return F::kGroup == 0 ? d : F::kGroup;
}

/// Shape of the score phase.
template <typename F, uint D>
struct KvqKeyShape {
  KVQ_CONST uint kChunk = kvq_power(D, F::kMaxChunk);     ///< elements of a chunk
  KVQ_CONST uint kChunks = D / kChunk;                    ///< chunks of a row
  KVQ_CONST uint kLanes = kvq_power(kChunks, 4);          ///< lanes that share a row
  KVQ_CONST uint kTurns = kChunks / kLanes;               ///< chunks of a lane
  KVQ_CONST uint kUnpack = kChunk % 4 == 0 ? 4 : kChunk;  ///< elements at a time
};

/// Shape of the value phase, for queries of T.
template <typename T, typename F, uint DV, uint R>
struct KvqValueShape {
  /// Of eight bits, where that does not make the sums of float queries longer: more rows of fewer
  /// elements, which takes fewer registers.
  KVQ_CONST bool kNarrow = R <= 2 && F::kBits == 8 && sizeof(T) == 2;
  KVQ_CONST uint kWide = kNarrow ? 16 : 32;
  KVQ_CONST uint kWanted = R <= 2 ? kWide : R == 4 ? 16 : 8;  ///< R * kWanted sums: 64 at most
  KVQ_CONST uint kChunk = kvq_value_chunk(DV, kvq_least(F::kMaxChunk, kWanted));
  KVQ_CONST uint kLanes = DV / kChunk;  ///< lanes that share a row
  KVQ_CONST uint kRows = 32 / kLanes;   ///< rows that a simdgroup reads at once
  KVQ_CONST uint kUnpack = kChunk % 8 == 0 ? 8 : kChunk;
  /// Rows that a lane loads before it uses one.
  KVQ_CONST uint kInFlight = kvq_least(kNarrow ? 8 : 4, 32 / kRows);
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

/// Sums N values over the ROWS groups of LANES lanes. The sums are shared out among them where
/// that is a matter of halving: N / ROWS each, group g from number g N / ROWS on. Else the first
/// group gets them all.
template <uint N, uint LANES, uint ROWS>
struct KvqRowSums {
  KVQ_CONST bool kHalved = LANES * ROWS == 32 && (LANES & (LANES - 1)) == 0 && N % ROWS == 0;
  KVQ_CONST uint kCount = kHalved ? N / ROWS : N;  ///< sums of a lane

  template <uint COUNT, uint HALF>
  static inline void halve(thread float* x, uint group) {
    const bool upper = (group & HALF) != 0;
    KVQ_UNROLL for (uint i = 0; i < COUNT / 2; ++i) {
      const float low = x[i], high = x[i + COUNT / 2];
      x[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, ushort(HALF * LANES));
    }
  }
  static inline void sum(thread float* x, uint group, uint lane) {
    if (kHalved) {
      if (ROWS == 32) halve<N, 16>(x, group);
      if (ROWS >= 16) halve<N * 16 / ROWS, 8>(x, group);
      if (ROWS >= 8) halve<N * 8 / ROWS, 4>(x, group);
      if (ROWS >= 4) halve<N * 4 / ROWS, 2>(x, group);
      if (ROWS >= 2) halve<N * 2 / ROWS, 1>(x, group);
    } else {
      KVQ_UNROLL for (uint i = 0; i < N; ++i) {
        float sum = x[i];
        KVQ_UNROLL for (uint j = 1; j < ROWS; ++j) {
          sum += simd_shuffle(x[i], ushort(min(lane + j * LANES, 31u)));
        }
        x[i] = sum;
      }
    }
  }
  /// Whether the lane has sums, and the number of the first.
  static inline bool has(uint group) { return kHalved || group == 0; }
  static inline uint first(uint group) { return kHalved ? group * kCount : 0; }
};

/// The scales of a block, one row a token. The lane of a token loads them; where a row has
/// several, lanes find those of their chunks in threadgroup memory. Not where chunks bring them, or
/// where threadgroup memory would not hold them: lanes see to their own.
template <typename F, uint D, typename Chunk, bool ALIGNED>
struct KvqBlockScales {
  typedef typename F::template Scales<D, ALIGNED> Scales;
  KVQ_CONST uint kGroups = D / kvq_group_size<F>(D);
  KVQ_CONST bool kOne = kGroups == 1;
  KVQ_CONST bool kShared = !kOne && !Chunk::kScaled && kGroups <= 8;
  KVQ_CONST bool kOwn = !kOne && !kShared;
  KVQ_CONST uint kStride = 33;  ///< float2s of a group, padded
  KVQ_CONST uint kSize = kOne || kShared ? kGroups * kStride : 0;
  uint words[Scales::kWords];

  void load(KvqRows row) thread {
    if (F::kBiased || !kOwn) Scales::load(row.codes, row.scales, row.biases, words);
  }
  float2 get(uint group) const thread { return Scales::get(words, group); }
  void clear() thread { KVQ_UNROLL for (uint i = 0; i < Scales::kWords; ++i) words[i] = 0; }
  void share(threadgroup float2* to, uint lane) const thread {
    KVQ_UNROLL for (uint g = 0; g < kGroups; ++g) to[g * kStride + lane] = get(g);
  }
};

/// The scale and bias of a chunk, from memory.
template <typename F, uint N>
inline float2 kvq_chunk_scale(KvqRows row, uint chunk) {
  return F::template scale_bias<N>(row.codes, row.scales, row.biases, chunk);
}

/// The packed row of token t, or of the last one.
inline KvqRows kvq_token_row(thread const KvqTokens& tokens, uint t, KvqRows rows) {
  return rows.row(kvq_slot(tokens, min(t, tokens.end - 1)));
}

/// Loads the chunk that begins `at` bytes into a row, of COUNT tokens, STEP apart.
template <uint COUNT, uint STEP, typename Chunk>
inline void kvq_load_chunks(thread Chunk* to, thread const KvqTokens& tokens, uint t, KvqRows rows,
                            uint at) {
  KVQ_UNROLL for (uint u = 0; u < COUNT; ++u) {
    to[u].load(kvq_token_row(tokens, t + u * STEP, rows).codes + at, at);
  }
}

template <typename T, typename KF, typename VF, uint D, uint DV, uint R, bool ALIGNED>
[[kernel, max_total_threads_per_threadgroup(KVQ_ATTENTION_THREADS)]] void kvq_attention_decode(
    KVQ_ATTENTION_BUFFERS(T), uint3 position [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  typedef KvqKeyShape<KF, D> K;
  typedef KvqValueShape<T, VF, DV, R> V;
  typedef KvqQueryTile<KF, D, R> Q;
  typedef KvqChunk<KF, D, K::kChunk, ALIGNED> KChunk;
  typedef KvqChunk<VF, DV, V::kChunk, ALIGNED> VChunk;
  typedef KvqBlockScales<KF, D, KChunk, ALIGNED> KScales;
  typedef KvqBlockScales<VF, DV, VChunk, ALIGNED> VScales;
  constexpr uint simdgroups = KVQ_ATTENTION_THREADS / 32;
  // Products of a chunk are the longest sums: of float queries they would be the largest error.
  constexpr uint sums = sizeof(T) == 4 && R <= 4 && K::kUnpack % 2 == 0 ? 2 : 1;
  constexpr uint tile_size = kvq_most(Q::kSize, (R * kvq_most(D, DV) + 3) / 4);
  threadgroup float4 tile[tile_size];  // queries; before that and at the end plain rows
  threadgroup float query_sum[KScales::kGroups * R];
  threadgroup float mean_score[R];
  threadgroup KvqSeen<R> seen;
  threadgroup float weights[simdgroups][32 * R];
  threadgroup float2
      shared_scales[simdgroups][kvq_most(kvq_most(KScales::kSize, VScales::kSize), 1)];
  threadgroup float group_m[simdgroups][R], group_l[simdgroups][R];
  threadgroup float row_m[R], row_l[R];
  threadgroup float k_table[kvq_most(KF::kTable, 1)], v_table[kvq_most(VF::kTable, 1)];
  threadgroup float* rows = reinterpret_cast<threadgroup float*>(tile);

  // What is needed of the parameters before the first scores is read before the first keys.
  const KvqAttentionParams early = p;
  const uint split = position.x, first_row = position.y * R;
  const uint batch = position.z / p.groups, group = position.z % p.groups;
  const uint repeat = p.repeat, all_rows = p.queries * repeat;
  const KvqRows keys = kvq_rows(p.k, k_codes, k_scales, k_biases, batch, group);
  const KvqRows values = kvq_rows(p.v, v_codes, v_scales, v_biases, batch, group);
  const long length = kvq_bound(kv_length, p.kv_length, batch);
  const KvqSpan span = kvq_row_span(p, length, kvq_bound(kv_start, p.kv_start, batch),
                                    kvq_bound(kv_end, p.kv_end, batch));
  const KvqTokens tokens =
      kvq_tokens(p, span, length, first_row / repeat, (min(first_row + R, all_rows) - 1) / repeat,
                 split, 32 * simdgroups);

  // Of the keys a lane has chunks of the tokens from k_token on, of the values of v_token and every
  // kRows-th after it. Lanes past the last whole row of values help with none: their weight is 0.
  const uint k_chunk = lane % K::kLanes, k_token = lane / K::kLanes * K::kLanes;
  const uint v_chunk = lane % V::kLanes, v_token = lane / V::kLanes;
  const uint v_at = VF::template offset<V::kChunk>(v_chunk);

  kvq_fill_seen(seen, early, span, length, tokens, batch, group, first_row, thread_index);
  // The queries first: loads return in order.
  KvqQueries<T, D, R> queries;
  queries.load(early, query, k_signs, batch, group, first_row, simdgroup, lane);
  // Keys are loaded as soon as those before them are used, a block ahead; values ahead of the
  // scores of their own block, or as keys are, whichever was measured faster.
  constexpr bool ahead = VF::kTable > 0 || VF::kBits == 8;
  KChunk key[K::kLanes];
  VChunk value[V::kInFlight];
  KScales key_scales;
  VScales value_scales;
  constexpr uint step = simdgroups * 32;
  if (tokens.begin < tokens.end) {
    const uint t = tokens.begin + simdgroup * 32;
    kvq_load_chunks<K::kLanes, 1>(key, tokens, t + k_token, keys,
                                  KF::template offset<K::kChunk>(k_chunk));
    key_scales.load(kvq_token_row(tokens, t + lane, keys));
  }

  kvq_fill_table<KF>(k_table, thread_index);
  kvq_fill_table<VF>(v_table, thread_index);

  // Queries, scaled and rotated.
  typedef KvqQueries<T, D, R> Queries;
  KvqLaneRow<D> own[Queries::kRows];
  float mean[Queries::kRows];
  queries.get(early.scale, early.k.centred != 0, k_mean + ulong(group) * D, lane, own, mean);
  // Values after the queries have come, so that keys come before them.
  if (ahead && tokens.begin < tokens.end) {
    const uint t = tokens.begin + simdgroup * 32;
    kvq_load_chunks<V::kInFlight, V::kRows>(value, tokens, t + v_token, values, v_at);
    value_scales.load(kvq_token_row(tokens, t + lane, values));
  }
  KVQ_UNROLL for (uint j = 0; j < Queries::kRows; ++j) {
    const uint r = simdgroup * Queries::kRows + j;
    const bool counts = R % simdgroups == 0 || r < R;
    if (KF::kBiased) {
      KVQ_UNROLL for (uint g = 0; g < KScales::kGroups; ++g) {
        const float sum = kvq_group_sum<KScales::kGroups>(own[j], g);
        if (counts && lane == 0) query_sum[g * R + r] = sum;
      }
    }
    if (counts && lane == 0) mean_score[r] = mean[j];
    KVQ_UNROLL for (uint i = 0; i < KvqLaneRow<D>::kCount; ++i) {
      if (counts && KvqLaneRow<D>::has(i, lane)) rows[r * D + 32 * i + lane] = own[j].x[i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // From plain rows to the order of the packed codes, in place: through registers.
  constexpr uint per_thread = (R * D + KVQ_ATTENTION_THREADS - 1) / KVQ_ATTENTION_THREADS;
  float mine[per_thread];
  KVQ_UNROLL for (uint j = 0; j < per_thread; ++j) {
    const uint i = thread_index + j * KVQ_ATTENTION_THREADS;
    const uint chunk = i / R / K::kChunk;
    if (i < R * D)
      mine[j] = rows[i % R * D + KF::template element<K::kChunk>(chunk, i / R % K::kChunk)];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  KVQ_UNROLL for (uint j = 0; j < per_thread; ++j) {
    const uint i = thread_index + j * KVQ_ATTENTION_THREADS;
    const uint e = i / R % K::kChunk;
    if (i < R * D) rows[Q::index(i / R / K::kChunk, e, i % R)] = mine[j] * KF::factor(e);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const uint2 plain_tokens = kvq_plain_tokens(seen, tokens.end);
  const uint magic = early.magic;
  threadgroup float* w = weights[simdgroup];
  threadgroup float2* scales = shared_scales[simdgroup];

  float m[R], l[R], o[R][V::kChunk], o_bias[R];
  KVQ_UNROLL for (uint r = 0; r < R; ++r) {
    m[r] = KVQ_LOWEST;
    l[r] = o_bias[r] = 0.0f;
    KVQ_UNROLL for (uint i = 0; i < V::kChunk; ++i) o[r][i] = 0.0f;
  }

  for (uint t = tokens.begin + simdgroup * 32; t < tokens.end; t += step) {
    if (!ahead) {
      kvq_load_chunks<V::kInFlight, V::kRows>(value, tokens, t + v_token, values, v_at);
      value_scales.load(kvq_token_row(tokens, t + lane, values));
    }

    // 1. Scores.
    if (KScales::kShared) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      key_scales.share(scales, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    float score[R][K::kLanes];
    KVQ_UNROLL for (uint r = 0; r < R; ++r) {
      KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) score[r][u] = 0.0f;
    }
    for (uint turn = 0; turn < K::kTurns; ++turn) {
      const uint chunk = turn * K::kLanes + k_chunk;
      const uint k_at = KF::template offset<K::kChunk>(chunk);
      uint codes[K::kLanes][KChunk::kCodes];
      KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) key[u].get(k_at, codes[u]);
      float dot[K::kLanes][sums * R];
      KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
        KVQ_UNROLL for (uint r = 0; r < sums * R; ++r) dot[u][r] = 0.0f;
      }
      KVQ_UNROLL for (uint i = 0; i < K::kChunk; i += K::kUnpack) {
        float c[K::kLanes][K::kUnpack];
        KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
          KF::template unpack<K::kUnpack>(codes[u], i, k_table, magic, c[u]);
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
      KVQ_UNROLL for (uint u = 0; u < K::kLanes; ++u) {
        float scale = 1.0f;
        if (KScales::kShared) {
          scale =
              scales[chunk * K::kChunk / kvq_group_size<KF>(D) * KScales::kStride + k_token + u].x;
        } else if (KScales::kOwn) {
          scale = KChunk::kScaled ? key[u].scale(k_at).x
                                  : kvq_chunk_scale<KF, K::kChunk>(
                                        kvq_token_row(tokens, t + k_token + u, keys), chunk)
                                        .x;
        }
        KVQ_UNROLL for (uint r = 0; r < R; ++r) {
          if (sums == 2) dot[u][r] += dot[u][(sums - 1) * R + r];
          score[r][u] = fma(scale, dot[u][r], score[r][u]);
        }
      }
      const bool last = turn + 1 == K::kTurns;
      kvq_load_chunks<K::kLanes, 1>(
          key, tokens, t + k_token + (last ? step : 0), keys,
          KF::template offset<K::kChunk>(last ? k_chunk : chunk + K::kLanes));
    }

    // 2. Softmax: token t + lane.
    const bool plain = t >= plain_tokens.x && t + 32 <= plain_tokens.y;
    float s[R];
    uint sees = (1u << R) - 1;  // bit r: row r sees token t + lane
    KVQ_UNROLL for (uint r = 0; r < R; ++r) {
      s[r] = kvq_transpose_sum<K::kLanes>(score[r], lane);
      if (KScales::kOne) s[r] *= key_scales.get(0).x;
      if (KF::kBiased) {
        KVQ_UNROLL for (uint g = 0; g < KScales::kGroups; ++g) {
          s[r] = fma(key_scales.get(g).y, query_sum[g * R + r], s[r]);
        }
      }
      s[r] += mean_score[r];
    }
    key_scales.load(kvq_token_row(tokens, t + step + lane, keys));
    if (!plain) {
      KVQ_UNROLL for (uint r = 0; r < R; ++r) {
        bool visible;
        s[r] = kvq_see(seen, mask, r, t + lane, tokens.end, s[r], visible);
        if (!visible) sees &= ~(1u << r);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    KVQ_UNROLL for (uint r = 0; r < R; ++r) {
      const bool visible = (sees >> r & 1) != 0;
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
    // Tokens past the end repeat the last one: 0 times its infinity would be NaN.
    const bool ends = t + 32 > tokens.end;
    if (ends && t + lane >= tokens.end) value_scales.clear();
    if (!VScales::kOwn) value_scales.share(scales, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (ahead) value_scales.load(kvq_token_row(tokens, t + step + lane, values));

    // 3. Values.
    constexpr uint rows_at_once = V::kRows * V::kInFlight;
    constexpr bool whole = V::kRows * V::kLanes == 32 && 32 % rows_at_once == 0;
    for (uint j = 0; j < 32; j += rows_at_once) {
      if (ends || !whole) {
        KVQ_UNROLL for (uint u = 0; u < V::kInFlight; ++u) {
          const uint row = j + u * V::kRows + v_token;
          if (t + row >= tokens.end || (!whole && (row >= 32 || v_token >= V::kRows)))
            value[u].clear();
        }
      }
      KVQ_UNROLL for (uint u = 0; u < V::kInFlight; ++u) {
        const uint row = j + u * V::kRows + v_token, token = min(row, 31u);
        const bool counts = whole || (row < 32 && v_token < V::kRows);
        float2 scale = float2(0.0f);
        if (!VScales::kOwn) {
          scale = scales[v_chunk * V::kChunk / kvq_group_size<VF>(DV) * VScales::kStride + token];
        } else if (t + token < tokens.end) {
          scale = VChunk::kScaled ? value[u].scale(v_at)
                                  : kvq_chunk_scale<VF, V::kChunk>(
                                        kvq_token_row(tokens, t + token, values), v_chunk);
        }
        uint codes[VChunk::kCodes];
        value[u].get(v_at, codes);
        float scaled[R];
        KVQ_UNROLL for (uint r = 0; r < R; ++r) {
          const float weight = counts ? w[token * R + r] : 0.0f;
          scaled[r] = weight * scale.x;
          if (VF::kBiased) o_bias[r] = fma(weight, scale.y, o_bias[r]);
        }
        KVQ_UNROLL for (uint i = 0; i < V::kChunk; i += V::kUnpack) {
          float c[V::kUnpack];
          VF::template unpack<V::kUnpack>(codes, i, v_table, magic, c);
          KVQ_UNROLL for (uint e = 0; e < V::kUnpack; ++e) {
            KVQ_UNROLL for (uint r = 0; r < R; ++r) {
              o[r][i + e] = fma(scaled[r], c[e], o[r][i + e]);
            }
          }
        }
      }
      const bool last = j + rows_at_once >= 32;
      if (ahead || !last) {
        kvq_load_chunks<V::kInFlight, V::kRows>(
            value, tokens, t + v_token + (last ? step : j + rows_at_once), values, v_at);
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
  typedef KvqRowSums<V::kChunk, V::kLanes, V::kRows> Sums;
  KVQ_UNROLL for (uint r = 0; r < R; ++r) {
    const float kept = kvq_exp(m[r] - row_m[r]);
    KVQ_UNROLL for (uint i = 0; i < V::kChunk; ++i) {
      float x = o[r][i] * VF::factor(i);
      if (VF::kBiased) x += o_bias[r];
      o[r][i] = x * kept;
    }
    Sums::sum(o[r], v_token, lane);
  }
  for (uint s = 0; s < simdgroups; ++s) {
    if (s == simdgroup && Sums::has(v_token)) {
      KVQ_UNROLL for (uint r = 0; r < R; ++r) {
        KVQ_UNROLL for (uint i = 0; i < Sums::kCount; ++i) {
          const uint e = Sums::first(v_token) + i;
          const uint at = r * DV + VF::template element<V::kChunk>(v_chunk, e);
          rows[at] = s == 0 ? o[r][i] : rows[at] + o[r][i];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  kvq_write_rows<T, DV, R>(p, rows, DV, row_m, row_l, first_row, batch, group, split, sinks,
                           v_signs, v_mean, out, lse, partial, simdgroup, lane);
}
