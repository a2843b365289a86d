"""The guard against an oracle written from the RFCs, on generated frames of all kinds."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portwright.dataplane.abi import PwStateFlag
from tests.dataplane import frames
from tests.dataplane.model import IP4, TCP, UDP, ModelPort, checksum, judge
from tests.dataplane.rig import NEXT, REDIRECT, SHOT, Outcome, Rig, topology

pytestmark = pytest.mark.netns

#: Under emulation an example takes ten times as long, and what they find hardly depends on the kernel.
EXAMPLES = 150 if "PORTWRIGHT_LAB_KERNEL" in os.environ else 1500
MANY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(parent=MANY, max_examples=EXAMPLES // 5)


def total(outcome: Outcome, port: ModelPort) -> tuple[int, int, int, int]:
    """(packets, bytes) from and to a port."""
    row = outcome.counted[port.port_id]
    return row.from_total_packets, row.from_total_octets, row.to_total_packets, row.to_total_octets


def agrees(rig: Rig, item: frames.Sent, outcome: Outcome) -> None:
    """Assert that what the program did is what the model allows, and that it was counted so."""
    port, frame = item.port, item.frame
    expected = judge(rig.topology, port, frame, item.gso[0])
    segments, size = max(item.gso[1], 1), len(frame)
    carried = {p.port_id: total(outcome, p) for p in rig.topology.ports if any(total(outcome, p))}
    if expected.reasons:
        assert outcome.verdict == SHOT, f"passed, but is {expected.reasons}"
        [(name, counted)] = outcome.drops.items()
        assert name[:2] == (port.port_id, "from_port")
        assert name[2] in expected.reasons
        assert counted == (segments, size)
        assert carried == {}
        return
    assert outcome.drops == {}
    if expected.action == "answer":
        assert outcome.verdict == REDIRECT
        assert outcome.frame[:12] == port.mac + port.gateway_mac
        assert carried.keys() == {port.port_id}
        assert carried[port.port_id][:2] == (segments, size)
        assert outcome.counted[port.port_id].from_slow_packets == 0
    elif expected.action == "fast":
        assert outcome.verdict == REDIRECT
        assert expected.target is not None
        assert carried == {
            port.port_id: (segments, size, 0, 0),
            expected.target.port_id: (0, 0, segments, size),
        }
        assert outcome.frame == forwarded(frame, expected.target)
    else:
        assert outcome.verdict == NEXT
        assert carried == {port.port_id: (segments, size, 0, 0)}
        assert outcome.counted[port.port_id].from_slow_packets == segments
        assert outcome.frame == frame


def forwarded(frame: bytes, target: ModelPort) -> bytes:
    """A router's work (RFC 1812, 5.2): next hop's MAC, TTL less one, checksum to match."""
    out = bytearray(target.mac + target.gateway_mac + frame[12:])
    if int.from_bytes(frame[12:14], "big") == IP4:
        out[22] -= 1
        out[24:26] = bytes(2)
        out[24:26] = checksum(bytes(out[14:34])).to_bytes(2, "big")
    else:
        out[21] -= 1
    return bytes(out)


@MANY
@given(data=st.data())
def test_the_guard_and_the_model_agree(rig: Rig, data: st.DataObject) -> None:
    """Any frame: refused for a reason that the RFCs give and counted under it, or passed, answered or
    forwarded as a router would; and never another verdict."""
    item = data.draw(frames.sent(rig.topology))
    agrees(rig, item, rig.send(item.frame, item.port, item.gso))


@FEW
@given(data=st.data())
def test_with_the_fast_path_off_the_verdicts_stay(rig: Rig, data: st.DataObject) -> None:
    """PW_SF_SLOW_ONLY turns every redirect to another port into a miss, and changes no refusal."""
    item = data.draw(frames.sent(rig.topology))
    fast = rig.send(item.frame, item.port, item.gso)
    rig.set_state(PwStateFlag.SF_SLOW_ONLY)
    try:
        slow = rig.send(item.frame, item.port, item.gso)
    finally:
        rig.set_state(0)
    assert slow.drops == fast.drops
    assert total(slow, item.port)[:2] == total(fast, item.port)[:2]
    if judge(rig.topology, item.port, item.frame, item.gso[0]).action == "fast":
        assert (slow.verdict, slow.frame) == (NEXT, item.frame)
    else:
        assert (slow.verdict, slow.frame) == (fast.verdict, fast.frame)


@FEW
@given(data=st.data())
def test_what_the_host_sends_is_never_refused_for_its_contents(rig: Rig, data: st.DataObject) -> None:
    """Egress of a representor: any bytes of the host's own pass, but for those over the MTU (R5)."""
    item = data.draw(frames.sent(rig.topology))
    outcome = rig.run("pw_to_port", item.frame, item.port, gso=item.gso)
    if outcome.verdict == SHOT:
        assert [name[1:] for name in outcome.drops] == [("to_port", "mtu")]
        assert len(item.frame) - 14 > item.port.mtu or item.gso[0]
    else:
        assert outcome.verdict == NEXT
        assert outcome.frame == item.frame
        assert total(outcome, item.port) == (0, 0, max(item.gso[1], 1), len(item.frame))


