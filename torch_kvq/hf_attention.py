"""The attention and mask functions that are registered with transformers as ``"kvq"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask

from torch_kvq import ops
from torch_kvq.hf_carriers import KVQHandle, KVQTensor
from torch_kvq.ops import Packed

NAME = "kvq"


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | KVQHandle | KVQTensor,
    value: torch.Tensor | KVQHandle | KVQTensor,
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
    if isinstance(key, KVQTensor):
        key = key.proxy
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
    if attention_mask is not None:
        # sdpa_mask's own padding compares kv_offset with a size, and a static ring's is a tensor.
        mask_function = and_masks(mask_function, _not_padding(attention_mask))
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,  # type: ignore[arg-type]
        mask_function=mask_function,
        attention_mask=None,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def _not_padding(attention_mask: torch.Tensor) -> Callable:
    """The pattern of a 2D mask, False for positions outside of it."""
    columns = attention_mask.shape[1]

    def pattern(batch: torch.Tensor, head: object, query: object, key: torch.Tensor) -> Any:
        inside = (key >= 0) & (key < columns)
        return attention_mask[batch, key.clamp(0, columns - 1)] & inside

    return pattern


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
    if torch.compiler.is_compiling():
        return False  # the answer would be a tensor
    query = 4 * size  # the first position of a chunk
    inside = pattern(0, 0, torch.tensor(query), torch.tensor(query - size + 1))
    outside = pattern(0, 0, torch.tensor(query), torch.tensor(query - size))
    return bool(inside) and not bool(outside)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_function)
