// One side (K or V) of a task: finds the packed rows of a block of tokens, reads their scales and
// biases, hands out unpacked slabs.
#pragma once

#include "attention_unpack.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kMaxSlabs = kMaxHeadDim / kSlab;

/// in[token][group] to out[group][64].
template <int Groups>
inline void transpose_scales(const float* in, int tokens, int groups, float* out) {
  const int count = Groups ? Groups : groups;
  for (int g = 0; g < count; ++g) {
    for (int t = 0; t < tokens; ++t) out[g * kBlockTokens + t] = in[t * count + g];
  }
}

class Side {
 public:
  Side(const Packed& packed, int64_t b, int64_t g, int64_t capacity, bool ring)
      : layout_(packed.layout),
        unpacker_(choose_unpacker(packed.layout)),
        codes_(reinterpret_cast<const uint8_t*>(packed.codes.at(b, g, 0))),
        scales_(packed.scales.at(b, g, 0)),
        biases_(packed.biases.at(b, g, 0)),
        codes_stride_(packed.codes.token_stride),
        scales_stride_(packed.scales.token_stride),
        biases_stride_(packed.biases.token_stride),
        capacity_(capacity),
        ring_(ring) {
    const int64_t n = layout_.head_dim;
    slabs_ = static_cast<int>((n + kSlab - 1) / kSlab);
    tail_bytes_ = static_cast<int>(n % kSlab * unpacker_.slab_bytes / kSlab);
    row_bytes_ = unpacker_.offset(n / kSlab) - unpacker_.slab_offset + tail_bytes_;
    switch (layout_.family) {
      case KVQ_FAMILY_AFFINE:
      case KVQ_FAMILY_FP8_E4M3:
      case KVQ_FAMILY_FP8_E5M2:
        slabs_per_group_ = layout_.group / kSlab;
        groups_ = slabs_ / slabs_per_group_;
        break;
      case KVQ_FAMILY_Q8_0:
      case KVQ_FAMILY_Q4_0:
        groups_ = slabs_;
        break;
      case KVQ_FAMILY_TURBOQUANT:
        slabs_per_group_ = slabs_;
        groups_ = 1;
        break;
      case KVQ_FAMILY_NONE:
        groups_ = 0;
        break;
    }
  }

  int slabs() const { return slabs_; }
  int groups() const { return groups_; }
  int group(int slab) const { return slab / slabs_per_group_; }

  /// Makes the block of positions [position, position + tokens), tokens <= 64, current.
  void enter(int64_t position, int tokens) {
    tokens_ = tokens;
    const int64_t first = slot(position);
    const bool together = first + tokens <= capacity_;
    for (int t = 0; t < tokens; ++t) {
      rows_[t] = codes_ + (together ? first + t : slot(position + t)) * codes_stride_;
    }
    for (int t = tokens; t < kBlockTokens; ++t) rows_[t] = rows_[tokens - 1];
    if (tail_bytes_) copy_tails();
    if (layout_.family == KVQ_FAMILY_Q8_0 || layout_.family == KVQ_FAMILY_Q4_0) {
      read_block_scales();
    } else if (groups_) {
      read_scales(scales_, scales_stride_, position, together, scale_);
      if (has_bias()) read_scales(biases_, biases_stride_, position, together, bias_);
    }
    next_ = slot(position + tokens);
  }

  /// Asks for one of `parts` parts of the next block's rows.
  void prefetch(int part, int parts, int64_t tokens) const {
    if (next_ + tokens > capacity_) return;
    const int64_t begin = tokens * part / parts, end = tokens * (part + 1) / parts;
    for (int64_t t = begin; t < end; ++t) {
      const uint8_t* row = codes_ + (next_ + t) * codes_stride_;
      for (int64_t i = 0; i < row_bytes_; i += 64) __builtin_prefetch(row + i);
    }
    for (int64_t t = begin; t < end; t += 16) {
      if (groups_) __builtin_prefetch(scales_ + (next_ + t) * scales_stride_);
      if (has_bias()) __builtin_prefetch(biases_ + (next_ + t) * biases_stride_);
    }
  }

  /// out[value][token], 64 tokens; those past the block are copies of the last.
  void columns(int slab, float* out) const {
    if (is_tail(slab)) return unpacker_.columns(tail_rows_, 0, out);
    unpacker_.columns(rows_, unpacker_.offset(slab), out);
  }

