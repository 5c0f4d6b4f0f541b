// parallel_for over vectors: torch's own intra-op pool where this build has OpenMP, Grand Central
// Dispatch on macOS, whose torch wheels ship no OpenMP header.
#pragma once

#include <ATen/Parallel.h>

#if defined(__APPLE__) && !defined(_OPENMP)
#include <dispatch/dispatch.h>
#endif

namespace kvq::cpu {

/// Calls f(begin, end) on disjoint ranges that cover [0, count), each of at least grain items.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
#if defined(__APPLE__) && !defined(_OPENMP)
  const int64_t most = at::get_num_threads();
  const int64_t parts = std::min(most, (count + grain - 1) / grain);
  if (parts <= 1) return f(0, count);
  struct Context {
    const F& f;
    int64_t count, parts;
  } context{f, count, parts};
  dispatch_apply_f(parts, DISPATCH_APPLY_AUTO, &context, [](void* raw, size_t i) {
    const auto& c = *static_cast<Context*>(raw);
    const auto part = static_cast<int64_t>(i);
    c.f(c.count * part / c.parts, c.count * (part + 1) / c.parts);
  });
#else
  at::parallel_for(0, count, grain, f);
#endif
}

}  // namespace kvq::cpu
