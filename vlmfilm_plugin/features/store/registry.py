"""Feature stores by name: ours, and third parties' by entry point of the group `vlmfilm.stores`: a name, and a factory that takes `Settings`."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from vlmfilm_plugin.entry_points import STORES as STORE_GROUP
from vlmfilm_plugin.entry_points import installed
from vlmfilm_plugin.errors import StoreError, VlmFilmError
from vlmfilm_plugin.features.store.protocol import Store
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.settings.record import Settings

StoreFactory = Callable[[Settings], Store]


def _sqlite(settings: Settings) -> Store:
    return FeatureStore(settings.cache_dir, settings.embedding_dtype)


STORES: dict[str, StoreFactory] = {"sqlite": _sqlite}


def open_store(settings: Settings) -> Store:
    """Open the store named by `settings.store`.

    Raises:
        StoreError: the name is unknown or claimed twice, or the store cannot be opened.
    """
    name = settings.store
    added = {entry.value: entry for entry in installed(STORE_GROUP, name)}
    if len(added) + (name in STORES) > 1:
        claims = ", ".join([*sorted(added), *(["vlmfilm-plugin"] if name in STORES else [])])
        raise StoreError(f"cannot open the feature store {name!r}: the name is claimed twice", {"found": claims}, "uninstall one of these packages")
    if name in STORES:
        return STORES[name](settings)
    if added:
        (entry,) = added.values()
        return _open_added(name, entry.value, entry.load, settings)
    known = sorted({*STORES, *(entry.name for entry in installed(STORE_GROUP))})
    closest = get_close_matches(name, known, n=1)
    facts = {"store": f"{name!r}   (from {settings.origin('store')})", "known": ", ".join(known)}
    raise StoreError("cannot open the feature store: unknown name", facts, f"set `store` to {closest[0] if closest else known[0]!r}")


def _open_added(name: str, value: str, load: Callable[[], StoreFactory], settings: Settings) -> Store:
    try:
        store = load()(settings)
    except VlmFilmError:
        raise
    except Exception as error:  # another's code: whatever it raises is named, and the cause stays attached
        facts = {"entry point": value, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        raise StoreError(f"cannot open the feature store {name!r} of a third party", facts, "correct or uninstall that package") from error
    lacking = sorted({"path", "embedding_dtype", "rows", "rows_of_content", "known_sizes", "write", "keys", "close"} - set(dir(store)))
    if lacking:
        facts = {"entry point": value, "found": f"{type(store).__name__} without {', '.join(lacking)}", "expected": "a Store"}
        raise StoreError(f"cannot use the feature store {name!r} of a third party", facts, "correct or uninstall that package")
    return store
