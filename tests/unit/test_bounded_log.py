"""The bound of the daemon's log: what is let through, and what it says of the rest."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from portwright.daemon import bounded_log
from portwright.daemon.bounded_log import BURST, BURST_OF_ALL, KINDS, PACE, RATE_OF_ALL, Bound


class Log:
    """A logger of its own behind the bound, and a clock that stands still."""

    def __init__(self, name: str) -> None:
        self.now = 1000.0
        self.bound = Bound(lambda: self.now)
        self._written = io.StringIO()
        self._handler = logging.StreamHandler(self._written)
        self._handler.addFilter(self.bound)
        self.logger = logging.getLogger(name)
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self._handler)

    def lines(self) -> list[str]:
        """What was written since."""
        written = self._written.getvalue().splitlines()
        self._written.seek(0)
        self._written.truncate()
        return written

    def close(self) -> None:
        self.logger.removeHandler(self._handler)


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    made = Log(f"bounded.{request.node.name}")
    yield made
    made.close()


def test_a_line_that_is_said_for_ever(log: Log) -> None:
    """A burst is written, whose last line says what comes; then one at a pace, with the number lost."""
    for number in range(1000):
        log.logger.info("port %s: MTU %d", "p1", number)

    lines = log.lines()
    assert lines[:-1] == [f"port p1: MTU {number}" for number in range(BURST - 1)]
    assert lines[-1] == f"port p1: MTU {BURST - 1} [more like it are only counted for now]"

    log.now += PACE
    log.logger.info("port %s: MTU %d", "p1", 7)
    log.logger.info("port %s: MTU %d", "p1", 8)
    assert log.lines() == [f"port p1: MTU 7 [{1000 - BURST} more like it were not logged]"]


def test_others_are_heard_beside_it(log: Log) -> None:
    """Another thing, another sentence: each has its own bound."""
    for number in range(1000):
        log.logger.info("port %s: MTU %d", "p1", number)
    log.lines()
    log.logger.info("port %s: MTU %d", "p2", 1)
    log.logger.error("port %s is gone", "p1")
    log.logger.warning("no arguments")
    log.logger.info("%(port)s", {"port": "p3"})
    assert log.lines() == ["port p2: MTU 1", "port p1 is gone", "no arguments", "p3"]


def test_all_of_them_together(log: Log) -> None:
    """Sentences that are never the same again are bounded too, and so is what is remembered of them."""
    for number in range(2 * BURST_OF_ALL):
        log.logger.error("%s", f"MAC {number}")
    lines = log.lines()
    assert len(lines) == BURST_OF_ALL
    assert lines[-1].endswith("[more lines are only counted for now]")
    assert len(log.bound._kinds) == KINDS

    log.now += 1
    for number in range(100):
        log.logger.error("%s", f"again {number}")
    lines = log.lines()
    assert len(lines) == RATE_OF_ALL
    assert lines[0] == f"again 0 [{BURST_OF_ALL} more lines were not logged]"


def test_time_fills_it_again(log: Log) -> None:
    """After a while of silence there is a whole burst, and no more than one."""
    for _ in range(BURST):
        log.logger.info("the same")
    log.lines()
    log.now += 1000 * PACE
    for _ in range(2 * BURST):
        log.logger.info("the same")
    assert len(log.lines()) == BURST


def test_the_daemon_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What writes the daemon's log has the bound."""
    handlers: list[logging.Handler] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **given: handlers.extend(given["handlers"]))
    bounded_log.install()
    (handler,) = handlers
    assert any(isinstance(each, Bound) for each in handler.filters)
