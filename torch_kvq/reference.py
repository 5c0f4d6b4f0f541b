"""The formats and ops in plain PyTorch: the specification in code and the oracle of the tests.

Every rule is stated in float32 arithmetic with one rounding per written operation (no fused
multiply-add), so that CPU and Metal kernels can reproduce codes, scales and biases byte for byte.
Signatures follow :mod:`torch_kvq.ops`; shapes use its letters.
"""

from __future__ import annotations

import math

import torch

from torch_kvq.codebooks import boundaries, codebook, hadamard_block
from torch_kvq.formats import GGUF_BLOCK_BYTES, KVFormat, default_scale_dtype

F16_MAX = 65504.0
#: Inputs are clamped to these before arithmetic on them could overflow float32.
LIMIT = 2.0**126
ROTATED_LIMIT = 2.0**56
#: The least and the largest value of a Q4_K block with float16 scales, and the least span of a
#: sub-block whose scale is not 0.
Q4_K_LOWEST, Q4_K_HIGHEST, Q4_K_LEAST_SPAN = -63 * F16_MAX, 945 * F16_MAX, 2.0**-30
FP8 = {"fp8_e4m3": (torch.float8_e4m3fn, 448.0), "fp8_e5m2": (torch.float8_e5m2, 57344.0)}


