"""Shared fixtures. ``pytest --device mps`` runs the same files on MPS: a Mac's, or on Linux the
software device of tests/softmetal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "mps"))
    parser.addoption("--slow", action="store_true", help="also run the heavy sweeps")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "mps" and sys.platform != "darwin":
        from tests.softmetal import BuildError, Unavailable, install

        try:
            install()
        except (BuildError, Unavailable) as error:
            pytest.exit(f"--device mps: {error}", returncode=1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/softmetal to --device mps, or to being named.

    torch counts its devices when autograd first runs: the software device must be there by then,
    and tests on the CPU must run without it.
    """
    if collection_path.name != "softmetal" or config.getoption("--device") == "mps":
        return None
    return True if not any("softmetal" in argument for argument in config.args) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow (make test-all)")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
    if config.getoption("--device") != "mps" or sys.platform == "darwin":
        return
    # The software device compiles a library for almost every one of them.
    sampled = pytest.mark.skip(reason="one attention test in twelve here; all with --slow")
    attention = [item for item in items if item.path.name == "test_attention.py"]
    for number, item in enumerate(attention):
        if number % 12:
            item.add_marker(sampled)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def wait_for_the_device(device: str) -> Iterator[None]:
    """A kernel's fault belongs to the test that launched it."""
    yield
    if device == "mps":
        import torch

        torch.mps.synchronize()


@pytest.fixture(scope="session")
def code_model() -> Path:
    """Folder of the trained 28M-parameter model used for end-to-end tests."""
    given = os.environ.get("KVQ_TEST_MODEL")
    folder = Path(given) if given else ROOT.parent / "shared" / "models" / "code-28m"
    if not (folder / "config.json").is_file():
        pytest.skip(f"no model at {folder}; set KVQ_TEST_MODEL to its folder")
    return folder
