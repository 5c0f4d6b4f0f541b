"""Every barrier of the attention kernels is needed: without it the race build finds a fault."""

from __future__ import annotations

import pytest
import torch

from torch_kvq.formats import KVFormat

from .. import mutate, requirements
from .attention_launch import compose, source, template
from .test_attention_kernels import TQ4, Case

INT4 = KVFormat("int4", 32)  # several groups, so that lanes share scales

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _tools() -> None:
    requirements.require(requirements.missing_for_emulator())


def case_and_options(queries, head_dim=64):
    """All that the kernels hold barriers for: rotation of queries and outputs, means, several
    blocks of tokens for every simdgroup."""
    case = Case(
        INT4, TQ4, torch.float16, rotate=True, heads=4, groups=2, queries=queries,
        head_dim=head_dim, capacity=300, tokens=290,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    means = {f"{side}_mean": torch.randn(2, head_dim, generator=generator) for side in "kv"}
    # Scores that grow from tile to tile, so that the prefill kernel rescales its output.
    ramp = torch.arange(290).float() / 4
    return case, {**means, "mask": ramp}


def survivors(text, run):
    return {mutant.place for mutant in mutate.survivors(text, run)}


def test_barriers():
    left = {}
    half = torch.float16
    for kernel, queries, rows in (("decode", 2, 4), ("prefill", 20, 1), ("matrix", 2, 8)):
        case, options = case_and_options(queries)
        _, line = compose(kernel, half, INT4, half, TQ4, half, 64, 64, rows)

        def run(library, case=case, options=options, kernel=kernel):
            case.run(kernel=kernel, library=library, **options)
            case.run(kernel=kernel, library=library, k_signs=None, v_signs=None)

        left[kernel] = survivors(source(kernel, line), run)

    def run_merge(library):
        for head_dim in (64, 256):  # fewer columns than threads, and more than are summed at once
            case, options = case_and_options(1, head_dim=head_dim)
            case.run(splits=2, mode="race", merge_library=library, **options)

    left["merge"] = survivors(template("attention_merge"), run_merge)
    own = {place for places in left.values() for place in places if "common.h" not in place}
    assert own == set()
    # Not every kernel has use for every barrier of what they share.
    assert set.intersection(*left.values()) == set()
