// What each instruction set's object files define.
#pragma once

#include "kernels.h"

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

extern const Kernels table;

}  // namespace kvq::cpu::KVQ_ISA
