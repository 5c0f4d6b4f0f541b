"""Skips (or fails, under KVQ_REQUIRE_ALL=1) the tests of this folder where the emulator's tools
are missing."""

import pytest

from . import requirements


@pytest.fixture(autouse=True, scope="session")
def _emulator_tools() -> None:
    requirements.require(requirements.missing_for_emulator())
