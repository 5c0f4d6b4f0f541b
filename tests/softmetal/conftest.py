"""Fixtures of the software device's own tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from . import build, install
from .requirement import missing


@pytest.fixture(scope="session")
def soft() -> None:
    """The software mps device, without the product's host code."""
    if sys.platform == "darwin":
        pytest.skip("a Mac has the real device")
    if reason := build.unavailable_reason():
        missing(reason)
    install(product=False)


@pytest.fixture(scope="session")
def demo(soft: None) -> ModuleType:
    """torch.ops.kvq_demo: ops that use the product's host runtime."""
    from .demo import load

    return load()


@pytest.fixture(scope="session")
def misuse(soft: None) -> ModuleType:
    """torch.ops.kvq_misuse: host code that talks to the device itself."""
    from .misuse import load

    return load()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A kernel fault that a test did not wait for fails that test."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.backends.mps.is_available():
        torch.mps.synchronize()
