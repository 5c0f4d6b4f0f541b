// What the attention kernels share: their buffers, which tokens a query sees, the rotation of
// queries and outputs, and the end of a row.
#pragma once

#include "attention_formats.h"

/// The buffers of the decode and the prefill kernel, in the order of csrc/mps/attention.mm.
#define KVQ_ATTENTION_BUFFERS(T)                                                               \
  device const T *query [[buffer(0)]], device const uchar *k_codes [[buffer(1)]],              \
      device const uchar *k_scales [[buffer(2)]], device const uchar *k_biases [[buffer(3)]],  \
      device const uchar *v_codes [[buffer(4)]], device const uchar *v_scales [[buffer(5)]],   \
      device const uchar *v_biases [[buffer(6)]], device const uchar *kv_length [[buffer(7)]], \
      device const uchar *kv_start [[buffer(8)]], device const uchar *kv_end [[buffer(9)]],    \
      device const uchar *mask [[buffer(10)]], device const float *sinks [[buffer(11)]],       \
      device const float *k_signs [[buffer(12)]], device const float *v_signs [[buffer(13)]],  \
      device const float *k_mean [[buffer(14)]], device const float *v_mean [[buffer(15)]],    \
      device T *out [[buffer(16)]], device float *lse [[buffer(17)]],                          \
      device float *partial [[buffer(18)]], constant KvqAttentionParams &p [[buffer(19)]]

/// Below every score; a running maximum starts here. Finite, so that no inf - inf arises.
#define KVQ_LOWEST -3.402823466e+38f
#define KVQ_LOG2E 1.44269504089f

inline float kvq_exp(float x) { return exp2(x * KVQ_LOG2E); }

inline long kvq_bound(device const uchar* tensor, constant KvqAttentionBound& bound, uint batch) {
  if (bound.kind == KVQ_BOUND_VALUE) return bound.value;
  const ulong index = ulong(batch) * bound.stride;
  return bound.kind == KVQ_BOUND_INT32 ? long(reinterpret_cast<device const int*>(tensor)[index])
                                       : reinterpret_cast<device const long*>(tensor)[index];
}

/// Tokens [first, last) of the sequence.
struct KvqSpan {
  long first, last;
};

/// The tokens of a batch row that are in the cache and count.
inline KvqSpan kvq_row_span(constant KvqAttentionParams& p, long length, long start, long end) {
  const long oldest = p.ring != 0 ? max(length - long(p.capacity), 0l) : 0l;
  const long newest = p.ring != 0 ? length : min(length, long(p.capacity));
  return {max(start, oldest), min(end, newest)};
}

/// Those of them that query number `query` sees.
inline KvqSpan kvq_query_span(KvqAttentionParams p, KvqSpan row, long length, uint query) {
  const long position = length - long(p.queries) + long(query);
  if (p.window > 0) row.first = max(row.first, position - p.window + 1);
  if (p.causal != 0) row.last = min(row.last, position + 1);
  return row;
}

/// The tokens that a threadgroup works on, counted from `first`.
struct KvqTokens {
  long first;     ///< position of token 0
  uint count;     ///< tokens that any of its queries sees
  uint begin;     ///< first token of this split
  uint end;       ///< one past its last
  uint slot;      ///< slot of token 0
  uint capacity;  ///< slots of the cache
};

/// first_query and last_query are the outermost of the threadgroup's queries.
inline KvqTokens kvq_tokens(constant KvqAttentionParams& p, KvqSpan row, long length,
                            uint first_query, uint last_query, uint split, uint step) {
  const long first = kvq_query_span(p, row, length, first_query).first;
  const long last = kvq_query_span(p, row, length, last_query).last;
  KvqTokens t;
  t.first = first;
  t.count = last > first ? uint(last - first) : 0u;
  // Splits share the tokens out in whole steps; the first have one more where that leaves some.
  const uint steps = (t.count + step - 1) / step;
  const uint each = steps / p.splits, left = steps % p.splits;
  t.begin = min((split * each + min(split, left)) * step, t.count);
  t.end = min(t.begin + (split < left ? each + 1 : each) * step, t.count);
  t.capacity = p.capacity;
  t.slot = p.ring != 0 && p.capacity > 0 ? uint(first % long(p.capacity)) : uint(first);
  return t;
}

inline uint kvq_slot(thread const KvqTokens& tokens, uint token) {
  // At most once around the ring. The sum cannot overflow: both terms are below 2^31; a difference
  // below 0 is larger than either.
  const uint slot = tokens.slot + token;
  return min(slot, slot - tokens.capacity);
}

/// One head's packed rows, or one packed row.
struct KvqRows {
  device const uchar* codes;
  device const uchar* scales;
  device const uchar* biases;
  uint codes_token, scales_token, biases_token;

