// The CPU kernels' interface: plain pointers and strides, no torch. Everything in this folder but
// this header is compiled once per instruction set, into namespace kvq::cpu::KVQ_ISA.
#pragma once

#include <cstdint>

#include "../../shared/formats.h"

namespace kvq::cpu {

/// Rows of a [B, G, S, row] tensor whose rows are contiguous. Strides in bytes.
struct Rows {
  char* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;

  char* at(int64_t b, int64_t g, int64_t t) const {
    return data + b * batch_stride + g * head_stride + t * token_stride;
  }
};

/// How a packed tensor is stored.
struct Layout {
  KvqFamily family = KVQ_FAMILY_NONE;
  int bits = 0;                        ///< bits of a code
  int group = 0;                       ///< elements per scale (affine, fp8)
  int64_t head_dim = 0;                ///< D
  KvqDtype scale_dtype = KVQ_FLOAT16;  ///< dtype of scales and biases
  KvqDtype codes_dtype = KVQ_FLOAT32;  ///< dtype of codes (family none)
};

struct Packed {
  Layout layout;
  Rows codes;
  Rows scales;
  Rows biases;
};

/// Quantise x[b, g, first + i] into slot position[b] + first + i (modulo capacity in a ring).
struct EncodeArgs {
  Packed out;
  Rows x;  ///< [B, G, L, D], rows contiguous
  KvqDtype x_dtype = KVQ_FLOAT32;
  int64_t heads = 0;                  ///< G
  int64_t first = 0;                  ///< tokens before this one are skipped (lost to the ring)
  int64_t tokens = 0;                 ///< tokens to write per head, L - first
  const int64_t* position = nullptr;  ///< [B]
  int64_t capacity = 0;               ///< S
  bool ring = false;
  const float* signs = nullptr;  ///< [D] or null
  const float* mean = nullptr;   ///< [G, D] or null
  KvqEncoder encoder = KVQ_ENCODER_DEFAULT;
};

/// Dequantise tokens [start, start + tokens) into a dense tensor.
struct DecodeArgs {
  Packed in;
  Rows out;  ///< [B, G, tokens, D]
  KvqDtype out_dtype = KVQ_FLOAT32;
  int64_t heads = 0;  ///< G
  int64_t start = 0;
  int64_t tokens = 0;
  const float* signs = nullptr;  ///< [D] or null: rotate back
  const float* mean = nullptr;   ///< [G, D] or null: add
};

/// x to H(signs * x)/sqrt(block), or the inverse, over contiguous vectors of head_dim elements.
struct HadamardArgs {
  const void* x = nullptr;
  void* out = nullptr;
  KvqDtype dtype = KVQ_FLOAT32;
  int64_t head_dim = 0;
  const float* signs = nullptr;  ///< [D] or null
  bool inverse = false;
};

/// mlx-native's TurboQuant rows as dense float32.
struct MlxNativeArgs {
  Rows codes;  ///< [B, G, S, D/2] nibbles or [B, G, S, D] bytes
  Rows norms;  ///< [B, G, S, max(1, D/256)] float32
  Rows out;    ///< [B, G, tokens, D] float32
  int bits = 4;
  int64_t head_dim = 0;
  int64_t heads = 0;
  int64_t start = 0;
  int64_t tokens = 0;
  const float* codebook = nullptr;  ///< [2^bits]
  float scale_factor_d512 = 1.0f;
  const float* signs = nullptr;
  bool rotate_back = false;
};

struct AttentionArgs;  // attention.h
struct AttentionTile;
struct Q4KKernels;  // q4_k.h

/// One instruction set's kernels. [begin, end) counts vectors (batch-major, then head, token).
struct Kernels {
  const char* isa;
  void (*encode)(const EncodeArgs&, int64_t begin, int64_t end);
  void (*decode)(const DecodeArgs&, int64_t begin, int64_t end);
  void (*hadamard)(const HadamardArgs&, int64_t begin, int64_t end);
  void (*mlx_native)(const MlxNativeArgs&, int64_t begin, int64_t end);
  /// attention.h says what [begin, end) counts in each.
  void (*attention)(const AttentionArgs&, int64_t begin, int64_t end);
  void (*attention_merge)(const AttentionArgs&, int64_t begin, int64_t end);
  void (*attention_unpack)(const AttentionArgs&, const AttentionTile&, int64_t begin, int64_t end);
  void (*attention_gather)(const AttentionArgs&, const AttentionTile&, int64_t begin, int64_t end);
  const Q4KKernels* q4_k;
};

/// The best kernels this processor runs; KVQ_CPU_ISA chooses others by their name in dispatch.cpp.
const Kernels& kernels();

}  // namespace kvq::cpu
