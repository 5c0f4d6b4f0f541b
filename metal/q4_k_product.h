// Products with Q4_K weights: out[m, n] = sum over k of x[m, k] * w[n, k], in float32.
//
// kvq_q4_k_gemv: one vector x. A lane takes 16 bytes of codes, half a chunk: 16 elements each of
// two neighbouring sub-blocks; so 8 lanes read a super-block and a simdgroup four of them. The 32
// values of x that belong to them stay in registers for KVQ_Q4_K_GEMV_ROWS rows of w, whose loads
// come first. A nibble becomes a float where it lies, times 16 to the power of its
// place: each place has a sum of its own. Scales and minima apply to sums.
//
// kvq_q4_k_few: two to eight vectors. A lane decodes its weights once, for all of them,
// 16 at a time.
//
// kvq_q4_k_matmul: more vectors. Tiles of w are dequantised into threadgroup memory and multiplied
// by simdgroup_matrix.
#pragma once

#include <metal_simdgroup_matrix>

#include "q4_k.h"

/// Every super-block starts at a multiple of 16 bytes; else of 2.
constant bool kvq_aligned [[function_constant(0)]];
/// Vectors x of kvq_q4_k_few.
constant int kvq_vectors [[function_constant(1)]];

/// 16 bytes of codes.
inline uint4 load_sixteen(const device uchar* p) {
  if (kvq_aligned) {
    return *(const device uint4*)p;
  }
  const device ushort* h = (const device ushort*)p;
  return uint4(uint(h[0]) | (uint(h[1]) << 16), uint(h[2]) | (uint(h[3]) << 16),
               uint(h[4]) | (uint(h[5]) << 16), uint(h[6]) | (uint(h[7]) << 16));
}

/// Nibble K of the low 20 bits of `pair`, times 16^K: put into the mantissa of 2^23, `magic`.
template <int K>
inline float nibble(uint pair, uint magic) {
  return as_type<float>((pair & (15u << (4 * K))) | magic) - 8388608.0f;
}

/// Byte K as a float, times 256^K.
template <int K>
inline float byte_of(uint bytes, uint magic) {
  return as_type<float>((bytes & (255u << (8 * K))) | magic) - 8388608.0f;
}

/// 16 consecutive values of x, 16 bytes at a time.
template <typename T>
inline void load_values(const device T* x, thread float* y) {
  KVQ_UNROLL for (int i = 0; i < 16; i += 8) load8(x + i, true, y + i);
}

