#include "attention_check.h"

#include <cmath>

namespace kvq {
namespace {

constexpr const char* kOp = "attention";

void check_packed_pair(const AttentionCall& call, c10::Device device) {
  const at::Tensor &q = call.query, &k = call.k.codes, &v = call.v.codes;
  check_input(kOp, "query", q, device);
  check_packed(kOp, "k_", call.k, call.k_format);
  check_packed(kOp, "v_", call.v, call.v_format);
  for (const Packed* packed : {&call.k, &call.v}) {
    TORCH_CHECK_VALUE(packed->codes.device() == q.device(), "[kvq.attention] ",
                      packed == &call.k ? "k_codes" : "v_codes", " must be on ", q.device(),
                      ", got ", packed->codes.device());
  }
  TORCH_CHECK_VALUE(k.sizes().slice(0, 3) == v.sizes().slice(0, 3),
                    "[kvq.attention] k_codes and v_codes must agree in batch, heads and capacity, "
                    "got ",
                    k.sizes(), " and ", v.sizes());
  TORCH_CHECK_VALUE(q.size(0) == k.size(0), "[kvq.attention] query has batch ", q.size(0),
                    ", k_codes ", k.size(0));
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "[kvq.attention] query heads must be a multiple of the cache's ", k.size(1),
                    ", got ", q.size(1));
  const int64_t head_dim = call.k_format.head_dim(k.size(3));
  TORCH_CHECK_VALUE(q.size(3) == head_dim, "[kvq.attention] query must have head_dim ", head_dim,
                    " as k_codes have, got ", q.size(3));
}

void check_scalars(const AttentionCall& call) {
  TORCH_CHECK_VALUE(call.window >= 0,
                    "[kvq.attention] window must be positive, or 0 for none, got ", call.window);
  TORCH_CHECK_VALUE(call.softcap >= 0 && std::isfinite(call.softcap),
                    "[kvq.attention] softcap must be positive, or 0 for none, got ", call.softcap);
  TORCH_CHECK_VALUE(!call.scale || std::isfinite(*call.scale),
                    "[kvq.attention] scale must be finite, got ", call.scale.value_or(0));
}

void check_mask_and_sinks(const AttentionCall& call) {
  const at::Tensor& q = call.query;
  if (call.sinks) {
    float_dtype(kOp, "sinks", call.sinks->scalar_type());
    TORCH_CHECK_VALUE(call.sinks->dim() == 1 && call.sinks->size(0) == q.size(1),
                      "[kvq.attention] sinks must be [", q.size(1), "], got ", call.sinks->sizes());
    TORCH_CHECK_VALUE(call.sinks->device() == q.device(), "[kvq.attention] sinks must be on ",
                      q.device(), ", got ", call.sinks->device());
  }
  if (!call.mask) return;
  const at::Tensor& mask = *call.mask;
  if (mask.scalar_type() != at::kBool) float_dtype(kOp, "mask (or bool)", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.device() == q.device(), "[kvq.attention] mask must be on ", q.device(),
                    ", got ", mask.device());
  bool fits = mask.dim() >= 1 && mask.dim() <= 4;
  for (int64_t i = 2; fits && i <= mask.dim(); ++i) {
    fits = mask.size(-i) == 1 || mask.size(-i) == q.size(3 - (i - 1));
  }
  TORCH_CHECK_VALUE(fits, "[kvq.attention] mask must broadcast to [", q.size(0), ", ", q.size(1),
                    ", ", q.size(2), ", columns], got ", mask.sizes());
}

}  // namespace

AttentionSides check_attention(const AttentionCall& call, c10::Device device) {
  check_packed_pair(call, device);
  check_scalars(call);
  check_mask_and_sinks(call);
  AttentionSides sides{{call.k_format}, {call.v_format}};
  sides.k.head_dim = call.query.size(3);
  sides.v.head_dim = call.v_format.head_dim(call.v.codes.size(3));
  const int64_t groups = call.k.codes.size(1), batch = call.query.size(0);
  check_rotation_and_mean(kOp, "k_", sides.k, groups, call.k_signs, call.k_mean, device);
  check_rotation_and_mean(kOp, "v_", sides.v, groups, call.v_signs, call.v_mean, device);
  if (call.start) check_positions(kOp, "kv_start", *call.start, batch, device);
  if (call.end) check_positions(kOp, "kv_end", *call.end, batch, device);
  return sides;
}

}  // namespace kvq
