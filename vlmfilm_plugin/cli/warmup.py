"""`vlmfilm warmup`: encode a data set before training, under the keys that training looks up."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.log import is_rank_zero
from vlmfilm_plugin.settings.yaml_file import BadYaml, loads

INTERRUPTED = "what was encoded is stored; the same command goes on from there"
_SPLITS = "train,val,test"
_EPILOG = """\
Several GPUs or machines: torchrun --nproc-per-node 4 -m vlmfilm_plugin warmup --config X.yaml (or `accelerate launch -m ...`).
Every setting is a variable VLM_FILM_<NAME>, or --set NAME=VALUE. Stop it at any time: the next run goes on where it was.
Exit code: 0, 1 where an image failed (the others are stored), 2 for an error, 130 after Ctrl-C."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("warmup", help="encode a data set before training", description=__doc__, epilog=_EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a folder, a CSV or TSV file (columns path[, key or name][, split]), or a text file of paths"
    )
    parser.add_argument("--config", metavar="YAML", help="the host's own configuration: its splits, names and FiLM settings")
    parser.add_argument("--splits", default=_SPLITS, help="which splits of a configuration or a table (default: %(default)s)")
    parser.add_argument("--as-split", metavar="SPLIT", help="the split in the keys of a folder or list (default: as batches that name none)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, its value as in YAML; may be repeated")
    parser.add_argument("--batch-size", type=int, default=64, help="images a transaction; a killed run loses at most these (default: %(default)s)")
    parser.add_argument("--readers", type=int, default=None, help="threads that read images (default: the number of cores, 8 at most)")
    parser.add_argument("--shard-files", action="store_true", help="one store a process, for `vlmfilm cache merge`: where they share no local disk")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Encode, print what was done, and return 1 where an image failed."""
    if (arguments.source is None) == (arguments.config is None):
        raise SettingsError("there must be one thing to encode", {"expected": "--config YAML, or a folder, or a list"}, "give one of them")
    if arguments.batch_size < 1 or (arguments.readers is not None and arguments.readers < 1):
        raise SettingsError("cannot warm up with these numbers", {"expected": "--batch-size and --readers of 1 or more"}, "correct them")
    from vlmfilm_plugin.warmup.encode import warm_up

    report = warm_up(
        arguments.config or arguments.source,
        [split.strip() for split in arguments.splits.split(",") if split.strip()],
        dict(_setting(text) for text in arguments.set),
        as_split=arguments.as_split,
        batch_size=arguments.batch_size,
        readers=arguments.readers,
        shard_files=arguments.shard_files,
        show_progress=not arguments.no_progress,
    )
    if is_rank_zero():
        if arguments.json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            print(
                f"images {report.total}  stored before {report.hits}  encoded {report.encoded}  failed {len(report.failures)}"
                f"  {report.seconds:.1f} s  -> {', '.join(report.stores)}"
            )
            for path, error in report.failures:
                print(f"  FAILED {path!r}: {error}")
    return 1 if report.failures else 0


def _setting(text: str) -> tuple[str, object]:
    name, sign, raw = text.partition("=")
    if not sign or not name.strip():
        raise SettingsError("cannot use --set", {"found": repr(text), "expected": "NAME=VALUE"}, "write for example --set encoder=descriptor")
    try:
        value = loads(raw)
    except BadYaml:
        value = raw
    # A prompt such as `vessels: which?` is text, not a mapping.
    return name.strip().removeprefix("VLM_FILM_").lower(), raw if isinstance(value, dict) else value
