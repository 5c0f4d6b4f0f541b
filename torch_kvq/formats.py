"""The one table of KV formats: bits, groups, row sizes. Everything else asks it.

A packed tensor is three tensors ``codes``, ``scales``, ``biases``, each ``[B, G, S, row]``; the
last two have ``row == 0`` for a format that has none. Exact rules: see :mod:`torch_kvq.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.compiler import is_dynamo_compiling

from torch_kvq.memory import zeros

GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Encoders per family. An encoder chooses codes; it never changes how codes are read.
ENCODERS = {
    "affine": ("default",),
    "fp8": ("default",),
    "gguf": ("default",),
    "turboquant": ("default", "unbiased"),
    "none": ("default",),
}


@dataclass(frozen=True)
class _Layout:
    family: str
    bits: int
    #: group sizes a caller may choose; empty: the format has no choice
    groups: tuple[int, ...] = ()
    default_group: int = 0
    #: D must be a multiple of this (of the group where there is one)
    multiple: int = 1


_LAYOUTS = {
    "int8": _Layout("affine", 8, GROUP_SIZES, 64),
    "int4": _Layout("affine", 4, GROUP_SIZES, 64),
    "int2": _Layout("affine", 2, GROUP_SIZES, 64),
    "fp8_e4m3": _Layout("fp8", 8, GROUP_SIZES, 64),
    "fp8_e5m2": _Layout("fp8", 8, GROUP_SIZES, 64),
    "q8_0": _Layout("gguf", 8, multiple=32),
    "q4_0": _Layout("gguf", 4, multiple=32),
    "tq2": _Layout("turboquant", 2, multiple=8),
    "tq3": _Layout("turboquant", 3, multiple=8),
    "tq4": _Layout("turboquant", 4, multiple=8),
    "tq5": _Layout("turboquant", 5, multiple=8),
    "tq6": _Layout("turboquant", 6, multiple=8),
    "tq8": _Layout("turboquant", 8, multiple=8),
    "none": _Layout("none", 0),
}
FORMATS = tuple(_LAYOUTS)
#: Bytes of a GGUF block of 32 elements (ggml's block_q8_0 and block_q4_0).
GGUF_BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}


#: What KVFormat.parse has read; there are few formats.
_PARSED: dict[str, KVFormat] = {}


@dataclass(frozen=True)
class KVFormat:
    """How one side (K or V) of a cache is stored.

    Args:
        name: one of :data:`FORMATS`.
        group_size: elements that share a scale: 32, 64 or 128 for the affine and fp8 formats
            (0 takes the default, 64); 0 for the others, whose layout fixes it.
        rotate: multiply by a random-sign Hadamard matrix before quantising; always on for ``tq*``.
    """

    name: str
    group_size: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        layout = _LAYOUTS.get(self.name)
        if layout is None:
            raise ValueError(
                f"[kvq.format] unknown format {self.name!r}; expected one of {', '.join(FORMATS)}"
            )
        if layout.groups:
            if self.group_size == 0:
                object.__setattr__(self, "group_size", layout.default_group)
            if self.group_size not in layout.groups:
                raise ValueError(
                    f"[kvq.format] group_size must be 32, 64 or 128, got {self.group_size}"
                )
        elif self.group_size != 0:
            raise ValueError(
                f"[kvq.format] {self.name} has no group_size to choose, got {self.group_size}"
            )
        if layout.family == "turboquant":
            object.__setattr__(self, "rotate", True)

    @classmethod
    def parse(cls, spec: str | KVFormat) -> KVFormat:
        """Read ``"int4"``, ``"int4-g32"``, ``"int4-g64-rot"``; a KVFormat is returned as it is."""
        if isinstance(spec, KVFormat):
            return spec
        if not is_dynamo_compiling() and spec in _PARSED:
            return _PARSED[spec]
        name, *options = spec.split("-")
        group, rotate = 0, False
        for option in options:
            if option == "rot":
                rotate = True
            elif option[:1] == "g" and option[1:].isdigit():
                group = int(option[1:])
            else:
                raise ValueError(
                    f"[kvq.format] {spec!r}: expected NAME[-gGROUP][-rot], got option {option!r}"
                )
        parsed = cls(name, group, rotate)
        if not is_dynamo_compiling():
            _PARSED[spec] = parsed
        return parsed

    def __str__(self) -> str:
        group = f"-g{self.group_size}" if self.group_size else ""
        rotated = "-rot" if self.rotate and self.family != "turboquant" else ""
        return f"{self.name}{group}{rotated}"

    @property
    def layout(self) -> _Layout:
        return _LAYOUTS[self.name]

    @property
    def family(self) -> str:
        """``affine``, ``fp8``, ``gguf``, ``turboquant`` or ``none``."""
        return self.layout.family

    @property
    def bits(self) -> int:
        """Bits of one code, without scales (0 for ``none``)."""
        return self.layout.bits

    def rotated(self, rotate: bool = True) -> KVFormat:
        """The same format with rotation switched on or off."""
        return replace(self, rotate=rotate)

    def check_head_dim(self, head_dim: int, op: str = "format") -> None:
        """Raise ValueError unless this format can store vectors of ``head_dim`` elements."""
        multiple = self.group_size or self.layout.multiple
        if head_dim <= 0 or head_dim % multiple:
            raise ValueError(
                f"[kvq.{op}] {self} needs head_dim to be a positive multiple of {multiple}, "
                f"got {head_dim}"
            )

    def codes_row(self, head_dim: int) -> int:
        """Elements of one row of ``codes``."""
        if self.family == "none":
            return head_dim
        if self.family == "gguf":
            return head_dim // 32 * GGUF_BLOCK_BYTES[self.name]
        return head_dim * self.bits // 8

    def scales_row(self, head_dim: int) -> int:
        """Elements of one row of ``scales``."""
        if self.family in ("affine", "fp8"):
            return head_dim // self.group_size
        return 1 if self.family == "turboquant" else 0

    def biases_row(self, head_dim: int) -> int:
        """Elements of one row of ``biases``."""
        return head_dim // self.group_size if self.family == "affine" else 0

    def head_dim(self, codes_row: int) -> int:
        """The head size whose rows of codes have ``codes_row`` elements."""
        if self.family == "none":
            return codes_row
        if self.family == "gguf":
            return codes_row // GGUF_BLOCK_BYTES[self.name] * 32
        return codes_row * 8 // self.bits

    def codes_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """dtype of ``codes`` for a cache of ``dtype``: uint8, or ``dtype`` itself for ``none``."""
        return dtype if self.family == "none" else torch.uint8

    def rows(
        self, head_dim: int, dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> tuple[tuple[int, torch.dtype], ...]:
        """Elements and dtype of a row of codes, of scales and of biases, for a cache of dtype."""
        scale_dtype = scale_dtype or default_scale_dtype(dtype)
        return (
            (self.codes_row(head_dim), self.codes_dtype(dtype)),
            (self.scales_row(head_dim), scale_dtype),
            (self.biases_row(head_dim), scale_dtype),
        )

    def row_nbytes(self, head_dim: int, dtype: torch.dtype, scale_dtype: torch.dtype | None) -> int:
        """Bytes that one vector of ``head_dim`` elements of ``dtype`` takes when packed."""
        return sum(row * kind.itemsize for row, kind in self.rows(head_dim, dtype, scale_dtype))

    def bits_per_element(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Bits per element with scales and biases counted."""
        return 8 * self.row_nbytes(head_dim, dtype, None) / head_dim

    def empty(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        scale_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Zero-filled ``(codes, scales, biases)`` of ``[batch, heads, capacity, row]``."""
        rows = self.rows(head_dim, dtype, scale_dtype)
        specs = [((batch, heads, capacity, row), kind) for row, kind in rows]
        codes, scales, biases = zeros(*specs, device=device)
        return codes, scales, biases


def default_scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 for half and bfloat16 caches (a bfloat16 scale costs int8 its accuracy)."""
    return torch.float32 if dtype == torch.float32 else torch.float16
