"""The truth tables again, by the programs themselves: compiled, written into the maps, asked by made packets.

Every flow of the corpora becomes its first packet. A packet from a pod goes through ``pw_from_port`` as that
pod's port, one from elsewhere through ``pw_to_port`` of the pod that it is for. All runs are traced, so that
no flow is remembered and each verdict is the policy's own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
from collections.abc import Callable, Iterator

import pytest

from portwright.dataplane import OBJECT, values
from portwright.dataplane.abi import PwPolicyConst, PwReason, PwStep, PwTrace, PwTraceConst
from portwright.kernel import bpf
from portwright.node import generations
from portwright.policy.compile import compile_policies
from portwright.policy.rules import ICMP, ICMP6, SCTP, TCP, UDP, EndpointKind, Flow, PolicySet, Snapshot
from portwright.policy.tables import Compiled
from tests.dataplane import frames
from tests.dataplane.model import IP4, IP6, ModelPort, Topology
from tests.dataplane.rig import SHOT, Rig
from tests.fix_bpf import ip, own_netns
from tests.fix_policy import (
    CORPORA,
    CYCLONUS_SELF,
    CYCLONUS_VERDICTS,
    State,
    cyclonus,
    cyclonus_policies,
    states,
)

pytestmark = pytest.mark.netns

_MARK, _PRIORITY = 8, 32
_POLICY = PwReason.R_POLICY


class Asked:
    """The programs on the tables of one state; two devices stand for every port."""

    def __init__(self, rig: Rig, near: int, far: int) -> None:
        self._rig, self._near, self._far = rig, near, far
        self._port: tuple[str, ...] = ()

    def install(self, compiled: Compiled) -> int:
        """Put tables in force; their generation."""
        return generations.install(self._rig.maps, generations.Entries(compiled))

    def give_out(self, last: int) -> None:
        """Say that this number was the last to be given out."""
        self._rig.maps["pw_generation"].update(
            (1).to_bytes(4, sys.byteorder), last.to_bytes(4, sys.byteorder)
        )

    def load(self, snapshot: Snapshot, compiled: Compiled) -> None:
        """Put a state in force: every pod's addresses lead to the far device."""
        maps = self._rig.maps
        self.install(compiled)
        for key in list(maps["pw_addrs"].keys()):
            maps["pw_addrs"].delete(key)
        self._own = {
            address: end.addresses
            for end in snapshot.endpoints
            if end.kind is EndpointKind.WORKLOAD and not end.host_network
            for address in end.addresses
        }
        # What the node itself sends has come in by no device.
        self._node = {a for end in snapshot.endpoints if end.local_node for a in end.addresses}
        self._port = ()
        pods = sorted(set(self._own.values()))
        # A pod is one sandbox, whichever device is its port: so each of its addresses is its own.
        self._sandboxes = {addresses: number for number, addresses in enumerate(pods, 1)}
        for addresses in pods:
            self._be(addresses, self._far)

    def _be(self, addresses: tuple[str, ...], ifindex: int) -> ModelPort:
        port = ModelPort(
            port_id=ifindex,
            ifindex=ifindex,
            net=1,
            sandbox=self._sandboxes[addresses],
            mac=b"\2\0\0\0\0\1",
            addresses=tuple(map(ipaddress.ip_address, addresses)),
            mtu=1500,
        )
        self._rig.put(port)
        return port

    def allows(self, flow: Flow) -> bool | None:
        """Whether the data path lets the flow's first packet pass; None where it never sees one."""
        source, target = self._own.get(flow.source), self._own.get(flow.destination)
        if source is not None and source == target:
            return None  # stays in the sandbox
        if source is not None:
            self._become(source)
            return self._run("pw_from_port", _frame(flow), self._near, self._near)
        if target is not None:
            self._be(target, self._far)
            ingress = 0 if flow.source in self._node else self._near + self._far + 7
            return self._run("pw_to_port", _frame(flow), self._far, ingress)
        return None

    def delivers(self, flow: Flow) -> bool | None:
        """The same of the host's stack's way from one pod to another; None of what goes no such way."""
        source, target = self._own.get(flow.source), self._own.get(flow.destination)
        if source is None or target is None or source == target:
            return None
        self._become(source)
        return self._run("pw_to_port", _frame(flow), self._far, self._near)

    def _become(self, source: tuple[str, ...]) -> None:
        """Make the near device the port of a pod, whose addresses still lead to the far one."""
        if source == self._port:
            return
        far = [(a, self._rig.maps["pw_addrs"].lookup(values.address(a))) for a in source]
        self._be(source, self._near)
        for address, value in far:
            assert value is not None
            self._rig.maps["pw_addrs"].update(values.address(address), value)
        self._port = source

    def _run(self, program: str, frame: bytes, ifindex: int, ingress: int) -> bool:
        maps = self._rig.maps
        maps["pw_trace"].update(bytes(4), bytes(PwTrace(0, bytes(192)).pack()))
        context = bytearray(self._rig.context(ifindex, ingress))
        struct.pack_into("=I", context, _MARK, PwTraceConst.TRACE_MARK)
        struct.pack_into("=I", context, _PRIORITY, PwTraceConst.TRACE_PRIORITY)
        done = self._rig.programs[program].test_run(frame, ctx=bytes(context))
        if done.retval != SHOT:
            return True
        trace = PwTrace.unpack(maps["pw_trace"].lookup(bytes(4)) or b"")
        steps = [struct.unpack_from("=III", trace.steps, at * 12) for at in range(trace.used)]
        assert steps[-1][:2] == (PwStep.S_DROP, _POLICY), (steps, frame.hex())
        return False


