// GGUF Q4_K super-blocks (csrc/shared/q4_k.h says how they lie): encode and decode.
#pragma once

#include "../csrc/shared/q4_k.h"
#include "common.h"

/// The float16 at an even address.
inline float load_half(const device uchar* p) {
  return float(as_type<half>(*(const device ushort*)p));
}

/// Two neighbouring sub-blocks, those of one chunk of 32 bytes of codes: d times their scales and
/// dmin times their minima.
struct ChunkSteps {
  float scale[2];
  float minimum[2];
};

inline ChunkSteps load_steps(const device uchar* block, int chunk) {
  const device ushort* six = (const device ushort*)(block + 4) + (chunk & 1);
  const uint low = six[0], middle = six[2], high = six[4];
  const bool later = chunk >= 2;  // their six bits lie in two places
  const uint scales = later ? (high & 0x0f0fu) | ((low >> 2) & 0x3030u) : low & 0x3f3fu;
  const uint minima =
      later ? ((high >> 4) & 0x0f0fu) | ((middle >> 2) & 0x3030u) : middle & 0x3f3fu;
  const float d = load_half(block), dmin = load_half(block + 2);
  ChunkSteps steps;
  steps.scale[0] = d * float(scales & 0xffu);
  steps.scale[1] = d * float(scales >> 8);
  steps.minimum[0] = dmin * float(minima & 0xffu);
  steps.minimum[1] = dmin * float(minima >> 8);
  return steps;
}

/// One simdgroup per super-block, lane j for element j of each sub-block; grid: blocks.
template <typename T>
[[kernel]] void kvq_q4_k_dequantize(const device uchar* blocks [[buffer(0)]],
                                    device T* out [[buffer(1)]],
                                    uint3 at [[thread_position_in_grid]],
                                    uint lane [[thread_index_in_simdgroup]]) {
  const device uchar* block = blocks + int64_t(simdgroup_in_row(at)) * KVQ_Q4_K_BYTES;
  device T* y = out + int64_t(simdgroup_in_row(at)) * KVQ_Q4_K_SIZE;
  for (int chunk = 0; chunk < 4; ++chunk) {
    const ChunkSteps steps = load_steps(block, chunk);
    const uint code = block[16 + 32 * chunk + int(lane)];
    y[64 * chunk + int(lane)] = to_dtype<T>(steps.scale[0] * float(code & 15u) - steps.minimum[0]);
    y[64 * chunk + 32 + int(lane)] =
        to_dtype<T>(steps.scale[1] * float(code >> 4) - steps.minimum[1]);
  }
}

struct Grid {
  float scale;  ///< both >= 0: x is about scale * q - minimum
  float minimum;
};

/// reference._q4_k_search, one element per lane: the same sums in the same order.
inline Grid search_grid(float x) {
  Grid grid;
  const float low = min(simd_min(x), 0.0f), high = simd_max(x);
  grid.scale = 0.0f;
  grid.minimum = 0.0f - low;
  if (high - low < KVQ_Q4_K_LEAST_SPAN) {
    return grid;
  }
  const float weight = precise::sqrt(sum32(x * x) / 32.0f) + fabs(x);
  const float sum_w = sum32(weight), sum_x = sum32(weight * x);
  float best = 0.0f, start = low;
  for (int step = -1; step <= 20; ++step) {
    const float numerator = step < 0 ? 15.0f : 0.1f * float(step) + 14.0f;
    const float inverse = numerator / (high - start);
    const float q = rint(clamp(inverse * (x - start), 0.0f, 15.0f));
    float scale = 1.0f / inverse, minimum = low;
    if (step >= 0) {
      const float weighted = weight * q;
      const float sum_q = sum32(weighted), sum_q2 = sum32(weighted * q),
                  sum_xq = sum32(weighted * x);
      const float determinant = sum_w * sum_q2 - sum_q * sum_q;
      if (!(determinant > 0.0f)) {
        continue;
      }
      scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
      minimum = (sum_q2 * sum_x - sum_q * sum_xq) / determinant;
      if (minimum > 0.0f) {
        scale = sum_xq / sum_q2;
        minimum = 0.0f;
      }
    }
    const float difference = (scale * q + minimum) - x;
    const float error = sum32(weight * (difference * difference));
    if (step < 0 || (error < best && high - minimum >= KVQ_Q4_K_LEAST_SPAN)) {
      best = error;
      start = minimum;
      grid.scale = max(scale, 0.0f);
      grid.minimum = 0.0f - minimum;
    }
  }
  return grid;
}

