from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portwright.model.errors import InvalidInput
from portwright.model.port import Limits
from portwright.vmm.firecracker.errors import InexactLimit
from portwright.vmm.firecracker.limits import (
    MIN_REFILL_MS,
    MIN_SIZE,
    OFF,
    bucket,
    fitted,
    limiters,
    limits_of,
)
from portwright.vmm.firecracker.parts import RateLimiter, TokenBucket
from tests.firecracker_server import Bucket

CALM = settings(deadline=None)  # other tests share the machine
RATES = st.integers(1, 10**12)
BURSTS = st.integers(1, 2**50)


def rate_of(found: TokenBucket) -> Fraction:
    """Bits per second, as Firecracker's code has it: size bytes in refill_time ms."""
    return Fraction(found.size * 8 * 1000, found.refill_time)


@CALM
@given(RATES)
def test_every_rate_has_a_bucket_of_exactly_that_rate(rate: int) -> None:
    """The rate of the bucket computed back is the limit, to the last bit, and both floors hold."""
    found = bucket(rate, 0, "egress")

    assert rate_of(found) == rate
    assert found.size >= MIN_SIZE
    assert found.refill_time >= MIN_REFILL_MS


@CALM
@given(RATES)
def test_the_bucket_without_a_burst_is_the_smallest_that_loses_nothing(rate: int) -> None:
    """No shorter refill time gives the rate exactly, with room for a frame and 100 ms of the rate."""
    found = bucket(rate, 0, "egress")

    assert found.size >= MIN_SIZE + Fraction(rate, 80)
    for refill_time in range(max(1, found.refill_time - 8000), found.refill_time):
        size = Fraction(rate * refill_time, 8000)
        assert size.denominator > 1 or size < MIN_SIZE + Fraction(rate, 80)


@CALM
@given(RATES, BURSTS)
def test_a_burst_is_exact_or_refused_with_the_nearest(rate: int, burst: int) -> None:
    """A burst is the bucket's size to the bit, or the error names those that are, one each side."""
    found = refusal = None
    try:
        found = bucket(rate, burst, "ingress")
    except InexactLimit as error:
        refusal = error

    if found is not None:
        assert found.size * 8 == burst
        assert rate_of(found) == rate
        return
    assert refusal is not None
    assert burst not in refusal.nearest
    for near in refusal.nearest:
        again = bucket(rate, near, "ingress")
        assert again.size * 8 == near
        assert rate_of(again) == rate
        assert str(near) in str(refusal)
    if len(refusal.nearest) == 2:
        below, above = refusal.nearest
        assert below < burst < above
        assert above - below <= 8 * rate  # 8000 ms of it: the widest step there is


@CALM
@given(RATES, BURSTS, RATES, BURSTS)
def test_limits_make_the_round_trip(up: int, up_burst: int, down: int, down_burst: int) -> None:
    """Limits that fit become limiters and the same limits again, each direction its own."""
    wanted = fitted(
        Limits(egress_rate=up, egress_burst=up_burst, ingress_rate=down, ingress_burst=down_burst)
    )

    found = limiters(wanted)

    assert limits_of(found.rx, found.tx) == wanted
    assert found.tx.bandwidth == bucket(up, wanted.egress_burst, "egress")
    assert found.rx.bandwidth == bucket(down, wanted.ingress_burst, "ingress")


@CALM
@given(RATES, BURSTS)
def test_fitted_keeps_the_rate_and_never_lowers_a_burst(rate: int, burst: int) -> None:
    """Fitting raises a burst to the next bucket, by less than a step or to what loses nothing."""
    wanted = Limits(egress_rate=rate, egress_burst=burst)

    found = fitted(wanted)

    assert found.egress_rate == rate
    largest = fitted(Limits(egress_rate=rate, egress_burst=2**63 - 1)).egress_burst  # 292 years of it
    assert found.egress_burst >= min(burst, largest)
    assert found.egress_burst - burst < 8 * rate or found == fitted(Limits(egress_rate=rate, egress_burst=1))
    assert fitted(found) == found


@pytest.mark.parametrize(
    ("rate", "burst", "size", "refill_time"),
    [
        (10_000_000, 1_000_000, 125_000, 100),  # what the daemon gives 10 Mbit/s by itself
        (1_000_000_000, 0, 12_625_000, 101),
        (5_245_000, 0, 131_125, 200),
        (5_239_000, 0, 136_214, 208),  # at 201 to 207 ms the size would be no whole number of bytes
        (1_000_000, 525_000, 65_625, 525),  # the least that is taken
        (1_000_000, 0, 78_125, 625),
        (64_000, 0, 66_368, 8296),
        (1, 0, 65_563, 524_504_000),
        (0, 0, 0, 0),
    ],
)
def test_buckets_by_value(rate: int, burst: int, size: int, refill_time: int) -> None:
    """Rates and bursts that are met, and the ends of the range."""
    assert bucket(rate, burst, "egress") == TokenBucket(size=size, refill_time=refill_time)


