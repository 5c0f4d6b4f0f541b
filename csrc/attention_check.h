// The checks of attention that need no look at the values of a tensor: the same on every device.
#pragma once

#include "check.h"

namespace kvq {

/// attention's arguments as the schema has them, but for kv_length, which has two forms.
struct AttentionCall {
  const at::Tensor& query;
  Packed k, v;
  Format k_format, v_format;
  const std::optional<at::Tensor>&start, &end, &mask, &sinks, &k_signs, &v_signs, &k_mean, &v_mean;
  std::optional<double> scale;
  double softcap;
  int64_t window;
  bool causal, ring;
};

/// What the checks find out about the two sides.
struct AttentionSides {
  Side k, v;
};

/// Refuses a call whose arguments do not fit together, or are not on `device`.
AttentionSides check_attention(const AttentionCall& call, c10::Device device);

}  // namespace kvq
