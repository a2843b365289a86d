"""The tables, as migrations: entry N takes a file from ``user_version`` N to N + 1.

An entry that a release has shipped is never edited; a change is a new entry. Each runs
in one transaction together with its new ``user_version``, so a crash in the middle
leaves the old version, whole.

``ports.body`` and ``networks.body`` are the JSON of the model's structs; the columns
beside them exist to be searched or to be unique. Times are unix seconds.
"""

from __future__ import annotations

from typing import Final

_V1: Final = (
    # instance_id: this state directory's own, made once. boot_id: the boot we last ran in.
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # AUTOINCREMENT: a net_id is in the maps of the data path, so it is never used twice.
    """CREATE TABLE networks (
        net_id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        body BLOB NOT NULL)""",
    """CREATE TABLE ports (
        port_id TEXT PRIMARY KEY,
        owner_key TEXT NOT NULL UNIQUE,
        network TEXT NOT NULL REFERENCES networks(name),
        state TEXT NOT NULL,
        rep_name TEXT NOT NULL UNIQUE,
        alias TEXT NOT NULL,
        body BLOB NOT NULL)""",
    "CREATE INDEX ports_by_network ON ports(network, state)",
    "CREATE INDEX ports_by_alias ON ports(alias)",
    # Deferred: reserve() may come before put_port() in the transaction that makes both.
    # With it, an address without a port can't be committed: the record can't leak.
    """CREATE TABLE addresses (
        address TEXT PRIMARY KEY,
        family INTEGER NOT NULL,
        network TEXT NOT NULL,
        range_set INTEGER NOT NULL,
        port_id TEXT NOT NULL REFERENCES ports(port_id) DEFERRABLE INITIALLY DEFERRED) WITHOUT ROWID""",
    "CREATE INDEX addresses_by_port ON addresses(port_id)",
    """CREATE TABLE released (
        address TEXT PRIMARY KEY,
        network TEXT NOT NULL,
        released_at REAL NOT NULL,
        port_id TEXT NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX released_by_time ON released(released_at)",
    """CREATE TABLE cursors (
        network TEXT NOT NULL,
        range_set INTEGER NOT NULL,
        last_address TEXT NOT NULL,
        PRIMARY KEY (network, range_set)) WITHOUT ROWID""",
    # No reference to ports: an entry outlives the port that it deleted.
    """CREATE TABLE journal (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        port_id TEXT NOT NULL,
        kind TEXT NOT NULL,
        plan BLOB NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('intent', 'done', 'failed')),
        created REAL NOT NULL)""",
    "CREATE INDEX journal_pending ON journal(id) WHERE state = 'intent'",
    """CREATE TABLE owned (
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        detail BLOB NOT NULL,
        PRIMARY KEY (kind, name)) WITHOUT ROWID""",
)

# Policy: the files as they were applied, so that every rule can say where it stands.
_V2: Final = ("CREATE TABLE manifests (name TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID",)

# Which of them are of the watched folder. And networks have an isolation from here on, in their body: a
# version that knows nothing of it would open them, so it must refuse the file.
_V3: Final = ("ALTER TABLE manifests ADD COLUMN watched INTEGER NOT NULL DEFAULT 0",)

# Domain names: the addresses that are open by one, so that a restart cuts nobody off. No reference to ports:
# what is nobody's goes at the next start.
_V4: Final = (
    """CREATE TABLE resolved (
        port_id TEXT NOT NULL,
        pattern TEXT NOT NULL,
        address TEXT NOT NULL,
        until REAL NOT NULL,
        PRIMARY KEY (port_id, pattern, address)) WITHOUT ROWID""",
)

# Taps on devices of other plugins (CNI chaining). Not in ports: they have no representor, network or address.
_V5: Final = (
    """CREATE TABLE chained (
        port_id TEXT PRIMARY KEY,
        owner_key TEXT NOT NULL,
        alias TEXT NOT NULL,
        body BLOB NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX chained_by_owner ON chained(owner_key)",
)

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (_V1, _V2, _V3, _V4, _V5)
