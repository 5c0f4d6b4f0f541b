#include "format.h"

#include <c10/util/Exception.h>

#include <array>

namespace kvq {
namespace {

constexpr int kDefaultGroup = 64;
constexpr std::array<Format, 14> kFormats{{
    {KVQ_FAMILY_AFFINE, 8, kDefaultGroup, 1, "int8"},
    {KVQ_FAMILY_AFFINE, 4, kDefaultGroup, 1, "int4"},
    {KVQ_FAMILY_AFFINE, 2, kDefaultGroup, 1, "int2"},
    {KVQ_FAMILY_FP8_E4M3, 8, kDefaultGroup, 1, "fp8_e4m3"},
    {KVQ_FAMILY_FP8_E5M2, 8, kDefaultGroup, 1, "fp8_e5m2"},
    {KVQ_FAMILY_Q8_0, 8, 0, 32, "q8_0"},
    {KVQ_FAMILY_Q4_0, 4, 0, 32, "q4_0"},
    {KVQ_FAMILY_TURBOQUANT, 2, 0, 8, "tq2"},
    {KVQ_FAMILY_TURBOQUANT, 3, 0, 8, "tq3"},
    {KVQ_FAMILY_TURBOQUANT, 4, 0, 8, "tq4"},
    {KVQ_FAMILY_TURBOQUANT, 5, 0, 8, "tq5"},
    {KVQ_FAMILY_TURBOQUANT, 6, 0, 8, "tq6"},
    {KVQ_FAMILY_TURBOQUANT, 8, 0, 8, "tq8"},
    {KVQ_FAMILY_NONE, 0, 0, 1, "none"},
}};

int64_t gguf_block_bytes(KvqFamily family) { return family == KVQ_FAMILY_Q8_0 ? 34 : 18; }

}  // namespace

Format Format::parse(const char* op, std::string_view name, int64_t group_size) {
  for (Format format : kFormats) {
    if (name != format.name) continue;
    if (format.group == 0) {
      TORCH_CHECK_VALUE(group_size == 0, "[kvq.", op, "] ", format.name,
                        " has no group_size to choose, got ", group_size);
      return format;
    }
    if (group_size != 0) {
      TORCH_CHECK_VALUE(group_size == 32 || group_size == 64 || group_size == 128, "[kvq.", op,
                        "] group_size must be 32, 64 or 128, got ", group_size);
      format.group = static_cast<int>(group_size);
    }
    format.multiple = format.group;
    return format;
  }
  std::string known;
  for (const Format& format : kFormats)
    known += (known.empty() ? "" : ", ") + std::string(format.name);
  TORCH_CHECK_VALUE(false, "[kvq.", op, "] unknown format '", std::string(name),
                    "'; expected one of ", known);
}

int64_t Format::codes_row(int64_t head_dim) const {
  switch (family) {
    case KVQ_FAMILY_NONE:
      return head_dim;
    case KVQ_FAMILY_Q8_0:
    case KVQ_FAMILY_Q4_0:
      return head_dim / 32 * gguf_block_bytes(family);
    default:
      return head_dim * bits / 8;
  }
}

int64_t Format::scales_row(int64_t head_dim) const {
  if (group != 0) return head_dim / group;
  return family == KVQ_FAMILY_TURBOQUANT ? 1 : 0;
}

int64_t Format::biases_row(int64_t head_dim) const {
  return family == KVQ_FAMILY_AFFINE ? head_dim / group : 0;
}

int64_t Format::head_dim(int64_t codes_row) const {
  switch (family) {
    case KVQ_FAMILY_NONE:
      return codes_row;
    case KVQ_FAMILY_Q8_0:
    case KVQ_FAMILY_Q4_0:
      return codes_row / gguf_block_bytes(family) * 32;
    default:
      return codes_row * 8 / bits;
  }
}

void Format::check_head_dim(const char* op, int64_t head_dim) const {
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim % multiple == 0, "[kvq.", op, "] ", str(),
                    " needs head_dim to be a positive multiple of ", multiple, ", got ", head_dim);
}

KvqEncoder Format::parse_encoder(const char* op, std::string_view encoder) const {
  if (encoder == "default") return KVQ_ENCODER_DEFAULT;
  if (encoder == "unbiased" && family == KVQ_FAMILY_TURBOQUANT) return KVQ_ENCODER_UNBIASED;
  TORCH_CHECK_VALUE(false, "[kvq.", op, "] ", name, " has no encoder '", std::string(encoder),
                    "'; expected ",
                    family == KVQ_FAMILY_TURBOQUANT ? "default or unbiased" : "default");
}

std::string Format::str() const {
  return group ? std::string(name) + "-g" + std::to_string(group) : std::string(name);
}

KvqDtype float_dtype(const char* op, const char* argument, c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return KVQ_FLOAT32;
    case c10::ScalarType::Half:
      return KVQ_FLOAT16;
    case c10::ScalarType::BFloat16:
      return KVQ_BFLOAT16;
    default:
      TORCH_CHECK_TYPE(false, "[kvq.", op, "] ", argument,
                       " must be float32, float16 or bfloat16, got ", c10::toString(dtype));
  }
}

c10::ScalarType default_scale_dtype(c10::ScalarType dtype) {
  return dtype == c10::ScalarType::Float ? c10::ScalarType::Float : c10::ScalarType::Half;
}

}  // namespace kvq
