"""SIGKILL at random moments: 50 ADDs at once, twice over; and 200 cuts between commit and answer (case 49).

The seed is printed and can be given: ``PWT_SEED=123 pytest tests/faults/test_kill_random.py``.
"""

from __future__ import annotations

import os
import random
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.audit import Record
from tests.faults.cni import Cni
from tests.faults.conftest import Crash
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(900)]

Figures = Callable[..., None]
BOXES, ROUNDS, CUTS = 50, 2, 200


@pytest.fixture
def dice() -> random.Random:
    """Seeded, and the seed is shown with a failure."""
    seed = int(os.environ.get("PWT_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
    print(f"PWT_SEED={seed}")
    return random.Random(seed)


class Fleet:
    """Fifty sandboxes, each with a runtime that tries again as runtimes do: DEL, then ADD."""

    def __init__(self, cni: Cni, boxes: list[TestNetns]) -> None:
        self._cni = cni
        self._boxes = boxes
        self._lock = threading.Lock()
        self._held: dict[str, str] = {}
        self.up = threading.Event()
        self.up.set()
        self.refused = 0

    def each(self, work: Callable[[TestNetns], None]) -> None:
        """``work`` on all boxes at once; raises the first failure."""
        with ThreadPoolExecutor(BOXES) as pool:
            list(pool.map(work, self._boxes))

    def add(self, box: TestNetns) -> None:
        """ADD until it answers with addresses that nobody else holds."""
        deadline = time.monotonic() + 120
        while not (outcome := self._cni.add(box.name, box)).ok:
            assert time.monotonic() < deadline, outcome
            with self._lock:
                self.refused += 1
            self.delete(box)
            self.up.wait(60)
        with self._lock:
            for address in outcome.addresses:
                assert self._held.setdefault(address, box.name) == box.name, f"{address} was given twice"

    def delete(self, box: TestNetns) -> None:
        """DEL until it is accepted, by the daemon or the spool."""
        with self._lock:
            for address in [a for a, holder in self._held.items() if holder == box.name]:
                del self._held[address]
        deadline = time.monotonic() + 120
        while not (outcome := self._cni.delete(box.name, box)).ok:
            assert time.monotonic() < deadline, outcome
            self.up.wait(60)

    def address(self, box: TestNetns) -> str:
        """The box's IPv4 address."""
        return next(a for a, holder in self._held.items() if holder == box.name and ":" not in a)


class Killer(threading.Thread):
    """Kills the daemon at random moments and starts it again, until told to stop."""

    def __init__(self, crash: Crash, dice: random.Random, up: threading.Event) -> None:
        super().__init__()
        self._crash, self._dice, self._up = crash, dice, up
        self._enough = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """The thread."""
        try:
            while not self._enough.wait(self._dice.uniform(0.01, 0.15)):
                self._up.clear()
                self._crash.daemon.kill()
                self._crash.points += 1
                self._crash.daemon.start()
                self._up.set()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.failure = error
            self._up.set()

    def __enter__(self) -> Killer:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; what failed in the thread fails the test."""
        self._enough.set()
        self.join()
        if self.failure is not None:
            raise self.failure


def test_fifty_adds_in_parallel_with_random_kills(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, dice: random.Random, figures: Figures
) -> None:
    """Twice over: each ADD that answered is there and nothing else; no address is anybody else's; DEL all."""
    boxes = [netns_factory() for _ in range(BOXES)]
    fleet = Fleet(cni, boxes)
    before = {p.port_id for p in Record(crash.daemon.state_dir).ports}
    for number in range(ROUNDS):
        with Killer(crash, dice, fleet.up):
            fleet.each(fleet.add)
        _settled(crash, cni, f"round {number}: {BOXES} ADDs")
        there = {p.owner.container_id for p in Record(crash.daemon.state_dir).ports} - {""}
        assert there == {box.name for box in boxes}
        first, *others = boxes
        for box in dice.sample(others, 5):
            first.run(["ping", "-n", "-c1", "-W2", fleet.address(box)])
        with Killer(crash, dice, fleet.up):
            fleet.each(fleet.delete)
        _settled(crash, cni, f"round {number}: {BOXES} DELs")
        assert {p.port_id for p in Record(crash.daemon.state_dir).ports} == before
    figures(kills=crash.points, refused_and_repeated=fleet.refused, witness=crash.witness.sentence())


def _settled(crash: Crash, cni: Cni, when: str) -> None:
    cni.run("STATUS")  # what was spooled at the last moment is replayed before any answer
    crash.clean(when)


def test_case_49_two_hundred_kills_between_commit_and_answer(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, dice: random.Random, figures: Figures
) -> None:
    """Killed at 200 random moments after an address was committed and before ADD answered: no address twice,
    DEL frees all of it, the others live on."""
    box, witness_box = netns_factory(), netns_factory()
    kept = cni.add("kept", witness_box)
    assert kept.ok
    held = set(kept.addresses)
    before = {p.port_id for p in Record(crash.daemon.state_dir).ports}
    log = crash.daemon.state_dir / "state.db-wal"
    window, cuts, attempts = _window(cni, box, log), 0, 0
    while cuts < CUTS:
        attempts += 1
        assert attempts < 4 * CUTS, f"only {cuts} of {attempts} kills were in time"
        with ThreadPoolExecutor(1) as pool:
            committed_at = _next_write(log)
            adding = pool.submit(cni.add, "box", box)
            committed_at()
            select.select([], [], [], dice.uniform(0, window))  # the random moment is what is tested
            crash.daemon.kill()
            outcome = adding.result()
        committed = {p.port_id for p in Record(crash.daemon.state_dir).ports} - before
        cuts += bool(committed) and not outcome.ok
        crash.daemon.start()
        if outcome.ok:
            assert committed
            assert not held & set(outcome.addresses)
        assert cni.delete("box", box).ok
        assert {p.port_id for p in Record(crash.daemon.state_dir).ports} == before
        if attempts % 10 == 0:
            crash.clean(f"attempt {attempts}", inside=False)
            again = cni.add("box", box)
            assert again.ok
            assert not held & set(again.addresses)
            assert cni.delete("box", box).ok
    crash.clean("all")
    figures(kills=attempts, between_commit_and_answer=cuts, witness=crash.witness.sentence())


def _next_write(path: Path) -> Callable[[], float]:
    """A function that returns when the file is written next, with that moment."""
    before = path.stat()

    def written() -> float:
        deadline = time.monotonic() + 0.5  # if it was within the same tick of the file's clock: a miss
        while time.monotonic() < deadline:  # tight: the moment is a matter of milliseconds
            now = path.stat()
            if (now.st_mtime_ns, now.st_size) != (before.st_mtime_ns, before.st_size):
                break
        return time.monotonic()

    return written


def _window(cni: Cni, box: TestNetns, log: Path) -> float:
    """Seconds from an ADD's commit of its addresses to its answer, the median of five."""
    taken = []
    for _ in range(5):
        with ThreadPoolExecutor(1) as pool:
            committed_at = _next_write(log)
            adding = pool.submit(cni.add, "box", box)
            begin = committed_at()
            assert adding.result().ok
            taken.append(time.monotonic() - begin)
        assert cni.delete("box", box).ok
    return sorted(taken)[2]
