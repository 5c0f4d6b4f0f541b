"""Torch's macOS wheel: fetched by pip, unpacked once."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch

CACHE = Path.home() / ".cache" / "torch_kvq"
WANTED = ("torch/include/", "torch/lib/libc10.", "torch/lib/libtorch")


class Unavailable(RuntimeError):
    """The wheel or the compiler cannot be had here; the message says why."""


def unpacked() -> Path:
    """The folder `torch` of the unpacked wheel of the installed version."""
    version = torch.__version__.partition("+")[0]
    folder = CACHE / f"torch-{version}-macos"
    if not (folder / "complete").exists():
        with zipfile.ZipFile(fetch(version)) as archive:
            names = [name for name in archive.namelist() if name.startswith(WANTED)]
            archive.extractall(folder, names)
        (folder / "complete").touch()
    return folder / "torch"


def fetch(version: str) -> Path:
    wheels = CACHE / "wheels"
    pattern = f"torch-{version}-*-macosx_*_arm64.whl"
    if not list(wheels.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", f"torch=={version}", "--no-deps"]
        command += ["--platform", "macosx_14_0_arm64", "--only-binary=:all:", "-d", str(wheels)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(f"no macOS wheel of torch {version}: {done.stderr.strip()[-500:]}")
    return next(wheels.glob(pattern))
