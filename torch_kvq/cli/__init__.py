"""``python -m torch_kvq COMMAND``.

A command is one module of this package, named in COMMANDS, with two functions:
``add_parser(commands)`` adds its arguments and returns its parser, and ``run(args)`` does the work
and returns the exit status. Its docstring's first line is what ``--help`` says about it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from torch_kvq.cli.terminal import CommandError

COMMANDS = ("info", "demo", "verify", "bench")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    import torch_kvq

    parser = argparse.ArgumentParser(
        prog="python -m torch_kvq", description="A quantised KV cache for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"torch_kvq {torch_kvq.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"torch_kvq.cli.{name}")
        module.add_parser(commands).set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 1 for a CommandError, 2 for bad usage."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"torch_kvq: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
