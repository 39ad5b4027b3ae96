"""`vlmfilm apply WEIGHTS CHECKPOINT`: put FiLM weights into a copy of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

INTERRUPTED = "no file was written"


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("apply", help="put exported FiLM weights into a copy of a checkpoint", description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=None, help="default: the checkpoint's name with -film in it")
    parser.add_argument("--force", action="store_true", help="replace the output where it exists; never the weights or the checkpoint themselves")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the copy and say where it is."""
    from vlmfilm_plugin.checkpoints.film_weights import apply_adapter

    source = arguments.checkpoint
    out = arguments.output or source.with_name(f"{source.stem}-film{source.suffix}")
    names = apply_adapter(arguments.weights, source, out, force=arguments.force)
    print(f"put {len(names)} tensors into a copy of {source.name} (without optimizer state): {out}")
    return 0
