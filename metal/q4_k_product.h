// Products with Q4_K weights: out[m, n] = sum over k of x[m, k] * w[n, k], in float32.
//
// kvq_q4_k_gemv: one vector x. A lane takes 16 bytes of codes, half a chunk: 16 elements each of
// two neighbouring sub-blocks; so 8 lanes read a super-block and a simdgroup four of them. The 32
// values of x that belong to them stay in registers for KVQ_Q4_K_GEMV_ROWS rows of w. A nibble
// becomes a float where it lies, times 16 to the power of its place, which x is divided by; scales
// and minima apply to sums.
//
// kvq_q4_k_few: two to eight vectors. A lane decodes its weights once, for all of them,
// 16 at a time.
//
// kvq_q4_k_matmul: more vectors. Tiles of w are dequantised into threadgroup memory and multiplied
// by simdgroup_matrix.
#pragma once

#include <metal_simdgroup_matrix>

#include "q4_k.h"

#define KVQ_UNROLL _Pragma("clang loop unroll(full)")

/// Every super-block starts at a multiple of 16 bytes; else of 2.
constant bool kvq_aligned [[function_constant(0)]];
/// Vectors x of kvq_q4_k_few.
constant int kvq_vectors [[function_constant(1)]];

/// 16 bytes of codes.
inline uint4 load_words(const device uchar* p) {
  if (kvq_aligned) {
    return *(const device uint4*)p;
  }
  const device ushort* h = (const device ushort*)p;
  return uint4(uint(h[0]) | (uint(h[1]) << 16), uint(h[2]) | (uint(h[3]) << 16),
               uint(h[4]) | (uint(h[5]) << 16), uint(h[6]) | (uint(h[7]) << 16));
}

/// Nibble K of the low 16 bits of `pair`, times 16^K: put into the mantissa of 2^23.
template <int K>
inline float nibble(uint pair) {
  return as_type<float>((pair & (15u << (4 * K))) | 0x4b000000u) - 8388608.0f;
}

/// 16 consecutive values of x.
template <typename T>
inline void load_values(const device T* x, thread float* y) {
  KVQ_UNROLL for (int i = 0; i < 4; ++i) {
    const vec<T, 4> v = ((const device vec<T, 4>*)x)[i];
    y[4 * i] = float(v.x);
    y[4 * i + 1] = float(v.y);
    y[4 * i + 2] = float(v.z);
    y[4 * i + 3] = float(v.w);
  }
}

/// One simdgroup per KVQ_Q4_K_GEMV_ROWS rows of w; grid: 32 lanes, groups of rows.
template <typename T>
[[kernel]] void kvq_q4_k_gemv(const device T* x [[buffer(0)]],
                              const device uchar* blocks [[buffer(1)]], device T* out [[buffer(2)]],
                              constant KvqQ4KParams& params [[buffer(3)]],
                              uint3 at [[thread_position_in_grid]],
                              uint lane [[thread_index_in_simdgroup]]) {
  constexpr int rows = KVQ_Q4_K_GEMV_ROWS;
  const int first = int(at.y) * rows, chunk = int(lane) % 8 / 2, half_chunk = int(lane) % 2;
  const device uchar* row[rows];
  float total[rows];
  KVQ_UNROLL for (int r = 0; r < rows; ++r) {
    row[r] = blocks + min(first + r, params.n - 1) * params.row_stride;
    total[r] = 0.0f;
  }
  for (int b = int(lane) / 8; b < params.columns; b += 4) {
    const device T* values = x + b * KVQ_Q4_K_SIZE + 64 * chunk + 16 * half_chunk;
    float low[16], high[16];
    load_values(values, low);
    load_values(values + 32, high);
    float low_sum = 0.0f, high_sum = 0.0f;
    KVQ_UNROLL for (int i = 0; i < 16; ++i) {
      low_sum += low[i];
      high_sum += high[i];
      low[i] *= i % 2 == 0 ? 1.0f : 1.0f / 256.0f;
      high[i] *= i % 2 == 0 ? 1.0f / 16.0f : 1.0f / 4096.0f;
    }
    KVQ_UNROLL for (int r = 0; r < rows; ++r) {
      const device uchar* block = row[r] + int64_t(b) * KVQ_Q4_K_BYTES;
      const uint4 words = load_words(block + 16 + 32 * chunk + 16 * half_chunk);
      float low_dot = 0.0f, high_dot = 0.0f;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) {
        const uint pair = i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16;
        low_dot = fma(nibble<0>(pair), low[2 * i], low_dot);
        high_dot = fma(nibble<1>(pair), high[2 * i], high_dot);
        low_dot = fma(nibble<2>(pair), low[2 * i + 1], low_dot);
        high_dot = fma(nibble<3>(pair), high[2 * i + 1], high_dot);
      }
      const ChunkSteps steps = load_steps(block, chunk);
      total[r] = fma(steps.scale[0], low_dot, total[r]);
      total[r] = fma(steps.scale[1], high_dot, total[r]);
      total[r] = fma(-steps.minimum[0], low_sum, total[r]);
      total[r] = fma(-steps.minimum[1], high_sum, total[r]);
    }
  }
  KVQ_UNROLL for (int r = 0; r < rows; ++r) {
    const float sum = simd_sum(total[r]);
    if (lane == 0 && first + r < params.n) {
      out[first + r] = T(sum);
    }
  }
}

