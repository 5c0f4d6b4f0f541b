"""Tests that need a tool skip where it is missing; KVQ_REQUIRE_ALL=1 (CI) makes that a failure."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skips the test, or fails it where everything is required."""
    if os.environ.get("KVQ_REQUIRE_ALL") == "1":
        pytest.fail(f"KVQ_REQUIRE_ALL=1: {reason}", pytrace=False)
    pytest.skip(reason)
