"""Cache files: ``QuantizedKVCache.save`` and ``load``, and those of :class:`torch_kvq.hf.KVQCache`.

A file is a safetensors file with one tensor per buffer, ``k_codes`` [B, G, T, row] and so on (in a
model's file ``layers.3.k_codes``), cut to the T tokens that are held, and one metadata entry,
``torch_kvq``, a JSON object:

    layout       LAYOUT; another number is refused
    kind         "QuantizedKVCache" or "KVQCache"
    cache        what the cache was made with, its lengths, and a checksum of its signs; or
    layers       the same of every layer, and
    config       the fields of the model's config that keys and values depend on
    device       where it was
    checksum     CRC-32 of the tensors' bytes
    fingerprint  SHA-256 of all this and of the tensors' names, dtypes and shapes

A file whose fingerprint or checksum does not fit is damaged. Weights have no fingerprint: a cache
fits every model of its config.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_kvq import tensor_file
from torch_kvq.formats import KVFormat
from torch_kvq.ops import Packed
from torch_kvq.tensor_file import FileError

if TYPE_CHECKING:
    from torch_kvq.cache import QuantizedKVCache
    from torch_kvq.hf import KVQCache

#: Counts up when the meaning of a file's bytes changes.
LAYOUT = 1
_ENTRY = "torch_kvq"
_SIZES = ("batch_size", "kv_heads", "head_dim", "value_dim", "block_size", "window")
_WINDOWS = ("sink_tokens", "recent_tokens", "rollback_tokens")
_ENCODING = ("k_encoder", "v_encoder", "signs_seed")
#: Fields of a config that neither keys nor values depend on.
_UNRELATED = frozenset(
    """_attn_implementation _name_or_path architectures attn_implementation bos_token_id
    chunk_size_feed_forward dtype eos_token_id id2label label2id output_attentions
    output_hidden_states pad_token_id problem_type return_dict torch_dtype transformers_version
    use_cache""".split()
)

Tensors = dict[str, torch.Tensor]


# -- one cache ------------------------------------------------------------------------------


def describe(cache: QuantizedKVCache) -> dict[str, Any]:
    """What makes a cache and where it stands, as JSON: the arguments of its class and its state."""
    arguments = {name: getattr(cache, name) for name in (*_SIZES, *_WINDOWS, *_ENCODING)}
    arguments |= {"k_format": str(cache.k_format), "v_format": str(cache.v_format)}
    arguments |= {"dtype": _name(cache.dtype), "scale_dtype": _name(cache.scale_dtype)}
    # Of a ring, what it holds: a capacity of that makes the same ring.
    capacity = cache.limit if cache.static else None
    return {
        "arguments": {**arguments, "capacity": capacity},
        "means": [side for side in "kv" if getattr(cache, f"{side}_mean") is not None],
        "signs": {
            side: f"{zlib.crc32(signs.to(torch.int8).cpu().numpy()):08x}"
            for side in "kv"
            if (signs := getattr(cache, f"{side}_signs")) is not None
        },
        "lengths": cache.lengths.tolist() if cache.static else cache.length,
        "oldest": cache._host.oldest,
    }


def _held(cache: QuantizedKVCache, length: int) -> dict[str, int]:
    """How many slots of each of the cache's buffers ``length`` tokens have reached."""
    held = {f"{s}_{name}": cache.capacity for s in "kv" for name in Packed._fields}
    for window in ("sink", "recent"):
        held |= {f"{s}_{window}": getattr(cache, f"{s}_{window}").shape[2] for s in "kv"}
    return {name: min(length, slots) for name, slots in held.items()}


def tensors(cache: QuantizedKVCache) -> Tensors:
    """Views of what the cache holds: the slots of its tokens, and its means."""
    held = _held(cache, cache.length).items()
    found = {name: getattr(cache, name)[:, :, :count] for name, count in held}
    found |= {f"{s}_mean": getattr(cache, f"{s}_mean") for s in "kv"}
    return {name: t for name, t in found.items() if t is not None and t.numel()}


def arguments(description: Mapping[str, Any], found: Tensors) -> dict[str, Any]:
    """The arguments of QuantizedKVCache that make the described cache."""
    made = dict(description["arguments"])
    for name in ("dtype", "scale_dtype"):
        made[name] = _dtype(made[name])
    means = {f"{side}_mean": found[f"{side}_mean"] for side in description["means"]}
    return {**made, **means}


