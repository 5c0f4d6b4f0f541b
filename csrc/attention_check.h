// The checks of attention that need no look at the values of a tensor: the same on every device.
#pragma once

#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

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

/// The op as the schema has it, once for every device and for both forms of kv_length, a tensor and
/// an int: Implementation::run(call, kv_length) does the work on Implementation::device().
template <typename Implementation, typename Length>
std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& query, const at::Tensor& k_codes, const at::Tensor& k_scales,
    const at::Tensor& k_biases, const at::Tensor& v_codes, const at::Tensor& v_scales,
    const at::Tensor& v_biases, Length kv_length, std::string_view k_format, int64_t k_group_size,
    std::string_view v_format, int64_t v_group_size, const std::optional<at::Tensor>& kv_start,
    const std::optional<at::Tensor>& kv_end, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& k_signs,
    const std::optional<at::Tensor>& v_signs, const std::optional<at::Tensor>& k_mean,
    const std::optional<at::Tensor>& v_mean, std::optional<double> scale, double softcap,
    int64_t window, bool causal, bool ring) {
  constexpr const char* op = "attention";
  const c10::Device device = Implementation::device();
  check_input(op, "query", query, device);
  if constexpr (std::is_same_v<Length, const at::Tensor&>) {
    check_positions(op, "kv_length", kv_length, query.size(0), device);
  }
  const AttentionCall call{query,
                           {k_codes, k_scales, k_biases},
                           {v_codes, v_scales, v_biases},
                           Format::parse(op, k_format, k_group_size),
                           Format::parse(op, v_format, v_group_size),
                           kv_start,
                           kv_end,
                           mask,
                           sinks,
                           k_signs,
                           v_signs,
                           k_mean,
                           v_mean,
                           scale,
                           softcap,
                           window,
                           causal,
                           ring};
  return Implementation::run(call, kv_length);
}

/// Registers both overloads.
template <typename Implementation>
void register_attention(torch::Library& m) {
  m.impl("attention", attention<Implementation, const at::Tensor&>);
  m.impl("attention.int", attention<Implementation, int64_t>);
}

}  // namespace kvq