@FEW
@given(data=st.data())
def test_what_the_host_forwards_between_ports_obeys_isolation(rig: Rig, data: st.DataObject) -> None:
    """Egress again, of a packet that came in from another port: two networks that do not name each
    other stay apart, whatever the packet looks like by then."""
    item = data.draw(frames.sent(rig.topology))
    source = data.draw(st.sampled_from(rig.topology.ports))
    target = item.port
    outcome = rig.run("pw_to_port", item.frame, target, ingress=source.ifindex)
    apart = source.net != target.net and (source.net, target.net) not in rig.topology.reach
    if apart:
        assert outcome.verdict == SHOT
        assert list(outcome.drops) == [(target.port_id, "to_port", "isolation")]
    else:
        assert outcome.verdict == NEXT or list(outcome.drops) == [(target.port_id, "to_port", "mtu")]


def honest() -> list[tuple[str, bytes]]:
    """One well-formed frame of each kind that port one may send, by name."""
    topo = topology(list(range(1, 9)))
    port, two = topo.ports[0], topo.ports[1]
    a4, a6 = port.addresses
    b4, b6 = two.addresses
    gateway = port.gateway_mac

    def wrap(kind: int, packet: bytes) -> bytes:
        return frames.ethernet(port.mac, gateway, kind, packet)

    group = "ff02::1:ff00:1"
    return [
        ("udp4", wrap(IP4, frames.ipv4(str(a4), str(b4), UDP, frames.udp(a4, b4, 1, 2, b"x" * 20)))),
        ("tcp4", wrap(IP4, frames.ipv4(str(a4), str(b4), TCP, frames.tcp(a4, b4, 1, 2, b"x" * 20)))),
        (
            "options",
            wrap(IP4, frames.ipv4(str(a4), str(b4), UDP, frames.udp(a4, b4, 1, 2, b""), options=b"\1" * 8)),
        ),
        ("tcp6", wrap(0x86DD, frames.ipv6(str(a6), str(b6), TCP, frames.tcp(a6, b6, 1, 2, b"x" * 20)))),
        (
            "chain",
            wrap(
                0x86DD,
                frames.ipv6(
                    str(a6), str(b6), *frames.chain([0, 60, 43, 51, 60], UDP, frames.udp(a6, b6, 1, 2, b""))
                ),
            ),
        ),
        ("echo4", wrap(IP4, frames.ipv4(str(a4), "169.254.1.1", 1, frames.icmp(a4, a4, 8, b"1234ping")))),
        ("arp", frames.arp(port, str(a4), "169.254.1.1")),
        ("ns", frames.nd(port, str(a6), group, 135, "fe80::1", frames.option(1, port.mac))),
        ("dad", frames.nd(port, "::", group, 135, str(a6), b"")),
        ("na", frames.nd(port, str(a6), "ff02::1", 136, str(a6), frames.option(2, port.mac))),
    ]


@pytest.mark.parametrize(("name", "frame"), honest(), ids=[name for name, _ in honest()])
def test_a_frame_cut_at_any_byte_is_refused_or_whole(rig: Rig, name: str, frame: bytes) -> None:
    """Every prefix of a good frame gets the model's verdict; one that lost a header is never passed."""
    for length in range(15, len(frame) + 1):
        item = frames.Sent(rig.topology.ports[0], frame[:length])
        if frames.runnable(item.frame):
            agrees(rig, item, rig.send(item.frame, item.port))
    whole = judge(rig.topology, rig.topology.ports[0], frame)
    assert whole.reasons == set()


@pytest.mark.parametrize(("name", "frame"), honest(), ids=[name for name, _ in honest()])
def test_any_byte_of_a_good_frame_may_be_wrong(rig: Rig, name: str, frame: bytes) -> None:
    """Each byte of the first 80 set to each of a dozen values gets the model's verdict."""
    for at in range(min(len(frame), 80)):
        for value in (0, 1, 2, 4, 6, 44, 58, 67, 127, 128, 134, 255):
            item = frames.Sent(rig.topology.ports[0], frame[:at] + bytes([value]) + frame[at + 1 :])
            if frames.runnable(item.frame):
                agrees(rig, item, rig.send(item.frame, item.port))
