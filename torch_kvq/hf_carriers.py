"""What a :class:`~torch_kvq.hf.KVQLayer` hands to the model's attention in place of K and V.

Both stand for the keys or the values that one ``update`` made visible, logically [B, G, T, D] with
the T that the layer's ``get_mask_sizes`` announced, and neither holds them: they name the packed
cache. :class:`KVQHandle` is no tensor, and only the ``"kvq"`` attention reads it;
:class:`KVQTensor` is one, and ``scaled_dot_product_attention`` on it reads the packed cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map

from torch_kvq.cache import QuantizedKVCache
from torch_kvq.storage import KVView


class _Refused(TypeError, AttributeError):
    """Also an AttributeError: torch.compile asks objects for attributes that they lack."""


class KVQHandle:
    """A layer's keys or values, between the cache and the ``"kvq"`` attention.

    Code that computes on it, instead of passing it to attention, gets a TypeError.
    """

    __slots__ = ("cache", "rows", "side", "view")

    def __init__(self, cache: QuantizedKVCache, view: KVView, side: str, rows: int) -> None:
        self.cache, self.view, self.side, self.rows = cache, view, side, rows

    @property
    def shape(self) -> torch.Size:
        size = self.cache.head_dim if self.side == "k" else self.cache.value_dim
        return torch.Size((self.cache.batch_size, self.cache.kv_heads, self.rows, size))

    @property
    def dtype(self) -> torch.dtype:
        return self.cache.dtype

    @property
    def device(self) -> torch.device:
        return self.cache.device

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise _Refused(
            "[kvq.hf] the keys and values of a KVQCache are packed and only its own attention "
            'reads them: load the model with attn_implementation="kvq", call '
            'model.set_attn_implementation("kvq"), or make the cache with carrier="tensor"'
        )

    __getitem__ = __getattr__ = __add__ = __mul__ = __matmul__ = _refuse

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return cls._refuse(cls)  # type: ignore[arg-type]


class KVQTensor(torch.Tensor):
    """A layer's keys or values as a tensor without storage, for code that knows nothing of it.

    ``scaled_dot_product_attention`` reads the packed cache, also after transformers' ``repeat_kv``,
    with ``enable_gqa`` and with the query heads packed as rows. Causality is lower right: the last
    query is the newest token's. Any other function gets the dequantised values, which is right,
    but costs the memory and the time of a dense cache.
    """

    handle: KVQHandle
    #: query heads per KV head, and whether they are (still) a dimension of their own
    repeats: int
    five_dims: bool

    @staticmethod
    def __new__(
        cls: type[KVQTensor], handle: KVQHandle, repeats: int = 1, five_dims: bool = False
    ) -> KVQTensor:
        batch, groups, rows, size = handle.shape
        heads = (groups, repeats) if five_dims else (groups * repeats,)
        made = torch.Tensor._make_wrapper_subclass(
            cls, (batch, *heads, rows, size), dtype=handle.dtype, device=handle.device
        )
        made.handle, made.repeats, made.five_dims = handle, repeats, five_dims
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"KVQTensor({list(self.shape)}, {self.handle.side}, {self.handle.cache})"

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """The dense values, in the cache's dtype."""
        handle = self.handle
        dense = handle.cache.dense(handle.side, handle.view)
        missing = handle.rows - dense.shape[2]
        if missing > 0:  # the unused slots of a static cache, which a mask hides
            dense = torch.nn.functional.pad(dense, (0, 0, 0, missing))
        dense = dense[:, :, -handle.rows :]
        if self.five_dims:
            return dense[:, :, None].expand(-1, -1, self.repeats, -1, -1)
        return dense if self.repeats == 1 else dense.repeat_interleave(self.repeats, 1)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _METADATA:
            # Not super(): that wraps what it returns in this class.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(args[0], KVQTensor):
            rewritten = args[0]._rewrite(func, args[1:])
            if rewritten is not None:
                return rewritten
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))

    def _rewrite(self, func: Callable, args: tuple) -> KVQTensor | None:
        """The steps of repeat_kv and the cut to a prefill's tokens; None for anything else."""
        if func is torch.Tensor.contiguous and not args:
            return self
        if func is torch.Tensor.__getitem__ and not self.five_dims:
            whole, handle = slice(None), self.handle
            index = args[0]
            if self.repeats == 1 and index == (whole, whole, None, whole, whole):
                return KVQTensor(handle, five_dims=True)
            first = (whole, whole, slice(None, handle.view.tokens), whole)
            if handle.view.fresh and index == first:
                shorter = KVQHandle(handle.cache, handle.view, handle.side, handle.view.tokens)
                return KVQTensor(shorter, self.repeats)
        if func is torch.Tensor.expand and self.five_dims and self.repeats == 1:
            size = _sizes(args)
            shape = list(self.shape)
            if len(size) == 5 and all(
                given in (-1, own)
                for i, (given, own) in enumerate(zip(size, shape, strict=True))
                if i != 2
            ):
                repeats = shape[2] if size[2] == -1 else size[2]
                return KVQTensor(self.handle, repeats, five_dims=True)
        if func is torch.Tensor.reshape and self.five_dims:
            batch, groups, repeats, rows, dim = self.shape
            if tuple(_sizes(args)) == (batch, groups * repeats, rows, dim):
                return KVQTensor(self.handle, repeats)
        return None


def _sizes(args: tuple) -> Sequence[int]:
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


_METADATA = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in (
            "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn",
            "is_cuda", "is_mps", "is_meta", "is_quantized", "is_sparse", "is_nested",
        )
    ),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point,
    torch.Tensor.is_complex, torch.Tensor.__len__, torch.Tensor.element_size,
    torch.is_floating_point, torch.numel,
}  # fmt: skip


def _dense(x: Any) -> Any:
    if not isinstance(x, KVQTensor):
        return x
    if not torch.compiler.is_compiling():
        warnings.warn(
            "[kvq.hf] the model computes on the keys and values of a KVQCache, which dequantises "
            'the whole cache at every step: use attn_implementation="kvq" or "sdpa"',
            stacklevel=4,
        )
    return x.dequantize()


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention whose keys and values may be packed."""
    handle = key.handle if isinstance(key, KVQTensor) and not key.five_dims else None
    # transformers' pack_gqa hands a decode step's heads over as rows [B, G, H / G, D].
    heads_as_rows = handle is not None and handle.view.tokens == 1 and query.shape[2] > 1
    if (
        handle is None
        or not isinstance(value, KVQTensor)
        or dropout_p
        or query.shape[0] != key.shape[0]
        or (query.shape[2] != handle.view.tokens and not heads_as_rows)
    ):
        return scaled_dot_product_attention(
            _dense(query),
            _dense(key),
            _dense(value),
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    shape = query.shape
    if heads_as_rows:
        query = query.reshape(shape[0], shape[1] * shape[2], 1, shape[3])
        if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[2] > 1:
            attn_mask = attn_mask.reshape(attn_mask.shape[0], -1, 1, attn_mask.shape[3])
    cache, view = handle.cache, handle.view
    causal = attn_mask is None and (is_causal or view.tokens == 1)
    out = cache.attend(
        query,
        view,
        mask=attn_mask,
        scale=scale,
        causal=causal,
        window=cache.window if causal else 0,
    )
    assert isinstance(out, torch.Tensor)
    return out.reshape(*shape[:3], out.shape[3])
