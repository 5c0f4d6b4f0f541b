// Kernel names: kvq_<op>_<dtype>_<format>[_g<group>], as csrc/mps/names.mm composes them.
#pragma once

#include "dequantize.h"

#define KVQ_CODEC_OF(type, tag, codec, family, bits, group)          \
  template [[host_name("kvq_quantize_" #type "_" tag)]] [[kernel]]   \
  decltype(kvq_quantize<type, codec, family, bits, group>)           \
      kvq_quantize<type, codec, family, bits, group>;                \
  template [[host_name("kvq_dequantize_" #type "_" tag)]] [[kernel]] \
  decltype(kvq_dequantize<type, codec, family, bits, group>)         \
      kvq_dequantize<type, codec, family, bits, group>;

#define KVQ_CODEC(tag, codec, family, bits, group)     \
  KVQ_CODEC_OF(float, tag, codec, family, bits, group) \
  KVQ_CODEC_OF(half, tag, codec, family, bits, group)  \
  KVQ_CODEC_OF(bfloat, tag, codec, family, bits, group)
