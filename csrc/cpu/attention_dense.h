// Attention of many query rows: torch's own attention over unpacked tiles of tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/attention.h"

namespace kvq::cpu {

/// Whether torch's matrix products in this dtype outrun the packed kernels on this processor once
/// there are this many query rows per KV head. Does not depend on the number of threads.
bool dense_is_faster(const AttentionArgs& args);

/// Fills args.out and args.lse. query and mask are the op's own; softcap must be 0.
void run_dense(const AttentionArgs& args, const at::Tensor& query,
               const std::optional<at::Tensor>& mask);

}  // namespace kvq::cpu
