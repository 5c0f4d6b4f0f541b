// Names and instantiations of the attention kernels: the only place that composes them.
//
// The libraries attention_decode and attention_prefill are templates. What a call needs is
// instantiated by one line appended to their source, so that a user's Mac compiles just that.
#pragma once

#include <string>

#include "../shared/formats.h"

namespace kvq {

/// One packed side as a kernel is compiled for it.
struct AttentionFormat {
  KvqFamily family;
  int bits;          ///< of a code; 0 for none
  int group;         ///< elements that share a scale, affine and fp8 only
  KvqDtype dtype;    ///< of the scales; of the codes for none
  const char* name;  ///< as Format::name
};

/// A kernel of one of the two template libraries.
struct AttentionKernel {
  bool prefill;    ///< attention_prefill, else attention_decode
  KvqDtype dtype;  ///< of the query
  AttentionFormat k, v;
  int head_dim, value_dim;
  int rows;      ///< (query, head) rows a threadgroup serves; decode only
  bool aligned;  ///< rows start at addresses that wide loads need

  const char* library() const { return prefill ? "attention_prefill" : "attention_decode"; }
  /// For instance kvq_attention_decode_half_k_int4_g64_v_int4_g64_d128_r4.
  std::string name() const;
  /// The line to append to the library's source.
  std::string instantiation() const;
};

inline const char* metal_type(KvqDtype dtype) {
  return dtype == KVQ_FLOAT32 ? "float" : dtype == KVQ_FLOAT16 ? "half" : "bfloat";
}

inline bool has_scales(const AttentionFormat& f) {
  return f.family == KVQ_FAMILY_AFFINE || f.family == KVQ_FAMILY_FP8_E4M3 ||
         f.family == KVQ_FAMILY_FP8_E5M2 || f.family == KVQ_FAMILY_TURBOQUANT;
}

/// int4_g64; with the dtype of the scales where it is not float16: int4_g64_float; none_half.
inline std::string format_token(const AttentionFormat& f) {
  std::string token = f.name;
  if (f.group > 0) token += "_g" + std::to_string(f.group);
  const bool spelled = f.family == KVQ_FAMILY_NONE || (has_scales(f) && f.dtype != KVQ_FLOAT16);
  return spelled ? token + "_" + metal_type(f.dtype) : token;
}

/// The struct of metal/attention_formats.h that reads the format.
inline std::string format_type(const AttentionFormat& f) {
  const std::string bits = std::to_string(f.bits), group = std::to_string(f.group);
  const std::string dtype = metal_type(f.dtype);
  switch (f.family) {
    case KVQ_FAMILY_AFFINE:
      return "KvqAffine<" + bits + ", " + group + ", " + dtype + ">";
    case KVQ_FAMILY_FP8_E4M3:
      return "KvqFp8<4, " + group + ", " + dtype + ">";
    case KVQ_FAMILY_FP8_E5M2:
      return "KvqFp8<5, " + group + ", " + dtype + ">";
    case KVQ_FAMILY_Q8_0:
    case KVQ_FAMILY_Q4_0:
      return "KvqGguf<" + bits + ">";
    case KVQ_FAMILY_TURBOQUANT:
      return "KvqTurbo<" + bits + ", " + dtype + ">";
    default:
      return "KvqDense<" + dtype + ">";
  }
}

inline std::string AttentionKernel::name() const {
  std::string name = std::string("kvq_") + library() + "_" + metal_type(dtype) + "_k_" +
                     format_token(k) + "_v_" + format_token(v) + "_d" + std::to_string(head_dim);
  if (value_dim != head_dim) name += "_dv" + std::to_string(value_dim);
  if (!prefill) name += "_r" + std::to_string(rows);
  return aligned ? name : name + "_unaligned";
}

inline std::string AttentionKernel::instantiation() const {
  std::string kernel = std::string("kvq_") + library() + "<" + metal_type(dtype) + ", " +
                       format_type(k) + ", " + format_type(v) + ", " + std::to_string(head_dim) +
                       ", " + std::to_string(value_dim) + ", ";
  if (!prefill) kernel += std::to_string(rows) + ", ";
  kernel += aligned ? "true>" : "false>";
  return "template [[host_name(\"" + name() + "\")]] [[kernel]] decltype(" + kernel + ") " +
         kernel + ";\n";
}

}  // namespace kvq
