#include "tables.h"

namespace kvq::cpu::KVQ_ISA {

#define KVQ_STRINGIFY_(x) #x
#define KVQ_STRINGIFY(x) KVQ_STRINGIFY_(x)

const Kernels table{
    KVQ_STRINGIFY(KVQ_ISA), encode,           decode,          hadamard, mlx_native, attention,
    attention_merge,        attention_unpack, attention_gather};

}  // namespace kvq::cpu::KVQ_ISA
