"""benchmarks/gpu: what is built for an NVIDIA GPU, and how it is launched, on the emulator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.gpu import attention, bars, build, catalogue, codecs, q4_k, shares, structs
from torch_kvq.formats import KVFormat

from .. import emulator, requirements, toolchain
from . import attention_launch, codec_launch


@pytest.fixture(autouse=True)
def _tools() -> None:
    requirements.require(requirements.missing_for_emulator())


class EmulatedKernels:
    """Stands for benchmarks.gpu.device.Kernels: the same rows, launched on the emulator."""

    def __init__(self, units) -> None:  # type: ignore[no-untyped-def]
        self.rows: list[dict] = []
        self.sources: dict[str, str] = {}
        for unit in units:
            source = (
                toolchain.flatten(catalogue.METAL / f"{unit.library}.metal") + "\n" + unit.lines
            )
            for row in unit.rows:
                self.rows.append({**row, "registers": 0})
                self.sources[str(row["kernel"])] = source

    def select(self, **wanted: object) -> list[dict]:
        return [r for r in self.rows if all(r.get(key) == value for key, value in wanted.items())]

    def find(self, **wanted: object) -> dict:
        return self.select(**wanted)[0]

    def prepare(self, row, grid, block, buffers, params, shared=None) -> Callable[[], None]:  # type: ignore[no-untyped-def]
        library = emulator.load(self.sources[row["kernel"]], "fast")
        grid, block = ((*map(int, size), 1, 1)[:3] for size in (grid, block))
        arguments = [codec_launch.bytes_of(b) for b in buffers]
        memory = {} if shared is None else {0: shared}

        def launch() -> None:
            arguments_ = [emulator.InPlace(a) for a in arguments]
            library.launch(
                row["kernel"],
                grid,
                block,
                [*arguments_, *([] if params is None else [params])],
                row["constants"],
                memory,
            )

        return launch


def attention_kernels(*specs: str, **options: object) -> EmulatedKernels:
    pairs = [(KVFormat.parse(s), KVFormat.parse(s)) for s in specs]
    units = list(catalogue.attention_units(pairs, other_dims=False, **options))
    merge = catalogue.codec_units("attention_merge", build.host_names("attention_merge"))
    return EmulatedKernels([*units, *merge])


def test_structs():
    """Sizes are what the headers assert; attention's are those that the emulator's tests use."""
    found = structs.structs()
    for header in structs.HEADERS:
        text = (structs.ROOT / "csrc" / "shared" / header).read_text()
        assert "struct" in text
    assert found["KvqAttentionParams"].itemsize == attention_launch.PARAMS.itemsize
    assert found["KvqAttentionParams"].fields.keys() == attention_launch.PARAMS.fields.keys()
    for name, dtype in codec_launch.structs().items():
        assert found[name] == dtype, name


def test_small_checks_of_attention():
    """Launch geometry, buffers and the accuracy rule, as on a GPU."""
    kernels = attention_kernels("int4-g64-rot", dtypes=[torch.float16], rows=(1, 4))
    results = list(attention.small_checks(kernels))
    assert len(results) == 5  # decode of 1 and 4 rows, by matrices of 8 and 16, prefill
    assert all(result["ok"] for _, result in results), results


def test_every_kernel_of_the_metal_files_has_a_row():
    """Each library is built whole; only attention's templates are sampled."""
    for path in sorted(catalogue.METAL.glob("*.metal")):
        if path.stem in build.TEMPLATES:
            continue
        names = build.host_names(path.stem)
        units = list(catalogue.codec_units(path.stem, names))
        assert names and {row["kernel"] for unit in units for row in unit.rows} == set(names)
        declared = {c.name for c in toolchain.kernels(build.source_of(units[0])).constants}
        assert all(set(unit.constants or {}) == declared for unit in units), path.stem


def test_attention_is_built_for_every_stored_format():
    rows = [row for unit in catalogue.attention_units() for row in unit.rows]
    for fmt in catalogue.ALL_FORMATS:
        mine = [r for r in rows if r["k"] == r["v"] == str(fmt) and r["head_dim"] == 128]
        assert {r["dtype"] for r in mine} == set(catalogue.DTYPES), fmt
        decode = {r["rows"] for r in mine if not r["prefill"] and not r["matrix"]}
        assert decode == set(catalogue.ROWS), fmt
        matrix = {(r["dtype"], r["rows"]) for r in mine if r["matrix"]}
        fitting = [] if str(fmt) == "int2-g32" else ["half"] if fmt.name == "none" else None
        fitting = ["half", "bfloat"] if fitting is None else fitting
        assert matrix == {(dtype, rows) for dtype in fitting for rows in (8, 16)}, fmt
        assert {r["prefill"] for r in mine} == {False, True}, fmt