/// The lane's 16 weights of the chunk's first (`part` 0) or second sub-block.
inline void decode_part(const device uchar* block, int chunk, int half_chunk, int part,
                        thread float* w) {
  const ChunkSteps steps = load_steps(block, chunk);
  const uint4 words = load_words(block + 16 + 32 * chunk + 16 * half_chunk);
  const float minimum = -steps.minimum[part];
  const float even = part == 0 ? steps.scale[0] : steps.scale[1] / 16.0f, odd = even / 256.0f;
  KVQ_UNROLL for (int i = 0; i < 8; ++i) {
    const uint pair = i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16;
    w[2 * i] = fma(part == 0 ? nibble<0>(pair) : nibble<1>(pair), even, minimum);
    w[2 * i + 1] = fma(part == 0 ? nibble<2>(pair) : nibble<3>(pair), odd, minimum);
  }
}

/// One simdgroup per KVQ_Q4_K_FEW_ROWS rows of w; grid: 32 lanes, groups of rows.
template <typename T>
[[kernel]] void kvq_q4_k_few(const device T* x [[buffer(0)]],
                             const device uchar* blocks [[buffer(1)]], device T* out [[buffer(2)]],
                             constant KvqQ4KParams& params [[buffer(3)]],
                             uint3 at [[thread_position_in_grid]],
                             uint lane [[thread_index_in_simdgroup]]) {
  constexpr int rows = KVQ_Q4_K_FEW_ROWS;
  const int first = int(at.y) * rows, chunk = int(lane) % 8 / 2, half_chunk = int(lane) % 2;
  const int64_t k = int64_t(params.columns) * KVQ_Q4_K_SIZE;
  float total[KVQ_Q4_K_FEW][rows];
  KVQ_UNROLL for (int m = 0; m < KVQ_Q4_K_FEW; ++m) {
    KVQ_UNROLL for (int r = 0; r < rows; ++r) { total[m][r] = 0.0f; }
  }
  for (int b = int(lane) / 8; b < params.columns; b += 4) {
    KVQ_UNROLL for (int part = 0; part < 2; ++part) {
      float w[rows][16];
      KVQ_UNROLL for (int r = 0; r < rows; ++r) {
        const device uchar* row = blocks + min(first + r, params.n - 1) * params.row_stride;
        decode_part(row + int64_t(b) * KVQ_Q4_K_BYTES, chunk, half_chunk, part, w[r]);
      }
      const device T* values = x + b * KVQ_Q4_K_SIZE + 64 * chunk + 32 * part + 16 * half_chunk;
      KVQ_UNROLL for (int m = 0; m < KVQ_Q4_K_FEW; ++m) {
        if (m < kvq_vectors) {
          float y[16];
          load_values(values + m * k, y);
          KVQ_UNROLL for (int i = 0; i < 16; ++i) {
            KVQ_UNROLL for (int r = 0; r < rows; ++r) {
              total[m][r] = fma(w[r][i], y[i], total[m][r]);
            }
          }
        }
      }
    }
  }
  KVQ_UNROLL for (int m = 0; m < KVQ_Q4_K_FEW; ++m) {
    KVQ_UNROLL for (int r = 0; r < rows; ++r) {
      const float sum = simd_sum(total[m][r]);
      if (lane == 0 && m < kvq_vectors && first + r < params.n) {
        out[int64_t(m) * params.n + first + r] = T(sum);
      }
    }
  }
}

