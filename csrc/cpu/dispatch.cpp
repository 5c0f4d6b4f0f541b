// Chooses the instruction set once, at first use.
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "kernels/kernels.h"

namespace kvq::cpu {

namespace baseline {
extern const Kernels table;
}
#ifdef KVQ_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef KVQ_HAVE_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("KVQ_CPU_ISA");
  const std::string_view name = wanted ? wanted : "";
  const Kernels* best = &baseline::table;
  bool found = name.empty() || name == best->isa;
  [[maybe_unused]] const auto consider = [&](const Kernels& kernels, bool supported) {
    if (!supported || (found && !name.empty())) return;
    if (name.empty() || name == kernels.isa) {
      best = &kernels;
      found = true;
    }
  };
#ifdef KVQ_HAVE_AVX2
  consider(avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                            __builtin_cpu_supports("f16c"));
#endif
#ifdef KVQ_HAVE_AVX512
  consider(avx512::table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
                              __builtin_cpu_supports("f16c"));
#endif
  TORCH_CHECK(found, "[kvq.cpu] KVQ_CPU_ISA=", wanted ? wanted : "",
              " is not built in or not supported by this processor");
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace kvq::cpu
