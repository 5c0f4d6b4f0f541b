#include "config.h"

namespace softmetal {

Config& config() {
  static auto* config = new Config;
  return *config;
}

}  // namespace softmetal

/// Called through ctypes by __init__.py. Returns 0 for a name it does not know.
extern "C" __attribute__((visibility("default"))) int softmetal_configure(const char* name,
                                                                          const char* value) {
  softmetal::Config& config = softmetal::config();
  const std::string key = name;
  if (key == "python") {
    config.python = value;
  } else if (key == "toolchain") {
    config.toolchain = value;
  } else if (key == "toolchain_key") {
    config.toolchain_key = value;
  } else if (key == "cache") {
    config.cache = value;
  } else if (key == "mode") {
    config.mode = value;
  } else if (key == "lazy") {
    config.lazy = std::string(value) == "1";
  } else if (key == "max_threads") {
    config.max_threads = std::stoul(value);
  } else if (key == "seed") {
    config.seed = std::stoul(value);
  } else {
    return 0;
  }
  return 1;
}
