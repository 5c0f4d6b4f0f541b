// One side (K or V) of a task: finds the packed rows of a block of tokens, reads their scales and
// biases, hands out unpacked slabs.
#pragma once

#include "attention_pairs.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kMaxSlabs = kMaxHeadDim / kSlab;
/// Bytes of a row from which blocks of K and V are large (see Ahead).
constexpr int64_t kLargeRow = 96;
/// Stands for tokens past a block: finite whatever its format, so that a weight of 0 hides it.
alignas(64) constexpr uint8_t kZeroRow[kMaxHeadDim * sizeof(float)] = {};

/// Every Nth lane of N vectors: out[i] holds lanes i, i + N, ...
template <int N>
[[gnu::always_inline]] inline void unzip_all(const F* in, F* out) {
  if constexpr (N == 1) {
    out[0] = in[0];
  } else {
    F halves[2][N / 2], done[2][N / 2];
    unroll<N / 2>([&](auto i) { unzip(in[2 * i], in[2 * i + 1], halves[0][i], halves[1][i]); });
    unroll<2>([&](auto odd) { unzip_all<N / 2>(halves[odd], done[odd]); });
    unroll<N>([&](auto i) { out[i] = done[i % 2][i / 2]; });
  }
}

/// in[64][Groups] of a dtype to out[group][64].
template <int Groups, KvqDtype Dtype>
void unzip_groups(const char* in, float* out) {
  const int size = dtype_size(Dtype);
  for (int t = 0; t < kBlockTokens; t += kWidth) {
    F mixed[Groups], apart[Groups];
    unroll<Groups>(
        [&](auto i) { mixed[i] = load_as(Dtype, in + (t * Groups + i * kWidth) * size); });
    unzip_all<Groups>(mixed, apart);
    unroll<Groups>([&](auto i) { store(out + i * kBlockTokens + t, apart[i]); });
  }
}

/// in[64][groups] of a dtype to out[group][64]; false, and nothing done, for rare numbers of them.
template <KvqDtype Dtype>
bool unzip_groups(const char* in, int groups, float* out) {
  switch (groups) {
    case 1:
      return unzip_groups<1, Dtype>(in, out), true;
    case 2:
      return unzip_groups<2, Dtype>(in, out), true;
    case 4:
      return unzip_groups<4, Dtype>(in, out), true;
    case 8:
      return unzip_groups<8, Dtype>(in, out), true;
    default:
      return false;
  }
}

template <typename Unpacker>
class Side {
 public:
  using Element = typename Unpacker::Element;

  Side(const Packed& packed, int64_t b, int64_t g, int64_t capacity, bool ring)
      : layout_(packed.layout),
        unpacker_(packed.layout),
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
    tail_bytes_ = static_cast<int>(n % kSlab * unpacker_.slab_bytes() / kSlab);
    together_in_memory_ = codes_stride_ == n / kSlab * unpacker_.slab_stride() + tail_bytes_;
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

  /// Makes the block of positions [position, position + tokens), tokens <= 64, current; next tokens
  /// follow.
  void enter(int64_t position, int tokens, int64_t next) {
    tokens_ = tokens;
    const int64_t first = slot(position);
    const bool together = first + tokens <= capacity_;
    const uint8_t* row = codes_ + first * codes_stride_;
    for (int t = 0; t < tokens; ++t, row += codes_stride_) rows_[t] = row;
    for (int t = 0; !together && t < tokens; ++t) {
      rows_[t] = codes_ + slot(position + t) * codes_stride_;
    }
    for (int t = tokens; t < kBlockTokens; ++t) rows_[t] = kZeroRow;
    if (tail_bytes_) copy_tails();
    if (layout_.family == KVQ_FAMILY_Q8_0 || layout_.family == KVQ_FAMILY_Q4_0) {
      read_block_scales();
    } else if (groups_) {
      read_scales(scales_, scales_stride_, position, together, scale_);
      multiply_scales(unpacker_.unit());
      if (has_bias()) {
        read_scales(biases_, biases_stride_, position, together, bias_);
        const F centre = splat(Unpacker::centre(layout_.bits));
        for (int i = 0; i < groups_ * kBlockTokens; i += kWidth) {
          store(bias_ + i, fma(load(scale_ + i), centre, load(bias_ + i)));
        }
      }
    }
    ahead_ = nullptr;
    if (next && first + tokens + next <= capacity_) {
      if (together_in_memory_) ahead_ = codes_ + (first + tokens) * codes_stride_;
      prefetch(scales_ + (first + tokens) * scales_stride_, groups_ ? next * scales_stride_ : 0);
      prefetch(biases_ + (first + tokens) * biases_stride_, has_bias() ? next * biases_stride_ : 0);
    }
  }

  const Unpacker& unpacker() const { return unpacker_; }

  /// out[value][token], 64 tokens; those past the block are something finite.
  void columns(int slab, Element* out) const {
    unpacker_.columns(place(slab), offset(slab), ahead(slab), out);
  }

  /// out[token][value]; tokens past the block are something finite, up to padded_tokens.
  void rows(int slab, Element* out) const {
    unpacker_.rows(place(slab), offset(slab), tokens_, ahead(slab), out);
  }

