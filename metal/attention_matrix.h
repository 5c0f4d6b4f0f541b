// Attention of few queries on packed rows, by simdgroup_matrix: for half and bfloat queries, where
// the (query, head) rows of a KV head fill a matrix.
//
// Each simdgroup takes blocks of 32 tokens on its own, four tiles of eight:
//  1. scores: tile of keys [8 tokens, 8 elements] times queries [8 elements, 8 rows]. A lane holds
//     two elements of a matrix: it loads its part of its token's key and unpacks two codes at a
//     time, as float16, straight into the matrix. Any order of the elements will do, as long as
//     the queries have the same.
//  2. softmax in the scores' own places: a lane has one token and two rows of each tile. What the
//     maximum is matters little, so it is replaced only when a score exceeds it by far; then alone
//     lanes exchange anything.
//  3. values: tile of values [8 elements, 8 tokens] times weights [8 tokens, 8 rows], which are
//     the scores' matrices again.
// Codes are exact in float16. Queries are scaled by a power of two to suit it; weights, times the
// scale of the value, are at most 2^14 and mostly below 2^3. Sums are float.
//
// Metal does not say which elements of a matrix a lane holds, so the kernel looks: it loads a
// matrix of indices. It relies on one row and two neighbouring columns, which Apple's own kernels
// (MLX) do too.
#pragma once

#include <metal_simdgroup_matrix>

#include "attention_common.h"

typedef simdgroup_matrix<half, 8, 8> KvqHalfMatrix;
typedef simdgroup_matrix<float, 8, 8> KvqFloatMatrix;

inline thread half2& kvq_elements(thread KvqHalfMatrix& m) {
  return reinterpret_cast<thread half2&>(m.thread_elements());
}
inline thread float2& kvq_elements(thread KvqFloatMatrix& m) {
  return reinterpret_cast<thread float2&>(m.thread_elements());
}

/// x += a c, y += b c.
template <typename M>
inline void kvq_multiply_pair(thread KvqFloatMatrix& x, thread KvqFloatMatrix& y, M a, M b, M c) {
  simdgroup_multiply_accumulate(x, a, c, x);
  simdgroup_multiply_accumulate(y, b, c, y);
}

/// How LANES lanes share a row of D elements: in chunks of which none lies in two groups.
template <typename F, uint D, uint LANES>
struct KvqMatrixShape {
  KVQ_CONST uint kGroup = F::kGroup == 0 ? D : F::kGroup;           ///< elements that share a scale
  KVQ_CONST uint kGroups = D / kGroup;                              ///< groups of a row
  KVQ_CONST uint kChunk = kvq_power(kGroup / LANES, F::kMaxChunk);  ///< elements at a time
  KVQ_CONST uint kTurns = kGroup / LANES / kChunk;                  ///< chunks of a lane in a group
  /// From the first chunk of a lane to that of its turn u.
  static inline uint turn(uint u) {
    return F::template offset<kChunk>(u * LANES) - F::template offset<kChunk>(0);
  }
  /// A place that a word could have for any lane's chunk of that turn: KvqChunk asks no more.
  static constexpr uint place(uint u) { return F::kHalfway && u % 2 == 0 ? 2 : 0; }
};

/// A lane's part of a tile of packed rows: chunks of ROWS rows, and the scales of one.
template <typename F, uint D, uint LANES, uint ROWS, bool ALIGNED>
struct KvqMatrixTile {
  typedef KvqMatrixShape<F, D, LANES> Shape;
  typedef typename F::template Scales<D, ALIGNED> Scales;
  typedef KvqChunk<F, D, Shape::kChunk, ALIGNED> Chunk;
  KVQ_CONST uint kChunks = Shape::kGroups * Shape::kTurns;  ///< of a row
  Chunk chunks[ROWS][kChunks];
  uint scales[Scales::kWords];

