"""The one place that asks what other packages add to this one, by entry point.

At the root, below everything that asks: encoders, stores, host adapters, warm-up and `doctor`. Nothing is imported here; `EntryPoint.load` does that.
The start-up gate asks by itself: it must run where this package cannot be imported.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

ENCODERS = "vlmfilm.encoders"
HOSTS = "vlmfilm.hosts"
STARTUP = "torch.backends"
STORES = "vlmfilm.stores"


def installed(group: str, name: str | None = None) -> list[EntryPoint]:
    """Return the entry points of a group, of one name where it is given, in the order of their names.

    A package on two entries of the search path is listed twice there and once here; two packages that claim one name are both here.
    """
    found = entry_points(group=group) if name is None else entry_points(group=group, name=name)
    return sorted({(entry.name, entry.value): entry for entry in found}.values(), key=lambda entry: (entry.name, entry.value))


def package_of(entry: EntryPoint) -> str:
    """Return the name of the package that an entry point comes from."""
    return entry.dist.metadata["Name"] if entry.dist is not None else "an unknown package"
