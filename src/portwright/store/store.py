"""The store as its user sees it: every table in one object."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from portwright.ipam.allocator import REST_SECONDS
from portwright.store.chained import ChainedTable


class Store(ChainedTable):
    """The daemon's record. Each method that writes joins the open ``transaction()`` or makes one.

    Synchronous and fast (an intent's transaction takes one fsync); not thread-safe.
    """

    def __init__(self, state_dir: Path, rest_seconds: float) -> None:
        """Use :meth:`open`."""
        super().__init__(state_dir, rest_seconds)
        try:
            with self.transaction():
                made = (uuid.uuid4().hex,)
                self._run("INSERT INTO meta VALUES ('instance_id', ?) ON CONFLICT DO NOTHING", made)
            self._load_networks()
            self._load_addresses()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, state_dir: str | os.PathLike[str], *, rest_seconds: float = REST_SECONDS) -> Self:
        """Open the store in ``state_dir``, made if missing (0700), and lock it until ``close``.

        ``rest_seconds``: how long a released address is not given out again. Raises
        Conflict if another daemon has the directory or a newer version wrote the file,
        and KernelFailed if it can't be written (EACCES, EROFS, ENOSPC) or is damaged
        (EUCLEAN; the file is left as it is).
        """
        return cls(Path(state_dir), rest_seconds)

    def __enter__(self) -> Self:
        """Return the store; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    @property
    def instance_id(self) -> str:
        """32 hex digits, made with the state directory: tells two daemons' objects apart."""
        return str(self._rows("SELECT value FROM meta WHERE key = 'instance_id'")[0][0])

    def note_boot(self, boot_id: str) -> str | None:
        """Record the boot that this is; return the one recorded before, or None at first.

        If they differ, the host was rebooted: no device or namespace in the record exists.
        """
        with self._write():
            rows = self._rows("SELECT value FROM meta WHERE key = 'boot_id'")
            self._run("INSERT OR REPLACE INTO meta VALUES ('boot_id', ?)", (boot_id,))
        return str(rows[0][0]) if rows else None