def test_build(tmp_path):
    """One library to a cubin: registers and spills are read from ptxas's report."""
    if requirements.ptxas() is None:
        pytest.skip(f"ptxas is not installed (it is optional): {requirements.PTXAS}")
    units = list(catalogue.codec_units("hadamard", build.host_names("hadamard")))[:1]
    rows = build.build(units, tmp_path)
    assert len(rows) == 3 and all(0 < row["registers"] < 256 for row in rows)
    assert all(row["spilled"] == 0 and (tmp_path / row["cubin"]).stat().st_size for row in rows)
    assert build.build(units, tmp_path) == rows


def test_codecs_are_built_for_every_head_size():
    """Each format that holds D, in both directions."""
    for library in ("affine", "fp8", "gguf", "turboquant"):
        units = list(catalogue.codec_units(library, build.host_names(library)))
        rows = [row for unit in units for row in unit.rows]
        for head_dim in (128, *catalogue.CODEC_DIMS):
            mine = {
                (row["op"], row["format"])
                for row in rows
                if row["constants"]["kvq_head_dim"] == head_dim
            }
            formats = {str(row["format"]) for row in rows}
            held = {f for f in formats if catalogue.holds(KVFormat.parse(f), head_dim)}
            assert mine == {(op, f) for op in ("quantize", "dequantize") for f in held}, head_dim


def test_shares_cover_every_kernel_once():
    counted = [n for i in range(3) for n in range(10) if shares.is_in(n, (i, 3))]
    assert sorted(counted) == list(range(10)) and all(
        shares.is_in(n, shares.WHOLE) for n in counted
    )


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at kvq_append_half+0x1f0
=========     by thread (3,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """\
========= Error: Race reported between Write access at kvq_q4_k_matmul_half+0x100
=========     and Read access at kvq_q4_k_matmul_half+0x200 [8 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_sanitizer_reports_name_kernels():
    assert shares.problems(MEMCHECK) == {"kvq_append_half": 1}
    assert set(shares.problems(RACECHECK)) == {"kvq_q4_k_matmul_half"}
    assert shares.problems("========= ERROR SUMMARY: 0 errors") == {}
    assert shares.problems("========= ERROR SUMMARY: 3 errors") == {"unknown": 3}


def test_bars():
    assert bars.verdict(0.61, 0.6) == "0.6" and bars.verdict(0.59, 0.6) == "0.6 MISSED"
    assert bars.verdict(9.5, 9.0, at_most=True) == "9 MISSED" and bars.verdict(1.0, None) == "-"
    row = {"format": "int8-g64", "heads_per_kv_head": 8, "queries": 1}
    assert bars.attention(row) == 1.3 and bars.attention({**row, "queries": 4}) is None


def test_ptx_honours_pragmas_and_constants():
    """Codes must equal the reference's: no contraction; a set constant leaves no variable."""
    (unit, *_) = catalogue.codec_units("dense", build.host_names("dense"))
    text = build.ptx(unit, "sm_90")
    assert "fma.rn.f32" not in text and "kvq_rotate" not in text
    with pytest.raises(toolchain.CompileError, match="no_such"):
        toolchain.compile_ptx(build.source_of(unit), constants={"no_such": 1})


LIBRARIES = ["affine", "turboquant", "append", "hadamard", "mlx_native", "q4_k"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_small_checks_of_codecs(library):
    """Launch geometry, buffers and the comparison, as on a GPU."""
    pairs = [(KVFormat.parse("int8-g64"), KVFormat.parse("int4-g64-rot"))]
    names = build.host_names(library)[-12:]
    kernels = EmulatedKernels(list(catalogue.codec_units(library, names, pairs)))
    kernels.rows = kernels.rows[::3]
    results = [*codecs.small_checks(kernels), *q4_k.small_checks(kernels)]
    assert len(results) == len(kernels.rows)
    assert all(result["ok"] for _, result in results), results
