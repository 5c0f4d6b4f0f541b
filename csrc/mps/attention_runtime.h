// Pipelines of the template libraries, and launches of pipelines already at hand. What
// runtime.h does for embedded libraries, for those made on demand.
#pragma once

#include "attention_library.h"
#include "runtime.h"

namespace kvq::mps {

/// A launch of 1-dimensional threadgroups whose pipeline is known.
struct AttentionLaunch {
  std::string kernel;  ///< for messages
  const runtime::Pipeline* pipeline;
  std::vector<runtime::Buffer> buffers;  ///< an undefined or empty tensor binds the first buffer
  runtime::Params params;                ///< bound after the buffers
  runtime::Size threadgroups;
  int64_t threads;  ///< per threadgroup
};

/// The kernel's pipeline: compiled on first use from its library's source and the one line that
/// instantiates it, and kept for the life of the process.
const runtime::Pipeline& attention_pipeline(const AttentionKernel& kernel);

/// Encodes the launches, in order, in one encoder; each sees what the previous ones wrote.
void dispatch(const std::vector<AttentionLaunch>& launches);

}  // namespace kvq::mps
