from __future__ import annotations

import itertools
import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.api import frames
from portwright.api.errors import ProtocolError
from portwright.api.frames import FrameDecoder, encode

KINDS = st.sampled_from(sorted(frames.REQUEST_KINDS))
FRAMES = st.lists(st.tuples(KINDS, st.binary(max_size=50)), max_size=8)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """Return ``data`` in pieces, cut at the given places."""
    places = sorted({min(place, len(data)) for place in at} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(FRAMES, st.lists(st.integers(0, 500), max_size=20))
def test_frames_do_not_depend_on_how_the_stream_is_cut(
    given_frames: list[tuple[int, bytes]], at: list[int]
) -> None:
    """Whatever the chunks, the frames come out whole, in order, and nothing is left over."""
    decoder = FrameDecoder()
    stream = b"".join(encode(kind, payload) for kind, payload in given_frames)
    found = [frame for piece in cut(stream, at) for frame in decoder.feed(piece)]
    assert [(frame.kind, frame.payload) for frame in found] == given_frames
    assert not decoder.partial


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=10))
def test_junk_gives_frames_within_the_limit_or_a_protocol_error(data: bytes, at: list[int]) -> None:
    """Any bytes give bounded frames of known kinds or ProtocolError, and a broken decoder stays broken."""
    decoder = FrameDecoder(limit=16, large=16)
    try:
        for piece in cut(data, at):
            for frame in decoder.feed(piece):
                assert len(frame.payload) <= 16
                assert frame.kind in frames.REQUEST_KINDS
    except ProtocolError:
        with pytest.raises(ProtocolError):
            decoder.feed(encode(frames.JSON_REQUEST, b"{}"))
        assert not decoder.partial


@given(FRAMES, st.lists(st.integers(0, 500), max_size=20), st.binary(max_size=20), st.data())
def test_every_descriptor_ends_in_exactly_one_place(
    given_frames: list[tuple[int, bytes]], at: list[int], junk: bytes, data: st.DataObject
) -> None:
    """Whatever is sent, each descriptor is a frame's, an orphan, or still held: never lost, never twice."""
    decoder = FrameDecoder(limit=40, large=40)
    stream = b"".join(encode(kind, payload) for kind, payload in given_frames) + junk
    sent: list[int] = []
    found: list[int] = []
    for piece in cut(stream, at):
        count = data.draw(st.integers(0, 6))
        fds = list(range(len(sent), len(sent) + count))
        sent += fds
        try:
            for frame in decoder.feed(piece, fds):
                assert len(frame.fds) <= frames.MAX_FDS
                found += frame.fds
        except ProtocolError:
            pass
        found += decoder.take_orphans()
    found += decoder.abandon()
    assert sorted(found) == sent


@pytest.mark.parametrize(
    "header",
    [
        struct.pack(">IB", frames.MAX_REQUEST + 1, ord("J")),
        struct.pack(">IB", frames.MAX_REQUEST + 1, ord("C")),
        struct.pack(">IB", frames.MAX_LARGE + 1, ord("L")),
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_a_bad_header_is_refused_before_its_payload(header: bytes) -> None:
    """A length over the limit raises as soon as the header is there, without waiting for the payload."""
    with pytest.raises(ProtocolError, match=r"over the limit|not expected"):
        FrameDecoder().feed(header)


def test_a_large_request_is_known_by_its_header() -> None:
    """So that whoever reads may refuse it before its payload is there; once whole, it is none any more."""
    decoder = FrameDecoder()
    large = encode(frames.LARGE_REQUEST, b"x" * (frames.MAX_REQUEST + 1))
    small = encode(frames.JSON_REQUEST, b"{}")
    assert [frame.kind for frame in decoder.feed(small + large[:4])] == [frames.JSON_REQUEST]
    assert not decoder.large
    assert decoder.feed(large[4:5]) == []
    assert decoder.large
    assert [frame.payload for frame in decoder.feed(large[5:] + small[:4])] == [large[5:]]
    assert decoder.partial
    assert not decoder.large


def test_an_answer_kind_is_no_request() -> None:
    """Each side accepts the other's kinds only."""
    with pytest.raises(ProtocolError, match="0x6a"):
        FrameDecoder().feed(encode(frames.JSON_REPLY, b""))
    assert FrameDecoder(frames.REPLY_KINDS).feed(encode(frames.JSON_REPLY, b""))


def test_descriptors_go_to_the_last_frame_that_begins_in_their_chunk() -> None:
    """The rule of the module: partial or whole, the newest beginning takes them, else they are orphans."""
    one, two = encode(frames.JSON_REQUEST, b"1111"), encode(frames.CNI_REQUEST, b"2222")
    decoder = FrameDecoder()
    first, second = decoder.feed(one + two, [7])
    assert (first.fds, second.fds) == ((), (7,))
    assert decoder.feed(one[:3], [8, 9]) == []
    assert decoder.feed(one[3:5]) == []
    (whole, last) = decoder.feed(one[5:] + two, [10])
    assert (whole.fds, last.fds) == ((8, 9), (10,))
    decoder.feed(one[:3])
    (late,) = decoder.feed(one[3:], [11])
    assert late.fds == ()
    assert decoder.take_orphans() == [11]


def test_the_kernel_joins_only_what_was_sent_before_a_descriptor() -> None:
    """af_unix: bytes sent before may come in the same recvmsg, bytes sent after never do."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, "rb") as passed:  # noqa: PTH123 - a descriptor is wanted
        ours.sendall(encode(frames.JSON_REQUEST, b"before"))
        frame = encode(frames.JSON_REQUEST, b"with")
        assert frames.send_start(ours, frame, [passed.fileno()]) == len(frame)
        ours.sendall(encode(frames.JSON_REQUEST, b"after"))
        decoder, found = FrameDecoder(), list[frames.Frame]()
        while len(found) < 3:
            data, fds = frames.receive(theirs)
            found += decoder.feed(data, fds)
        assert [(f.payload, len(f.fds)) for f in found] == [(b"before", 0), (b"with", 1), (b"after", 0)]
        (received,) = found[1].fds
        try:
            assert os.path.samestat(os.fstat(received), os.fstat(passed.fileno()))
            assert not os.get_inheritable(received)
        finally:
            os.close(received)


def test_too_many_descriptors_are_closed() -> None:
    """More than MAX_FDS with one message: ProtocolError, and none of them stays open."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, "rb") as passed:  # noqa: PTH123
        frames.send_start(ours, b"x", [passed.fileno()] * (frames.MAX_FDS + 1))
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(ProtocolError, match="more than 4"):
            frames.receive(theirs)
        assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
