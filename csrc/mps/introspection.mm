// torch.ops.kvq_metal: what the embedded Metal libraries hold, and what the host expects of them.
#include <torch/library.h>

#include "names.h"
#include "runtime.h"

namespace kvq::mps {
namespace {

std::vector<std::string> expected_kernels() {
  std::vector<std::string> names;
  for (const KernelName& name : codec_kernels()) {
    names.push_back(std::string(name.library) + "." + name.kernel);
  }
  return names;
}

TORCH_LIBRARY(kvq_metal, m) {
  m.def("libraries() -> str[]", runtime::library_names);
  // Compiles the library.
  m.def("kernels(str library) -> str[]",
        [](const std::string& library) { return runtime::kernel_names(library); });
  // As "library.kernel"; attention instantiates its kernels on demand and has none here.
  m.def("expected_kernels() -> str[]", expected_kernels);
}

}  // namespace
}  // namespace kvq::mps
