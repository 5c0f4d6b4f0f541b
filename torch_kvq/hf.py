"""Hugging Face transformers: a quantised KV cache for any decoder-only model.

Two lines::

    import torch_kvq.hf
    torch_kvq.hf.use(model, "int8", "int4-rot")   # model.generate() now quantises its cache

or, with the cache in your hands::

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvq")
    cache = torch_kvq.hf.KVQCache(model.config, "int8", "int4-rot")
    model.generate(**inputs, past_key_values=cache)

Importing this module registers the attention and mask functions ``"kvq"``. A layer's ``update``
returns a pair of :class:`KVQHandle`; the attention function reads the packed cache through them.
Models whose code computes on the returned keys and values (multi-head latent attention) and
encoder-decoder models are refused.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from torch_kvq import ops, serialization
from torch_kvq.cache import QuantizedKVCache
from torch_kvq.formats import GROUP_SIZES, KVFormat
from torch_kvq.ops import Format, Packed
from torch_kvq.storage import KVView

NAME = "kvq"
#: Good answers at 6.5 bits; models with a large key bias break with 4-bit keys.
DEFAULT_K_FORMAT = "int8"
DEFAULT_V_FORMAT = "int4-rot"
_QUANTIZED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


class _Refused(TypeError, AttributeError):
    """Also an AttributeError: torch.compile asks objects for attributes that they lack."""


class KVQHandle:
    """Stands for a layer's keys or values between the cache and the attention function.

    Not a tensor: code that computes on it, instead of passing it to attention, gets a TypeError.
    """

    __slots__ = ("cache", "side", "view")

    def __init__(self, cache: QuantizedKVCache, view: KVView, side: str) -> None:
        self.cache, self.view, self.side = cache, view, side

    @property
    def shape(self) -> torch.Size:
        packed = self.view.keys if self.side == "k" else self.view.values
        size = self.cache.head_dim if self.side == "k" else self.cache.value_dim
        return torch.Size((*packed.codes.shape[:3], size))

    @property
    def dtype(self) -> torch.dtype:
        return self.cache.dtype

    @property
    def device(self) -> torch.device:
        return self.cache.device

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise _Refused(
            "[kvq.hf] the keys and values of a KVQCache are packed and only its own attention "
            'reads them: load the model with attn_implementation="kvq", or call '
            'model.set_attn_implementation("kvq")'
        )

    __getitem__ = __getattr__ = __add__ = __mul__ = __matmul__ = _refuse

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return cls._refuse(cls)  # type: ignore[arg-type]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | KVQHandle,
    value: torch.Tensor | KVQHandle,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered as ``"kvq"``: packed caches, and plain tensors too."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("[kvq.hf] attention with a position_bias is not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A mask that arrives already holds causality and the window (and may lift them).
    causal = causal and attention_mask is None
    options: dict[str, Any] = {
        "mask": attention_mask,
        "sinks": s_aux,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "causal": causal,
        "window": 0,
    }
    if isinstance(key, KVQHandle):
        options["window"] = key.cache.window if causal else 0
        out = key.cache.attend(query, key.view, **options)
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2).contiguous(), None
    assert isinstance(value, torch.Tensor)
    if causal and attention_mask is None and sliding_window:
        options["window"] = sliding_window
    if softcap or s_aux is not None:
        empty = key.new_empty(*key.shape[:3], 0)
        dense = (Packed(key, empty, empty), Packed(value, empty, empty))
        out, _ = ops.attention(query, *dense, key.shape[2], "none", "none", **options)
        return out.transpose(1, 2).contiguous(), None
    if causal and attention_mask is None:
        attention_mask = _dense_causal_mask(query, key, options["window"])
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def _dense_causal_mask(query: torch.Tensor, key: torch.Tensor, window: int) -> torch.Tensor | None:
    """For sdpa, whose own is_causal is upper left and knows no window; None where that is right."""
    queries, length = query.shape[2], key.shape[2]
    if not (window and window < length) and queries in (1, length):
        return None
    position = torch.arange(length, device=query.device)
    distance = position[length - queries :, None] - position
    mask = distance >= 0
    if window:
        mask = mask & (distance < window)
    return mask[None, None]


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function registered as ``"kvq"``.

    None wherever the kernel applies causality and the window itself; a bool mask for padding,
    chunked attention and custom patterns.
    """
    if allow_is_causal_skip and _nothing_padded(attention_mask, q_length):
        if local_size is None or _is_sliding(mask_function, local_size):
            return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,  # type: ignore[arg-type]
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def _nothing_padded(attention_mask: torch.Tensor | None, q_length: int) -> bool:
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling():
        return False
    # Reading a device tensor waits for the device: worth it for a prefill, not for every step.
    if attention_mask.device.type != "cpu" and q_length == 1:
        return False
    return bool(attention_mask.all())


