"""Typed wrappers of ``torch.ops.kvq.*``.

Letters: B batch, H query heads, G KV heads (H a multiple of G), L query tokens, S cache capacity,
T valid cache tokens, D key head size, Dv value head size. A packed tensor is ``codes``, ``scales``
and ``biases``, each [B, G, S, row]; the last two have rows of 0 for a format that has none.

A ``format`` is a :class:`~torch_kvq.formats.KVFormat` or its name, ``"int4"``, ``"int4-g32"``,
``"int4-g64-rot"``. Where it rotates and no ``signs`` are given, the default signs of its head size
are used. Floating-point arguments are float32, float16 or bfloat16 and may be views with any
strides and storage offset, on the CPU or on MPS. A request that is refused raises before anything
is written, with a message ``[kvq.<op>] <argument> ... expected ... got``: ValueError for shapes and
formats, TypeError for dtypes, IndexError for positions. No op has a derivative: backward raises.

NaN anywhere in a group decodes to NaN; infinities saturate to the largest finite value the format
holds (``none`` keeps them).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

import torch_kvq._C as _C
from torch_kvq.codebooks import hadamard_signs
from torch_kvq.formats import KVFormat

_kvq = torch.ops.kvq
Format = KVFormat | str


class Packed(NamedTuple):
    """One side (K or V) of a cache: codes, scales, biases, each [B, G, S, row]."""

    codes: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor


@lru_cache(maxsize=64)
def _kept_signs(head_dim: int, device: torch.device) -> torch.Tensor:
    return hadamard_signs(head_dim, device=device)


@torch.compiler.assume_constant_result
def default_signs(head_dim: int, device: torch.device) -> torch.Tensor:
    """The default random signs of a head size, float32 [head_dim]."""
    # Under a dispatch mode (fake tensors, say) tensors belong to it and must not be kept.
    make = hadamard_signs if torch._C._len_torch_dispatch_stack() else _kept_signs
    return make(head_dim, device=device)


def _signs(fmt: KVFormat, given: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """``given``, or the default signs of x's head size where the format rotates."""
    if given is not None or not fmt.rotate:
        return given
    return default_signs(x.shape[-1], x.device)


def _stored_signs(fmt: KVFormat, given: torch.Tensor | None, packed: Packed) -> torch.Tensor | None:
    if given is not None or not fmt.rotate:
        return given
    codes = packed[0]
    return default_signs(fmt.head_dim(codes.shape[-1]), codes.device)


def _call(
    op: str,
    position: torch.Tensor | int,
    required: tuple[Any, ...],
    names: tuple[str, ...] = (),
    options: tuple[Any, ...] = (),
) -> Any:
    """An op with two overloads, for a position that is a tensor or an int.

    An eager call goes to the dispatcher by ``_C``: parsing the arguments by their schema, as
    torch.ops does, costs more than quantising a token. It declines what only torch.ops can parse.
    """
    if not is_dynamo_compiling():
        result = getattr(_C, op)(required, options)
        if result is not NotImplemented:
            return result
    packet = getattr(_kvq, op)
    overload = packet.default if isinstance(position, torch.Tensor) else packet.int
    return overload(*required, **dict(zip(names, options, strict=True)))


def kv_cache_update_(
    cache: torch.Tensor, src: torch.Tensor, position: torch.Tensor | int
) -> torch.Tensor:
    """Write src [B, G, L, D] into the dense cache [B, G, S, D] at slots position .. position+L-1.

    Args:
        cache: changed in place; any float dtype, src is cast to it.
        position: int, or an int32/int64 tensor [] or [B] on the cache's device.

    Returns:
        cache.

    Raises:
        IndexError: a position is negative or position + L exceeds S.
    """
    _call("kv_cache_update_", position, (cache, src, position))
    return cache


def quantize(
    x: torch.Tensor,
    format: Format,
    *,
    signs: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    encoder: str = "default",
    scale_dtype: torch.dtype | None = None,
) -> Packed:
    """Pack x [B, G, L, D].

    Args:
        signs: float32 [D] of +-1: rotate by H(signs * x) before encoding.
        mean: float32 [G, D], subtracted before the rotation.
        encoder: how codes are chosen, never how they are read. ``"default"``, or for tq formats
            ``"unbiased"``, whose norm makes dot products with x unbiased (use it for K).
        scale_dtype: dtype of scales and biases; float16 for half and bfloat16 x, else float32.

    Returns:
        Packed tensors with S = L.
    """
    fmt = KVFormat.parse(format)
    return Packed(
        *_kvq.quantize(
            x,
            fmt.name,
            fmt.group_size,
            signs=_signs(fmt, signs, x),
            mean=mean,
            encoder=encoder,
            scale_dtype=scale_dtype,
        )
    )


