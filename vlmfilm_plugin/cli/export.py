"""`vlmfilm export CHECKPOINT WEIGHTS`: write the FiLM weights of a checkpoint to a small file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

INTERRUPTED = "no file was written"
LAYOUTS = ("own", "port")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("export", help="write a checkpoint's FiLM weights alone to a safetensors file", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("weights", type=Path, help="the safetensors file to write")
    parser.add_argument("--layout", choices=LAYOUTS, default="own", help="port: the soft-seg port's names")
    parser.add_argument("--force", action="store_true", help="replace the file where it exists; never the checkpoint itself")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file and say what is in it."""
    from vlmfilm_plugin.checkpoints.film_weights import export_adapter

    names = export_adapter(arguments.checkpoint, arguments.weights, arguments.layout, force=arguments.force)
    print(f"wrote {len(names)} tensors, {arguments.weights.stat().st_size / 1e6:.2f} MB: {arguments.weights}")
    return 0
