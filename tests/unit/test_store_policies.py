"""The record of policy: manifests, which of them are the watched folder's, and files of earlier versions."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from portwright.model.network import Network
from portwright.store import Store
from portwright.store.database import FILE_NAME
from portwright.store.schema import MIGRATIONS


def test_the_folders_manifests_are_told_apart(tmp_path: Path) -> None:
    """Which files are the watched folder's is on record with them, and replaced with them."""
    with Store.open(tmp_path) as store:
        store.set_manifests([("/f/a", "A"), ("b", "B")], {"/f/a"})
    with Store.open(tmp_path) as store:
        assert store.manifests() == [("/f/a", "A"), ("b", "B")]
        assert store.watched_manifests() == {"/f/a"}
        store.set_manifests([("/f/a", "A")])
        assert store.watched_manifests() == set()


def test_isolation_is_on_record(tmp_path: Path) -> None:
    """A network keeps its isolation over a restart, and a change of it."""
    with Store.open(tmp_path) as store:
        made = store.add_network(Network(name="n", net_id=0, isolation="strict"))
    with Store.open(tmp_path) as store:
        assert store.get_network("n") == made
        store.update_network(Network(name="n", net_id=0, isolation="tenant"))
    with Store.open(tmp_path) as store:
        assert store.get_network("n").isolation == "tenant"


def test_a_file_from_before_folders_and_isolation(tmp_path: Path) -> None:
    """Schema 2 comes over whole: its networks are open, its manifests were applied by hand."""
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        for statement in (*MIGRATIONS[0], *MIGRATIONS[1]):
            connection.execute(statement)
        connection.execute(
            "INSERT INTO networks(name, body) VALUES ('n', ?)", (b'{"name":"n","net_id":1,"mtu":1400}',)
        )
        connection.execute("INSERT INTO manifests VALUES ('web.yaml', 'text')")
        connection.execute("PRAGMA user_version=2")
    with Store.open(tmp_path) as store:
        assert store.get_network("n") == Network(name="n", net_id=1, mtu=1400, isolation="open")
        assert store.manifests() == [("web.yaml", "text")]
        assert store.watched_manifests() == set()
