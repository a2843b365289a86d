"""The ring buffer: order, limits, event loops, and exceptions in callbacks."""

from __future__ import annotations

import asyncio
import gc
import select
import struct

import pytest

from portwright.kernel.bpf import Collection, Link, RingBuffer
from portwright.model.errors import KernelFailed
from tests.fix_bpf import TEST_FRAME, Veth, descriptors, records
from tests.fix_features import require_for_test

pytestmark = pytest.mark.netns


def emit(zoo: Collection, count: int) -> None:
    """Let the program write ``count`` records."""
    zoo.programs["emit"].test_run(TEST_FRAME, repeat=count)


def serials(got: list[bytes]) -> list[int]:
    """The number that the program gave to each record."""
    return [struct.unpack("=IIQ", record)[2] for record in got]


def readable(ring: RingBuffer) -> bool:
    """Whether an event loop would be woken."""
    return bool(select.select([ring.epoll_fd], [], [], 0)[0])


def test_records_in_order(zoo: Collection) -> None:
    """Every record comes once and in order, and then the descriptor rests."""
    got: list[bytes] = []
    with RingBuffer(zoo.maps["events"]) as ring:
        assert not readable(ring)
        emit(zoo, 100)
        assert readable(ring)
        assert ring.consume(got.append) == 100
        assert not readable(ring)
        assert ring.consume(got.append) == 0

    assert list(range(100)) == serials(got)


def test_limit(zoo: Collection) -> None:
    """A limit stops early without losing a record; the descriptor stays readable."""
    got: list[bytes] = []
    with RingBuffer(zoo.maps["events"]) as ring:
        emit(zoo, 10)
        assert ring.consume(got.append, limit=4) == 4
        assert readable(ring)
        assert ring.consume(got.append, limit=0) == 0
        assert ring.consume(got.append) == 6

    assert list(range(10)) == serials(got)


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_exception_in_callback(zoo: Collection, kind: type[BaseException]) -> None:
    """What a callback raises comes out of consume(); its record is spent, the next ones are not."""
    got: list[bytes] = []

    def third_fails(record: bytes) -> None:
        if len(got) == 2:
            raise kind("third")
        got.append(record)

    with RingBuffer(zoo.maps["events"]) as ring:
        emit(zoo, 6)
        with pytest.raises(kind, match="third"):
            ring.consume(third_fails)
        assert ring.consume(got.append) == 3

    assert serials(got) == [0, 1, 3, 4, 5]


def test_no_reentry(zoo: Collection) -> None:
    """A callback that consumes or closes its own ring is told so, and C is not asked."""
    with RingBuffer(zoo.maps["events"]) as ring:
        for inner in (lambda _: ring.close(), lambda _: ring.consume(print)):
            emit(zoo, 1)
            with pytest.raises(RuntimeError, match="inside of consume"):
                ring.consume(inner)  # type: ignore[arg-type]
        assert ring.consume(print) == 0


def test_real_packets(zoo: Collection, veth: Veth) -> None:
    """Records that a real packet caused wake the reader and carry its device."""
    require_for_test("tcx")
    with (
        RingBuffer(zoo.maps["events"]) as ring,
        Link.attach_tcx(zoo.programs["emit"], veth.peer_ifindex, "ingress"),
    ):
        veth.send(count=3)
        got = records(ring, 3)

    assert [(veth.peer_ifindex, len(TEST_FRAME), n) for n in range(3)] == [
        struct.unpack("=IIQ", record) for record in got
    ]


def test_asyncio(zoo: Collection) -> None:
    """epoll_fd works with add_reader: records reach a coroutine."""

    async def first() -> bytes:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[bytes] = loop.create_future()
        with RingBuffer(zoo.maps["events"]) as ring:
            loop.add_reader(ring.epoll_fd, lambda: ring.consume(arrived.set_result))
            try:
                emit(zoo, 1)
                return await asyncio.wait_for(arrived, 10)
            finally:
                loop.remove_reader(ring.epoll_fd)

    assert serials([asyncio.run(first())]) == [0]


def test_close(zoo: Collection) -> None:
    """The ring outlives the map object; closing gives back descriptors; later use is a ValueError."""
    before = descriptors()
    ring = RingBuffer(zoo.maps["events"])
    zoo.maps["counts"].close()
    ring.close()
    ring.close()

    assert len(descriptors()) < len(before)
    with pytest.raises(ValueError, match="ring buffer events is closed"):
        ring.consume(print)
    with pytest.raises(ValueError, match="ring buffer events is closed"):
        _ = ring.epoll_fd


def test_not_a_ring(zoo: Collection) -> None:
    """A map of another type is refused, quietly."""
    with pytest.raises(KernelFailed) as caught:
        RingBuffer(zoo.maps["hash"])
    assert caught.value.errno == 22


def test_forgotten_ring_warns(zoo: Collection) -> None:
    """A ring that nobody closed is freed, and says so."""
    before = len(descriptors())
    ring = RingBuffer(zoo.maps["events"])
    assert len(descriptors()) > before
    del ring
    with pytest.warns(ResourceWarning, match="unclosed ring buffer events"):
        gc.collect()  # it's in a cycle with its own callback

    assert before == len(descriptors())
