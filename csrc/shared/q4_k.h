// GGUF's Q4_K super-block and the parameters of its Metal kernels, compiled by C++ and by Metal.
//
// 256 weights in eight sub-blocks of 32: w = (d * sc) * q - dmin * m. Six bits each of the eight
// sc and m lie in `scales`: for j < 4, sc[j] = s[j] & 63 and m[j] = s[j + 4] & 63; else
// sc[j] = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4 and m[j] = s[j + 4] >> 4 | (s[j] >> 6) << 4.
// Every 32 bytes of `codes` hold two sub-blocks: the first in their low, the next in their high
// nibbles.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

#include "formats.h"

struct KvqQ4KBlock {
  uint16_t d;          ///< float16 scale of the scales
  uint16_t dmin;       ///< float16 scale of the minima
  uint8_t scales[12];  ///< 6-bit scales and minima
  uint8_t codes[128];  ///< 4-bit codes
};

static_assert(sizeof(KvqQ4KBlock) == 144, "the layout of a GGUF file");

#define KVQ_Q4_K_SIZE 256
#define KVQ_Q4_K_BYTES 144

// Rules of the encoder (reference.q4_k_quantize). Inputs are clamped to what a block can hold with
// float16 scales; a sub-block of a smaller span than this has scale 0.
#define KVQ_Q4_K_LOWEST -4126752.0f
#define KVQ_Q4_K_HIGHEST 61901280.0f
#define KVQ_Q4_K_LEAST_SPAN 9.313225746154785e-10f

// The Metal kernels' shares of work.
#define KVQ_Q4_K_GEMV_ROWS 4  ///< rows of w per simdgroup, one vector x
#define KVQ_Q4_K_FEW_ROWS 4   ///< rows of w per simdgroup, two to eight vectors x
#define KVQ_Q4_K_FEW 8        ///< most vectors x of that kernel
#define KVQ_Q4_K_TILE_M 32    ///< vectors x per threadgroup, more of them
#define KVQ_Q4_K_TILE_N 64    ///< rows of w per threadgroup
#define KVQ_Q4_K_TILE_THREADS 128