/// x as a multiple, 0 to 63, of `top` over 63.
inline uint six_bits(float x, float top) {
  const float inverse = top > 0.0f ? 63.0f / top : 0.0f;
  return uint(rint(clamp(inverse * x, 0.0f, 63.0f)));
}

inline void store_half(device uchar* p, float x) {
  *(device ushort*)p = as_type<ushort>(half(bound(x, KVQ_F16_MAX)));
}

/// One simdgroup per super-block, lane j for element j of each sub-block; grid: blocks.
template <typename T>
[[kernel]] void kvq_q4_k_quantize(const device T* w [[buffer(0)]],
                                  device uchar* blocks [[buffer(1)]],
                                  uint3 at [[thread_position_in_grid]],
                                  uint lane [[thread_index_in_simdgroup]]) {
  const device T* in = w + int64_t(simdgroup_in_row(at)) * KVQ_Q4_K_SIZE + int(lane);
  device uchar* block = blocks + int64_t(simdgroup_in_row(at)) * KVQ_Q4_K_BYTES;
  float x[8];
  bool has_nan = false;
  for (int j = 0; j < 8; ++j) {
    const float v = float(in[32 * j]);
    has_nan = has_nan || is_nan(v);
    x[j] = v < KVQ_Q4_K_LOWEST ? KVQ_Q4_K_LOWEST : (v > KVQ_Q4_K_HIGHEST ? KVQ_Q4_K_HIGHEST : v);
  }
  if (simd_max(int(has_nan)) != 0) {
    for (int i = int(lane); i < KVQ_Q4_K_BYTES / 2; i += 32) {
      ((device ushort*)block)[i] = i < 2 ? ushort(0x7e00) : ushort(0);
    }
    return;
  }
  Grid grids[8], top;
  top.scale = 0.0f;
  top.minimum = 0.0f;
  for (int j = 0; j < 8; ++j) {
    grids[j] = search_grid(x[j]);
    top.scale = max(top.scale, grids[j].scale);
    top.minimum = max(top.minimum, grids[j].minimum);
  }
  const float d = float(half(bound(top.scale / 63.0f, KVQ_F16_MAX)));
  const float dmin = float(half(bound(top.minimum / 63.0f, KVQ_F16_MAX)));
  uint scales[8], minima[8], even = 0u;
  for (int j = 0; j < 8; ++j) {
    scales[j] = six_bits(grids[j].scale, top.scale);
    minima[j] = six_bits(grids[j].minimum, top.minimum);
    const float scale = d * float(scales[j]), offset = dmin * float(minima[j]);
    const float q = scale == 0.0f ? 0.0f : rint(clamp((x[j] + offset) / scale, 0.0f, 15.0f));
    if (j % 2 == 0) {
      even = uint(q);
    } else {
      block[16 + 16 * (j - 1) + int(lane)] = uchar(even | (uint(q) << 4));
    }
  }
  if (lane == 0) {
    store_half(block, d);
    store_half(block + 2, dmin);
    for (int j = 0; j < 4; ++j) {
      block[4 + j] = uchar(scales[j] | ((scales[j + 4] >> 4) << 6));
      block[8 + j] = uchar(minima[j] | ((minima[j + 4] >> 4) << 6));
      block[12 + j] = uchar((scales[j + 4] & 15u) | ((minima[j + 4] & 15u) << 4));
    }
  }
}