def _is_sliding(pattern: Callable, size: int) -> bool:
    """A sliding window of this size, not a chunked pattern: ask for its two edges."""
    query = 4 * size  # the first position of a chunk
    inside = pattern(0, 0, torch.tensor(query), torch.tensor(query - size + 1))
    outside = pattern(0, 0, torch.tensor(query), torch.tensor(query - size))
    return bool(inside) and not bool(outside)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_function)


class KVQLayer(CacheLayerMixin):
    """One layer of a :class:`KVQCache`; its storage is made at the first update."""

    is_croppable = True

    def __init__(
        self,
        k_format: Format,
        v_format: Format,
        *,
        sliding_window: int | None = None,
        max_cache_len: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.k_format, self.v_format, self.options = k_format, v_format, options
        self.window = sliding_window or 0
        self.is_sliding = self.window > 0
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.cache: QuantizedKVCache | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, heads, _, head_dim = key_states.shape
        value_dim = value_states.shape[-1]
        self.cache = QuantizedKVCache(
            self.batch_size,
            heads,
            head_dim,
            value_dim=value_dim,
            k_format=fit_group(self.k_format, head_dim),
            v_format=fit_group(self.v_format, value_dim),
            capacity=self.max_cache_len,
            window=self.window,
            dtype=self.dtype,
            device=self.device,
            **self.options,
        )
        if self.is_compileable and not torch.compiler.is_compiling():
            for buffer in self.cache.buffers():
                torch._dynamo.mark_static_address(buffer)
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KVQHandle, KVQHandle]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.cache is not None
        view = self.cache.append(key_states, value_states)
        return KVQHandle(self.cache, view, "k"), KVQHandle(self.cache, view, "v")

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        if self.cache is None:
            return 0
        # A tensor for a static cache, as transformers' own: no sync, no recompilation.
        return self.cache.lengths.max() if self.cache.static else self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.max_cache_len is not None and not (self.cache and self.cache.ring):
            return self.max_cache_len, 0
        length = self.cache.length if self.cache is not None else 0
        if not self.is_sliding:
            return length + query_length, 0
        kept = min(length, self.window - 1)
        return kept + query_length, length - kept

    def get_max_length(self) -> int:
        if self.is_sliding:
            return self.window
        return -1 if self.max_cache_len is None else self.max_cache_len

    def activate_past_recording(self) -> None:
        """Rollback needs nothing more: the ring keeps rollback_tokens beyond its window."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"[kvq.crop] expected a negative number of tokens to remove, got {tokens_to_remove}"
            )
        if self.cache is not None:
            self.cache.crop(-tokens_to_remove)

    def reset(self) -> None:
        if self.cache is None:
            return
        if self.is_compileable:
            self.cache.reset()
        else:
            self.cache, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.cache.repeat_interleave(repeats)
            self.batch_size = self.cache.batch_size

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.cache is not None:
            self.cache.select(indices)
            self.batch_size = self.cache.batch_size

    def offload(self) -> None:
        if self.cache is not None:
            self.cache.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.cache is not None and self.cache.device != self.device:
            self.cache.to(self.device, non_blocking=True)


class KVQCache(Cache):
    """A transformers Cache whose attention layers hold a :class:`QuantizedKVCache` each.

    Use it with ``attn_implementation="kvq"``. Sliding layers of the config get a ring.

    Args:
        config: the model's config.
        k_format, v_format: :class:`~torch_kvq.KVFormat` or names; V takes K's unless given. A name
            without a group takes the largest of 64, 32 and 128 that divides the head size.
        max_cache_len: static capacity in tokens, for torch.compile; the cache grows without it.
        skip_layers: layers kept in the model's dtype, negative numbers counting from the end.
        layer_formats: {layer: (k_format, v_format)}, overriding the defaults.
        options: passed to every :class:`QuantizedKVCache`: sink_tokens, recent_tokens,
            rollback_tokens, scale_dtype, ...

    Raises:
        ValueError: encoder-decoder models and multi-head latent attention.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        k_format: Format | None = None,
        v_format: Format | None = None,
        *,
        max_cache_len: int | None = None,
        skip_layers: Sequence[int] = (),
        layer_formats: Mapping[int, tuple[Format, Format]] | None = None,
        **options: Any,
    ) -> None:
        if k_format is None:
            k_format, v_format = DEFAULT_K_FORMAT, v_format or DEFAULT_V_FORMAT
        v_format = k_format if v_format is None else v_format
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("[kvq.hf] encoder-decoder models are not supported")
        config = config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise ValueError(
                f"[kvq.hf] {config.model_type} uses multi-head latent attention, whose cache holds "
                "compressed states instead of keys and values: not supported"
            )
        types, arguments = get_layer_types_and_kwargs(config)
        skipped = {layer % len(types) for layer in skip_layers}
        others = DYNAMIC_LAYER_TYPE_MAPPING if max_cache_len is None else STATIC_LAYER_TYPE_MAPPING
        static: dict[str, Any] = {}
        if max_cache_len is not None:
            static["max_cache_len"] = max_cache_len
        layers: list[Any] = []
        for index, (kind, extra) in enumerate(zip(types, arguments, strict=True)):
            if kind not in _QUANTIZED_LAYER_TYPES:
                layers.append(others[kind](**static, **extra))
                continue
            formats = (layer_formats or {}).get(index, (k_format, v_format))
            if index in skipped:
                formats = ("none", "none")
            arguments_here = {**options, **extra, **static}
            if extra.get("sliding_window"):
                arguments_here.pop("sink_tokens", None)  # they leave the window anyway
            layers.append(KVQLayer(formats[0], formats[1], **arguments_here))
        super().__init__(layers=layers)
        self.config = config

    def save(self, path: str | os.PathLike) -> None:
        """Write every layer's tokens to one safetensors file, atomically; see
        :mod:`torch_kvq.serialization` for what it holds."""
        serialization.save_model_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: PreTrainedConfig,
        *,
        device: torch.device | str | None = None,
    ) -> KVQCache:
        """The cache that :meth:`save` wrote, for a model of the same config.

        Args:
            config: the model's config.
            device: where to put it; where it was, if this machine has that, else the CPU.

        Raises:
            ValueError: the file is damaged, truncated, or of another model's config.
        """
        return serialization.load_model_cache(cls, path, config, device)

    @property
    def nbytes(self) -> int:
        """Bytes that the quantised layers have allocated."""
        return sum(layer.cache.nbytes for layer in self.quantized_layers if layer.cache is not None)

    @property
    def quantized_layers(self) -> list[KVQLayer]:
        return [layer for layer in self.layers if isinstance(layer, KVQLayer)]


