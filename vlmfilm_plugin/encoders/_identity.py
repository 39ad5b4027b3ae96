"""Whose weights a model has: the facts that identify them, taken from the very files that the loader opens, and what they were called before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.encoders import _loading as loading
from vlmfilm_plugin.encoders._folder_digest import FileStamp, content_digest, files_of_first_version, folder_digest
from vlmfilm_plugin.encoders._quantised import marks, refuse_quantised
from vlmfilm_plugin.encoders._weights import WeightFiles

if TYPE_CHECKING:
    from vlmfilm_plugin.settings.record import Settings


@dataclass(frozen=True)
class Weights:
    """Whose weights a model has: the facts that identify them, the stamps of their files (local ones), and what they were called before."""

    facts: Mapping[str, object]
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)
    former: Mapping[str, object] | None = None


def stamps_of(settings: Settings, config: Any) -> dict[Path, FileStamp]:
    """Return the stamps of the files that a local model is loaded from; empty for one of the hub, whose commit never changes."""
    folder = loading.folder_of(settings)
    if folder is None:
        return {}
    with loading.explained("find the weights of", settings):
        names = ["config.json", *loading.weight_files(settings, config).present()]
        return {folder / name: FileStamp.of(folder / name) for name in names if (folder / name).is_file()}


def weights_of(settings: Settings, config: Any, part: Callable[[], loading.Part | None]) -> Weights:
    """Return what identifies the weights: the content of the files that a local folder is loaded from, wherever it lies, or hub name and commit.

    Args:
        part: gives the part that is loaded as it is, None for a whole model; asked for only where the checkpoint has quantised weights.

    Raises:
        EncoderError: there are no weights, or those that would be loaded are quantised: nothing may be stored or served under their name.
    """
    folder = loading.folder_of(settings)
    if folder is None:
        return Weights({"model": settings.model_name, "revision": getattr(config, "_commit_hash", None) or settings.revision})
    with loading.explained("find the weights of", settings):
        files = loading.weight_files(settings, config)
        used = files.present()
        if not used:
            names = ", ".join(sorted(set(files.file_of.values()))[:3])
            raise FileNotFoundError(f"none of the files that the index names: {names}")
        _refuse_quantised_part(settings, config, files, part)
        stamps = stamps_of(settings, config)
        digest = folder_digest(folder, used, settings.cache_dir)
        before = files_of_first_version(folder)
        # What the first version hashed says which weights it used only where these were among it.
        former = folder_digest(folder, before, settings.cache_dir) if set(used) <= set(before) else None
    return Weights(_local_facts(digest), stamps, None if former is None else _local_facts(former))


def _local_facts(digest: str) -> dict[str, object]:
    return {"model": f"folder:{digest}", "revision": None}


def facts_of_files(settings: Settings, label: str, names: Sequence[str]) -> dict[str, object]:
    """Return a fact of the content of small files of a local model; none for one of the hub, whose commit says it."""
    folder = loading.folder_of(settings)
    return {} if folder is None else {label: content_digest(folder, names)}


def _refuse_quantised_part(settings: Settings, config: Any, files: WeightFiles, part: Callable[[], loading.Part | None]) -> None:
    found = files.dtypes()
    if not marks(found):
        return
    held = part()
    if held is None:
        loading.refuse_unnamed_formats(settings, config, files)
        return
    wanted = held.dtypes()
    refuse_quantised(loading.name_of(settings), config, found, wanted, files.prefix_of(list(wanted), loading.name_of(settings)))
