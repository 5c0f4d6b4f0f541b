#include "q4_k_product.h"

#define KVQ_Q4_K(op, type)                                     \
  template [[host_name("kvq_q4_k_" #op "_" #type)]] [[kernel]] \
  decltype(kvq_q4_k_##op<type>) kvq_q4_k_##op<type>;

#define KVQ_Q4_K_OPS(type)   \
  KVQ_Q4_K(quantize, type)   \
  KVQ_Q4_K(dequantize, type) \
  KVQ_Q4_K(gemv, type)       \
  KVQ_Q4_K(few, type)        \
  KVQ_Q4_K(matmul, type)

KVQ_Q4_K_OPS(float)
KVQ_Q4_K_OPS(half)
KVQ_Q4_K_OPS(bfloat)
