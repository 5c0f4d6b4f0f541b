"""QuantizedKVCache: one attention layer's quantised key/value cache."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from torch_kvq import ops, serialization
from torch_kvq.cache_state import CacheState
from torch_kvq.codebooks import SIGNS_SEED
from torch_kvq.formats import SCALE_DTYPES, KVFormat, default_scale_dtype
from torch_kvq.ops import Format, Packed
from torch_kvq.storage import KVView, after_slots, with_exact, write_first

_NONE = KVFormat("none")
#: How far crop may go back in a ring or a recent window, unless said.
ROLLBACK_TOKENS = 64


def makes_ring(window: int, capacity: int | None) -> bool:
    """Whether a cache of these arguments wraps around: it does if it holds the window."""
    return window > 0 and (capacity is None or capacity >= window)


class QuantizedKVCache(CacheState):
    """The keys and values of one attention layer, packed.

    Letters as in :mod:`torch_kvq.ops`: B batch, G KV heads, S capacity, D and Dv head sizes.

    Args:
        batch_size: B.
        kv_heads: G.
        head_dim: D.
        k_format, v_format: a :class:`KVFormat` or its name; V takes K's unless given.
        value_dim: Dv, D unless given.
        capacity: tokens to hold, allocated at once; lengths are then an int64 [B] tensor on the
            device, so that a step compiles to one graph and rows may differ in length. Without
            it the cache grows and all rows have one length.
        block_size: tokens by which it grows at least, where that leaves it no larger than a dense
            cache of dtype; a long one grows by an eighth.
        window: > 0: sliding-window attention; a ring holds window + rollback_tokens tokens, or
            the capacity if that is less and holds the window.
        sink_tokens, recent_tokens: the first and the last tokens that attention reads in full
            precision (they are also packed, so leaving the window costs nothing).
        rollback_tokens: how far ``crop`` may go back in a ring or a recent window.
        dtype: of what is kept or given unquantised: format none, exact windows,
            :meth:`dequantized`; and it chooses the scales. Appended keys and values may have any.
        scale_dtype: dtype of scales; float16 for half and bfloat16, float32 for float32.
        k_mean, v_mean: float32 [G, D] and [G, Dv], subtracted before quantising.
        k_encoder, v_encoder: see :func:`torch_kvq.ops.quantize`; "auto" is "unbiased" for tq keys.
        signs_seed: seed of the random signs of rotated formats.

    Quantisation is per token, so ``crop`` is exact: append, crop, append leaves the bytes and
    outputs of never having appended.
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        k_format: Format = "int8",
        v_format: Format | None = None,
        value_dim: int | None = None,
        capacity: int | None = None,
        block_size: int = 64,
        window: int = 0,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        rollback_tokens: int = ROLLBACK_TOKENS,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        k_mean: torch.Tensor | None = None,
        v_mean: torch.Tensor | None = None,
        k_encoder: str = "auto",
        v_encoder: str = "auto",
        signs_seed: int = SIGNS_SEED,
    ) -> None:
        super().__init__()
        self.k_format = KVFormat.parse(k_format)
        self.v_format = KVFormat.parse(v_format if v_format is not None else k_format)
        self.batch_size, self.kv_heads = batch_size, kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim or head_dim
        self.k_format.check_head_dim(self.head_dim, "cache")
        self.v_format.check_head_dim(self.value_dim, "cache")
        for name, count in (
            ("window", window),
            ("sink_tokens", sink_tokens),
            ("recent_tokens", recent_tokens),
            ("rollback_tokens", rollback_tokens),
        ):
            if count < 0:
                raise ValueError(f"[kvq.cache] {name} must not be negative, got {count}")
        scale_dtype = scale_dtype or default_scale_dtype(dtype)
        if scale_dtype not in SCALE_DTYPES:
            raise TypeError(f"[kvq.cache] scale_dtype must be a float dtype, got {scale_dtype}")
        if window and sink_tokens:
            raise ValueError("[kvq.cache] sink_tokens leave a sliding window; use one or the other")
        self.dtype, self.scale_dtype = dtype, scale_dtype
        self.static = capacity is not None
        self.window, self.rollback_tokens, self.block_size = window, rollback_tokens, block_size
        self.sink_tokens, self.recent_tokens = sink_tokens, recent_tokens
        self.signs_seed = signs_seed
        if k_encoder == "auto" and self.k_format.family == "turboquant":
            k_encoder = "unbiased"
        self.k_encoder = "default" if k_encoder == "auto" else k_encoder
        self.v_encoder = "default" if v_encoder == "auto" else v_encoder
        #: most tokens the storage may hold; None grows without bound
        self.limit = capacity
        self.ring = makes_ring(window, capacity)
        if self.ring:
            most = window + rollback_tokens
            self.limit = most if capacity is None else min(most, capacity)
        #: most tokens a row may have; a ring has no such bound, unless its model sets one
        self.max_length = None if self.ring else capacity
        self._make_buffers({"k": k_mean, "v": v_mean}, device)

    def extra_repr(self) -> str:
        shape = f"{self.batch_size}, {self.kv_heads}, {self.head_dim}"
        if self.value_dim != self.head_dim:
            shape += f", value_dim={self.value_dim}"
        parts = [shape, f"k={self.k_format}", f"v={self.v_format}", f"dtype={self.dtype}"]
        parts.append(f"capacity={self.capacity}" + ("" if self.static else ", growing"))
        for name in ("window", "sink_tokens", "recent_tokens"):
            if getattr(self, name):
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)

    # -- writing ----------------------------------------------------------------------------

    def append(
        self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> KVView:
        """Append L tokens to every row.

        Args:
            key: [B, G, L, D], float32, float16 or bfloat16, whatever the cache's dtype: it is
                quantised as it is, without being rounded to that first. (Under autocast a layer's
                keys are float32 and its values bfloat16.)
            value: [B, G, L, Dv], likewise.
            lengths: int64 [B], how many of the L tokens are real in each row (right padding);
                needs a static capacity. The rest is overwritten by the next append.

        Returns:
            What queries of these L tokens attend to, for :meth:`attend`: the exact tokens when
            they are the first ones (a prefill), otherwise the packed cache.

        Raises:
            IndexError: a static cache would overflow; nothing is changed.
        """
        tokens = key.shape[2]
        self._check_append(key, value, lengths)
        past = self.kv_length
        compiled_ring = self.ring and torch.compiler.is_compiling()
        if compiled_ring and self.max_length is not None and isinstance(past, torch.Tensor):
            # No position: the op refuses it, so that no ring runs ahead of the model's full layers.
            past = torch.where(past + tokens > self.max_length, -1, past)
        # Only a chunk asks: reading the host's length would make a compiled step depend on it.
        was_empty = tokens > 1 and self._host.value == 0
        overflow = None
        if self.ring and not was_empty and self._overwrites_windows(tokens):
            overflow = self._linear_view(key, value)
        self.reserve(tokens)
        ops.append_(
            self.keys,
            self.values,
            key,
            value,
            past,
            self.k_format,
            self.v_format,
            ring=self.ring,
            **self._encoding(),
        )
        if self.sink_tokens or self.recent_tokens:
            self._write_windows(key, value, past)
        self._advance(tokens, lengths)
        if was_empty and lengths is None:
            empty = key.new_empty(*key.shape[:3], 0)
            return KVView(
                Packed(key, empty, empty), Packed(value, empty, empty), tokens, tokens, fresh=True
            )
        return self.view(tokens) if overflow is None else self._with_windows(overflow)

    def _with_windows(self, view: KVView) -> KVView:
        """A linear view, decoded, with the recent tokens exact.

        Such a view counts from its own first token, the window's slots from the sequence's.
        """
        if not self.recent_tokens:  # sink_tokens exclude a ring
            return view
        rows = view.keys.codes.shape[2]
        first = (self.lengths.max() if self.static else self.length) - rows
        key, value = (self.dense(side, first, rows, view) for side in "kv")
        empty = key.new_empty(*key.shape[:3], 0)
        return replace(
            view, keys=Packed(key, empty, empty), values=Packed(value, empty, empty), fresh=True
        )

    def view(self, tokens: int = 1) -> KVView:
        """The whole packed cache, for queries of its last ``tokens`` tokens."""
        return KVView(self.keys, self.values, self.kv_length, tokens, ring=self.ring)

    def _encoding(self) -> dict:
        return {
            **self._rotation(),
            "k_encoder": self.k_encoder,
            "v_encoder": self.v_encoder,
        }

    def _rotation(self) -> dict:
        buffers = self._buffers
        return {name: buffers[name] for name in ("k_signs", "v_signs", "k_mean", "v_mean")}

    def _check_append(
        self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None
    ) -> None:
        for name, x, size in (("key", key, self.head_dim), ("value", value, self.value_dim)):
            expected = (self.batch_size, self.kv_heads, key.shape[2] if key.dim() > 2 else 0, size)
            if x.shape != expected:
                raise ValueError(
                    f"[kvq.append] {name} must be {list(expected)}, got {list(x.shape)}"
                )
        if lengths is not None and (not self.static or self.ring or self.recent_tokens):
            raise ValueError(
                "[kvq.append] rows of different lengths need a static capacity, and neither a "
                "ring nor recent_tokens"
            )
        if self.max_length is not None and not torch.compiler.is_compiling():
            if self.length + key.shape[2] > self.max_length:
                raise IndexError(
                    f"[kvq.append] {self.length} tokens + {key.shape[2]} exceed the "
                    f"capacity {self.max_length}"
                )

    @property
    def ring_chunk(self) -> int:
        """Tokens that a ring takes at once before the first one's window is overwritten."""
        return (self.limit or 0) - self.window + 1

    def _overwrites_windows(self, tokens: int, appended: bool = False) -> bool:
        """Whether ``tokens`` tokens of a ring overwrite what the first of them still sees."""
        if tokens <= self.ring_chunk:
            return False
        length = self._host.value
        return length is None or length + (0 if appended else tokens) > (self.limit or 0)

    def _linear_view(self, key: torch.Tensor, value: torch.Tensor) -> KVView:
        """The window before this chunk and the chunk, packed: a chunk too long for the ring."""
        tokens, kept = key.shape[2], self.window - 1
        start = None
        if self.static:
            start = (kept - self.lengths).clamp_min(0)
            first = self.lengths[:, None] - kept
            slots = (first + torch.arange(kept, device=self.device)) % self.capacity
        else:
            past = self.length
            kept = min(kept, past)
            slots = torch.arange(past - kept, past, device=self.device) % self.capacity
            slots = slots.expand(self.batch_size, kept)

        new_keys, new_values = (
            ops.quantize(
                x, fmt, signs=signs, mean=mean, encoder=encoder, scale_dtype=self.scale_dtype
            )
            for x, fmt, signs, mean, encoder in (
                (key, self.k_format, self.k_signs, self.k_mean, self.k_encoder),
                (value, self.v_format, self.v_signs, self.v_mean, self.v_encoder),
            )
        )
        return KVView(
            after_slots(self.keys, slots, new_keys),
            after_slots(self.values, slots, new_values),
            kept + tokens,
            tokens,
            start=start,
        )

    def _write_windows(
        self, key: torch.Tensor, value: torch.Tensor, past: int | torch.Tensor
    ) -> None:
        """Keep the first and the last tokens in full precision too."""
        for side, x in (("k", key), ("v", value)):
            if self.sink_tokens:
                write_first(getattr(self, f"{side}_sink"), x, past)
            if self.recent_tokens:
                recent = getattr(self, f"{side}_recent")
                empty = recent.new_empty(*recent.shape[:3], 0)
                ops.quantize_into_(Packed(recent, empty, empty), x, past, _NONE, ring=True)

    # -- reading ----------------------------------------------------------------------------

    def attend(
        self,
        query: torch.Tensor,
        view: KVView | None = None,
        *,
        mask: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        causal: bool = True,
        window: int | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the newest tokens' queries.

        Args:
            query: [B, H, L, D]; the last query belongs to the newest token.
            view: what :meth:`append` returned for these tokens. Without it the packed cache is
                read, which in a ring holds the whole window for at most rollback_tokens + 1
                queries.
            mask, sinks, scale, softcap, causal: as in :func:`torch_kvq.ops.attention`.
            window: another window than the cache's.

        Returns:
            [B, H, L, Dv] in query's dtype; with ``return_lse`` also lse [B, H, L].
        """
        view = view or self.view(query.shape[2])
        common: dict[str, Any] = {
            "mask": mask,
            "scale": scale,
            "softcap": softcap,
            "causal": causal,
            "window": self.window if window is None else window,
        }
        if view.fresh:
            dense = view.keys, view.values, view.length, _NONE, _NONE
            out = ops.attention(query, *dense, sinks=sinks, kv_start=view.start, **common)
            return out if return_lse else out[0]
        if view.ring and self._overwrites_windows(query.shape[2], appended=True):
            raise ValueError(
                f"[kvq.attend] {query.shape[2]} queries reach further back than the ring: pass "
                "the view that append returned, or give the cache more rollback_tokens"
            )
        if not (self.sink_tokens or self.recent_tokens):
            out = self._attend_packed(query, view, sinks=sinks, kv_start=view.start, **common)
        else:
            out = self._attend_windows(query, view, sinks, common)
        return out if return_lse else out[0]

    def _attend_packed(
        self, query: torch.Tensor, view: KVView, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.attention(
            query,
            view.keys,
            view.values,
            view.length,
            self.k_format,
            self.v_format,
            ring=view.ring,
            **self._rotation(),
            **options,
        )

    def _attend_windows(
        self, query: torch.Tensor, view: KVView, sinks: torch.Tensor | None, common: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """First and recent tokens in full precision, the rest packed, merged by their lse."""
        exact = query.float()
        length = view.length
        if not isinstance(length, torch.Tensor):
            length = torch.full((self.batch_size,), length, device=self.device)
        sink_end = torch.full_like(length, self.sink_tokens)
        recent_start = length if not self.recent_tokens else length - self.recent_tokens
        recent_start = torch.maximum(recent_start, sink_end)
        packed_start = sink_end if view.start is None else torch.maximum(sink_end, view.start)
        parts = [
            self._attend_packed(
                exact, view, sinks=sinks, kv_start=packed_start, kv_end=recent_start, **common
            )
        ]
        windows: dict[str, dict[str, Any]] = {
            "sink": {"kv_end": sink_end},
            "recent": {"kv_start": recent_start, "ring": True},
        }
        for name, bounds in windows.items():
            keys, values = getattr(self, f"k_{name}"), getattr(self, f"v_{name}")
            if keys.shape[2] == 0:
                continue
            empty = keys.new_empty(*keys.shape[:3], 0)
            dense = Packed(keys, empty, empty), Packed(values, empty, empty)
            options = {**bounds, **common}
            parts.append(ops.attention(exact, *dense, length, _NONE, _NONE, **options))
        out, lse = ops.merge_attention(parts)
        return out.to(query.dtype), lse

    def dequantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K [B, G, T, D] and V [B, G, T, Dv] as attention reads them, oldest token first.

        T is the length, of a ring what it holds, and of a static cache its capacity (slots past a
        row's length hold leftovers).
        """
        first, count = 0, self.capacity
        if not self.static or self.ring:
            count = min(self.length, count)
            first = self.length - count
        return self.dense("k", first, count), self.dense("v", first, count)

    def dense(
        self, side: str, first: int | torch.Tensor, count: int, view: KVView | None = None
    ) -> torch.Tensor:
        """Positions first .. first+count-1 of one side, "k" or "v", as attention reads them.

        Args:
            first: int, or int64 [] on the device.
            view: read what this view makes visible. Positions that nothing holds get leftovers.
        """
        positions = torch.arange(count, device=self.device) + first
        linear = view is not None and view.ring != self.ring  # a chunk too long for the ring
        fresh = view is not None and view.fresh
        packed = self.keys if side == "k" else self.values
        if view is not None and (linear or fresh):
            packed = view.keys if side == "k" else view.values
        slots = positions
        if linear:
            length = self.lengths.max() if self.static else self.length
            slots = positions - (length - packed.codes.shape[2])
        elif self.ring and not fresh:
            slots = positions % max(self.capacity, 1)
        if fresh:
            x = packed.codes
        else:
            x = ops.dequantize(
                packed,
                self.k_format if side == "k" else self.v_format,
                signs=getattr(self, f"{side}_signs"),
                mean=getattr(self, f"{side}_mean"),
                dtype=self.dtype,
            )
        x = x.index_select(2, slots.clamp(0, max(x.shape[2] - 1, 0)))
        if fresh or not (self.sink_tokens or self.recent_tokens):
            return x
        end = self.lengths[:, None] if self.static else self.length
        ends = self.sink_tokens, end - self.recent_tokens, end
        windows = getattr(self, f"{side}_sink"), getattr(self, f"{side}_recent")
        return with_exact(x, *windows, positions, ends)

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, then :meth:`dequantized`: for code that wants dense tensors."""
        self.append(key, value)
        return self.dequantized()

    # -- files ------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokens held to a safetensors file, atomically; see
        :mod:`torch_kvq.serialization` for what it holds."""
        serialization.save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, device: torch.device | str | None = None
    ) -> QuantizedKVCache:
        """The cache that :meth:`save` wrote; attending and appending go on as if never saved.

        Args:
            device: where to put it; where it was, if this machine has that, else the CPU.

        Raises:
            ValueError: the file is damaged, truncated or holds something else.
        """
        return serialization.load(cls, path, device)
