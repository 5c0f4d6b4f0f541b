"""The distribution: its metadata, its data, its README, its build without a compiler."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_kvq
from torch_kvq.cli.models import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
#: What README calls a model; the tests read the embedded one instead.
README_MODEL = "Qwen/Qwen3-4B"
PATHS_OF_A_MACHINE = re.compile(r"(?<![\w.~$}])/(?:work|root|home|Users|farm)/\w")


def project() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def test_readme_code_runs(monkeypatch):
    """Every Python block of README, in order, in one namespace."""
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    # The graphs are the same; what Inductor makes of them takes a minute of C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    blocks = code_blocks(ROOT / "README.md", "python")
    assert len(blocks) >= 3 and README_MODEL in blocks[0]
    namespace: dict = {"__name__": "readme"}
    for block in blocks:
        source = block.replace(f'"{README_MODEL}"', repr(str(EMBEDDED)))
        exec(compile(source, "README.md", "exec"), namespace)
    assert isinstance(namespace["text"], str) and namespace["text"]


def test_readme_quality_is_as_measured():
    """The formats' table against benchmarks/results/quality.json."""
    found = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    measured = {row["format"]: row for row in found["rows"]}
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("| K and V |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([\w/-]+)`(.*)\|$", table, re.MULTILINE)
    assert len(rows) >= 10
    for name, rest in rows:
        row, cells = measured[name], rest.split("|")[1:5]
        bits = row["bits_per_element"]
        expected = [f"{bits:.2f}".rstrip("0").rstrip("."), f"{100 * bits / 16:.0f} %"]
        expected += [f"{row['kld']:.1e}".replace("e-0", "e-"), f"{100 * row['same_top']:.1f} %"]
        assert [cell.strip() for cell in cells] == expected, name
    assert f"{found['tokens']:,} held-out tokens" in " ".join(readme.split())


def test_readme_shell_commands_exist():
    """What README says to type: make targets and subcommands."""
    from torch_kvq.cli import COMMANDS

    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        assert set(re.findall(r"\bmake ([a-z][\w-]*)\b", "\n".join(commands(text)))) <= targets
        assert set(re.findall(r"-m torch_kvq (\w+)", text)) <= set(COMMANDS)


def commands(text: str) -> list[str]:
    """Shell lines and inline code of a Markdown text."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [*blocks, *re.findall(r"`([^`\n]+)`", text)]


def test_one_version():
    version = project()["project"]["version"]
    assert torch_kvq.__version__ == version
    assert importlib.metadata.version("torch_kvq") == version
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE)


def test_extras():
    extras = project()["project"]["optional-dependencies"]
    assert {"hf", "test", "bench"} <= extras.keys()
    assert set(extras["hf"]) <= set(extras["test"]) & set(extras["bench"])


def test_package_data():
    data = project()["tool"]["setuptools"]["package-data"]["torch_kvq"]
    package = Path(torch_kvq.__file__).parent
    found = {path.relative_to(package).as_posix() for glob in data for path in package.glob(glob)}
    expected = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    expected += ["tokenizer_config.json", "heldout-tokens.u16"]
    assert {"py.typed", *(f"data/tiny-2m/{name}" for name in expected)} == found
    assert sum((package / name).stat().st_size for name in found) < 5e6


def test_only_our_own_top_level_package():
    """A kvq package exists on PyPI: ours must not shadow it."""
    assert all(
        name.split(".")[0] == "torch_kvq" for name in project()["tool"]["setuptools"]["packages"]
    )
    top_level = importlib.metadata.distribution("torch_kvq").read_text("top_level.txt")
    assert top_level is not None and top_level.split() == ["torch_kvq"]


def test_every_subpackage_is_listed():
    listed = set(project()["tool"]["setuptools"]["packages"])
    package = Path(torch_kvq.__file__).parent
    inits = package.rglob("__init__.py")
    found = {".".join(path.parent.relative_to(package.parent).parts) for path in inits}
    assert found == listed


def test_no_machine_paths():
    offending = []
    for path in tracked_files():
        if path.suffix in (".safetensors", ".u16") or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if len(line) < 1000 and PATHS_OF_A_MACHINE.search(line):
                offending.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not offending


@pytest.mark.parametrize("way", ["CXX", "PATH"])
def test_missing_compiler_is_one_sentence(way, tmp_path):
    """setup.py without a compiler: named by CXX, or not found on the PATH."""
    if way == "PATH" and sys.platform == "darwin":
        pytest.skip("macOS finds its compiler without PATH")
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    # ninja alone, so that torch does not complain about its absence instead.
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ninja").symlink_to(Path(sys.executable).parent / "ninja")
    env |= {"CXX": "/nonexistent/c++"} if way == "CXX" else {"PATH": str(tools)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.strip().startswith("torch_kvq needs a C++20 compiler and found no '")
    assert done.stderr.strip().count("\n") == 0
    assert not list((tmp_path).rglob("*.o"))
