"""Lloyd-Max codebooks of N(0, 1) and Hadamard signs.

``python -m torch_kvq.codebooks`` writes the committed tables again:
``torch_kvq/_codebook_tables.py`` for Python and ``csrc/shared/codebooks.h`` for C++ and Metal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from torch_kvq._codebook_tables import POSITIVE_CENTROIDS

BITS = (2, 3, 4, 5, 6, 8)
#: Seed of the default signs; a cache file records it.
SIGNS_SEED = 0


def _pdf(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _mass(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """P(lo < X < hi) for 0 <= lo < hi, by the survival function so that the tail keeps digits."""
    survival = np.vectorize(lambda v: 0.5 * math.erfc(v / math.sqrt(2)))
    return survival(lo) - survival(hi)


def lloyd_max(bits: int) -> np.ndarray:
    """The positive half of the optimal 2**bits-level scalar quantiser of N(0, 1), ascending.

    Newton's method on Lloyd's condition (every centroid is the mean of its cell), started from
    Panter and Dite's asymptotic solution sqrt(3) * Phi^-1((i + .5) / 2**bits).
    """
    levels = 2**bits
    half = levels // 2
    inverse = NormalDist().inv_cdf
    c = np.array([math.sqrt(3) * inverse((half + i + 0.5) / levels) for i in range(half)])
    for iteration in range(400):
        # Cells are [b[i], b[i + 1]]; the first edge is 0 by symmetry.
        b = np.concatenate([[0.0], (c[1:] + c[:-1]) / 2, [np.inf]])
        pdf = np.concatenate([_pdf(b[:-1]), [0.0]])
        mass = _mass(b[:-1], b[1:])
        moment = pdf[:-1] - pdf[1:]
        if iteration < 20:  # a few plain Lloyd steps bring Newton into its basin
            c = moment / mass
            continue
        residual = c * mass - moment
        jacobian = np.diag(mass)
        inner = np.arange(half - 1)
        up = (c[:-1] - b[1:-1]) * pdf[1:-1] / 2
        down = -(c[1:] - b[1:-1]) * pdf[1:-1] / 2
        jacobian[inner, inner] += up
        jacobian[inner, inner + 1] += up
        jacobian[inner + 1, inner + 1] += down
        jacobian[inner + 1, inner] += down
        step = np.linalg.solve(jacobian, residual)
        c = c - step
        if np.abs(step).max() < 1e-15 * c.max():
            break
    return c


def distortion(positive: np.ndarray) -> float:
    """Mean squared error of the symmetric quantiser with these positive centroids on N(0, 1)."""
    c = np.asarray(positive, dtype=np.float64)
    b = np.concatenate([[0.0], (c[1:] + c[:-1]) / 2, [np.inf]])
    pdf = np.concatenate([_pdf(b[:-1]), [0.0]])
    mass = _mass(b[:-1], b[1:])
    # E[x^2; cell] = mass + lo*pdf(lo) - hi*pdf(hi)
    edge = np.concatenate([b[:-1] * pdf[:-1], [0.0]])
    second = mass + edge[:-1] - edge[1:]
    return float(2 * np.sum(second - 2 * c * (pdf[:-1] - pdf[1:]) + c * c * mass))


@cache
def codebook(bits: int) -> torch.Tensor:
    """The 2**bits centroids, ascending, float32."""
    positive = torch.tensor(POSITIVE_CENTROIDS[bits], dtype=torch.float32)
    return torch.cat([-positive.flip(0), positive])


@cache
def boundaries(bits: int) -> torch.Tensor:
    """The 2**bits - 1 midpoints between float32 centroids, rounded to float32."""
    c = codebook(bits).double()
    return ((c[1:] + c[:-1]) / 2).float()


#: Cells, this wide, of which each holds one boundary at most of these codebooks.
CELL_WIDTH = 0.25
CELL_BITS = (2, 3, 4)


def cells(bits: int) -> np.ndarray:
    """The search table of the Metal encoder, uint32 [32].

    Entry c % 32 is for values whose nearest multiple of CELL_WIDTH is c: the float32 boundary
    there, its last four bits replaced by the code above it. Where there is none, it is -3e38 so
    changed, and the code is that of the whole cell.
    """
    edges = boundaries(bits).numpy()
    table = np.zeros(32, np.uint32)
    for c in range(-16, 16):
        low, high = (c - 0.5) * CELL_WIDTH, (c + 0.5) * CELL_WIDTH
        inside = edges[(edges >= low) & (edges < high)]
        assert len(inside) <= 1
        edge = inside[0] if len(inside) else np.float32(-3e38)
        table[c % 32] = (np.float32(edge).view(np.uint32) & ~np.uint32(15)) | (edges < high).sum()
    return table


#: By bits: a polynomial in the magnitude of a value, from the constant up. The whole number nearest
#: to it is the index, among the boundaries from 0 on, of one of the two around the value. (It
#: differs from the index at a boundary by 0.22 at most; beyond the last the magnitude is bounded.)
RANKS = {
    2: (0.0, 1.0187, 0.0),
    3: (-0.011321, 2.1689, -0.25154),
    4: (-0.040161, 4.2695, -0.54997),
    5: (-0.09339, 8.409, -1.1109),
    6: (-0.18317, 16.582, -2.1824),
    8: (-0.21928, 61.248, -2.8177, -2.4733, 0.32872),
}


def hadamard_signs(
    head_dim: int, seed: int = SIGNS_SEED, device: torch.device | str | None = None
) -> torch.Tensor:
    """Random signs, float32 [head_dim] of +-1, the same on every machine for one seed."""
    # splitmix64, so that the signs depend on no library's generator.
    mask = (1 << 64) - 1
    state = (seed * 0x9E3779B97F4A7C15 + head_dim) & mask
    signs = []
    for _ in range(head_dim):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        signs.append(1.0 if (z ^ (z >> 31)) & 1 else -1.0)
    return torch.tensor(signs, dtype=torch.float32, device=device)


def hadamard_block(head_dim: int) -> int:
    """Size of the Hadamard blocks: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def _write_tables(root: Path) -> None:
    tables = {bits: [float(np.float32(v)) for v in lloyd_max(bits)] for bits in BITS}
    rows = "".join(f"    {bits}: {values},\n".replace("'", "") for bits, values in tables.items())
    (root / "torch_kvq" / "_codebook_tables.py").write_text(
        '"""Generated by python -m torch_kvq.codebooks: positive Lloyd-Max centroids."""\n'
        "\n# fmt: off\nPOSITIVE_CENTROIDS: dict[int, list[float]] = {\n" + rows + "}\n"
    )
    lines = [
        "// Generated by python -m torch_kvq.codebooks: Lloyd-Max centroids of N(0, 1) and the",
        "// midpoints between them (cells, RANKS: torch_kvq.codebooks). Compiled by C++ and by",
        "// Metal.",
        "#pragma once",
        "",
        "#ifndef __METAL_VERSION__",
        "#include <cstdint>",
        "#endif",
        "",
        "// clang-format off",
        "#ifndef KVQ_CONSTANT",
        "#ifdef __METAL_VERSION__",
        "#define KVQ_CONSTANT constant",
        "#else",
        "#define KVQ_CONSTANT static constexpr",
        "#endif",
        "#endif",
    ]

    def array(name: str, values: Sequence[float]) -> None:
        lines.append(f"KVQ_CONSTANT float {name}[{len(values)}] = {{")
        for i in range(0, len(values), 6):
            row = ", ".join(f"{v:.9e}f" for v in values[i : i + 6])
            lines.append(f"    {row},")
        lines.append("};")

    def words(name: str, values: list[int]) -> None:
        lines.append(f"KVQ_CONSTANT uint32_t {name}[{len(values)}] = {{")
        for i in range(0, len(values), 8):
            row = ", ".join(f"0x{v:08x}u" for v in values[i : i + 8])
            lines.append(f"    {row},")
        lines.append("};")

    for bits, positive in tables.items():
        full = [-v for v in reversed(positive)] + positive
        middle = [float(np.float32((a + b) / 2)) for a, b in pairwise(full)]
        array(f"kvq_codebook_{bits}", full)
        array(f"kvq_boundaries_{bits}", middle)
        array(f"kvq_rank_{bits}", RANKS[bits])
        if bits in CELL_BITS:
            words(f"kvq_cells_{bits}", cells(bits).tolist())
    (root / "csrc" / "shared" / "codebooks.h").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    _write_tables(Path(__file__).resolve().parents[1])
