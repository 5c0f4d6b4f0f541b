"""A whole kernel on every build, its speed, its barriers removed in turn, and as PTX."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from . import emulator, mutate, requirements, toolchain

torch = pytest.importorskip("torch")

SOURCE = toolchain.flatten(Path(__file__).parent / "samples" / "attention.metal")
DTYPES = {
    "float": (torch.float32, 2e-6),
    "half": (torch.float16, 1e-3),
    "bfloat": (torch.bfloat16, 8e-3),
}
D = 128


def run(
    library: emulator.Library, dtype: str, heads: int, length: int, group: int, seed: int = 0
) -> float:
    """Largest error of one launch against float64."""
    generator = np.random.default_rng(length)
    kind, tolerance = DTYPES[dtype]
    query = torch.from_numpy(generator.standard_normal((heads, D), np.float32)).to(kind)
    parts, decoded = [], []
    for _ in range(2):
        codes = generator.integers(0, 16, (heads, length, D), np.uint8)
        scales = generator.uniform(0.05, 0.2, (heads, length, D // group)).astype(np.float16)
        zeros = generator.uniform(-2, 0, scales.shape).astype(np.float16)
        parts += [codes[..., 0::2] | codes[..., 1::2] << 4, scales, zeros]
        spread = [np.repeat(a.astype(np.float64), group, -1) for a in (scales, zeros)]
        decoded.append(codes * spread[0] + spread[1])
    out = torch.empty(heads, D, dtype=kind)
    params = np.array(
        [(length, group, D**-0.5)], np.dtype([("length", "u4"), ("group", "u4"), ("scale", "f4")])
    )
    library.launch(f"attention_{dtype}", heads, 128, [query, *parts, out, params], seed=seed)
    scores = np.einsum("hd,htd->ht", query.double().numpy(), decoded[0]) * D**-0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    want = np.einsum("ht,htd->hd", weights / weights.sum(1, keepdims=True), decoded[1])
    error = np.abs(out.double().numpy() - want).max()
    assert error < tolerance
    return error


@pytest.mark.parametrize("mode", toolchain.MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype: str, mode: str) -> None:
    library = emulator.load(SOURCE, mode)
    for heads, length, group, seed in ((2, 37, 32, 0), (1, 9, 64, 7), (3, 2, 128, 1)):
        run(library, dtype, heads, length, group, seed)


def test_strict_check_accepts() -> None:
    assert toolchain.strict_check(SOURCE) == []


def test_every_barrier_matters() -> None:
    """Each barrier of the sample in turn is taken out; the race build must object."""
    assert len(list(mutate.mutants(SOURCE))) == 2
    left = mutate.survivors(SOURCE, lambda library: run(library, "half", 2, 9, 64), only="half")
    assert [mutant.place for mutant in left] == []


def test_speed() -> None:
    """A loose bound, to notice when launching becomes slow: 8 heads, 256 tokens."""
    library = emulator.load(SOURCE, "fast")
    run(library, "half", 8, 256, 32)
    start = time.perf_counter()
    run(library, "half", 8, 256, 32)
    assert time.perf_counter() - start < 2.0


def test_ptx() -> None:
    ptx = toolchain.compile_ptx(SOURCE)
    assert set(re.findall(r"\.entry (\w+)", ptx)) == {f"attention_{t}" for t in DTYPES}
    assert ptx.count("bar.sync") >= 2 * 3


def test_ptx_assembles(tmp_path: Path) -> None:
    if requirements.ptxas() is None:
        pytest.skip("ptxas is not installed (it is optional)")
    (tmp_path / "attention.ptx").write_text(toolchain.compile_ptx(SOURCE))
    command = [requirements.ptxas(), "-arch=sm_90", "attention.ptx", "-o", "attention.cubin"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