def _frame(flow: Flow) -> bytes:
    """The flow's first packet, as the pod sends it to its gateway."""
    source, target = ipaddress.ip_address(flow.source), ipaddress.ip_address(flow.destination)
    sport, port = flow.source_port or 40000, flow.port or 0
    match flow.protocol:
        case p if p == TCP:
            body = frames.tcp(source, target, sport, port, b"", flags=2)
        case p if p == UDP:
            body = frames.udp(source, target, sport, port, b"")
        case p if p == SCTP:
            body = struct.pack("!HHII", sport, port, 0, 0)
        case p if p in (ICMP, ICMP6):
            body = struct.pack("!BBHI", flow.icmp_type or 0, flow.icmp_code or 0, 0, 0)
        case _:
            body = bytes(8)
    if source.version == 4:
        packet = frames.ipv4(flow.source, flow.destination, flow.protocol, body)
    else:
        packet = frames.ipv6(flow.source, flow.destination, flow.protocol, body)
    return frames.ethernet(b"\2\0\0\0\0\1", b"\xee" * 6, IP4 if source.version == 4 else IP6, packet)


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    """The loaded programs, in a namespace with two devices."""
    with own_netns(), contextlib.ExitStack() as stack:
        ip("link", "add", "near", "type", "veth", "peer", "name", "far")
        near, far = socket.if_nametoindex("near"), socket.if_nametoindex("far")
        collection = stack.enter_context(bpf.Collection.load(bpf.CollectionSpec.load(OBJECT)))
        yield Asked(Rig(collection, Topology((), frozenset()), far), near, far)


def _judged(asked: Asked, state: State) -> tuple[int, int]:
    """(verdicts given, flows never seen); asserts each verdict."""
    asked.load(state.snapshot, compile_policies(state.policies, state.snapshot))
    given = unseen = 0
    for flow, row in state.asked:
        if flow.protocol in (TCP, UDP, SCTP) and flow.port is None:
            unseen += 1  # a later fragment, which goes its datagram's way
            continue
        found = asked.allows(flow)
        if found is None:
            unseen += 1
            continue
        given += 1
        assert found == row.allowed, f"{state.title}: {flow} is {'allowed' if found else 'denied'}"
    return given, unseen


def test_installs_that_failed_never_reach_the_slot_in_force(asked: Asked) -> None:
    """However many numbers were given out in vain, the next tables are not written over those in force."""
    nothing = compile_policies(PolicySet(), Snapshot())
    for lost in range(2 * PwPolicyConst.SLOTS):
        now = asked.install(nothing)
        asked.give_out(now + lost)
        assert asked.install(nothing) % PwPolicyConst.SLOTS != now % PwPolicyConst.SLOTS, lost


@pytest.mark.parametrize("name", sorted(CORPORA))
def test_a_corpus_through_the_programs(
    asked: Asked, name: str, record_property: Callable[[str, object], None]
) -> None:
    """Every verdict of the corpus whose packet comes by the data path is what the corpus says."""
    totals = [sum(column) for column in zip(*(_judged(asked, s) for s in states(name)), strict=True)]
    print(f"{name}: {totals[0]} verdicts by the programs, {totals[1]} flows they never see")
    record_property("verdicts", totals[0])
    assert totals[0] >= CORPORA[name] * 0.6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cyclonus_through_the_programs(asked: Asked, record_property: Callable[[str, object], None]) -> None:
    """All of cyclonus' verdicts but a pod's on itself, whose packets never leave it."""
    given = 0
    for step in cyclonus():
        asked.load(step.snapshot, compile_policies(cyclonus_policies(step.policies), step.snapshot))
        bits = iter(step.expected)
        for source in step.addresses:
            for target in step.addresses:
                for protocol, port in step.ports:
                    flow = Flow(
                        source=source, destination=target, protocol=protocol, source_port=50000, port=port
                    )
                    expected, found = next(bits) == "1", asked.allows(flow)
                    if found is not None:
                        given += 1
                        assert found == expected, f"{step.title}: {flow}"
    print(f"cyclonus: {given} verdicts by the programs")
    record_property("verdicts", given)
    assert given == CYCLONUS_VERDICTS - CYCLONUS_SELF
