// Quantise and dequantise ranges of Q4_K super-blocks.
#include "q4_k_block.h"
#include "tables.h"

namespace kvq::cpu::KVQ_ISA {

void q4_k_quantize(const Q4KCodecArgs& args, int64_t begin, int64_t end) {
  const int64_t bytes = KVQ_Q4_K_SIZE * dtype_size(args.dtype);
  float y[KVQ_Q4_K_SIZE];
  for (int64_t i = begin; i < end; ++i) {
    load_row(static_cast<const char*>(args.in) + i * bytes, args.dtype, KVQ_Q4_K_SIZE, y);
    KvqQ4KBlock block;
    encode_q4_k(y, block);
    std::memcpy(static_cast<char*>(args.out) + i * KVQ_Q4_K_BYTES, &block, sizeof block);
  }
}

void q4_k_dequantize(const Q4KCodecArgs& args, int64_t begin, int64_t end) {
  const int64_t bytes = KVQ_Q4_K_SIZE * dtype_size(args.dtype);
  float y[KVQ_Q4_K_SIZE];
  for (int64_t i = begin; i < end; ++i) {
    KvqQ4KBlock block;
    std::memcpy(&block, static_cast<const char*>(args.in) + i * KVQ_Q4_K_BYTES, sizeof block);
    decode_q4_k(block, y);
    store_row(y, args.dtype, KVQ_Q4_K_SIZE, static_cast<char*>(args.out) + i * bytes);
  }
}

}  // namespace kvq::cpu::KVQ_ISA
