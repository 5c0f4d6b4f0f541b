"""What a cache holds between two calls: its buffers and lengths, and their edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_kvq import ops
from torch_kvq.codebooks import SIGNS_SEED, hadamard_signs
from torch_kvq.formats import FLOAT_DTYPES, KVFormat, default_scale_dtype
from torch_kvq.memory import zeros
from torch_kvq.ops import Packed
from torch_kvq.storage import compact, grow

_PACKED = tuple(f"{side}_{name}" for side in "kv" for name in Packed._fields)


@dataclass
class HostLength:
    """The longest row's length, where the host knows it; None after compiled steps.

    Not an attribute of the module itself: torch.compile would specialise on its value.
    """

    value: int | None = 0
    #: the oldest position that a crop may make visible again (ring or recent window)
    oldest: int = 0


class CacheState(nn.Module):
    """The storage of a :class:`~torch_kvq.QuantizedKVCache` and what needs no attention."""

    k_codes: torch.Tensor
    k_scales: torch.Tensor
    k_biases: torch.Tensor
    v_codes: torch.Tensor
    v_scales: torch.Tensor
    v_biases: torch.Tensor
    k_signs: torch.Tensor | None
    v_signs: torch.Tensor | None
    k_mean: torch.Tensor | None
    v_mean: torch.Tensor | None
    k_sink: torch.Tensor
    v_sink: torch.Tensor
    k_recent: torch.Tensor
    v_recent: torch.Tensor
    lengths: torch.Tensor

    k_format: KVFormat
    v_format: KVFormat
    batch_size: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    static: bool
    ring: bool
    limit: int | None
    max_length: int | None
    window: int
    sink_tokens: int
    recent_tokens: int
    rollback_tokens: int
    block_size: int
    signs_seed: int
    _host: HostLength

    def _make_buffers(
        self, means: dict[str, torch.Tensor | None], device: torch.device | str | None
    ) -> None:
        """Register every buffer: packed K and V, exact windows, signs, means, lengths."""
        if self.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"[kvq.cache] dtype must be float32, float16 or bfloat16, got {self.dtype}"
            )
        recent = self.recent_tokens + self.rollback_tokens if self.recent_tokens else 0
        slots = (self.limit or 0) if self.static else 0
        specs = {}
        dense = 0
        for side, fmt, size in self._sides():
            rows = fmt.rows(size, self.dtype, self.scale_dtype)
            for name, (row, dtype) in zip(Packed._fields, rows, strict=True):
                specs[f"{side}_{name}"] = slots, row, dtype
            specs[f"{side}_sink"] = self.sink_tokens, size, self.dtype
            specs[f"{side}_recent"] = recent, size, self.dtype
            dense += size * self.dtype.itemsize
        lead = self.batch_size, self.kv_heads
        made = zeros(*(((*lead, n, row), kind) for n, row, kind in specs.values()), device=device)
        for name, tensor in zip(specs, made, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        for side, fmt, size in self._sides():
            signs = self._make_signs(size, device) if fmt.rotate else None
            self.register_buffer(f"{side}_signs", signs, persistent=False)
            mean = means[side]
            if mean is not None:
                mean = mean.to(device=device, dtype=torch.float32).reshape(self.kv_heads, size)
            self.register_buffer(f"{side}_mean", mean, persistent=False)
        lengths = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        self.register_buffer("lengths", lengths if self.static else None, persistent=False)
        self._host = HostLength()
        packed = sum(
            row * kind.itemsize for name, (_, row, kind) in specs.items() if name in _PACKED
        )
        exact = sum(4 * size for side, _, size in self._sides() if means[side] is not None)
        exact += (self.sink_tokens + recent) * dense
        #: bytes in a head: of a token in a dense cache, of a packed one, and of all else
        self._head_bytes = dense, max(packed, 1), exact

    def remake(
        self,
        batch_size: int,
        dtype: torch.dtype,
        scale_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Empty this cache and make its storage anew, for another batch size, dtype or device."""
        self.batch_size, self.dtype = batch_size, dtype
        self.scale_dtype = scale_dtype or default_scale_dtype(dtype)
        self._make_buffers({"k": self.k_mean, "v": self.v_mean}, device)

    def _sides(self) -> tuple[tuple[str, KVFormat, int], ...]:
        return ("k", self.k_format, self.head_dim), ("v", self.v_format, self.value_dim)

    def _make_signs(self, size: int, device: torch.device | str | None) -> torch.Tensor:
        if self.static or self.signs_seed != SIGNS_SEED:
            return hadamard_signs(size, self.signs_seed, device)
        # Growing caches share theirs. (Static ones are inputs of compiled graphs: no aliases.)
        return ops.default_signs(size, torch.empty(0, device=device).device)

    def _apply(self, fn: Callable, recurse: bool = True) -> CacheState:
        """Move with .to() and friends, but keep every dtype: .half() must not damage scales."""

        # share_memory() moves whole storages.
        probe = fn(torch.empty(0, device="cpu")) if self.device.type == "cpu" else None
        shares = probe is not None and probe.device.type == "cpu" and probe.is_shared()

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(compact(tensor) if shares else tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and deep copies: the slots, not what is reserved behind them."""
        buffers = {n: b if b is None else compact(b) for n, b in self._buffers.items()}
        return {**self.__dict__, "_buffers": buffers}

    def __copy__(self) -> CacheState:
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(self.__dict__)
        return made

    # -- state ------------------------------------------------------------------------------

    @property
    def keys(self) -> Packed:
        """Packed K [B, G, S, row]."""
        return self._packed("k_codes", "k_scales", "k_biases")

    @property
    def values(self) -> Packed:
        """Packed V [B, G, S, row]."""
        return self._packed("v_codes", "v_scales", "v_biases")

    def _packed(self, codes: str, scales: str, biases: str) -> Packed:
        # nn.Module finds a buffer after two failures, which per step costs more than the append.
        buffers = self._buffers
        return Packed(buffers[codes], buffers[scales], buffers[biases])  # type: ignore[arg-type]

    @property
    def capacity(self) -> int:
        """Tokens the storage holds now."""
        return self._buffers["k_codes"].shape[2]  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        return self.k_codes.device

    @property
    def length(self) -> int:
        """Tokens appended and not cropped, of the longest row.

        After compiled steps this reads the device.

        Raises:
            IndexError: compiled steps on MPS, where nothing waits for the device, went on past the
                capacity; crop what was not stored, or reset.
        """
        if self._host.value is None:
            length = self._read_length()
            if self.max_length is not None and length > self.max_length:
                raise IndexError(
                    f"[kvq.cache] compiled steps went on to {length} tokens; those past the "
                    f"capacity {self.max_length} were not stored: crop {length - self.max_length} "
                    "or reset"
                )
            self._host.value = length
        return self._host.value

    def _read_length(self) -> int:
        if self._host.value is not None:
            return self._host.value
        return int(self.lengths.max()) if self.batch_size else 0

    @property
    def kv_length(self) -> int | torch.Tensor:
        """The length as the ops take it: int64 [B] with a static capacity, else an int."""
        return self._buffers["lengths"] if self.static else self._host.value  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer: packed rows, full-precision windows, means, lengths, signs.

        Not counted are the signs that all growing caches share, and the address space that a long
        growing cache on the CPU reserves to grow in, which takes no memory.
        """
        shared = {
            id(ops.default_signs(size, self.device)) for _, fmt, size in self._sides() if fmt.rotate
        }
        own = [b for b in self.buffers() if id(b) not in shared]
        return sum(b.nbytes for b in own)

    def reserve(self, tokens: int) -> None:
        """Grow the storage so that ``tokens`` more fit (a ring: up to its size)."""
        if self.static:
            return
        wanted = (self._host.value or 0) + tokens
        if self.limit is not None:
            wanted = min(wanted, self.limit)
        if wanted <= self.capacity:
            return
        # An eighth more than needed keeps the copying, where there is any, linear in the final
        # length; a short cache takes a block more, or as many tokens as a dense one of this length
        # has room for.
        dense, packed, others = self._head_bytes
        spare = min(self.block_size, (wanted * dense - others) // packed - wanted)
        capacity = wanted + max(wanted // 8, spare)
        if self.limit is not None:
            capacity = min(capacity, self.limit)
        old = [*self.keys, *self.values]
        for name, grown in zip(_PACKED, grow(old, capacity, self.limit), strict=True):
            setattr(self, name, grown)

    def _advance(self, tokens: int, lengths: torch.Tensor | None) -> None:
        if self.static:
            self._buffers["lengths"].add_(tokens if lengths is None else lengths)  # type: ignore[union-attr]
        if torch.compiler.is_compiling() and self.static:
            self._host.value = None
        elif self._host.value is not None:
            if lengths is not None:
                self._host.value = None
            else:
                self._host.value += tokens
        self._forget_overwritten()

    def _forget_overwritten(self) -> None:
        """Raise the oldest position that the ring or the recent window still holds."""
        if self._host.value is None:
            return
        if not (self.ring or self.recent_tokens):
            return
        for size in (self.limit if self.ring else 0, self.k_recent.shape[2]):
            if size:
                self._host.oldest = max(self._host.oldest, self._host.value - size)

    def set_rollback(self, tokens: int) -> None:
        """Make ``tokens`` the rollback_tokens of a growing cache: move its ring and recent window.

        What is overwritten stays so; a smaller number frees the storage at once.
        """
        if self.static:
            raise RuntimeError("[kvq.cache] rollback_tokens of a static cache are fixed")
        self._forget_overwritten()
        if self.ring:
            self.limit = self.window + tokens
            wraps = self.length > min(self.capacity, self.limit)
            self._move_ring(_PACKED, self.limit if wraps else min(self.capacity, self.limit))
        if self.recent_tokens:
            self._move_ring(("k_recent", "v_recent"), self.recent_tokens + tokens)
        self.rollback_tokens = tokens
        self._forget_overwritten()

    def _move_ring(self, names: Sequence[str], slots: int) -> None:
        """Give buffers that hold position p in slot p mod S another S."""
        old = [getattr(self, name) for name in names]
        length, before = self.length, old[0].shape[2]
        first = length - min(length, before, slots)
        positions = torch.arange(first, length, device=self.device)
        specs = [((*t.shape[:2], slots, t.shape[3]), t.dtype) for t in old]
        for name, source, moved in zip(names, old, zeros(*specs, device=self.device), strict=True):
            if before:
                moved[:, :, positions % max(slots, 1)] = source[:, :, positions % before]
            setattr(self, name, moved)

    # -- editing ----------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Drop the newest ``tokens`` tokens of every row, exactly.

        Raises:
            IndexError: more tokens than there are.
            RuntimeError: a ring or a recent window no longer holds what would become visible
                (more than rollback_tokens back); nothing is changed.
        """
        if tokens < 0:
            raise IndexError(f"[kvq.crop] tokens must not be negative, got {tokens}")
        if tokens == 0:
            return
        length = self._read_length()
        shortest = int(self.lengths.min()) if self.static and self.batch_size else length
        if tokens > shortest:
            raise IndexError(f"[kvq.crop] cannot drop {tokens} tokens of {shortest}")
        self._forget_overwritten()
        left = length - tokens
        needed = left
        if self.ring:
            needed = min(needed, left - self.window + 1)
        if self.recent_tokens:
            needed = min(needed, max(left - self.recent_tokens, min(left, self.sink_tokens)))
        if max(needed, 0) < self._host.oldest:
            raise RuntimeError(
                f"[kvq.crop] cannot drop {tokens} tokens: the tokens before position "
                f"{self._host.oldest} that would become visible again are overwritten; give the "
                f"cache more rollback_tokens than {self.rollback_tokens}"
            )
        self._host.value = left
        if self.static:
            self.lengths.sub_(tokens)
        if left == 0:
            self._host.oldest = 0

    def reset(self) -> None:
        """Forget every token; the storage stays allocated."""
        self._host.value = self._host.oldest = 0
        if self.static:
            self.lengths.zero_()

    def _row_buffers(self) -> dict[str, torch.Tensor]:
        """Every buffer with one row per batch row."""
        names = [f"{side}_{name}" for side in "kv" for name in (*Packed._fields, "sink", "recent")]
        buffers = {name: getattr(self, name) for name in [*names, "lengths"]}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def _replace_rows(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, buffer in self._row_buffers().items():
            setattr(self, name, fn(buffer))
        self.batch_size = self.k_codes.shape[0]

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes old row rows[i] (beam search), rows int64 [B]."""
        if len(rows) != self.batch_size:
            return self.select(rows)
        # In place: compiled code holds on to a static cache's storage.
        for buffer in self._row_buffers().values():
            buffer.copy_(buffer.index_select(0, rows.to(buffer.device)))

    def select(self, rows: torch.Tensor) -> None:
        """Keep rows ``rows`` of the batch: int64 or bool, as an index of dimension 0."""
        self._replace_rows(lambda t: t[rows.to(t.device)].contiguous())

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times in place of one."""
        self._replace_rows(lambda t: t.repeat_interleave(repeats, 0))
