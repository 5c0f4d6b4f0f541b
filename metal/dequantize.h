// kvq_dequantize_*: slots [start, start + tokens) to dense [B, G, tokens, D]. A simdgroup takes
// neighbouring tokens; grid: as many simdgroups as they need, G, B.
#pragma once

#include "quantize.h"

/// A slot of a head.
inline Source source_of(const device uchar* codes, const device uchar* scales,
                        const device uchar* biases, constant KvqReadParams& params, int b, int g,
                        int64_t slot, bool dense) {
  const int64_t scale_size = kvq_scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size = !dense ? 1 : (params.codes_dtype == KVQ_FLOAT32 ? 4 : 2);
  Source in;
  in.codes = codes + code_size * (b * params.codes.batch + g * params.codes.head +
                                  slot * params.codes.token);
  in.scales = scales + scale_size * (b * params.scales.batch + g * params.scales.head +
                                     slot * params.scales.token);
  in.biases = biases + scale_size * (b * params.biases.batch + g * params.biases.head +
                                     slot * params.biases.token);
  in.scale_dtype = kvq_scale_dtype;
  in.codes_dtype = params.codes_dtype;
  return in;
}

/// A row of format none of any length, through threadgroup memory where it is rotated.
template <typename T>
inline void read_row(thread const Source& in, const device float* signs, const device float* mean,
                     constant KvqReadParams& params, threadgroup float* row, uint lane,
                     device T* y) {
  const int n = params.head_dim;
  for (int i = int(lane); i < n; i += 32) {
    const float v = load_float(in.codes, i, in.codes_dtype);
    if (kvq_rotate) {
      row[i] = v;
    } else {
      y[i] = kvq_centre ? to_dtype<T>(v + mean[i]) : T(v);
    }
  }
  if (kvq_rotate) {
    fwht(row, lane, n, params.block, params.norm);
    for (int i = int(lane); i < n; i += 32) {
      float v = row[i] * signs[i];
      if (kvq_centre) {
        v += mean[i];
      }
      y[i] = to_dtype<T>(v);
    }
  }
}

template <typename T, typename Codec, int Family, int Bits, int Group>
[[kernel]] void kvq_dequantize(
    const device uchar* codes [[buffer(0)]], const device uchar* scales [[buffer(1)]],
    const device uchar* biases [[buffer(2)]], const device float* signs [[buffer(3)]],
    const device float* mean [[buffer(4)]], device T* out [[buffer(5)]],
    constant KvqReadParams& params [[buffer(6)]], threadgroup float* rows [[threadgroup(0)]],
    uint3 at [[thread_position_in_grid]], uint3 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const int b = int(group.z), g = int(group.y);
  const bool is_dense = Family == KVQ_FAMILY_NONE, any_row = takes_any_row(Family, kvq_wide);
  Place place = place_of(any_row ? 32 : kvq_head_dim, lane, kvq_wide);
  place.table = Codec::decoder_entry(lane, Bits);
  const int vectors = any_row ? 1 : vectors_per_simdgroup(kvq_head_dim);
  const int steps = any_row ? 1 : params.steps, tokens = params.tokens;
  int t = simdgroup_in_row(at) * steps * vectors + (any_row ? 0 : place.vector);
  Source in = source_of(codes, scales, biases, params, b, g, params.start + int64_t(t), is_dense);
  device T* y = out + ((int64_t(b) * params.heads + g) * params.tokens + t) * kvq_head_dim;
  mean += kvq_head_dim * g;
  if (any_row) {
    if (t < tokens) {
      read_row(in, signs, mean, params, rows + int(simdgroup) * params.head_dim, lane, y);
    }
    return;
  }
  const int64_t code_size = !is_dense ? 1 : (params.codes_dtype == KVQ_FLOAT32 ? 4 : 2);
  const int64_t scale_size = kvq_scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_step = code_size * (vectors * params.codes.token);
  const int64_t scale_step = scale_size * (vectors * params.scales.token);
  const int64_t bias_step = scale_size * (vectors * params.biases.token);
  place.active = place.exists && t < tokens;
  // The transform's factor and the signs, which are 1 and -1, in one.
  float flips[KVQ_VALUES];
  if (kvq_rotate) {
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (KVQ_SPAN * pass >= kvq_head_dim) continue;
      KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
        if (!place.is_filled() && place.element(pass, eight) >= kvq_head_dim) continue;
        thread float* part = flips + KVQ_WIDTH * pass + eight;
        load8(signs + place.element(pass, eight), kvq_wide, part);
        KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] *= params.norm;
      }
    }
  }
  typename Codec::Row next[KVQ_PASSES];
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (KVQ_SPAN * pass < kvq_head_dim) next[pass] = Codec::load(in, place, pass, Bits, Group);
  }
  KVQ_ROLLED for (int step = 1;; ++step) {
    float v[KVQ_VALUES];
    const Place here = place;
    typename Codec::Row packed[KVQ_PASSES];
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) packed[pass] = next[pass];
    // The next vectors are on their way while these are decoded.
    if (step < steps) {
      t += vectors;
      place.active = place.exists && t < tokens;
      in.codes += code_step;
      in.scales += scale_step;
      in.biases += bias_step;
      KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
        if (KVQ_SPAN * pass < kvq_head_dim) next[pass] = Codec::load(in, place, pass, Bits, Group);
      }
    }
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (KVQ_SPAN * pass >= kvq_head_dim) continue;
      Codec::decode(packed[pass], here, Bits, v + KVQ_WIDTH * pass);
    }
    if (kvq_rotate) add_and_subtract(v, here);
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (KVQ_SPAN * pass >= kvq_head_dim) continue;
      KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
        if (!here.holds(pass, eight)) continue;
        thread float* part = v + KVQ_WIDTH * pass + eight;
        thread const float* flip = flips + KVQ_WIDTH * pass + eight;
        const int first = here.element(pass, eight);
        if (kvq_rotate) {
          KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] *= flip[i];
        }
        if (kvq_centre) {
          float other[8];
          load8(mean + first, kvq_wide, other);
          KVQ_UNROLL for (int i = 0; i < 8; ++i) part[i] += other[i];
        }
        store8(y + first, kvq_wide, part, !is_dense || kvq_rotate || kvq_centre);
      }
    }
    if (step >= steps) break;
    y += vectors * kvq_head_dim;
  }
}
