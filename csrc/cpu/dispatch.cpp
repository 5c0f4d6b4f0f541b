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
#ifdef KVQ_HAVE_AVX512_BF16
namespace avx512_bf16 {
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
#if defined(__x86_64__)
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") &&
                                     __builtin_cpu_supports("fma") &&
                                     __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#ifdef KVQ_HAVE_AVX2
  consider(avx2::table, avx2);
#endif
#ifdef KVQ_HAVE_AVX512
  consider(avx512::table, avx512);
#endif
#ifdef KVQ_HAVE_AVX512_BF16
  consider(avx512_bf16::table, avx512 && __builtin_cpu_supports("avx512bf16") &&
                                   __builtin_cpu_supports("avx512vbmi") &&
                                   __builtin_cpu_supports("avx512vbmi2"));
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
