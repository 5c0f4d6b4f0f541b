// Metal source turned into a library by the emulator's tool chain (tests/metal).
#pragma once

#include <memory>
#include <string>

#include "../../metal/emu/emu.h"

namespace softmetal {

struct CompileRequest {
  std::string source;
  bool fast_math = true;
  bool has_bfloat = true;  ///< language version 3.1 or later
};

/// A loaded library; never unloaded, since sanitizers and statics do not survive dlclose.
class KernelLibrary {
 public:
  /// Returns nullptr and sets `error` to the compiler's message where the source is refused.
  static std::shared_ptr<KernelLibrary> compile(const CompileRequest& request, std::string& error);

  const emu_api& api() const { return *api_; }
  const emu_kernel* find(const std::string& name) const;
  /// nullptr where the library declares no function constant of that name (or index).
  const emu_function_constant* find_constant(const std::string& name) const;
  const emu_function_constant* find_constant(uint32_t index) const;

 private:
  explicit KernelLibrary(const emu_api* api) : api_(api) {}

  const emu_api* api_;
};

}  // namespace softmetal
