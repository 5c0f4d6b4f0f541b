#include "tables.h"

namespace kvq::cpu::KVQ_ISA {

#define KVQ_STRINGIFY_(x) #x
#define KVQ_STRINGIFY(x) KVQ_STRINGIFY_(x)

const Q4KKernels q4_k{q4_k_quantize,      q4_k_dequantize,  q4_k_to_integers, q4_k_to_floats,
                      q4_k_gemv_integers, q4_k_gemv_floats, q4_k_multiply};

const Kernels table{
    KVQ_STRINGIFY(KVQ_ISA), encode,           decode,           hadamard, mlx_native, attention,
    attention_merge,        attention_unpack, attention_gather, &q4_k};

}  // namespace kvq::cpu::KVQ_ISA
