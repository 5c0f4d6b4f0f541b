"""Caches of other programs: MLX's affine triples, mlx-lm's prompt caches, GGUF's blocks.

Their bytes are taken as they are, in both directions; nothing is quantised again unless asked for.
Letters as in :mod:`torch_kvq.ops`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torch_kvq import ops, tensor_file
from torch_kvq.cache import QuantizedKVCache
from torch_kvq.formats import GGUF_BLOCK_BYTES, GROUP_SIZES, SCALE_DTYPES, KVFormat
from torch_kvq.ops import Format, Packed
from torch_kvq.tensor_file import FileError

if TYPE_CHECKING:
    from torch_kvq.hf import KVQCache

Array = torch.Tensor | np.ndarray
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_AFFINE = {2: "int2", 4: "int4", 8: "int8"}


# -- tensors --------------------------------------------------------------------------------


def from_mlx(
    words: Array, scales: Array, biases: Array, *, bits: int, group_size: int
) -> tuple[Packed, KVFormat]:
    """What ``mlx.core.quantize`` returned, as a packed tensor and its format.

    MLX puts zero exactly on the grid and may store negative scales; its triples decode by this
    package's rule, code * scale + bias.

    Args:
        words: uint32 [B, G, T, D * bits / 32], torch or numpy (``numpy.array(x)`` of an MLX array).
        scales, biases: float [B, G, T, D / group_size].
        bits: 2, 4 or 8.
        group_size: 32, 64 or 128.

    Raises:
        ValueError, TypeError: other bits, groups, shapes or dtypes.
    """
    if bits not in _AFFINE:
        raise ValueError(f"[kvq.from_mlx] bits must be 2, 4 or 8, got {bits}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"[kvq.from_mlx] group_size must be 32, 64 or 128, got {group_size}")
    fmt = KVFormat(_AFFINE[bits], group_size)
    codes, *rest = _tensor(words), _tensor(scales), _tensor(biases)
    if codes.dtype != torch.uint32:
        raise TypeError(f"[kvq.from_mlx] words must be uint32, got {codes.dtype}")
    if codes.dim() != 4:
        raise ValueError(f"[kvq.from_mlx] words must be [B, G, T, row], got {list(codes.shape)}")
    head_dim = codes.shape[-1] * 32 // bits
    fmt.check_head_dim(head_dim, "from_mlx")
    expected = (*codes.shape[:3], head_dim // group_size)
    for name, x in zip(("scales", "biases"), rest, strict=True):
        if tuple(x.shape) != expected:
            raise ValueError(f"[kvq.from_mlx] {name} must be {list(expected)}, got {list(x.shape)}")
        if x.dtype not in SCALE_DTYPES or x.dtype != rest[0].dtype:
            raise TypeError(f"[kvq.from_mlx] {name} must have one float dtype, got {x.dtype}")
    return Packed(codes.contiguous().view(torch.uint8), *rest), fmt


def to_mlx(packed: Packed, format: Format) -> Triple:
    """MLX's (words uint32, scales, biases) of a packed tensor of int8, int4 or int2.

    Raises:
        ValueError: a rotated or other format, which MLX cannot decode.
    """
    fmt = KVFormat.parse(format)
    if fmt.family != "affine" or fmt.rotate:
        raise ValueError(f"[kvq.to_mlx] MLX decodes int8, int4 and int2 without -rot, not {fmt}")
    # On the CPU: MPS has no uint32.
    codes, scales, biases = (t.cpu().contiguous() for t in packed)
    return codes.view(torch.uint32), scales, biases


def from_gguf(
    blocks: Array, format: Format, *, kv_heads: int | None = None
) -> tuple[Packed, KVFormat]:
    """GGUF's q8_0 or q4_0 blocks, as a packed tensor and its format.

    Args:
        blocks: uint8 [B, G, T, row] as ``gguf.quants.quantize`` lays rows out: D / 32 blocks of 34
            or 18 bytes; or, with ``kv_heads`` G, llama.cpp's [T, G * row], which becomes B = 1.
        format: ``"q8_0"`` or ``"q4_0"``; ``-rot`` where the values were rotated before.
    """
    fmt = KVFormat.parse(format)
    if fmt.family != "gguf":
        raise ValueError(f"[kvq.from_gguf] format must be q8_0 or q4_0, got {fmt}")
    rows = _tensor(blocks)
    if rows.dtype != torch.uint8:
        raise TypeError(f"[kvq.from_gguf] blocks must be uint8, got {rows.dtype}")
    if kv_heads is not None:
        if rows.dim() != 2 or kv_heads < 1 or rows.shape[1] % kv_heads:
            raise ValueError(
                f"[kvq.from_gguf] blocks must be [T, {kv_heads} * row], got {list(rows.shape)}"
            )
        rows = rows.unflatten(1, (kv_heads, -1)).transpose(0, 1)[None]
    size = GGUF_BLOCK_BYTES[fmt.name]
    if rows.dim() != 4 or rows.shape[-1] % size:
        raise ValueError(
            f"[kvq.from_gguf] blocks must be [B, G, T, row] with rows of {size}-byte blocks, got "
            f"{list(rows.shape)}"
        )
    empty = torch.empty(*rows.shape[:3], 0, dtype=torch.float16, device=rows.device)
    return Packed(rows.contiguous(), empty, empty.clone()), fmt


def to_gguf(packed: Packed, format: Format) -> torch.Tensor:
    """The blocks, uint8 [B, G, T, row], of a packed tensor of q8_0 or q4_0."""
    fmt = KVFormat.parse(format)
    if fmt.family != "gguf":
        raise ValueError(f"[kvq.to_gguf] format must be q8_0 or q4_0, got {fmt}")
    return packed.codes


def cache_from(
    keys: Packed,
    values: Packed,
    k_format: Format,
    v_format: Format,
    *,
    length: int | None = None,
    **options: Any,
) -> QuantizedKVCache:
    """A :class:`QuantizedKVCache` that holds packed tokens; their bytes are copied.

    Args:
        keys, values: packed K [B, G, T, row(D)] and V [B, G, T, row(Dv)], as :func:`from_mlx` and
            :func:`from_gguf` give them.
        k_format, v_format: their formats.
        length: tokens that are valid, T unless given.
        options: further arguments of QuantizedKVCache: dtype, capacity, window, device, ...;
            scale_dtype is that of the scales.
    """
    k, v = KVFormat.parse(k_format), KVFormat.parse(v_format)
    batch, heads, tokens = keys.codes.shape[:3]
    if values.codes.shape[:3] != keys.codes.shape[:3]:
        raise ValueError(
            f"[kvq.cache_from] values must be [{batch}, {heads}, {tokens}, row], got "
            f"{list(values.codes.shape)}"
        )
    if options.get("sink_tokens") or options.get("recent_tokens"):
        raise ValueError("[kvq.cache_from] packed tokens have no full precision for the windows")
    if k.family != "gguf" or v.family != "gguf":
        options.setdefault("scale_dtype", (values if k.family == "gguf" else keys).scales.dtype)
    options.setdefault("device", keys.codes.device)
    cache = QuantizedKVCache(
        batch,
        heads,
        k.head_dim(keys.codes.shape[-1]),
        value_dim=v.head_dim(values.codes.shape[-1]),
        k_format=k,
        v_format=v,
        **options,
    )
    _fill(cache, keys, values, tokens if length is None else length, "cache_from")
    return cache


def _fill(cache: QuantizedKVCache, keys: Packed, values: Packed, length: int, op: str) -> None:
    """Put the first ``length`` packed tokens into an empty cache; a ring keeps the last ones."""
    for side, given, own in (("K", keys, cache.keys), ("V", values, cache.values)):
        for name, x, buffer in zip(Packed._fields, given, own, strict=True):
            fits = x.shape[:2] + x.shape[3:] == buffer.shape[:2] + buffer.shape[3:]
            if not fits or (x.dtype != buffer.dtype and x.shape[3]):
                raise ValueError(
                    f"[kvq.{op}] {name} of {side} must be {buffer.dtype} "
                    f"[{buffer.shape[0]}, {buffer.shape[1]}, T, {buffer.shape[3]}], got {x.dtype} "
                    f"{list(x.shape)}"
                )
    if not 0 <= length <= keys.codes.shape[2]:
        raise ValueError(
            f"[kvq.{op}] length must be 0 .. {keys.codes.shape[2]}, the tokens given, got {length}"
        )
    if cache.static and not cache.ring and length > cache.capacity:
        raise IndexError(f"[kvq.{op}] {length} tokens exceed the capacity {cache.capacity}")
    cache.reserve(length)
    first = max(0, length - cache.capacity)
    slots = torch.arange(first, length, device=cache.device) % max(cache.capacity, 1)
    for given, own in ((keys, cache.keys), (values, cache.values)):
        for x, buffer in zip(given, own, strict=True):
            if buffer.numel():
                buffer[:, :, slots] = x[:, :, first:length].to(cache.device)
    cache._advance(length, None)


def _tensor(x: Array) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    # A copy: arrays of other programs are often read-only.
    return torch.from_numpy(np.array(x))


# -- mlx-lm's prompt caches -----------------------------------------------------------------


def load_mlx_prompt_cache(
    path: str | os.PathLike,
    config: Any,
    *,
    k_format: Format = "none",
    v_format: Format | None = None,
    max_cache_len: int | None = None,
    device: torch.device | str = "cpu",
) -> KVQCache:
    """A file of ``mlx_lm.models.cache.save_prompt_cache`` as a cache for a transformers model.

    Keys are stored after their rotary embedding, the same in both: the model goes on with its own
    copy of the weights. Files of mlx-lm 0.26 to 0.32 are read. Layers that mlx-lm quantised keep
    their bytes; new tokens are quantised by this package's encoder into the same format.

    Args:
        config: the transformers model's config.
        k_format, v_format: of layers that the file holds unquantised.
        max_cache_len: static capacity; the cache grows without it.

    Raises:
        ValueError: another kind of file, a layer that is neither a QuantizedKVCache nor a KVCache
            of mlx-lm, or layers that do not fit the config.
    """
    from torch_kvq.hf import KVQCache, KVQLayer

    try:
        metadata, arrays = tensor_file.read(path)
        saved = _mlx_layers(metadata, arrays)
        cache = KVQCache(config, k_format, v_format, max_cache_len=max_cache_len)
        if len(saved) != len(cache.layers):
            raise FileError(f"holds {len(saved)} layers, the model has {len(cache.layers)}")
        for index, (layer, (kind, parts)) in enumerate(zip(cache.layers, saved, strict=True)):
            if not isinstance(layer, KVQLayer):
                raise FileError(f"holds a {kind} as layer {index}, the model a {type(layer)}")
            if parts is not None:
                cache.layers[index] = _fill_layer(layer, index, kind, parts, device)
    except FileError as error:
        raise ValueError(f"[kvq.load_mlx_prompt_cache] {Path(path).name} {error}") from error
    return cache


_Parts = dict[str, Any]


def _mlx_layers(
    metadata: Mapping[str, str], arrays: Mapping[str, torch.Tensor]
) -> list[tuple[str, _Parts | None]]:
    """(class, its arrays and numbers or None while it is empty) of every layer.

    mlx-lm flattens a tree: since 0.32 the states are [keys, values, offset, ...] and the metadata
    [the user's, classes, which states are numbers]; before, the states are [keys, values] and the
    metadata [numbers of each layer, the user's, classes].
    """
    new = metadata.get("2.0") == ""
    place = "1." if new else "2."
    classes: list[str] = []
    while (name := metadata.get(f"{place}{len(classes)}")) is not None:
        classes.append(name)
    if not classes:
        raise FileError("holds no prompt cache of mlx-lm")
    layers: list[tuple[str, _Parts | None]] = []
    for index, kind in enumerate(classes):
        if kind not in ("QuantizedKVCache", "KVCache"):
            raise FileError(
                f"holds a {kind} as layer {index}; only QuantizedKVCache and KVCache can be read"
            )
        quantized = kind == "QuantizedKVCache"
        parts: _Parts | None = {}
        try:
            if new:
                names = ("offset", "group_size", "bits")[: 3 if quantized else 1]
                numbers = [int(arrays[f"{index}.{2 + i}"]) for i in range(len(names))]
            elif quantized:
                # Before 0.31 the step came first.
                found = [key for key in metadata if key.startswith(f"0.{index}.")]
                numbers = [int(metadata[f"0.{index}.{i}"]) for i in range(len(found))][-3:]
                names = ("offset", "group_size", "bits")
            else:
                names, numbers = (), []
            parts = dict(zip(names, numbers, strict=True))
            if f"{index}.0.0" not in arrays and arrays.get(f"{index}.0", _NOTHING).numel() == 0:
                parts = None
            elif quantized:
                for number, side in enumerate("kv"):
                    parts[side] = tuple(arrays[f"{index}.{number}.{i}"] for i in range(3))
            else:
                parts |= {"k": arrays[f"{index}.0"], "v": arrays[f"{index}.1"]}
                parts.setdefault("offset", parts["k"].shape[2])
        except (KeyError, ValueError, IndexError) as error:
            raise FileError(f"lacks the state of its layer {index}, a {kind}") from error
        layers.append((kind, parts))
    return layers


_NOTHING = torch.empty(0)


def _fill_layer(
    layer: Any, index: int, kind: str, parts: _Parts, device: torch.device | str
) -> Any:
    """The layer that holds what mlx-lm's layer held."""
    offset = parts["offset"]
    common: dict[str, Any] = {
        "sliding_window": layer.window,
        "max_cache_len": layer.max_cache_len,
        "carrier": layer.carrier,
        "config": layer.config,
    }
    try:
        if kind == "KVCache":
            key, value = (parts[side][:, :, :offset].to(device) for side in "kv")
            if key.shape[2] != offset or value.shape[:3] != key.shape[:3]:
                raise ValueError(f"K is {list(key.shape)}, V {list(value.shape)}")
            made = type(layer)(layer.k_format, layer.v_format, **common)
            made.bound = layer.bound
            made.lazy_initialization(key, value)
            made.cache.append(key, value)
            return made
        sides, dtype = {}, parts["k"][1].dtype
        for side in "kv":
            numbers = {"bits": parts["bits"], "group_size": parts["group_size"]}
            sides[side], fmt = from_mlx(*parts[side], **numbers)
        made = type(layer)(fmt, fmt, **common, scale_dtype=dtype)
        made.bound = layer.bound
        lead = (*sides["k"].codes.shape[:2], 0)
        key, value = (
            torch.empty(*lead, fmt.head_dim(s.codes.shape[3]), dtype=dtype, device=device)
            for s in sides.values()
        )
        made.lazy_initialization(key, value)
        _fill(made.cache, sides["k"], sides["v"], offset, "load_mlx_prompt_cache")
        return made
    except (ValueError, TypeError, IndexError) as error:
        text = str(error).partition("] ")[2] or str(error)
        raise FileError(f"holds a layer {index} that cannot be read: {text}") from error


def save_mlx_prompt_cache(
    cache: KVQCache,
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
    *,
    requantize: Format | None = None,
) -> None:
    """Write a cache for ``mlx_lm.models.cache.load_prompt_cache`` of mlx-lm 0.32 or newer.

    Layers whose K and V are in one of int8, int4 and int2, without rotation or centring, become
    QuantizedKVCache with the same bytes; layers of ``none`` become KVCache.

    Args:
        metadata: strings that mlx-lm hands back with ``return_metadata=True``.
        requantize: a format that MLX has (``"int8"``), into which layers of all other formats are
            dequantised and quantised again, at a loss; without it they are refused.

    Raises:
        ValueError: a layer that mlx-lm cannot hold: a sliding window that has moved, rows of
            different lengths, another format; nothing is written.
    """
    from torch_kvq.hf import KVQLayer

    op = "save_mlx_prompt_cache"
    arrays: dict[str, torch.Tensor] = {}
    entries = {f"0.{key}": str(value) for key, value in (metadata or {}).items()} | {"2.0": ""}
    scalars = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, KVQLayer) or layer.cache is None:
            what = "is empty" if isinstance(layer, KVQLayer) else f"is a {type(layer).__name__}"
            raise ValueError(f"[kvq.{op}] layer {index} {what}, which mlx-lm's files cannot hold")
        c, at = layer.cache, f"{index}."
        length = c.length
        if c.window and length >= c.window:
            raise ValueError(
                f"[kvq.{op}] layer {index} has a sliding window of {c.window} tokens that has "
                "moved; mlx-lm's quantised caches have none"
            )
        if c.static and bool((c.lengths != length).any()):
            raise ValueError(f"[kvq.{op}] rows of layer {index} differ in length")
        sides = _mlx_sides(c, length, requantize, op)
        numbers = {2: length}
        if isinstance(sides[0], torch.Tensor):
            kind = "KVCache"
            arrays |= {f"{at}{i}": side for i, side in enumerate(sides)}
        else:
            kind = "QuantizedKVCache"
            fmt = sides[2]
            arrays |= {f"{at}{i}.{j}": sides[i][j] for i in range(2) for j in range(3)}
            numbers |= {3: fmt.group_size, 4: fmt.bits}
        entries[f"1.{index}"] = kind
        for place, number in numbers.items():
            scalars.append(f"{at}{place}")
            arrays[scalars[-1]] = torch.tensor(number, dtype=torch.int32)
    for i, name in enumerate(scalars, 1):
        entries |= {f"2.{i}.0": name, f"2.{i}.1": "scalar"}
    tensor_file.write(path, arrays, entries)


def _mlx_sides(c: QuantizedKVCache, length: int, requantize: Format | None, op: str) -> Any:
    """(K, V) dense, or (K's triple, V's triple, their format)."""
    if c.k_format.family == c.v_format.family == "none" and c.k_mean is None and c.v_mean is None:
        return c.k_codes[:, :, :length], c.v_codes[:, :, :length]
    fmt, packed = c.k_format, [c.keys, c.values]
    centred = c.k_mean is not None or c.v_mean is not None
    if c.k_format != c.v_format or fmt.family != "affine" or fmt.rotate or centred:
        if requantize is None:
            about = f"K {c.k_format}, V {c.v_format}" + (", centred" if centred else "")
            raise ValueError(
                f"[kvq.{op}] MLX holds K and V in one of int8, int4 and int2, not {about}; give "
                'requantize="int8" to convert, at a loss'
            )
        fmt = KVFormat.parse(requantize)
        packed = [ops.quantize(x[:, :, :length], fmt, scale_dtype=c.dtype) for x in c.dequantized()]
    return (*(to_mlx(Packed(*(t[:, :, :length] for t in p)), fmt) for p in packed), fmt)
