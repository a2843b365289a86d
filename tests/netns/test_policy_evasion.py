"""Root in a sandbox tries to slip by a policy, packet by packet: each meets the specification's verdict."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from portwright import Client
from portwright.dataplane.abi import PwTraceConst
from tests.dataplane.model import UDP
from tests.deadline import wait_until
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.netns.evasion import ACK, CLOSED, KEPT, POLICY, SYN, SYN_ACK, Cast, Sent, Stage, staged
from tests.netns.evasion_icmp import reply
from tests.netns.evasion_rows import ROWS

pytestmark = pytest.mark.netns

RecordProperty = Callable[[str, object], None]


@pytest.fixture(
    scope="module",
    params=[("receiver", False), ("sender", True)],
    ids=["by the receiver", "by the sender"],
)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """The policy written by each side; and a network that the host masquerades, and one that it doesn't."""
    policy, masquerade = request.param
    with staged(policy, masquerade=masquerade) as made:
        yield made


@pytest.fixture
def changing(stage: Stage) -> Iterator[Stage]:
    """A stage whose policy the test changes: it has its own again at the end."""
    yield stage
    stage.apply(POLICY[stage.policy])


def _met(stage: Stage, *frames: Sent) -> None:
    """Assert each one's fate."""
    for number, frame in enumerate(frames, 1):
        assert stage.fate(frame) in stage.expected(frame), f"frame {number}: {frame.frame.hex()}"


@pytest.mark.parametrize(("name", "version"), ROWS, ids=[f"{name}, IPv{v}" for name, v in ROWS])
def test_nothing_slips_by(stage: Stage, name: str, version: int, record_property: RecordProperty) -> None:
    """Every frame of the row meets its fate, and where it is dropped one packet is counted, for its port and
    reason; on the fast path and on the host's."""
    sent = 0
    for slow in (False, True):
        stage.wires.set_slow_only(slow)
        for number, frame in enumerate(ROWS[name, version](stage.cast(version)), 1):
            place = f"frame {number} of {name}, {'slow' if slow else 'fast'} path: {frame.frame.hex()}"
            assert stage.fate(frame) in stage.expected(frame), place
            sent += 1
    record_property("frames", sent)


def _opened(c: Cast) -> tuple[Sent, ...]:
    """Two connections of evil to web, answered."""
    return (
        c.opens("web", 80, "arrives"),
        c.opens("evil", 6000, "arrives", SYN_ACK, who="web", sport=80),
        c.says("web", 80, "arrives", sport=6001),
        c.says("evil", 6001, "arrives", who="web", sport=80),
    )


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flags", [ACK, SYN, SYN_ACK])
def test_an_open_flow_is_no_way_round_a_new_policy(changing: Stage, version: int, flags: int) -> None:
    """Under a policy that denies it the flow's four-tuple opens nothing more, from either side of it; under
    one that allows it again it does."""
    c = changing.cast(version)
    _met(changing, *_opened(c))
    changing.apply(CLOSED[changing.policy])
    _met(
        changing,
        c.opens("web", 80, "policy", flags),
        c.says("web", 80, "policy", sport=6001),
        c.opens("web", 80, "policy", ACK),
    )
    changing.apply(POLICY[changing.policy])
    _met(changing, c.opens("web", 80, "arrives"), c.says("web", 80, "arrives", sport=6001))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flags", [SYN, SYN | 0xC0])
def test_what_is_kept_open_opens_nothing_more(changing: Stage, version: int, flags: int) -> None:
    """Under a policy that denies it and keeps what is open, a connection goes on, and its four-tuple is not
    for another one."""
    c = changing.cast(version)
    _met(changing, *_opened(c))
    changing.apply(KEPT[changing.policy])
    _met(
        changing,
        c.opens("web", 80, "arrives", ACK),
        c.opens("evil", 6000, "arrives", ACK, who="web", sport=80),
        c.opens("web", 80, "policy", flags),
        c.says("web", 80, "arrives", sport=6001),
        c.says("web", 80, "policy", sport=6002),
        c.opens("web", 80, "arrives", ACK),
    )


