"""Someone's store: other schemas, triggers, views, values of any kind. What is read is right or left out, and every command ends."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import made
import numpy as np
from referee import Kind, Wrong

VALUES = (
    None, 0, -1, 2**63 - 1, -(2**63), 1.5, float("inf"), float("-inf"), "", "text", "\0", "x" * 100_000, b"", b"\xff\xfe", b"\0" * 128,
    b"x" * 100_000,
)  # fmt: skip
COLUMNS = (
    "namespace", "key", "source_size", "source_mtime_ns", "source_digest", "source_place", "dtype", "width", "data", "checksum", "created",
    "note", "source_ctime_ns", "source_inode",
)  # fmt: skip
SPACES = ("id", "fingerprint", "facts", "created")

Craft = Callable[[sqlite3.Connection, random.Random], None]


def _set_values(connection: sqlite3.Connection, chance: random.Random) -> None:
    """Put any value into any column, checksums left as they are."""
    for _ in range(chance.randrange(1, 6)):
        column = chance.choice(COLUMNS)
        connection.execute(f"UPDATE OR IGNORE features SET {column} = ? WHERE rowid % 7 = ?", (chance.choice(VALUES), chance.randrange(7)))


def _set_spaces(connection: sqlite3.Connection, chance: random.Random) -> None:
    column = chance.choice(SPACES)
    value = chance.choice([value for value in VALUES if column != "id" or isinstance(value, int)])
    connection.execute(f"UPDATE OR IGNORE namespaces SET {column} = ? WHERE rowid = 1", (value,))


def _forge_facts(connection: sqlite3.Connection, chance: random.Random) -> None:
    text = chance.choice(
        ["[" * 100_000, "{}", "[]", "null", '{"a": 1e999}', "{" * 5, '{"encoder": NaN}', "\ud7ff" * 9, '{"a":' * 3000 + "1" + "}" * 3000]
    )
    connection.execute("UPDATE namespaces SET facts = ?", (text,))


def _swap_spaces(connection: sqlite3.Connection, chance: random.Random) -> None:
    """Give one encoder's rows to another."""
    low, high = connection.execute("SELECT min(id), max(id) FROM namespaces").fetchone()
    connection.execute("UPDATE namespaces SET id = -1 WHERE id = ?", (low,))
    connection.execute("UPDATE namespaces SET id = ? WHERE id = ?", (low, high))
    connection.execute("UPDATE namespaces SET id = ? WHERE id = -1", (high,))


def _swap_data(connection: sqlite3.Connection, chance: random.Random) -> None:
    connection.execute("UPDATE features SET data = (SELECT data FROM features AS other WHERE other.rowid = features.rowid % 50 + 1)")