def test_unlimited_is_a_bucket_that_is_off() -> None:
    """0 is no limit: both buckets are there and off, so that a PATCH takes away what was."""
    found = limiters(Limits())

    assert found.rx.bandwidth == found.tx.bandwidth == OFF
    assert limits_of(found.rx, found.tx) == Limits()
    assert limits_of(None, RateLimiter()) == Limits()


def test_the_daemons_default_burst_is_refused_below_its_bucket_and_fits_when_asked() -> None:
    """64 KiB at 1 Mbit/s has no bucket; the error says which has, and `fitted` takes that."""
    default = Limits(egress_rate=1_000_000, egress_burst=65536 * 8)

    with pytest.raises(InexactLimit) as caught:
        limiters(default)

    assert caught.value.facts() == {
        "field": "egress_burst",
        "rate": 1_000_000,
        "burst": 524_288,
        "nearest": (525_000,),
    }
    assert fitted(default).egress_burst == 625_000


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(egress_burst=1), "limits.egress_burst"),
        (Limits(ingress_rate=-1), "limits.ingress_rate"),
        (Limits(ingress_rate=1, ingress_burst=2**63), "limits.ingress_burst"),
        (Limits(egress_rate=2**63 - 1), "limits.egress_rate"),
    ],
)
def test_what_is_no_limit_is_refused(limits: Limits, field: str) -> None:
    """A burst without a rate and numbers beyond 64 bits are errors with the field's name."""
    with pytest.raises(InvalidInput) as caught:
        limiters(limits)

    assert caught.value.field == field


@pytest.mark.parametrize(
    "limiter",
    [
        RateLimiter(ops=TokenBucket(size=1000, refill_time=100)),
        RateLimiter(bandwidth=TokenBucket(size=125_000, refill_time=100, one_time_burst=1)),
        RateLimiter(bandwidth=TokenBucket(size=65_563, refill_time=700)),
    ],
)
def test_what_our_limits_cant_say_is_not_read_as_less(limiter: RateLimiter) -> None:
    """Somebody else's limit on operations, one-time burst or broken rate is an error, never left out."""
    with pytest.raises(InvalidInput):
        limits_of(limiter, None)


@pytest.mark.parametrize("rate", [1_000_000, 10_000_000, 1_000_001, 987_654_321])
@pytest.mark.parametrize("frame", [66, 1526, 65_562])
def test_a_bucket_gives_its_rate_in_firecrackers_arithmetic(rate: int, frame: int) -> None:
    """A greedy sender gets the rate and at most one bucket on top, whatever its frames."""
    found = bucket(rate, 0, "egress")
    seconds = 600

    passed = Bucket(found.size, found.refill_time).passed(frame, seconds * 1000) * 8

    assert passed <= rate * seconds + found.size * 8
    assert passed >= rate * seconds - frame * 8 - rate // 10
    assert passed >= rate * seconds * 999 // 1000


def test_a_burst_of_100_ms_gives_half_of_the_rate_to_large_frames() -> None:
    """Why `fitted` goes further than what is taken: at 10 Mbit/s one frame of 64 KiB passes each 100 ms."""
    limits = Limits(egress_rate=10_000_000, egress_burst=1_000_000)
    taken = bucket(limits.egress_rate, limits.egress_burst, "egress")
    sound = bucket(limits.egress_rate, fitted(limits).egress_burst, "egress")

    assert Bucket(taken.size, taken.refill_time).passed(65_562, 60_000) * 8 < 330_000_000
    assert Bucket(sound.size, sound.refill_time).passed(65_562, 60_000) * 8 > 597_000_000


def test_a_shorter_refill_time_would_give_less() -> None:
    """Why 100 ms is the least: with 10 ms the same rate gives a tenth of it, for a blocked limiter waits."""
    rate = 100_000_000
    short = Bucket(rate // 8 // 100, 10).passed(1526, 10_000) * 8

    assert short < rate * 10 // 8
    assert Bucket(rate // 8 // 10, 100).passed(1526, 10_000) * 8 > rate * 10 * 99 // 100
