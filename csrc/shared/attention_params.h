// Parameters of the attention kernels, compiled by C++ and by Metal.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

/// How a per-row bound (kv_length, kv_start, kv_end) reaches the kernel.
enum KvqBoundKind {
  KVQ_BOUND_VALUE = 0,  ///< KvqAttentionBound::value
  KVQ_BOUND_INT32 = 1,  ///< an int32 tensor
  KVQ_BOUND_INT64 = 2,  ///< an int64 tensor
};

enum KvqMaskKind {
  KVQ_MASK_NONE = 0,
  KVQ_MASK_BOOL = 1,
  KVQ_MASK_FLOAT32 = 2,
  KVQ_MASK_FLOAT16 = 3,
  KVQ_MASK_BFLOAT16 = 4,
};

/// Most splits of the tokens of one row.
#define KVQ_ATTENTION_MAX_SPLITS 128
/// Threads of every attention kernel's threadgroup: four simdgroups.
#define KVQ_ATTENTION_THREADS 128
/// Most (query, head) rows that one threadgroup of the decode kernel serves.
#define KVQ_DECODE_ROWS 8
/// (query, head) rows that one threadgroup of the prefill kernel serves.
#define KVQ_PREFILL_ROWS 32

/// The bits of 2^23 as a float (metal/attention_formats.h unpacks with it).
#define KVQ_MAGIC_BITS 0x4B000000u

struct KvqAttentionBound {
  int64_t value;    ///< the bound, where kind is KVQ_BOUND_VALUE
  uint32_t kind;    ///< KvqBoundKind
  uint32_t stride;  ///< 0: one bound for all batch rows; 1: one each
};

/// Byte strides of one packed side, K or V.
struct KvqAttentionSide {
  int64_t codes_batch;    ///< codes: from one batch row to the next
  int64_t codes_head;     ///< codes: from one KV head to the next
  int64_t scales_batch;   ///< scales: from one batch row to the next
  int64_t scales_head;    ///< scales: from one KV head to the next
  int64_t biases_batch;   ///< biases: from one batch row to the next
  int64_t biases_head;    ///< biases: from one KV head to the next
  uint32_t codes_token;   ///< codes: from one slot to the next
  uint32_t scales_token;  ///< scales: from one slot to the next
  uint32_t biases_token;  ///< biases: from one slot to the next
  uint32_t rotated;       ///< 1: stored rows are rotated, signs are bound
  uint32_t centred;       ///< 1: a mean was subtracted, it is bound
  uint32_t unused;        ///< keeps the size a multiple of 8
};

struct KvqAttentionParams {
  struct KvqAttentionSide k;           ///< the packed keys
  struct KvqAttentionSide v;           ///< the packed values
  struct KvqAttentionBound kv_length;  ///< tokens written so far
  struct KvqAttentionBound kv_start;   ///< first token that counts
  struct KvqAttentionBound kv_end;     ///< one past the last token that counts
  int64_t query_batch;                 ///< query: elements from one batch row to the next
  int64_t query_head;                  ///< query: elements from one head to the next
  int64_t query_token;                 ///< query: elements from one token to the next
  int64_t mask_batch;                  ///< mask: elements from one batch row to the next
  int64_t mask_head;                   ///< mask: elements from one head to the next
  int64_t mask_query;                  ///< mask: elements from one query to the next
  int64_t mask_column;                 ///< mask: elements from one column to the next
  int64_t mask_columns;                ///< columns of the mask
  int64_t window;                      ///< tokens a query sees, itself included; 0: all
  uint32_t heads;                      ///< H, query heads
  uint32_t groups;                     ///< G, KV heads
  uint32_t queries;                    ///< L, query tokens
  uint32_t capacity;                   ///< S, slots of the cache
  uint32_t value_dim;                  ///< Dv, read by the merge kernel
  uint32_t splits;                     ///< parts of the tokens; 1: no merge pass follows
  uint32_t causal;                     ///< 1: a query sees no later token
  uint32_t ring;                       ///< 1: slot = token modulo capacity
  uint32_t mask_kind;                  ///< KvqMaskKind
  uint32_t has_sinks;                  ///< 1: sinks are bound
  uint32_t magic;                      ///< KVQ_MAGIC_BITS: read from memory, it stays in a register
  uint32_t repeat;                     ///< H / G: heads that share a KV head
  float scale;                         ///< multiplies query times key
  float softcap;                       ///< softcap * tanh(score / softcap); 0: none
};

#ifndef __METAL_VERSION__
static_assert(sizeof(KvqAttentionBound) == 16, "layout shared with Metal");
static_assert(sizeof(KvqAttentionSide) == 72, "layout shared with Metal");
static_assert(sizeof(KvqAttentionParams) == 2 * 72 + 3 * 16 + 9 * 8 + 14 * 4,
              "layout shared with Metal");
#endif