def round_scale(x: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    """Round to the stored dtype, saturating at float16's largest finite value; one NaN."""
    if scale_dtype == torch.float16:
        x = x.clamp(-F16_MAX, F16_MAX)
    # Converted on its own: torch's vectorised conversions to bfloat16 have another NaN.
    nan = torch.tensor(math.nan, dtype=scale_dtype, device=x.device)
    return torch.where(x.isnan(), nan, x.to(scale_dtype))


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., N] codes to [..., N*bits/8] bytes, least significant bit first."""
    shifts = torch.arange(bits, device=codes.device)
    stream = (codes.to(torch.int64).unsqueeze(-1) >> shifts) & 1
    stream = stream.flatten(-2).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., M] bytes to [..., M*8/bits] int64 codes: the inverse of :func:`pack_bits`."""
    stream = (packed.to(torch.int64).unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1
    stream = stream.flatten(-2).unflatten(-1, (-1, bits))
    return (stream << torch.arange(bits, device=packed.device)).sum(-1)


def hadamard(
    x: torch.Tensor, signs: torch.Tensor | None = None, inverse: bool = False
) -> torch.Tensor:
    """Sign flips and the orthonormal block Walsh-Hadamard transform along the last dimension."""
    y = x.float()
    size = y.shape[-1]
    block = hadamard_block(size)
    if signs is not None and not inverse:
        y = y * signs
    half = 1
    while half < block:
        y = y.unflatten(-1, (-1, 2, half))
        a, b = y[..., 0, :], y[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    y = y * torch.tensor(1.0 / math.sqrt(block), dtype=torch.float32)
    if signs is not None and inverse:
        y = y * signs
    return to_dtype(y, x.dtype)


def _sum32(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension in the order the kernels use, [..., D] to [..., 1].

    32 lanes each add their elements j, j+32, j+64, ... in turn; then lanes are added pairwise at
    distances 16, 8, 4, 2, 1: a simdgroup's butterfly.
    """
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    lanes = x[..., 0, :]
    for i in range(1, x.shape[-2]):
        lanes = lanes + x[..., i, :]
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes[..., :distance] + lanes[..., distance:]
    return lanes


def _prepare(
    x: torch.Tensor, fmt: KVFormat, signs: torch.Tensor | None, mean: torch.Tensor | None
) -> torch.Tensor:
    """Centre, then rotate: what the encoder of the format sees, float32."""
    y = x.float()
    if mean is not None:
        y = y - mean[:, None, :]
    if signs is not None or fmt.family == "turboquant":
        y = y.clamp(-ROTATED_LIMIT, ROTATED_LIMIT)
    if signs is not None:
        y = hadamard(y, signs)
    return y


def _encode_affine(y, fmt, scale_dtype):
    levels = 2**fmt.bits - 1
    limit = F16_MAX if scale_dtype == torch.float16 else LIMIT
    groups = y.clamp(-limit, limit).unflatten(-1, (-1, fmt.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    low = torch.where(low == 0, 0.0, low)  # one zero: +0
    biases = round_scale(low, scale_dtype)
    scales = round_scale((high - low) / levels, scale_dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    bias, scale = biases.float().unsqueeze(-1), scales.float().unsqueeze(-1)
    codes = torch.floor((groups - bias) / scale + 0.5).clamp(0, levels)
    codes = codes.nan_to_num(0).to(torch.uint8).flatten(-2)
    return pack_bits(codes, fmt.bits), scales, biases


def _encode_fp8(y, fmt, scale_dtype):
    dtype, largest = FP8[fmt.name]
    groups = y.clamp(-LIMIT, LIMIT).unflatten(-1, (-1, fmt.group_size))
    scales = round_scale(groups.abs().amax(-1) / largest, scale_dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    scaled = (groups / scales.float().unsqueeze(-1)).clamp(-largest, largest)
    codes = scaled.nan_to_num(0).to(dtype).view(torch.uint8)
    codes = torch.where(scales.isnan().unsqueeze(-1), torch.zeros_like(codes), codes)
    return codes.flatten(-2), scales, groups.new_zeros(*y.shape[:-1], 0, dtype=scale_dtype)


def _encode_gguf(y, fmt, scale_dtype):
    """GGUF's reference quantisers, as the gguf package's quants.quantize computes them.

    Where 1/d overflows float32 (d < 2^-128, stored as 0) its bodies are zero bytes.
    """
    blocks = y.clamp(-LIMIT, LIMIT).unflatten(-1, (-1, 32))
    if fmt.name == "q8_0":
        d = blocks.abs().amax(-1, keepdim=True) / 127
        inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
        scaled = blocks * inverse
        whole = scaled.abs().floor()
        q = whole + (2 * (scaled.abs() - whole)).floor()
        body = (scaled.sign() * q).nan_to_num(0).to(torch.int8).view(torch.uint8)
    else:
        first = blocks.abs().argmax(-1, keepdim=True)
        d = blocks.gather(-1, first) / -8
        inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
        q = (blocks * inverse + 8.5).trunc().clamp(0, 15)
        q = q.nan_to_num(0).to(torch.uint8)
        body = q[..., :16] | (q[..., 16:] << 4)
    body = torch.where(d.isnan() | inverse.isinf(), torch.zeros_like(body), body)
    header = round_scale(d, torch.float16).view(torch.uint8)
    codes = torch.cat([header, body], dim=-1).flatten(-2)
    empty = y.new_zeros(*y.shape[:-1], 0, dtype=scale_dtype)
    return codes, empty, empty.clone()


def _encode_turboquant(y, fmt, scale_dtype, encoder):
    squares = _sum32(y * y)
    mean_square = squares / y.shape[-1]
    # A float64 square root, rounded, is the correctly rounded one; torch's float32 one is not.
    norms = round_scale(mean_square.double().sqrt().float(), scale_dtype)
    norm = norms.float()
    z = y / torch.where(norm == 0, torch.ones_like(norm), norm)
    codes = torch.bucketize(z.nan_to_num(0), boundaries(fmt.bits).to(y.device))
    codes = torch.where(norm.isnan(), torch.zeros_like(codes), codes)
    if encoder == "unbiased":
        # <y, norm * c> = |y|^2: dot products with y come out unbiased.
        dot = _sum32(y * codebook(fmt.bits).to(y.device)[codes])
        corrected = round_scale(squares / dot, scale_dtype)
        norms = torch.where(dot > 0, corrected, norms)
    empty = y.new_zeros(*y.shape[:-1], 0, dtype=scale_dtype)
    return pack_bits(codes, fmt.bits), norms, empty


def _encode(x, fmt, signs, mean, encoder, scale_dtype, codes_dtype):
    y = _prepare(x, fmt, signs, mean)
    if fmt.family == "affine":
        return _encode_affine(y, fmt, scale_dtype)
    if fmt.family == "fp8":
        return _encode_fp8(y, fmt, scale_dtype)
    if fmt.family == "gguf":
        return _encode_gguf(y, fmt, scale_dtype)
    if fmt.family == "turboquant":
        return _encode_turboquant(y, fmt, scale_dtype, encoder)
    empty = x.new_zeros(*x.shape[:-1], 0, dtype=scale_dtype)
    codes = y.to(codes_dtype) if signs is None else to_dtype(y, codes_dtype)
    return codes, empty, empty.clone()


def quantize(
    x, format, group_size=0, *, signs=None, mean=None, encoder="default", scale_dtype=None
):
    """x [B, G, L, D] to (codes, scales, biases)."""
    fmt = KVFormat(format, group_size)
    scale_dtype = scale_dtype or default_scale_dtype(x.dtype)
    return _encode(x, fmt, signs, mean, encoder, scale_dtype, x.dtype)


def _decode(codes, scales, biases, fmt):
    """Stored values in the stored (centred, rotated) domain, float32."""
    if fmt.family == "affine":
        q = unpack_bits(codes, fmt.bits).float().unflatten(-1, (-1, fmt.group_size))
        return (q * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)).flatten(-2)
    if fmt.family == "fp8":
        values = codes.contiguous().view(FP8[fmt.name][0]).float()
        values = values.unflatten(-1, (-1, fmt.group_size))
        return (values * scales.float().unsqueeze(-1)).flatten(-2)
    if fmt.family == "gguf":
        blocks = codes.unflatten(-1, (-1, GGUF_BLOCK_BYTES[fmt.name]))
        d = blocks[..., :2].contiguous().view(torch.float16).float()
        body = blocks[..., 2:].contiguous()
        if fmt.name == "q8_0":
            q = body.view(torch.int8).float()
        else:
            q = torch.cat([body & 15, body >> 4], dim=-1).float() - 8
        return (q * d).flatten(-2)
    if fmt.family == "turboquant":
        return codebook(fmt.bits).to(codes.device)[unpack_bits(codes, fmt.bits)] * scales.float()
    return codes.float()


def to_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast from float32; a finite value too large for float16 saturates."""
    if dtype == torch.float16:
        x = x.clamp(-F16_MAX, F16_MAX)
    return x.to(dtype)


def dequantize(
    codes,
    scales,
    biases,
    format,
    group_size=0,
    *,
    signs=None,
    mean=None,
    dtype=None,
    start=0,
    length=None,
):
    """Tokens [start, start + length) as [B, G, length, D] of dtype."""
    fmt = KVFormat(format, group_size)
    length = codes.shape[2] - start if length is None else length
    part = [t.narrow(2, start, length) for t in (codes, scales, biases)]
    y = _decode(*part, fmt)
    if signs is not None:
        y = hadamard(y, signs, inverse=True)
    if mean is not None:
        y = y + mean[:, None, :]
    dtype = dtype or torch.float32
    stored_as_is = fmt.family == "none" and signs is None and mean is None
    return y.to(dtype) if stored_as_is else to_dtype(y, dtype)


def qdq(x, format, group_size=0, *, signs=None, mean=None, encoder="default", scale_dtype=None):
    """quantize, then dequantize to x's dtype."""
    packed = quantize(
        x,
        format,
        group_size,
        signs=signs,
        mean=mean,
        encoder=encoder,
        scale_dtype=scale_dtype,
    )
    return dequantize(*packed, format, group_size, signs=signs, mean=mean, dtype=x.dtype)


def _rows(position, batch):
    return torch.as_tensor(position).reshape(-1).expand(batch).tolist()


def _write(cache, src, position, ring):
    capacity, count = cache.shape[2], src.shape[2]
    for row, first in enumerate(_rows(position, cache.shape[0])):
        for token in range(max(0, count - capacity) if ring else 0, count):
            slot = (first + token) % capacity if ring else first + token
            cache[row, :, slot] = src[row, :, token]


def kv_cache_update_(cache, src, position):
    """cache [B, G, S, D] takes src [B, G, L, D] at slots position .. position + L - 1."""
    _write(cache, src.to(cache.dtype), position, ring=False)


def quantize_into_(
    codes,
    scales,
    biases,
    x,
    position,
    format,
    group_size=0,
    *,
    signs=None,
    mean=None,
    encoder="default",
    ring=False,
):
    """Quantise L tokens straight into their slots; with ring, slots are taken modulo S."""
    fmt = KVFormat(format, group_size)
    packed = _encode(x, fmt, signs, mean, encoder, scales.dtype, codes.dtype)
    for cache, src in zip((codes, scales, biases), packed, strict=True):
        _write(cache, src, position, ring)


def append_(
    k_codes,
    k_scales,
    k_biases,
    v_codes,
    v_scales,
    v_biases,
    k,
    v,
    position,
    k_format,
    k_group_size,
    v_format,
    v_group_size,
    *,
    k_signs=None,
    v_signs=None,
    k_mean=None,
    v_mean=None,
    k_encoder="default",
    v_encoder="default",
    ring=False,
):
    """quantize_into_ of K and of V."""
    k_cache, v_cache = (k_codes, k_scales, k_biases), (v_codes, v_scales, v_biases)
    quantize_into_(
        *k_cache,
        k,
        position,
        k_format,
        k_group_size,
        signs=k_signs,
        mean=k_mean,
        encoder=k_encoder,
        ring=ring,
    )
    quantize_into_(
        *v_cache,
        v,
        position,
        v_format,
        v_group_size,
        signs=v_signs,
        mean=v_mean,
        encoder=v_encoder,
        ring=ring,
    )


def visible(
    batch, queries, capacity, kv_length, *, kv_start=None, kv_end=None, window, causal, ring
):
    """(positions [B, S], keep [B, L, S]): each slot's token position and which queries see it."""
    slots = torch.arange(capacity)
    length = torch.as_tensor(kv_length).reshape(-1, 1).expand(batch, 1)
    if ring:
        positions = length - 1 - (length - 1 - slots) % max(capacity, 1)
    else:
        positions = slots.expand(batch, capacity)
    keep = (positions >= 0) & (positions < length)
    if kv_start is not None:
        keep = keep & (positions >= kv_start.reshape(-1, 1).expand(batch, 1))
    if kv_end is not None:
        keep = keep & (positions < kv_end.reshape(-1, 1).expand(batch, 1))
    query_position = length - queries + torch.arange(queries)
    keep = keep[:, None, :].expand(batch, queries, capacity)
    distance = query_position[:, :, None] - positions[:, None, :]
    if causal:
        keep = keep & (distance >= 0)
    if window > 0:
        keep = keep & (distance < window)
    return positions, keep


def attention(
    query,
    k_codes,
    k_scales,
    k_biases,
    v_codes,
    v_scales,
    v_biases,
    kv_length,
    k_format,
    k_group_size,
    v_format,
    v_group_size,
    *,
    kv_start=None,
    kv_end=None,
    mask=None,
    sinks=None,
    k_signs=None,
    v_signs=None,
    k_mean=None,
    v_mean=None,
    scale=None,
    softcap=0.0,
    window=0,
    causal=True,
    ring=False,
    compute=torch.float64,
):
    """Attention in float64, or dtype ``compute``, on the dequantised values; see ops.attention for
    the meaning."""
    key = dequantize(
        k_codes, k_scales, k_biases, k_format, k_group_size, signs=k_signs, mean=k_mean
    ).to(compute)
    value = dequantize(
        v_codes, v_scales, v_biases, v_format, v_group_size, signs=v_signs, mean=v_mean
    ).to(compute)
    batch, heads, queries, head_dim = query.shape
    groups, capacity = key.shape[1], key.shape[2]
    positions, keep = visible(
        batch,
        queries,
        capacity,
        kv_length,
        kv_start=kv_start,
        kv_end=kv_end,
        window=window,
        causal=causal,
        ring=ring,
    )
    keep = keep[:, None]
    key, value = (t.repeat_interleave(heads // groups, 1) for t in (key, value))
    # What no query may see must not matter, whatever the slot holds.
    unseen = ~keep.any(2).any(1)[:, None, :, None]
    key, value = key.masked_fill(unseen, 0), value.masked_fill(unseen, 0)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scores = query.to(compute) @ key.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        columns = mask.shape[-1]
        length = torch.as_tensor(kv_length).reshape(-1, 1).expand(batch, 1)
        column = positions - (length - columns).clamp_min(0)
        keep = keep & ((column >= 0) & (column < columns))[:, None, None]
        index = column.clamp(0, max(columns - 1, 0))[:, None, None].expand_as(scores)
        chosen = mask.expand(batch, heads, queries, columns).gather(-1, index)
        if mask.dtype == torch.bool:
            keep = keep & chosen
        else:
            scores = scores + chosen.to(compute)
    scores = scores.masked_fill(~keep, -math.inf)
    if sinks is not None:
        sink = sinks.to(compute).view(1, -1, 1, 1).expand(batch, heads, queries, 1)
        scores = torch.cat([scores, sink], -1)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).nan_to_num(0)
    weights = torch.where(lse.isnan().unsqueeze(-1), torch.nan, weights)
    return (weights @ value).to(query.dtype), lse.float()


def mlx_native_dequantize(
    codes,
    norms,
    bits,
    *,
    codebook=None,
    scale_factor_d512=1.0,
    signs=None,
    rotate_back=False,
    start=0,
    length=None,
):
    """mlx-native's TurboQuant layout as dense float32; see ops.mlx_native_dequantize."""
    from torch_kvq import codebooks

    length = codes.shape[2] - start if length is None else length
    codes, norms = codes.narrow(2, start, length), norms.narrow(2, start, length)
    table = codebooks.codebook(bits) if codebook is None else codebook
    index = unpack_bits(codes, 4) if bits == 4 else codes.long() & (2**bits - 1)
    head_dim = index.shape[-1]
    if head_dim > 256:
        factor = norms / torch.tensor(scale_factor_d512, dtype=torch.float32)
    else:
        factor = norms * torch.tensor(1 / math.sqrt(head_dim), dtype=torch.float32)
    factor = factor.repeat_interleave(head_dim // norms.shape[-1], -1)
    y = table.to(codes.device)[index] * factor
    return hadamard(y, signs, inverse=True) if rotate_back else y


def _q4_k_search(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum, both >= 0, of sub-blocks [..., 32]: x is about scale * q - minimum.

    llama.cpp's make_qkx2_quants with its parameters for Q4_K: of 22 grids the one of least squared
    error weighted by rms(x) + |x|. A step's codes start at the best minimum so far, and the grid is
    fitted to them. Sums run in the order of _sum32, where llama.cpp adds one after the other.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    weights = (_sum32(x * x) / 32).double().sqrt().float() + x.abs()
    sum_w, sum_x = _sum32(weights), _sum32(weights * x)

    def fit(numerator: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        return ((numerator / (high - minimum)) * (x - minimum)).clamp(0, 15).round()

    def error(q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        difference = (scale * q + minimum) - x
        return _sum32(weights * (difference * difference))

    one, numerator = torch.tensor(1.0), torch.tensor(15.0)
    scale, minimum = one / (numerator / (high - low)), low
    best = error(fit(numerator, low), scale, low)
    for step in range(21):
        q = fit(torch.tensor(0.1) * step + 14, minimum)
        weighted = weights * q
        sum_q, sum_q2, sum_xq = _sum32(weighted), _sum32(weighted * q), _sum32(weighted * x)
        determinant = sum_w * sum_q2 - sum_q * sum_q
        new_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant
        new_minimum = (sum_q2 * sum_x - sum_q * sum_xq) / determinant
        positive = new_minimum > 0
        new_scale = torch.where(positive, sum_xq / sum_q2, new_scale)
        new_minimum = torch.where(positive, torch.zeros_like(low), new_minimum)
        new_error = error(q, new_scale, new_minimum)
        better = (determinant > 0) & (new_error < best)
        better &= high - new_minimum >= Q4_K_LEAST_SPAN
        best = torch.where(better, new_error, best)
        scale = torch.where(better, new_scale, scale)
        minimum = torch.where(better, new_minimum, minimum)
    flat = high - low < Q4_K_LEAST_SPAN
    scale = torch.where(flat, torch.zeros_like(scale), scale.clamp_min(0))
    return scale, 0 - torch.where(flat, low, minimum)


def _six_bits(x: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Eight values [..., 8, 1] >= 0 as multiples, 0 to 63, of their largest over 63."""
    inverse = torch.where(top > 0, torch.tensor(63.0) / top, torch.zeros_like(top))
    return (inverse * x).clamp(0, 63).round()


def q4_k_quantize(w):
    """GGUF Q4_K super-blocks, as llama.cpp's quantize_row_q4_K_ref chooses them.

    Values are clamped to what float16 scales can hold. A super-block with a NaN has NaN scales.
    """
    x = w.float().clamp(Q4_K_LOWEST, Q4_K_HIGHEST).unflatten(-1, (-1, 8, 32))
    nan = x.isnan().flatten(-2).any(-1, keepdim=True).unsqueeze(-1)
    x = torch.where(nan, torch.zeros_like(x), x)
    scales, minima = _q4_k_search(x)
    tops = [t.amax(-2, keepdim=True) for t in (scales, minima)]
    sc, m = _six_bits(scales, tops[0]), _six_bits(minima, tops[1])
    d, dmin = (round_scale(top / 63, torch.float16) for top in tops)
    step, offset = d.float() * sc, dmin.float() * m
    q = torch.where(step == 0, torch.zeros_like(x), (x + offset) / step).clamp(0, 15).round()
    q = q.to(torch.uint8).unflatten(-2, (4, 2))
    codes = (q[..., 0, :] | (q[..., 1, :] << 4)).flatten(-2)
    sc, m = sc.squeeze(-1).to(torch.uint8), m.squeeze(-1).to(torch.uint8)
    packed = torch.cat(
        [
            sc[..., :4] | ((sc[..., 4:] >> 4) << 6),
            m[..., :4] | ((m[..., 4:] >> 4) << 6),
            (sc[..., 4:] & 15) | ((m[..., 4:] & 15) << 4),
        ],
        dim=-1,
    )
    header = torch.cat([d, dmin], dim=-1).squeeze(-2)
    header = torch.where(nan.squeeze(-1), torch.nan, header).view(torch.uint8)
    return torch.cat([header, packed, codes], dim=-1).flatten(-2)


def q4_k_dequantize(blocks, dtype=None):
    """Values of Q4_K super-blocks: (d * sc) * q - dmin * m in float32."""
    block = blocks.unflatten(-1, (-1, 144))
    d, dmin = block[..., :4].contiguous().view(torch.float16).float().unsqueeze(-1).unbind(-2)
    low, mid, high = block[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    sc = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=-1)
    m = torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], dim=-1)
    codes = block[..., 16:].unflatten(-1, (4, 1, 32))
    q = torch.cat([codes & 15, codes >> 4], dim=-2).flatten(-3, -2)
    values = (d * sc).unsqueeze(-1) * q - (dmin * m).unsqueeze(-1)
    return to_dtype(values.flatten(-3), dtype or torch.float32)


def q4_k_gemv(x, blocks, byte_offset=0, rows=None, *, exact=False):
    """x @ w.T in float64 of the weights that the blocks hold, rounded once; ``exact`` or not."""
    row = x.shape[-1] // 256 * 144
    if blocks.dim() != 2 or byte_offset or rows is not None:
        buffer = blocks.flatten()[byte_offset:]
        rows = buffer.numel() // row if rows is None else rows
        blocks = buffer[: rows * row].view(rows, row)
    return (x.double() @ q4_k_dequantize(blocks).double().T).to(x.dtype)


q4_k_matmul = q4_k_gemv
