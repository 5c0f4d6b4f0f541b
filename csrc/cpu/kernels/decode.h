// Packed rows to floats, in the stored (centred, rotated) domain: the unpackers of attention, with
// scale and bias applied as reference.decode does, one rounding per operation.
#pragma once

#include "attention_unpack.h"
#include "gguf.h"
#include "kernels.h"

namespace kvq::cpu::KVQ_ISA {

inline float load_half(const uint8_t* p) {
  return load_scale(reinterpret_cast<const char*>(p), 0, KVQ_FLOAT16);
}

/// A code without sign.
struct Unsigned {
  static constexpr Place kPlace = Place::clean;
  F operator()(I x) const { return to_float(x); }
};

/// 32 values: each code through the map, then finish(value).
template <int Bits, bool Halves = false, typename Map, typename Finish>
[[gnu::always_inline]] inline void decode_slab(const uint8_t* p, const Map& map, float* y,
                                               const Finish& finish) {
  I codes[kSlab / kWidth];
  if constexpr (Halves) {
    spread_halves(p, codes);
  } else {
    spread<Bits>(p, codes);
  }
  for (int j = 0; j < kSlab / kWidth; ++j) {
    store(y + j * kWidth, finish(map(placed<Bits, Map::kPlace>(codes[j]))));
  }
}

template <int Bits>
void decode_affine(const uint8_t* codes, const char* scales, const char* biases,
                   const Layout& layout, float* y) {
  const int group = layout.group;
  const int groups = static_cast<int>(layout.head_dim) / group;
  for (int g = 0; g < groups; ++g) {
    const F scale = splat(load_scale(scales, g, layout.scale_dtype));
    const F bias = splat(load_scale(biases, g, layout.scale_dtype));
    for (int i = 0; i < group; i += kSlab, y += kSlab, codes += 4 * Bits) {
      decode_slab<Bits>(codes, Unsigned{}, y, [&](F code) { return code * scale + bias; });
    }
  }
}

template <typename Format>
void decode_fp8(const uint8_t* codes, const char* scales, const Layout& layout, float* y) {
  const int group = layout.group;
  const int groups = static_cast<int>(layout.head_dim) / group;
  for (int g = 0; g < groups; ++g) {
    const float scale = load_scale(scales, g, layout.scale_dtype);
    for (int i = 0; i < group; i += kSlab, y += kSlab, codes += kSlab) {
      uint64_t special = 0;
      for (int j = 0; j < kSlab; j += 8) special |= has_special<Format>(load_bytes<8>(codes + j));
      if (special) [[unlikely]] {
        for (int j = 0; j < kSlab; ++j) y[j] = fp8_values<Format>()[codes[j]] * scale;
      } else {
        decode_slab<8>(codes, Fp8<Format>{}, y, [&](F value) { return value * splat(scale); });
      }
    }
  }
}

inline void decode_q8_0(const uint8_t* codes, const Layout& layout, float* y) {
  for (int64_t b = 0; b < layout.head_dim / kBlock; ++b, y += kBlock, codes += 2 + kBlock) {
    const F d = splat(load_half(codes));
    for (int j = 0; j < kBlock; j += kWidth) {
      store(y + j, to_float(signed_byte_lanes<0>(codes + 2 + j)) * d);
    }
  }
}

inline void decode_q4_0(const uint8_t* codes, const Layout& layout, float* y) {
  for (int64_t b = 0; b < layout.head_dim / kBlock; ++b, y += kBlock, codes += 2 + kBlock / 2) {
    const F d = splat(load_half(codes));
    decode_slab<4, true>(codes + 2, Unsigned{}, y,
                         [&](F code) { return (code - splat(8.0f)) * d; });
  }
}

template <int Bits>
void decode_turboquant(const uint8_t* codes, const char* scales, const Layout& layout, float* y) {
  const F norm = splat(load_scale(scales, 0, layout.scale_dtype));
  const Codebook<Bits> map;
  int64_t i = 0;
  for (; i + kSlab <= layout.head_dim; i += kSlab, codes += 4 * Bits) {
    decode_slab<Bits>(codes, map, y + i, [&](F entry) { return entry * norm; });
  }
  for (; i < layout.head_dim; i += 8, codes += Bits) {
    const uint64_t word = load_bytes<Bits>(codes);
    for (int j = 0; j < 8; ++j) {
      const auto code = static_cast<int>(word >> (j * Bits)) & ((1 << Bits) - 1);
      y[i + j] = kvq_codebook(Bits)[code] * load_scale(scales, 0, layout.scale_dtype);
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
