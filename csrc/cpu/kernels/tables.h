// What each instruction set's object files define.
#pragma once

#include "kernels.h"
#include "q4_k.h"

namespace kvq::cpu::KVQ_ISA {

void encode(const EncodeArgs& args, int64_t begin, int64_t end);
void decode(const DecodeArgs& args, int64_t begin, int64_t end);
void hadamard(const HadamardArgs& args, int64_t begin, int64_t end);
void mlx_native(const MlxNativeArgs& args, int64_t begin, int64_t end);
void attention(const AttentionArgs& args, int64_t begin, int64_t end);
void attention_merge(const AttentionArgs& args, int64_t begin, int64_t end);
void attention_unpack(const AttentionArgs& args, const AttentionTile& tile, int64_t begin,
                      int64_t end);
void attention_gather(const AttentionArgs& args, const AttentionTile& tile, int64_t begin,
                      int64_t end);

void q4_k_quantize(const Q4KCodecArgs& args, int64_t begin, int64_t end);
void q4_k_dequantize(const Q4KCodecArgs& args, int64_t begin, int64_t end);
bool q4_k_to_integers(const Q4KProductArgs& args);
void q4_k_to_floats(const Q4KProductArgs& args);
void q4_k_gemv_integers(const Q4KProductArgs& args, int64_t begin, int64_t end);
void q4_k_gemv_floats(const Q4KProductArgs& args, int64_t begin, int64_t end);
void q4_k_multiply(const Q4KProductArgs& args, int64_t begin, int64_t end);

extern const Kernels table;

}  // namespace kvq::cpu::KVQ_ISA
