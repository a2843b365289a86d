"""The log's bound: nobody fills the host's disk by making the daemon say the same thing for ever.

A sandbox, or who administrates its namespace, can cause what is logged, as often as it likes. Lines of one
kind, about one thing, come ``BURST`` at once and then one in ``PACE`` seconds; all lines together
``BURST_OF_ALL`` and then ``RATE_OF_ALL`` a second. The last line before a bound says so, and the first one
after it how many were lost.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

BURST: Final = 20
PACE: Final = 10.0
BURST_OF_ALL: Final = 5_000
"""A restart may say a line for each of thousands of ports."""
RATE_OF_ALL: Final = 10.0
KINDS: Final = 1_024
"""How many kinds are remembered; the one that was longest silent is forgotten."""


@dataclass
class _Bucket:
    """Tokens that come back with time; ``lost``: lines that found none."""

    tokens: float
    seen: float
    lost: int = 0

    def refill(self, now: float, rate: float, most: float) -> None:
        self.tokens = min(most, self.tokens + (now - self.seen) * rate)
        self.seen = now


class Bound(logging.Filter):
    """For a handler. ``clock``: seconds, of any origin."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._all = _Bucket(BURST_OF_ALL, clock())
        self._kinds: OrderedDict[tuple[str, str, str], _Bucket] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; it is given a remark where a bound begins or ends."""
        now = self._clock()
        kind = self._kind(record, now)
        self._all.refill(now, RATE_OF_ALL, BURST_OF_ALL)
        buckets = (kind, self._all)
        if any(bucket.tokens < 1 for bucket in buckets):
            for bucket in buckets:
                bucket.lost += bucket.tokens < 1
            return False
        remarks = []
        for bucket, what in zip(buckets, ("more like it", "more lines"), strict=True):
            bucket.tokens -= 1
            if bucket.lost:
                remarks.append(f"{bucket.lost} {what} were not logged")
                bucket.lost = 0
            elif bucket.tokens < 1:
                remarks.append(f"{what} are only counted for now")
        if remarks:
            record.msg, record.args = f"{record.getMessage()} [{'; '.join(remarks)}]", None
        return True

    def _kind(self, record: logging.LogRecord, now: float) -> _Bucket:
        """By who says it, the words, and what they are about: the first thing that is put into them."""
        about = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        key = (record.name, str(record.msg), about)
        bucket = self._kinds.pop(key, None) or _Bucket(BURST, now)
        bucket.refill(now, 1 / PACE, BURST)
        self._kinds[key] = bucket
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        return bucket


def install() -> None:
    """This process logs to stderr, within the bound."""
    handler = logging.StreamHandler()
    handler.addFilter(Bound())
    logging.basicConfig(
        handlers=[handler], level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True
    )
