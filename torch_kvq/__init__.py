"""Quantised KV cache for PyTorch: attention on packed keys and values."""

import torch  # noqa: F401  (its libraries must be loaded before ours)

from torch_kvq import _C as _C  # registers torch.ops.kvq
