// Dequantising slots: parameters and launch of dequantize and qdq.
#pragma once

#include "rows.h"

namespace kvq::mps {

/// Slots [start, start + out.size(2)) of packed rows into out, contiguous [B, G, tokens, D].
runtime::Launch read_launch(const Packed& packed, const Side& side, const at::Tensor& out,
                            int64_t start);

}  // namespace kvq::mps
