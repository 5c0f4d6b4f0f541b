// append_ on MPS: K and V of a step in one dispatch.
#include <torch/library.h>

#include "write.h"

namespace kvq::mps {
namespace {

runtime::Launch append_launch(const Write& k, const Write& v, const Position& position, bool ring) {
  const KvqWriteParams params = write_params({&k, &v}, position, ring);
  const KernelName name = append_kernel(k.dtype);
  const auto family = [](const Write& w) { return static_cast<int32_t>(w.side.format.family); };
  runtime::Launch launch{
      .library = name.library,
      .kernel = name.kernel,
      .constants = {{"kvq_k_family", family(k)},
                    {"kvq_k_bits", k.side.format.bits},
                    {"kvq_k_group", k.side.format.group},
                    {"kvq_k_rotate", k.side.signs.has_value()},
                    {"kvq_k_centre", k.side.mean.has_value()},
                    {"kvq_k_head_dim", static_cast<int32_t>(k.side.head_dim)},
                    {"kvq_k_wide", k.wide},
                    {"kvq_v_family", family(v)},
                    {"kvq_v_bits", v.side.format.bits},
                    {"kvq_v_group", v.side.format.group},
                    {"kvq_v_rotate", v.side.signs.has_value()},
                    {"kvq_v_centre", v.side.mean.has_value()},
                    {"kvq_v_head_dim", static_cast<int32_t>(v.side.head_dim)},
                    {"kvq_v_wide", v.wide},
                    {"kvq_k_scale_dtype", params.side[0].scale_dtype},
                    {"kvq_v_scale_dtype", params.side[1].scale_dtype}},
      .buffers = {k.x, k.packed.codes, k.packed.scales, k.packed.biases, or_none(k.side.signs),
                  or_none(k.side.mean), v.x, v.packed.codes, v.packed.scales, v.packed.biases,
                  or_none(v.side.signs), or_none(v.side.mean), position.tensor},
      .params = params,
  };
  lay_out(launch,
          simdgroups_for(params.tokens,
                         std::min(vectors_of(k.side, k.wide), vectors_of(v.side, v.wide)),
                         params.steps),
          params.heads, 2 * int64_t{params.batch}, params.row);
  return launch;
}

void write_both(const SideArguments& key, const SideArguments& value, const Position& position,
                bool ring) {
  check_input("append_", "value", value.x, kDevice);
  TORCH_CHECK_VALUE(key.x.size(2) == value.x.size(2),
                    "[kvq.append_] key and value must have as many tokens, got ", key.x.size(2),
                    " and ", value.x.size(2));
  const auto writes = check_writes("append_", {key, value}, position, ring);
  TORCH_CHECK_VALUE(key.x.size(0) == value.x.size(0),
                    "[kvq.append_] key and value must have the same batch, got ", key.x.size(0),
                    " and ", value.x.size(0));
  const Write &k = writes[0], &v = writes[1];
  if (k.dtype == v.dtype) {
    runtime::dispatch(append_launch(k, v, position, ring));
  } else {
    runtime::dispatch({write_launch(k, position, ring), write_launch(v, position, ring)});
  }
}

SideArguments as_key(Packed packed, const at::Tensor& x, std::string_view format,
                     int64_t group_size, const OptionalTensor& signs, const OptionalTensor& mean,
                     std::string_view encoder) {
  return {"k_", kKeyNames, "key", std::move(packed), x, format, group_size, signs, mean, encoder};
}

SideArguments as_value(Packed packed, const at::Tensor& x, std::string_view format,
                       int64_t group_size, const OptionalTensor& signs, const OptionalTensor& mean,
                       std::string_view encoder) {
  return {"v_",  kValueNames, "value", std::move(packed), x, format, group_size,
          signs, mean,        encoder};
}

void append(const at::Tensor& k_codes, const at::Tensor& k_scales, const at::Tensor& k_biases,
            const at::Tensor& v_codes, const at::Tensor& v_scales, const at::Tensor& v_biases,
            const at::Tensor& k, const at::Tensor& v, const at::Tensor& position,
            c10::string_view k_format, int64_t k_group_size, c10::string_view v_format,
            int64_t v_group_size, const OptionalTensor& k_signs, const OptionalTensor& v_signs,
            const OptionalTensor& k_mean, const OptionalTensor& v_mean, c10::string_view k_encoder,
            c10::string_view v_encoder, bool ring) {
  check_input("append_", "key", k, kDevice);
  check_positions("append_", "position", position, k.size(0), kDevice);
  write_both(
      as_key({k_codes, k_scales, k_biases}, k, k_format, k_group_size, k_signs, k_mean, k_encoder),
      as_value({v_codes, v_scales, v_biases}, v, v_format, v_group_size, v_signs, v_mean,
               v_encoder),
      {position}, ring);
}

void append_at(const at::Tensor& k_codes, const at::Tensor& k_scales, const at::Tensor& k_biases,
               const at::Tensor& v_codes, const at::Tensor& v_scales, const at::Tensor& v_biases,
               const at::Tensor& k, const at::Tensor& v, int64_t position,
               c10::string_view k_format, int64_t k_group_size, c10::string_view v_format,
               int64_t v_group_size, const OptionalTensor& k_signs, const OptionalTensor& v_signs,
               const OptionalTensor& k_mean, const OptionalTensor& v_mean,
               c10::string_view k_encoder, c10::string_view v_encoder, bool ring) {
  check_input("append_", "key", k, kDevice);
  write_both(
      as_key({k_codes, k_scales, k_biases}, k, k_format, k_group_size, k_signs, k_mean, k_encoder),
      as_value({v_codes, v_scales, v_biases}, v, v_format, v_group_size, v_signs, v_mean,
               v_encoder),
      {at::Tensor(), position}, ring);
}

TORCH_LIBRARY_IMPL(kvq, MPS, m) {
  m.impl("append_", TORCH_FN(append));
  m.impl("append_.int", TORCH_FN(append_at));
}

}  // namespace
}  // namespace kvq::mps
