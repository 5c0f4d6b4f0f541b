// No op here has a derivative: calling backward through one raises, it never gives silent zeros.
// Writes into a cache have no output to differentiate; they run as under no_grad.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(kvq, Autograd, m) {
  for (const char* op :
       {"quantize", "dequantize", "qdq", "hadamard", "mlx_native_dequantize", "q4_k_quantize",
        "q4_k_dequantize", "q4_k_gemv", "q4_k_matmul", "attention", "attention.int"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
  for (const char* op : {"kv_cache_update_", "kv_cache_update_.int", "quantize_into_",
                         "quantize_into_.int", "append_", "append_.int"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}
