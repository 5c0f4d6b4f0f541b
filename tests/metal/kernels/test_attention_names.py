"""Every attention kernel that the host can compose exists: names, instantiations, strict check."""

from __future__ import annotations

import itertools

import pytest
import torch

from torch_kvq.formats import FLOAT_DTYPES, FORMATS, GROUP_SIZES, KVFormat

from .. import requirements, toolchain
from .attention_launch import compose, fits_matrix, source, template
from .compile_time import check_compile_time

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
ROWS = (1, 2, 4, 8)
#: (format, dtype of its scales, or of its codes for none): all that attention can be given.
STORED = [
    (KVFormat(name, group), dtype)
    for name in FORMATS
    for group in (GROUP_SIZES if KVFormat(name).group_size else (0,))
    for dtype in (FLOAT_DTYPES if KVFormat(name).family != "gguf" else (torch.float16,))
]


@pytest.fixture(autouse=True)
def _tools() -> None:
    requirements.require(requirements.missing_for_emulator())


def holds(fmt: KVFormat, head_dim: int) -> bool:
    return head_dim % (fmt.group_size or fmt.layout.multiple) == 0


def variants(k, v):
    """Arguments of compose for all that one pair of stored sides can meet."""
    shapes = [
        (d, dv)
        for d, dv in itertools.product(HEAD_DIMS, repeat=2)
        if holds(k[0], d) and holds(v[0], dv)
    ]
    for dtype, (d, dv), aligned in itertools.product(FLOAT_DTYPES, shapes, (True, False)):
        yield True, dtype, *k, *v, d, dv, 1, aligned
        for rows in ROWS:
            yield False, dtype, *k, *v, d, dv, rows, aligned
        if fits_matrix(dtype, *k, *v, d, dv):
            yield from (("matrix", dtype, *k, *v, d, dv, rows, aligned) for rows in (8, 16))


def test_names_read_as_the_issue_spells_them():
    int4, none = KVFormat("int4", 64), KVFormat("none")
    half, bfloat = torch.float16, torch.bfloat16
    name, line = compose(False, half, int4, half, int4, half, 128, 128, 4)
    assert name == "kvq_attention_decode_half_k_int4_g64_v_int4_g64_d128_r4"
    assert line.startswith(f'template [[host_name("{name}")]] [[kernel]] decltype(')
    name, _ = compose(True, bfloat, int4, torch.float32, none, bfloat, 192, 128, aligned=False)
    assert name == (
        "kvq_attention_prefill_bfloat_k_int4_g64_float_v_none_bfloat_d192_dv128_unaligned"
    )


def test_names_are_unique():
    """One name never stands for two kernels: pipelines are cached by name."""
    seen = {}
    some = STORED[::5] + STORED[-1:]
    for k, v in itertools.product(some, some):
        for variant in variants(k, v):
            name, line = compose(*variant)
            body = line.partition("]] [[kernel]]")[2]
            assert seen.setdefault(name, body) == body, name
    assert len(set(seen.values())) == len(seen)


def test_every_stored_side_is_declared():
    """Each format and scale dtype as K and as V makes a kernel of the composed name."""
    for kernel in ("decode", "prefill", "matrix"):
        composed = []
        for stored in STORED:
            head_dim = next(d for d in HEAD_DIMS if holds(stored[0], d))
            dims = head_dim, head_dim
            if kernel == "matrix" and not fits_matrix(torch.float16, *stored, *stored, *dims):
                continue
            composed.append(compose(kernel, torch.float16, *stored, *stored, *dims, 8))
        found = toolchain.kernels(source(kernel, "".join(line for _, line in composed))).instances
        assert [instance.host_name for instance in found] == [name for name, _ in composed]


def pair(spec, dtype):
    return KVFormat.parse(spec), dtype


HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SAMPLE = [
    (False, HALF, *pair("int4-g64", HALF), *pair("int4-g64", HALF), 256, 256, 8),
    (False, FLOAT, *pair("tq3", FLOAT), *pair("none", FLOAT), 80, 96, 4, False),
    (True, BFLOAT, *pair("fp8_e4m3-g32", BFLOAT), *pair("q4_0", HALF), 256, 256),
    ("matrix", BFLOAT, *pair("int4-g64", BFLOAT), *pair("tq4", HALF), 128, 128, 8),
    ("matrix", HALF, *pair("int4-g64", HALF), *pair("int4-g64", HALF), 128, 128, 16),
]


@pytest.mark.parametrize("variant", SAMPLE, ids=lambda v: compose(*v)[0].partition("_k_")[2])
def test_compile_time(variant):
    """A library is compiled on the user's machine at first use: at most 2 s of clang here."""
    name, line = compose(*variant)
    text = source(variant[0], line)
    check_compile_time(name, text)


@pytest.mark.parametrize("variant", SAMPLE, ids=lambda v: compose(*v)[0].partition("_k_")[2])
def test_strict(variant):
    requirements.require(requirements.missing_for_strict_check())
    assert toolchain.strict_check(source(variant[0], compose(*variant)[1])) == []


def test_strict_merge():
    requirements.require(requirements.missing_for_strict_check())
    assert toolchain.strict_check(template("attention_merge")) == []


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED, ids=lambda s: f"{s[0]}-{str(s[1])[6:]}")
def test_every_stored_side_compiles(stored):
    """As K with V of the next kind, for all head sizes and row counts, in one go each."""
    other = STORED[(STORED.index(stored) + 7) % len(STORED)]
    dtype = FLOAT_DTYPES[STORED.index(stored) % 3]
    for kernel, some in (("decode", ROWS), ("prefill", (1,)), ("matrix", (8, 16))):
        lines, names = [], []
        for d in filter(lambda d: holds(stored[0], d), HEAD_DIMS):
            dv = next(dv for dv in reversed(HEAD_DIMS) if holds(other[0], dv))
            if kernel == "matrix" and not fits_matrix(dtype, *stored, *other, d, dv):
                continue
            for rows in some:
                name, line = compose(kernel, dtype, *stored, *other, d, dv, rows)
                names.append(name)
                lines.append(line)
        path = toolchain.compile_library(source(kernel, "".join(lines)))
        assert path.exists() and len(set(names)) == len(lines)
