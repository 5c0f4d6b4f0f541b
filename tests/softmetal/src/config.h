// Settings that install() hands over before anything else happens.
#pragma once

#include <cstdint>
#include <string>

namespace softmetal {

struct Config {
  std::string python;           ///< interpreter that runs the tool chain
  std::string toolchain;        ///< tests/metal/toolchain.py
  std::string toolchain_key;    ///< hash of the tool chain's own files
  std::string cache;            ///< folder of compiled kernel libraries
  std::string mode = "fast";    ///< fast, race, asan or fastmath
  bool lazy = false;            ///< run command buffers only when somebody waits
  uint32_t max_threads = 1024;  ///< most threads that any pipeline admits
  uint32_t seed = 0;            ///< order in which the emulator runs a threadgroup's threads
};

Config& config();

}  // namespace softmetal
