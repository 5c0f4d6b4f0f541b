"""Hugging Face transformers: a quantised KV cache for any decoder-only model.

Two lines::

    import torch_kvq.hf
    torch_kvq.hf.use(model, "int8", "int4-rot")   # model.generate() now quantises its cache

or, with the cache in your hands::

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvq")
    cache = torch_kvq.hf.KVQCache(model.config, "int8", "int4-rot")
    model.generate(**inputs, past_key_values=cache)

Importing this module registers the attention and mask functions ``"kvq"``, which read the packed
cache; with ``"sdpa"`` the same cache works too, through a tensor subclass (see
:mod:`torch_kvq.hf_carriers`). Models whose code computes on the returned keys and values
(multi-head latent attention) and encoder-decoder models are refused.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from torch_kvq import serialization
from torch_kvq.cache import QuantizedKVCache, makes_ring
from torch_kvq.formats import GROUP_SIZES, KVFormat
from torch_kvq.hf_attention import NAME
from torch_kvq.hf_carriers import KVQHandle, KVQProxy, KVQTensor
from torch_kvq.ops import Format
from torch_kvq.storage import KVView, nbytes

#: Good answers at 6.5 bits; models with a large key bias break with 4-bit keys.
DEFAULT_K_FORMAT = "int8"
DEFAULT_V_FORMAT = "int4-rot"
#: What generate() and forward() call the cache: transformers 5.24 renamed it.
CACHE_ARGUMENT = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)
CARRIERS = ("auto", "handle", "tensor")
_QUANTIZED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


class Sizes(NamedTuple):
    """What a layer learns from its first keys and values."""

    batch_size: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor) -> Sizes:
        batch_size, kv_heads, _, head_dim = key.shape
        return cls(batch_size, kv_heads, head_dim, value.shape[3], key.dtype, key.device)

    @classmethod
    def expected(cls, config: PreTrainedConfig) -> Sizes | None:
        """Of one sequence on the CPU, if the config tells."""
        heads = getattr(config, "num_attention_heads", None)
        hidden = getattr(config, "hidden_size", None)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None)
        if not head_dim and isinstance(heads, int) and isinstance(hidden, int):
            head_dim = hidden // heads
        if not (isinstance(kv_heads, int) and isinstance(head_dim, int)):
            return None
        dtype = config.dtype
        if not isinstance(dtype, torch.dtype):
            dtype = torch.get_default_dtype()
        return cls(1, kv_heads, head_dim, head_dim, dtype, torch.device("cpu"))


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
        carrier: str = "handle",
        config: PreTrainedConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.k_format, self.v_format, self.options = k_format, v_format, options
        self.carrier, self.config = carrier, config
        self.window = sliding_window or 0
        self.is_sliding = self.window > 0
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.cache: QuantizedKVCache | None = None
        #: known before there is a cache: the first mask is asked for then
        self.is_ring = makes_ring(self.window, max_cache_len)
        #: tokens that every layer of the cache takes: no ring may run ahead of a full layer
        self.bound: int | None = None
        self.record_past = False
        #: tokens since the last crop
        self._recorded = 0
        self._varying: tuple[Any, dict[str, torch.Tensor | None]] | None = None
        #: the layers of the same model cache
        self.siblings: Sequence[KVQLayer] = ()
        self._prepared: QuantizedKVCache | None = None
        self._sizes: Sizes | None = None
        # What lazy_initialization sets: an attribute more would move __dict__ in a prefill's heap.
        self.batch_size = self.rollback_tokens = 0
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        sizes = Sizes.of(key_states, value_states)
        self.cache = self._take_prepared(sizes) or self._make_cache(sizes)
        self._prepared, self._sizes = None, sizes
        if self.bound is not None:
            self.cache.max_length = self.bound
        if self.is_compileable and not torch.compiler.is_compiling():
            for buffer in self.cache.buffers():
                torch._dynamo.mark_static_address(buffer)
        if not self.is_compileable:
            self._varying = self.cache._host, self.cache._buffers
        self.rollback_tokens = self.cache.rollback_tokens
        self.is_initialized = True

    def _make_cache(self, sizes: Sizes) -> QuantizedKVCache:
        return QuantizedKVCache(
            sizes.batch_size,
            sizes.kv_heads,
            sizes.head_dim,
            value_dim=sizes.value_dim,
            k_format=fit_group(self.k_format, sizes.head_dim),
            v_format=fit_group(self.v_format, sizes.value_dim),
            capacity=self.max_cache_len,
            window=self.window,
            dtype=sizes.dtype,
            device=sizes.device,
            **self.options,
        )

    # What is made between the layers of a prefill stays between its intermediates on malloc's
    # heap, however small, and keeps their holes from being used again: the peak of resident memory
    # was up to twice as high. So a model's layers are made together with the cache, and get their
    # room together when the first of them does.

    def prepare(self, sizes: Sizes) -> None:
        """Make the storage before the first update, for sizes that are likely."""
        with suppress(ValueError, RuntimeError):  # what fits the layer may not fit these sizes
            self._prepared, self._sizes = self._make_cache(sizes), sizes

    def _take_prepared(self, sizes: Sizes) -> QuantizedKVCache | None:
        """The prepared storage, made anew where only rows, dtype or device are others."""
        if self._prepared is None or self._sizes is None or self._sizes[1:4] != sizes[1:4]:
            return None
        if self._sizes != sizes:
            scale_dtype = self.options.get("scale_dtype")
            self._prepared.remake(sizes.batch_size, sizes.dtype, scale_dtype, sizes.device)
            self._sizes = sizes
        return self._prepared

    def _is_full(self, tokens: int) -> bool:
        """Whether a growing cache in the CPU's memory has no room for ``tokens`` more."""
        cache = self.cache
        if self.is_compileable or cache is None or torch.compiler.is_compiling():
            return False
        return cache.device.type == "cpu" and cache.length + tokens > cache.capacity != cache.limit

    def _reserve(self, sizes: Sizes, tokens: int) -> None:
        """Room for ``tokens`` more of these sizes."""
        cache = self.cache or self._take_prepared(sizes)
        if cache is not None:
            cache.reserve(tokens)

    def _record(self, tokens: int) -> None:
        """Keep what these tokens would push out of a ring or a recent window."""
        assert self.cache is not None
        self._recorded += tokens
        if self._recorded > self.cache.rollback_tokens:
            self.cache.set_rollback(self._recorded)

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.cache is not None
        mask_sizes = self.get_mask_sizes(key_states.shape[2])
        if self.record_past and not self.cache.static:
            self._record(key_states.shape[2])
        tokens = key_states.shape[2]
        if self._is_full(tokens):
            for layer in self.siblings:
                layer._reserve(self._sizes, tokens)  # type: ignore[arg-type]
        view = self.cache.append(key_states, value_states)
        keys, values = (self._carry(view, side, mask_sizes) for side in "kv")
        return keys, values

    def _carry(self, view: KVView, side: str, mask_sizes: tuple[int, Any]) -> Any:
        assert self.cache is not None
        implementation = self.config._attn_implementation if self.config is not None else None
        if self.carrier == "handle" or (self.carrier == "auto" and implementation == NAME):
            return KVQHandle(self.cache, view, side, mask_sizes)
        proxy = KVQProxy(self.cache, view, side, mask_sizes)
        if not torch.compiler.is_compiling():
            return KVQTensor(proxy)
        return proxy if implementation in ("sdpa", NAME) else proxy.dequantize()

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        if self.cache is None:
            return 0
        # A tensor for a static cache, as transformers' own: no sync, no recompilation.
        return self.cache.lengths.max() if self.cache.static else self._length()

    def _length(self) -> int:
        if self.cache is None:
            return 0
        if torch.compiler.is_compiling() and self._varying is not None:
            # torch.compile takes ints and shapes that it finds in a module for constants, which
            # would be one graph for every length and capacity. It knows an object by where it found
            # it first, and these two ways do not lead through the module.
            length, buffers = self._varying
            length.value, length.oldest  # noqa: B018
            for name in buffers:
                buffers[name]
        return self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.max_cache_len is not None and not self.is_ring:
            return self.max_cache_len, 0
        if self.max_cache_len is not None and torch.compiler.is_compiling():
            return self._static_ring_mask_sizes(query_length)
        length = self._length()
        if not self.is_sliding:
            return length + query_length, 0
        kept = min(length, self.window - 1)
        return kept + query_length, length - kept

    def _static_ring_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Without the length on the host: always the whole window before the queries."""
        assert self.cache is not None
        offset = self.cache.lengths.max() - (self.window - 1)
        if query_length <= self.cache.ring_chunk:
            # The op counts a mask's columns from position 0 while there are more of them than
            # tokens; a chunk that overflows the ring has its own view, with room in front.
            offset = offset.clamp_min(0)
        return self.window - 1 + query_length, offset

    def get_max_length(self) -> int:
        if self.is_sliding:
            return self.window
        return -1 if self.max_cache_len is None else self.max_cache_len

    def activate_past_recording(self) -> None:
        """From now on :meth:`crop` goes back over every token since the last crop.

        A ring and a recent window keep rollback_tokens anyway, and now more where that is less;
        static ones cannot.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"[kvq.crop] expected a negative number of tokens to remove, got {tokens_to_remove}"
            )
        if self.cache is None:
            return
        self.cache.crop(-int(tokens_to_remove))  # transformers 5.14 passes a tensor
        self._recorded = 0
        if self.cache.rollback_tokens != self.rollback_tokens:
            self.cache.set_rollback(self.rollback_tokens)

    def reset(self) -> None:
        if self.cache is None:
            return
        if self.is_compileable:
            self.cache.reset()
        else:
            self.cache, self.is_initialized = None, False
            if self._sizes is not None:
                self.prepare(self._sizes)

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

    Works with ``attn_implementation="kvq"`` and ``"sdpa"``, which read the packed cache, and with
    ``"eager"``, for which it is dequantised at every step. Sliding layers of the config get a ring.

    Args:
        config: the model's config.
        k_format, v_format: :class:`~torch_kvq.KVFormat` or names; V takes K's unless given. A name
            without a group takes the largest of 64, 32 and 128 that divides the head size.
        max_cache_len: static capacity in tokens, for torch.compile; the cache grows without it.
        skip_layers: layers kept in the model's dtype, negative numbers counting from the end.
        layer_formats: {layer: (k_format, v_format)}, overriding the defaults; negative numbers
            count from the end.
        carrier: what ``update`` returns: a ``"handle"``, which only ``"kvq"`` attention takes and
            anything else refuses, or a ``"tensor"``, which any attention takes; ``"auto"`` follows
            the model's attention implementation.
        options: passed to every :class:`QuantizedKVCache`: sink_tokens, recent_tokens,
            rollback_tokens, scale_dtype, ...

    Raises:
        ValueError: encoder-decoder models and multi-head latent attention.
        IndexError: a layer that the model does not have.
        TypeError: config is no config.
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
        carrier: str = "auto",
        **options: Any,
    ) -> None:
        if carrier not in CARRIERS:
            raise ValueError(f"[kvq.hf] carrier must be one of {CARRIERS}, got {carrier!r}")
        if k_format is None:
            k_format, v_format = DEFAULT_K_FORMAT, v_format or DEFAULT_V_FORMAT
        v_format = k_format if v_format is None else v_format
        for spec in (
            k_format,
            v_format,
            *(f for pair in (layer_formats or {}).values() for f in pair),
        ):
            KVFormat.parse(spec)
        if max_cache_len is not None and (not isinstance(max_cache_len, int) or max_cache_len < 1):
            raise ValueError(
                f"[kvq.hf] max_cache_len must be a positive int or None, got {max_cache_len}"
            )
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                "[kvq.hf] config must be a model's config (model.config), got "
                f"{type(config).__name__}"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("[kvq.hf] encoder-decoder models are not supported")
        config = config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise ValueError(
                f"[kvq.hf] {config.model_type} uses multi-head latent attention, whose cache holds "
                "compressed states instead of keys and values: not supported"
            )
        types, arguments = _layer_types(config)
        for layer in (*skip_layers, *(layer_formats or {})):
            if not -len(types) <= layer < len(types):
                raise IndexError(
                    f"[kvq.hf] layer {layer} is not one of the model's {len(types)} layers"
                )
        skipped = {layer % len(types) for layer in skip_layers}
        chosen = {layer % len(types): pair for layer, pair in (layer_formats or {}).items()}
        others = DYNAMIC_LAYER_TYPE_MAPPING if max_cache_len is None else STATIC_LAYER_TYPE_MAPPING
        static: dict[str, Any] = {}
        if max_cache_len is not None:
            static["max_cache_len"] = max_cache_len
        layers: list[Any] = []
        for index, (kind, extra) in enumerate(zip(types, arguments, strict=True)):
            if kind not in _QUANTIZED_LAYER_TYPES:
                layers.append(others[kind](**static, **extra))
                continue
            formats = chosen.get(index, (k_format, v_format))
            if index in skipped:
                formats = ("none", "none")
            arguments_here = {**options, **extra, **static, "carrier": carrier, "config": config}
            if extra.get("sliding_window"):
                arguments_here.pop("sink_tokens", None)  # they leave the window anyway
            layers.append(KVQLayer(formats[0], formats[1], **arguments_here))
        super().__init__(layers=layers)
        self.config = config
        sizes = Sizes.expected(config)
        for quantized in self.quantized_layers:
            quantized.bound = self.max_cache_len
            if sizes is not None and not torch.accelerator.is_available():
                quantized.prepare(sizes)
        self.join_layers()

    def join_layers(self) -> None:
        """Let the first layer that needs more room make it in all of them."""
        for layer in self.quantized_layers:
            layer.siblings = self.quantized_layers

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Append a layer's tokens; what attention gets depends on the carrier."""
        if layer_idx >= len(self.layers):
            raise IndexError(
                f"[kvq.hf] layer {layer_idx} of a model whose cache was made for "
                f"{len(self.layers)} layers: make it from this model's config"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

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
        """Bytes that the layers have allocated, transformers' own included."""
        others = [vars(layer) for layer in self.layers if not isinstance(layer, KVQLayer)]
        caches = [layer.cache for layer in self.quantized_layers if layer.cache is not None]
        return sum(cache.nbytes for cache in caches) + nbytes(others)

    @property
    def max_cache_len(self) -> int | None:
        """Tokens that fit; None without a bound (growing layers, rings)."""
        bounds = [
            layer.max_cache_len
            for layer in self.quantized_layers
            if layer.max_cache_len is not None and not layer.is_ring
        ]
        return min(bounds, default=None)

    @property
    def quantized_layers(self) -> list[KVQLayer]:
        return [layer for layer in self.layers if isinstance(layer, KVQLayer)]


def _layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Kind of each layer, and the arguments that transformers makes its cache layer with."""
    types, arguments = get_layer_types_and_kwargs(config)
    if isinstance(arguments, dict):  # transformers 5.14: one for all, full layers included
        arguments = [{} if kind == "full_attention" else arguments for kind in types]
    return types, arguments


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
        given = kwargs.get(CACHE_ARGUMENT, kwargs.get("past_key_values"))
        if kwargs.setdefault("use_cache", True) and given is None:
            kwargs.pop("past_key_values", None)
            given = KVQCache(model.config, k_format, v_format, **options)
            kwargs[CACHE_ARGUMENT] = given
        if isinstance(given, KVQCache):
            _check_capacity(model, given, args, kwargs)
        return generate(model, *args, **kwargs)

    model.generate = with_cache
    return model


def _check_capacity(model: Any, cache: KVQCache, args: tuple, kwargs: dict) -> None:
    """Refuse a generation that the cache could not finish, before its first token."""
    inputs = next(
        (kwargs[name] for name in ("inputs_embeds", "input_ids", "inputs") if name in kwargs),
        args[0] if args else None,
    )
    if cache.max_cache_len is None or inputs is None:
        return
    length = inputs.shape[1]
    config = kwargs.get("generation_config") or model.generation_config
    new = kwargs.get("max_new_tokens", config.max_new_tokens)
    if new is None:
        total = kwargs.get("max_length", config.max_length)
        new = None if total is None else total - length
    if new is not None and length + new - 1 > cache.max_cache_len:  # the last token stays outside
        raise ValueError(
            f"[kvq.hf] {length} tokens + max_new_tokens {new} need a cache of {length + new - 1}, "
            f"max_cache_len is {cache.max_cache_len}"
        )