  KvqRows row(uint slot) const thread {
    return {codes + ulong(slot) * codes_token,
            scales + ulong(slot) * scales_token,
            biases + ulong(slot) * biases_token,
            codes_token,
            scales_token,
            biases_token};
  }
};

inline KvqRows kvq_rows(constant KvqAttentionSide& side, device const uchar* codes,
                        device const uchar* scales, device const uchar* biases, uint batch,
                        uint group) {
  return {codes + long(batch) * side.codes_batch + long(group) * side.codes_head,
          scales + long(batch) * side.scales_batch + long(group) * side.scales_head,
          biases + long(batch) * side.biases_batch + long(group) * side.biases_head,
          side.codes_token,
          side.scales_token,
          side.biases_token};
}

/// (query, head) row number m of a KV head: heads are innermost, so that neighbours see the same
/// tokens.
struct KvqRow {
  uint query;
  uint head;
};
inline KvqRow kvq_row(uint repeat, uint group, uint m) {
  return {m / repeat, group * repeat + m % repeat};
}
/// Number of the row in out and lse, [B, H, L].
inline ulong kvq_out_row(constant KvqAttentionParams& p, uint batch, KvqRow row) {
  return (ulong(batch) * p.heads + row.head) * p.queries + row.query;
}

/// Where the row's mask begins.
inline long kvq_mask_row(KvqAttentionParams p, uint batch, KvqRow row) {
  return long(batch) * p.mask_batch + long(row.head) * p.mask_head + long(row.query) * p.mask_query;
}

/// What is done to a score, in turn.
struct KvqShaping {
  float softcap, inverse_softcap;
  uint mask_kind;
  long mask_columns, mask_column;
};
inline KvqShaping kvq_shaping(KvqAttentionParams p) {
  return {p.softcap, 1.0f / (p.softcap > 0.0f ? p.softcap : 1.0f), p.mask_kind, p.mask_columns,
          p.mask_column};
}

/// A score as the softmax sees it: softcap, then mask. `seen` is cleared where the mask hides.
inline float kvq_finish_score(KvqShaping p, device const uchar* mask, long mask_row, long column,
                              float score, thread bool& seen) {
  if (p.softcap > 0.0f) score = p.softcap * precise::tanh(score * p.inverse_softcap);
  if (p.mask_kind == KVQ_MASK_NONE) return score;
  if (column < 0 || column >= p.mask_columns) {
    seen = false;
    return score;
  }
  const long index = mask_row + column * p.mask_column;
  if (p.mask_kind == KVQ_MASK_BOOL) {
    seen = seen && mask[index] != 0;
  } else if (p.mask_kind == KVQ_MASK_FLOAT32) {
    score += reinterpret_cast<device const float*>(mask)[index];
  } else if (p.mask_kind == KVQ_MASK_FLOAT16) {
    score += float(reinterpret_cast<device const half*>(mask)[index]);
  } else {
    score += float(reinterpret_cast<device const bfloat*>(mask)[index]);
  }
  return score;
}

/// Column of the mask that belongs to token 0: masks narrower than the sequence are aligned right.
inline long kvq_mask_origin(KvqAttentionParams p, thread const KvqTokens& tokens, long length) {
  return tokens.first - max(length - p.mask_columns, 0l);
}

/// Which tokens the rows of a threadgroup see. In threadgroup memory, where it takes no registers:
/// few blocks need it.
template <uint R>
struct KvqSeen {
  uint first[R], last[R];  ///< tokens [first, last), but for what the mask hides
  long mask_row[R];
  long mask_origin;
  KvqShaping shaping;
};

/// Rows past the last of a KV head repeat it.
template <uint R>
inline void kvq_fill_seen(threadgroup KvqSeen<R>& seen, KvqAttentionParams p, KvqSpan span,
                          long length, thread const KvqTokens& tokens, uint batch, uint group,
                          uint first_row, uint thread_index) {
  if (thread_index < R) {
    const uint repeat = p.repeat, last = p.queries * repeat - 1;
    const KvqRow row = kvq_row(repeat, group, min(first_row + thread_index, last));
    const KvqSpan own = kvq_query_span(p, span, length, row.query);
    seen.first[thread_index] = uint(clamp(own.first - tokens.first, 0l, long(tokens.count)));
    seen.last[thread_index] = uint(clamp(own.last - tokens.first, 0l, long(tokens.count)));
    seen.mask_row[thread_index] = kvq_mask_row(p, batch, row);
  }
  if (thread_index == 0) {
    seen.mask_origin = kvq_mask_origin(p, tokens, length);
    seen.shaping = kvq_shaping(p);
  }
}

