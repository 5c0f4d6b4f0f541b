"""Moving a cache's token slots about: growing, gathering, keeping the first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_kvq.memory import zeros
from torch_kvq.ops import Packed


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


def grow(buffers: Sequence[torch.Tensor], capacity: int) -> list[torch.Tensor]:
    """Copies of buffers [B, G, S, row] with room for ``capacity`` tokens."""
    specs = [((*old.shape[:2], capacity, old.shape[3]), old.dtype) for old in buffers]
    made = zeros(*specs, device=buffers[0].device)
    for old, grown in zip(buffers, made, strict=True):
        grown[:, :, : old.shape[2]] = old
    return made


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
