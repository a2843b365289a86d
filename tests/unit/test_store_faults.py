"""What can go wrong around the file: each fault is one clear error, and nothing is half done."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from portwright.model.errors import Conflict, KernelFailed, PortwrightError
from portwright.model.network import AddressRange, Network
from portwright.model.port import NetnsRef, Owner, Port, PortState, rep_name
from portwright.store import Store
from portwright.store.database import FILE_NAME

NS = NetnsRef(path="/proc/1/ns/net", cookie=1, boot_id="b")


def add(store: Store, number: int, *, padding: int = 0) -> str:
    """Make a port with one address; return the address."""
    port_id = f"{number:08x}00000000"
    port = Port(
        port_id=port_id, network="n", net_id=1, owner=Owner(kind="name", name=port_id), model="veth",
        state=PortState.CREATING, ifname="eth0", rep_name=rep_name(port_id), mac="02:00:00:00:00:01",
        mtu=1500, host=NS, sandbox=NS, labels={"padding": "x" * padding},
    )  # fmt: skip
    with store.transaction():
        ((_, address),) = store.reserve("n", None, port_id, now=0.0)
        store.put_port(port)
        store.begin(port_id, "add", b"plan")
    return address


def fill(path: Path, ports: int = 50) -> None:
    """Make a store with some ports."""
    with Store.open(path) as store:
        store.add_network(Network(name="n", net_id=0, pools=((AddressRange(subnet="10.1.0.0/16"),),)))
        for number in range(ports):
            add(store, number)


def refused(path: Path, number: int) -> KernelFailed:
    """Open, expect KernelFailed with this errno, and that the directory is free again."""
    with pytest.raises(KernelFailed) as caught:
        Store.open(path)
    assert caught.value.errno == number, str(caught.value)
    with pytest.raises(KernelFailed):  # not Conflict: the lock was given back
        Store.open(path)
    return caught.value


def picture(store: Store) -> tuple[object, ...]:
    """Return all that a half-done transaction could have changed, of the file and of memory."""
    held = store.held_addresses()
    return (
        list(store.ports()), held, store.pending(), store.usage("n", now=0.0),
        {a: store.address_owner(a) for a in held},
    )  # fmt: skip


@pytest.mark.parametrize("damage", ["header", "garbage", "truncated", "middle"])
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    """A damaged file is EUCLEAN with a way out, and not a byte of it is changed."""
    fill(tmp_path)
    file = tmp_path / FILE_NAME
    content = bytearray(file.read_bytes())
    match damage:
        case "header":
            content[:16] = b"not a database!!"
        case "garbage":
            content = bytearray(os.urandom(len(content)))
        case "truncated":
            del content[len(content) // 2 :]
        case _:
            for page in range(4096, len(content), 4096):
                content[page : page + 100] = b"\xff" * 100
    file.write_bytes(content)
    error = refused(tmp_path, errno.EUCLEAN)
    assert "Move it aside and start again" in str(error)
    assert str(file) in str(error)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE networks SET body = x'7b'",
        "UPDATE networks SET body = json_set(body, '$.net_id', 9)",
        "UPDATE addresses SET address = 'nonsense' WHERE address = '10.1.0.2'",
        "UPDATE cursors SET last_address = 7",
    ],
)
def test_rows_that_we_did_not_write(tmp_path: Path, statement: str) -> None:
    """Content that can't be ours is damage as well, told at open and not at the tenth ADD."""
    fill(tmp_path)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute(statement)
    connection.close()
    refused(tmp_path, errno.EUCLEAN)


def test_a_damaged_port_record(tmp_path: Path) -> None:
    """A port whose record can't be read says so when it is read."""
    fill(tmp_path, 2)
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    with connection:
        connection.execute("UPDATE ports SET body = x'7b7d' WHERE port_id = '0000000100000000'")
    connection.close()
    with Store.open(tmp_path) as store:
        assert store.get_port("0000000000000000").state is PortState.CREATING
        with pytest.raises(KernelFailed, match="record of a port"):
            store.get_port("0000000100000000")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """A downgrade doesn't touch a file that it can't understand."""
    fill(tmp_path, 1)
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(Conflict, match="written by a newer Portwright"):
        Store.open(tmp_path)


