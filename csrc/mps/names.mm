#include "names.h"

namespace kvq::mps {
namespace {

const char* file_of(const Format& format) {
  switch (format.family) {
    case KVQ_FAMILY_AFFINE:
      return "affine";
    case KVQ_FAMILY_FP8_E4M3:
    case KVQ_FAMILY_FP8_E5M2:
      return "fp8";
    case KVQ_FAMILY_Q8_0:
    case KVQ_FAMILY_Q4_0:
      return "gguf";
    case KVQ_FAMILY_TURBOQUANT:
      return "turboquant";
    case KVQ_FAMILY_NONE:
      return "dense";
  }
}

std::vector<Format> all_formats() {
  std::vector<Format> formats;
  for (const char* name : {"int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2"}) {
    for (const int group : {32, 64, 128}) formats.push_back(Format::parse("names", name, group));
  }
  for (const char* name : {"q8_0", "q4_0", "tq2", "tq3", "tq4", "tq5", "tq6", "tq8", "none"}) {
    formats.push_back(Format::parse("names", name, 0));
  }
  return formats;
}

std::string library_of(const Format& format) {
  return std::string(file_of(format)) + ":" + format_tag(format);
}

}  // namespace

const char* metal_dtype(KvqDtype dtype) {
  return dtype == KVQ_FLOAT32 ? "float" : dtype == KVQ_FLOAT16 ? "half" : "bfloat";
}

std::string format_tag(const Format& format) {
  return format.group ? std::string(format.name) + "_g" + std::to_string(format.group)
                      : std::string(format.name);
}

KernelName quantize_kernel(KvqDtype x, const Format& format) {
  return {library_of(format),
          std::string("kvq_quantize_") + metal_dtype(x) + "_" + format_tag(format)};
}

KernelName dequantize_kernel(KvqDtype out, const Format& format) {
  return {library_of(format),
          std::string("kvq_dequantize_") + metal_dtype(out) + "_" + format_tag(format)};
}

KernelName append_kernel(KvqDtype x) {
  return {"append", std::string("kvq_append_") + metal_dtype(x)};
}

KernelName hadamard_kernel(KvqDtype x) {
  return {"hadamard", std::string("kvq_hadamard_") + metal_dtype(x)};
}

KernelName mlx_native_kernel() { return {"mlx_native", "kvq_mlx_native_dequantize"}; }

KernelName q4_k_kernel(const char* op, KvqDtype dtype) {
  return {"q4_k", std::string("kvq_q4_k_") + op + "_" + metal_dtype(dtype)};
}

std::vector<KernelName> codec_kernels() {
  std::vector<KernelName> names;
  for (const KvqDtype dtype : {KVQ_FLOAT32, KVQ_FLOAT16, KVQ_BFLOAT16}) {
    for (const Format& format : all_formats()) {
      names.push_back(quantize_kernel(dtype, format));
      names.push_back(dequantize_kernel(dtype, format));
    }
    names.push_back(append_kernel(dtype));
    names.push_back(hadamard_kernel(dtype));
    for (const char* op : {"quantize", "dequantize", "gemv", "few", "matmul"}) {
      names.push_back(q4_k_kernel(op, dtype));
    }
  }
  names.push_back(mlx_native_kernel());
  return names;
}

}  // namespace kvq::mps
