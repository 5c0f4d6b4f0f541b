"""Versions, devices and formats of this installation."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

import torch_kvq
from torch_kvq.cli.terminal import CommandError, table
from torch_kvq.formats import FORMATS, KVFormat


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("info", help=__doc__.splitlines()[0], description=__doc__)
    parser.add_argument(
        "--head-dim", type=int, default=128, metavar="D", help="head size of the formats table"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.head_dim <= 0:
        raise CommandError(f"--head-dim must be positive, got {args.head_dim}")
    found = {
        "versions": versions(),
        "devices": devices(),
        "head_dim": args.head_dim,
        "formats": formats(args.head_dim),
    }
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0


def versions() -> dict[str, str | None]:
    """Version of every package that matters; None where it is not installed."""
    found: dict[str, str | None] = {
        "torch_kvq": torch_kvq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("transformers", "safetensors", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def has_kernels(device: str) -> bool:
    """Whether this build has attention kernels for ``"cpu"`` or ``"mps"``."""
    key = device.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("kvq::attention", key)


def devices() -> dict[str, dict[str, Any]]:
    """What each device offers here."""
    cpu = {
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "kernels": has_kernels("cpu"),
        "instruction_set": torch_kvq._C.cpu_isa(),
    }
    mps = {
        "built_into_torch": torch.backends.mps.is_built(),
        "available": torch.backends.mps.is_available(),
        "kernels": has_kernels("mps"),
    }
    return {"cpu": cpu, "mps": mps}


def formats(head_dim: int) -> list[dict[str, Any]]:
    """Every format: bits per element with scales counted, for a bfloat16 or float16 cache."""
    found = []
    for name in FORMATS:
        fmt = KVFormat(name)
        sizes = {}
        for group in fmt.layout.groups or (0,):
            chosen = KVFormat(name, group)
            try:
                chosen.check_head_dim(head_dim)
            except ValueError:
                continue
            sizes[group] = chosen.bits_per_element(head_dim)
        found.append({"name": name, "family": fmt.family, "bits_per_element": sizes})
    return found


def describe(found: dict[str, Any]) -> str:
    """The same for people."""
    named = [f"{name} {version or 'not installed'}" for name, version in found["versions"].items()]
    cpu, mps = found["devices"]["cpu"], found["devices"]["mps"]
    if sys.platform != "darwin" and not mps["available"]:
        metal = "no Apple GPU here"
    elif not mps["available"]:
        metal = "PyTorch finds no Apple GPU"
    else:
        metal = "available" if mps["kernels"] else "available, but this build has no Metal kernels"
    rows = []
    for entry in found["formats"]:
        for group, bits in entry["bits_per_element"].items():
            spec = entry["name"] + (f"-g{group}" if group else "")
            rows.append((spec, entry["family"], f"{bits:.3g}", f"{bits / 16:.3f}"))
    return "\n".join(
        [
            ", ".join(named),
            f"CPU: {cpu['system']}, {cpu['threads']} threads, {cpu['instruction_set']} kernels",
            f"MPS: {metal}",
            "",
            f"Formats at head size {found['head_dim']}, bfloat16 cache "
            "(add -rot to rotate any of them; tq formats always rotate):",
            table(("format", "family", "bits/element", "of bf16"), rows),
        ]
    )
