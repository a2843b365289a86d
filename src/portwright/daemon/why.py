"""``why SRC DST``: makes the packet that SRC would send, and asks the data path."""

from __future__ import annotations

import ipaddress
from typing import Literal

from portwright.api import methods as m
from portwright.model.errors import InvalidInput, NotFound, PortStateError
from portwright.model.network import GATEWAY_MAC
from portwright.model.port import Port, PortState
from portwright.node.core import Core
from portwright.node.switch import Switch
from portwright.observe import why as engine
from portwright.observe.events import rule_of
from portwright.policy.rules import ICMP, ICMP6, Direction, Flow

#: The host as a peer: addresses that no port can have.
_HOST = {4: "127.0.0.1", 6: "::1"}


class Explainer:
    """Asks the data path itself, by BPF_PROG_TEST_RUN on the programs in force: nothing is guessed."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store

    def why(self, params: m.WhyParams) -> m.Why:
        """Raises NotFound and InvalidInput for names that mean nothing, PortStateError if detached."""
        source, target = self._end("src", params.src), self._end("dst", params.dst)
        family = params.family or _family(source, target)
        if isinstance(source, Port):
            return self._from_port(source, _address("dst", target, family), params, family)
        if isinstance(target, Port):
            return self._to_port(_address("src", source, family), target, params, family)
        raise InvalidInput(
            "src", params.src, "neither end is a port of this host; name a port, its address or its name"
        )

    def _end(self, field: str, text: str) -> Port | str:
        if text == "host":
            return "host"
        try:
            address = str(ipaddress.ip_address(text))
        except ValueError:
            return self._store.find_port(text)
        owner = self._store.address_owner(address)
        if owner is not None:
            return self._store.get_port(owner)
        del field
        return address

    def _attached(self, port: Port) -> Switch:
        switch = self._core.switch_of(port)
        if port.state is not PortState.ATTACHED or switch is None:
            raise PortStateError(port.port_id, port.state.value, "attached")
        return switch

    def _from_port(self, port: Port, dst: str, params: m.WhyParams, family: int) -> m.Why:
        switch = self._attached(port)
        src = _own_address(port, family)
        frame = _frame(port.mac, GATEWAY_MAC, src, dst, params)
        with self._core.entered(switch.fd):
            trace = engine.run(switch.programs["pw_from_port"], switch.maps, frame, port.rep_ifindex)
        steps = [m.WhyStep(step="packet", text=f"{params.proto} {src} > {dst}", detail=_ports(params))]
        steps += _inside("source", port, src)
        steps += [m.WhyStep(step=s.step, text=s.text, detail=s.detail) for s in trace.steps]
        target = self._by_ifindex(switch, trace.ifindex)
        path: Literal["fast", "slow", ""] = ""
        delivered = ""
        verdict = "refused" if trace.verdict == "drop" else "allowed"
        if trace.verdict == "drop":
            steps.append(
                m.WhyStep(
                    step="rule", text=rule_of(trace.reason), detail=_way_out(trace.reason, port, target)
                )
            )
        elif trace.verdict == "forward":
            path, delivered = "fast", target.rep_name if target else ""
        elif trace.verdict == "answered":
            path, delivered = "fast", port.rep_name
        else:
            path, delivered = "slow", target.rep_name if target else "host"
            if target is not None:
                with self._core.entered(switch.fd):
                    second = engine.run(
                        switch.programs["pw_to_port"],
                        switch.maps,
                        frame,
                        target.rep_ifindex,
                        port.rep_ifindex,
                    )
                steps += [m.WhyStep(step=s.step, text=s.text, detail=s.detail) for s in second.steps]
                verdict = "refused" if second.verdict == "drop" else "allowed"
            else:
                routed, passes = self._by_host(switch, src, dst, params, Direction.EGRESS)
                steps += routed
                if not passes:
                    verdict, delivered = "refused", ""
        if target is not None and verdict == "allowed":
            steps += _inside("destination", target, dst)
        steps += self._by_policy(src, dst, params)
        return m.Why(verdict=verdict, steps=tuple(steps), delivered_to=delivered, path=path)

    def _by_policy(self, src: str, dst: str, params: m.WhyParams) -> list[m.WhyStep]:
        """What the policies in force say of such a flow, and what would mend it."""
        said = self._core.policies.explain(_flow(src, dst, params))
        return [m.WhyStep(step="policy", text=line) for line in said.splitlines()]

    def _by_host(
        self, switch: Switch, src: str, dst: str, params: m.WhyParams, direction: Direction
    ) -> tuple[list[m.WhyStep], bool]:
        """What the host endpoint says by which the host routes it, in or out; and whether it passes there."""
        if switch.ref.cookie != self._core.own_cookie:
            return [], True
        interface = self._core.interface_to(dst if direction is Direction.EGRESS else src)
        found = self._core.policies.routed(_flow(src, dst, params), interface, direction)
        if not interface or found is None:
            return [], True
        passes, text = found
        return [m.WhyStep(step="host endpoint", text=text, detail=interface)], passes

    def _to_port(self, src: str, port: Port, params: m.WhyParams, family: int) -> m.Why:
        switch = self._attached(port)
        dst = _own_address(port, family)
        frame = _frame(GATEWAY_MAC, port.mac, src, dst, params)
        with self._core.entered(switch.fd):
            trace = engine.run(switch.programs["pw_to_port"], switch.maps, frame, port.rep_ifindex)
        steps = [m.WhyStep(step="packet", text=f"{params.proto} {src} > {dst}", detail=_ports(params))]
        steps.append(
            m.WhyStep(step="host", text="the host's stack routes it to the representor", detail=port.rep_name)
        )
        steps += [m.WhyStep(step=s.step, text=s.text, detail=s.detail) for s in trace.steps]
        refused = trace.verdict == "drop"
        if refused:
            steps.append(m.WhyStep(step="rule", text=rule_of(trace.reason), detail=""))
        elif src not in _HOST.values():
            routed, passes = self._by_host(switch, src, dst, params, Direction.INGRESS)
            steps += routed
            refused = not passes
        if not refused:
            steps += _inside("destination", port, dst)
        if src not in _HOST.values():
            steps += self._by_policy(src, dst, params)
        return m.Why(
            verdict="refused" if refused else "allowed",
            steps=tuple(steps),
            delivered_to="" if refused else port.rep_name,
            path="" if refused else "slow",
        )

    def _by_ifindex(self, switch: Switch, ifindex: int) -> Port | None:
        if not ifindex:
            return None
        for port in self._store.ports(state=PortState.ATTACHED):
            if port.rep_ifindex == ifindex and port.host.cookie == switch.ref.cookie:
                return port
        return None


def _family(source: Port | str, target: Port | str) -> int:
    """The one that both have; 4 where both families do."""
    choices = {4, 6}
    for end in (source, target):
        if isinstance(end, Port):
            choices &= {6 if ":" in a.address else 4 for a in end.addresses}
        elif end != "host":
            choices &= {6 if ":" in end else 4}
    if not choices:
        raise InvalidInput(
            "dst", str(target if isinstance(target, str) else target.port_id), "no common address family"
        )
    return min(choices)


def _address(field: str, end: Port | str, family: int) -> str:
    if isinstance(end, Port):
        return _own_address(end, family)
    if end == "host":
        return _HOST[family]
    if (":" in end) != (family == 6):
        raise InvalidInput(field, end, f"is not IPv{family}")
    return end


def _own_address(port: Port, family: int) -> str:
    for a in port.addresses:
        if (":" in a.address) == (family == 6):
            return a.address
    raise NotFound(f"IPv{family} address of port", port.port_id)


def _inside(which: str, port: Port, address: str) -> list[m.WhyStep]:
    """Of a clone's port: what stands in the packet on the guest's side of its tap."""
    inner = [a for a in port.inner_addresses if (":" in a) == (":" in address)]
    text = f"on the guest's side of {port.tap} the {which} is"
    return [m.WhyStep(step="clone", text=f"{text} {a}", detail=f"{a} = {address}") for a in inner]


def _frame(src_mac: str, dst_mac: str, src: str, dst: str, params: m.WhyParams) -> bytes:
    sport, dport = _numbers(params)
    return engine.packet(
        src_mac=src_mac,
        dst_mac=dst_mac,
        src=src,
        dst=dst,
        proto=params.proto,
        sport=sport,
        dport=dport,
    )


def _flow(src: str, dst: str, params: m.WhyParams) -> Flow:
    if params.proto == "icmp":
        number, echo = (ICMP6, 128) if ":" in src else (ICMP, 8)
        return Flow(source=src, destination=dst, protocol=number, icmp_type=echo, icmp_code=0)
    sport, dport = _numbers(params)
    number = engine.PROTOCOLS[params.proto]
    return Flow(source=src, destination=dst, protocol=number, source_port=sport, port=dport)


def _numbers(params: m.WhyParams) -> tuple[int, int]:
    """The two ports of the packet."""
    return params.sport or 40000, params.dport or 80


def _ports(params: m.WhyParams) -> str:
    sport, dport = _numbers(params)
    return "" if params.proto == "icmp" else f"port {sport} > {dport}"


def _way_out(reason: str, port: Port, target: Port | None) -> str:
    if reason == "isolation" and target is not None:
        return f"networks {port.network!r} and {target.network!r} must name each other in reach"
    return ""
