"""Moving a cache's token slots about: growing, gathering, keeping the first tokens."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_kvq.memory import maps, reserved, zeros
from torch_kvq.ops import Packed

#: Pages of a head's packed tokens from which on there is a reserve: to begin each of six buffers on
#: a page of its own wastes 3 of them, a sixteenth.
_RESERVING_PAGES = 48
#: A reserve holds so many tokens at least, or eight times as many as are there.
_RESERVED_TOKENS = 1 << 17


@dataclass
class KVView:
    """What :meth:`QuantizedKVCache.append` returns: the keys and values its queries attend to.

    A view reads the cache's own storage and is good until the next change of the cache.
    """

    keys: Packed
    values: Packed
    #: tokens held, the newest included: int, or int64 [B]
    length: int | torch.Tensor
    #: newest tokens appended by this call, L
    tokens: int
    ring: bool = False
    #: keys and values are plain tensors: a prefill into an empty cache, or decoded tokens
    fresh: bool = False
    #: first valid position, int64 [B]
    start: torch.Tensor | None = None


def nbytes(*values: object) -> int:
    """Bytes of the storages of tensors, and of those in lists, tuples and dicts; each once."""
    found: dict[int, int] = {}

    def look(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                look(item)

    look(values)
    return sum(found.values())


def grow(
    buffers: Sequence[torch.Tensor], capacity: int, limit: int | None = None
) -> list[torch.Tensor]:
    """Buffers [B, G, S, row] with room for ``capacity`` tokens, of ``limit`` at most ever.

    In the CPU's memory a long cache's heads lie further apart than their tokens need, in pages that
    are not resident before something is written to them: growing sees more of the same storage.
    Where there is no such room, or not enough, they are copies.
    """
    device = buffers[0].device
    mapped = maps(device)
    if mapped and all(capacity <= room(old) for old in buffers):
        return [_with_tokens(old, capacity) for old in buffers]
    shapes = [((*old.shape[:2], capacity, old.shape[3]), old.dtype) for old in buffers]
    made = _with_reserve(shapes, capacity, limit) if mapped else None
    made = made or zeros(*shapes, device=device)
    for old, grown in zip(buffers, made, strict=True):
        grown[:, :, : old.shape[2]] = old
    return made


def room(buffer: torch.Tensor) -> int:
    """How many tokens the storage of a buffer [B, G, S, row] has room for, S or more."""
    batch, heads, slots, row = buffer.shape
    if row == 0:  # of biases that a format does not have
        return 1 << 62
    vectors = batch * heads
    if vectors == 0 or slots == 0:
        return slots
    found = buffer.untyped_storage().nbytes() // (vectors * row * buffer.itemsize)
    return found if buffer.stride()[:2] == (heads * found * row, found * row) else slots


def compact(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, or a copy if its storage has room for more than its tokens."""
    if buffer.dim() < 4 or buffer.shape[3] == 0 or room(buffer) == buffer.shape[2]:
        return buffer
    return buffer.clone(memory_format=torch.contiguous_format)


def _with_tokens(buffer: torch.Tensor, tokens: int) -> torch.Tensor:
    """Another tensor of the same storage: no view, which would hold on to the shorter one."""
    shape = *buffer.shape[:2], tokens, buffer.shape[3]
    if buffer.shape[3] == 0:
        return buffer.new_empty(shape)
    return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, shape, buffer.stride())


def _with_reserve(
    shapes: Sequence[tuple[Sequence[int], torch.dtype]], capacity: int, limit: int | None
) -> list[torch.Tensor] | None:
    """Zero buffers of these shapes whose storage has room for many more tokens."""
    of_token = sum(shape[3] * dtype.itemsize for shape, dtype in shapes)
    if capacity * of_token < _RESERVING_PAGES * mmap.PAGESIZE or 0 in shapes[0][0][:2]:
        return None
    tokens = limit or max(8 * capacity, _RESERVED_TOKENS)
    while limit or tokens >= 2 * capacity:
        # Scales of a head begin a cache line; heads do not all begin in the same sets of the cache.
        tokens = limit or (tokens // 32 | 1) * 32
        made = reserved(*(((*s[:2], tokens, s[3]), dtype) for s, dtype in shapes))
        if made is not None:
            return [_with_tokens(x, capacity) for x in made]
        if limit:
            return None
        tokens //= 4
    return None


def after_slots(cached: Packed, slots: torch.Tensor, new: Packed) -> Packed:
    """The rows of ``cached`` in slots [B, N], followed by ``new``."""
    index = slots[:, None, :, None]
    return Packed(
        *(
            torch.cat([c.gather(2, index.expand(-1, c.shape[1], -1, c.shape[3])), n], dim=2)
            for c, n in zip(cached, new, strict=True)
        )
    )


def write_first(window: torch.Tensor, x: torch.Tensor, position: int | torch.Tensor) -> None:
    """Put those of x's tokens that are among a row's first N into window [B, G, N, D].

    Without reading ``position`` on the host: every slot looks up the token it would take.
    """
    if x.shape[2] == 0:
        return
    batch, count = window.shape[0], window.shape[2]
    if not isinstance(position, torch.Tensor):
        position = torch.full((batch,), position, device=x.device)
    source = torch.arange(count, device=x.device) - position.expand(batch)[:, None]
    inside = (source >= 0) & (source < x.shape[2])
    index = source.clamp(0, x.shape[2] - 1)[:, None, :, None]
    chosen = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])).to(window.dtype)
    window.copy_(torch.where(inside[:, None, :, None], chosen, window))


def with_exact(
    x: torch.Tensor,
    first: torch.Tensor,
    recent: torch.Tensor,
    positions: torch.Tensor,
    ends: tuple[int, int | torch.Tensor, int | torch.Tensor],
) -> torch.Tensor:
    """x [B, G, T, D] with the full-precision first and recent tokens put over it.

    Args:
        first, recent: the windows [B, G, N, D]; position p lives in slot p mod N.
        positions: of x's tokens, int64 [T].
        ends: end of the first tokens, start of the recent ones and their end; [B, 1] or ints.
    """
    first_end, recent_start, length = ends
    rows = positions.expand(x.shape[0], -1)
    is_recent = (rows >= recent_start) & (rows < length) & (rows >= first_end)
    for window, chosen in ((first, rows < first_end), (recent, is_recent)):
        if window.shape[2]:
            exact = window.index_select(2, positions % window.shape[2])
            x = torch.where(chosen[:, None, :, None], exact, x)
    return x