def quantize_into_(
    packed: Packed,
    x: torch.Tensor,
    position: torch.Tensor | int,
    format: Format,
    *,
    signs: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    encoder: str = "default",
    ring: bool = False,
) -> Packed:
    """Quantise x [B, G, L, D] straight into slots position .. position+L-1 of packed [B, G, S].

    No other slot is touched. Arguments as in :func:`quantize` and :func:`kv_cache_update_`.

    Args:
        ring: slots are taken modulo S; of more than S tokens only the last S are kept.
    """
    fmt = KVFormat.parse(format)
    _call(
        "quantize_into_",
        position,
        (*packed, x, position, fmt.name, fmt.group_size),
        ("signs", "mean", "encoder", "ring"),
        (_signs(fmt, signs, x), mean, encoder, ring),
    )
    return packed


def append_(
    keys: Packed,
    values: Packed,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor | int,
    k_format: Format,
    v_format: Format,
    *,
    k_signs: torch.Tensor | None = None,
    v_signs: torch.Tensor | None = None,
    k_mean: torch.Tensor | None = None,
    v_mean: torch.Tensor | None = None,
    k_encoder: str = "default",
    v_encoder: str = "default",
    ring: bool = False,
) -> None:
    """:func:`quantize_into_` of a step's key [B, G, L, D] and value [B, G, L, Dv] in one launch."""
    k, v = KVFormat.parse(k_format), KVFormat.parse(v_format)
    _call(
        "append_",
        position,
        (
            *keys, *values, key, value, position,
            k.name, k.group_size, v.name, v.group_size,
        ),
        ("k_signs", "v_signs", "k_mean", "v_mean", "k_encoder", "v_encoder", "ring"),
        (
            _signs(k, k_signs, key), _signs(v, v_signs, value), k_mean, v_mean,
            k_encoder, v_encoder, ring,
        ),
    )  # fmt: skip


def dequantize(
    packed: Packed,
    format: Format,
    *,
    signs: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    start: int = 0,
    length: int | None = None,
) -> torch.Tensor:
    """Tokens start .. start+length-1 as [B, G, length, D] of dtype (float32 unless given).

    Any range gives bit for bit what its single tokens give. With a format that does not rotate,
    rotated data comes back in the rotated domain.
    """
    fmt = KVFormat.parse(format)
    return _kvq.dequantize(
        *packed,
        fmt.name,
        fmt.group_size,
        signs=_stored_signs(fmt, signs, packed),
        mean=mean,
        dtype=dtype,
        start=start,
        length=length,
    )