  /// Adds columns' products with a query's rows to their scores, as score_tile does.
  void scores(int slab, int64_t rows, const Element* q, const float* q_sum, float* scores) const {
    const float* scale_of = has_scale() ? scale(slab) : nullptr;
    const float* bias_of = has_bias() ? bias(slab) : nullptr;
    unpacker_.scores(rows, place(slab), offset(slab), ahead(slab), q, scale_of, bias_of, q_sum,
                     scores);
  }
  /// Adds rows times weights to sums, as value_tile does.
  void sums(int slab, int64_t rows, const Element* weights, float* sums) const {
    unpacker_.sums(rows, place(slab), offset(slab), tokens_, ahead(slab), weights, sums);
  }

  bool starts_group(int slab) const { return slab % slabs_per_group_ == 0; }
  bool has_scale() const { return groups_ > 0; }
  bool has_bias() const { return layout_.family == KVQ_FAMILY_AFFINE; }
  /// Of each of the 64 tokens, zero past the block; the bias fits the unpacked codes, not the
  /// stored ones.
  const float* scale(int slab) const { return scale_ + group(slab) * kBlockTokens; }
  const float* bias(int slab) const { return bias_ + group(slab) * kBlockTokens; }

 private:
  int64_t slot(int64_t position) const { return ring_ ? position % capacity_ : position; }
  bool is_tail(int slab) const { return tail_bytes_ && slab == slabs_ - 1; }

  /// Where a slab of each token is: place(slab)[token] + offset(slab).
  const uint8_t* const* place(int slab) const { return is_tail(slab) ? tail_rows_ : rows_; }
  int64_t offset(int slab) const { return is_tail(slab) ? 0 : unpacker_.offset(slab); }

  Ahead ahead(int slab) const {
    if (!ahead_) return {};
    const int64_t bytes = (codes_stride_ + slabs_ - 1) / slabs_;
    return {ahead_ + slab * bytes * kBlockTokens, bytes, codes_stride_ >= kLargeRow};
  }

  /// Few lines, where scales lie next to each other.
  static void prefetch(const char* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes && i < 2048; i += 64) __builtin_prefetch(data + i);
  }

  void copy_tails() {
    for (int t = 0; t < kBlockTokens; ++t) {
      std::memcpy(tails_[t], rows_[t] + unpacker_.offset(slabs_ - 1), tail_bytes_);
      std::memset(tails_[t] + tail_bytes_, 0, sizeof(tails_[t]) - tail_bytes_);
      tail_rows_[t] = tails_[t];
    }
  }

  void read_scales(const char* data, int64_t stride, int64_t position, bool together, float* out) {
    const KvqDtype dtype = layout_.scale_dtype;
    const bool packed = together && stride == groups_ * dtype_size(dtype);
    if (packed && tokens_ == kBlockTokens) {
      const char* from = data + slot(position) * stride;
      const bool done = dtype == KVQ_FLOAT16   ? unzip_groups<KVQ_FLOAT16>(from, groups_, out)
                        : dtype == KVQ_FLOAT32 ? unzip_groups<KVQ_FLOAT32>(from, groups_, out)
                                               : unzip_groups<KVQ_BFLOAT16>(from, groups_, out);
      if (done) return;
    }
    alignas(64) float in[kBlockTokens * kMaxSlabs];
    if (packed) {
      load_row(data + slot(position) * stride, dtype, tokens_ * groups_, in);
    } else {
      for (int t = 0; t < tokens_; ++t) {
        load_row(data + slot(position + t) * stride, dtype, groups_, in + t * groups_);
      }
    }
    const int filled = tokens_ * groups_, all = kBlockTokens * groups_;
    std::memset(in + filled, 0, (all - filled) * sizeof(float));
    if (unzip_groups<KVQ_FLOAT32>(reinterpret_cast<const char*>(in), groups_, out)) return;
    for (int g = 0; g < groups_; ++g) {
      for (int t = 0; t < kBlockTokens; ++t) out[g * kBlockTokens + t] = in[t * groups_ + g];
    }
  }

  void multiply_scales(float unit) {
    if (unit == 1) return;
    for (int i = 0; i < groups_ * kBlockTokens; i += kWidth) {
      store(scale_ + i, load(scale_ + i) * splat(unit));
    }
  }

  void read_block_scales() {
    alignas(64) uint16_t in[kMaxSlabs * kBlockTokens];
    for (int g = 0; g < groups_; ++g) {
      uint16_t* of_group = in + g * kBlockTokens;
      for (int t = 0; t < tokens_; ++t) {
        std::memcpy(of_group + t, rows_[t] + g * unpacker_.slab_stride(), 2);
      }
      std::memset(of_group + tokens_, 0, (kBlockTokens - tokens_) * sizeof(uint16_t));
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
  int tokens_ = 0;
  bool together_in_memory_ = false;  ///< a token's codes follow those of the token before
  const uint8_t* ahead_ = nullptr;   ///< the next block's codes
  const uint8_t* rows_[kBlockTokens];
  const uint8_t* tail_rows_[kBlockTokens];
  alignas(64) uint8_t tails_[kBlockTokens][4 * kSlab];
  alignas(64) float scale_[kMaxSlabs * kBlockTokens];
  alignas(64) float bias_[kMaxSlabs * kBlockTokens];
};

}  // namespace kvq::cpu::KVQ_ISA