/// One simdgroup per KVQ_Q4_K_GEMV_ROWS rows of w; grid: groups of rows.
template <typename T>
[[kernel]] void kvq_q4_k_gemv(const device T* x [[buffer(0)]],
                              const device uchar* blocks [[buffer(1)]], device T* out [[buffer(2)]],
                              constant KvqQ4KParams& params [[buffer(3)]],
                              uint3 at [[thread_position_in_grid]],
                              uint lane [[thread_index_in_simdgroup]]) {
  constexpr int rows = KVQ_Q4_K_GEMV_ROWS;
  const int first = simdgroup_in_row(at) * rows, chunk = int(lane) % 8 / 2,
            half_chunk = int(lane) % 2;
  const uint magic = params.magic;
  // Where the chunk's two scales and two minima lie in a block's first 16 bytes (load_steps): six
  // bits of a byte of words y and z or, of later chunks, two there and four of word w.
  const bool later = chunk >= 2;
  const int lower = 16 * (chunk & 1), upper = later ? lower + 2 : lower;
  const uint low_mask = later ? 0x3030u : 0x3f3fu, high_mask = later ? 0x0f0fu : 0u;
  const int block = int(lane) / 8, offset = 16 + 32 * chunk + 16 * half_chunk;
  const device uchar* codes[rows];  // the lane's, of the next block
  float total[rows];
  KVQ_UNROLL for (int r = 0; r < rows; ++r) {
    codes[r] = blocks + (min(first + r, params.n - 1) * params.row_stride +
                         int64_t(block * KVQ_Q4_K_BYTES + offset));
    total[r] = 0.0f;
  }
  const device T* values = x + (block * KVQ_Q4_K_SIZE + 64 * chunk + 16 * half_chunk);
  for (int b = block; b < params.columns; b += 4) {
    uint4 heads[rows], words[rows];
    KVQ_UNROLL for (int r = 0; r < rows; ++r) {
      heads[r] = load_sixteen(codes[r] - offset);
      words[r] = load_sixteen(codes[r]);
      codes[r] += 4 * KVQ_Q4_K_BYTES;
    }
    float low[16], high[16];
    load_values(values, low);
    load_values(values + 32, high);
    values += 4 * KVQ_Q4_K_SIZE;
    float low_sum = 0.0f, high_sum = 0.0f;
    KVQ_UNROLL for (int i = 0; i < 16; ++i) {
      low_sum += low[i];
      high_sum += high[i];
    }
    high_sum *= 1.0f / 256.0f;
    KVQ_UNROLL for (int r = 0; r < rows; ++r) {
      // Of the nibbles in each place: of a word's first four, and of the others, whose shift by 12
      // leaves them 16 times as large, but leaves none at bit 0, where it would become an
      // extraction of its own.
      float dots[4] = {0.0f, 0.0f, 0.0f, 0.0f}, later_dots[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      KVQ_UNROLL for (int i = 0; i < 4; ++i) {
        const uint word = words[r][i], rest = word >> 12;
        dots[0] = fma(nibble<0>(word, magic), low[4 * i], dots[0]);
        dots[1] = fma(nibble<1>(word, magic), high[4 * i], dots[1]);
        dots[2] = fma(nibble<2>(word, magic), low[4 * i + 1], dots[2]);
        dots[3] = fma(nibble<3>(word, magic), high[4 * i + 1], dots[3]);
        later_dots[0] = fma(nibble<1>(rest, magic), low[4 * i + 2], later_dots[0]);
        later_dots[1] = fma(nibble<2>(rest, magic), high[4 * i + 2], later_dots[1]);
        later_dots[2] = fma(nibble<3>(rest, magic), low[4 * i + 3], later_dots[2]);
        later_dots[3] = fma(nibble<4>(rest, magic), high[4 * i + 3], later_dots[3]);
      }
      KVQ_UNROLL for (int i = 0; i < 4; ++i) dots[i] = fma(later_dots[i], 1.0f / 16.0f, dots[i]);
      const float low_dot = fma(dots[2], 1.0f / 256.0f, dots[0]);
      // Over 16, a nibble's place, and 256, that of the second scale.
      const float high_dot = fma(dots[3], 1.0f / 1048576.0f, dots[1] * (1.0f / 4096.0f));
      const uint4 head = heads[r];
      const uint scales = ((head.y >> upper) & low_mask) | ((head.w >> lower) & high_mask);
      const uint minima = ((head.z >> upper) & low_mask) | ((head.w >> (lower + 4)) & high_mask);
      const float d = float(as_type<half>(ushort(head.x & 0xffffu)));
      const float dmin = float(as_type<half>(ushort(head.x >> 16)));
      const float steps =
          fma(byte_of<0>(scales, magic), low_dot, byte_of<1>(scales, magic) * high_dot);
      const float offsets =
          fma(byte_of<0>(minima, magic), low_sum, byte_of<1>(minima, magic) * high_sum);
      total[r] = fma(d, steps, fma(-dmin, offsets, total[r]));
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
inline void decode_part(const device uchar* block, int chunk, int half_chunk, int part, uint magic,
                        thread float* w) {
  const ChunkSteps steps = load_steps(block, chunk);
  const uint4 words = load_sixteen(block + 16 + 32 * chunk + 16 * half_chunk);
  const float minimum = -steps.minimum[part];
  const float even = part == 0 ? steps.scale[0] : steps.scale[1] / 16.0f, odd = even / 256.0f;
  KVQ_UNROLL for (int i = 0; i < 8; ++i) {
    const uint pair = i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16;
    w[2 * i] = fma(part == 0 ? nibble<0>(pair, magic) : nibble<1>(pair, magic), even, minimum);
    w[2 * i + 1] = fma(part == 0 ? nibble<2>(pair, magic) : nibble<3>(pair, magic), odd, minimum);
  }
}

/// One simdgroup per KVQ_Q4_K_FEW_ROWS rows of w; grid: groups of rows.
template <typename T>
[[kernel]] void kvq_q4_k_few(const device T* x [[buffer(0)]],
                             const device uchar* blocks [[buffer(1)]], device T* out [[buffer(2)]],
                             constant KvqQ4KParams& params [[buffer(3)]],
                             uint3 at [[thread_position_in_grid]],
                             uint lane [[thread_index_in_simdgroup]]) {
  constexpr int rows = KVQ_Q4_K_FEW_ROWS;
  const int first = simdgroup_in_row(at) * rows, chunk = int(lane) % 8 / 2,
            half_chunk = int(lane) % 2;
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
        decode_part(row + int64_t(b) * KVQ_Q4_K_BYTES, chunk, half_chunk, part, params.magic, w[r]);
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
      decode_part(row + int64_t(c / 4) * KVQ_Q4_K_BYTES, c % 4, half_chunk, part, params.magic, w);
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
