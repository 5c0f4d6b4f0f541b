// kvq_dequantize_*: slots [start, start + tokens) to dense [B, G, tokens, D]. A simdgroup takes
// neighbouring tokens; grid: 32 lanes, as many simdgroups as they need, B * G rows.
#pragma once

#include "quantize.h"

/// A slot of a head.
inline Source source_of(const device uchar* codes, const device uchar* scales,
                        const device uchar* biases, constant KvqReadParams& params, int b, int g,
                        int64_t slot, bool dense) {
  const int64_t scale_size = params.scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size = !dense ? 1 : (params.codes_dtype == KVQ_FLOAT32 ? 4 : 2);
  Source in;
  in.codes = codes + code_size * (b * params.codes.batch + g * params.codes.head +
                                  slot * params.codes.token);
  in.scales = scales + scale_size * (b * params.scales.batch + g * params.scales.head +
                                     slot * params.scales.token);
  in.biases = biases + scale_size * (b * params.biases.batch + g * params.biases.head +
                                     slot * params.biases.token);
  in.scale_dtype = params.scale_dtype;
  in.codes_dtype = params.codes_dtype;
  return in;
}

template <typename T, typename Codec, int Family, int Bits, int Group>
[[kernel]] void kvq_dequantize(
    const device uchar* codes [[buffer(0)]], const device uchar* scales [[buffer(1)]],
    const device uchar* biases [[buffer(2)]], const device float* signs [[buffer(3)]],
    const device float* mean [[buffer(4)]], device T* out [[buffer(5)]],
    constant KvqReadParams& params [[buffer(6)]], threadgroup float* rows [[threadgroup(0)]],
    uint3 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const int b = int(at.z) / params.heads, g = int(at.z) % params.heads;
  Place place = place_of(kvq_head_dim, lane, kvq_wide);
  const int vectors = vectors_per_simdgroup(kvq_head_dim);
  const bool exists = place.vector < vectors;
  const int steps = steps_of(Family, kvq_rotate, params.steps);
  int t = int(at.y) * steps * vectors + place.vector;
  Source in = source_of(codes, scales, biases, params, b, g, params.start + int64_t(t), false);
  const int64_t scale_step =
      vectors * params.scales.token * (params.scale_dtype == KVQ_FLOAT32 ? 4 : 2);
  const int64_t bias_step =
      vectors * params.biases.token * (params.scale_dtype == KVQ_FLOAT32 ? 4 : 2);
  device T* y = out + (int64_t(at.z) * params.tokens + int64_t(t)) * kvq_head_dim;
  KVQ_ROLLED for (int step = 0; step < steps; ++step) {
    place.active = exists && t < params.tokens;
    float v[8 * KVQ_PASSES];
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (256 * pass >= kvq_head_dim) continue;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) v[8 * pass + i] = 0.0f;
      if (place.holds(pass)) {
        Codec::decode(in, place.first + 256 * pass, Bits, Group, kvq_wide, v + 8 * pass);
      }
    }
    if (kvq_rotate) fwht_lanes(v, place, params.block, params.norm);
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (256 * pass >= kvq_head_dim || !place.holds(pass)) continue;
      thread float* part = v + 8 * pass;
      const int first = place.first + 256 * pass;
      float other[8];
      if (kvq_rotate) {
        load8(signs + first, kvq_wide, other);
        KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] *= other[i];
      }
      if (kvq_centre) {
        load8(mean + kvq_head_dim * g + first, kvq_wide, other);
        KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] += other[i];
      }
      store8(y + first, kvq_wide, part);
    }
    t += vectors;
    in.codes += vectors * params.codes.token;
    in.scales += scale_step;
    in.biases += bias_step;
    y += vectors * kvq_head_dim;
  }
}

/// Format none: one simdgroup per vector.
template <typename T>
[[kernel]] void kvq_dequantize_none(
    const device uchar* codes [[buffer(0)]], const device uchar* scales [[buffer(1)]],
    const device uchar* biases [[buffer(2)]], const device float* signs [[buffer(3)]],
    const device float* mean [[buffer(4)]], device T* out [[buffer(5)]],
    constant KvqReadParams& params [[buffer(6)]], threadgroup float* rows [[threadgroup(0)]],
    uint3 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const int b = int(at.z) / params.heads, g = int(at.z) % params.heads, n = params.head_dim;
  const int t = int(at.y);
  if (t < params.tokens) {
    const Source in =
        source_of(codes, scales, biases, params, b, g, params.start + int64_t(t), true);
    device T* y = out + (int64_t(at.z) * params.tokens + int64_t(t)) * n;
    threadgroup float* row = rows + int(simdgroup) * n;
    for (int i = int(lane); i < n; i += 32) {
      const float v = Dense::decode(in, i);
      if (kvq_rotate) {
        row[i] = v;
      } else {
        y[i] = kvq_centre ? to_dtype<T>(v + mean[g * n + i]) : T(v);
      }
    }
    if (kvq_rotate) {
      fwht(row, lane, n, params.block, params.norm);
      for (int i = int(lane); i < n; i += 32) {
        float v = row[i] * signs[i];
        if (kvq_centre) {
          v += mean[g * n + i];
        }
        y[i] = to_dtype<T>(v);
      }
    }
  }
}
