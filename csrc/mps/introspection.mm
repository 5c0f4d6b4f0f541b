// torch.ops.kvq_metal: what the embedded Metal libraries hold, what the host expects of them, and
// the tuning table.
#include <torch/library.h>

#include "names.h"
#include "runtime.h"
#include "tuning.h"

namespace kvq::mps {
namespace {

std::vector<std::string> expected_kernels() {
  std::vector<std::string> names;
  for (const KernelName& name : codec_kernels()) {
    names.push_back(name.library + "." + name.kernel);
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
  m.def("device_name() -> str", runtime::device_name);
  // The text that csrc/mps/tuning.h describes.
  m.def("tuning() -> str", [] { return format_tuning(tuning()); });
  m.def("set_tuning(str table) -> ()", [](const std::string& table) { set_tuning(table); });
  m.def("tuning_file() -> str", tuning_file);
}

}  // namespace
}  // namespace kvq::mps