  /// `chunk` is where slot 0 has the lane's first chunk.
  void load_codes(device const uchar* chunk, uint stride, uint slot, uint row) thread {
    device const uchar* from = chunk + ulong(slot) * stride;
    KVQ_UNROLL for (uint u = 0; u < kChunks; ++u) {
      chunks[row][u].load(from + Shape::turn(u), Shape::place(u));
    }
  }
  void get(uint row, uint u, thread uint* codes) const thread {
    chunks[row][u].get(Shape::place(u), codes);
  }
  void load_scales(KvqRows rows, uint slot) thread {
    const KvqRows from = rows.row(slot);
    Scales::load(from.codes, from.scales, from.biases, scales);
  }
  void clear_codes(uint row) thread {
    KVQ_UNROLL for (uint u = 0; u < kChunks; ++u) chunks[row][u].clear();
  }
  void clear_scales() thread { KVQ_UNROLL for (uint i = 0; i < Scales::kWords; ++i) scales[i] = 0; }
};

/// The slot of token t, or of the last one.
inline uint kvq_token_slot(thread const KvqTokens& tokens, uint t) {
  return kvq_slot(tokens, min(t, tokens.end - 1));
}

/// Loads a lane's part of the keys of the block at token t: of each tile what token `row` has.
template <uint TILES, typename Tile>
inline void kvq_load_keys(thread Tile* key, thread const KvqTokens& tokens, uint t, KvqRows keys,
                          device const uchar* chunk, uint row) {
  KVQ_UNROLL for (uint i = 0; i < TILES; ++i) {
    const uint slot = kvq_token_slot(tokens, t + 8 * i + row);
    key[i].load_codes(chunk, keys.codes_token, slot, 0);
    key[i].load_scales(keys, slot);
  }
}

/// The same of the values: what tokens `column` and `column` + 1 have, and the scales of `row`.
template <uint TILES, typename Tile>
inline void kvq_load_values(thread Tile* value, thread const KvqTokens& tokens, uint t,
                            KvqRows values, device const uchar* chunk, uint row, uint column) {
  KVQ_UNROLL for (uint i = 0; i < TILES; ++i) {
    KVQ_UNROLL for (uint k = 0; k < 2; ++k) {
      value[i].load_codes(chunk, values.codes_token, kvq_token_slot(tokens, t + 8 * i + column + k),
                          k);
    }
    value[i].load_scales(values, kvq_token_slot(tokens, t + 8 * i + row));
  }
}

/// A maximum is replaced by one that exceeds it by this much, a power of two...
#define KVQ_MATRIX_RESCALE 14.0f
/// ...and is then set this much below, so that smaller weights keep their bits in float16.
#define KVQ_MATRIX_ROOM 3.0f

#define KVQ_LN2 0.69314718056f

/// A score in powers of two. What would overflow is the lowest number, as a mask may make it.
inline float kvq_to_log2(float score) { return score < -2.35e38f ? KVQ_LOWEST : score * KVQ_LOG2E; }

/// Rows with strides from threadgroup memory: of one that stays in a register through a loop,
/// compilers make 64 bits and multiply all of them.
inline KvqRows kvq_with_strides(KvqRows rows, threadgroup const uint* strides) {
  return {rows.codes, rows.scales, rows.biases, strides[0], strides[1], strides[2]};
}

/// Puts a lane's elements of a matrix into the simdgroup's `scratch` of 64 floats, where all of
/// them may then be read.
inline void kvq_spread(float2 x, threadgroup float* scratch, uint row, uint column) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  scratch[row * 8 + column] = x.x;
  scratch[row * 8 + column + 1] = x.y;
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

/// Sums x over the eight tokens of a tile, for both columns.
inline float2 kvq_sum_tokens(float2 x, threadgroup float* scratch, uint row, uint column) {
  kvq_spread(x, scratch, row, column);
  // From one address: with several, compilers keep them all through the loop over tokens.
  threadgroup const float* from = scratch + column;
  float2 sum = float2(0.0f);
  KVQ_UNROLL for (uint i = 0; i < 64; i += 8) sum += float2(from[i], from[i + 1]);
  return sum;
}

