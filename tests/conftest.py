"""Shared fixtures. ``pytest --device mps`` runs the same files on MPS: a Mac's, or on Linux the
software device of tests/softmetal."""

from __future__ import annotations

import os
import sys
import zlib
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
    # The software device compiles a library, a second of work, for almost every one of them.
    attention = [item for item in items if item.path.match("tests/test_attention*.py")]
    sampled = pytest.mark.skip(reason="each value of each parameter once here; all with --slow")
    for item in set(attention) - _covering(attention):
        item.add_marker(sampled)


def _covering(items: list[pytest.Item]) -> set[pytest.Item]:
    """Items with which every test runs, and every value of its parameters is met at least once:
    formats in the test that is about them. Not the test that draws formats at random."""
    chosen, met = set(), set()
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        test = item.originalname
        values = {(test, "")}
        for value in (item.callspec.params if hasattr(item, "callspec") else {}).values():
            if type(value).__name__ != "KVFormat" or test == "test_every_format":
                values.add((test, str(value)))
        if not values <= met and test != "test_anything":
            met |= values
            chosen.add(item)
    return chosen


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