def restore(cache: QuantizedKVCache, description: Mapping[str, Any], found: Tensors) -> None:
    """Put the described tokens into an empty cache that was made with the same arguments."""
    made = describe(cache)
    for part in ("arguments", "signs"):
        for name in sorted(made[part].keys() | description[part].keys()):
            saved, own = description[part].get(name), made[part].get(name)
            if saved != own:
                what = name if part == "arguments" else f"{name}_signs"
                raise FileError(f"holds a cache with {what} {saved}, not {own}")
    lengths = description["lengths"]
    length = max(lengths, default=0) if cache.static else lengths
    if cache.static and len(lengths) != cache.batch_size:
        raise FileError(f"holds {len(lengths)} lengths for {cache.batch_size} rows")
    cache.reserve(length)
    held = _held(cache, length)
    parts = {name: getattr(cache, name)[:, :, :count] for name, count in held.items()}
    parts = {name: part for name, part in parts.items() if part.numel()}
    means = {f"{side}_mean" for side in description["means"]}
    if parts.keys() | means != found.keys():
        raise FileError("does not hold the tensors that its description names")
    for name, part in parts.items():
        given = found[name]
        if given.shape != part.shape or given.dtype != part.dtype:
            raise FileError(
                f"holds {name} as {_name(given.dtype)} {list(given.shape)}, expected "
                f"{_name(part.dtype)} {list(part.shape)}"
            )
    for name, part in parts.items():
        part.copy_(found[name])
    cache._host.value, cache._host.oldest = length, description["oldest"]
    if cache.static:
        cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int64))


def save(cache: QuantizedKVCache, path: str | os.PathLike) -> None:
    """See :meth:`QuantizedKVCache.save`."""
    about = {"kind": "QuantizedKVCache", "device": cache.device.type, "cache": describe(cache)}
    _write(path, about, tensors(cache))


def load(
    make: type[QuantizedKVCache],
    path: str | os.PathLike,
    device: torch.device | str | None,
) -> QuantizedKVCache:
    """See :meth:`QuantizedKVCache.load`."""
    with _refusing(path):
        about, found = _read(path, "QuantizedKVCache")
        device = _choose(device, about["device"])
        cache = make(device=device, **arguments(about["cache"], found))
        restore(cache, about["cache"], found)
    return cache


# -- a model's cache ------------------------------------------------------------------------


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of a model's text config that its keys and values may depend on."""
    fields = json.loads(json.dumps(config.get_text_config(decoder=True).to_dict(), default=str))
    return {name: value for name, value in fields.items() if name not in _UNRELATED}


def save_model_cache(cache: KVQCache, path: str | os.PathLike) -> None:
    """See :meth:`torch_kvq.hf.KVQCache.save`."""
    from torch_kvq.hf import KVQLayer

    layers: list[dict[str, Any]] = []
    found: Tensors = {}
    device = "cpu"
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}."
        about: dict[str, Any] = {"type": type(layer).__name__}
        if isinstance(layer, KVQLayer):
            about |= {
                "k_format": str(layer.k_format),
                "v_format": str(layer.v_format),
                "sliding_window": layer.window,
                "max_cache_len": layer.max_cache_len,
                "options": _encode(layer.options, f"{prefix}options", found),
                "cache": None,
            }
            if layer.cache is not None:
                device = layer.cache.device.type
                about["cache"] = describe(layer.cache)
                found |= {prefix + name: t for name, t in tensors(layer.cache).items()}
        else:
            about["attributes"] = _encode(vars(layer), f"{prefix}attributes", found)
        layers.append(about)
    fields = config_fields(cache.config)
    _write(path, {"kind": "KVQCache", "device": device, "config": fields, "layers": layers}, found)


def load_model_cache(
    make: type[KVQCache],
    path: str | os.PathLike,
    config: Any,
    device: torch.device | str | None,
) -> KVQCache:
    """See :meth:`torch_kvq.hf.KVQCache.load`."""
    with _refusing(path):
        about, found = _read(path, "KVQCache")
        _check_config(about["config"], config_fields(config))
        target = torch.device(_choose(device, about["device"]))
        lengths = [layer.get("max_cache_len") for layer in about["layers"]]
        # The formats come with the layers; this makes what the model's config asks for.
        cache = make(config, "none", max_cache_len=next((n for n in lengths if n), None))
        if len(cache.layers) != len(lengths):
            raise FileError(f"holds {len(lengths)} layers, the model has {len(cache.layers)}")
        for index, description in enumerate(about["layers"]):
            prefix = f"layers.{index}."
            own = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
            cache.layers[index] = _load_layer(cache.layers[index], index, description, own, target)
        cache.join_layers()
    return cache


