"""The file under the store: one writer, transactions, and errors that say what to do.

Why each choice:

- WAL, because a commit is then one append. ``synchronous=FULL`` syncs that append, and
  an intent must be on the disk before the kernel is touched. A completion may be lost
  with the power (``NORMAL``): recovery then finds the intent and looks at the kernel.
  The file is consistent either way, and a killed daemon loses nothing either way.
- A lock file with flock(2) next to the database, because the addresses are held in
  memory: a second writer would not corrupt the file, it would make the memory wrong.
  SQLite's own locks are held per transaction only.
- ``_broken``: after 'disk full' and I/O errors SQLite may have rolled the transaction
  back on its own; the next statement would then commit by itself, half of something.
  So after any failure that is not a mere constraint, the transaction refuses all else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from portwright.model.errors import Conflict, InternalError, KernelFailed, PortwrightError
from portwright.store.schema import MIGRATIONS

FILE_NAME: Final = "state.db"
LOCK_NAME: Final = "lock"

#: Log pages (16 MB) at which a commit folds the log into the file, for several ms, if nobody called
#: checkpoint() in time: a burst of some 300 ADDs must not pay for it.
_LOG_PAGES: Final = 4000
#: A person's sqlite3 shell may hold the file for a moment; the daemon can't wait longer than that.
_BUSY_SECONDS: Final = 0.5

Row = tuple[Any, ...]

_DAMAGED = (
    "the state file is damaged; it was left as it is. Move it aside and start again: "
    "the next start removes the ports that then have no record, and they have to be made anew"
)
_ERRNO: Final[dict[int, tuple[int, str]]] = {
    sqlite3.SQLITE_FULL: (errno.ENOSPC, "nothing was changed; free some space and try again"),
    sqlite3.SQLITE_READONLY: (errno.EROFS, "nothing was changed; the daemon must be able to write there"),
    sqlite3.SQLITE_IOERR: (
        errno.EIO,
        "nothing was changed; look at the disk (dmesg) and at file size limits",
    ),
    sqlite3.SQLITE_CORRUPT: (errno.EUCLEAN, _DAMAGED),
    sqlite3.SQLITE_NOTADB: (errno.EUCLEAN, _DAMAGED),
    sqlite3.SQLITE_CANTOPEN: (errno.EACCES, "the file can't be opened or made there"),
    sqlite3.SQLITE_PERM: (errno.EACCES, "the file can't be opened or made there"),
    sqlite3.SQLITE_BUSY: (errno.EBUSY, "another program holds the file locked; nothing was changed"),
    sqlite3.SQLITE_LOCKED: (errno.EBUSY, "another program holds the file locked; nothing was changed"),
    sqlite3.SQLITE_NOMEM: (errno.ENOMEM, "nothing was changed"),
}


def translate(error: sqlite3.Error, path: Path) -> PortwrightError:
    """Return our error for SQLite's: KernelFailed with an errno, or InternalError."""
    code = getattr(error, "sqlite_errorcode", None)
    # 'file is not a database' comes without a code from some calls of the sqlite3 module
    primary = code & 0xFF if code is not None else -1
    if primary not in _ERRNO:
        return InternalError(f"state file {path}: {error}")
    number, advice = _ERRNO[primary]
    return KernelFailed(number, f"state file {path}", f"{error}: {advice}")


def damaged(path: Path, what: str) -> KernelFailed:
    """Return the error for a file whose content is not what we wrote."""
    return KernelFailed(errno.EUCLEAN, f"state file {path}", f"{what}: {_DAMAGED}")


