// Identifiers of formats and dtypes, compiled by C++ and by Metal.
#pragma once

enum KvqFamily {
  KVQ_FAMILY_AFFINE = 0,
  KVQ_FAMILY_FP8_E4M3 = 1,
  KVQ_FAMILY_FP8_E5M2 = 2,
  KVQ_FAMILY_Q8_0 = 3,
  KVQ_FAMILY_Q4_0 = 4,
  KVQ_FAMILY_TURBOQUANT = 5,
  KVQ_FAMILY_NONE = 6,
};

enum KvqDtype {
  KVQ_FLOAT32 = 0,
  KVQ_FLOAT16 = 1,
  KVQ_BFLOAT16 = 2,
};

// Encoders choose codes; they never change how codes are read.
enum KvqEncoder {
  KVQ_ENCODER_DEFAULT = 0,
  KVQ_ENCODER_UNBIASED = 1,
};

// Inputs are clamped to these before arithmetic on them could overflow float32
// (torch_kvq/reference.py states each rule).
#define KVQ_F16_MAX 65504.0f
#define KVQ_LIMIT 8.507059173023462e+37f
#define KVQ_ROTATED_LIMIT 72057594037927936.0f
