// Parameters of the Metal kernels, one struct per kernel, compiled by C++ and by Metal.
// Strides count elements; rows (the last dimension) are contiguous unless a field says otherwise.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

#include "formats.h"

struct KvqStrides {
  int64_t batch;
  int64_t head;
  int64_t token;
};

/// One side (K or V) of a write into packed rows.
struct KvqWriteSide {
  KvqStrides x;         ///< [B, G, L, D]
  KvqStrides codes;     ///< [B, G, S, row]; in bytes, or in elements for format none
  KvqStrides scales;    ///< [B, G, S, row]
  KvqStrides biases;    ///< [B, G, S, row]
  int64_t codes_step;   ///< between a row's elements (format none; 1 for all others)
  int64_t capacity;     ///< S
  int32_t heads;        ///< G
  int32_t head_dim;     ///< D
  int32_t block;        ///< size of the Hadamard blocks
  float norm;           ///< 1 / sqrt(block)
  int32_t scale_dtype;  ///< KvqDtype of scales and biases
  int32_t codes_dtype;  ///< KvqDtype of codes (format none)
  int32_t encoder;      ///< KvqEncoder
  int32_t reserved;
};

/// kvq_quantize_* (side 0) and kvq_append_* (K is side 0, V is side 1).
struct KvqWriteParams {
  KvqWriteSide side[2];
  int64_t position;         ///< of the first token, where position_bytes is 0
  int64_t position_stride;  ///< between the batch rows of the position tensor; 0 for a scalar
  int32_t position_bytes;   ///< element size of the position tensor, 4 or 8; 0: there is none
  int32_t ring;             ///< slots are taken modulo the capacity
  int32_t batch;            ///< B
  int32_t heads;            ///< rows of the grid per batch row: the larger of both sides' heads
  int32_t tokens;           ///< L
  int32_t row;              ///< floats of threadgroup memory per simdgroup
  int32_t steps;            ///< times that a simdgroup takes its number of vectors
  int32_t reserved;
};

/// kvq_dequantize_*
struct KvqReadParams {
  KvqStrides codes;     ///< [B, G, S, row]; in bytes, or in elements for format none
  KvqStrides scales;    ///< [B, G, S, row]
  KvqStrides biases;    ///< [B, G, S, row]
  int64_t start;        ///< first slot to read
  int32_t tokens;       ///< slots to read; the output is contiguous [B, G, tokens, D]
  int32_t heads;        ///< G
  int32_t head_dim;     ///< D
  int32_t block;        ///< size of the Hadamard blocks
  float norm;           ///< 1 / sqrt(block)
  int32_t scale_dtype;  ///< KvqDtype of scales and biases
  int32_t codes_dtype;  ///< KvqDtype of codes (format none)
  int32_t steps;        ///< times that a simdgroup takes its number of vectors
};

/// kvq_hadamard_*
struct KvqHadamardParams {
  int64_t vectors;   ///< x and the output are contiguous [vectors, D]
  int32_t head_dim;  ///< D
  int32_t block;     ///< size of the Hadamard blocks
  float norm;        ///< 1 / sqrt(block)
  int32_t reserved;
};

/// kvq_mlx_native_dequantize
struct KvqMlxNativeParams {
  KvqStrides codes;  ///< [B, G, S, D / 2] nibbles or [B, G, S, D] bytes
  KvqStrides norms;  ///< [B, G, S, max(1, D / 256)]
  int64_t start;     ///< first slot to read
  int32_t tokens;    ///< slots to read; the output is contiguous [B, G, tokens, D]
  int32_t heads;     ///< G
  int32_t head_dim;  ///< D
  int32_t bits;      ///< 4, 5, 6 or 8
  int32_t block;     ///< size of the Hadamard blocks
  float norm;        ///< 1 / sqrt(block)
  float scale;       ///< D <= 256: norms are multiplied by this, 1 / sqrt(D)
  float divisor;     ///< D > 256: norms are divided by this
};

/// kvq_q4_k_gemv_*, kvq_q4_k_few_*, kvq_q4_k_matmul_*
struct KvqQ4KParams {
  int64_t row_stride;  ///< bytes between rows of w
  int32_t columns;     ///< super-blocks in a row, K / 256
  int32_t m;           ///< vectors x, contiguous [m, K]; the output is contiguous [m, n]
  int32_t n;           ///< rows of w
  uint32_t magic;      ///< 2^23's bits, 0x4b000000: as a constant it costs an instruction more
};

static_assert(sizeof(KvqStrides) == 24, "host and kernels must agree");
static_assert(sizeof(KvqWriteSide) == 144, "host and kernels must agree");
static_assert(sizeof(KvqWriteParams) == 336, "host and kernels must agree");
static_assert(sizeof(KvqReadParams) == 112, "host and kernels must agree");
static_assert(sizeof(KvqHadamardParams) == 24, "host and kernels must agree");
static_assert(sizeof(KvqMlxNativeParams) == 88, "host and kernels must agree");
static_assert(sizeof(KvqQ4KParams) == 24, "host and kernels must agree");
