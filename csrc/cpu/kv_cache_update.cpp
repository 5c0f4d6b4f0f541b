// kv_cache_update_ on the CPU: a dense slot write.
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "rows.h"

namespace kvq::cpu {
namespace {

void update(const at::Tensor& cache, const at::Tensor& src, at::IntArrayRef positions) {
  const char* op = "kv_cache_update_";
  check_input(op, "cache", cache, at::kCPU);
  TORCH_CHECK_VALUE(
      src.size(0) == cache.size(0) && src.size(1) == cache.size(1) && src.size(3) == cache.size(3),
      "[kvq.kv_cache_update_] src must be [", cache.size(0), ", ", cache.size(1), ", L, ",
      cache.size(3), "] to match the cache, got ", src.sizes());
  check_capacity(op, positions, src.size(2), cache.size(2), /*ring=*/false);
  check_no_overlap(op, {{"cache", cache}}, {{"src", src}});
  const at::NoGradGuard no_grad;  // a cache is a buffer, not a part of the graph
  for (int64_t b = 0; b < cache.size(0); ++b) {
    cache.select(0, b).narrow(1, positions[b], src.size(2)).copy_(src.select(0, b));
  }
}

void kv_cache_update(const at::Tensor& cache, const at::Tensor& src, const at::Tensor& position) {
  check_input("kv_cache_update_", "src", src, at::kCPU);
  check_positions("kv_cache_update_", "position", position, src.size(0), at::kCPU);
  update(cache, src, position_values(position, src.size(0)));
}

void kv_cache_update_at(const at::Tensor& cache, const at::Tensor& src, int64_t position) {
  check_input("kv_cache_update_", "src", src, at::kCPU);
  update(cache, src, std::vector<int64_t>(src.size(0), position));
}

TORCH_LIBRARY_IMPL(kvq, CPU, m) {
  m.impl("kv_cache_update_", TORCH_FN(kv_cache_update));
  m.impl("kv_cache_update_.int", TORCH_FN(kv_cache_update_at));
}

}  // namespace
}  // namespace kvq::cpu
