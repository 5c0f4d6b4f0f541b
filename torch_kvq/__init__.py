"""Quantised KV cache for PyTorch: attention on packed keys and values."""

import torch as _torch  # noqa: F401  (its libraries must be loaded before ours)

import torch_kvq._C  # noqa: F401  (registers torch.ops.kvq)
from torch_kvq import fake as _fake  # noqa: F401
from torch_kvq import ops
from torch_kvq.cache import QuantizedKVCache
from torch_kvq.formats import FORMATS, KVFormat
from torch_kvq.linear import Q4KLinear
from torch_kvq.ops import Packed

__version__ = "0.1.0"
__all__ = ["FORMATS", "KVFormat", "Packed", "Q4KLinear", "QuantizedKVCache", "ops"]
