// Drivers of encode, decode, hadamard and the mlx-native reader over ranges of vectors.
#include "codec.h"

#include <algorithm>

#include "hadamard.h"
#include "tables.h"

namespace kvq::cpu::KVQ_ISA {
namespace {

/// Counts vectors, batch-major, then head, token: divisions would cost as much as a short row.
struct VectorIndex {
  VectorIndex(int64_t vector, int64_t heads, int64_t tokens)
      : heads(heads),
        tokens(tokens),
        b(vector / (heads * tokens)),
        g(vector / tokens % heads),
        t(vector % tokens) {}

  void next() { advance(1); }

  /// Up to the end of a head's tokens.
  void advance(int64_t count) {
    t += count;
    if (t < tokens) return;
    t = 0;
    if (++g < heads) return;
    g = 0;
    ++b;
  }

  int64_t heads, tokens, b, g, t;
};

template <KvqDtype Dtype>
void load_values(const char* p, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load_as(Dtype, p + i * dtype_size(Dtype)));
  for (; i < n; ++i) y[i] = load_float(p + i * dtype_size(Dtype), Dtype);
}

inline void load_values(const char* p, KvqDtype dtype, int64_t n, float* y) {
  if (dtype == KVQ_BFLOAT16) return load_values<KVQ_BFLOAT16>(p, n, y);
  if (dtype == KVQ_FLOAT16) return load_values<KVQ_FLOAT16>(p, n, y);
  load_values<KVQ_FLOAT32>(p, n, y);
}

/// Significant bits of its numbers.
int precision_of(KvqDtype dtype) {
  return dtype == KVQ_BFLOAT16 ? 8 : dtype == KVQ_FLOAT16 ? 11 : 24;
}

/// 4 KiB of x: with the next batch's, their floats and what is made of them they fit into a
/// first-level cache.
int64_t batch_rows(int64_t head_dim, KvqDtype dtype) {
  const int64_t values = kBatchValues * 2 / dtype_size(dtype);
  return std::min<int64_t>(kBatchRows, values / head_dim);
}

/// Rows [first, first + count) of a batch from consecutive tokens of head g: x to centred, rotated
/// floats.
[[gnu::noinline]] void load_rows(const EncodeArgs& args, const char* x, int64_t g, Batch& batch,
                                 int first, int count) {
  const Layout& layout = args.out.layout;
  const int64_t n = layout.head_dim;
  const bool bounded = args.signs || layout.family == KVQ_FAMILY_TURBOQUANT;
  float* y = batch.y + first * n;
  const int64_t next = batch_rows(n, args.x_dtype) * args.x.token_stride;
  for (int r = 0; r < count; ++r, y += n, x += args.x.token_stride) {
    batch.next[first + r] = x + next;
    load_values(x, args.x_dtype, n, y);
    if (args.mean) {
      const float* mean = args.mean + g * n;
      for (int64_t j = 0; j < n; ++j) y[j] -= mean[j];
    }
    if (bounded) {
      for (int64_t j = 0; j < n; j += kWidth) {  // the order of operands keeps NaN
        store(y + j,
              minimum(splat(KVQ_ROTATED_LIMIT), maximum(splat(-KVQ_ROTATED_LIMIT), load(y + j))));
      }
    }
    if (args.signs) hadamard_row(y, n, args.signs, /*inverse=*/false);
  }
}

/// Where rows [first, first + count) go: consecutive slots of head g.
void place_rows(const Rows& out, int64_t b, int64_t g, int64_t slot, int first, int count,
                char** at) {
  char* p = out.at(b, g, slot);
  for (int r = first; r < first + count; ++r, p += out.token_stride) at[r] = p;
}

}  // namespace

