"""Spellings that public Metal code uses and C++ does not know: samples/dialect.metal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import emulator, requirements, toolchain

SAMPLE = Path(__file__).parent / "samples" / "dialect.metal"
MODES = ["fast", pytest.param("race", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=MODES)
def library(request: pytest.FixtureRequest) -> emulator.Library:
    return emulator.load_file(SAMPLE, request.param)


def test_literals_are_float(library: emulator.Library) -> None:
    y = np.array([0.1, 0.25], np.float32)
    library.launch("literals", 1, 1, [y])
    np.testing.assert_array_equal(y, np.array([1, 0.75], np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_instances_by_qualified_name_or_parameters(library: emulator.Library, dtype: type) -> None:
    name = {np.float32: "float", np.int32: "int"}[dtype]
    y = np.arange(4, dtype=dtype)
    library.launch(f"add_{name}", 1, 4, [y, dtype(10)])
    np.testing.assert_array_equal(y, np.arange(10, 14, dtype=dtype))
    factor = {"float": 2, "int": 3}[name]
    library.launch(f"scale_{name}_{factor}", 1, 4, [y])
    np.testing.assert_array_equal(y, factor * np.arange(10, 14, dtype=dtype))
    assert library.max_threads(f"scale_{name}_{factor}") == 32 * factor


def test_templates_of_one_name(library: emulator.Library) -> None:
    y, z = np.zeros(1, np.int32), np.zeros(1, np.float32)
    library.launch("fill_one", 1, 1, [y])
    assert y[0] == 32 and library.max_threads("fill_one") == 32
    library.launch("fill_two", 1, 1, {1: y, 0: z})
    assert (y[0], z[0]) == (64, 640) and library.max_threads("fill_two") == 128


def test_list_for_a_vector(library: emulator.Library) -> None:
    y = np.zeros(2, np.int64)
    library.launch("lists", 1, 1, [y])
    np.testing.assert_array_equal(y, [106, 35])


def test_structs_of_two_address_spaces(library: emulator.Library) -> None:
    y = np.array([3, 4, 0, 0, 0, 0], np.float32)
    library.launch("conditional", 1, 3, [y])
    np.testing.assert_array_equal(y, np.array([3, 4, -1, -2, -1, -2], np.float32))


def test_names_and_limits(library: emulator.Library) -> None:
    y = np.zeros(4, np.uint32)
    library.launch("names", 1, 1, [y])
    np.testing.assert_array_equal(y, [len("own_name"), 4, 1, 9])


def test_strict_check_accepts() -> None:
    requirements.require(requirements.missing_for_strict_check())
    assert toolchain.strict_check(toolchain.flatten(SAMPLE), subset=False) == []
