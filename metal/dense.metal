#include "dequantize.h"

#define KVQ_NONE(type)                                               \
  template [[host_name("kvq_quantize_" #type "_none")]] [[kernel]]   \
  decltype(kvq_quantize_none<type>) kvq_quantize_none<type>;         \
  template [[host_name("kvq_dequantize_" #type "_none")]] [[kernel]] \
  decltype(kvq_dequantize_none<type>) kvq_dequantize_none<type>;

KVQ_NONE(float)
KVQ_NONE(half)
KVQ_NONE(bfloat)
