"""A linear layer whose weights stay in GGUF blocks, 4.5 bits each: it never makes a dense copy."""

from __future__ import annotations

import math
import warnings
from os import PathLike

import torch
from torch import nn
from torch.nn import functional as F

from torch_kvq import ops
from torch_kvq.formats import GGUF_BLOCK_BYTES, KVFormat

#: Elements and bytes of a block.
_BLOCKS = {"q4_k": (256, 144), **{name: (32, size) for name, size in GGUF_BLOCK_BYTES.items()}}
#: Weights of a tile that is dequantised at a time (q4_0 and q8_0).
_TILE = 1 << 22


class Q4KLinear(nn.Module):
    """y = x @ w.T + bias for weights in GGUF blocks.

    Q4_K weights are multiplied in their blocks (:func:`torch_kvq.ops.q4_k_matmul`); q4_0 and q8_0
    ones are dequantised in tiles of a few MiB. Made by :meth:`from_linear` and :meth:`from_gguf`.
    No gradient flows to x.

    Args:
        blocks: uint8 [N, row], the rows of a GGUF tensor; not copied.
        bias: [N] or None.
        format: ``"q4_k"``, ``"q4_0"`` or ``"q8_0"``.
        exact: as of :func:`torch_kvq.ops.q4_k_gemv`.
    """

    blocks: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        blocks: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        format: str = "q4_k",
        exact: bool = False,
    ) -> None:
        super().__init__()
        if format not in _BLOCKS:
            raise ValueError(
                f"[kvq.Q4KLinear] format must be one of {', '.join(_BLOCKS)}, got {format!r}"
            )
        elements, size = _BLOCKS[format]
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % size:
            raise ValueError(
                f"[kvq.Q4KLinear] blocks of {format} must be uint8 [N, a multiple of {size}], got "
                f"{blocks.dtype} {list(blocks.shape)}"
            )
        if bias is not None and bias.shape != blocks.shape[:1]:
            raise ValueError(
                f"[kvq.Q4KLinear] bias must be [{blocks.shape[0]}], got {list(bias.shape)}"
            )
        self.format, self.exact = format, exact
        self.out_features = blocks.shape[0]
        self.in_features = blocks.shape[1] // size * elements
        self.register_buffer("blocks", blocks)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, exact: bool = False) -> Q4KLinear:
        """Quantise the weights of a linear layer, whose in_features is a multiple of 256."""
        return cls(ops.q4_k_quantize(linear.weight.detach()), linear.bias, exact=exact)

    @classmethod
    def from_gguf(
        cls,
        path: str | PathLike[str],
        tensor_name: str,
        bias_name: str | None = None,
        *,
        exact: bool = False,
    ) -> Q4KLinear:
        """A tensor of a GGUF file, of type Q4_K, Q4_0 or Q8_0, memory-mapped: nothing is copied.

        The file must stay as it is while the layer lives; ``.to(device)`` and ``copy.deepcopy``
        make copies of their own. Needs the ``gguf`` package.

        Args:
            tensor_name: of the weights, ``"blk.0.attn_output.weight"``.
            bias_name: of a tensor of type F32 or F16 to add.
        """
        from gguf import GGUFReader

        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        for name in (tensor_name, bias_name):
            if name is not None and name not in tensors:
                raise KeyError(f"[kvq.Q4KLinear] {path} has no tensor {name!r}")
        weight = tensors[tensor_name]
        kind = weight.tensor_type.name.lower()
        if kind not in _BLOCKS or len(weight.shape) != 2:
            raise ValueError(
                f"[kvq.Q4KLinear] tensor {tensor_name!r} must have 2 dimensions and type Q4_K, "
                f"Q4_0 or Q8_0, got {kind.upper()} {weight.shape.tolist()}"
            )
        with warnings.catch_warnings():
            # The mapping is read-only, and nothing writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            blocks = torch.from_numpy(weight.data)
        bias = None
        if bias_name is not None:
            given = tensors[bias_name]
            if given.tensor_type.name not in ("F32", "F16"):
                raise ValueError(
                    f"[kvq.Q4KLinear] bias {bias_name!r} must have type F32 or F16, got "
                    f"{given.tensor_type.name}"
                )
            bias = torch.tensor(given.data)
        return cls(blocks, bias, format=kind, exact=exact)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in x's dtype."""
        if self.format == "q4_k":
            out = ops.q4_k_matmul(x, self.blocks, exact=self.exact)
            return out if self.bias is None else out + self.bias.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = max(1, _TILE // self.in_features)
        parts = [
            F.linear(x, self._dequantized(first, min(rows, self.out_features - first), x.dtype))
            for first in range(0, self.out_features, rows)
        ]
        out = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return out if bias is None else out + bias

    def _dequantized(self, first: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a q4_0 or q8_0 weight, as the vectors of a cache: [1, 1, tokens, D]."""
        elements, size = _BLOCKS[self.format]
        head_dim = math.gcd(self.in_features, 1024)
        codes = self.blocks[first : first + rows].reshape(1, 1, -1, head_dim // elements * size)
        empty = codes.new_empty(*codes.shape[:3], 0, dtype=torch.float16)
        packed = ops.Packed(codes, empty, empty)
        return ops.dequantize(packed, KVFormat(self.format), dtype=dtype).view(rows, -1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
            + (", exact=True" if self.exact else "")
        )
