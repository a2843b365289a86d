"""Portwright's limits as Firecracker's token buckets, and back, without a rounding anywhere.

A bucket holds ``size`` bytes and fills from empty in ``refill_time`` whole milliseconds, so its rate is
``size * 8000 / refill_time`` bits per second. A rate r is exact where ``r * refill_time / 8000`` is a whole
number of bytes: at every multiple of ``8000 / gcd(r, 8000)`` ms. Every rate has such buckets; the burst,
which is the size, then moves in steps. Two floors (rate_limiter/mod.rs): a frame larger than the bucket is
let through and blocks the limiter for longer than it should, and an empty bucket blocks for 100 ms whatever
its refill_time, so a shorter one gives less than it says.

A third follows from these. A limiter blocks with up to a frame's bytes left in its bucket, and where the
next 100 ms fill more than the rest of it, that much is lost: a bucket of 125,000 bytes at 10 Mbit/s passes
one frame of 64 KiB each 100 ms, half of the rate. So a bucket that we choose holds 100 ms and a frame.

Bytes are what Firecracker counts: frames with their 12 bytes of virtio-net header.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from portwright.model.errors import InvalidInput
from portwright.model.port import Limits
from portwright.vmm.firecracker.errors import InexactLimit
from portwright.vmm.firecracker.parts import RateLimiter, TokenBucket

#: The largest frame of Firecracker's NIC, in bytes.
MIN_SIZE = 65_562
#: The fixed time for which a limiter without tokens is blocked.
MIN_REFILL_MS = 100
#: Firecracker turns refill_time into nanoseconds in 64 bits.
MAX_REFILL_MS = (2**63 - 1) // 1_000_000
MAX_SIZE = 2**63 - 1
#: What switches a bucket off; also what takes a limit away by PATCH, which leaves alone what is not named.
OFF = TokenBucket(size=0, refill_time=0)
_BITS_PER_BYTE_AND_MS = 8000


class Limiters(NamedTuple):
    """Both limiters of a NIC, by Firecracker's names: ``rx`` is what the guest receives."""

    rx: RateLimiter
    tx: RateLimiter


def limiters(limits: Limits) -> Limiters:
    """The limiters that give exactly these limits; an unlimited direction gets a bucket that is off.

    A burst of 0 means the smallest bucket that gives the rate to frames of any size. Raises InexactLimit for
    a burst that no bucket has, InvalidInput for a number out of range and for a burst without a rate.
    """
    return Limiters(
        rx=RateLimiter(bandwidth=bucket(limits.ingress_rate, limits.ingress_burst, "ingress")),
        tx=RateLimiter(bandwidth=bucket(limits.egress_rate, limits.egress_burst, "egress")),
    )


def bucket(rate: int, burst: int, side: str) -> TokenBucket:
    """One direction's bucket: ``rate`` in bits per second, ``burst`` in bits."""
    _check(rate, burst, side)
    if not rate:
        return OFF
    times = _refill_times(rate, side)
    refill_time, rest = divmod(burst * 1000, rate) if burst else (times.sound, 0)
    if rest or refill_time % times.step or not times.least <= refill_time <= times.most:
        raise InexactLimit(f"{side}_burst", rate, burst, _nearest(rate, burst, times))
    return TokenBucket(size=rate * refill_time // _BITS_PER_BYTE_AND_MS, refill_time=refill_time)


def limits_of(rx: RateLimiter | None, tx: RateLimiter | None) -> Limits:
    """The limits that a NIC's limiters give, exactly; None is no limiter.

    Raises InvalidInput for what our limits can't say: a limit on operations, a one-time burst, or a rate
    that is no whole number of bits per second.
    """
    ingress, egress = _read(rx, "rx"), _read(tx, "tx")
    return Limits(
        ingress_rate=ingress[0], ingress_burst=ingress[1], egress_rate=egress[0], egress_burst=egress[1]
    )


def fitted(limits: Limits) -> Limits:
    """The same rates, with each burst raised to the next one that has a bucket which gives the whole rate.

    For a caller who may choose: a port's default burst of 100 ms or 64 KiB is too small for that, and at less
    than 5.3 Mbit/s has no bucket at all. A burst above the largest bucket becomes that.
    """

    def fit(rate: int, burst: int, side: str) -> int:
        _check(rate, burst, side)
        if not rate or not burst:
            return burst
        times = _refill_times(rate, side)
        return max(_nearest(rate, burst, times)[-1], rate * times.sound // 1000)

    return msgspec.structs.replace(
        limits,
        egress_burst=fit(limits.egress_rate, limits.egress_burst, "egress"),
        ingress_burst=fit(limits.ingress_rate, limits.ingress_burst, "ingress"),
    )


def _check(rate: int, burst: int, side: str) -> None:
    for field, number in ((f"{side}_rate", rate), (f"{side}_burst", burst)):
        if not 0 <= number <= MAX_SIZE:
            raise InvalidInput(f"limits.{field}", number, "must be 0 to 2^63 - 1, in bits")
    if burst and not rate:
        raise InvalidInput(f"limits.{side}_burst", burst, f"limits nothing without {side}_rate")


class _Times(NamedTuple):
    """Refill times of a rate's exact buckets, in ms: every ``step`` from ``least`` to ``most``.

    ``sound``: the least that loses nothing, whatever the frames.
    """

    least: int
    sound: int
    most: int
    step: int


def _refill_times(rate: int, side: str) -> _Times:
    step = _BITS_PER_BYTE_AND_MS // math.gcd(rate, _BITS_PER_BYTE_AND_MS)
    frame = -(-MIN_SIZE * _BITS_PER_BYTE_AND_MS // rate)
    least = -(-max(MIN_REFILL_MS, frame) // step) * step
    sound = -(-(MIN_REFILL_MS + frame) // step) * step
    # The burst of the longest, in bits, is a number that our limits can hold too.
    most = min(MAX_REFILL_MS, MAX_SIZE * 1000 // rate) // step * step
    if sound > most:
        why = "the smallest bucket of exactly this rate is beyond 64 bits"
        raise InvalidInput(f"limits.{side}_rate", rate, why)
    return _Times(least, sound, most, step)


def _nearest(rate: int, burst: int, times: _Times) -> tuple[int, ...]:
    """The bursts next to this one that have a bucket: below and above, one if it is exact or out of range."""
    unit = rate * times.step  # in thousandths of a bit
    below, above = burst * 1000 // unit * times.step, -(-burst * 1000 // unit) * times.step
    found = {min(max(refill_time, times.least), times.most) for refill_time in (below, above)}
    return tuple(rate * refill_time // 1000 for refill_time in sorted(found))


def _read(limiter: RateLimiter | None, name: str) -> tuple[int, int]:
    """Rate and burst of a limiter, (0, 0) without a limit."""
    if limiter is None:
        return 0, 0
    if limiter.ops is not None and limiter.ops.size and limiter.ops.refill_time:
        raise InvalidInput(f"{name}_rate_limiter.ops", repr(limiter.ops), "our limits count bits alone")
    found = limiter.bandwidth
    if found is None or not found.size or not found.refill_time:
        return 0, 0
    if found.one_time_burst:
        why = "credit on top of the bucket, which our bursts have not"
        raise InvalidInput(f"{name}_rate_limiter.bandwidth.one_time_burst", found.one_time_burst, why)
    rate, rest = divmod(found.size * _BITS_PER_BYTE_AND_MS, found.refill_time)
    if rest:
        why = f"{found.size} bytes in {found.refill_time} ms are no whole number of bits per second"
        raise InvalidInput(f"{name}_rate_limiter.bandwidth", repr(found), why)
    return rate, found.size * 8