/// Tokens [.x, .y) need no softcap and no mask of any kind.
template <uint R>
inline uint2 kvq_plain_tokens(threadgroup const KvqSeen<R>& seen, uint end) {
  uint2 plain = uint2(0, end);
  KVQ_UNROLL for (uint r = 0; r < R; ++r) {
    plain.x = max(plain.x, seen.first[r]);
    plain.y = min(plain.y, seen.last[r]);
  }
  if (seen.shaping.softcap > 0.0f || seen.shaping.mask_kind != KVQ_MASK_NONE) plain.y = 0;
  return plain;
}

/// A score of row r as the softmax sees it. `visible` tells whether the row sees the token.
template <uint R>
inline float kvq_see(threadgroup const KvqSeen<R>& seen, device const uchar* mask, uint r,
                     uint token, uint end, float score, thread bool& visible) {
  visible = token < end && token >= seen.first[r] && token < seen.last[r];
  const KvqShaping shaping = {seen.shaping.softcap, seen.shaping.inverse_softcap,
                              seen.shaping.mask_kind, seen.shaping.mask_columns,
                              seen.shaping.mask_column};
  // Of a token past the end the last one's mask is read, which is there.
  return kvq_finish_score(shaping, mask, seen.mask_row[r],
                          seen.mask_origin + long(min(token, end - 1)), score, visible);
}

/// 1 / sqrt(block) of a power of two.
constexpr float kvq_hadamard_norm(uint block) {
  float norm = 1.0f;
  for (; block >= 4; block /= 4) norm *= 0.5f;
  return block == 2 ? norm * 0.707106781187f : norm;
}

/// A row of D elements in the registers of a simdgroup: a lane's x[i] is element lane + 32 i.
template <uint D>
struct KvqLaneRow {
  KVQ_CONST uint kCount = (D + 31) / 32;
  KVQ_CONST bool kWhole = D % 32 == 0;
  float x[kCount];

  static inline bool has(uint i, uint lane) { return kWhole || 32 * i + lane < D; }
  /// Where element i lies; of one past the end, the last.
  static inline uint at(uint i, uint lane) {
    return kWhole ? 32 * i + lane : min(32 * i + lane, D - 1);
  }
  static inline void load(thread float* to, device const float* from, uint lane) {
    KVQ_UNROLL for (uint i = 0; i < kCount; ++i) to[i] = from[at(i, lane)];
  }
  void multiply(thread const float* y) thread {
    KVQ_UNROLL for (uint i = 0; i < kCount; ++i) x[i] *= y[i];
  }
  /// The block Walsh-Hadamard transform, orthonormal. What lies past the end stays there.
  void transform(uint lane) thread {
    constexpr uint block = D & (0u - D);
    constexpr float norm = kvq_hadamard_norm(block);
    KVQ_UNROLL for (uint step = 1; step < kvq_least(block, 32); step *= 2) {
      const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
      KVQ_UNROLL for (uint i = 0; i < kCount; ++i) {
        x[i] = fma(x[i], sign, simd_shuffle_xor(x[i], ushort(step)));
      }
    }
    KVQ_UNROLL for (uint step = 1; step < block / 32; step *= 2) {
      KVQ_UNROLL for (uint i = 0; i < kCount; ++i) {
        if ((i & step) != 0) continue;
        const float a = x[i], b = x[i + step];
        x[i] = a + b;
        x[i + step] = a - b;
      }
    }
    KVQ_UNROLL for (uint i = 0; i < kCount; ++i) x[i] *= norm;
  }
};

/// The queries of R rows, loaded before anything waits and prepared later. Simdgroup s has kRows
/// rows, from s kRows on, where there are as many. Rows past the last of a KV head repeat it.
template <typename T, uint D, uint R>
struct KvqQueries {
  typedef KvqLaneRow<D> Row;
  KVQ_CONST uint kSimdgroups = KVQ_ATTENTION_THREADS / 32;
  KVQ_CONST uint kRows = (R + kSimdgroups - 1) / kSimdgroups;
  T x[kRows][Row::kCount];
  float signs[Row::kCount];
  bool rotated;

