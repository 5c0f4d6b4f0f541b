// kv_cache_update_ on MPS: a dense slot write, which is quantising to format none.
#include <torch/library.h>

#include "write.h"

namespace kvq::mps {
namespace {

void update(const at::Tensor& cache, const at::Tensor& src, const Position& position) {
  const char* op = "kv_cache_update_";
  check_input(op, "cache", cache, kDevice);
  TORCH_CHECK_VALUE(
      src.size(0) == cache.size(0) && src.size(1) == cache.size(1) && src.size(3) == cache.size(3),
      "[kvq.kv_cache_update_] src must be [", cache.size(0), ", ", cache.size(1), ", L, ",
      cache.size(3), "] to match the cache, got ", src.sizes());
  check_capacity(op, position.known(), src.size(2), cache.size(2), /*ring=*/false);
  check_no_overlap(op, {{"cache", cache}}, {{"src", src}});
  Side side{Format::parse(op, "none", 0)};
  side.head_dim = cache.size(3);
  if (src.numel() == 0) return;
  const Write write = make_write(op, {cache}, src, std::move(side));
  runtime::dispatch(write_launch(write, position, /*ring=*/false));
}

void kv_cache_update(const at::Tensor& cache, const at::Tensor& src, const at::Tensor& position) {
  check_input("kv_cache_update_", "src", src, kDevice);
  check_positions("kv_cache_update_", "position", position, src.size(0), kDevice);
  update(cache, src, {position});
}

void kv_cache_update_at(const at::Tensor& cache, const at::Tensor& src, int64_t position) {
  check_input("kv_cache_update_", "src", src, kDevice);
  update(cache, src, {at::Tensor(), position});
}

TORCH_LIBRARY_IMPL(kvq, MPS, m) {
  m.impl("kv_cache_update_", TORCH_FN(kv_cache_update));
  m.impl("kv_cache_update_.int", TORCH_FN(kv_cache_update_at));
}

}  // namespace
}  // namespace kvq::mps
