// Names of the Metal kernels behind every op but attention. Kernels spell their variant:
// kvq_<op>_<dtype>_<format>[_g<group>]; one .metal file holds a family of formats, a library one.
#pragma once

#include <string>
#include <vector>

#include "../format.h"

namespace kvq::mps {

struct KernelName {
  std::string library;  ///< as runtime::Launch has it
  std::string kernel;
};

/// As the dtype is called in Metal and in kernel names.
const char* metal_dtype(KvqDtype dtype);
/// "int4_g64", "q8_0", "none".
std::string format_tag(const Format& format);

KernelName quantize_kernel(KvqDtype x, const Format& format);
KernelName dequantize_kernel(KvqDtype out, const Format& format);
KernelName append_kernel(KvqDtype x);
KernelName hadamard_kernel(KvqDtype x);
KernelName mlx_native_kernel();
/// op: "quantize", "dequantize", "gemv", "few" or "matmul".
KernelName q4_k_kernel(const char* op, KvqDtype dtype);

/// Every kernel that the functions above can name.
std::vector<KernelName> codec_kernels();

}  // namespace kvq::mps