def take_lock(state_dir: Path) -> int:
    """Make ``state_dir`` (0700) and lock it; return the descriptor that holds the lock.

    The lock ends with the descriptor, so with the process, however it dies. Raises
    Conflict if another daemon has the directory, KernelFailed if it can't be written.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(state_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KernelFailed(error.errno or errno.EIO, f"state directory {state_dir}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)  # for people: the lock itself is what counts
    except BlockingIOError:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        why = f"another daemon (pid {pid}) uses it; give this one its own --state-dir"
        raise Conflict("state directory", str(state_dir), why) from None
    except OSError as error:
        os.close(fd)
        raise KernelFailed(error.errno or errno.EIO, f"state directory {state_dir}") from error
    return fd


class Database:
    """A locked, migrated SQLite file with transactions that also undo what is in memory.

    Not thread-safe, and a transaction must not be held across an ``await``: a second
    one that starts meanwhile is refused.
    """

    def __init__(self, state_dir: Path) -> None:
        """Open; see :meth:`Store.open` for what is raised. Leaves nothing open on failure."""
        self.path: Final = state_dir / FILE_NAME
        self._lock_fd = take_lock(state_dir)
        self._undo: list[Callable[[], None]] = []
        self._in_transaction = False
        self._broken = False
        self._synchronous = ""
        connection = None
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            connection = sqlite3.connect(
                self.path, isolation_level=None, cached_statements=256, timeout=_BUSY_SECONDS
            )
            self._connection = connection
            self._prepare()
        except BaseException as error:
            if connection is not None:
                connection.close()
            os.close(self._lock_fd)
            if isinstance(error, OSError):
                raise KernelFailed(error.errno or errno.EIO, f"state file {self.path}") from error
            if isinstance(error, sqlite3.Error):
                raise translate(error, self.path) from error
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        version = execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            why = f"written by a newer Portwright (schema {version}, this one knows {len(MIGRATIONS)})"
            raise Conflict("state file", str(self.path), f"{why}; upgrade, or use another --state-dir")
        if version:
            problems = [row[0] for row in execute("PRAGMA quick_check(3)")]
            if problems != ["ok"]:
                raise damaged(self.path, "; ".join(problems))
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA foreign_keys=ON")
        execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
        for step in range(version, len(MIGRATIONS)):
            execute("PRAGMA synchronous=FULL")
            execute("BEGIN IMMEDIATE")
            try:
                for statement in MIGRATIONS[step]:
                    execute(statement)
                execute(f"PRAGMA user_version={step + 1}")
                execute("COMMIT")
            except sqlite3.Error:
                if self._connection.in_transaction:
                    execute("ROLLBACK")
                raise
        # The directory's entry for a new file must survive a power cut as well.
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Close the file, folding the log into it, and give the lock back. Idempotent."""
        if self._lock_fd < 0:
            return
        try:
            self._connection.close()
        finally:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def checkpoint(self) -> None:
        """Fold the log into the file now, for a moment when nobody waits (about 1 to 5 ms).

        Optional: SQLite does it inside some commit when the log has 4,000 pages.
        """
        self._rows("PRAGMA wal_checkpoint(PASSIVE)")

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """Commit all or nothing of the block, in the file and in memory.

        ``durable=True``: on the disk when the block ends. ``durable=False``: safe from
        a killed daemon, and at the next durable commit from a power cut. Any exception
        rolls back and goes on; so does a failing commit. Transactions don't nest:
        InternalError.
        """
        if self._in_transaction:
            raise InternalError("a transaction is open already; it must not be held across an await")
        wanted = "FULL" if durable else "NORMAL"
        if wanted != self._synchronous:
            self._run(f"PRAGMA synchronous={wanted}")
            self._synchronous = wanted
        self._run("BEGIN IMMEDIATE")
        self._in_transaction = True
        self._broken = False
        try:
            yield
            self._run("COMMIT")  # refused if a statement failed and its error was swallowed
        except BaseException:
            self._roll_back()
            raise
        finally:
            self._in_transaction = False
            self._undo.clear()

    def _roll_back(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        finally:
            for undo in reversed(self._undo):
                undo()

    @contextmanager
    def _write(self) -> Iterator[None]:
        """Join the open transaction, or make a durable one of one's own."""
        if self._in_transaction:
            yield
        else:
            with self.transaction():
                yield

    def _on_rollback(self, undo: Callable[[], None]) -> None:
        """Have ``undo`` called if the open transaction is not committed."""
        self._undo.append(undo)

    def _run(self, sql: str, values: Sequence[object] = (), *, may_refuse: bool = False) -> sqlite3.Cursor:
        """Execute one statement; errors come translated and end the transaction.

        ``may_refuse``: a constraint may say no. Then sqlite3.IntegrityError is raised as
        it is, that statement did nothing, and the transaction can go on.
        """
        if self._broken and self._in_transaction:
            raise InternalError("this transaction failed before; it can only be rolled back")
        try:
            return self._connection.execute(sql, values)
        except sqlite3.Error as error:
            if may_refuse and isinstance(error, sqlite3.IntegrityError):
                raise
            self._broken = True
            raise translate(error, self.path) from error

    def _rows(self, sql: str, values: Sequence[object] = ()) -> list[Row]:
        """Return all rows of a query."""
        cursor = self._run(sql, values)
        try:
            return cursor.fetchall()
        except sqlite3.Error as error:
            self._broken = self._in_transaction
            raise translate(error, self.path) from error