def test_one_daemon_per_directory(tmp_path: Path) -> None:
    """A second open is a Conflict that names the process; a killed holder gives the lock back."""
    with Store.open(tmp_path), pytest.raises(Conflict, match=f"pid {os.getpid()}"):
        Store.open(tmp_path)
    program = (
        "import sys; from portwright.store import Store\n"
        "store = Store.open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(Conflict, match=f"pid {child.pid}"):
            Store.open(tmp_path)
    finally:
        child.kill()
        child.communicate()
    Store.open(tmp_path).close()


def test_files_are_private(tmp_path: Path) -> None:
    """The directory is 0700 and the files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        with Store.open(tmp_path / "a" / "state") as store:
            modes = {p.name: p.stat().st_mode & 0o777 for p in store.path.parent.iterdir()}
            assert set(modes.values()) == {0o600}
            assert {"lock", "state.db", "state.db-wal"} <= set(modes)
            assert store.path.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_close_is_idempotent_and_folds_the_log(tmp_path: Path) -> None:
    """After close there is one file and the lock; closing again is nothing."""
    store = Store.open(tmp_path)
    store.checkpoint()
    store.close()
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "state.db"]


def test_a_state_dir_that_is_a_file(tmp_path: Path) -> None:
    """A wrong path is one sentence, not a traceback of sqlite3."""
    (tmp_path / "file").touch()
    with pytest.raises(KernelFailed, match="state directory"):
        Store.open(tmp_path / "file")
    with pytest.raises(KernelFailed, match="state directory"):
        Store.open(tmp_path / "file" / "below")


def test_a_full_file_changes_nothing(tmp_path: Path) -> None:
    """ENOSPC in the middle of an ADD: file and memory are as before, and work goes on with space."""
    fill(tmp_path)
    with Store.open(tmp_path) as store:
        connection = store._connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages + 2}")
        before = picture(store)
        with pytest.raises(KernelFailed) as caught:
            add(store, 100, padding=50_000)
        assert caught.value.errno == errno.ENOSPC
        assert "nothing was changed" in str(caught.value)
        assert picture(store) == before
        connection.execute("PRAGMA max_page_count=100000")
        assert add(store, 101, padding=50_000) == "10.1.0.52"
        assert store.port_count() == 51


def test_a_swallowed_failure_cannot_be_committed(tmp_path: Path) -> None:
    """SQLite may have rolled back behind our back: what follows in that transaction is refused."""
    fill(tmp_path)
    with Store.open(tmp_path) as store:
        store._connection.execute("PRAGMA max_page_count=1")
        before = picture(store)

        def careless() -> None:
            """Ignore the error of a statement and go on."""
            with store.transaction():
                with pytest.raises(KernelFailed):
                    store.own("kind", "name", "x" * 100_000)
                with pytest.raises(PortwrightError, match="can only be rolled back"):
                    store.own("kind", "small")

        with pytest.raises(PortwrightError, match="can only be rolled back"):
            careless()
        assert picture(store) == before
        assert store.owned() == []


def test_another_writer_is_busy_not_a_hang(tmp_path: Path) -> None:
    """A person's sqlite3 shell in a transaction: EBUSY in half a second, and then all is well."""
    fill(tmp_path, 1)
    with Store.open(tmp_path) as store:
        other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(KernelFailed) as caught:
            add(store, 5)
        assert caught.value.errno == errno.EBUSY
        other.execute("ROLLBACK")
        other.close()
        assert add(store, 6) == "10.1.0.3"


def test_a_file_size_limit(tmp_path: Path) -> None:
    """RLIMIT_FSIZE (EFBIG) is told as an I/O error and changes nothing."""
    fill(tmp_path)
    with Store.open(tmp_path) as store:
        before = picture(store)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
        try:
            with pytest.raises(KernelFailed) as caught:
                add(store, 100, padding=100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert caught.value.errno in {errno.EIO, errno.ENOSPC}
        assert picture(store) == before
        assert add(store, 101) == "10.1.0.52"


_ON_TMPFS = r"""
import os, subprocess, sys
from portwright.model.errors import KernelFailed
from portwright.store import Store
where, case = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", where], check=True)
if case == "full":
    store = Store.open(where)
    with open(where + "/filler", "wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096): pass
        except OSError: pass
    before = store.owned()
    try:
        for i in range(1000): store.own("kind", f"{i}", "x" * 3000)
    except KernelFailed as error: print(error)
    count = len(store.owned())
    os.unlink(where + "/filler")
    assert store.own("after", "space")
    assert len(store.owned()) == count + 1
    store.close()
    with Store.open(where) as store: assert len(store.owned()) == count + 1
else:
    Store.open(where).close()
    subprocess.run(["mount", "-o", "remount,ro", where], check=True)
    try: Store.open(where)
    except KernelFailed as error: print(error)
"""


@pytest.mark.netns
@pytest.mark.parametrize(("case", "said"), [("full", "ENOSPC"), ("readonly", "EROFS")])
def test_a_real_file_system_that_is_full_or_read_only(tmp_path: Path, case: str, said: str) -> None:
    """On a tmpfs of 400 kB in a mount namespace of its own: the errno is the real one; work goes on after."""
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", _ON_TMPFS, str(tmp_path), case],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