template <typename T, typename KF, typename VF, uint D, uint DV, uint R, bool ALIGNED>
[[kernel, max_total_threads_per_threadgroup(KVQ_ATTENTION_THREADS)]] void kvq_attention_matrix(
    KVQ_ATTENTION_BUFFERS(T), uint3 position [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  typedef KvqMatrixTile<KF, D, 4, 1, ALIGNED> KeyTile;
  typedef KvqMatrixTile<VF, DV, 8, 2, ALIGNED> ValueTile;
  typedef typename KeyTile::Shape K;
  typedef typename ValueTile::Shape V;
  typedef typename KeyTile::Scales KScales;
  typedef typename ValueTile::Scales VScales;
  constexpr uint simdgroups = KVQ_ATTENTION_THREADS / 32;
  constexpr uint tiles = 2;  // of tokens in a block
  constexpr uint block = 8 * tiles;
  constexpr uint columns = R / 8;       // matrices that hold the rows
  constexpr uint query_stride = D + 5;  // queries of two rows: lanes find their banks free
  constexpr uint sum_stride = DV + 1;
  threadgroup float rows[R * kvq_most(query_stride, sum_stride)];  // queries, at the end sums
  threadgroup float query_sum[K::kGroups * R];
  threadgroup float row_factor[R], mean_score[R];
  threadgroup KvqSeen<R> seen;
  threadgroup float scratch[simdgroups][64];
  threadgroup float group_m[simdgroups][R], group_l[simdgroups][R];
  threadgroup float row_m[R], row_l[R];
  threadgroup uint strides[6];
  // One codebook may serve both.
  constexpr uint v_entries = VF::kTable == KF::kTable ? 0 : VF::kHalfTable * VF::kCopies;
  threadgroup uint tables[kvq_most(KF::kHalfTable * KF::kCopies + v_entries, 1)];

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
                 split, block * simdgroups);

  // This lane's place in a matrix.
  threadgroup float* own_scratch = scratch[simdgroup];
  own_scratch[lane] = float(lane);
  own_scratch[lane + 32] = float(lane + 32);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  KvqFloatMatrix place;
  simdgroup_load(place, own_scratch, 8);
  const uint at = uint(kvq_elements(place).x), row = at / 8, column = at % 8;

  device const uchar* key_chunk = keys.codes + KF::template offset<K::kChunk>(column / 2);
  device const uchar* value_chunk = values.codes + VF::template offset<V::kChunk>(row);

  // What a lane needs next is loaded as soon as what it had is used: keys before the values of the
  // block before, values before the scores of their own. With many rows, of which there are few
  // threadgroups at a time, all of it a whole block ahead.
  constexpr bool ahead = columns > 1;
  kvq_fill_seen(seen, early, span, length, tokens, batch, group, first_row, thread_index);
  // The queries first: loads return in order.
  typedef KvqQueries<T, D, R> Queries;
  Queries queries;
  queries.load(early, query, k_signs, batch, group, first_row, simdgroup, lane);
  KeyTile key[tiles];
  ValueTile value[tiles];
  constexpr uint step = simdgroups * block;
  if (tokens.begin < tokens.end) {
    const uint t = tokens.begin + simdgroup * block;
    kvq_load_keys<tiles>(key, tokens, t, keys, key_chunk, row);
  }

  threadgroup uint* own_table = tables + (v_entries == 0 ? 0 : KF::kHalfTable * KF::kCopies);
  kvq_fill_half_table<KF>(tables, thread_index);
  if (v_entries > 0) kvq_fill_half_table<VF>(own_table, thread_index);
  threadgroup const uint* k_table = tables + lane % KF::kCopies;
  threadgroup const uint* v_table = own_table + lane % VF::kCopies;

  if (thread_index == 0) {
    strides[0] = keys.codes_token;
    strides[1] = keys.scales_token;
    strides[2] = keys.biases_token;
    strides[3] = values.codes_token;
    strides[4] = values.scales_token;
    strides[5] = values.biases_token;
  }
  // Queries, rotated and scaled to suit float16, two rows and two.
  KvqLaneRow<D> own[Queries::kRows];
  float mean[Queries::kRows];
  queries.get(1.0f, early.k.centred != 0, k_mean + ulong(group) * D, lane, own, mean);
  // Values after the queries have come, so that keys come before them.
  if (tokens.begin < tokens.end) {
    kvq_load_values<tiles>(value, tokens, tokens.begin + simdgroup * block, values, value_chunk,
                           row, column);
  }
  threadgroup half2* query_pairs = reinterpret_cast<threadgroup half2*>(rows);
  KVQ_UNROLL for (uint j = 0; j < Queries::kRows; j += 2) {
    const uint first = simdgroup * Queries::kRows + j;
    thread KvqLaneRow<D>* pair = own + j;
    KVQ_UNROLL for (uint k = 0; k < 2; ++k) {
      const uint r = first + k;
      float highest = 0.0f;
      KVQ_UNROLL for (uint i = 0; i < D / 32; ++i) highest = max(highest, fabs(pair[k].x[i]));
      // A power of two that brings the largest element to [2^4, 2^5).
      const uint exponent = clamp(as_type<uint>(simd_max(highest)) >> 23, 10u, 250u);
      const float factor = as_type<float>((258u - exponent) << 23);
      KVQ_UNROLL for (uint i = 0; i < D / 32; ++i) pair[k].x[i] *= factor;
      if (lane == 0) {
        row_factor[r] = early.scale * as_type<float>((exponent - 4u) << 23);
        mean_score[r] = early.scale * mean[j + k];
      }
      KVQ_UNROLL for (uint g = 0; g < K::kGroups; ++g) {
        if (!KF::kBiased) continue;
        const float sum = kvq_group_sum<K::kGroups>(pair[k], g);
        if (lane == 0) query_sum[g * R + r] = sum;
      }
    }
    KVQ_UNROLL for (uint i = 0; i < D / 32; ++i) {
      query_pairs[first / 2 * query_stride + 32 * i + lane] =
          half2(half(pair[0].x[i]), half(pair[1].x[i]));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Element i of the products is this one of a token's key: chunk row / 2 of four, pair i.
  KvqHalfMatrix q[D / 8][columns];
  float2 factor[columns], q_sum[K::kGroups][columns];
  KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
    const uint r = 8 * c + column;
    KVQ_UNROLL for (uint i = 0; i < D / 8; ++i) {
      constexpr uint pairs = K::kChunk / 2;
      const uint d = KF::template element<K::kChunk>(
          i / pairs * 4 + row / 2, KF::template pair_element<K::kChunk>(i % pairs, row % 2));
      kvq_elements(q[i][c]) = query_pairs[r / 2 * query_stride + d];
    }
    factor[c] = KVQ_LOG2E * float2(row_factor[r], row_factor[r + 1]);
    KVQ_UNROLL for (uint g = 0; g < K::kGroups; ++g) {
      if (KF::kBiased) q_sum[g][c] = float2(query_sum[g * R + r], query_sum[g * R + r + 1]);
    }
  }

  const uint2 plain_tokens = kvq_plain_tokens(seen, tokens.end);
  const uint magic = kvq_half_magic(early.magic);

  KvqFloatMatrix o[DV / 8][columns];
  float2 m[columns], l[columns], o_bias[V::kGroups][columns];
  KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
    m[c] = float2(KVQ_LOWEST);
    l[c] = float2(0.0f);
    KVQ_UNROLL for (uint g = 0; g < V::kGroups; ++g) o_bias[g][c] = float2(0.0f);
    KVQ_UNROLL for (uint i = 0; i < DV / 8; ++i) o[i][c] =
        make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }

  for (uint t = tokens.begin + simdgroup * block; t < tokens.end; t += step) {
    const KvqRows next_keys = kvq_with_strides(keys, strides);
    const KvqRows next_values = kvq_with_strides(values, strides + 3);
    KeyTile next_key[tiles];
    ValueTile next_value[tiles];
    if (ahead) {
      kvq_load_keys<tiles>(next_key, tokens, t + step, next_keys, key_chunk, row);
      kvq_load_values<tiles>(next_value, tokens, t + step, next_values, value_chunk, row, column);
    }

    // 1. Scores of token t + 8 i + row.
    float2 score[tiles][columns];
    KVQ_UNROLL for (uint i = 0; i < tiles; i += 2) {
      KVQ_UNROLL for (uint c = 0; c < columns; ++c) score[i][c] = score[i + 1][c] = float2(0.0f);
      KVQ_UNROLL for (uint g = 0; g < K::kGroups; ++g) {
        KvqFloatMatrix sum[2][columns];
        KVQ_UNROLL for (uint c = 0; c < columns; ++c) sum[0][c] = sum[1][c] =
            make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        KVQ_UNROLL for (uint u = g * K::kTurns; u < (g + 1) * K::kTurns; ++u) {
          half2 pairs[2][K::kChunk / 2];
          KVQ_UNROLL for (uint k = 0; k < 2; ++k) {
            uint codes[KeyTile::Chunk::kCodes];
            key[i + k].get(0, u, codes);
            KF::template pairs<K::kChunk>(codes, k_table, magic, pairs[k]);
          }
          KVQ_UNROLL for (uint j = 0; j < K::kChunk / 2; ++j) {
            KvqHalfMatrix a[2];
            kvq_elements(a[0]) = pairs[0][j];
            kvq_elements(a[1]) = pairs[1][j];
            KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
              kvq_multiply_pair(sum[0][c], sum[1][c], a[0], a[1], q[u * (K::kChunk / 2) + j][c]);
            }
          }
        }
        KVQ_UNROLL for (uint k = 0; k < 2; ++k) {
          const float2 scale = KScales::get(key[i + k].scales, g);
          KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
            score[i + k][c] += scale.x * kvq_elements(sum[k][c]);
            if (KF::kBiased) score[i + k][c] += scale.y * q_sum[g][c];
          }
        }
      }
    }

    if (!ahead) kvq_load_keys<tiles>(key, tokens, t + step, next_keys, key_chunk, row);

    // 2. Softmax.
    uint sees = ~0u;  // bit (i * columns + c) * 2 + k: row 8 c + column + k sees the token
    const bool plain = t >= plain_tokens.x && t + block <= plain_tokens.y;
    // What a score is to be multiplied by.
    float2 by[columns];
    KVQ_UNROLL for (uint c = 0; c < columns; ++c) by[c] = factor[c];
    if (!plain) {
      sees = 0;
      for (uint n = 0; n < tiles * columns * 2; ++n) {
        const uint r = n / 2 % columns * 8 + column + n % 2;
        float s = 0.0f, to_natural = 0.0f;
        KVQ_UNROLL for (uint i = 0; i < tiles * columns * 2; ++i) {
          s = i == n ? score[i / (2 * columns)][i / 2 % columns][i % 2] : s;
          to_natural = i == n ? factor[i / 2 % columns][i % 2] : to_natural;
        }
        bool visible;
        // The mean's share is the same for all tokens: here it counts, and at the end.
        s = kvq_see(seen, mask, r, t + n / (2 * columns) * 8 + row, tokens.end,
                    s * to_natural * KVQ_LN2 + mean_score[r], visible) -
            mean_score[r];
        visible = visible && as_type<uint>(s) != 0xff800000u;  // a mask's -infinity
        s = visible ? kvq_to_log2(s) : KVQ_LOWEST;
        KVQ_UNROLL for (uint i = 0; i < tiles * columns * 2; ++i) {
          const float old = score[i / (2 * columns)][i / 2 % columns][i % 2];
          score[i / (2 * columns)][i / 2 % columns][i % 2] = i == n ? s : old;
        }
        sees |= visible ? 1u << n : 0u;
      }
      KVQ_UNROLL for (uint c = 0; c < columns; ++c) by[c] = float2(1.0f);
    }
    // A weight times the scale of its value must fit float16: the maximum is of both.
    float2 highest[columns];
    bool grows = false;
    KVQ_UNROLL for (uint c = 0; c < columns; ++c) highest[c] = float2(KVQ_LOWEST);
    KVQ_UNROLL for (uint i = 0; i < tiles; ++i) {
      float scale = 1e-30f;
      KVQ_UNROLL for (uint g = 0; g < V::kGroups; ++g) {
        scale = max(scale, fabs(VScales::get(value[i].scales, g).x));
      }
      scale = log2(scale);
      KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
        highest[c] = max(highest[c], fma(score[i][c], by[c], float2(scale)));
      }
    }
    KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
      grows = grows || highest[c].x > m[c].x + KVQ_MATRIX_RESCALE ||
              highest[c].y > m[c].y + KVQ_MATRIX_RESCALE;
    }
    if (simd_any(grows)) {
      KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
        kvq_spread(highest[c], own_scratch, row, column);
        threadgroup const float* all = own_scratch + column;
        float2 kept;
        KVQ_UNROLL for (uint k = 0; k < 2; ++k) {
          float top = all[k];
          KVQ_UNROLL for (uint i = 8; i < 64; i += 8) top = max(top, all[i + k]);
          const float next = top > m[c][k] + KVQ_MATRIX_RESCALE ? top - KVQ_MATRIX_ROOM : m[c][k];
          kept[k] = exp2(m[c][k] - next);
          m[c][k] = next;
        }
        l[c] *= kept;
        KVQ_UNROLL for (uint g = 0; g < V::kGroups; ++g) o_bias[g][c] *= kept;
        KVQ_UNROLL for (uint i = 0; i < DV / 8; ++i) kvq_elements(o[i][c]) *= kept;
      }
    }

    KVQ_UNROLL for (uint i = 0; i < tiles; ++i) {
      KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
        score[i][c] = exp2(fma(score[i][c], by[c], -m[c]));
      }
    }
    if (!plain) {
      KVQ_UNROLL for (uint i = 0; i < tiles * columns * 2; ++i) {
        thread float2& both = score[i / (2 * columns)][i / 2 % columns];
        both[i % 2] = (sees >> i & 1) != 0 ? both[i % 2] : 0.0f;
      }
    }

    // 3. Values. Tokens past the end repeat the last one: 0 times its infinity would be NaN.
    if (t + block > tokens.end) {
      KVQ_UNROLL for (uint i = 0; i < tiles; ++i) {
        KVQ_UNROLL for (uint k = 0; k < 2; ++k) {
          if (t + 8 * i + column + k >= tokens.end) value[i].clear_codes(k);
        }
        if (t + 8 * i + row >= tokens.end) value[i].clear_scales();
      }
    }
    KVQ_UNROLL for (uint i = 0; i < tiles; ++i) {
      KvqHalfMatrix weight[V::kGroups][columns];
      KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
        const float2 w = score[i][c];
        l[c] += w;
        KVQ_UNROLL for (uint g = 0; g < V::kGroups; ++g) {
          const float2 scale = VScales::get(value[i].scales, g);
          if (VF::kBiased) o_bias[g][c] += w * scale.y;
          kvq_elements(weight[g][c]) = half2(w * scale.x);
        }
      }
      KVQ_UNROLL for (uint u = 0; u < V::kGroups * V::kTurns; ++u) {
        half2 pairs[V::kChunk];
        uint codes[2][ValueTile::Chunk::kCodes];
        value[i].get(0, u, codes[0]);
        value[i].get(1, u, codes[1]);
        VF::template columns<V::kChunk>(codes[0], codes[1], v_table, magic, pairs);
        KVQ_UNROLL for (uint j = 0; j < V::kChunk; j += 2) {
          KvqHalfMatrix a[2];
          kvq_elements(a[0]) = pairs[j];
          kvq_elements(a[1]) = pairs[j + 1];
          KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
            kvq_multiply_pair(o[u * V::kChunk + j][c], o[u * V::kChunk + j + 1][c], a[0], a[1],
                              weight[u / V::kTurns][c]);
          }
        }
      }
    }
    if (ahead) {
      KVQ_UNROLL for (uint i = 0; i < tiles; ++i) {
        key[i] = next_key[i];
        value[i] = next_value[i];
      }
    } else {
      kvq_load_values<tiles>(value, tokens, t + step, next_values, value_chunk, row, column);
    }
  }

  // Sum over the simdgroups, in turn, into plain rows.
  KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
    l[c] = kvq_sum_tokens(l[c], own_scratch, row, column);
    KVQ_UNROLL for (uint g = 0; g < V::kGroups; ++g) {
      if (VF::kBiased) {
        o_bias[g][c] = kvq_sum_tokens(o_bias[g][c], own_scratch, row, column);
      }
    }
    if (row == 0) {
      KVQ_UNROLL for (uint k = 0; k < 2; ++k) {
        group_m[simdgroup][8 * c + column + k] = KVQ_LN2 * m[c][k];
        group_l[simdgroup][8 * c + column + k] = l[c][k];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index < R) {
    float highest = KVQ_LOWEST, sum = 0.0f;
    for (uint s = 0; s < simdgroups; ++s) highest = max(highest, group_m[s][thread_index]);
    for (uint s = 0; s < simdgroups; ++s) {
      sum += group_l[s][thread_index] * kvq_exp(group_m[s][thread_index] - highest);
    }
    row_m[thread_index] = highest + mean_score[thread_index];
    row_l[thread_index] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
    KVQ_UNROLL for (uint k = 0; k < 2; ++k) {
      const uint r = 8 * c + column + k;
      const float kept = kvq_exp(KVQ_LN2 * m[c][k] + mean_score[r] - row_m[r]);
      KVQ_UNROLL for (uint i = 0; i < DV / 8; ++i) {
        float x = kvq_elements(o[i][c])[k];
        if (VF::kBiased) x += o_bias[i / V::kChunk / V::kTurns][c][k];
        kvq_elements(o[i][c])[k] = x * kept;
      }
    }
  }
  for (uint s = 0; s < simdgroups; ++s) {
    if (s == simdgroup) {
      KVQ_UNROLL for (uint c = 0; c < columns; ++c) {
        // All loads, then all stores: they do not wait for one another.
        threadgroup float* to = rows + (8 * c + column) * sum_stride;
        float2 sum[DV / 8];
        KVQ_UNROLL for (uint i = 0; i < DV / 8; ++i) {
          const uint d = VF::template element<V::kChunk>(i / V::kChunk * 8 + row, i % V::kChunk);
          sum[i] = s == 0 ? float2(0.0f) : float2(to[d], to[d + sum_stride]);
        }
        KVQ_UNROLL for (uint i = 0; i < DV / 8; ++i) {
          const uint d = VF::template element<V::kChunk>(i / V::kChunk * 8 + row, i % V::kChunk);
          to[d] = sum[i].x + kvq_elements(o[i][c]).x;
          to[d + sum_stride] = sum[i].y + kvq_elements(o[i][c]).y;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  kvq_write_rows<T, DV, R>(p, rows, sum_stride, row_m, row_l, first_row, batch, group, split, sinks,
                           v_signs, v_mean, out, lse, partial, simdgroup, lane);
}
