"""Keeps a folder's manifests in force: inotify says that something changed, and then the folder is read anew.

What an event says is not trusted further than that: editors write in place, by a rename, or by way of a
dozen temporary files, and events can be lost. So changes are left to settle, within a bound, and the whole
folder is compared with what is on record. Anything wrong with it changes nothing, and is told until it is
mended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Final, NamedTuple

from inotify_simple import INotify, flags

from portwright.model.errors import InvalidInput, KernelFailed, PortwrightError
from portwright.node.folder import FolderState, Place, Places, read_folder
from portwright.node.policies import Policies

#: Changes have settled when none came for so long, in seconds; and at the latest so long after the first.
QUIET, AT_MOST = 0.1, 1.0
#: While the folder is refused it is looked at again after so many seconds, for reasons that no event tells.
RETRY: Final = 30.0
#: How often the places are looked at again because they moved meanwhile. More moves are more events.
_ROUNDS: Final = 4

_NAMES: Final = (
    flags.CREATE
    | flags.DELETE
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.ATTRIB
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
    | flags.MASK_ADD  # two ways to one directory are one watch
)
_CONTENT: Final = flags.MODIFY | flags.CLOSE_WRITE
#: After these nobody is in the middle of writing what has the name now.
_WHOLE: Final = flags.CLOSE_WRITE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO | flags.CREATE
#: Events were lost, or the directory was.
_LOST: Final = flags.Q_OVERFLOW | flags.IGNORED | flags.UNMOUNT

log = logging.getLogger(__name__)


class _Followed(NamedTuple):
    """A directory under one of inotify's watches."""

    at: str
    place: Place


class Settling:
    """When changes have settled: pure, in seconds of any clock."""

    def __init__(self) -> None:
        self._first: float | None = None

    def changed(self, now: float) -> float:
        """A change came: when to look, if none comes before."""
        if self._first is None:
            self._first = now
        return min(now + QUIET, self._first + AT_MOST)

    def latest(self, now: float) -> float:
        """Until when to wait for somebody who is still writing."""
        return now if self._first is None else self._first + AT_MOST

    def settled(self) -> None:
        """It was looked."""
        self._first = None


class Follower:
    """Served by the daemon's loop. ``folder`` is absolute and need not exist."""

    def __init__(self, folder: Path, policies: Policies, loop: asyncio.AbstractEventLoop) -> None:
        self._folder = folder
        self._policies = policies
        self._loop = loop
        self._settling = Settling()
        self._timer: asyncio.TimerHandle | None = None
        self._followed: dict[int, _Followed] = {}
        #: (watch, name) of files that were written to and not closed yet
        self._written: set[tuple[int, str]] = set()
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            way_out = "raise fs.inotify.max_user_instances"
            raise KernelFailed(error.errno or 0, "inotify_init1", way_out) from error
        loop.add_reader(self._inotify.fileno(), self._ready)
        policies.folder = FolderState(path=str(folder))

    def close(self) -> None:
        """Follows no longer; what is in force stays."""
        self._loop.remove_reader(self._inotify.fileno())
        self._inotify.close()
        if self._timer is not None:
            self._timer.cancel()

    def refresh(self) -> None:
        """Puts in force what the folder says now, or says why it can't."""
        self._settling.settled()
        error = ""
        try:
            files = self._read()
            if self._policies.follow(files):
                log.info("%s: its %d manifests are in force", self._folder, len(files))
        except PortwrightError as refused:
            error = str(refused)
        except Exception as bug:  # the loop would say so once; it has to be an alarm, and be tried again
            log.exception("%s", self._folder)
            error = f"internal error: {type(bug).__name__}: {bug}; please report it"
        before = self._policies.folder.error
        self._policies.folder = FolderState(path=str(self._folder), error=error)
        if error and error != before:
            log.error("%s: nothing of it has changed what is in force: %s", self._folder, error)
        elif before and not error:
            log.info("%s: what it says is in force again", self._folder)
        if error and self._timer is None:
            self._look_at(self._loop.time() + RETRY)

    def nudge(self) -> None:
        """What is in force beside the folder has changed: if it was refused, it may now be well."""
        if self._policies.folder.error:
            self.refresh()

    # -- what changes ----------------------------------------------------------------------------

    def _ready(self) -> None:
        if self._take_events():
            self._look_at(self._settling.changed(self._loop.time()))

    def _take_events(self) -> bool:
        """Whether one of them concerns the folder."""
        concerned = False
        for event in self._inotify.read(timeout=0):
            followed = self._followed.get(event.wd)
            if event.mask & _LOST:
                overflow = bool(event.mask & flags.Q_OVERFLOW)
                # Of one place: what is half written elsewhere is so still.
                self._written = {w for w in self._written if not overflow and w[0] != event.wd}
                concerned |= followed is not None or overflow
                if event.mask & flags.IGNORED:
                    self._followed.pop(event.wd, None)
            elif followed is not None and followed.place.concerns(event.name):
                concerned = True
                if event.mask & flags.MODIFY:
                    self._written.add((event.wd, event.name))
                elif event.mask & _WHOLE:
                    self._written.discard((event.wd, event.name))
        return concerned

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        later = self._settling.latest(now) if self._written else 0.0
        if self._take_events():
            later = max(later, self._settling.changed(now))
        if later > now:
            self._look_at(later)
        else:
            self.refresh()

    # -- the folder ------------------------------------------------------------------------------

    def _read(self) -> list[tuple[str, str]]:
        """The folder's files, with every place that they come from followed before they were read."""
        files: list[tuple[str, str]] = []
        refused: InvalidInput | None = None
        for _ in range(_ROUNDS):
            places: Places = {}
            try:
                files, refused = read_folder(self._folder, places), None
            except InvalidInput as error:
                refused = error
            moved = self._follow(places)
            changed = self._take_events()
            if not moved and not changed:
                break
        else:
            self._look_at(self._settling.changed(self._loop.time()))
        if refused is not None:
            raise refused
        for wd, name in sorted(self._written):
            path = str(Path(self._followed[wd].at) / name)
            why = "is still being written; close it, or rename a whole one over it"
            raise InvalidInput("policy-dir", path, why)
        return files

    def _follow(self, places: Places) -> bool:
        """Has inotify follow just these; whether something could have changed there unseen so far."""
        now: dict[int, _Followed] = {}
        news = False
        for at, place in places.items():
            mask = _NAMES | (_CONTENT if place.content else 0)
            try:
                wd = self._inotify.add_watch(at, mask)
            except (FileNotFoundError, NotADirectoryError):
                news = True  # it went meanwhile: the next look finds what is there instead
                continue
            except OSError as error:
                way_out = "raise fs.inotify.max_user_watches"
                raise KernelFailed(error.errno or 0, f"inotify_add_watch {at}", way_out) from error
            now[wd] = _Followed(at, place.joined(now[wd].place) if wd in now else place)
            news |= wd not in self._followed or self._followed[wd].place != now[wd].place
        for wd in set(self._followed) - set(now):
            with contextlib.suppress(OSError):  # it went by itself
                self._inotify.rm_watch(wd)
        self._followed = now
        self._written = {(wd, name) for wd, name in self._written if wd in now}
        return news