def _load_layer(
    made: Any, index: int, about: dict[str, Any], own: Tensors, device: torch.device
) -> Any:
    """The layer that is described, in place of the one that the config gives."""
    if type(made).__name__ != about["type"]:
        raise FileError(f"holds a {about['type']} as layer {index}, expected {type(made).__name__}")
    if "attributes" in about:
        for name, value in _decode(about["attributes"], own, device).items():
            setattr(made, name, value)
        return made
    if made.window != about["sliding_window"]:
        raise FileError(
            f"holds a window of {about['sliding_window']} in layer {index}, expected {made.window}"
        )
    options = _decode(about["options"], own, device)
    layer = type(made)(
        about["k_format"],
        about["v_format"],
        sliding_window=about["sliding_window"],
        max_cache_len=about["max_cache_len"],
        carrier=made.carrier,
        config=made.config,
        **options,
    )
    layer.bound = made.bound
    description = about["cache"]
    if description is not None:
        sizes, dtype = description["arguments"], _dtype(description["arguments"]["dtype"])
        shape = (sizes["batch_size"], sizes["kv_heads"], 0)
        key = torch.empty(*shape, sizes["head_dim"], dtype=dtype, device=device)
        value = torch.empty(*shape, sizes["value_dim"], dtype=dtype, device=device)
        layer.lazy_initialization(key, value)
        restore(layer.cache, description, {n: t for n, t in own.items() if "." not in n})
    return layer


def _check_config(saved: dict[str, Any], given: dict[str, Any]) -> None:
    for name in sorted(saved.keys() | given.keys()):
        if saved.get(name) != given.get(name):
            raise FileError(
                f"was saved with a model whose {name} is {saved.get(name)!r}, this model's is "
                f"{given.get(name)!r}"
            )


def _encode(value: Any, name: str, found: Tensors) -> Any:
    """A layer's attribute as JSON; its tensors go into ``found``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        found[name] = value
        return {"tensor": name.split(".", 2)[2]}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, KVFormat):
        return str(value)
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{name}.{i}", found) for i, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, Mapping):
        items = [[key, _encode(item, f"{name}.{key}", found)] for key, item in value.items()]
        return {"dict": items}
    raise TypeError(f"[kvq.save] {name} is a {type(value).__name__}, which no file can hold")


def _decode(value: Any, found: Tensors, device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    match kind:
        case "tensor":
            return found[held].to(device, copy=True)
        case "dtype":
            return _dtype(held)
        case "device":
            return device
        case "dict":
            return {key: _decode(item, found, device) for key, item in held}
    items = [_decode(item, found, device) for item in held]
    return tuple(items) if kind == "tuple" else items


# -- the file -------------------------------------------------------------------------------


@contextmanager
def _refusing(path: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong with the file is one error that names it."""
    try:
        yield
    except FileError as error:
        raise ValueError(f"[kvq.load] {Path(path).name} {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = "asks for what this version cannot make"
        raise ValueError(f"[kvq.load] {Path(path).name} {what}: {error}") from error


def _fingerprint(about: Mapping[str, Any], found: Tensors) -> str:
    table = {name: [_name(t.dtype), list(t.shape)] for name, t in found.items()}
    text = json.dumps([about, table], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: str | os.PathLike, about: dict[str, Any], found: Tensors) -> None:
    about = {"layout": LAYOUT, **about, "checksum": tensor_file.checksum(found)}
    about["fingerprint"] = _fingerprint(about, found)
    text = json.dumps(about, separators=(",", ":"))
    tensor_file.write(path, found, {_ENTRY: text})


def _read(path: str | os.PathLike, kind: str) -> tuple[dict[str, Any], Tensors]:
    """Metadata and mapped tensors of a cache file of this kind, checked."""
    metadata, found = tensor_file.read(path)
    if _ENTRY not in metadata:
        raise FileError("holds no cache of torch_kvq")
    try:
        about = json.loads(metadata[_ENTRY])
        layout, fingerprint, saved_kind = about["layout"], about.pop("fingerprint"), about["kind"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError("is damaged: its description is unreadable") from error
    if layout != LAYOUT:
        raise FileError(f"has layout {layout}, this version of torch_kvq reads layout {LAYOUT}")
    if fingerprint != _fingerprint(about, found):
        raise FileError("is damaged: its description does not match its fingerprint")
    if saved_kind != kind:
        raise FileError(f"holds a {saved_kind}; load it with {saved_kind}.load")
    if about["checksum"] != tensor_file.checksum(found):
        raise FileError("is damaged: its tensors do not match their checksum")
    return about, found


def _choose(wanted: torch.device | str | None, saved: str) -> torch.device | str:
    """The device asked for, or the one of the saved cache where this machine has it."""
    if wanted is not None:
        return wanted
    return "mps" if saved == "mps" and torch.backends.mps.is_available() else "cpu"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    if isinstance(dtype := getattr(torch, name, None), torch.dtype):
        return dtype
    raise FileError(f"names a dtype {name!r}, which torch does not have")