def qdq(
    x: torch.Tensor,
    format: Format,
    *,
    signs: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    encoder: str = "default",
    scale_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Quantise and dequantise x [B, G, L, D]: what a cache of this format would return for it."""
    fmt = KVFormat.parse(format)
    return _kvq.qdq(
        x,
        fmt.name,
        fmt.group_size,
        signs=_signs(fmt, signs, x),
        mean=mean,
        encoder=encoder,
        scale_dtype=scale_dtype,
    )


def hadamard(
    x: torch.Tensor, signs: torch.Tensor | None = None, inverse: bool = False
) -> torch.Tensor:
    """Sign flips and the orthonormal Walsh-Hadamard transform along x's last dimension.

    H(signs * x) / sqrt(n), or with ``inverse`` signs * H(x) / sqrt(n); n is the largest power of
    two that divides D, and the transform is block-wise where D is not one. Computed in float32.

    Args:
        x: [..., D].
        signs: float32 [D] or None.
    """
    return _kvq.hadamard(x, signs, inverse)


def attention(
    query: torch.Tensor,
    keys: Packed,
    values: Packed,
    kv_length: torch.Tensor | int,
    k_format: Format,
    v_format: Format,
    *,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_signs: torch.Tensor | None = None,
    v_signs: torch.Tensor | None = None,
    k_mean: torch.Tensor | None = None,
    v_mean: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    causal: bool = True,
    ring: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused attention that reads packed codes; query heads share KV heads without expansion.

    Query i of a row sits at token position kv_length - L + i (causal, lower right).

    Args:
        query: [B, H, L, D].
        keys, values: packed K [B, G, S, row(D)] and V [B, G, S, row(Dv)].
        kv_length: tokens the cache holds, the L newest included: int, or int32/int64 [] or [B].
        kv_start: first visible position, [] or [B] (left padding).
        kv_end: end of the visible positions, [] or [B].
        mask: bool (True: attend) or float (added), broadcastable to [B, H, L, M]; column j is
            position max(kv_length - M, 0) + j, and positions outside the columns are masked.
        sinks: [H] logits that join every denominator.
        scale: of the scores, 1/sqrt(D) unless given.
        softcap: c > 0 makes scores c * tanh(score / c), before the mask.
        window: > 0: a query sees only the last ``window`` positions, its own included.
        ring: position p lives in slot p mod S; the last min(kv_length, S) tokens are held.

    Returns:
        out [B, H, L, Dv] in query's dtype and lse [B, H, L] float32, the log of the sum of
        exponentials of a row's scores (and sink). A row that sees nothing gives zeros and -inf.
    """
    k, v = KVFormat.parse(k_format), KVFormat.parse(v_format)
    return _call(
        "attention",
        kv_length,
        (
            query, *keys, *values, kv_length,
            k.name, k.group_size, v.name, v.group_size,
        ),
        (
            "kv_start", "kv_end", "mask", "sinks", "k_signs", "v_signs", "k_mean", "v_mean",
            "scale", "softcap", "window", "causal", "ring",
        ),
        (
            kv_start, kv_end, mask, sinks, _signs(k, k_signs, query),
            _stored_signs(v, v_signs, values), k_mean, v_mean,
            scale, softcap, window, causal, ring,
        ),
    )  # fmt: skip


def merge_attention(
    parts: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint sets of keys: [(out, lse), ...] to the (out, lse) of all.

    Weights are exp(lse - max lse), as in split-KV decoding. Parts are float32 for full precision.
    """
    lse = torch.stack([part[1] for part in parts])
    top = lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)
    weights = (lse - top).exp()
    total = weights.sum(0)
    out = sum(
        (weights[i].unsqueeze(-1) * part[0].float() for i, part in enumerate(parts)),
        start=torch.zeros((), device=lse.device),
    )
    out = out / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out.to(parts[0][0].dtype), top + total.log()


def mlx_native_dequantize(
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
    """Read mlx-native's TurboQuant cache layout as dense float32 [B, G, length, D].

    Args:
        codes: uint8 [B, G, S, D/2] nibbles (4 bits; low nibble first) or [B, G, S, D] bytes (5, 6
            and 8 bits).
        norms: float32 [B, G, S, max(1, D/256)]. D <= 256: the L2 norm, value = c * norm / sqrt(D).
            D = 512: the RMS of each 256 coordinates, value = c * norm / scale_factor_d512.
        codebook: float32 [2**bits]; this project's centroids unless given. mlx-native's own 6- and
            8-bit tables differ from them: pass its table to read its caches exactly.
        rotate_back: undo the Hadamard rotation (with ``signs``, its sign flips too); otherwise
            values stay in the rotated domain.
        start, length: tokens to read; one position is length=1.
    """
    return _kvq.mlx_native_dequantize(
        codes,
        norms,
        bits,
        codebook=codebook,
        scale_factor_d512=scale_factor_d512,
        signs=signs,
        rotate_back=rotate_back,
        start=start,
        length=length,
    )


def q4_k_quantize(w: torch.Tensor) -> torch.Tensor:
    """GGUF Q4_K super-blocks of weights: 256 values in 144 bytes, 4.5 bits each.

    The scales are searched as llama.cpp's quantize_row_q4_K_ref does. Values are clamped to
    [-4126752, 61901280], what float16 scales can hold; a NaN makes its super-block NaN.

    Args:
        w: [..., K], K a multiple of 256.

    Returns:
        uint8 [..., K / 256 * 144].
    """
    return _kvq.q4_k_quantize(w)


def q4_k_dequantize(blocks: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Values of GGUF Q4_K super-blocks, bit for bit the ``gguf`` package's in float32.

    Args:
        blocks: uint8 [..., K / 256 * 144].
        dtype: of the result, float32 unless given.

    Returns:
        [..., K].
    """
    return _kvq.q4_k_dequantize(blocks, dtype=dtype)


def q4_k_gemv(
    x: torch.Tensor,
    blocks: torch.Tensor,
    byte_offset: int = 0,
    rows: int | None = None,
    *,
    exact: bool = False,
) -> torch.Tensor:
    """x @ w.T for one vector x and the Q4_K weights w [N, K], which are never expanded.

    Sums are float32. Unless ``exact``, a CPU may round x to 16-bit integers, relative to the
    largest of each 256 values: an error of at most 2**-16 of that value per element.

    Args:
        x: [K] or [..., K] with one vector, K a multiple of 256.
        blocks: uint8 [N, K / 256 * 144], rows contiguous; or any contiguous buffer, a memory-mapped
            file for instance, of which nothing is copied.
        byte_offset: where the first row starts in a buffer, even.
        rows: N, for a buffer; all that follow byte_offset unless given.
        exact: multiply x as it is.

    Returns:
        [..., N] in x's dtype.
    """
    return _kvq.q4_k_gemv(x, blocks, byte_offset, rows, exact=exact)


def q4_k_matmul(
    x: torch.Tensor,
    blocks: torch.Tensor,
    byte_offset: int = 0,
    rows: int | None = None,
    *,
    exact: bool = False,
) -> torch.Tensor:
    """x @ w.T for any number of vectors x; arguments are those of :func:`q4_k_gemv`.

    Up to 8 vectors share each super-block that is decoded. For more, tiles of w are dequantised
    into a workspace of a few MiB.

    Args:
        x: [..., K].

    Returns:
        [..., N] in x's dtype.
    """
    return _kvq.q4_k_matmul(x, blocks, byte_offset, rows, exact=exact)