  void load(KvqAttentionParams p, device const T* query, device const float* k_signs, uint batch,
            uint group, uint first_row, uint simdgroup, uint lane) thread {
    const uint repeat = p.repeat, last = p.queries * repeat - 1;
    KVQ_UNROLL for (uint j = 0; j < kRows; ++j) {
      const KvqRow row = kvq_row(repeat, group, min(first_row + simdgroup * kRows + j, last));
      device const T* from = query + long(batch) * p.query_batch + long(row.head) * p.query_head +
                             long(row.query) * p.query_token;
      KVQ_UNROLL for (uint i = 0; i < Row::kCount; ++i) x[j][i] = from[Row::at(i, lane)];
    }
    rotated = p.k.rotated != 0;
    if (rotated) Row::load(signs, k_signs, lane);
  }
  /// The simdgroup's rows times `scale`, as they meet packed keys, and their products with the
  /// mean, if there is one. All at once: compilers put off loads of rows that come later.
  void get(float scale, bool centred, device const float* mean, uint lane, thread Row* rows,
           thread float* mean_scores) const thread {
    KVQ_UNROLL for (uint j = 0; j < kRows; ++j) {
      mean_scores[j] = 0.0f;
      KVQ_UNROLL for (uint i = 0; i < Row::kCount; ++i) {
        rows[j].x[i] = Row::has(i, lane) ? float(x[j][i]) * scale : 0.0f;
      }
    }
    if (centred) {
      KVQ_UNROLL for (uint j = 0; j < kRows; ++j) {
        KVQ_UNROLL for (uint i = 0; i < Row::kCount; ++i) {
          mean_scores[j] = fma(rows[j].x[i], mean[Row::at(i, lane)], mean_scores[j]);
        }
        mean_scores[j] = simd_sum(mean_scores[j]);
      }
    }
    if (rotated) {
      KVQ_UNROLL for (uint j = 0; j < kRows; ++j) {
        rows[j].multiply(signs);
        rows[j].transform(lane);
      }
    }
  }
};

/// Sum of a row's elements in group g of GROUPS.
template <uint GROUPS, uint D>
inline float kvq_group_sum(KvqLaneRow<D> row, uint g) {
  float sum = 0.0f;
  KVQ_UNROLL for (uint i = 0; i < D / 32; ++i) sum += i * GROUPS / (D / 32) == g ? row.x[i] : 0.0f;
  return simd_sum(sum);
}

/// Ends a row whose softmax so far has the maximum m and the sum l: takes the sink in. Outputs
/// are then scaled by .x, with .y times the mean added; .z is the log-sum-exp.
inline float3 kvq_end_row(float m, float l, bool has_sink, float sink) {
  float total = l, kept = 1.0f;
  if (has_sink) {
    const float highest = max(m, sink);
    kept = kvq_exp(m - highest);
    total = l * kept + kvq_exp(sink - highest);
    m = highest;
  }
  // Nothing seen: zeros, and the log of nothing. NaN is not 0 and goes its way.
  if (total == 0.0f) return float3(0.0f, 0.0f, as_type<float>(0xFF800000u));
  const float share = kept / total;
  return float3(share, l * share, m + log(total));
}

/// Writes R rows from first_row on, of which threadgroup memory holds the sums x, `stride` apart,
/// maxima m and weights l: as they are for the merge pass, or finished. A barrier precedes the
/// call.
template <typename T, uint DV, uint R>
inline void kvq_write_rows(constant KvqAttentionParams& p, threadgroup const float* x, uint stride,
                           threadgroup const float* m, threadgroup const float* l, uint first_row,
                           uint batch, uint group, uint split, device const float* sinks,
                           device const float* v_signs, device const float* v_mean, device T* out,
                           device float* lse, device float* partial, uint simdgroup, uint lane) {
  typedef KvqLaneRow<DV> Row;
  constexpr uint simdgroups = KVQ_ATTENTION_THREADS / 32;
  const uint repeat = p.repeat, all_rows = p.queries * repeat;
  const uint rows = all_rows > first_row ? min(R, all_rows - first_row) : 0;
  for (uint r = simdgroup; r < rows; r += simdgroups) {
    const KvqRow row = kvq_row(repeat, group, first_row + r);
    const ulong number = kvq_out_row(p, batch, row);
    Row y;
    KVQ_UNROLL for (uint i = 0; i < Row::kCount; ++i) y.x[i] = x[r * stride + Row::at(i, lane)];
    if (p.splits > 1) {
      device float* to = partial + (number * p.splits + split) * (DV + 2);
      KVQ_UNROLL for (uint i = 0; i < Row::kCount; ++i) {
        if (Row::has(i, lane)) to[32 * i + lane] = y.x[i];
      }
      if (lane == 0) {
        to[DV] = m[r];
        to[DV + 1] = l[r];
      }
      continue;
    }
    if (p.v.rotated != 0) {
      float signs[Row::kCount];
      Row::load(signs, v_signs, lane);
      y.transform(lane);
      y.multiply(signs);
    }
    const bool has_sink = p.has_sinks != 0;
    const float3 end = kvq_end_row(m[r], l[r], has_sink, has_sink ? sinks[row.head] : 0.0f);
    KVQ_UNROLL for (uint i = 0; i < Row::kCount; ++i) {
      if (!Row::has(i, lane)) continue;
      const uint d = 32 * i + lane;
      float finished = end.x * y.x[i];
      if (p.v.centred != 0) finished += end.y * v_mean[ulong(group) * DV + d];
      out[number * DV + d] = T(finished);
    }
    if (lane == 0) lse[number] = end.z;
  }
}
