// C++ view of one KV format: the same table as torch_kvq/formats.py (a test compares them).
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/string_view.h>

#include <string>

#include "shared/formats.h"

namespace kvq {

struct Format {
  KvqFamily family;
  int bits;      ///< bits of a code; 0 for none
  int group;     ///< elements that share a scale; 0 where the layout fixes it
  int multiple;  ///< head_dim must be a multiple of this
  const char* name;

  /// Refuses an unknown name or group size with "[kvq.<op>] …".
  static Format parse(const char* op, std::string_view name, int64_t group_size);

  int64_t codes_row(int64_t head_dim) const;   ///< elements in a row of codes
  int64_t scales_row(int64_t head_dim) const;  ///< elements in a row of scales
  int64_t biases_row(int64_t head_dim) const;  ///< elements in a row of biases
  int64_t head_dim(int64_t codes_row) const;   ///< head size whose rows have codes_row elements
  void check_head_dim(const char* op, int64_t head_dim) const;
  KvqEncoder parse_encoder(const char* op, std::string_view encoder) const;
  bool is_none() const { return family == KVQ_FAMILY_NONE; }
  std::string str() const;  ///< as KVFormat prints it, without rotation
};

/// float32, float16 or bfloat16; anything else is refused.
KvqDtype float_dtype(const char* op, const char* argument, c10::ScalarType dtype);

/// float16 for half and bfloat16 caches, float32 for float32 ones.
c10::ScalarType default_scale_dtype(c10::ScalarType dtype);

}  // namespace kvq
