// Names and instantiations of the attention kernels: the only place that composes them.
//
// The libraries attention_decode, attention_matrix and attention_prefill are templates. What a call
// needs is instantiated by one line appended to their source, so that a user's Mac compiles just
// that.
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

/// The template libraries.
enum AttentionKind {
  KVQ_ATTENTION_DECODE = 0,   ///< few rows, any format, float arithmetic
  KVQ_ATTENTION_PREFILL = 1,  ///< many rows
  KVQ_ATTENTION_MATRIX = 2,   ///< few rows by simdgroup_matrix of float16
};

/// A kernel of one of them.
struct AttentionKernel {
  AttentionKind kind;
  KvqDtype dtype;  ///< of the query
  AttentionFormat k, v;
  int head_dim, value_dim;
  int rows;      ///< (query, head) rows a threadgroup serves; not prefill
  bool aligned;  ///< rows start at addresses that wide loads need

  const char* library() const {
    return kind == KVQ_ATTENTION_PREFILL  ? "attention_prefill"
           : kind == KVQ_ATTENTION_MATRIX ? "attention_matrix"
                                          : "attention_decode";
  }
  /// Whether the matrix kernel could serve this: half or bfloat queries, rows that its lanes can
  /// share in whole chunks.
  bool fits_matrix() const;
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

/// Whether LANES lanes can share a row of `dim` elements as KvqMatrixShape of metal/
/// attention_matrix.h has it: chunks within a group, of a whole number of words' halves.
inline bool fits_matrix_side(const AttentionFormat& f, int dim, int lanes) {
  if (f.family == KVQ_FAMILY_NONE && f.dtype != KVQ_FLOAT16) return false;
  const bool gguf = f.family == KVQ_FAMILY_Q8_0 || f.family == KVQ_FAMILY_Q4_0;
  const int group = gguf ? 32 : f.group > 0 ? f.group : dim;
  const int bits = f.family == KVQ_FAMILY_NONE ? 16 : f.bits;
  const int share = group / lanes, most = f.family == KVQ_FAMILY_NONE ? 16 : 32;
  int chunk = share & -share;  // the power of two in it
  if (chunk > most) chunk = most;
  const int whole = f.family == KVQ_FAMILY_TURBOQUANT && bits != 4 ? 8 : 128 / lanes;
  return dim % 32 == 0 && group % lanes == 0 && chunk >= 2 && chunk * bits % whole == 0;
}

inline bool AttentionKernel::fits_matrix() const {
  return dtype != KVQ_FLOAT32 && head_dim <= 256 && value_dim <= 256 &&
         fits_matrix_side(k, head_dim, 4) && fits_matrix_side(v, value_dim, 8);
}

inline std::string AttentionKernel::name() const {
  std::string name = std::string("kvq_") + library() + "_" + metal_type(dtype) + "_k_" +
                     format_token(k) + "_v_" + format_token(v) + "_d" + std::to_string(head_dim);
  if (value_dim != head_dim) name += "_dv" + std::to_string(value_dim);
  if (kind != KVQ_ATTENTION_PREFILL) name += "_r" + std::to_string(rows);
  return aligned ? name : name + "_unaligned";
}

inline std::string AttentionKernel::instantiation() const {
  std::string kernel = std::string("kvq_") + library() + "<" + metal_type(dtype) + ", " +
                       format_type(k) + ", " + format_type(v) + ", " + std::to_string(head_dim) +
                       ", " + std::to_string(value_dim) + ", ";
  if (kind != KVQ_ATTENTION_PREFILL) kernel += std::to_string(rows) + ", ";
  kernel += aligned ? "true>" : "false>";
  return "template [[host_name(\"" + name() + "\")]] [[kernel]] decltype(" + kernel + ") " +
         kernel + ";\n";
}

}  // namespace kvq
