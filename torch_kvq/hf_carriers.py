"""What a :class:`~torch_kvq.hf.KVQLayer` hands to the model's attention in place of K and V.

All stand for the keys or the values that one ``update`` made visible, logically [B, G, T, D] of the
T positions that the layer's ``get_mask_sizes`` announced, and none holds them: they name the packed
cache. :class:`KVQHandle` is no tensor, and only the ``"kvq"`` attention reads it;
:class:`KVQTensor` is one, and ``scaled_dot_product_attention`` on it reads the packed cache; under
torch.compile a :class:`KVQProxy` takes its place.
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

    __slots__ = ("cache", "mask_sizes", "side", "view")

    def __init__(
        self, cache: QuantizedKVCache, view: KVView, side: str, mask_sizes: tuple[int, Any]
    ) -> None:
        self.cache, self.view, self.side, self.mask_sizes = cache, view, side, mask_sizes

    @property
    def shape(self) -> torch.Size:
        return self._shape(self.cache.kv_heads)

    def _shape(self, *heads: int) -> torch.Size:
        size = self.cache.head_dim if self.side == "k" else self.cache.value_dim
        return torch.Size((self.cache.batch_size, *heads, self.mask_sizes[0], size))

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


class KVQProxy(KVQHandle):
    """A handle that also stands what transformers does on its way to the sdpa attention.

    That is ``repeat_kv``, and the cut to the tokens of a prefill. On a proxy itself
    ``scaled_dot_product_attention`` works too; torch.compile traces it, where it would not trace
    the making of a :class:`KVQTensor`.

    Args:
        repeats: query heads per KV head.
        five_dims: they are (still) a dimension of their own, [B, G, repeats, T, D].
    """

    __slots__ = ("five_dims", "repeats")

    def __init__(
        self,
        cache: QuantizedKVCache,
        view: KVView,
        side: str,
        mask_sizes: tuple[int, Any],
        repeats: int = 1,
        five_dims: bool = False,
    ) -> None:
        super().__init__(cache, view, side, mask_sizes)
        self.repeats, self.five_dims = repeats, five_dims

    @property
    def shape(self) -> torch.Size:
        if self.five_dims:
            return self._shape(self.cache.kv_heads, self.repeats)
        return self._shape(self.cache.kv_heads * self.repeats)

    def _like(self, rows: int, repeats: int, five_dims: bool) -> KVQProxy:
        sizes = rows, self.mask_sizes[1]
        return KVQProxy(self.cache, self.view, self.side, sizes, repeats, five_dims)

    def indexed(self, index: Any) -> KVQProxy | None:
        """self[index], where that stays packed."""
        if self.five_dims or not isinstance(index, tuple):
            return None
        others = index[:2] + index[3:]
        if not all(
            isinstance(part, slice) and part.start is part.stop is part.step is None
            for part in others
        ):
            return None
        if len(index) == 5 and index[2] is None and self.repeats == 1:
            return self._like(self.mask_sizes[0], 1, True)
        if len(index) == 4 and isinstance(index[2], slice) and self.view.fresh:
            part = index[2]
            whole = self.view.tokens == self.view.keys.codes.shape[2]
            if whole and part.start is part.step is None and part.stop == self.view.tokens:
                return self._like(self.view.tokens, self.repeats, False)
        return None

    def expanded(self, *size: Any) -> KVQProxy | None:
        """self.expand(*size), where that stays packed."""
        wanted, shape = _flat(size), self.shape
        if not self.five_dims or self.repeats > 1 or len(wanted) != 5:
            return None
        if any(wanted[i] not in (-1, shape[i]) for i in (0, 1, 3, 4)):
            return None
        return self._like(self.mask_sizes[0], 1 if wanted[2] == -1 else wanted[2], True)

    def reshaped(self, *size: Any) -> KVQProxy | None:
        """self.reshape(*size), where that stays packed."""
        if not self.five_dims:
            return None
        batch, groups, repeats, rows, dim = self.shape
        if tuple(_flat(size)) != (batch, groups * repeats, rows, dim):
            return None
        return self._like(self.mask_sizes[0], repeats, False)

    def __getitem__(self, index: Any) -> KVQProxy:  # type: ignore[override]
        return self.indexed(index) or self._refuse()

    def expand(self, *size: Any) -> KVQProxy:
        return self.expanded(*size) or self._refuse()

    def reshape(self, *size: Any) -> KVQProxy:
        return self.reshaped(*size) or self._refuse()

    def dequantize(self) -> torch.Tensor:
        """The dense values, in the cache's dtype."""
        rows, first = self.mask_sizes
        dense = self.cache.dense(self.side, first, rows, self.view)
        if self.five_dims:
            return dense[:, :, None].expand(-1, -1, self.repeats, -1, -1)
        return dense if self.repeats == 1 else dense.repeat_interleave(self.repeats, 1)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return cls._refuse(cls)  # type: ignore[arg-type]


class KVQTensor(torch.Tensor):
    """A layer's keys or values as a tensor without storage, for code that knows nothing of it.

    ``scaled_dot_product_attention`` reads the packed cache, also after transformers' ``repeat_kv``,
    with ``enable_gqa`` and with the query heads packed as rows. Causality is lower right: the last
    query is the newest token's. Any other function gets the dequantised values, which is right,
    but costs the memory and the time of a dense cache.
    """

    proxy: KVQProxy

    @staticmethod
    def __new__(cls: type[KVQTensor], proxy: KVQProxy) -> KVQTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, proxy.shape, dtype=proxy.dtype, device=proxy.device
        )
        made.proxy = proxy
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"KVQTensor({list(self.shape)}, {self.proxy.side}, {self.proxy.cache})"

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """The dense values, in the cache's dtype."""
        return self.proxy.dequantize()

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
        if func in _PACKED and isinstance(args[0], KVQTensor) and not kwargs:
            proxy = _PACKED[func](args[0].proxy, *args[1:])
            if proxy is not None:
                return KVQTensor(proxy)
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))


def _flat(size: tuple) -> Sequence[int]:
    return size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size


#: What leaves a KVQTensor packed, if the proxy's method says so.
_PACKED: dict[Callable, Callable[..., KVQProxy | None]] = {
    torch.Tensor.__getitem__: KVQProxy.indexed,
    torch.Tensor.expand: KVQProxy.expanded,
    torch.Tensor.reshape: KVQProxy.reshaped,
    torch.Tensor.contiguous: lambda proxy, *args: proxy if not args else None,
}
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
    if not isinstance(x, (KVQTensor, KVQProxy)):
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
    key: torch.Tensor | KVQProxy,
    value: torch.Tensor | KVQProxy,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention whose keys and values may be packed."""
    handle = key.proxy if isinstance(key, KVQTensor) else key
    # transformers' pack_gqa hands a decode step's heads over as rows [B, G, H / G, D].
    heads_as_rows = isinstance(handle, KVQProxy) and handle.view.tokens == 1 and query.shape[2] > 1
    if (
        not isinstance(handle, KVQProxy)
        or handle.five_dims
        or not isinstance(value, (KVQTensor, KVQProxy))
        or dropout_p
        or query.shape[0] != handle.cache.batch_size
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
