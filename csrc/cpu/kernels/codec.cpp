// Drivers of encode, decode, hadamard and the mlx-native reader over ranges of vectors.
#include "codec.h"

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

  void next() {
    if (++t < tokens) return;
    t = 0;
    if (++g < heads) return;
    g = 0;
    ++b;
  }

  int64_t heads, tokens, b, g, t;
};

}  // namespace

void encode(const EncodeArgs& args, int64_t begin, int64_t end) {
  const Layout& layout = args.out.layout;
  const int64_t n = layout.head_dim;
  const bool bounded = args.signs || layout.family == KVQ_FAMILY_TURBOQUANT;
  float y[kMaxHeadDim + 16] = {};  // encoders may look at a few values past the last
  VectorIndex at(begin, args.heads, args.tokens);
  for (int64_t vector = begin; vector < end; ++vector, at.next()) {
    const int64_t b = at.b, g = at.g, token = args.first + at.t;
    load_row(args.x.at(b, g, token), args.x_dtype, n, y);
    if (args.mean) {
      const float* mean = args.mean + g * n;
      for (int64_t j = 0; j < n; ++j) y[j] -= mean[j];
    }
    if (bounded) {
      for (int64_t j = 0; j < n; ++j) {
        float v = y[j];
        v = v > KVQ_ROTATED_LIMIT ? KVQ_ROTATED_LIMIT : v;
        y[j] = v < -KVQ_ROTATED_LIMIT ? -KVQ_ROTATED_LIMIT : v;
      }
    }
    if (args.signs) hadamard_row(y, n, args.signs, /*inverse=*/false);
    int64_t slot = args.position[b] + token;
    if (args.ring) slot %= args.capacity;
    char* codes = args.out.codes.at(b, g, slot);
    if (layout.family == KVQ_FAMILY_NONE && !args.signs) {
      store_row(y, layout.codes_dtype, n, codes, /*saturate=*/false);
    } else {
      encode_row(y, layout, args.encoder, codes, args.out.scales.at(b, g, slot),
                 args.out.biases.at(b, g, slot));
    }
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