def fit_group(spec: Format, head_dim: int) -> KVFormat:
    """Parse a format; a name that leaves the group open takes one that divides head_dim."""
    fmt = KVFormat.parse(spec)
    if isinstance(spec, KVFormat) or not fmt.layout.groups or "-g" in spec:
        return fmt
    for group in sorted(GROUP_SIZES, key=lambda size: abs(size - fmt.group_size)):
        if head_dim % group == 0:
            return KVFormat(fmt.name, group, fmt.rotate)
    return fmt


def use(
    model: Any, k_format: Format | None = None, v_format: Format | None = None, **options: Any
) -> Any:
    """Make ``model.generate()`` use a new :class:`KVQCache` unless it is given a cache.

    Args:
        model: a transformers model; its attention implementation becomes ``"kvq"``.
        k_format, v_format, options: as for :class:`KVQCache`.

    Returns:
        model.
    """
    KVQCache(model.config, k_format, v_format, **options)  # refuses now what it would refuse later
    model.set_attn_implementation(NAME)
    generate = type(model).generate

    @functools.wraps(generate)
    def with_cache(*args: Any, **kwargs: Any) -> Any:
        # Some checkpoints ship use_cache=False, under which generate() would feed a cache the
        # whole sequence at every step.
        if kwargs.setdefault("use_cache", True) and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = KVQCache(model.config, k_format, v_format, **options)
        return generate(model, *args, **kwargs)

    model.generate = with_cache
    return model