void encode(const EncodeArgs& args, int64_t begin, int64_t end) {
  const Layout& layout = args.out.layout;
  const int64_t most = batch_rows(layout.head_dim, args.x_dtype);
  alignas(64) float values[kBatchValues + kBatchPadding];
  Batch batch;
  batch.y = values;
  if (!args.signs && !args.mean) batch.precision = precision_of(args.x_dtype);
  batch.saturate = args.signs;
  batch.next_bytes = layout.head_dim * dtype_size(args.x_dtype);
  VectorIndex at(begin, args.heads, args.tokens);
  for (int64_t vector = begin; vector < end; vector += batch.rows) {
    batch.rows = static_cast<int>(std::min(most, end - vector));
    for (int r = 0, count = 0; r < batch.rows; r += count) {
      // Up to the head's last token or the ring's last slot.
      int64_t slot = args.position[at.b] + args.first + at.t;
      if (args.ring) slot %= args.capacity;
      count = static_cast<int>(
          std::min({int64_t{batch.rows - r}, args.tokens - at.t, args.capacity - slot}));
      load_rows(args, args.x.at(at.b, at.g, args.first + at.t), at.g, batch, r, count);
      place_rows(args.out.codes, at.b, at.g, slot, r, count, batch.codes);
      place_rows(args.out.scales, at.b, at.g, slot, r, count, batch.scales);
      place_rows(args.out.biases, at.b, at.g, slot, r, count, batch.biases);
      at.advance(count);
    }
    std::fill_n(values + batch.rows * layout.head_dim, kBatchPadding, 0.0f);
    encode_rows(batch, layout, args.encoder);
  }
}

void decode(const DecodeArgs& args, int64_t begin, int64_t end) {
  const Layout& layout = args.in.layout;
  const int64_t n = layout.head_dim;
  const bool as_stored = layout.family == KVQ_FAMILY_NONE && !args.signs && !args.mean;
  float y[kMaxHeadDim];
  VectorIndex at(begin, args.heads, args.tokens);
  for (int64_t vector = begin; vector < end; ++vector, at.next()) {
    const int64_t b = at.b, g = at.g, slot = args.start + at.t;
    decode_row(args.in.codes.at(b, g, slot), args.in.scales.at(b, g, slot),
               args.in.biases.at(b, g, slot), layout, y);
    if (args.signs) hadamard_row(y, n, args.signs, /*inverse=*/true);
    if (args.mean) {
      const float* mean = args.mean + g * n;
      for (int64_t j = 0; j < n; ++j) y[j] += mean[j];
    }
    store_row(y, args.out_dtype, n, args.out.at(b, g, at.t), /*saturate=*/!as_stored);
  }
}

void hadamard(const HadamardArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.head_dim, bytes = n * dtype_size(args.dtype);
  float y[kMaxHeadDim];
  for (int64_t vector = begin; vector < end; ++vector) {
    load_row(static_cast<const char*>(args.x) + vector * bytes, args.dtype, n, y);
    hadamard_row(y, n, args.signs, args.inverse);
    store_row(y, args.dtype, n, static_cast<char*>(args.out) + vector * bytes);
  }
}

void mlx_native(const MlxNativeArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.head_dim;
  VectorIndex at(begin, args.heads, args.tokens);
  for (int64_t vector = begin; vector < end; ++vector, at.next()) {
    const int64_t b = at.b, g = at.g, t = at.t;
    const auto* codes = reinterpret_cast<const uint8_t*>(args.codes.at(b, g, args.start + t));
    const auto* norms = reinterpret_cast<const float*>(args.norms.at(b, g, args.start + t));
    auto* y = reinterpret_cast<float*>(args.out.at(b, g, t));
    const int mask = (1 << args.bits) - 1;
    for (int64_t i = 0; i < n; ++i) {
      const int code = args.bits == 4 ? (codes[i / 2] >> (i % 2 * 4)) & 15 : codes[i] & mask;
      // D <= 256: the L2 norm; beyond, the RMS of each 256 coordinates.
      const float factor = n > 256 ? norms[i / 256] / args.scale_factor_d512
                                   : norms[0] * static_cast<float>(1.0 / std::sqrt(double(n)));
      y[i] = args.codebook[code] * factor;
    }
    if (args.rotate_back) hadamard_row(y, n, args.signs, /*inverse=*/true);
  }
}

}  // namespace kvq::cpu::KVQ_ISA