def _forge_checksums(connection: sqlite3.Connection, chance: random.Random) -> None:
    """NaN, infinity, another width, with a checksum that is right."""
    from vlmfilm_plugin.features.store.rows import COLUMNS, Row, checksum

    data = np.full(chance.choice([1, 63, 64, 65]), chance.choice([np.nan, np.inf, 1.0]), np.float16).tobytes()
    for row in map(Row._make, connection.execute(f"SELECT {COLUMNS} FROM features LIMIT 5").fetchall()):
        forged = row._replace(data=data, width=len(data) // 2)
        values = (data, forged.width, checksum(forged, made.IDENTITY.fingerprint), row.key)
        connection.execute("UPDATE features SET data = ?, width = ?, checksum = ? WHERE key = ?", values)


def _trigger(connection: sqlite3.Connection, chance: random.Random) -> None:
    event = chance.choice(["INSERT", "UPDATE", "DELETE"])
    table, when = chance.choice(["features", "namespaces"]), chance.choice(["BEFORE", "AFTER"])
    body = chance.choice(
        [
            "UPDATE features SET data = zeroblob(128)",
            "DELETE FROM features",
            "SELECT load_extension('/tmp/evil')",
            "INSERT INTO namespaces (fingerprint, facts, created) VALUES (hex(randomblob(8)), '{}', 0)",
            "SELECT RAISE(ABORT, 'no')",
        ]
    )
    connection.execute(f"CREATE TRIGGER evil {when} {event} ON {table} BEGIN {body}; END")


def _view(connection: sqlite3.Connection, chance: random.Random) -> None:
    """A view, of endless rows or of other features, under a table's name."""
    connection.execute("ALTER TABLE features RENAME TO hidden")
    columns = ", ".join(COLUMNS)
    endless = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {columns} FROM hidden, n"
    shifted = f"SELECT {columns.replace('data', 'zeroblob(128) AS data')} FROM hidden"
    connection.execute(f"CREATE VIEW features AS {chance.choice([endless, shifted])}")


def _columns(connection: sqlite3.Connection, chance: random.Random) -> None:
    column = chance.choice(["note", "created", "source_place", "source_mtime_ns"])
    what = chance.choice([f"RENAME COLUMN {column} TO other", f"DROP COLUMN {column}", "ADD COLUMN more"])
    connection.execute(f"ALTER TABLE features {what}")


def _drop(connection: sqlite3.Connection, chance: random.Random) -> None:
    connection.execute(f"DROP TABLE {chance.choice(['features', 'namespaces'])}")


def _version(connection: sqlite3.Connection, chance: random.Random) -> None:
    connection.execute(f"PRAGMA {chance.choice(['user_version', 'application_id'])} = {chance.choice([-1, 0, 1, 2, 4, 99, 2**31 - 1])}")


def _generated(connection: sqlite3.Connection, chance: random.Random) -> None:
    connection.execute("ALTER TABLE features ADD COLUMN evil AS (abs(-9223372036854775807 - 1))")
    connection.execute("CREATE INDEX evil_index ON features (hex(data))")


def _foreign(connection: sqlite3.Connection, chance: random.Random) -> None:
    """No store at all: somebody's own data."""
    connection.execute("DROP TABLE features")
    connection.execute("DROP TABLE namespaces")
    connection.execute("PRAGMA user_version = 0")
    connection.execute("CREATE TABLE patients (name TEXT)")
    connection.execute("INSERT INTO patients VALUES ('someone')")


CRAFTS: tuple[Craft, ...] = (
    _set_values, _set_values, _set_values, _set_spaces, _forge_facts, _swap_spaces, _swap_data, _forge_checksums, _trigger, _trigger, _view,
    _columns, _drop, _version, _generated, _foreign,
)  # fmt: skip


class HostileStores(Kind):
    name, full, short = "crafted store", 480, 16

    def prepare(self, folder: Path) -> None:
        self.source = made.make_store(folder / "cache")

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        craft, cache = CRAFTS[number % len(CRAFTS)], folder / "cache"
        cache.mkdir()
        file = cache / self.source.name
        file.write_bytes(self.source.read_bytes())
        connection = sqlite3.connect(file, isolation_level=None)
        connection.execute("PRAGMA legacy_alter_table = ON")
        connection.execute("PRAGMA foreign_keys = OFF")
        craft(connection, chance)
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.close()
        before = file.read_bytes()
        try:
            codes = self.look(folder, cache)
        except Wrong as wrong:
            raise Wrong(f"{craft.__name__}: {wrong}") from wrong
        except Exception as error:
            error.args = (f"{craft.__name__}: {error}",)
            raise
        if craft is _foreign and (file.read_bytes() != before or set(codes) != {2}):
            raise Wrong("somebody's database was changed, or taken for a store")
        return "read" if 0 in codes else "refused or damaged"

    def look(self, folder: Path, cache: Path) -> list[int]:
        codes = [made.command("cache", action, "--cache-dir", cache) for action in ("stats", "verify")]
        codes.append(made.command("cache", "show", "k3", "--cache-dir", cache))
        codes.append(made.command("cache", "merge", cache, folder / "merged"))
        codes.append(made.command("cache", "export", folder / "out", "--namespace", made.IDENTITY.fingerprint, "--cache-dir", cache))
        if codes[-1] == 0:
            made.command("cache", "import", folder / "out", "--cache-dir", folder / "imported")
        for place in (cache, folder / "merged", folder / "imported"):
            if place.exists() and (codes[-1] != 2 or place != cache):
                try:
                    made.check_store(place)
                except Wrong:
                    raise Wrong(f"a wrong feature from the {place.name} store") from None
        codes.append(made.command("cache", "prune", "--keep", made.IDENTITY.fingerprint, "--cache-dir", cache))
        return codes