@pytest.mark.parametrize("version", [4, 6])
def test_an_error_is_no_way_round_a_new_policy(changing: Stage, version: int) -> None:
    """An ICMP error about a flow that the new policy denies is related to nothing that may pass."""
    c = changing.cast(version)
    _met(changing, *_opened(c), c.quoting("web", reply(c), "arrives"))
    changing.apply(CLOSED[changing.policy])
    _met(changing, c.quoting("web", reply(c), "policy"))


@pytest.mark.parametrize("version", [4, 6])
def test_a_datagram_of_two_policies_does_not_pass(changing: Stage, version: int) -> None:
    """The later pieces of a datagram, whose first one passed under another policy, go nowhere."""
    c = changing.cast(version)
    whole = c.udp("web", 80, data=bytes(100))
    _met(changing, c.piece("web", UDP, whole[:48], 0, "held"))
    changing.apply(CLOSED[changing.policy])
    _met(changing, c.piece("web", UDP, whole[48:], 48, "fragment_order", more=False))


@pytest.mark.parametrize("version", [4, 6])
def test_the_programs_marks_are_not_the_sandbox_s_to_give(stage: Stage, version: int) -> None:
    """A packet with the marks by which `why` asks the programs, and by which these know their own resets, is
    a packet like any other."""
    c = stage.cast(version)
    tap = stage.wires.taps["evil"]
    tap.option(socket.SO_PRIORITY, PwTraceConst.TRACE_PRIORITY)
    try:
        for mark in (PwTraceConst.TRACE_MARK, PwTraceConst.RESET_MARK):
            tap.option(socket.SO_MARK, mark)
            _met(stage, c.opens("vault", 80, "policy"), c.opens("web", 80, "arrives"))
            _met(stage, c.opens("vault", 80, "policy", 0x04), c.says("web", 81, "policy"))
    finally:
        tap.option(socket.SO_MARK, 0)
        tap.option(socket.SO_PRIORITY, 0)


@pytest.mark.parametrize("version", [4, 6])
def test_an_heir_of_an_address_has_none_of_its_flows(
    daemon: Daemon, sandboxes: SandboxFactory, version: int
) -> None:
    """A port with the address of one that is gone is judged by its own labels, on the four-tuples of the
    other's open flows too."""
    vault, client = sandboxes(labels={"app": "vault"}), sandboxes(labels={"app": "client"})
    ours, theirs = (box.ip4 if version == 4 else box.ip6 for box in (client, vault))
    with daemon.client() as api, vault.ns.entered():
        api.policy_apply([("p.yaml", POLICY["receiver"])])
        with closing(socket.socket(_FAMILY[version], socket.SOCK_DGRAM)) as server:
            server.bind((theirs, 80))
            server.settimeout(5)
            _say(client, version, (ours, 6000), (theirs, 80))
            assert server.recv(10) == b"hello"
            api.port_delete(client.port.port_id)
            heir = sandboxes(labels={"app": "evil"}, ips=[client.ip4, client.ip6])
            before = denied(api)
            _say(heir, version, (ours, 6000), (theirs, 80))
            wait_until(lambda: denied(api) > before, 5, "the heir's datagram to be denied")
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recv(10)


_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


def _say(box: Sandbox, version: int, source: tuple[str, int], target: tuple[str, int]) -> None:
    """One datagram. It leaves when the gateway is known, which may be later."""
    with box.ns.entered():
        sock = socket.socket(_FAMILY[version], socket.SOCK_DGRAM)
    with closing(sock):
        sock.bind(source)
        sock.sendto(b"hello", target)


def denied(api: Client) -> int:
    """Packets dropped by policy so far, at every port."""
    return sum(d.packets for d in api.drops() if d.reason == "policy")