  /// out[token][value], then rows of zeros up to a multiple of 4 tokens.
  void rows(int slab, float* out) const {
    if (is_tail(slab)) {
      unpacker_.rows(tail_rows_, 0, tokens_, out);
    } else {
      unpacker_.rows(rows_, unpacker_.offset(slab), tokens_, out);
    }
    const int padded = (tokens_ + 3) & ~3;
    std::memset(out + tokens_ * kSlab, 0, (padded - tokens_) * kSlab * sizeof(float));
  }

  bool starts_group(int slab) const { return slab % slabs_per_group_ == 0; }
  bool has_scale() const { return groups_ > 0; }
  bool has_bias() const { return layout_.family == KVQ_FAMILY_AFFINE; }
  /// Of each of the 64 tokens; zero past the block.
  const float* scale(int slab) const { return scale_ + group(slab) * kBlockTokens; }
  const float* bias(int slab) const { return bias_ + group(slab) * kBlockTokens; }

 private:
  int64_t slot(int64_t position) const { return ring_ ? position % capacity_ : position; }
  bool is_tail(int slab) const { return tail_bytes_ && slab == slabs_ - 1; }

  void copy_tails() {
    for (int t = 0; t < kBlockTokens; ++t) {
      std::memcpy(tails_[t], rows_[t] + unpacker_.offset(slabs_ - 1), tail_bytes_);
      std::memset(tails_[t] + tail_bytes_, 0, sizeof(tails_[t]) - tail_bytes_);
      tail_rows_[t] = tails_[t];
    }
  }

  void read_scales(const char* data, int64_t stride, int64_t position, bool together, float* out) {
    alignas(64) float in[kBlockTokens * kMaxSlabs];
    if (together && stride == groups_ * dtype_size(layout_.scale_dtype)) {
      load_row(data + slot(position) * stride, layout_.scale_dtype, tokens_ * groups_, in);
    } else {
      for (int t = 0; t < tokens_; ++t) {
        load_row(data + slot(position + t) * stride, layout_.scale_dtype, groups_,
                 in + t * groups_);
      }
    }
    if (tokens_ < kBlockTokens) std::memset(out, 0, groups_ * kBlockTokens * sizeof(float));
    switch (groups_) {
      case 1:
        return transpose_scales<1>(in, tokens_, 1, out);
      case 2:
        return transpose_scales<2>(in, tokens_, 2, out);
      case 4:
        return transpose_scales<4>(in, tokens_, 4, out);
      default:
        return transpose_scales<0>(in, tokens_, groups_, out);
    }
  }

  void read_block_scales() {
    alignas(64) uint16_t in[kMaxSlabs * kBlockTokens];
    for (int t = 0; t < kBlockTokens; ++t) {
      for (int g = 0; g < groups_; ++g) {
        uint16_t half = 0;
        if (t < tokens_) std::memcpy(&half, rows_[t] + g * unpacker_.slab_stride, 2);
        in[g * kBlockTokens + t] = half;
      }
    }
    load_row(reinterpret_cast<const char*>(in), KVQ_FLOAT16, groups_ * kBlockTokens, scale_);
  }

  Layout layout_;
  Unpacker unpacker_;
  const uint8_t* codes_;
  const char* scales_;
  const char* biases_;
  int64_t codes_stride_, scales_stride_, biases_stride_;
  int64_t capacity_;
  bool ring_;
  int slabs_ = 0;
  int slabs_per_group_ = 1;
  int groups_ = 0;      ///< scales of a row
  int tail_bytes_ = 0;  ///< codes of the last, incomplete slab
  int64_t row_bytes_ = 0;
  int tokens_ = 0;
  int64_t next_ = 0;  ///< slot after the block
  const uint8_t* rows_[kBlockTokens];
  const uint8_t* tail_rows_[kBlockTokens];
  alignas(64) uint8_t tails_[kBlockTokens][4 * kSlab];
  alignas(64) float scale_[kMaxSlabs * kBlockTokens];
  alignas(64) float bias_[kMaxSlabs * kBlockTokens];
};

}  // namespace kvq::cpu::KVQ_ISA
