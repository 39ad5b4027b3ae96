"""`vlmfilm cache`: look after the feature store: stats, verify, merge, prune, export, import, show."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.settings.layers import layers_of, resolve

INTERRUPTED = "the store is sound, and what was moved so far is there; the same command does the rest"


def add_parser(subparsers: Any) -> None:
    """Add the command and its actions to the parser."""
    parser = subparsers.add_parser("cache", help="look after the feature store", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    store = argparse.ArgumentParser(add_help=False, parents=[common])
    store.add_argument("--cache-dir", metavar="DIR", help="folder of the store (default: the setting `cache_dir`)")

    def action(name: str, function: Any, text: str, parent: argparse.ArgumentParser = store) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text, parents=[parent])
        made.set_defaults(run=function)
        return made

    action("stats", _stats, "print the namespaces: facts, features, bytes, dates")
    action("verify", _verify, "check the file and every checksum; exit code 1 where anything is damaged")
    merge = action("merge", _merge, "copy the features of stores into another; of two with one key the newer stays", common)
    merge.add_argument("sources", nargs="+", metavar="SRC", help="folders of stores, or store files")
    merge.add_argument("target", metavar="DST", help="the folder that takes them all; made when missing")
    prune = action("prune", _prune, "delete namespaces and give their space back; nothing is asked")
    choice = prune.add_mutually_exclusive_group(required=True)
    choice.add_argument("--namespace", action="append", default=[], metavar="X", help="delete this one; a fingerprint or its start; may be repeated")
    choice.add_argument("--keep", action="append", default=[], metavar="X", help="delete all but this one; may be repeated")
    prune.add_argument("--dry-run", action="store_true", help="print what would be deleted, delete nothing")
    export = action("export", _export, "write the features of a namespace to a safetensors file")
    export.add_argument("file", metavar="FILE", help="the file to write")
    export.add_argument("--namespace", metavar="X", help="a fingerprint or its start; needed where the store holds several")
    export.add_argument("--force", action="store_true", help="replace the file where it exists; never the store itself")
    importing = action("import", _import, "take the features of an exported file; of two with one key the newer stays")
    importing.add_argument("file", metavar="FILE", help="a file that `export` wrote")
    show = action("show", _show, "print what is stored under a key: facts, stamp, note, norm; exit code 1 where nothing is")
    show.add_argument("key", metavar="KEY", help="such as unknown:train/image/0001.png")
    show.add_argument("--namespace", metavar="X", help="a fingerprint or its start")


def _cache_dir(arguments: argparse.Namespace) -> str:
    return arguments.cache_dir or resolve(layers_of(os.environ)).cache_dir


def _date(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError, TypeError):  # of a damaged row
        return f"no date: {seconds!r}"


def _plain(text: object) -> str:
    """Return a text out of a store for a terminal: what could steer it is written out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))


def _say(arguments: argparse.Namespace, facts: dict[str, Any], *lines: str) -> None:
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines))


def _stats(arguments: argparse.Namespace) -> int:
    from vlmfilm_plugin.features.store.admin import opened, stats

    with opened(_cache_dir(arguments)) as file:
        spaces = stats(file)
        size = sum(path.stat().st_size for path in file.path.parent.glob(f"{file.path.name}*"))
        facts = {"store": str(file.path), "file_bytes": size, "features": sum(space.count for space in spaces)}
        lines = [f"{file.path}: {facts['features']} features, {size / 1e6:.1f} MB on disk"]
        for space in spaces:
            lines.append(
                f"{_plain(space.fingerprint)}: {space.count} features of width {space.width}, {space.bytes / 1e6:.1f} MB, {space.notes} notes"
            )
            lines.append(f"  written {_date(space.first)} to {_date(space.last)}")
            lines.append(f"  {json.dumps(space.facts, sort_keys=True)}")
    _say(arguments, {**facts, "namespaces": [asdict(space) for space in spaces]}, *lines)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from vlmfilm_plugin.features.store.admin import opened, verify

    with opened(_cache_dir(arguments)) as file:
        found = verify(file)
        lines = [f"{file.path}: {found.checked} features checked, {len(found.damaged)} damaged"]
        lines += [f"  DAMAGED {key!r} in {_plain(fingerprint)}: it is encoded again when it is next needed" for fingerprint, key in found.damaged]
        lines += [f"  PROBLEM {_plain(problem)}" for problem in found.problems]
        _say(arguments, {"store": str(file.path), "is_sound": found.is_sound, **asdict(found)}, *lines)
    return 0 if found.is_sound else 1


def _merge(arguments: argparse.Namespace) -> int:
    from vlmfilm_plugin.features.store.admin import Merged, merge, opened

    total = Merged()
    with opened(arguments.target, is_new_fine=True) as target:
        for place in arguments.sources:
            with opened(place) as source:
                if os.path.samefile(source.path, target.path):
                    raise StoreError("cannot merge a store into itself", {"store": source.path}, "take it out of the sources")
                merge(source, target, total)
        _say(arguments, {"store": str(target.path), **asdict(total)}, f"{target.path}: {_counts(total)}")
    return 1 if total.damaged else 0


def _counts(done: Any) -> str:
    return f"{done.added} added, {done.replaced} replaced by newer ones, {done.kept} kept, {done.damaged} damaged and left out"


def _prune(arguments: argparse.Namespace) -> int:
    from vlmfilm_plugin.features.store.admin import opened, prune

    with opened(_cache_dir(arguments)) as file:
        going = prune(file, drop=arguments.namespace, keep=arguments.keep, dry_run=arguments.dry_run)
        word = "would delete" if arguments.dry_run else "deleted"
        lines = [f"{word} {_plain(space.fingerprint)}: {space.count} features, {space.bytes / 1e6:.1f} MB" for space in going] or [
            "nothing to delete"
        ]
        facts = {"store": str(file.path), "is_dry_run": arguments.dry_run, "namespaces": [asdict(space) for space in going]}
    _say(arguments, facts, *lines)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from vlmfilm_plugin.features.store.admin import opened, select, stats
    from vlmfilm_plugin.features.store.safetensors_file import export

    with opened(_cache_dir(arguments)) as file:
        space = select(stats(file), arguments.namespace or "")
        count = export(file, space, arguments.file, force=arguments.force)
    facts = {"file": str(Path(arguments.file)), "namespace": space.fingerprint, "features": count}
    _say(arguments, facts, f"{arguments.file}: {count} features of {space.fingerprint}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from vlmfilm_plugin.features.store.admin import opened
    from vlmfilm_plugin.features.store.safetensors_file import import_file

    with opened(_cache_dir(arguments), is_new_fine=True) as file:
        fingerprint, done = import_file(file, arguments.file)
        _say(arguments, {"store": str(file.path), "namespace": fingerprint, **asdict(done)}, f"{file.path}, {fingerprint}: {_counts(done)}")
    return 1 if done.damaged else 0


def _show(arguments: argparse.Namespace) -> int:
    from vlmfilm_plugin.features.store.admin import opened, show, similar_keys

    with opened(_cache_dir(arguments)) as file:
        found = show(file, arguments.key, arguments.namespace)
        if not found:
            alike = ", ".join(repr(key) for key in similar_keys(file, arguments.key)) or "none"
            print(f"no feature under {arguments.key!r} in {file.path}; keys that contain it: {alike}", file=sys.stderr)
    lines = []
    for entry in found:
        lines += [f"{name + ':':<12}{_date(value) if name == 'created' else _plain(value)}" for name, value in entry.items()]
    _say(arguments, {"entries": found}, *lines)
    return 0 if found else 1
