"""Fake (meta) implementations of every op: shapes from formats.py, nothing computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

from torch_kvq.formats import KVFormat, default_scale_dtype

_F = TypeVar("_F", bound=Callable[..., object])


def register_fake(name: str) -> Callable[[_F], _F]:
    """torch.library.register_fake; also refuses tensors of different devices, as kernels do.

    A meta tensor among real ones dispatches here, and would else be accepted in silence.
    """

    def register(function: _F) -> _F:
        op = name.removeprefix("kvq::").partition(".")[0]

        @wraps(function)
        def checked(*args: object, **kwargs: object) -> object:
            given = (*args, *kwargs.values())
            devices = {str(t.device): None for t in given if isinstance(t, torch.Tensor)}
            if len(devices) > 1:
                raise ValueError(
                    f"[kvq.{op}] all tensors must be on one device, got {' and '.join(devices)}"
                )
            return function(*args, **kwargs)

        torch.library.register_fake(name, checked)
        return function

    return register


def _packed(
    x: torch.Tensor, fmt: KVFormat, scale_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lead, head_dim = x.shape[:3], x.shape[3]
    scale_dtype = scale_dtype or default_scale_dtype(x.dtype)
    return (
        x.new_empty(*lead, fmt.codes_row(head_dim), dtype=fmt.codes_dtype(x.dtype)),
        x.new_empty(*lead, fmt.scales_row(head_dim), dtype=scale_dtype),
        x.new_empty(*lead, fmt.biases_row(head_dim), dtype=scale_dtype),
    )


@register_fake("kvq::quantize")
def _quantize(
    x: torch.Tensor,
    format: str,
    group_size: int = 0,
    *,
    signs: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    encoder: str = "default",
    scale_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fmt = KVFormat(format, group_size)
    fmt.check_head_dim(x.shape[3], "quantize")
    return _packed(x, fmt, scale_dtype)


@register_fake("kvq::qdq")
def _qdq(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("kvq::dequantize")
def _dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor,
    format: str,
    group_size: int = 0,
    *,
    signs: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    start: int = 0,
    length: int | None = None,
) -> torch.Tensor:
    head_dim = KVFormat(format, group_size).head_dim(codes.shape[3])
    length = codes.shape[2] - start if length is None else length
    shape = (codes.shape[0], codes.shape[1], length, head_dim)
    return codes.new_empty(shape, dtype=dtype or torch.float32)


@register_fake("kvq::hadamard")
def _hadamard(
    x: torch.Tensor, signs: torch.Tensor | None = None, inverse: bool = False
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("kvq::mlx_native_dequantize")
def _mlx_native_dequantize(
    codes: torch.Tensor,
    norms: torch.Tensor,
    bits: int,
    *,
    codebook: torch.Tensor | None = None,
    scale_factor_d512: float = 1.0,
    signs: torch.Tensor | None = None,
    rotate_back: bool = False,
    start: int = 0,
    length: int | None = None,
) -> torch.Tensor:
    length = codes.shape[2] - start if length is None else length
    head_dim = codes.shape[3] * (2 if bits == 4 else 1)
    return norms.new_empty(codes.shape[0], codes.shape[1], length, head_dim)


@register_fake("kvq::q4_k_quantize")
def _q4_k_quantize(w: torch.Tensor) -> torch.Tensor:
    return w.new_empty(*w.shape[:-1], w.shape[-1] // 256 * 144, dtype=torch.uint8)


@register_fake("kvq::q4_k_dequantize")
def _q4_k_dequantize(blocks: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    shape = (*blocks.shape[:-1], blocks.shape[-1] // 144 * 256)
    return blocks.new_empty(shape, dtype=dtype or torch.float32)


def _q4_k_product(
    x: torch.Tensor,
    blocks: torch.Tensor,
    byte_offset: int = 0,
    rows: int | None = None,
    *,
    exact: bool = False,
) -> torch.Tensor:
    if rows is None and blocks.dim() == 2 and byte_offset == 0:
        rows = blocks.shape[0]
    elif rows is None:
        rows = (blocks.numel() - byte_offset) // (x.shape[-1] // 256 * 144)
    return x.new_empty(*x.shape[:-1], rows)


def _attention(
    query: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    k_biases: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    v_biases: torch.Tensor,
    kv_length: torch.Tensor | int,
    k_format: str,
    k_group_size: int,
    v_format: str,
    v_group_size: int,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    value_dim = KVFormat(v_format, v_group_size).head_dim(v_codes.shape[3])
    lead = query.shape[:3]
    return query.new_empty(*lead, value_dim), query.new_empty(lead, dtype=torch.float32)


def _writes(*args: object, **kwargs: object) -> None:
    return None


register_fake("kvq::q4_k_gemv")(_q4_k_product)
register_fake("kvq::q4_k_matmul")(_q4_k_product)
for _overload in ("", ".int"):
    register_fake(f"kvq::attention{_overload}")(_attention)
    for _op in ("kv_cache_update_", "quantize_into_", "append_"):
        register_fake(f"kvq::{_op}{_overload}")(_writes)