/// A threadgroup makes a tile of the output, TILE_M by TILE_N, from one chunk of 64 columns after
/// the other; grid: threadgroups along n, along m.
template <typename T>
[[kernel]] void kvq_q4_k_matmul(const device T* x [[buffer(0)]],
                                const device uchar* blocks [[buffer(1)]],
                                device T* out [[buffer(2)]],
                                constant KvqQ4KParams& params [[buffer(3)]],
                                uint3 group [[threadgroup_position_in_grid]],
                                uint thread_index [[thread_index_in_threadgroup]],
                                uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int depth = 64, stride = depth + 4, out_stride = KVQ_Q4_K_TILE_N + 4;
  threadgroup float x_tile[KVQ_Q4_K_TILE_M * stride];
  threadgroup float w_tile[KVQ_Q4_K_TILE_N * stride];
  const int t = int(thread_index);
  const int m0 = int(group.y) * KVQ_Q4_K_TILE_M, n0 = int(group.x) * KVQ_Q4_K_TILE_N;
  const int64_t k = int64_t(params.columns) * KVQ_Q4_K_SIZE;
  const int w_row = t / 2, half_chunk = t % 2;
  const device uchar* row = blocks + min(n0 + w_row, params.n - 1) * params.row_stride;
  // A simdgroup's part: 32 vectors, 16 rows of w.
  simdgroup_matrix<float, 8, 8> sums[4][2];
  KVQ_UNROLL for (int i = 0; i < 4; ++i) {
    KVQ_UNROLL for (int j = 0; j < 2; ++j) {
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  for (int c = 0; c < 4 * params.columns; ++c) {
    KVQ_UNROLL for (int part = 0; part < 2; ++part) {
      float w[16];
      decode_part(row + int64_t(c / 4) * KVQ_Q4_K_BYTES, c % 4, half_chunk, part, w);
      threadgroup float* w_out = w_tile + w_row * stride + 32 * part + 16 * half_chunk;
      KVQ_UNROLL for (int i = 0; i < 16; ++i) w_out[i] = w[i];
    }
    for (int i = t; i < KVQ_Q4_K_TILE_M * depth; i += KVQ_Q4_K_TILE_THREADS) {
      const int m = i / depth, column = i % depth;
      x_tile[m * stride + column] =
          m0 + m < params.m ? float(x[(m0 + m) * k + c * depth + column]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = 0; d < depth; d += 8) {
      simdgroup_matrix<float, 8, 8> a[4], b[2];
      KVQ_UNROLL for (int j = 0; j < 2; ++j) {
        simdgroup_load(b[j], w_tile + (16 * int(simdgroup) + 8 * j) * stride + d, stride,
                       ulong2(0, 0), true);
      }
      KVQ_UNROLL for (int i = 0; i < 4; ++i) {
        simdgroup_load(a[i], x_tile + 8 * i * stride + d, stride);
        KVQ_UNROLL for (int j = 0; j < 2; ++j) {
          simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  KVQ_UNROLL for (int i = 0; i < 4; ++i) {
    KVQ_UNROLL for (int j = 0; j < 2; ++j) {
      simdgroup_store(sums[i][j], w_tile + 8 * i * out_stride + 16 * int(simdgroup) + 8 * j,
                      out_stride);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = t; i < KVQ_Q4_K_TILE_M * KVQ_Q4_K_TILE_N; i += KVQ_Q4_K_TILE_THREADS) {
    const int m = i / KVQ_Q4_K_TILE_N, n = i % KVQ_Q4_K_TILE_N;
    if (m0 + m < params.m && n0 + n < params.n) {
      out[int64_t(m0 + m) * params.n + n0 + n] = T(w_tile[m * out_stride + n]);
    }
  }
}
